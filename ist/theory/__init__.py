"""The convergence theory of training with randomly masked neurons, as experiments that anyone can run.

Reference: F. Liao, A. Kyrillidis, "On the Convergence of Shallow Neural Network Training with Randomly Masked Neurons",
arXiv 2112.02668 (TMLR 2022); called [MRN] in this room.

Where it sits: `problem.py` holds data, `algorithm.py` its Algorithm 1 and nothing else, `kernels.py` and `bounds.py`
the quantities that its theorems speak of, `quadratic.py` the quadratic model of arXiv 2306.16484. `experiments/` sets
them beside each other, `runner.py` runs these. Not here: pools, configurations of real runs.

Shape letters: n samples, d inputs, m hidden neurons, p subnetworks, tau local steps, K rounds, B runs side by side.
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
    "inputs",
    "bias",
    "system",
)
"""In the order of the page."""
