"""Neural tangent kernels of the ReLU perceptron with one hidden layer: of infinite width, of finite width, and masked.

Reference: [MRN] section 4; the closed form is due to Cho & Saul (2009).

Where it sits: `problem.py` checks inputs with it; `bounds.py` takes its least eigenvalue.
"""

import math

import torch
from torch import Tensor


def infinite_ntk(inputs: Tensor, xi: float = 1.0) -> Tensor:
    """Return H, H_ij = xi E_w[<x_i, x_j> 1{<w, x_i> >= 0, <w, x_j> >= 0}] for w ~ N(0, I).

    Args:
        inputs: (n, d), rows of norm 1.
        xi: The probability that a subnetwork holds a neuron.

    Returns:
        (n, n): xi <x_i, x_j> (pi - arccos <x_i, x_j>) / (2 pi).
    """
    cosines = inputs @ inputs.T
    return xi * cosines * (math.pi - torch.arccos(cosines.clamp(-1, 1))) / (2 * math.pi)


def finite_ntk(inputs: Tensor, weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the kernel of a network, or of its subnetworks, at the given weights.

    Args:
        inputs: (n, d).
        weights: (m, d).
        mask: (p, m), 1 where a subnetwork holds a neuron; None: the full network.

    Returns:
        (n, n), or (p, n, n): (1/m) <x_i, x_j> sum_r m_r 1{<w_r, x_i> >= 0} 1{<w_r, x_j> >= 0}.
    """
    active = (weights @ inputs.T >= 0).to(inputs.dtype)
    gram = inputs @ inputs.T
    if mask is None:
        return gram * (active.T @ active) / len(weights)
    together = torch.einsum("ri,pr,rj->pij", active, mask.to(inputs.dtype), active)
    return gram * together / len(weights)


def least_eigenvalue(kernel: Tensor) -> float:
    """Return the least eigenvalue of a symmetric matrix, or the least of several (..., n, n)."""
    return float(torch.linalg.eigvalsh(kernel)[..., 0].min())
