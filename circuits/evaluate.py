"""Is a circuit the mechanism? Faithfulness, completeness, minimality, and curves over circuit sizes.

With m the task's metric averaged over prompts, M the whole model, C a circuit and 0 the empty one (everything ablated),

    faithfulness f(C) = (m(C) - m(0)) / (m(M) - m(0))            a ratio of means; 1 is the model, above 1 is overshoot
    completeness      = 1 - f(M without C)                       1: nothing of the behaviour is left without C
    incompleteness    = mean over random K in C of |f(C without K) - f(M without K)|      (Wang et al. 2022, section 4)
    minimality of v   = |f(C without v) - f(C)|                  a node whose removal changes nothing does not belong

Parts outside a circuit are ablated: what that means (zero, mean, resample, optimal) changes every number (Miller et al.
2024), so it is a parameter and stands in every definition. `optimal` (circuits/optimal.py) needs prompts of its own to
fit its constants on, `fit`, and takes about a hundred passes per circuit. Cutting is by edge; a node that is left out
has all its edges cut.

Curves are MIB's (Mueller et al. 2025): at ten sizes from 0.1 % to all edges, CMD is the area between the curve and 1
with edges ranked by absolute score, CPR the area under it with edges ranked by signed score. CPR has no upper bound
and rewards circuits that overshoot; CMD does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits import optimal, wiring
from circuits.graph import Circuit, EdgeScores, Graph, top_edges
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.prompts import Batch
from workbench.scores import NodeScores

Judged = Literal["resample", "mean", "zero", "optimal"]
FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # MIB's
BOOTSTRAP = 1000


@dataclass(frozen=True)
class Faithfulness:
    """Faithfulness of several circuits on the same prompts.

    value           f of each; low, high: 95 % of a bootstrap over prompts of the ratio of means
    mean_of_ratios  the other way to average, per prompt first: unstable where one prompt's denominator is small
    metric          m of each circuit, mean over prompts; whole, nothing: of the model and the empty circuit
    """

    value: Float[Tensor, " circuit"]
    low: Float[Tensor, " circuit"]
    high: Float[Tensor, " circuit"]
    mean_of_ratios: Float[Tensor, " circuit"]
    metric: Float[Tensor, " circuit"]
    whole: float
    nothing: float


@dataclass(frozen=True)
class Ends:
    """The metric per prompt of the whole model and of the empty circuit: between them faithfulness is measured."""

    whole: Float[Tensor, " batch"]
    nothing: Float[Tensor, " batch"]


def ends_of(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    *,
    ablation: Judged = "resample",
    fit: Batch | None = None,
) -> Ends:
    """Run the whole model and the empty circuit.

    Raises UserError where they do equally well, so that there is nothing to explain, and for optimal ablation without
    prompts to fit its constants on.
    """
    graph = Graph.of(model.config)
    both = torch.tensor([[True], [False]]).expand(2, len(graph))
    # Apart, as the whole model's pass is read from the store.
    whole, nothing = (_metric(model, batch, store, graph, each[None], ablation, fit)[0] for each in both)
    gap = float(whole.mean() - nothing.mean())
    spread = float((whole - nothing).std()) if len(batch) > 1 else 0.0
    if abs(gap) < 1e-3 * max(spread, float(whole.abs().mean()), 1e-6):
        raise UserError(
            f"with everything ablated ({ablation}) {model.name} has {batch.task.metric} {float(nothing.mean()):.3g}, "
            f"the whole model {float(whole.mean()):.3g}: there is no behaviour for a circuit to explain."
        )
    return Ends(whole, nothing)


def _metric(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    graph: Graph,
    kept: Bool[Tensor, "circuit edge"],
    ablation: Judged,
    fit: Batch | None,
) -> Float[Tensor, "circuit batch"]:
    keep = torch.zeros(len(kept), len(graph.sources), len(graph.destinations))
    keep[:, graph.edges[:, 0], graph.edges[:, 1]] = kept.float()
    if ablation != "optimal":
        return wiring.metric(model, batch, store, keep, ablation).double()
    if fit is None:
        raise UserError("optimal ablation fits its constants on prompts that judge nothing; pass them as fit=.")
    return optimal.metric(model, batch, fit, store, keep).double()


def faithfulness(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    graph: Graph,
    kept: Bool[Tensor, "circuit edge"],
    *,
    ablation: Judged = "resample",
    fit: Batch | None = None,
    ends: Ends | None = None,
    seed: int = 0,
) -> Faithfulness:
    """Run the model with only some edges.

    fit   prompts that optimal ablation fits its constants on; none of those that judge
    ends  `ends_of` the same prompts and ablation, if they are known already

    Raises UserError as `ends_of` does.
    """
    ends = ends or ends_of(model, batch, store, ablation=ablation, fit=fit)
    circuits, whole, nothing = _metric(model, batch, store, graph, kept, ablation, fit), ends.whole, ends.nothing
    value, low, high = shares(circuits - nothing, whole - nothing, seed)
    return Faithfulness(
        value=value,
        low=low,
        high=high,
        mean_of_ratios=((circuits - nothing) / (whole - nothing)).mean(1).float(),
        metric=circuits.mean(1).float(),
        whole=float(whole.mean()),
        nothing=float(nothing.mean()),
    )


def shares(
    moved: Float[Tensor, "way batch"], whole: Float[Tensor, " batch"], seed: int = 0
) -> tuple[Float[Tensor, " way"], Float[Tensor, " way"], Float[Tensor, " way"]]:
    """Each way's mean as a share of the mean of the whole: value, and 95 % over prompts (bootstrap), low and high."""
    moved, whole = moved.double(), whole.double()
    n, generator = len(whole), torch.Generator().manual_seed(seed)
    draw = torch.randint(n, (BOOTSTRAP, n), generator=generator)
    boots = moved[:, draw].mean(-1) / whole[draw].mean(-1)
    low, high = boots.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=1)
    return (moved.mean(1) / whole.mean()).float(), low.float(), high.float()


