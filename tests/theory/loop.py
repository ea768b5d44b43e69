"""Algorithm 1 as a plain loop over subnetworks, neurons and samples: slow, but easy to compare with the paper."""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def predict(weights: Array, signs: Array, mask: Array, inputs: Array) -> Array:
    """Return f^l(x) = (1/sqrt m) sum_r a_r m_r relu(<w_r, x>)."""
    out = np.zeros(len(inputs))
    for i, x in enumerate(inputs):
        for r, w in enumerate(weights):
            out[i] += signs[r] * mask[r] * max(0.0, float(w @ x)) / math.sqrt(len(weights))
    return out


def gradient(weights: Array, signs: Array, mask: Array, inputs: Array, targets: Array) -> Array:
    """Return the gradient of 0.5 ||y - f^l||^2."""
    residual = predict(weights, signs, mask, inputs) - targets
    out = np.zeros_like(weights)
    for r, w in enumerate(weights):
        for i, x in enumerate(inputs):
            if w @ x > 0:
                out[r] += signs[r] * mask[r] / math.sqrt(len(weights)) * residual[i] * x
    return out


def algorithm_1(
    weights: Array, signs: Array, masks: list[Array], inputs: Array, targets: Array, tau: int, eta: float, xi: float
) -> tuple[Array, list[float]]:
    """Return the final weights, and the mean squared error, scaled by xi, before each round and at the end."""

    def error(w: Array) -> float:
        full = np.ones(len(signs))
        return float(np.mean((targets - xi * predict(w, signs, full, inputs)) ** 2))

    errors = [error(weights)]
    for mask in masks:
        change = np.zeros_like(weights)
        for own in mask:
            local = weights.copy()
            for _ in range(tau):
                local -= eta * gradient(local, signs, own, inputs, targets)
            change += local - weights
        holders = mask.sum(axis=0)
        scale = np.minimum(holders, 1) / np.maximum(holders, 1)
        weights = weights + scale[:, None] * change
        errors.append(error(weights))
    return weights, errors
