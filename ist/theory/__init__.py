"""The convergence theory of training with randomly masked neurons, as experiments that anyone can run.

Reference: F. Liao, A. Kyrillidis, "On the Convergence of Shallow Neural Network Training with Randomly Masked Neurons",
arXiv 2112.02668 (TMLR 2022); called [MRN] in this folder.

Where it sits: `algorithm.py` is Algorithm 1 of [MRN], `quantities/` has its problem, masks, kernels and bounds,
`quadratic.py` the quadratic model of arXiv 2306.16484. `experiments/` compares theory and measurement, `runner.py` runs
the experiments, `page.py` writes the page about them.
Not here: pools, configurations of real runs.

Shape letters: n samples, d inputs, m hidden neurons, p subnetworks, tau local steps, K rounds, B runs in a batch.
"""

EXPERIMENTS = (
    "figure2a",
    "figure2b",
    "figure2c",
    "calibrate",
    "rates",
    "floors",
    "kernels",
    "relatives",
    "frozen",
    "inputs",
    "bias",
    "system",
)
"""The experiments, in the order of the report page."""
