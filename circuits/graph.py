"""The computational graph of a model: what writes, what reads, and the scores and circuits of its edges.

Every node writes a vector into the residual stream and reads sums of what earlier nodes wrote, so a model is a graph.
Names are EAP-IG's (Hanna et al. 2024): the sources are `input` (the embeddings), `a5.h1` (head 1 of layer 5) and `m3`
(the MLP of layer 3); the destinations are `a5.h1<q>`, `a5.h1<k>`, `a5.h1<v>` (what a head's queries, keys and values
read), `m3` and `logits`. An edge is `a3.h0->a5.h1<q>`. Where query heads share keys and values, each has its own `<k>`
and `<v>`, as if they were copies.

Graphs of other parts (channels of a weight-sparse model, SAE latents) are the same class with other names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from workbench import jupyter, tables
from workbench.backend import ModelConfig
from workbench.errors import UserError, unknown
from workbench.scores import NodeScores, PairScores, head, mlp

INPUT, LOGITS = "input", "logits"
PORTS = ("q", "k", "v")
Aggregate = Literal["max", "sum"]
_PORT = re.compile(r"(.+)<[qkv]>")


def node_of(destination: str) -> str:
    """The node that reads at a destination: `a5.h1` for `a5.h1<q>`."""
    match = _PORT.fullmatch(destination)
    return match[1] if match else destination


@dataclass(frozen=True)
class Graph:
    """Sources, destinations, and the edges between them as pairs of indices, all in order of computation."""

    sources: tuple[str, ...]
    destinations: tuple[str, ...]
    edges: Int[Tensor, "edge 2"]

    @classmethod
    def of(cls, config: ModelConfig) -> Graph:
        """Every head and MLP of a transformer, with the queries, keys and values of a head apart."""
        return transformer(config.n_layers, config.n_heads, config.parallel_attn_mlp)

    def __len__(self) -> int:
        return len(self.edges)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """`source->destination` of every edge."""
        return tuple(f"{self.sources[s]}->{self.destinations[d]}" for s, d in self.edges.tolist())

    @cached_property
    def index(self) -> dict[str, int]:
        """Position of an edge by its name."""
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """All nodes but `input` and `logits`: what a circuit may leave out."""
        ends = dict.fromkeys([*self.sources, *map(node_of, self.destinations)])
        return tuple(name for name in ends if name not in (INPUT, LOGITS))

    def dense(self, values: Tensor) -> Tensor:
        """[source, destination] from one value per edge; zero where there is no edge."""
        out = values.new_zeros(len(self.sources), len(self.destinations))
        out[tuple(self.edges.T)] = values
        return out

    def flat(self, dense: Tensor) -> Tensor:
        """One value per edge, from [..., source, destination]."""
        return dense[..., self.edges[:, 0], self.edges[:, 1]]

    def between(self, nodes: Iterable[str]) -> Bool[Tensor, " edge"]:
        """The edges among some nodes, `input` and `logits`: what is left of the graph when all others are cut out.

        Raises UserError for a node that is not in the graph.
        """
        kept = {*nodes, INPUT, LOGITS}
        for name in kept - set(self.nodes) - {INPUT, LOGITS}:
            raise unknown("node of this graph", name, self.nodes)
        source = torch.tensor([name in kept for name in self.sources])
        destination = torch.tensor([node_of(name) in kept for name in self.destinations])
        return source[self.edges[:, 0]] & destination[self.edges[:, 1]]

    def same_as(self, other: Graph) -> bool:
        return (
            self.sources == other.sources
            and self.destinations == other.destinations
            and torch.equal(self.edges, other.edges)
        )


def nodes_of(n_layers: int, n_heads: int) -> tuple[str, ...]:
    """The heads and the MLP of every layer, in order of computation: the nodes of a transformer's graph."""
    layers = [[*(head(layer, h) for h in range(n_heads)), mlp(layer)] for layer in range(n_layers)]
    return tuple(name for layer in layers for name in layer)


def transformer(n_layers: int, n_heads: int, parallel_attn_mlp: bool = False) -> Graph:
    """The graph of a transformer; in a parallel block the MLP does not read the heads beside it."""
    sources: list[str] = [INPUT]
    destinations: list[str] = []
    edges: list[tuple[int, int]] = []

    def read(names: list[str]) -> None:
        edges.extend((s, len(destinations) + i) for i in range(len(names)) for s in range(len(sources)))
        destinations.extend(names)

    for layer in range(n_layers):
        heads = [head(layer, h) for h in range(n_heads)]
        read([f"{name}<{port}>" for port in PORTS for name in heads])
        if parallel_attn_mlp:
            read([mlp(layer)])
        sources += heads
        if not parallel_attn_mlp:
            read([mlp(layer)])
        sources.append(mlp(layer))
    read([LOGITS])
    return Graph(tuple(sources), tuple(destinations), torch.tensor(edges))


