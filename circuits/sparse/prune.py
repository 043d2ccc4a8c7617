"""Pruning a weight-sparse model to the circuit of a task: which few channels suffice.

Gao et al. 2025, section 2.2 and appendix A.5. Each channel has a gate tau, clamped to [-1, 1]; the mask is 1 where
tau >= 0, with the slope of sigmoid(tau / temperature) on the way back. A channel that is masked carries its mean over
the training stream. Minimised are the task's loss, a cross-entropy between the two answers alone, on both prompts of
each pair, and k_coef times the number of channels that are left. The circuit is then the smallest number of channels of
largest tau with which the loss meets a target, found by bisection, after scale and shift of the difference of the two
answers' logits were fitted (what is left of a model is often sure of the right thing by too much or too little).

Mean ablation is the weakest test that a circuit can pass: look at what is left of the task without the circuit, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from circuits.graph import Circuit
from circuits.sparse.channels import Channels, Fill
from workbench.errors import UserError
from workbench.metrics import log_odds
from workbench.models import LanguageModel
from workbench.prompts import Batch
from workbench.tasks.python_code import pair_sides

Ablated = Literal["mean", "task-mean", "zero", "resample"]
MOST_SCALE = 10.0
TOKENS_AT_ONCE = 8192  # of the stream, while means are taken


@dataclass(frozen=True)
class Settings:
    """Of mask learning; the paper searches for them (table 2), here a few are tried.

    k_coef       price of a channel, in nats
    temperature  of the sigmoid whose slope stands for that of the step
    init         where gates begin, and how much they differ
    """

    k_coef: float = 1e-3
    lr: float = 1e-2
    steps: int = 300
    temperature: float = 1.0
    init: tuple[float, float] = (0.1, 0.01)
    decay: float = 1e-3
    beta2: float = 0.95
    clip: float = 1.0


SEARCH = tuple(Settings(k_coef=k, lr=lr) for k, lr in product((3e-4, 1e-3, 3e-3), (1e-2, 3e-2)))


# ---- prompts ----


@dataclass(frozen=True)
class Pairs:
    """Both prompts of every pair in one tensor, the class that each belongs to, and the two answers.

    Shorter prompts are filled up at the end, which no earlier position of a causal model sees.

    tokens  [2 * pair, pos], all clean prompts first; last: the position that is asked about
    one     token ids of class 1's answer, two: of class 2's; empty where it is "anything else"
    is_one  whether class 1's answer is right
    """

    task: str
    tokens: Int[Tensor, "prompt pos"]
    last: Int[Tensor, " prompt"]
    one: tuple[Tensor, ...]
    two: tuple[Tensor, ...]
    is_one: Bool[Tensor, " prompt"]

    @classmethod
    def of(cls, batch: Batch) -> Pairs:
        sequences = [*batch.clean, *batch.corrupted]
        length = max(map(len, sequences))
        tokens = torch.stack([F.pad(x, (0, length - len(x))) for x in sequences])
        one, two, clean_is_one = pair_sides(batch)
        return cls(
            batch.task.name, tokens, torch.tensor([len(x) - 1 for x in sequences]), (*one, *one), (*two, *two),
            torch.cat([clean_is_one, ~clean_is_one]),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.tokens) // 2

    def partner(self, x: Float[Tensor, "prompt *rest"]) -> Float[Tensor, "prompt *rest"]:
        """What belongs to the other prompt of each pair."""
        return x.roll(len(self), 0)

    def differences(self, logits: Float[Tensor, "prompt vocab"]) -> Float[Tensor, " prompt"]:
        """Log odds of the right answer against the wrong one, of these two alone."""
        return log_odds(logits, self.one, self.two) * torch.where(self.is_one, 1.0, -1.0).to(logits.device)


# ---- masked runs ----


class Masked:
    """A model on some pairs, with any channels masked."""

    def __init__(self, channels: Channels, pairs: Pairs, fill: Fill):
        self.channels, self.pairs, self.fill = channels, pairs, fill

    def odds(self, mask: Float[Tensor, " channel"], *, grad: bool = False) -> Float[Tensor, " prompt"]:
        """Log odds of the right answer for every prompt."""
        model, pairs = self.channels.model, self.pairs
        edit = self.channels.edits(mask, self.fill)
        logits = model.run(pairs.tokens, edit=edit, grad=grad).logits
        assert logits is not None
        return pairs.differences(logits[torch.arange(len(logits)), pairs.last].float())

    def loss(self, mask: Float[Tensor, " channel"], scale: tuple[float, float] = (1.0, 0.0)) -> float:
        """The task's loss in nats per prompt."""
        return float(loss(rescaled(self.odds(mask), self.pairs, scale)))