# ---- curves over sizes ----


@dataclass(frozen=True)
class Curve:
    """Faithfulness over circuit sizes, with the edges (or nodes) of largest score.

    fractions  of all edges or nodes; kept: how many edges of the circuit lie on a path from input to logits
    absolute   ranked by absolute score, which gives CMD; by signed score, which gives CPR
    """

    fractions: Float[Tensor, " size"]
    items: Int[Tensor, " size"]
    kept: Int[Tensor, " size"]
    faithfulness: Faithfulness
    absolute: bool
    level: str
    definition: str
    headline: dict[str, Any] = field(default_factory=dict)

    @property
    def measure(self) -> str:
        return "cmd" if self.absolute else "cpr"

    @property
    def area(self) -> float:
        """CMD, between the curve and 1, or CPR, under it."""
        cpr, cmd = areas(self.fractions.double().tolist(), self.faithfulness.value.tolist())
        return cmd if self.absolute else cpr

    def summary(self) -> dict[str, Any]:
        f = self.faithfulness
        rows = zip(self.items.tolist(), f.value.tolist(), f.low.tolist(), f.high.tolist(), strict=True)
        return {
            self.measure: round(self.area, 4),
            "curve": [[n, *(round(x, 4) for x in row)] for n, *row in rows],
            "whole": round(f.whole, 4),
            "nothing": round(f.nothing, 4),
            "definition": self.definition,
            **self.headline,
        }


def areas(fractions: Sequence[float], f: Sequence[float]) -> tuple[float, float]:
    """CPR and CMD by the trapezoid rule (MIB). The domain starts at the first fraction, so a perfect curve over MIB's
    has CPR 0.999 and CMD 0."""
    x, y = torch.tensor(fractions, dtype=torch.float64), torch.tensor(f, dtype=torch.float64)
    return float(torch.trapezoid(y, x)), float(torch.trapezoid((1 - y).abs(), x))


def curve(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    scores: EdgeScores | NodeScores,
    *,
    absolute: bool = True,
    ablation: Judged = "resample",
    fit: Batch | None = None,
    ends: Ends | None = None,
    fractions: Sequence[float] = FRACTIONS,
) -> Curve:
    """Faithfulness of the best-scored edges, or nodes with all edges between them, at several sizes."""
    graph = Graph.of(model.config)
    total = len(scores.scores)
    sizes = [int(fraction * total + 1e-6) for fraction in fractions]
    kept = torch.stack([best(graph, scores, n, absolute) for n in sizes])
    found = faithfulness(model, batch, store, graph, kept, ablation=ablation, fit=fit, ends=ends)
    level = "edges" if isinstance(scores, EdgeScores) else "nodes"
    ranked = "absolute score" if absolute else "score"
    return Curve(
        torch.tensor(fractions, dtype=torch.float64),
        torch.tensor(sizes),
        kept.sum(1),
        found,
        absolute,
        level,
        f"faithfulness with the {level} of largest {ranked} and those without one, all else ablated ({ablation}), over "
        f"{len(batch)} prompts; ranked by: {scores.definition}",
        {"prompts": len(batch), "ablation": ablation},
    )