@dataclass(frozen=True)
class EdgeScores:
    """One score per edge of a graph; the fields are those of NodeScores."""

    graph: Graph
    scores: Float[Tensor, " edge"]
    definition: str
    unit: str
    per_prompt: Float[Tensor, "batch edge"] | None = None
    headline: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        return {
            "top_edges": [[name, round(score, 5)] for name, score in self.top(10)],
            "n_edges": len(self.graph),
            "unit": self.unit,
            "definition": self.definition,
            **self.headline,
        }

    def top(self, k: int) -> list[tuple[str, float]]:
        """The k edges of largest absolute score."""
        best = self.scores.abs().topk(min(k, len(self.scores))).indices.tolist()
        return [(self.graph.names[i], float(self.scores[i])) for i in best]

    def nodes(self, aggregate: Aggregate = "max") -> NodeScores:
        """Scores of nodes: the largest absolute score of a node's edges, in and out, or the sum of those going out.

        Under attribution the edges out of a node sum to the attribution of the node.
        """
        sources = [self.graph.sources[i] for i in self.graph.edges[:, 0].tolist()]
        destinations = [node_of(self.graph.destinations[i]) for i in self.graph.edges[:, 1].tolist()]
        position = {name: i for i, name in enumerate(self.graph.nodes)}
        out = torch.zeros(len(position) + 1, dtype=torch.float64)  # the last place takes input and logits
        source = torch.tensor([position.get(name, len(position)) for name in sources])
        if aggregate == "sum":
            out.index_add_(0, source, self.scores.double())
        else:
            destination = torch.tensor([position.get(name, len(position)) for name in destinations])
            for ends in (source, destination):
                out.scatter_reduce_(0, ends, self.scores.abs().double(), "amax")
        how = {"max": "largest absolute score of its edges", "sum": "sum of the scores of the edges out of it"}
        return NodeScores(
            self.graph.nodes,
            out[:-1].to(self.scores.dtype),
            f"{how[aggregate]}; of an edge: {self.definition}",
            self.unit,
            headline=dict(self.headline),
        )

    def head_pairs(self) -> PairScores:
        """The largest absolute score of the edges from one head to another, over its queries, keys and values."""
        heads = [name for name in self.graph.nodes if "." in name]
        at = {name: i for i, name in enumerate(heads)}
        table = torch.zeros(len(heads), len(heads), dtype=self.scores.dtype)
        for (s, d), score in zip(self.graph.edges.tolist(), self.scores.abs().tolist(), strict=True):
            sender, receiver = at.get(self.graph.sources[s]), at.get(node_of(self.graph.destinations[d]))
            if sender is not None and receiver is not None:
                table[sender, receiver] = max(table[sender, receiver], score)
        how = "largest absolute score over queries, keys and values; of an edge: "
        return PairScores.of(heads, table, how + self.definition, self.unit)


