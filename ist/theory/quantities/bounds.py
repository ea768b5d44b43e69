"""The bounds that [MRN] proves, as numbers. lambda_0 belongs to the kernel with its factor xi, as in the paper.

Where it sits: experiments compare these bounds with measurements.
Not here: the kernel's eigenvalue lambda_0 (`kernels.py`).
"""

from dataclasses import dataclass

from ist.errors import ConfigError


@dataclass(frozen=True)
class Setting:
    """The quantities in the bounds.

    Attributes:
        samples: n.
        inputs: d.
        width: m.
        subnetworks: p.
        local_steps: tau.
        xi: The probability that a subnetwork holds a neuron; 1/p for categorical masks.
        theta: The probability that a neuron is trained in a round.
        step_size: eta.
        lambda_0: The least eigenvalue of the infinite-width kernel, including the factor xi.
        kappa: The standard deviation of the initial weights.
    """

    samples: int
    inputs: int
    width: int
    subnetworks: int
    local_steps: int
    xi: float
    theta: float
    step_size: float
    lambda_0: float
    kappa: float = 1.0

    def __post_init__(self) -> None:
        if self.lambda_0 <= 0:
            raise ConfigError(f"'lambda_0' is {self.lambda_0}: expected a positive number; remove parallel inputs")


def bernoulli_rate(s: Setting) -> float:
    """Return 1 - eta theta tau lambda_0 / 4, the factor of the error in a round (Theorem 3, Corollaries 4 to 6)."""
    return 1 - s.step_size * s.theta * s.local_steps * s.lambda_0 / 4


def bernoulli_floor(s: Setting) -> float:
    """Return B_1, the error floor of Theorem 3, as a sum over the samples."""
    n, m, p, tau, eta = s.samples, s.width, s.subnetworks, s.local_steps, s.step_size
    spread = s.theta - s.xi**2
    c_1 = 4 * s.theta**2 * (1 - s.xi) * n * s.kappa**2 / p
    return (
        64 * (1 - s.xi) ** 2 * n**3 * s.inputs / (m * s.lambda_0**2)
        + 68 * eta * tau * spread * n**3 * s.kappa**2 / (p * s.lambda_0)
        + spread * n * s.kappa**2 / (6 * tau**2 * p)
        + (tau - 1) ** 2 * p * c_1 / (24 * tau**2)
        + 8 * eta**2 * (tau - 1) ** 2 * n**4 * p * c_1 / s.lambda_0**2
        + 4 * eta * (tau - 1) * p * n * c_1
    )


def categorical_rate(s: Setting) -> float:
    """Return 1/2 + 1/2 (1 - eta lambda_0 / 2)^tau, the factor of the error in a round (Theorem 7)."""
    return 0.5 + 0.5 * (1 - s.step_size * s.lambda_0 / 2) ** s.local_steps


def categorical_floor(s: Setting) -> float:
    """Return tau (p - 1)^2 n^3 d / (lambda_0^2 m): Theorem 7's floor up to an unpublished constant factor."""
    return s.local_steps * (s.subnetworks - 1) ** 2 * s.samples**3 * s.inputs / (s.lambda_0**2 * s.width)


def radius(s: Setting) -> float:
    """Return R = kappa lambda_0 / (8 n): Theorem 2 holds while no neuron is farther from its initial weights."""
    return s.kappa * s.lambda_0 / (8 * s.samples)
