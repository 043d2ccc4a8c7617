"""Reuse: are the parts of one task's circuit the parts of another's?

Merullo, Eickhoff & Pavlick 2024, "Circuit Component Reuse Across Tasks in Transformer Language Models": take the 2 % of
heads with the largest scores for each task, and divide how many both have by how many either has. They report 25/32
for IOI and Colored Objects, over the stages of path patching backwards from the logits.

A ratio says little by itself, so it comes with what it would be by chance: for random heads, and for the same number of
heads of each layer drawn at random (which is what permuting the scores within layers amounts to: heads of late layers
are important for every task, without any reuse). The chance that so many are shared is exact. And it comes with what it
would be at best: how far one half of a task's prompts agrees with the other half.

Whether a part does the same in both tasks is another question. The paper's answer is an intervention: on a task that
the model often fails, make the heads of the other task's circuit attend as they would there, and see it repaired
(`circuits.intervention`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import scipy
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.compare import score, scoring
from circuits.graph import Circuit, EdgeScores
from circuits.path_patching import layer_of, path_patching
from workbench import registry
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.prompts import Batch, sample
from workbench.registry import analysis
from workbench.scores import NodeScores, rank_agreement

Found = NodeScores | Circuit
PORTS_BACK = ("q", "v", "k")  # what is read of the heads that each stage of path patching found
RESAMPLES = 200


@dataclass(frozen=True)
class Null:
    """What the ratio would be by chance, with circuits of the same size.

    mean, low, high   of the ratio over random draws; low and high hold 95 % of them
    expected          how many heads would be shared
    p                 the exact probability that at least as many are shared as are
    """

    mean: float
    low: float
    high: float
    expected: float
    p: float


@dataclass(frozen=True)
class Overlap:
    """The heads of two or more circuits, and how many they share.

    members    [circuit, stage, head]
    shared     heads that all have, summed over stages; union: heads that any has
    ratio      shared / union, the paper's number; of one stage it is the Jaccard index of two circuits
    jaccard    [circuit, circuit] of the heads of all stages together, for each pair
    nulls      by chance: `random heads`, and `same layers`, as many per layer
    interval   95 % of the ratio over resampled prompts, None where a method has no scores per prompt
    halves     ratio of a circuit from one half of the prompts and one from the other: `within` each task, and `across`
               tasks, at the same number of prompts
    agreement  Spearman correlation of the absolute scores of the first two, over all heads of the first stage
    """

    names: list[str]
    heads: list[str]
    members: Bool[Tensor, "circuit stage head"]
    shared: int
    union: int
    ratio: float
    jaccard: Float[Tensor, "circuit circuit"]
    nulls: dict[str, Null]
    interval: list[float] | None
    halves: dict[str, float]
    agreement: float | None
    definition: str

    def summary(self) -> dict[str, Any]:
        everywhere = self.members.all(0).any(0)
        return {
            "shared": self.shared,
            "union": self.union,
            "ratio": round(self.ratio, 4),
            "ratio_95": None if self.interval is None else [round(end, 4) for end in self.interval],
            "by_chance": {
                name: {"ratio": round(null.mean, 4), "shared": round(null.expected, 3), "p": null.p}
                for name, null in self.nulls.items()
            },
            "halves": {name: round(value, 4) for name, value in self.halves.items()},
            "rank_agreement": None if self.agreement is None else round(self.agreement, 4),
            "shared_heads": [self.heads[i] for i in everywhere.nonzero()[:, 0].tolist()],
            "circuits": {name: self.circuit(i) for i, name in enumerate(self.names)},
            "definition": self.definition,
        }

    def circuit(self, index: int) -> list[str]:
        """The heads of one circuit, of all its stages."""
        return [self.heads[i] for i in self.members[index].any(0).nonzero()[:, 0].tolist()]


@analysis("reuse", version=1, n=32)
def reuse(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    *,
    other: str = "colored_objects",
    method: str = "patching",
    share: float = 0.02,
    stages: int = 1,
    other_seed: int = 0,
) -> Overlap:
    """Which of a task's most important heads are also another task's, against chance.

    Merullo et al. 2024. As many prompts of the other task are drawn as there are of this one.

    other       the other task
    method      the analysis that scores heads on both
    share       how many of all heads make a circuit: those of largest absolute score
    stages      with path-patching: from the logits back through the queries, values and keys of what was found
    other_seed  the seed of the other task's prompts
    """
    task = registry.get_task(other)
    chosen = scoring(method)
    if (stages != 1 and method != "path-patching") or not 1 <= stages <= 1 + len(PORTS_BACK):
        raise UserError(f"stages={stages} with method={method!r}: only path-patching has stages, 1 to 4.")
    batches = {batch.task.name: batch, other: sample(task, model, len(batch), other_seed)}
    if len(batches) == 1:
        batches = {batch.task.name: batch, f"{other}, seed {other_seed}": batches[other]}
        if set(batch.prompts) & set(list(batches.values())[1].prompts):
            raise UserError(f"{other} would be compared with the same prompts; name another task or other_seed.")
    found: dict[str, list[NodeScores]] = {}
    for name, some in batches.items():
        if stages > 1:
            found[name] = backwards(model, some, store, stages=stages, share=share)
        else:
            scores = score(chosen, model, some, store)
            found[name] = [scores.nodes() if isinstance(scores, EdgeScores) else scores]
    return overlap(found, share=share)


def backwards(
    model: LanguageModel, batch: Batch, store: ActivationStore, *, stages: int = 2, share: float = 0.02
) -> list[NodeScores]:
    """Path patching from the logits back: which heads act on the logits, on the queries of those, on the values of
    those, and on the keys of those; a head that comes before no receiver scores 0. Nothing that could be called a
    head's role is decided here: the ports are the paper's order for IOI."""
    everything = path_patching(model, batch, store, mlps=False, position="last")
    found = [everything]
    for port in PORTS_BACK[: stages - 1]:
        k = circuit_size(share, len(everything.nodes))
        before = [(name, score) for name, score in found[-1].top(len(everything.nodes)) if score and layer_of(name)]
        if not before:
            raise UserError("no head that was found has heads below it, so there is no further stage; take fewer.")
        receiver = ",".join(f"{name}<{port}>" for name, _ in before[:k])
        some = path_patching(
            model, batch, store, receiver=receiver, mlps=False, position="last" if port == "q" else "all"
        )
        assert some.per_prompt is not None
        where = [everything.nodes.index(name) for name in some.nodes]
        per_prompt = torch.zeros(len(everything.nodes), len(batch))
        per_prompt[where] = some.per_prompt
        found.append(
            NodeScores(everything.nodes, per_prompt.mean(1), some.definition, some.unit, per_prompt, some.headline)
        )
    return found


# ---- overlap ----


def circuit_size(share: float, n_heads: int) -> int:
    """How many heads a share of all is; at least one."""
    if not 0 < share <= 1:
        raise UserError(f"share={share} of all heads makes no circuit; it must be above 0 and at most 1.")
    return max(1, round(share * n_heads))


def overlap(
    found: Mapping[str, Found | Sequence[NodeScores]], *, share: float = 0.02, draws: int = 2000, seed: int = 0
) -> Overlap:
    """How many heads circuits have in common, against chance.

    found  by name: scores, of which the largest `share` of heads is taken in absolute value; the scores of several
           stages, each of which gives as many; or a circuit, which has the heads it has
    draws  for the mean and interval of the nulls; their probabilities are exact

    Raises UserError for fewer than two circuits, for circuits of models with different heads, and for one without any.
    """
    if len(found) < 2:
        raise UserError(f"{len(found)} circuit has nothing to overlap with; give two or more.")
    names = list(found)
    stages = [[one] if isinstance(one, NodeScores | Circuit) else list(one) for one in found.values()]
    heads = _heads(stages[0][0])
    for name, some in zip(names, stages, strict=True):
        if len(some) != len(stages[0]):
            raise UserError(
                f"{names[0]} has {len(stages[0])} stages and {name} has {len(some)}; give as many for each."
            )
        if any(_heads(one) != heads for one in some):
            raise UserError(
                f"{name} has not the same heads as {names[0]}; heads of different models do not correspond."
            )
    if not heads:
        raise UserError("these circuits have no heads at all to compare, such as a5.h1.")
    k = circuit_size(share, len(heads))
    members = torch.stack([_chosen(_values(some, heads), k) for some in stages])
    for name, some in zip(names, members, strict=True):
        if not some.any():
            raise UserError(f"the circuit of {name} has no heads, so it can share none.")
    layers = torch.tensor([layer_of(head) for head in heads])
    stage = torch.arange(members.shape[1])[:, None] * (int(layers.max()) + 1)
    groups = {"random heads": stage + torch.zeros_like(layers), "same layers": stage + layers}
    generator = torch.Generator().manual_seed(seed)
    interval, halves = _resampled(stages, heads, k, generator, names)
    first, second = stages[0][0], stages[1][0]
    both = isinstance(first, NodeScores) and isinstance(second, NodeScores)
    agreement = rank_agreement(first, second) if both and len(heads) > 2 else None  # type: ignore[arg-type]
    pooled = members.any(1)
    return Overlap(
        names=names,
        heads=list(heads),
        members=members,
        shared=int(members.all(0).sum()),
        union=int(members.any(0).sum()),
        ratio=float(ratio(members)),
        jaccard=torch.stack([torch.stack([ratio(torch.stack([a, b])) for a in pooled]) for b in pooled]),
        nulls={name: _null(members, group, draws, generator) for name, group in groups.items()},
        interval=interval,
        halves=halves,
        agreement=agreement,
        definition=f"heads that all of {', '.join(names)} have / heads that any has"
        + (f", summed over {members.shape[1]} stages" if members.shape[1] > 1 else "")
        + f"; a circuit is the {k} heads of {len(heads)} with the largest absolute score (a given circuit has its own "
        "heads), score: " + "; ".join(dict.fromkeys(one.definition for one in stages[0])),
    )


def ratio(members: Bool[Tensor, "circuit *any"]) -> Float[Tensor, ""]:
    """Shared by all / had by any; 0 for circuits without heads."""
    return members.all(0).sum() / members.any(0).sum().clamp_min(1)


def _heads(found: Found) -> tuple[str, ...]:
    names = found.nodes if isinstance(found, NodeScores) else found.graph.nodes
    return tuple(name for name in names if name.startswith("a"))


def _values(stages: Sequence[Found], heads: Sequence[str]) -> Float[Tensor, "stage head"]:
    """The scores of each stage, in the order of `heads`; a circuit's heads are infinitely important."""
    rows = []
    for one in stages:
        inside = dict.fromkeys(one.nodes, torch.inf) if isinstance(one, Circuit) else one.heads()
        rows.append([inside.get(head, 0.0) for head in heads])
    return torch.tensor(rows)


