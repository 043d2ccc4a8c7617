"""Ablations that a circuit of a weight-sparse model must withstand, and others that the model must not.

    sufficiency  the circuit alone, also with other fills than the one it was found with
    necessity    the whole model without the circuit's channels, and without as many others (Gao et al. 2025, figure 32)
    subsets      the circuit with only a part of everything else ablated, at random or by an adversary: while all is
                 ablated, errors can cancel, and pruning makes use of that

Losses are in nats per prompt on the pairs that judge; chance is ln 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.sparse.masked import Ablated, Masked, accuracy, calibrated, loss, rescaled
from circuits.sparse.prune import Pruned, Question, Settings, descend, gates
from workbench.errors import UserError

CALIBRATIONS = ("refitted", "plain", "scaled")
SHARES = (0.25, 0.5, 0.75)
ADVERSARY = Settings(k_coef=0.0, lr=3e-2, steps=60, decay=0.0)
SOUGHT_ON = 32  # pairs on which the adversary seeks
Parts = Sequence[tuple[Int[Tensor, " _"], int]]  # channels, and how many of them are to be ablated


# ---- results ----


@dataclass(frozen=True)
class Sufficiency:
    """The circuit alone, scaled, and the whole model: losses, and shares of prompts answered right.

    nothing    loss with every channel ablated, scale and shift fitted on the pairs the circuit was found on: ln 2, or
               the circuit is praised for what reaches the logits without it (fills that differ between prompts, and
               above all frozen norms, whose scales tell what the whole model has made of the prompt)
    elsewhere  losses of the circuit and of nothing with other fills, and with norms frozen ("frozen norms"); scale and
               shift are fitted to each
    """

    loss: float
    accuracy: float
    whole: float
    whole_accuracy: float
    nothing: float
    elsewhere: dict[str, dict[str, float]]

    def summary(self) -> dict[str, Any]:
        return {
            "held_out_loss": round(self.loss, 4),
            "accuracy": round(self.accuracy, 4),
            "whole_model_loss": round(self.whole, 4),
            "nothing": round(self.nothing, 4),
            "elsewhere": {name: [round(x, 4) for x in both.values()] for name, both in self.elsewhere.items()},
        }


@dataclass(frozen=True)
class Necessity:
    """The whole model without some channels, which are at their fill; not scaled.

    whole, without  loss with all channels, and without the circuit's; accuracy: without them
    random          losses without as many random channels that are not in the circuit
    matched         the same, as many of each layer and site as the circuit has there
    ablated         how many channels these are: the circuit's, random and matched ones; the last two are fewer where
                    there are not as many others
    """

    whole: float
    without: float
    accuracy: float
    random: Float[Tensor, " draw"]
    matched: Float[Tensor, " draw"]
    ablated: tuple[int, int, int]

    def summary(self) -> dict[str, Any]:
        """Changes of the loss: without the circuit, and mean and largest of those without others."""
        return {
            "circuit": round(self.without - self.whole, 4),
            "random": mean_and_largest(self.random - self.whole),
            "matched": mean_and_largest(self.matched - self.whole),
        }


@dataclass(frozen=True)
class Subsets:
    """The circuit is kept, and a part of all other channels ablated.

    The circuit's scale and shift were fitted with all of them ablated. Ablating a part moves the answers' difference by
    another constant, which is no fault of the circuit, and a scale that makes little of it enough makes too much of it
    elsewhere. `refitted` is therefore what counts: scale and shift are fitted to each subset as they were to the
    circuit, on the pairs it was found on. It is large, ln 2 at most but for other pairs, where what tells the answers
    apart is lost. `plain` is without scale and shift, and `scaled` with the circuit's.

    shares       of the other channels that are ablated
    complete     the same three with all of them ablated, and `accuracy`, refitted
    adversary    the channels of a subset that was learned to make the refitted loss large on some of the pairs that
                 the circuit was found on (SOUGHT_ON); adversarial: what is lost by it
    """

    shares: tuple[float, ...]
    refitted: Float[Tensor, "share draw"]
    plain: Float[Tensor, "share draw"]
    scaled: Float[Tensor, "share draw"]
    complete: dict[str, float]
    adversary: Bool[Tensor, " channel"]
    adversarial: dict[str, float]

    def summary(self) -> dict[str, Any]:
        rows = zip(self.shares, self.refitted, strict=True)
        return {
            **{f"{share:g}": mean_and_largest(row) for share, row in rows},
            "all": round(self.complete["refitted"], 4),
            "adversarial": {name: round(value, 4) for name, value in self.adversarial.items()},
            "adversarial_n": int(self.adversary.sum()),
        }


# ---- passes ----


def sufficiency(question: Question, found: Pruned) -> Sufficiency:
    """How well the circuit alone does the task."""
    mask = found.kept.float()
    fills = [name for name in get_args(Ablated) if name != question.ablation]
    others: dict[str, dict[str, Any]] = {name: {"ablation": name} for name in fills}
    if question.stream is None:
        others.pop("mean", None)
    if not question.freeze_norms:
        others["frozen norms"] = {"freeze_norms": True}
    nothing, elsewhere = torch.zeros_like(mask), {}
    for name, options in others.items():
        other = question.varied(**options)
        elsewhere[name] = {"circuit": _refitted(other, mask), "nothing": _refitted(other, nothing)}
    alone, whole = (question.judge.odds(x) for x in (mask, torch.ones_like(mask)))
    alone = rescaled(alone, question.judge.pairs, found.scale)
    return Sufficiency(
        float(loss(alone)),
        accuracy(alone),
        float(loss(whole)),
        accuracy(whole),
        _refitted(question, nothing),
        elsewhere,
    )


def _refitted(question: Question, mask: Float[Tensor, " channel"]) -> float:
    """Loss with scale and shift fitted on the pairs that circuits are found on."""
    return question.judge.loss(mask, calibrated(question.find.odds(mask), question.find.pairs))


def necessity(question: Question, kept: Bool[Tensor, " channel"], *, draws: int = 20, seed: int = 0) -> Necessity:
    """What the whole model loses with the circuit's channels, and with others."""
    _check(draws)
    judge, generator = question.judge, torch.Generator().manual_seed(seed)
    outside = (~kept).nonzero()[:, 0]
    n = int(kept.sum())
    matched = []
    for _, _, span in judge.channels.spans:
        members = outside[(outside >= span.start) & (outside < span.stop)]
        matched.append((members, min(int(kept[span].sum()), len(members))))
    parts: list[Parts] = [[(outside, min(n, len(outside)))], matched]
    losses = [torch.tensor([judge.loss(_without(len(kept), part, generator)) for _ in range(draws)]) for part in parts]
    left = judge.odds((~kept).float())
    counts = [sum(count for _, count in part) for part in parts]
    return Necessity(question.whole, float(loss(left)), accuracy(left), losses[0], losses[1], (n, counts[0], counts[1]))


