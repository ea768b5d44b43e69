"""The rate of subnetworks that are trained against the frozen rest, in closed form.

Subnetwork l makes tau gradient steps with step size eta on the loss of the full network, in which only its own neurons
move. H_l is the kernel of these neurons; H is that of the full network (without a factor xi). The merge adds gamma
times the mean change of each neuron's copies.

Proposition. Let the kernels be constant in a round (the lazy regime: wide networks, small movement), and let
eta lambda_max(H_l) <= 1. With categorical masks the error e = y - f(W, X) follows
    e_{k+1} = (I - gamma S) e_k,    S = sum_l [I - (I - eta H_l)^tau].
1. S is positive definite if H is. So, for a gamma within the limit, the error vanishes, whatever the masks: there is
   no floor. Without the assumption on kernels: a network with e = 0 does not move, since all its gradients are 0. With
   the rest absent it moves, because each subnetwork corrects the difference of its own function from y.
2. Let g(x) = 1 - (1 - eta x)^tau. The largest eigenvalue of S is at most p g(lambda_max(H) / p), so no round increases
   ||e|| if gamma <= 2 / (p g(lambda_max(H) / p)). In particular gamma < 2/p never diverges.
3. If the neurons of each subnetwork are a fair sample, H_l = H/p, then an eigenvalue lambda of H gives S the eigenvalue
   s(lambda) = p g(lambda/p), and the limit of 2 is exact.
Proof. One local step multiplies the error by I - eta H_l, so tau steps remove the part I - (I - eta H_l)^tau of e; the
neurons are disjoint, so these changes add up. For 2, take a unit vector v: g is concave and increasing on [0, 1/eta],
so by Jensen's inequality, applied twice, v^T S v <= sum_l g(v^T H_l v) <= p g(v^T H v / p) <= p g(lambda_max(H) / p).
For 1, g is positive above 0, so v^T S v = 0 only if H_l v = 0 for all l, which is H v = 0. I - gamma S is symmetric, so
with a gamma below the limit each round makes ||e|| smaller, also if each round has other masks.

With Bernoulli masks, a held neuron takes the mean of about p xi copies of nearly equal changes. If H_l = xi H, the same
argument gives s(lambda) = (theta/xi) g(xi lambda). So theta/xi takes the place of p: the number of subnetworks that
correct the same error with different neurons. It is p for categorical masks and 1 for a single subnetwork.

What follows for gamma. s(lambda) is between eta tau lambda theta (few, small steps: gradient descent, for which gamma =
1 is right as long as eta tau lambda_max is about 1) and theta/xi (many steps: every subnetwork removes the error alone,
which needs gamma = xi/theta, or 1/p). `best_scale` is the minimax optimum between. It compromises: fast directions want
1/p, slow ones want 1. If gamma is fitted in each round, gamma = <e, Se> / <Se, Se>, then a round reduces ||e|| at least
as much as with any other gamma. So the minimax rate is also a bound for it, without knowledge of the spectrum.

Shared parameters, which every subnetwork trains and the merge averages, are a part sigma of the kernel: H_s = sigma H
and H_l = (1 - sigma) H/p. Each subnetwork then removes the part g(kappa lambda) of the error alone, kappa = sigma + (1
- sigma)/p, and a direction has the factor 1 - (sigma + gamma (1 - sigma)) g(kappa lambda) / kappa. For many local
steps, a gamma of 1/p for the own neurons alone is exact; a common one for all changes would be kappa, which is above
1/p.

If the rest is rounded to Q(W), subnetwork l corrects e + delta_l, where delta_l = f(W) - f(own neurons of W, others of
Q(W)). The iteration ends where sum_l [I - (I - eta H_l)^tau] (e + delta_l) = 0. For categorical masks and equal H_l
this is e = -(1 - 1/p) (f(W) - f(Q(W))), since the mean of delta_l over a partition is (1 - 1/p) (f(W) - f(Q(W))).

An outer Nesterov optimizer (learning rate alpha, momentum mu) on the merged change multiplies gamma by alpha, and
lowers the limit of alpha gamma s from 2 to 2 (1 + mu) / (1 + 2 mu), which approaches 4/3 as mu approaches 1.

Related: simultaneous steps of blocks from the same point are a damped block Jacobi iteration. J. K. Bradley et al.,
arXiv 1105.5379, prove speedups of parallel coordinate descent on L1-regularized losses that are linear up to a limit
that the problem sets. In P. Richtarik, M. Takac, arXiv 1212.0873, the speedup depends on the separability of the
objective: without any there may be no speedup. C. Ma et al., arXiv 1502.03508, compare averaging and adding the
updates of workers that optimize disjoint dual variables. A. Filippova et al., arXiv 2509.22418, train language models
with a full forward pass and a fixed subset of trained parameters on each node.

Where it sits: the experiment `frozen` compares it with measurements.
Not here: the iteration (`ist/theory/algorithm.py`).
"""

