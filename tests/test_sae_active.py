"""Sparse products and their gradients against dense ones, and the choice of the largest against torch.topk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saes.active import Active
from saes.objectives import BLOCKS, Chooser

ROWS, WIDTH, D = 17, 96, 12


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chosen(kind: str) -> Active:
    if kind == "fixed":
        return Active.fixed(normal(ROWS, WIDTH).topk(5, sorted=False).indices, WIDTH)
    score = normal(ROWS, WIDTH)
    score[3] = -1.0  # a row with none, the last one too
    score[-1] = -1.0
    return Active.where(score > (9.0 if kind == "none" else 1.0))


@pytest.mark.parametrize("kind", ["fixed", "where", "none"])
def test_products_and_gradients_are_those_of_dense_matrices(kind: str) -> None:
    active = chosen(kind)
    x, enc, bias, dec, shift = (
        normal(*s, seed=i) for i, s in enumerate([(ROWS, D), (WIDTH, D), (WIDTH,), (WIDTH, D), (D,)])
    )
    some = [p.requires_grad_() for p in (enc, bias, dec, shift)]
    weight = normal(ROWS, D, seed=9)

    def gradients(sparse: bool) -> tuple[Tensor, list[Tensor]]:
        pre = (x - shift) @ enc.T + bias
        if sparse:
            values = active.encode(active.at(pre.detach()), x, enc, bias, shift)
            out = active.decode(values**2, dec)  # not linear, so that values matter to their own gradient
        else:
            mask = active.dense(torch.ones(len(active.latents), dtype=torch.float64))
            out = (pre * mask) ** 2 @ dec
        return out.detach(), list(torch.autograd.grad((out * weight).sum(), some))

    (out, found), (expected, dense) = gradients(True), gradients(False)
    assert torch.allclose(out, expected)
    for one, other in zip(found, dense, strict=True):
        assert torch.allclose(one, other)


def test_parts_are_those_latents_and_make_up_the_whole() -> None:
    active = chosen("where")
    values, dec = normal(len(active.latents)), normal(WIDTH, D, seed=1)
    total = torch.zeros(ROWS, D, dtype=torch.float64)
    for low, high in ((0, 10), (10, 60), (60, WIDTH)):
        part, inside = active.part(low, high)
        assert torch.equal(part.latents, active.latents[inside]) and bool(
            ((part.latents >= low) & (part.latents < high)).all()
        )
        assert torch.equal(part.row_of, active.row_of[inside])
        total += part.decode(values[inside], dec)
    assert torch.allclose(total, active.decode(values, dec))


def test_sums_per_latent() -> None:
    active = chosen("where")
    values = normal(len(active.latents))
    assert torch.allclose(active.per_latent(values), active.dense(values).sum(0))
    assert torch.equal(active.at(active.dense(values)), values)


@pytest.mark.parametrize("width", [BLOCKS * 40, BLOCKS * 40 + 1, BLOCKS * 7])
def test_the_largest_of_each_row(width: int) -> None:
    """By blocks where these are many; equal maxima in one block, so that blocks alone would not do."""
    score = normal(31, width).float()
    score[:, ::2] = score[:, :1] + torch.arange(len(score[0, ::2])) * 1e-3
    active = Chooser().topk(score, 8)
    found = active.latents.view(31, 8).sort().values
    assert torch.equal(found, score.topk(8).indices.sort().values)


def test_the_largest_of_all_rows_whatever_came_before() -> None:
    chooser = Chooser()
    for step in range(6):
        scale = [1.0, 1.1, 0.3, 0.0, 5.0, 0.01][step]  # falling by more than the bound allows for, and rising
        score = normal(40, WIDTH, seed=step).float() * scale
        active = chooser.together(score, 90)
        best = score.flatten().topk(90).values
        if scale == 0:
            assert len(active.latents) == 0
        else:
            assert torch.equal(active.at(score).sort().values, best[best > 0].sort().values)
    assert len(chooser.together(-normal(4, 8).float().abs(), 3).latents) == 0
