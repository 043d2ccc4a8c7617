"""A circuit as one wants to look at it: some nodes taken as one, some hidden, or only some shown.

What is arranged is the picture. The circuit, and every number about it, stays what it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from circuits.graph import INPUT, LOGITS, Circuit, Graph, node_of
from workbench.errors import UserError, unknown

LONGEST = 40  # signs of a group's name


@dataclass(frozen=True)
class Arranged:
    """
    groups  nodes that are drawn as one, by the name it gets; an edge of it is the sum of theirs, and those inside it
            are not drawn
    hidden  nodes that are not drawn, nor any edge of theirs
    only    if there are any, edges between these (and input and logits) alone
    """

    circuit: Circuit
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    hidden: Sequence[str] = ()
    only: Sequence[str] = ()

    @property
    def shown(self) -> Circuit:
        """What is drawn. Raises UserError for a node that the graph does not have."""
        graph = self.circuit.graph
        for name in set(self.hidden) - set(graph.nodes):
            raise unknown("node of this graph", name, graph.nodes)
        some = (set(self.only) or set(graph.nodes)) - set(self.hidden)
        kept = self.circuit.kept & graph.between(some)
        left = replace(self.circuit, kept=kept)
        return contract(left, self.groups) if self.groups else left

    @property
    def definition(self) -> str:
        words = [f"{', '.join(self.hidden)} not drawn"] if self.hidden else []
        words += [f"only edges between {', '.join(self.only)}"] if self.only else []
        words += ["edges of a group are sums"] if self.groups else []
        return "; ".join([*words, self.circuit.definition])


def contract(circuit: Circuit, groups: Mapping[str, Sequence[str]]) -> Circuit:
    """The circuit with each group as one node, where its first member was. Weights of edges that become one add up;
    without weights they stay alike."""
    graph = circuit.graph
    into = {member: name for name, members in groups.items() for member in members}
    sources = list(dict.fromkeys(into.get(name, name) for name in graph.sources))
    destinations = list(dict.fromkeys(into.get(node_of(name), name) for name in graph.destinations))
    source = torch.tensor([sources.index(into.get(name, name)) for name in graph.sources])
    destination = torch.tensor([destinations.index(into.get(node_of(name), name)) for name in graph.destinations])
    ends = torch.stack([source[graph.edges[:, 0]], destination[graph.edges[:, 1]]], 1)
    outside = torch.tensor([sources[s] != destinations[d] for s, d in ends.tolist()])
    kept = circuit.kept & outside
    edges, where = ends[kept].unique(dim=0, return_inverse=True)
    weights = None
    if circuit.weights is not None:
        weights = torch.zeros(len(edges)).index_add_(0, where, circuit.weights[kept].float())
    return replace(
        circuit, graph=Graph(tuple(sources), tuple(destinations), edges.reshape(-1, 2)),
        kept=torch.ones(len(edges), dtype=torch.bool), weights=weights,
    )  # fmt: skip


def read_groups(text: str, nodes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Groups from `movers: a9.h6 a9.h9; induction: a5.h5 a6.h9`.

    Raises UserError for a node that there is not, one in two groups, and a name that is missing, taken or too long.
    """
    found: dict[str, tuple[str, ...]] = {}
    seen: dict[str, str] = {}
    for part in (part for part in text.split(";") if part.strip()):
        name, colon, members = part.partition(":")
        name, some = name.strip(), tuple(dict.fromkeys(members.replace(",", " ").split()))
        if not colon or not name or not some:
            raise UserError(f"{part.strip()!r} is no group; write a name, a colon and its nodes: movers: a9.h6 a9.h9.")
        if name in found or name in nodes or name in (INPUT, LOGITS) or len(name) > LONGEST or "<" in name:
            raise UserError(f"a group cannot be called {name[:LONGEST]!r}; take another, short name without <.")
        for node in some:
            if node not in nodes:
                raise unknown("node of the circuit", node, nodes)
            if node in seen:
                raise UserError(f"{node} is in the groups {seen[node]} and {name}; leave it in one.")
            seen[node] = name
        found[name] = some
    return found


def group_text(groups: Mapping[str, Sequence[str]]) -> str:
    """What `read_groups` reads back."""
    return "; ".join(f"{name}: {' '.join(members)}" for name, members in groups.items())
