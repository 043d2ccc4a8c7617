"""Two runs' scores and circuits, part by part: how far they agree, against chance.

Scores are compared by Pearson's r and Spearman's rho of the scores as they are, and by Spearman's rho of their absolute
values (what `compare` and `reuse` call agreement), over what both have a finite score for; and by the overlap of the k
parts of largest absolute score. Where one run scores nodes and the other edges, a node stands for its edge of largest
absolute score, as in `compare`, and signs are lost.

The overlap of two sets of sizes a and b is their Jaccard index J = i / (a + b - i), i being how many they share. If the
sets are drawn at random from n parts, i is hypergeometric, so that

    E[J] = sum over i of  P(i) i / (a + b - i),      P(i) = C(a, i) C(n - a, b - i) / C(n, b)

exactly. Drawn anew with as many of each kind of part (heads of a layer, edges into the queries of a layer), i is a sum
of such numbers: late layers matter for everything, without any agreement.

Of different models nodes correspond in name alone, and only where all names are the same is anything compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
import scipy
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.graph import Circuit, EdgeScores
from circuits.judging import scores_of
from circuits.reuse import ratio
from workbench import canvas, comparing
from workbench.comparing import Row
from workbench.errors import UserError
from workbench.runs import Run
from workbench.scores import NodeScores

DRAWN = 2000  # points of a scatter: of more, those of largest score
NAMED = 12
_HEAD = re.compile(r"(a\d+)\.h\d+(<[qkv]>)?")

# ---- sets ----


@dataclass(frozen=True)
class Shared:
    """Two sets of parts.

    both, only_a, only_b  names; total: how many parts the two could have been of
    jaccard               both / any
    expected, alike       the Jaccard index that random sets of these sizes have on average: of all parts, and with as
                          many of each kind
    p, p_alike            the exact probability that such sets share at least as many
    """

    level: str
    both: tuple[str, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    total: int
    jaccard: float
    expected: float
    p: float
    alike: float
    p_alike: float

    def rows(self, part: str) -> list[Row]:
        a, b = len(self.both) + len(self.only_a), len(self.both) + len(self.only_b)
        sizes = {f"{self.level} of each": (float(a), float(b))}
        figures = {
            "shared": float(len(self.both)), "of all": float(self.total), "Jaccard": self.jaccard,
            "Jaccard by chance": self.expected, "p": self.p, "Jaccard by chance, same kinds": self.alike,
            "p, same kinds": self.p_alike,
        }  # fmt: skip
        rows = [Row(part, name, *values) for name, values in sizes.items()]
        rows += [Row(part, f"{self.level}: {name}", value, value) for name, value in figures.items()]
        rows += [Row(part, f"{self.level}: {name}", "yes", "no") for name in self.only_a]
        return rows + [Row(part, f"{self.level}: {name}", "no", "yes") for name in self.only_b]


def shared(
    level: str, names: Sequence[str], one: Bool[Tensor, " part"], other: Bool[Tensor, " part"], groups: Int[Tensor, "_"]
) -> Shared:
    """groups  the kind of each part, as `kinds` numbers them"""
    members = torch.stack([one, other])
    sizes, both = (int(one.sum()), int(other.sum())), int((one & other).sum())
    expected, p = _by_chance(by_chance(len(names), *sizes), sum(sizes), both)
    alike, p_alike = _by_chance(alike_by_chance(one, other, groups), sum(sizes), both)
    return Shared(
        level, _named(names, one & other), _named(names, one & ~other), _named(names, other & ~one), len(names),
        float(ratio(members)), expected, p, alike, p_alike,
    )  # fmt: skip


def by_chance(total: int, a: int, b: int) -> Float[Tensor, " count"]:
    """The probability that random sets of a and b of all parts share 0, 1, 2, ... of them."""
    return torch.from_numpy(scipy.stats.hypergeom.pmf(range(min(a, b) + 1), total, a, b))


def alike_by_chance(
    one: Bool[Tensor, " part"], other: Bool[Tensor, " part"], groups: Int[Tensor, " part"]
) -> Float[Tensor, " count"]:
    """The same with as many of each group as the sets have: the sum over groups, which are drawn apart.

    `circuits.reuse.shared_by_chance` for two circuits, in a hundredth of its time where there are 100,000 edges.
    """
    n = int(groups.max()) + 1
    counts = zip(*(groups[some].bincount(minlength=n).tolist() for some in (one | True, one, other)), strict=True)
    total = np.ones(1)
    for size, a, b in counts:
        total = np.convolve(total, by_chance(size, a, b).numpy()) if a and b else total
    return torch.from_numpy(total)


def _by_chance(chance: Float[Tensor, " count"], sizes: int, both: int) -> tuple[float, float]:
    """Expected Jaccard index, and the probability of at least as many."""
    count = torch.arange(len(chance), dtype=torch.float64)
    index = count / (sizes - count).clamp(min=1)  # two empty sets share nothing
    return float((chance * index).sum()), min(1.0, float(chance[both:].sum()))


def kinds(names: Sequence[str]) -> Int[Tensor, " part"]:
    """What random parts are drawn alike in, numbered: the heads of a layer, all MLPs, the channels of a site; an edge
    is of the kind of what reads it, with the port."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(_kind(name), len(numbers)) for name in names], dtype=torch.long)