import torch
from torch import Tensor

from ist.theory.quantities.masks import Law


def removed(eigenvalues: Tensor, law: Law, local_steps: int, step_size: float) -> Tensor:
    """Return s: the part of the error, by direction, that all subnetworks together remove in a round at gamma = 1.

    Args:
        eigenvalues: Of the full network's kernel H, without a factor xi; any shape.
        law: p and the distribution of the masks; m does not matter.
        local_steps: tau.
        step_size: eta.

    Returns:
        (theta/xi) (1 - (1 - eta xi lambda)^tau), which is above 1 where the subnetworks overshoot.
    """
    alone = 1 - (1 - step_size * law.probability * eigenvalues) ** local_steps
    return law.theta / law.probability * alone


def factors(eigenvalues: Tensor, law: Law, local_steps: int, step_size: float, merge_scale: float) -> Tensor:
    """Return 1 - gamma s: the factor of the error in a round, by direction."""
    return 1 - merge_scale * removed(eigenvalues, law, local_steps, step_size)


def largest_scale(
    eigenvalues: Tensor, law: Law, local_steps: int, step_size: float, outer_lr: float = 1.0, momentum: float = 0.0
) -> float:
    """Return the limit of gamma, 2 / max(s) without an outer optimizer: the error grows with a larger gamma.

    Args:
        eigenvalues: As for `removed`.
        law: As for `removed`.
        local_steps: tau.
        step_size: eta.
        outer_lr: alpha, the learning rate of the outer Nesterov optimizer.
        momentum: mu, its momentum, at least 0 and below 1.
    """
    limit = 2 * (1 + momentum) / (1 + 2 * momentum) / outer_lr
    return limit / float(removed(eigenvalues, law, local_steps, step_size).max())


def best_scale(eigenvalues: Tensor, law: Law, local_steps: int, step_size: float) -> float:
    """Return the gamma in (0, 1] with the smallest largest factor |1 - gamma s|: 2 / (min(s) + max(s)), at most 1."""
    s = removed(eigenvalues, law, local_steps, step_size)
    return min(1.0, 2 / float(s.min() + s.max()))


def monotone_scale(eigenvalues: Tensor, law: Law, local_steps: int, step_size: float) -> float:
    """Return the largest gamma in (0, 1] with which no direction overshoots: 1 / max(s), at most 1.

    It is the best for slow directions, up to the factor of 2 that stability leaves.
    """
    return min(1.0, 1 / float(removed(eigenvalues, law, local_steps, step_size).max()))


def round_matrix(
    kernels: Tensor, local_steps: int, step_size: float, merge_scale: float, shared: Tensor | None = None
) -> Tensor:
    """Return the matrix that multiplies the error in a round, without assuming that the subnetworks' kernels are equal.

    Args:
        kernels: H_l, the kernels of the own neurons of disjoint subnetworks, (p, n, n).
        local_steps: tau.
        step_size: eta.
        merge_scale: gamma, of the changes of own neurons.
        shared: H_s, the kernel of the parameters that every subnetwork trains and the merge averages, (n, n).

    Returns:
        (n, n): I - gamma S if nothing is shared.
    """
    unit = torch.eye(kernels.shape[-1], dtype=kernels.dtype)
    common = torch.zeros_like(unit) if shared is None else shared
    # After i local steps, the error of subnetwork l is (I - eta (H_s + H_l))^i e; its changes are sums of these.
    remaining = unit.expand_as(kernels)
    total = torch.zeros_like(kernels)
    for _ in range(local_steps):
        total = total + step_size * remaining
        remaining = remaining - step_size * (common + kernels) @ remaining
    return unit - merge_scale * (kernels @ total).sum(dim=0) - common @ total.mean(dim=0)