def _chosen(values: Float[Tensor, "stage head"], k: int) -> Bool[Tensor, "stage head"]:
    """The k heads of largest absolute score in each stage, but none that scores nothing; and all of a circuit's."""
    best = torch.zeros_like(values, dtype=torch.bool).scatter_(-1, values.abs().topk(k).indices, True)
    return (best & (values != 0)) | values.isinf()


def _null(members: Tensor, groups: Tensor, draws: int, generator: torch.Generator) -> Null:
    """Overlap when each circuit's heads are drawn anew within each group."""
    flat, group = members.flatten(1), groups.expand_as(members[0]).flatten()
    order = group.argsort(stable=True)
    sorted_members, sorted_group = flat[:, order], group[order]
    shape = (draws, len(flat), flat.shape[1])
    shuffled = (sorted_group + torch.rand(shape, generator=generator, dtype=torch.float64)).argsort(-1)
    drawn = sorted_members.expand(shape).gather(-1, shuffled)
    ratios = drawn.all(1).sum(-1) / drawn.any(1).sum(-1).clamp_min(1)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975])).tolist()
    chance = shared_by_chance(flat, group)
    counts = torch.arange(len(chance), dtype=torch.float64)
    at_least = min(1.0, float(chance[int(flat.all(0).sum()) :].sum()))
    return Null(float(ratios.mean()), low, high, float((counts * chance).sum()), at_least)