def _kind(name: str) -> str:
    reader = name.rpartition("->")[2]
    head = _HEAD.fullmatch(reader)
    if head:
        return head[1] + (head[2] or "")
    if re.fullmatch(r"m\d+", reader):
        return reader if reader != name else "m"
    return re.split("[:/]", reader)[0]


def _named(names: Sequence[str], which: Bool[Tensor, " part"]) -> tuple[str, ...]:
    return tuple(names[i] for i in which.nonzero()[:, 0].tolist())


# ---- scores ----


class Change(NamedTuple):
    """What a part scores in a and in b, and b - a with the ends of its interval, where there is one."""

    name: str
    a: float
    b: float
    difference: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Agreement:
    """Scores of the same nodes or edges by two runs.

    level        nodes or edges; names: of those that both have a finite score for
    absolute     whether a and b are absolute values, as one run's edges stand for nodes
    lost         how many have a score in both that is infinite or no number in one
    only_a, only_b   names that one run alone scores
    pearson, spearman, ranks  None where not defined: fewer than two parts, or all scores of a run equal
    change       b - a with 95 % over the same prompts, for each name; None where `why` says that there cannot be one
    units, definitions  of a and b
    """

    level: str
    names: tuple[str, ...]
    a: Float[Tensor, " part"]
    b: Float[Tensor, " part"]
    absolute: bool
    lost: int
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    pearson: float | None
    spearman: float | None
    ranks: float | None
    change: comparing.Paired | None
    why: str
    units: tuple[str, str]
    definitions: tuple[str, str]

    def top(self, k: int) -> tuple[Bool[Tensor, " part"], Bool[Tensor, " part"]]:
        """The k of largest absolute score in each; of equal ones the first, and none that scores nothing."""
        return _top(self.a, k), _top(self.b, k)

    def overlap(self, k: int) -> Shared:
        return shared(self.level, self.names, *self.top(k), kinds(self.names))

    def changes(self) -> list[Change]:
        """The largest first; nothing where units differ."""
        if self.units[0] != self.units[1]:
            return []
        pairs = zip(self.names, self.a.tolist(), self.b.tolist(), strict=True)
        if self.change is None:
            rows = [Change(name, a, b, b - a, None, None) for name, a, b in pairs]
        else:
            ends = zip(self.change.mean.tolist(), self.change.low.tolist(), self.change.high.tolist(), strict=True)
            rows = [Change(*pair, *three) for pair, three in zip(pairs, ends, strict=True)]
        return sorted(rows, key=lambda row: -abs(row.difference))

    def rows(self, k: int) -> list[Row]:
        figures = {"Pearson": self.pearson, "Spearman": self.spearman, "Spearman of absolute values": self.ranks}
        how = f"paired t, {self.why}" if self.change is not None else f"no interval: {self.why}"
        rows = [Row("scores", f"{self.level}: {name}", value, value) for name, value in figures.items()]
        for one in self.changes():
            rows.append(Row("scores", one.name, one.a, one.b, one.difference, one.low, one.high, how))
        if self.units[0] != self.units[1]:
            pairs = zip(self.names, self.a.tolist(), self.b.tolist(), strict=True)
            rows += [Row("scores", name, a, b, how=how) for name, a, b in pairs]
        return [*rows, *self.overlap(k).rows(f"top {k}")]