def smallest(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    scores: EdgeScores | NodeScores,
    *,
    at_least: float = 0.9,
    ablation: Judged = "resample",
    fit: Batch | None = None,
    ends: Ends | None = None,
) -> tuple[int, float]:
    """Size and faithfulness of the smallest circuit of best-scored items with faithfulness of at least `at_least` and
    at most 2 - at_least: an overshoot is as far from the model.

    Sizes are tried on a ladder, each 1.5 times the last. Where faithfulness rises to `at_least` between two rungs, the
    size at which it does is found by bisection, also if the upper rung overshoots. If the circuit of that size
    overshoots too, the ladder goes on, to the next rise or the first rung within bounds. Faithfulness need not grow
    with size, so a smaller circuit may be missed. Returns all items if none is within bounds.
    """
    graph, total = Graph.of(model.config), len(scores.scores)
    ends = ends or ends_of(model, batch, store, ablation=ablation, fit=fit)
    tried: dict[int, float] = {0: 0.0}

    def measure(sizes: Sequence[int]) -> None:
        kept = torch.stack([best(graph, scores, n) for n in sizes])
        found = faithfulness(model, batch, store, graph, kept, ablation=ablation, fit=fit, ends=ends)
        tried.update(zip(sizes, found.value.tolist(), strict=True))

    def fine(n: int) -> bool:
        return at_least <= tried[n] <= 2 - at_least

    low, size = 0, 1
    while size < total:
        rungs = [n for n in (size, *(int(size * 1.5**i) + i for i in range(1, 4))) if n < total]
        measure(rungs)
        for rung in rungs:
            rises = tried[low] < at_least <= tried[rung]
            if rises or fine(rung):
                high = _crossing(low, rung, at_least, tried, measure) if rises else rung
                if fine(high):
                    return high, tried[high]
            low = rung
        size = int(rungs[-1] * 1.5) + 1
    measure([total])
    if tried[low] < at_least <= tried[total]:
        high = _crossing(low, total, at_least, tried, measure)
        if fine(high):
            return high, tried[high]
    return total, tried[total]


def _crossing(
    low: int, high: int, at_least: float, tried: Mapping[int, float], measure: Callable[[Sequence[int]], None]
) -> int:
    """A size at which faithfulness is at least `at_least`, with less at one item fewer, between one of each kind."""
    while high - low > 1:
        middle = (low + high) // 2
        measure([middle])
        if tried[middle] >= at_least:
            high = middle
        else:
            low = middle
    return high


def best(graph: Graph, scores: EdgeScores | NodeScores, n: int, absolute: bool = True) -> Bool[Tensor, " edge"]:
    """The n best-scored edges that lie on a path from input to logits, or all edges between the n best-scored nodes and
    those that have no score (the MLPs, for a method that scores heads)."""
    if isinstance(scores, EdgeScores):
        return top_edges(scores, n, absolute=absolute).pruned().kept
    ranked = scores.scores.abs() if absolute else scores.scores
    best = [scores.nodes[i] for i in ranked.topk(n).indices.tolist()]
    return graph.between(set(best) | (set(graph.nodes) - set(scores.nodes)))


# ---- one circuit ----


@dataclass(frozen=True)
class Report:
    """One circuit, judged.

    faithfulness, completeness, incompleteness   as in the module's docstring, with 95 % over prompts for the first
    nodes, without  its nodes, and how faithful it is without each; minimality: how far that is from the whole circuit's
    random          faithfulness of random circuits with as many nodes (or edges) of each layer
    """

    nodes: tuple[str, ...]
    n_nodes: int
    n_edges: int
    faithfulness: float
    low: float
    high: float
    completeness: float
    incompleteness: float
    without: Float[Tensor, " node"]
    random: Float[Tensor, " draw"]
    whole: float
    nothing: float
    definition: str

    @property
    def minimality(self) -> Float[Tensor, " node"]:
        return (self.without - self.faithfulness).abs()

    def summary(self) -> dict[str, Any]:
        weak = sorted(zip(self.minimality.tolist(), self.nodes, strict=True))[:5]
        return {
            "n_nodes": self.n_nodes,
            "n_edges": self.n_edges,
            "faithfulness": round(self.faithfulness, 4),
            "faithfulness_95": [round(self.low, 4), round(self.high, 4)],
            "completeness": round(self.completeness, 4),
            "incompleteness": round(self.incompleteness, 4),
            "least_needed": [[name, round(value, 4)] for value, name in weak],
            **(
                {"random_mean": round(float(self.random.mean()), 4), "random_max": round(float(self.random.max()), 4)}
                if len(self.random)
                else {}
            ),
            "whole": round(self.whole, 4),
            "nothing": round(self.nothing, 4),
            "definition": self.definition,
        }


