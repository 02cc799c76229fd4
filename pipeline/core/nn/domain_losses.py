"""Distances between the features of two domains, and losses of rows without labels.

Shapes: n and m rows of the source and of the target, D features, C classes. All are computed in
float32, of the rows that are given: `pipeline.core.nn.all_gather` gathers them from all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.nn.losses import without_autocast

KERNELS = (0.125, 0.25, 0.5, 1.0, 2.0)
"""Bandwidths of the Gaussian kernels, in mean squared distances."""
TINY = 1e-8


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * gradients[0], None


def reversed_gradient(x: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``x`` itself; its gradient is multiplied by ``-scale`` (Ganin and Lempitsky 2015)."""
    return cast(Tensor, _Reversed.apply(x, scale))  # pyright: ignore[reportUnknownMemberType]


def coral(source: Tensor, target: Tensor) -> Tensor:
    """Return ||C_s - C_t||_F^2 / (4 D^2) of the covariances (Sun and Saenko 2016).

    Args:
        source: (n, D) with n > 1.
        target: (m, D) with m > 1.
    """
    with without_autocast(source):
        difference = torch.cov(source.float().T) - torch.cov(target.float().T)
    return difference.square().sum() / (4 * source.shape[1] ** 2)


def squared_distances(rows: Tensor) -> Tensor:
    """Return (n, n) squared Euclidean distances of (n, D) rows."""
    lengths = rows.square().sum(-1)
    with without_autocast(rows):
        products = rows @ rows.T
    return (lengths[:, None] + lengths[None] - 2 * products).clamp(min=0)


def gaussian_kernels(rows: Tensor) -> Tensor:
    """Return (n, n), the sum of Gaussian kernels exp(-d^2 / (2 w)) over the bandwidths `KERNELS`.

    w is a multiple of the mean squared distance of different rows, which has no gradient.
    """
    distances = squared_distances(rows.float())
    n = len(rows)
    mean = distances.detach().sum() / max(1, n * (n - 1))
    scaled = distances / (2 * mean.clamp(min=TINY))
    return torch.stack([torch.exp(-scaled / width) for width in KERNELS]).sum(0)


def kernel_mmd(kernels: Tensor, sources: int) -> Tensor:
    """Return the unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012).

    Args:
        kernels: (n + m, n + m) kernel of all pairs, the rows of the source first.
        sources: n; n and m are above 1.
    """
    n, m = sources, len(kernels) - sources
    within = kernels - torch.diag(kernels.diagonal())
    source, target = within[:n, :n].sum(), within[n:, n:].sum()
    across = kernels[:n, n:].sum()
    within_source = source / (n * (n - 1))
    within_target = target / (m * (m - 1))
    return within_source + within_target - 2 * across / (n * m)


def joint_mmd(source: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Return the squared discrepancy of a layer with several Gaussian kernels (Long et al. 2015).

    The kernels of several layers are multiplied (Long et al. 2017).

    Args:
        source: (n, D_l) of every layer, n > 1.
        target: (m, D_l) of every layer, m > 1.
    """
    product = torch.ones((), device=source[0].device)
    for of_source, of_target in zip(source, target, strict=True):
        product = product * gaussian_kernels(torch.cat([of_source, of_target]))
    return kernel_mmd(product, len(source[0]))


def entropies(scores: Tensor) -> Tensor:
    """Return (n,) entropies in nats of the softmax of scores (n, C)."""
    log_probabilities = scores.float().log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def label_set_entropies(scores: Tensor) -> Tensor:
    """Return (n,) entropies in nats of independent labels with logits (n, L), summed over them."""
    scores = scores.float()
    probabilities = scores.sigmoid()
    return F.binary_cross_entropy_with_logits(scores, probabilities, reduction="none").sum(-1)


def class_confusion(scores: Tensor, temperature: float = 2.5) -> Tensor:
    """Return the minimum class confusion of scores (n, C) (Jin et al. 2020).

    Rows are weighed by 1 + exp(-entropy), the confusion of two classes is the weighted product of
    their probabilities, normalised by class; what is returned is the mean over classes of the
    confusion with all others.
    """
    probabilities = (scores.float() / temperature).softmax(-1)
    entropy = entropies(scores.float() / temperature).detach()
    weights = 1 + torch.exp(-entropy)
    weights = weights * len(weights) / weights.sum()
    with without_autocast(probabilities):
        confusion = (probabilities * weights[:, None]).T @ probabilities
    confusion = confusion / confusion.sum(1, keepdim=True).clamp(min=TINY)
    return (confusion.sum() - confusion.trace()) / scores.shape[1]
