"""Codes without an SAE: the controls that discrete SAE codes have to beat."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor


def kmeans(
    rows: Float[Tensor, "row d_model"], k: int, generator: Generator, iterations: int = 20
) -> Float[Tensor, "code d_model"]:
    """Lloyd's algorithm from k rows drawn at random (all rows, where there are fewer); an empty centre stays."""
    centres = rows[torch.randperm(len(rows), generator=generator)[:k]].clone()
    for _ in range(iterations):
        at = nearest(rows, centres)
        count = at.bincount(minlength=len(centres))[:, None]
        total = torch.zeros_like(centres).index_add_(0, at, rows)
        centres = torch.where(count > 0, total / count.clamp(min=1), centres)
    return centres


def nearest(x: Float[Tensor, "*any d_model"], centres: Float[Tensor, "code d_model"]) -> Int[Tensor, "*any"]:
    return (centres.square().sum(1) - 2 * x @ centres.T).argmin(-1)


def probe_codes(
    x: Float[Tensor, "example head d_model"], train: Int[Tensor, " trained"], bins: int
) -> Int[Tensor, "example head"]:
    """Which bin a head's output falls into along its own difference of class means; bins hold equally many training
    rows. The clean half of the examples comes first; a training set of one class gives a direction of zero, code 0."""
    n = len(x) // 2
    clean, corrupted = train[train < n], train[train >= n]
    direction = x[clean].mean(0) - x[corrupted].mean(0) if len(clean) and len(corrupted) else torch.zeros_like(x[0])
    along = (x * direction).sum(-1)
    edges = along[train].quantile(torch.linspace(0, 1, bins + 1, device=x.device)[1:-1], dim=0)
    return (along[:, None] > edges).sum(1)
