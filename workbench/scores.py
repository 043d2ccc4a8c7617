"""Scores of nodes, the common currency of every discovery method.

Nodes are named as EAP-IG names them: `a5.h1` is head 1 of layer 5, `m3` the MLP of layer 3. A score estimates the
effect of removing the node, and says in words how it was computed: a number without its definition is not comparable.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import scipy  # which imports `scipy.stats` when it is asked for
import torch
from jaxtyping import Bool, Float
from torch import Tensor

_HEAD = re.compile(r"a(\d+)\.h(\d+)")


def head(layer: int, index: int) -> str:
    return f"a{layer}.h{index}"


def mlp(layer: int) -> str:
    return f"m{layer}"


def every_head(n_layers: int, n_heads: int) -> tuple[str, ...]:
    """All heads of a model, layer by layer."""
    return tuple(head(layer, index) for layer in range(n_layers) for index in range(n_heads))


@dataclass(frozen=True)
class NodeScores:
    """One score per node.

    per_prompt   the same scores before averaging over prompts, where the method has them
    definition   what the number is: sign convention, ablation, aggregation
    unit         of the scores
    headline     further numbers that belong with them
    """

    nodes: tuple[str, ...]
    scores: Float[Tensor, " node"]
    definition: str
    unit: str
    per_prompt: Float[Tensor, "node batch"] | None = None
    headline: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        return {
            "top_heads": [[name, round(score, 5)] for name, score in self.top(10)],
            "n_nodes": len(self.nodes),
            "unit": self.unit,
            "definition": self.definition,
            **self.headline,
        }

    def heads(self) -> dict[str, float]:
        """Scores of the heads alone."""
        pairs = zip(self.nodes, self.scores.tolist(), strict=True)
        return {name: score for name, score in pairs if _HEAD.fullmatch(name)}

    def mlps(self) -> dict[str, float]:
        pairs = zip(self.nodes, self.scores.tolist(), strict=True)
        return {name: score for name, score in pairs if name.startswith("m")}

    def grid(self) -> Float[Tensor, "layer head"]:
        """Head scores as a map; NaN where a head has none."""
        where = {name: (int(m[1]), int(m[2])) for name in self.heads() if (m := _HEAD.fullmatch(name))}
        shape = [1 + max(axis) for axis in zip(*where.values(), strict=True)]
        grid = torch.full(shape, torch.nan)
        for name, score in self.heads().items():
            grid[where[name]] = score
        return grid

    def top(self, k: int) -> list[tuple[str, float]]:
        """The k heads of largest absolute score."""
        return sorted(self.heads().items(), key=lambda item: -abs(item[1]))[:k]


@dataclass(frozen=True)
class PairScores:
    """One score per ordered pair of heads of which the first lies in an earlier layer: `a0.h1->a2.h3`.

    The common measure of methods that score head-to-head edges with ports (queries, keys, values) and without.
    """

    pairs: tuple[str, ...]
    scores: Float[Tensor, " pair"]
    definition: str
    unit: str

    @classmethod
    def of(cls, heads: Sequence[str], table: Float[Tensor, "head head"], definition: str, unit: str) -> PairScores:
        """From a table [sender, receiver] of all heads; entries that are no ordered pair are left out."""
        layers = torch.tensor([int(name[1 : name.index(".")]) for name in heads])
        ends = (layers[:, None] < layers[None, :]).nonzero()
        names = tuple(f"{heads[i]}->{heads[j]}" for i, j in ends.tolist())
        return cls(names, table[ends[:, 0], ends[:, 1]], definition, unit)


def rank_agreement(a: NodeScores, b: NodeScores) -> float:
    """Spearman correlation of the absolute head scores of two methods, over the heads both have."""
    left, right = a.heads(), b.heads()
    shared = sorted(left.keys() & right.keys())
    return float(scipy.stats.spearmanr([abs(left[n]) for n in shared], [abs(right[n]) for n in shared]).statistic)


def auc(value: Float[Tensor, " item"], label: Bool[Tensor, " item"]) -> float:
    """Probability that a true item scores higher than a false one, ties counted half (Mann-Whitney)."""
    n = int(label.sum())
    ranks = torch.from_numpy(scipy.stats.rankdata(value.numpy()))
    return float((ranks[label].sum() - n * (n + 1) / 2) / (n * (len(label) - n)))


def head_auc(scores: NodeScores, truth: Iterable[str], *, absolute: bool = True) -> float:
    """ROC AUC of the head scores against a set of heads; 0.5 is chance, ties count half."""
    heads, truth = scores.heads(), set(truth)
    values = torch.tensor(list(heads.values()))
    return auc(values.abs() if absolute else values, torch.tensor([name in truth for name in heads]))