def subsets(
    question: Question,
    found: Pruned,
    *,
    shares: Sequence[float] = SHARES,
    draws: int = 20,
    settings: Settings = ADVERSARY,
    seed: int = 0,
) -> Subsets:
    """What the circuit loses by parts of the rest being ablated.

    shares    of the channels outside the circuit, `draws` random subsets each
    settings  of the adversary's search
    """
    _check(draws)
    generator, n = torch.Generator().manual_seed(seed), len(found.kept)
    outside = (~found.kept).nonzero()[:, 0]
    rows = []
    for share in shares:
        part = [(outside, round(share * len(outside)))]
        rows += [_losses(question, found, _without(n, part, generator) == 0) for _ in range(draws)]
    tables = {name: torch.tensor([row[name] for row in rows]).view(-1, draws) for name in CALIBRATIONS}
    find = question.find.part(torch.arange(min(SOUGHT_ON, len(question.find.pairs))))
    adversary = _adversary(find, found, settings, seed)
    return Subsets(
        tuple(shares), **tables, complete=_losses(question, found, ~found.kept), adversary=adversary,
        adversarial=_losses(question, found, adversary),
    )  # fmt: skip


def _losses(question: Question, found: Pruned, ablated: Bool[Tensor, " channel"]) -> dict[str, float]:
    """With some channels ablated: the loss with each calibration, and the accuracy with one of its own."""
    mask = (~ablated).float()
    odds, pairs = question.judge.odds(mask), question.judge.pairs
    refitted = rescaled(odds, pairs, calibrated(question.find.odds(mask), question.find.pairs))
    three = (refitted, odds, rescaled(odds, pairs, found.scale))
    return {
        **{name: float(loss(each)) for name, each in zip(CALIBRATIONS, three, strict=True)},
        "accuracy": accuracy(refitted),
    }


def _adversary(find: Masked, found: Pruned, settings: Settings, seed: int) -> Bool[Tensor, " channel"]:
    """The channels outside the circuit whose ablation makes the refitted loss largest, of all subsets that a search
    met."""
    most, ablated = -math.inf, torch.zeros_like(found.kept)

    def objective(mask: Tensor) -> Tensor:
        nonlocal most, ablated
        mask = mask.masked_fill(found.kept, 1)
        odds = find.odds(mask, grad=True)
        value = loss(rescaled(odds, find.pairs, calibrated(odds, find.pairs)))
        if float(value.detach()) > most:
            most, ablated = float(value.detach()), mask.detach() == 0
        return -value

    descend(gates(len(found.kept), settings, seed), objective, settings)
    return ablated


def _without(n: int, parts: Parts, generator: torch.Generator) -> Float[Tensor, " channel"]:
    """A mask of n channels without so many random ones of each part."""
    mask = torch.ones(n)
    for members, count in parts:
        mask[members[torch.randperm(len(members), generator=generator)[:count]]] = 0
    return mask


def mean_and_largest(values: Float[Tensor, " draw"]) -> list[float]:
    return [round(float(values.mean()), 4), round(float(values.max()), 4)]


def _check(draws: int) -> None:
    if draws < 1:
        raise UserError(f"draws={draws} gives nothing to compare with; draw at least 1.")
