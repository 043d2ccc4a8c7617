"""Repair: one task's heads, made to do on another task what they do on their own.

Merullo et al. 2024, section 6: GPT-2 medium often fails Colored Objects. The heads that suppress a wrong name in IOI
(by attending to it) are there, but idle. Forced to attend from the last position to the wrong colours, half to each,
they lift accuracy from 50 % to 94 % and spoil no prompt: they do the same job in both tasks.

That a model does better when heads are meddled with is worth something only beside heads that were not chosen for it:
random ones, as many in each layer, forced in the same way. And it does not show that the model could do the task: the
intervention knows which answers are wrong, and a head that suppresses what it attends to is all it takes. Forced onto
the right answer, such heads spoil as much as they repair; that is measured too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.path_patching import head_of, layer_of, path_patching, read_heads
from circuits.subspaces import keys_by_class
from workbench import registry, scores, sites
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.metrics import top1
from workbench.models import LanguageModel, Resume
from workbench.prompts import Batch, sample
from workbench.registry import analysis
from workbench.sites import Site


@dataclass(frozen=True)
class Outcome:
    """How well the task is done: the metric of each prompt, and whether the likeliest token is a right answer."""

    metric: Float[Tensor, " batch"]
    top1: Float[Tensor, " batch"]

    @property
    def accuracy(self) -> float:
        """Share of prompts whose metric is above 0."""
        return float((self.metric > 0).double().mean())

    def mistakes(self, before: Outcome) -> int:
        """Prompts that were right before and are wrong now."""
        return int(((before.metric > 0) & (self.metric <= 0)).sum())


@dataclass(frozen=True)
class AttentionIntervention:
    """A task before and after some heads were forced to attend to the wrong answers in the prompt.

    mirrored   the same heads forced to attend to the right answers instead: where they suppress, this spoils
    controls   random heads, as many in each layer, forced to attend to the wrong answers
    forced     prompts in which a wrong answer stands; the others were left alone
    p          share of controls with at least the accuracy that the heads gave (one is added to both)
    """

    heads: list[str]
    before: Outcome
    after: Outcome
    mirrored: Outcome
    controls: list[Outcome]
    forced: int
    p: float
    unit: str
    definition: str

    def summary(self) -> dict[str, Any]:
        n = len(self.controls)
        every = [control.accuracy for control in self.controls]
        return {
            "heads": self.heads,
            "accuracy": [round(self.before.accuracy, 4), round(self.after.accuracy, 4)],
            "top1": [round(float(self.before.top1.mean()), 4), round(float(self.after.top1.mean()), 4)],
            f"{self.unit}_mean": [float(self.before.metric.mean()), float(self.after.metric.mean())],
            "new_mistakes": self.after.mistakes(self.before),
            "onto_the_answer": {
                "accuracy": round(self.mirrored.accuracy, 4),
                f"{self.unit}_mean": float(self.mirrored.metric.mean()),
            },
            "random_heads": {
                "accuracy": [round(min(every), 4), round(sum(every) / n, 4), round(max(every), 4)],
                f"{self.unit}_mean": sum(float(control.metric.mean()) for control in self.controls) / n,
                "new_mistakes": sum(control.mistakes(self.before) for control in self.controls) / n,
                "p": self.p,
            }
            if n
            else {},
            "prompts_forced": self.forced,
            "definition": self.definition,
        }


@analysis("attention-intervention", version=1, n=32)
def attention_intervention(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    *,
    heads: str = "",
    other: str = "ioi",
    k: int = 4,
    strength: float = 1.0,
    controls: int = 20,
) -> AttentionIntervention:
    """How well the task is done when some heads must attend to the wrong answers in the prompt, as in another task.

    Merullo et al. 2024, section 6. At the last position, the heads' attention is drawn to the wrong candidates of the
    prompt, evenly.

    heads     separated by commas; empty: those the other task's circuit has for this
    other     that task: its heads are the ones that matter most to the queries of those that matter most to its logits
    k         how many heads are taken at each of these two stages
    strength  share of the attention that is moved: 0 none, 1 all
    controls  how many times random heads are forced instead
    """
    if not 0 <= strength <= 1:
        raise UserError(f"strength={strength} of the attention cannot be moved; it must be 0 to 1.")
    if controls < 0:
        raise UserError(f"controls={controls} cannot be drawn; take 0 or more.")
    if heads:
        chosen, how = read_heads(heads, model.config), "as given"
    else:
        some = batch if batch.task.name == other else sample(registry.get_task(other), model, len(batch), seed=0)
        chosen = behind_the_queries(model, some, store, k)
        how = f"the {k} of largest effect on the queries of the {k} of largest effect on the logits of {other}"
    classes = keys_by_class(model, batch)
    wrong = [found["candidate"] for found in classes]
    forced = sum(bool(mask.any()) for mask in wrong)
    if not forced:
        raise UserError(f"no wrong answer stands in the prompts of {batch.task.name}: nothing to attend to.")
    before = force(model, batch, store, (), wrong, strength)
    after = force(model, batch, store, chosen, wrong, strength)
    mirrored = force(model, batch, store, chosen, [found["answer"] for found in classes], strength)
    rng = random.Random(0)
    drawn = [alike(chosen, model.config.n_heads, rng) for _ in range(controls)]
    outcomes = [force(model, batch, store, some, wrong, strength) for some in drawn]
    as_good = sum(outcome.accuracy >= after.accuracy for outcome in outcomes)
    unit = batch.task.metric
    return AttentionIntervention(
        heads=list(chosen),
        before=before,
        after=after,
        mirrored=mirrored,
        controls=outcomes,
        forced=forced,
        p=(1 + as_good) / (1 + controls),
        unit=unit,
        definition=f"{unit} per prompt with {strength:.0%} of the attention of {len(chosen)} heads at the last "
        "position moved to the wrong candidate answers in the prompt, evenly over their positions, all later parts of "
        f"the model recomputed; heads: {how}; accuracy: share of prompts with {unit} > 0; controls: random heads, as "
        "many per layer",
    )


def behind_the_queries(model: LanguageModel, batch: Batch, store: ActivationStore, k: int) -> tuple[str, ...]:
    """The k heads with the largest absolute effect on the logits through the queries of the k heads with the largest on
    the logits directly, at the last position: for IOI the S-inhibition heads, behind the name movers."""
    if k < 1:
        raise UserError(f"k={k} heads cannot be taken; take at least 1.")
    direct = path_patching(model, batch, store, mlps=False, position="last")
    movers = [name for name, _ in direct.top(len(direct.nodes)) if layer_of(name)][:k]
    if not movers:
        raise UserError(f"{model.name} has one layer, so no head acts on the queries of another; name some heads.")
    queries = ",".join(f"{name}<q>" for name in movers)
    behind = path_patching(model, batch, store, receiver=queries, mlps=False, position="last")
    return tuple(name for name, _ in behind.top(k))


def alike(heads: Sequence[str], n_heads: int, rng: random.Random) -> tuple[str, ...]:
    """Random heads, as many in each layer as these and none of these, unless a layer has too few others."""
    drawn: list[str] = []
    for layer in sorted(set(map(layer_of, heads))):
        taken = {head_of(name) for name in heads if layer_of(name) == layer}
        others = [h for h in range(n_heads) if h not in taken]
        pool = others if len(others) >= len(taken) else range(n_heads)
        drawn += [scores.head(layer, h) for h in sorted(rng.sample(pool, len(taken)))]
    return tuple(drawn)


def force(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    heads: Sequence[str],
    keys: Sequence[Bool[Tensor, "_"]],
    strength: float,
) -> Outcome:
    """The task with so much of these heads' attention at the last position moved to the keys of each prompt, evenly."""
    first = min(map(layer_of, heads), default=model.config.n_layers - 1)
    hook = sites.block(first, "hook_resid_pre")
    metric, right = torch.empty(len(batch)), torch.empty(len(batch))
    for bucket in batch.buckets():
        some = batch.select(bucket.tolist())
        target = torch.stack([keys[i] for i in bucket.tolist()]).float()
        resid = torch.stack(store.get(model, some.clean, [hook])[hook])
        edit: dict[str | Site, Callable[[Tensor], Tensor]] = {
            # Nothing is edited at strength 0: an edited pattern is multiplied out otherwise than the kernel does it.
            Site(sites.block(layer_of(name), "attn.hook_pattern"), head=head_of(name), pos=-1): _moved(target, strength)
            for name in (heads if strength else ())
        }
        out = model.run(torch.stack(some.clean), edit=edit, logits="last", start=Resume(first, resid))
        assert out.logits is not None
        logits = out.logits[:, -1].cpu()
        metric[bucket], right[bucket] = some.score(logits), top1(logits, some.answers)
    return Outcome(metric, right)


def _moved(target: Float[Tensor, "batch key"], strength: float) -> Callable[[Tensor], Tensor]:
    some = target.sum(-1, keepdim=True)

    def fn(attention: Tensor) -> Tensor:
        even = (target / some.clamp_min(1)).to(attention)
        moved = attention + strength * (even - attention)
        return torch.where((some > 0).to(attention.device), moved, attention)

    return fn