def loss(odds: Float[Tensor, " prompt"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of log odds; ln 2 where nothing is known."""
    return F.softplus(-odds).mean()


def rescaled(odds: Tensor, pairs: Pairs, scale: tuple[float | Tensor, float | Tensor]) -> Tensor:
    """Scaled, and shifted towards class 1 whatever the prompt's class."""
    sign = torch.where(pairs.is_one, 1.0, -1.0).to(odds)
    return odds * scale[0] + sign * scale[1]


def calibrated(odds: Float[Tensor, " prompt"], pairs: Pairs, steps: int = 16) -> tuple[float, float]:
    """Scale and shift of the difference of the two answers' logits with which the loss is least (L-BFGS).

    The scale is between 0 and MOST_SCALE: without a bound, any difference between the classes, such as that of a norm,
    becomes certainty, and channels that have nothing to do with the task make a circuit of it.
    """
    fixed = odds.detach().double().cpu()

    def fitted(scale: float | None) -> tuple[float, float]:
        ab = torch.tensor([1.0 if scale is None else scale, 0.0], dtype=torch.float64, requires_grad=True)
        search = torch.optim.LBFGS([ab], max_iter=steps, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            search.zero_grad()
            value = loss(rescaled(fixed, pairs, (ab[0] if scale is None else scale, ab[1])))
            value.backward()
            return value

        search.step(closure)
        found: list[float] = ab.tolist()
        return found[0] if scale is None else scale, found[1]

    scale, shift = fitted(None)
    if not 0 <= scale <= MOST_SCALE:  # also where it is no number
        scale, shift = fitted(0.0 if scale < 0 else MOST_SCALE)
    return scale, shift


@torch.no_grad()
def fills(
    channels: Channels, pairs: Pairs, ablation: Ablated, stream: Int[Tensor, "batch pos"] | None = None
) -> dict[str, Tensor]:
    """What masked channels carry.

    mean       each channel's mean over the stream, all tokens alike
    task-mean  over the positions of these prompts that are not filled up
    zero       nothing
    resample   on each prompt, its value on the other prompt of the pair
    """
    model, hooks = channels.model, channels.hooks
    if ablation == "mean":
        if stream is None:
            raise UserError("the mean is taken over the training stream; give some of its tokens.")
        at_once = max(1, TOKENS_AT_ONCE // stream.shape[1])
        total: dict[str, Tensor] = {}
        for rows in stream.split(at_once):
            run = model.run(rows, capture=hooks, logits="none")
            total = {hook: run[hook].double().sum((0, 1)) + total.get(hook, 0) for hook in hooks}
        return {hook: (x / stream.numel()).to(model.dtype) for hook, x in total.items()}
    run = model.run(pairs.tokens, capture=hooks, logits="none")
    if ablation == "resample":
        return {hook: pairs.partner(run[hook]) for hook in hooks}
    if ablation == "zero":
        return {hook: torch.zeros_like(run[hook][0, 0]) for hook in hooks}
    read = torch.arange(pairs.tokens.shape[1]) <= pairs.last[:, None]
    return {hook: run[hook][read].mean(0) for hook in hooks}


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


def learn(masked: Masked, settings: Settings, seed: int = 0) -> Float[Tensor, " channel"]:
    """Gates, by which channels are ranked."""
    generator = torch.Generator().manual_seed(seed)
    n = len(masked.channels)
    mean, spread = settings.init
    tau = (mean + spread * torch.randn(n, generator=generator)).clamp(-1, 1).requires_grad_()
    adam = torch.optim.AdamW([tau], lr=settings.lr, betas=(0.9, settings.beta2), weight_decay=settings.decay)
    for step in tqdm(range(settings.steps), desc="pruning", disable=None, leave=False):
        for group in adam.param_groups:
            group["lr"] = settings.lr * (1 - step / settings.steps)
        mask: Tensor = _Step.apply(tau, settings.temperature)  # type: ignore[no-untyped-call]
        objective = loss(masked.odds(mask, grad=True)) + settings.k_coef * mask.sum()
        adam.zero_grad()
        objective.backward()
        torch.nn.utils.clip_grad_norm_([tau], settings.clip)
        adam.step()
        with torch.no_grad():
            tau.clamp_(-1, 1)
    return tau.detach()


def attribution(masked: Masked) -> Float[Tensor, " channel"]:
    """The baseline: channels by gradient times what masking them changes, summed over positions, absolute and summed
    over prompts; one backward pass (Gao et al. 2025, figure 31)."""
    mask = torch.ones(len(masked.channels), requires_grad=True)
    odds = masked.odds(mask, grad=True)
    rows = [torch.autograd.grad(F.softplus(-one), mask, retain_graph=True)[0].abs() for one in odds]
    return torch.stack(rows).sum(0)


def smallest(
    masked: Masked, rank: Float[Tensor, " channel"], target: float
) -> tuple[Bool[Tensor, " channel"], tuple[float, float], float]:
    """The fewest channels of highest rank whose loss meets the target, their scale and shift, and the loss.

    By bisection, as if the loss fell with every channel; all channels if not even they meet it.
    """
    order = rank.argsort(descending=True, stable=True)

    def tried(k: int) -> tuple[Tensor, tuple[float, float], float]:
        kept = torch.zeros(len(rank), dtype=torch.bool)
        kept[order[:k]] = True
        odds = masked.odds(kept.float())
        scale = calibrated(odds, masked.pairs)
        return kept, scale, float(loss(rescaled(odds, masked.pairs, scale)))

    low, high, best = 0, len(rank), tried(len(rank))
    if best[2] > target:
        return best
    while high - low > 1:
        middle = (low + high) // 2
        found = tried(middle)
        if found[2] <= target:
            high, best = middle, found
        else:
            low = middle
    return best


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


def prune(
    model: LanguageModel,
    train: Batch,
    test: Batch,
    stream: Int[Tensor, "batch pos"] | None = None,
    *,
    target: float = 0.15,
    ablation: Ablated = "mean",
    search: Sequence[Settings] = SEARCH,
    seed: int = 0,
) -> Pruned:
    """The circuit with the fewest edges among some settings of mask learning.

    train, test  pairs to find the circuit on, and to judge it; no text in both
    stream       tokens of the training stream, for mean ablation

    Raises UserError if train and test share a prompt, or if no setting meets the target.
    """
    texts = [{text for p in part.prompts for text in (p.clean, p.corrupted)} for part in (train, test)]
    shared = texts[0] & texts[1]
    if shared:
        raise UserError(
            f"{len(shared)} prompts are in both parts, such as {min(shared)!r}; draw them from split tasks."
        )
    channels = Channels(model)
    one, other = (Pairs.of(batch) for batch in (train, test))
    find, judge = (Masked(channels, pairs, fills(channels, pairs, ablation, stream)) for pairs in (one, other))
    whole = judge.loss(torch.ones(len(channels)))
    best: Pruned | None = None
    tried = []
    for settings in search:
        kept, scale, reached = smallest(find, learn(find, settings, seed), target)
        edges = channels.between(kept)
        tried.append({"k_coef": settings.k_coef, "lr": settings.lr, "edges": int(edges.sum()), "loss": reached})
        if reached <= target and (best is None or int(edges.sum()) < len(best.circuit)):
            circuit = Circuit(
                channels.graph, edges,
                f"fewest channels of largest gate with {train.task.name} loss at most {target:g} nats on {len(train)} "
                f"pairs, ablation {ablation}; edges: nonzero weights between them",
                model.name, train.task.name, "sparse-prune", channels.weights,
            )  # fmt: skip
            names = tuple(name for name, is_kept in zip(channels.names, kept.tolist(), strict=True) if is_kept)
            held_out = judge.loss(kept.float(), scale)
            best = Pruned(circuit, names, kept, scale, reached, held_out, whole, settings)
    if best is None:
        least = min(float(row["loss"]) for row in tried)
        raise UserError(
            f"no circuit of {model.name} meets {target:g} nats on {train.task.name}: at best {least:.3g} (the whole "
            f"model {whole:.3g}, chance {math.log(2):.3g}); raise the target, or train the model longer."
        )
    return replace(best, headline={"target": target, "ablation": ablation, "tried": tried, "seed": seed})