def report(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    circuit: Circuit,
    *,
    ablation: Judged = "resample",
    fit: Batch | None = None,
    subsets: int = 20,
    random: int = 20,
    each: bool = True,
    seed: int = 0,
) -> Report:
    """Judge a circuit on prompts that it was not found on; each: also without each of its nodes."""
    graph, nodes = circuit.graph, circuit.nodes
    if not nodes:
        raise UserError("the circuit has no nodes besides input and logits; there is nothing to judge.")
    apart = nodes if each else []
    generator = torch.Generator().manual_seed(seed)
    without = _without(graph)
    picks = [[n for n in nodes if torch.rand((), generator=generator) < 0.5] for _ in range(subsets)]
    kept = [circuit.kept, ~circuit.kept]
    kept += [circuit.kept & without({name}) for name in apart]
    for some in picks:
        kept += [circuit.kept & without(set(some)), without(set(some))]
    kept += [_random_like(circuit, generator) for _ in range(random)]
    found = faithfulness(model, batch, store, graph, torch.stack(kept), ablation=ablation, fit=fit, seed=seed)
    f = found.value
    first = 2 + len(apart)
    pairs = f[first : first + 2 * subsets].unflatten(0, (subsets, 2))
    return Report(
        nodes=tuple(apart),
        n_nodes=len(nodes),
        n_edges=len(circuit),
        faithfulness=float(f[0]),
        low=float(found.low[0]),
        high=float(found.high[0]),
        completeness=1 - float(f[1]),
        incompleteness=float((pairs[:, 0] - pairs[:, 1]).abs().mean()) if subsets else 0.0,
        without=f[2:first],
        random=f[first + 2 * subsets :],
        whole=found.whole,
        nothing=found.nothing,
        definition=f"{batch.task.metric}, ablation {ablation}, ratio of means over {len(batch)} prompts, {subsets} "
        f"random subsets, {random} random circuits of the same make-up, seed {seed}; the circuit: {circuit.definition}",
    )


def _without(graph: Graph) -> Callable[[set[str]], Tensor]:
    names = set(graph.nodes)
    return lambda removed: graph.between(names - removed)


def _random_like(circuit: Circuit, generator: torch.Generator) -> Bool[Tensor, " edge"]:
    """A random circuit of the same make-up: as many heads of each layer and as many MLPs with all edges between
    them, if the circuit has all edges between its nodes; otherwise as many edges into each layer's queries,
    keys, values and MLP.
    """
    graph, nodes = circuit.graph, set(circuit.nodes)
    if torch.equal(circuit.kept, graph.between(nodes)):
        alike = _groups([name.split(".")[0] if "." in name else name[0] for name in graph.nodes])
        taken = [sum(graph.nodes[i] in nodes for i in members) for members in alike]
        return graph.between(graph.nodes[i] for i in _draw(alike, taken, generator))
    kind = [name.split(".")[0] + name[name.find("<") :] if "<" in name else name for name in graph.destinations]
    alike = _groups([kind[destination] for destination in graph.edges[:, 1].tolist()])
    kept = torch.zeros(len(graph), dtype=torch.bool)
    kept[_draw(alike, [int(circuit.kept[members].sum()) for members in alike], generator)] = True
    return kept


def _groups(kinds: Sequence[str]) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for i, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(i)
    return list(groups.values())


def _draw(groups: Sequence[Sequence[int]], numbers: Sequence[int], generator: torch.Generator) -> list[int]:
    return [
        group[i]
        for group, n in zip(groups, numbers, strict=True)
        for i in torch.randperm(len(group), generator=generator)[:n].tolist()
    ]
