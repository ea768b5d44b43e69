"""Count the lines of each job, by plain data-parallel training and by independent subnets; print them as a table.

python examples/ten_jobs/count_lines.py

A line counts if it has code: no comments, docstrings and empty lines. A version of a job is its function and everything
in its file that the function needs, such as imports, data, the network and helpers.
"""

import ast
import io
import tokenize
from pathlib import Path

GOAL = 6
"""By how many lines a job may be longer than by data-parallel training."""

JOBS = {
    "parameter_groups": ("GPT-2 (transformers)", "two parameter groups", "`ist.join`"),
    "clipping": ("Llama (transformers)", "clipping, and the model's own loss", "`ist.train(step=, clip_grad_norm=)`"),
    "accumulation": ("perceptron", "gradients accumulated over micro-batches", "`ist.join`"),
    "autocast": ("like ResNet-18", "bfloat16", "`ist.train(autocast=)`"),
    "whole_batch_loss": ("perceptron", "a contrastive loss that sees the batch", "`ist.train(step=)`"),
    "data_loader": ("embedding", "loader processes, a collate function that pads", "`ist.train(data=DataLoader)`"),
    "stream": ("perceptron", "an endless stream (IterableDataset)", "`ist.join`"),
    "own_files": ("perceptron", "a node's own files, of unequal length", '`ist.train(shard="own")`'),
    "early_stopping": ("perceptron", "a callback that ends the run", "`ist.train(callbacks=)`"),
    "checkpoints": ("perceptron", "resuming in the middle of an epoch", "`ist.join(run_dir=)`"),
}


def count(source: str, function: str) -> int:
    """Return the number of lines of code that a function of a file needs."""
    statements = ast.parse(source).body
    needed: list[ast.stmt] = [
        node for node in statements if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ]
    names, seen = [function], set[str]()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in statements:
            if name in _defined(node) and node not in needed:
                needed.append(node)
                names += [found.id for found in ast.walk(node) if isinstance(found, ast.Name)]
    code = _code_lines(source)
    return len({line for node in needed for line in range(_start(node), (node.end_lineno or 0) + 1)} & code)


def _defined(node: ast.stmt) -> set[str]:
    """Return the names that a statement of a file defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    if isinstance(node, ast.Assign):
        return {found.id for target in node.targets for found in ast.walk(target) if isinstance(found, ast.Name)}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    return set()


def _start(node: ast.stmt) -> int:
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def _code_lines(source: str) -> set[int]:
    """Return the numbers of the lines with code."""
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {line for token in tokens if token.type not in ignored for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
            lines -= set(range(node.lineno, (node.end_lineno or 0) + 1))
    return lines


def table() -> str:
    """Return the table of `examples/README.md`."""
    rows = [
        "| job | network | what it needs | by | DDP | IST | difference |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, words in JOBS.items():
        source = (Path(__file__).parent / f"{name}.py").read_text()
        ddp, by_subnets = count(source, "ddp"), count(source, "by_subnets")
        difference = by_subnets - ddp
        missed = f" (goal: {GOAL})" if difference > GOAL else ""
        rows.append(f"| `{name}.py` | {' | '.join(words)} | {ddp} | {by_subnets} | {difference:+d}{missed} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