@dataclass(frozen=True)
class Circuit:
    """A graph of which some edges are kept.

    definition  how the edges were chosen
    weights     what the edges are drawn by: scores, or weights; None where they are all alike
    model, task, method   what it is a circuit of, and who says so
    """

    graph: Graph
    kept: Bool[Tensor, " edge"]
    definition: str
    model: str = ""
    task: str = ""
    method: str = ""
    weights: Float[Tensor, " edge"] | None = None
    headline: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.kept.sum())

    @property
    def edges(self) -> list[str]:
        return [self.graph.names[i] for i in self.kept.nonzero()[:, 0].tolist()]

    @property
    def nodes(self) -> list[str]:
        """Nodes with an edge that is kept, without `input` and `logits`."""
        ends = self.graph.edges[self.kept].tolist()
        found = {self.graph.sources[s] for s, _ in ends} | {node_of(self.graph.destinations[d]) for _, d in ends}
        return [name for name in self.graph.nodes if name in found]

    def summary(self) -> dict[str, Any]:
        return {
            "n_edges": len(self),
            "of_edges": len(self.graph),
            "n_nodes": len(self.nodes),
            "of_nodes": len(self.graph.nodes),
            "definition": self.definition,
            **self.headline,
        }

    def pruned(self) -> Circuit:
        """Without the edges that lie on no path from `input` to `logits`: what they carry reaches nothing, or is
        nothing that the prompt decides."""
        graph, kept = self.graph, self.kept
        number = {name: i for i, name in enumerate([INPUT, LOGITS, *graph.nodes])}
        writer = torch.tensor([number[name] for name in graph.sources])[graph.edges[:, 0]]
        reader = torch.tensor([number[node_of(name)] for name in graph.destinations])[graph.edges[:, 1]]
        while True:
            reads, writes = torch.zeros(2, len(number), dtype=torch.bool)
            reads[reader[kept]] = writes[writer[kept]] = reads[0] = writes[1] = True
            left = kept & reads[writer] & writes[reader]
            if torch.equal(left, kept):
                return replace(self, kept=kept)
            kept = left

    def _ipython_display_(self) -> None:
        """Draws itself where a cell of a notebook ends with it."""
        told = {name: value for name, value in self.summary().items() if isinstance(value, str | int | float)}
        title = " · ".join(filter(None, ["circuit", self.model, self.task, self.method]))
        jupyter.show(title, tables.flat({n: value for n, value in told.items() if n != "definition"}), lambda: self)

    # ---- files ----

    def save(self, folder: Path) -> None:
        """`circuit.json` and `circuit.safetensors` in a folder; an existing one is replaced file by file."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {"kept": self.kept, "edges": self.graph.edges}
        if self.weights is not None:
            arrays["weights"] = self.weights.contiguous()
        words = {name: getattr(self, name) for name in ("definition", "model", "task", "method", "headline")}
        names = {"sources": self.graph.sources, "destinations": self.graph.destinations}
        save_file(arrays, folder / "circuit.tmp")
        (folder / "circuit.tmp").rename(folder / "circuit.safetensors")
        (folder / "circuit.json.tmp").write_text(json.dumps(words | names, indent=1))
        (folder / "circuit.json.tmp").rename(folder / "circuit.json")

    @classmethod
    def load(cls, folder: Path) -> Circuit:
        """The inverse of `save`. Raises UserError if the folder holds no circuit."""
        try:
            words = json.loads((folder / "circuit.json").read_text())
            arrays = load_file(folder / "circuit.safetensors")
            graph = Graph(tuple(words.pop("sources")), tuple(words.pop("destinations")), arrays["edges"])
            return cls(graph, arrays["kept"], weights=arrays.get("weights"), **words)
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{folder} holds no circuit that can be read ({error}).") from error


def top_edges(scores: EdgeScores, k: int, *, absolute: bool = True) -> Circuit:
    """The k edges of largest score."""
    ranked = scores.scores.abs() if absolute else scores.scores
    kept = torch.zeros(len(ranked), dtype=torch.bool)
    kept[ranked.topk(min(k, len(ranked))).indices] = True
    how = "absolute score" if absolute else "score"
    return Circuit(scores.graph, kept, f"{k} edges of largest {how}; {scores.definition}", weights=scores.scores)


# ---- EAP-IG's files ----


def from_eap(content: Mapping[str, Any]) -> tuple[EdgeScores, Circuit]:
    """Scores and circuit of a graph as EAP-IG writes it: {"cfg": ..., "nodes": ..., "edges": {name: {"score": ...}}}.

    EAP-IG's sign is the opposite of ours: its score is the change of the metric when the edge is corrupted (or of a
    loss, its negative). It is kept as it stands in the file.

    Raises UserError if edges are missing or unknown.
    """
    try:
        cfg, listed = content["cfg"], content["edges"]
        graph = transformer(cfg["n_layers"], cfg["n_heads"], cfg.get("parallel_attn_mlp", False))
        if set(graph.names) != listed.keys():
            odd = sorted(set(graph.names) ^ listed.keys())
            raise UserError(f"the file has not the edges of a {cfg['n_layers']}-layer transformer: {odd[0]!r} ...")
        score = torch.tensor([float(listed[name]["score"]) for name in graph.names])
        kept = torch.tensor([bool(listed[name]["in_graph"]) for name in graph.names])
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"this is not a graph as EAP-IG writes it ({error!r}).") from error
    definition = "as read from a graph of EAP-IG, whose file does not say how it was computed"
    return EdgeScores(graph, score, definition, "unknown"), Circuit(graph, kept, definition, weights=score)


def to_eap(circuit: Circuit, d_model: int) -> dict[str, Any]:
    """The content of a file that EAP-IG reads; scores are the circuit's weights.

    Raises UserError if the graph is not that of a transformer with heads and MLPs.
    """
    layers = sum(1 for name in circuit.graph.sources if re.fullmatch(r"m\d+", name))
    heads = sum(1 for name in circuit.graph.sources if re.fullmatch(r"a0\.h\d+", name))
    for parallel in (False, True):
        graph = transformer(layers, heads, parallel)
        if graph.same_as(circuit.graph):
            break
    else:
        raise UserError("only a graph of heads and MLPs can be written for EAP-IG; this one has other nodes.")
    weights = torch.zeros(len(graph)) if circuit.weights is None else circuit.weights
    inside = {INPUT, LOGITS, *circuit.nodes}
    return {
        "cfg": {"n_layers": layers, "n_heads": heads, "parallel_attn_mlp": parallel, "d_model": d_model},
        "nodes": {name: {"in_graph": name in inside} for name in (INPUT, *graph.nodes, LOGITS)},
        "edges": {
            name: {"score": score, "in_graph": kept}
            for name, score, kept in zip(graph.names, weights.tolist(), circuit.kept.tolist(), strict=True)
        },
    }
