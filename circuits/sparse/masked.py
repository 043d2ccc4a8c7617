"""Masked runs: a weight-sparse model on both prompts of some pairs, with any channels at a fill instead of their value.

The loss is a cross-entropy between the two answers alone, in nats per prompt, so that chance is ln 2 (Gao et al. 2025,
section 2.2 and appendix A.5). What is left of a model is often sure of the right thing by too much or too little: scale
and shift of the difference of the two answers' logits can be fitted first.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from circuits.sparse.channels import Channels, Fill
from circuits.sparse.variants import frozen_norms
from workbench import sites
from workbench.errors import UserError
from workbench.metrics import log_odds
from workbench.prompts import Batch
from workbench.tasks.python_code import pair_sides

Ablated = Literal["mean", "task-mean", "zero", "resample"]
MOST_SCALE = 10.0
BUCKETS = 4  # of prompts, by length
TOKENS_AT_ONCE = 8192  # of the stream, while means are taken


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

    def part(self, pairs: Int[Tensor, " pair"]) -> Pairs:
        """Some of the pairs, without positions that none of their prompts has."""
        rows = torch.cat([pairs, pairs + len(self)])
        last = self.last[rows]
        one, two = (tuple(answers[i] for i in rows.tolist()) for answers in (self.one, self.two))
        tokens = self.tokens[rows, : int(last.max()) + 1]
        return Pairs(self.task, tokens, last, one, two, self.is_one[rows])

    def partner(self, x: Shaped[Tensor, "prompt *rest"]) -> Shaped[Tensor, "prompt *rest"]:
        """What belongs to the other prompt of each pair."""
        return x.roll(len(self), 0)

    def mislabelled(self, generator: torch.Generator) -> Pairs:
        """The same prompts, with right and wrong exchanged in one half of the pairs, drawn at random.

        Half of them, and not each by a coin of its own, so that to know the task is worth nothing.
        """
        wrong = torch.zeros(len(self), dtype=torch.bool)
        wrong[torch.randperm(len(self), generator=generator)[: len(self) // 2]] = True
        return replace(self, task=f"{self.task}-nonsense", is_one=self.is_one ^ wrong.repeat(2))

    def differences(self, logits: Float[Tensor, "prompt vocab"]) -> Float[Tensor, " prompt"]:
        """Log odds of the right answer against the wrong one, of these two alone."""
        return log_odds(logits, self.one, self.two) * torch.where(self.is_one, 1.0, -1.0).to(logits.device)


# ---- masked runs ----


class Masked:
    """A model on some pairs, with any channels masked.

    Prompts of about one length are run together, and only what is asked about is unembedded.

    freeze_norms  RMSNorms divide by what they divide by when nothing is masked
    """

    def __init__(self, channels: Channels, pairs: Pairs, fill: Fill, freeze_norms: bool = False):
        self.channels, self.pairs, self.fill, self.freeze_norms = channels, pairs, fill, freeze_norms
        self.model = frozen_norms(channels.model, pairs.tokens) if freeze_norms else channels.model

    def odds(self, mask: Float[Tensor, " channel"], *, grad: bool = False) -> Float[Tensor, " prompt"]:
        """Log odds of the right answer for every prompt."""
        pairs, found = self.pairs, []
        end = sites.block(self.model.config.n_layers - 1, "hook_resid_post")
        for rows, fill in self._buckets:
            last = pairs.last[rows]
            at, tokens = (torch.arange(len(rows)), last), pairs.tokens[rows, : int(last.max()) + 1]
            edit = self.channels.edits(mask, fill)
            if self.freeze_norms:  # the last one too, which has a scale for each position
                logits = self.model.run(tokens, edit=edit, grad=grad).logits
                assert logits is not None
                found.append(logits[at])
            else:
                run = self.model.run(tokens, edit=edit, capture=[end], logits="none", grad=grad)
                found.append(self.model.unembed(run[end][at], tokens[at], grad=grad))
        order = torch.cat([rows for rows, _ in self._buckets]).argsort()
        return pairs.differences(torch.cat(found)[order].float())

    @cached_property
    def _buckets(self) -> list[tuple[Int[Tensor, " row"], Fill]]:
        """Rows of prompts of about one length, and their fills."""
        length = self.pairs.last + 1
        if self.freeze_norms:  # norms that are frozen at these very tokens
            return [(torch.arange(len(length)), self.fill)]
        ends = sorted({int(part.max()) for part in length.sort().values.chunk(BUCKETS)})
        rows = [((a < length) & (length <= b)).nonzero()[:, 0] for a, b in pairwise([0, *ends])]
        return [(which, _of_rows(self.fill, which, b)) for which, b in zip(rows, ends, strict=True)]

    def part(self, pairs: Int[Tensor, " pair"]) -> Masked:
        """The same on some of the pairs."""
        some = self.pairs.part(pairs)
        fill = _of_rows(self.fill, torch.cat([pairs, pairs + len(self.pairs)]), some.tokens.shape[1])
        return Masked(self.channels, some, fill, self.freeze_norms)

    def parts(self, n: int, generator: torch.Generator) -> list[Masked]:
        """All pairs, at most n at a time, in a random order."""
        order = torch.randperm(len(self.pairs), generator=generator)
        return [self.part(pairs) for pairs in order.split(n)]

    def mislabelled(self, generator: torch.Generator) -> Masked:
        """The same runs on labels that mean nothing."""
        out = copy(self)
        out.pairs = self.pairs.mislabelled(generator)
        return out

    def loss(self, mask: Float[Tensor, " channel"], scale: tuple[float, float] = (1.0, 0.0)) -> float:
        """The task's loss in nats per prompt."""
        return float(loss(rescaled(self.odds(mask), self.pairs, scale)))


def _of_rows(fill: Fill, rows: Int[Tensor, " row"], n: int) -> Fill:
    """Fills that have a value for each prompt and position, not for each channel alone, at some prompts and the first n
    positions."""
    return {hook: x[rows, :n] if x.ndim > 2 else x for hook, x in fill.items()}


def loss(odds: Float[Tensor, " prompt"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of log odds; ln 2 where nothing is known."""
    return F.softplus(-odds).mean()


def bound(odds: Float[Tensor, " prompt"], sure: float) -> Float[Tensor, ""]:
    """The loss, and so many of its standard errors more. A pair's two prompts, all clean ones first, count as one."""
    each = F.softplus(-odds).view(2, -1).mean(0)
    return loss(odds) + sure * each.std() / len(each) ** 0.5 if sure else loss(odds)


def accuracy(odds: Float[Tensor, " prompt"]) -> float:
    """The share of prompts whose right answer is likelier than the wrong one; where both are as likely, one half."""
    return float((odds.sign().double().mean() + 1) / 2)


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
