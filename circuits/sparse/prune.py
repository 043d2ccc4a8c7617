"""Pruning a weight-sparse model to the circuit of a task: which few channels suffice.

Gao et al. 2025, section 2.2 and appendix A.5. Each channel has a gate tau, clamped to [-1, 1]; the mask is 1 where
tau >= 0, with the slope of sigmoid(tau / temperature) on the way back. A channel that is masked carries its mean over
the training stream. Minimised are the task's loss, a cross-entropy between the two answers alone, on both prompts of
each pair, and k_coef times the number of channels that are left. The circuit is then the smallest number of channels of
largest tau with which the loss meets a target, found by bisection, after scale and shift of the difference of the two
answers' logits were fitted (what is left of a model is often sure of the right thing by too much or too little).

The smallest one that meets a target on some pairs is one that these pairs are kind to, and a few prompts that fail make
most of a loss: on others it is often above the target. It can be asked to meet the target by some standard
errors (`sure`; the paper does not, nor do tables over many tasks).

Mean ablation is the weakest test that a circuit can pass; `circuits.sparse.validate` has others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.graph import Circuit
from circuits.sparse.channels import Channels
from circuits.sparse.masked import MOST_SCALE, Ablated, Masked, Pairs, bound, calibrated, fills, loss, rescaled
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.progress import note, track
from workbench.prompts import Batch

__all__ = [
    "HELD", "MOST_SCALE", "SEARCH", "Ablated", "Masked", "Pairs", "Pruned", "Question", "Searched", "Settings",
    "Smallest", "ask", "attribution", "bound", "calibrated", "descend", "fills", "gates", "learn", "loss", "prune",
    "rescaled", "smallest",
]  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Of mask learning; the paper searches for them (table 2), here a few are tried.

    k_coef       price of a channel, in nats
    hold         the price rises while the loss is below two thirds of the target, and falls while it is above
    steps        of Adam, each on `batch` pairs
    temperature  of the sigmoid whose slope stands for that of the step
    init         where gates begin, and how much they differ: by chance, or with `hold` in order of attribution

    At one price and with gates that begin alike, Adam closes nearly all of them at once, and a circuit grows from
    nothing: the smallest ones are found so, but none where channels do nothing alone. With `hold` it is left over.
    """

    k_coef: float = 1e-3
    lr: float = 1e-2
    steps: int = 200
    batch: int = 32
    temperature: float = 1.0
    init: tuple[float, float] = (0.1, 0.01)
    decay: float = 1e-3
    beta2: float = 0.95
    clip: float = 1.0
    hold: bool = False


HELD, PRICES = Settings(k_coef=1e-4, lr=2e-2, init=(0.02, 0.6), hold=True), (1e-6, 1e-1)
# One grows a circuit, the next leaves one over; the third is slower and finds half as many edges on some tasks.
SEARCH = (Settings(3e-3, 3e-2), HELD, Settings(3e-3, 1e-2), Settings(1e-3, 3e-2))


# ---- learning a mask ----