def shared_by_chance(members: Bool[Tensor, "circuit head"], groups: Tensor) -> Float[Tensor, " count"]:
    """The probability that 0, 1, 2, ... heads are in all circuits, if each draws as many per group as it has.

    Within a group the shared heads of the first circuits are a random set of their own, which the next one meets: a
    chain of hypergeometric distributions. Groups are independent, so their counts add up.
    """
    total = torch.ones(1, dtype=torch.float64)
    for group in groups.unique().tolist():
        inside = members[:, groups == group]
        size, counts = inside.shape[1], inside.sum(1).tolist()
        now = torch.zeros(size + 1, dtype=torch.float64)
        now[counts[0]] = 1.0
        for drawn in counts[1:]:
            met = torch.zeros_like(now)
            for had in now.nonzero()[:, 0].tolist():
                met += now[had] * torch.from_numpy(scipy.stats.hypergeom.pmf(range(size + 1), size, had, drawn))
            now = met
        now = now[: min(counts) + 1]
        total = torch.nn.functional.conv1d(total[None, None], now.flip(0)[None, None], padding=len(now) - 1)[0, 0]
    return total


def _resampled(
    stages: Sequence[Sequence[Found]], heads: Sequence[str], k: int, generator: torch.Generator, names: Sequence[str]
) -> tuple[list[float] | None, dict[str, float]]:
    """The ratio's interval over resampled prompts, and the ratios of circuits found on halves of the prompts."""
    per_prompt = [_per_prompt(some, heads) for some in stages]
    known = [x for x in per_prompt if x is not None and x.shape[-1] >= 4]
    if len(known) < len(stages):
        return None, {}
    redrawn, halved = [], []
    for _ in range(RESAMPLES):
        again = [torch.randint(x.shape[-1], (x.shape[-1],), generator=generator) for x in known]
        redrawn.append(ratio(torch.stack([_of(x, i, k) for x, i in zip(known, again, strict=True)])))
        orders = [torch.randperm(x.shape[-1], generator=generator) for x in known]
        halves = [
            torch.stack([_of(x, i[: len(i) // 2], k), _of(x, i[len(i) // 2 :], k)])
            for x, i in zip(known, orders, strict=True)
        ]
        across = [ratio(torch.stack([half[side] for half in halves])) for side in range(2)]
        halved.append(torch.stack([*map(ratio, halves), torch.stack(across).mean()]))
    low, high = torch.stack(redrawn).quantile(torch.tensor([0.025, 0.975])).tolist()
    labels = [*(f"within {name}" for name in names), "across"]
    return [low, high], dict(zip(labels, torch.stack(halved).mean(0).tolist(), strict=True))


def _per_prompt(stages: Sequence[Found], heads: Sequence[str]) -> Float[Tensor, "stage head batch"] | None:
    rows = []
    for one in stages:
        if isinstance(one, Circuit) or one.per_prompt is None:
            return None
        rows.append(one.per_prompt[[one.nodes.index(head) for head in heads]])
    return torch.stack(rows)


def _of(per_prompt: Float[Tensor, "stage head batch"], prompts: Tensor, k: int) -> Bool[Tensor, "stage head"]:
    return _chosen(per_prompt[..., prompts].mean(-1), k)