def agreement(a: Run, b: Run) -> Agreement:
    """Raises UserError, with what cannot be compared and why, for runs that score no nodes or edges, or others."""
    left, right = _scored(a), _scored(b)
    mixed = isinstance(left, EdgeScores) != isinstance(right, EdgeScores)
    if mixed:
        left, right = (some.nodes() if isinstance(some, EdgeScores) else some for some in (left, right))
    one, other = _names(left), _names(right)
    both = set(one) & set(other)
    if a.record["key"].get("model") != b.record["key"].get("model") and both != set(one) | set(other):
        raise UserError(
            f"{a.record['model_name']} and {b.record['model_name']} are different graphs, of {len(one):,} and "
            f"{len(other):,} parts: a head of one corresponds to none of the other, and scores are not compared."
        )
    names = [name for name in one if name in both]
    places = [_places(every, names) for every in (one, other)]
    x, y = left.scores.double()[places[0]], right.scores.double()[places[1]]
    x, y = (x.abs(), y.abs()) if mixed else (x, y)
    finite = x.isfinite() & y.isfinite()
    kept = _named(names, finite)
    if not kept:
        raise UserError(
            f"of {len(names):,} parts that both score none has a finite score in both: nothing is compared."
        )
    why = _unpaired(a, b, left, right, mixed)
    change = None
    if not why:
        change = comparing.paired(_per_prompt(left)[places[0]][finite], _per_prompt(right)[places[1]][finite])
    x, y = x[finite], y[finite]
    pearson, spearman = scipy.stats.pearsonr, scipy.stats.spearmanr
    return Agreement(
        "edges" if isinstance(left, EdgeScores) else "nodes", kept, x, y, mixed, len(names) - len(kept),
        tuple(name for name in one if name not in both), tuple(name for name in other if name not in both),
        _correlation(pearson, x, y), _correlation(spearman, x, y), _correlation(spearman, x.abs(), y.abs()),
        change, why or comparing.prompts(a, b).why, (left.unit, right.unit), (left.definition, right.definition),
    )  # fmt: skip


def _scored(run: Run) -> NodeScores | EdgeScores:
    found = scores_of(run)
    if found is None:
        raise UserError(f"there are no scores to compare: {run.id} scores no nodes or edges.")
    return found


def _names(scores: NodeScores | EdgeScores) -> tuple[str, ...]:
    return scores.graph.names if isinstance(scores, EdgeScores) else scores.nodes


def _places(every: Sequence[str], names: Sequence[str]) -> list[int]:
    at = {name: i for i, name in enumerate(every)}
    return [at[name] for name in names]


def _per_prompt(scores: NodeScores | EdgeScores) -> Float[Tensor, "part prompt"]:
    assert scores.per_prompt is not None
    return scores.per_prompt.T if isinstance(scores, EdgeScores) else scores.per_prompt


def _unpaired(a: Run, b: Run, left: NodeScores | EdgeScores, right: NodeScores | EdgeScores, mixed: bool) -> str:
    """Why there is no interval over prompts; "" where there is."""
    if mixed:
        return "one scores nodes and the other edges"
    if left.unit != right.unit:
        return f"the scores are in different units, {left.unit} and {right.unit}"
    for run, one in ((a, left), (b, right)):
        if one.per_prompt is None:
            return f"{run.id} has no scores per prompt"
        if _per_prompt(one).shape[1] != run.record["key"].get("n"):
            return f"{run.id} has scores of some of its prompts, and does not say which"
    found = comparing.prompts(a, b)
    if found.shared != "all":
        return found.why
    return "" if _per_prompt(left).shape[1] > 1 else "a single prompt has no spread"


def _correlation(of: Callable[..., Any], x: Float[Tensor, " part"], y: Float[Tensor, " part"]) -> float | None:
    if len(x) < 2 or bool((x == x[0]).all()) or bool((y == y[0]).all()):
        return None
    return float(of(x.numpy(), y.numpy()).statistic)