class _Step(torch.autograd.Function):
    """1 where tau >= 0; backwards the slope of sigmoid(tau / temperature)."""

    @staticmethod
    def forward(ctx: Any, tau: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(tau)
        ctx.temperature = temperature
        return (tau >= 0).to(tau.dtype)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> tuple[Tensor, None]:
        (tau,) = ctx.saved_tensors
        s = (tau / ctx.temperature).sigmoid()
        return slopes[0] * s * (1 - s) / ctx.temperature, None


def learn(
    masked: Masked,
    settings: Settings,
    seed: int = 0,
    without: Bool[Tensor, " channel"] | None = None,
    target: float = 0.15,
) -> Float[Tensor, " channel"]:
    """Gates, by which channels are ranked; those of channels that are held at their fill (`without`) are -inf."""
    held = torch.zeros(len(masked.channels), dtype=torch.bool) if without is None else without
    parts = cycle(masked.parts(settings.batch, torch.Generator().manual_seed(seed)))
    price, aim = settings.k_coef, target * 2 / 3

    def objective(mask: Tensor) -> Tensor:
        nonlocal price
        mask = mask.masked_fill(held, 0)
        lost = loss(next(parts).odds(mask, grad=True))
        total = lost + price * mask.sum()
        if settings.hold:
            price *= math.exp(0.1 * max(-1.0, 1 - float(lost.detach()) / aim))
            price = min(max(price, PRICES[0]), PRICES[1])
        return total

    order = attribution(masked.part(torch.arange(min(16, len(masked.pairs))))) if settings.hold else None
    return descend(gates(len(held), settings, seed, order), objective, settings).masked_fill(held, -math.inf)


def gates(
    n: int, settings: Settings, seed: int = 0, order: Float[Tensor, " channel"] | None = None
) -> Float[Tensor, " channel"]:
    """n gates where they begin: spread by chance, or evenly in a given order."""
    mean, spread = settings.init
    if order is not None:
        return mean + spread * order.argsort(stable=True).argsort() / n
    return mean + spread * torch.randn(n, generator=torch.Generator().manual_seed(seed))


def descend(
    start: Float[Tensor, " channel"], objective: Callable[[Tensor], Tensor], settings: Settings
) -> Float[Tensor, " channel"]:
    """Gates, from where they start, that make the objective of their mask small."""
    tau = start.clamp(-1, 1).requires_grad_()
    adam = torch.optim.AdamW([tau], lr=settings.lr, betas=(0.9, settings.beta2), weight_decay=settings.decay)
    for step in track(range(settings.steps), "pruning"):
        for group in adam.param_groups:
            group["lr"] = settings.lr * (1 - step / settings.steps)
        mask: Tensor = _Step.apply(tau, settings.temperature)  # type: ignore[no-untyped-call]
        adam.zero_grad()
        loss = objective(mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([tau], settings.clip)
        adam.step()
        with torch.no_grad():
            tau.clamp_(-1, 1)
        if step % max(1, settings.steps // 50) == 0:
            note("pruning", step=step, objective=float(loss.detach()), channels=int((tau > 0).sum()))
    return tau.detach()


def attribution(masked: Masked) -> Float[Tensor, " channel"]:
    """The baseline: channels by gradient times what masking them changes, summed over positions, absolute and summed
    over prompts; one backward pass (Gao et al. 2025, figure 31)."""
    mask = torch.ones(len(masked.channels), requires_grad=True)
    odds = masked.odds(mask, grad=True)
    rows = [torch.autograd.grad(F.softplus(-one), mask, retain_graph=True)[0].abs() for one in odds]
    return torch.stack(rows).sum(0)


@dataclass(frozen=True)
class Smallest:
    """Channels, scale and shift of the answers' difference, the loss, and the loss with its standard errors."""

    kept: Bool[Tensor, " channel"]
    scale: tuple[float, float]
    loss: float
    bound: float


def smallest(masked: Masked, rank: Float[Tensor, " channel"], target: float, sure: float = 0.0) -> Smallest:
    """The fewest channels of highest rank whose loss meets the target, by so many of its standard errors.

    By bisection, as if the loss fell with every channel: once from all channels, and once from those of rank 0 or more,
    which gates leave on. Where mask learning makes what the model does not have, these meet a target that all of them
    miss. If neither start meets it, the one with less loss. Channels of rank -inf are never kept.
    """
    order = rank.argsort(descending=True, stable=True)

    def tried(k: int) -> Smallest:
        kept = torch.zeros(len(rank), dtype=torch.bool)
        kept[order[:k]] = True
        odds = masked.odds(kept.float())
        scale = calibrated(odds, masked.pairs)
        odds = rescaled(odds, masked.pairs, scale)
        return Smallest(kept, scale, float(loss(odds)), float(bound(odds, sure)))

    def bisected(high: int) -> Smallest:
        low, best = 0, tried(high)
        while best.bound <= target and high - low > 1:
            middle = (low + high) // 2
            found = tried(middle)
            if found.bound <= target:
                high, best = middle, found
            else:
                low = middle
        return best

    starts = {int((rank >= 0).sum()), int((rank > -math.inf).sum())} - {0}
    ends = [bisected(high) for high in sorted(starts)]
    met = [end for end in ends if end.bound <= target]
    return min(met, key=lambda end: int(end.kept.sum())) if met else min(ends, key=lambda end: end.bound)


# ---- the whole of it ----


@dataclass(frozen=True)
class Pruned:
    """A circuit of channels.

    circuit     its edges on the graph of all nonzero weights
    nodes       the channels that are kept, with or without edges
    kept        the same as a mask; scale: scale and shift of the answers' difference
    loss        on the prompts it was found on, and held_out on others, in nats per prompt; whole: the whole model's
    """

    circuit: Circuit
    nodes: tuple[str, ...]
    kept: Bool[Tensor, " channel"]
    scale: tuple[float, float]
    loss: float
    held_out: float
    whole: float
    settings: Settings
    headline: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        return {
            "n_edges": len(self.circuit),
            "n_nodes": len(self.nodes),
            "of_nodes": len(self.kept),
            "loss": round(self.loss, 4),
            "held_out_loss": round(self.held_out, 4),
            "whole_model_loss": round(self.whole, 4),
            "definition": self.circuit.definition,
            **self.headline,
        }


@dataclass(frozen=True)
class Searched:
    """What came of some settings of mask learning: a row for each, and the circuit with the fewest edges of those that
    meet the target, if any does."""

    tried: list[dict[str, Any]]
    best: Pruned | None

    @property
    def least(self) -> float:
        """The least loss that was reached, with its standard errors, in nats."""
        return float(min(row["bound"] for row in self.tried))


@dataclass(frozen=True)
class Question:
    """What a circuit must do: its loss on the pairs it is found on must meet the target, by `sure` of its standard
    errors; others judge it."""

    find: Masked
    judge: Masked
    target: float
    ablation: Ablated
    stream: Int[Tensor, "batch pos"] | None
    freeze_norms: bool
    sure: float = 0.0

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        find: Pairs,
        judge: Pairs,
        stream: Int[Tensor, "batch pos"] | None = None,
        *,
        target: float = 0.15,
        ablation: Ablated = "mean",
        freeze_norms: bool = False,
        sure: float = 0.0,
    ) -> Question:
        """Arguments as those of `prune`. Raises UserError for what is no number of standard errors."""
        if not 0 <= sure < math.inf or (sure and len(find) < 2):
            raise UserError(
                f"sure={sure:g} with {len(find)} pairs cannot be had; give standard errors of 0 or more, and two pairs "
                "at least, or 0."
            )
        channels = Channels(model)
        fill = fills(channels, find, ablation, stream)
        other = fill if ablation in ("mean", "zero") else fills(channels, judge, ablation)
        one, two = Masked(channels, find, fill, freeze_norms), Masked(channels, judge, other, freeze_norms)
        return cls(one, two, target, ablation, stream, freeze_norms, sure)

    def varied(self, model: LanguageModel | None = None, **options: Any) -> Question:
        """The same of another model, or with another ablation, or with norms frozen or not."""
        model = model or self.find.channels.model
        return Question.of(model, self.find.pairs, self.judge.pairs, self.stream, **{**self.words, **options})

    @property
    def words(self) -> dict[str, Any]:
        """As `prune` takes them."""
        names = ("target", "ablation", "freeze_norms", "sure")
        return {name: getattr(self, name) for name in names}

    @cached_property
    def whole(self) -> float:
        """The whole model's loss on the pairs that judge, in nats per prompt."""
        return self.judge.loss(torch.ones(len(self.judge.channels)))

    def search(
        self, search: Sequence[Settings], seed: int = 0, without: Bool[Tensor, " channel"] | None = None
    ) -> Searched:
        """Prune with each of some settings; `without` as in `prune`. Raises UserError if nothing is left to try."""
        if not search:
            raise UserError("there are no settings to prune with; give one at least.")
        if without is not None and bool(without.all()):
            raise UserError(f"all {len(without)} channels are held at their fill; leave some of them free.")
        channels, tried, best = self.find.channels, [], None
        for settings in search:
            rank = learn(self.find, settings, seed, without, self.target)
            found = smallest(self.find, rank, self.target, self.sure)
            edges = int(channels.between(found.kept).sum())
            of = {"k_coef": settings.k_coef, "hold": settings.hold, "lr": settings.lr}
            tried.append({**of, "edges": edges, "loss": found.loss, "bound": found.bound})
            if found.bound <= self.target and (best is None or edges < len(best.circuit)):
                best = self._pruned(found, settings, without)
        if best is not None:
            best = replace(best, headline={**self.words, "tried": tried, "seed": seed})
        return Searched(tried, best)

    def circuit(
        self, search: Sequence[Settings] = SEARCH, seed: int = 0, without: Bool[Tensor, " channel"] | None = None
    ) -> Pruned:
        """The circuit with the fewest edges. Raises UserError if no setting meets the target."""
        found = self.search(search, seed, without)
        if found.best is None:
            raise UserError(
                f"no circuit of {self.find.channels.model.name} meets {self.target:g} nats on {self.find.pairs.task}"
                f"{f' by {self.sure:g} standard errors' if self.sure else ''}: at best {found.least:.3g} (the whole "
                f"model {self.whole:.3g}, chance {math.log(2):.3g}); raise the target, or train the model longer."
            )
        return found.best

    def _pruned(self, found: Smallest, settings: Settings, without: Tensor | None) -> Pruned:
        channels, pairs, kept = self.find.channels, self.find.pairs, found.kept
        circuit = circuit_of(
            channels, kept, pairs.task,
            f"fewest channels of largest gate with {pairs.task} loss at most {self.target:g} nats on {len(pairs)} "
            f"pairs{f', by {self.sure:g} standard errors' if self.sure else ''}, ablation {self.ablation}"
            f"{', norms frozen' if self.freeze_norms else ''}"
            f"{'' if without is None else f', {int(without.sum())} channels held at their fill'}",
        )  # fmt: skip
        names = tuple(name for name, is_kept in zip(channels.names, kept.tolist(), strict=True) if is_kept)
        held_out = self.judge.loss(kept.float(), found.scale)
        return Pruned(circuit, names, kept, found.scale, found.loss, held_out, self.whole, settings)


def circuit_of(channels: Channels, kept: Bool[Tensor, " channel"], task: str, definition: str) -> Circuit:
    """Some channels as a circuit on the graph of all nonzero weights: its edges are those between them."""
    return Circuit(
        channels.graph, channels.between(kept), f"{definition}; edges: nonzero weights between them",
        channels.model.name, task, "sparse-prune", channels.weights,
    )  # fmt: skip


def ask(
    model: LanguageModel,
    train: Batch,
    test: Batch,
    stream: Int[Tensor, "batch pos"] | None = None,
    *,
    target: float = 0.15,
    ablation: Ablated = "mean",
    freeze_norms: bool = False,
    sure: float = 0.0,
) -> Question:
    """The question that `prune` answers. Raises UserError if train and test share a prompt."""
    texts = [{text for p in part.prompts for text in (p.clean, p.corrupted)} for part in (train, test)]
    shared = texts[0] & texts[1]
    if shared:
        raise UserError(
            f"{len(shared)} prompts are in both parts, such as {min(shared)!r}; draw them from split tasks."
        )
    one, other = Pairs.of(train), Pairs.of(test)
    return Question.of(
        model, one, other, stream, target=target, ablation=ablation, freeze_norms=freeze_norms, sure=sure
    )


def prune(
    model: LanguageModel,
    train: Batch,
    test: Batch,
    stream: Int[Tensor, "batch pos"] | None = None,
    *,
    target: float = 0.15,
    ablation: Ablated = "mean",
    freeze_norms: bool = False,
    sure: float = 0.0,
    without: Bool[Tensor, " channel"] | None = None,
    search: Sequence[Settings] = SEARCH,
    seed: int = 0,
) -> Pruned:
    """The circuit with the fewest edges among some settings of mask learning.

    train, test   pairs to find the circuit on, and to judge it; no text in both
    stream        tokens of the training stream, for mean ablation
    freeze_norms  RMSNorms divide by what they divide by in the whole model on the same prompt, which tells of the
                  answer by itself: compare with the loss of nothing (`circuits.sparse.validate`)
    sure          standard errors by which the loss must be below the target
    without       channels that are held at their fill: the circuit must do without them

    Raises UserError if train and test share a prompt, or if no setting meets the target.
    """
    question = ask(model, train, test, stream, target=target, ablation=ablation, freeze_norms=freeze_norms, sure=sure)
    return question.circuit(search, seed, without)