def _top(values: Float[Tensor, " part"], k: int) -> Bool[Tensor, " part"]:
    best = torch.zeros(len(values), dtype=torch.bool)
    best[values.abs().argsort(descending=True, stable=True)[:k]] = True
    return best & (values != 0)


def scatter(found: Agreement, k: int) -> go.Figure:
    """Each part by its score in a (across) and in b (up): blue where it is among the k largest of both, orange of one.

    On the dotted line, which there is where both have one unit, the two are equal.
    """
    one, other = found.top(k)
    size = torch.maximum(found.a.abs() / _largest(found.a), found.b.abs() / _largest(found.b))
    order = size.argsort(descending=True, stable=True)[:DRAWN]
    named = {i for i in order[:NAMED].tolist() if size[i] > 0.1}  # near the origin names would cover each other
    fig = go.Figure()
    if found.units[0] == found.units[1]:
        ends = [float(torch.minimum(found.a, found.b).min()), float(torch.maximum(found.a, found.b).max())]
        line = {"color": canvas.FAINT, "width": 1, "dash": "dot"}
        fig.add_trace(go.Scatter(x=ends, y=ends, mode="lines", line=line, hoverinfo="skip", showlegend=False))
    classes = {
        "neither": (~one & ~other, "rgba(128,128,128,0.5)", "circle"),
        f"top {k} of a alone": (one & ~other, canvas.NEGATIVE.format(0.85), "triangle-right"),
        f"top {k} of b alone": (other & ~one, canvas.NEGATIVE.format(0.85), "triangle-up"),
        f"top {k} of both": (one & other, canvas.POSITIVE.format(0.85), "circle"),
    }
    for label, (inside, colour, symbol) in classes.items():
        at = [i for i in order.tolist() if inside[i]]
        values = [(found.names[i], float(found.a[i]), float(found.b[i])) for i in at]
        fig.add_trace(
            go.Scatter(
                x=[a for _, a, _ in values], y=[b for _, _, b in values], mode="markers+text", name=label,
                marker={"color": colour, "symbol": symbol, "size": 7},
                text=[escape(found.names[i]) if i in named else "" for i in at], textposition="top center",
                textfont={"size": 10},
                hovertext=[f"{escape(n)}: a {canvas.number(a, 4)}, b {canvas.number(b, 4)}" for n, a, b in values],
                hovertemplate="%{hovertext}<extra></extra>",
            )
        )  # fmt: skip
    zero = {"zeroline": True, "zerolinecolor": canvas.FAINT}
    words = "absolute score" if found.absolute else "score"
    fig.update_xaxes(title_text=f"{words} in a, {escape(found.units[0])}", **zero)
    fig.update_yaxes(title_text=f"{words} in b, {escape(found.units[1])}", **zero)
    fig.update_layout(legend={"orientation": "h", "y": -0.18, "x": 0})
    return canvas.finish(fig, 400, bottom=90, left=64)


def _largest(values: Float[Tensor, " part"]) -> float:
    return float(values.abs().max()) or 1.0


# ---- circuits ----


def circuit_in(run: Run) -> Circuit | None:
    """The circuit that a run found, if it found one."""
    result = run.result
    found = result if isinstance(result, Circuit) else getattr(result, "circuit", None)
    return found if isinstance(found, Circuit) else None


def overlaps(a: Run, b: Run) -> tuple[Shared, Shared]:
    """Of nodes, and of edges. Raises UserError for runs without a circuit, and for circuits of different graphs."""
    one, other = _circuit(a), _circuit(b)
    graph = one.graph
    if not graph.same_as(other.graph):
        raise UserError(
            f"the circuits are of different graphs, of {len(graph):,} and {len(other.graph):,} edges: their nodes "
            "and edges do not correspond, and no overlap is taken."
        )
    return (
        shared("nodes", graph.nodes, _inside(one), _inside(other), kinds(graph.nodes)),
        shared("edges", graph.names, one.kept, other.kept, kinds(graph.names)),
    )


def _circuit(run: Run) -> Circuit:
    found = circuit_in(run)
    if found is None:
        raise UserError(f"there are no two circuits to compare: {run.id} found no circuit.")
    return found


def _inside(circuit: Circuit) -> Bool[Tensor, " part"]:
    nodes = set(circuit.nodes)
    return torch.tensor([name in nodes for name in circuit.graph.nodes])
