"""Attribution graphs in the files of circuit-tracer, which Neuronpedia and Anthropic's viewer read too.

Ameisen et al. 2025, "Circuit tracing": on one prompt, nodes are features of transcoders, what these miss, tokens and
logits, each at a position, and a link is the direct linear effect of one on another, attention patterns and norms held.

    {"metadata": {...}, "qParams": {...}, "nodes": [{"node_id": "20_15589_10", ...}], "links": [{"source": ...}]}

Here a node is called by its hook point, number and position, `blocks.20.hook_mlp_out/15589@10`, the rest of its row is
kept, and a file that is read and written is the same again. Of a circuit of our own, which has no positions, every node
is put at the last one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from circuits.arranging import Arranged
from circuits.graph import INPUT, LOGITS, Circuit, Graph, node_of
from workbench.errors import UserError
from workbench.sites import depth

FEATURE, ERROR = "cross layer transcoder", "mlp reconstruction error"  # whatever kind of transcoder it is
TOKEN, LOGIT = "embedding", "logit"
OURS = "workbench_node"  # a field of a row that `of` made: what the node is called here, which viewers pass over
_FEATURE = re.compile(r"(\d+)_(\d+)_(\d+)")


@dataclass(frozen=True)
class Traced:
    """A graph on one prompt.

    circuit   all links that are kept, with their weights
    nodes     by the circuit's name of a node, its row in the file
    metadata  of the file: `slug`, `scan` (which model and transcoders), `prompt`, `prompt_tokens`, ...
    shown     of the file, how it is looked at (`qParams`): `pinnedIds`, `supernodes`, ...
    more      other fields of the file
    """

    circuit: Circuit
    nodes: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, Any]
    shown: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arranged(self) -> Arranged:
        """With the file's supernodes as groups; members that are not in the graph are left out."""
        name = {str(row["node_id"]): ours for ours, row in self.nodes.items()}
        groups: dict[str, tuple[str, ...]] = {}
        for label, *members in self.shown.get("supernodes") or []:
            some = tuple(name[one] for one in members if one in name)
            while label in groups or label in self.nodes:
                label = f"{label}'"
            groups |= {label: some} if some else {}
        return Arranged(self.circuit, groups)

    def content(self) -> dict[str, Any]:
        """What `read` reads. Nodes without a link stay, as circuit-tracer keeps tokens and logits."""
        circuit, graph = self.circuit, self.circuit.graph
        weights = torch.ones(len(graph)) if circuit.weights is None else circuit.weights
        ids = {name: row["node_id"] for name, row in self.nodes.items()}
        links = [
            {"source": ids[graph.sources[s]], "target": ids[graph.destinations[d]], "weight": weight}
            for (s, d), weight, kept in zip(
                graph.edges.tolist(), weights.tolist(), circuit.kept.tolist(), strict=True
            )
            if kept
        ]  # fmt: skip
        rows = [dict(row) for row in self.nodes.values()]
        return {
            "metadata": dict(self.metadata),
            "qParams": dict(self.shown),
            "nodes": rows,
            "links": links,
            **self.more,
        }


# ---- theirs ----


def read(content: Mapping[str, Any]) -> Traced:
    """A graph of circuit-tracer's file. Raises UserError for what is no such file, and links to nodes it has not."""
    try:
        metadata, rows, links = dict(content["metadata"]), list(content["nodes"]), list(content["links"])
        names: dict[str, str] = {}
        nodes: dict[str, Mapping[str, Any]] = {}
        for row in rows:
            name = _name(row, metadata)
            if name in nodes or row["node_id"] in names:
                raise UserError(f"the file has two nodes {row['node_id']!r}; each must be there once.")
            nodes[name], names[str(row["node_id"])] = row, name
        for end in (str(link[side]) for link in links for side in ("source", "target")):
            if end not in names:
                raise UserError(f"a link of the file leads to {end!r}, which is none of its {len(nodes)} nodes.")
        # Ours are written in order of computation.
        order = {
            name: i for i, name in enumerate(nodes if any(OURS in row for row in rows) else sorted(nodes, key=_order))
        }
        ends = [(order[names[str(link["source"])]], order[names[str(link["target"])]]) for link in links]
        weights = torch.tensor([float(link["weight"]) for link in links], dtype=torch.float64)
        slug, scan = str(metadata.get("slug", "")), str(metadata.get("scan", ""))
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"this is no graph as circuit-tracer writes it ({error!r}).") from error
    graph = Graph(tuple(order), tuple(order), torch.tensor(ends, dtype=torch.long).reshape(-1, 2))
    circuit = Circuit(
        graph, torch.ones(len(ends), dtype=torch.bool),
        "direct effect of one node on another on one prompt, patterns and norms held, as read from a file of "
        f"circuit-tracer, {slug}", scan, str(metadata.get("prompt", "")), "circuit-tracer", weights,
    )  # fmt: skip
    more = {key: value for key, value in content.items() if key not in ("metadata", "qParams", "nodes", "links")}
    return Traced(circuit, nodes, metadata, dict(content.get("qParams") or {}), more)


def _name(row: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    kind, position = row["feature_type"], int(row["ctx_idx"])
    if OURS in row:
        return str(row[OURS])
    if kind == TOKEN:
        tokens = metadata.get("prompt_tokens") or []
        return f"hook_embed/{_plain(tokens[position] if position < len(tokens) else str(row['node_id']))}@{position}"
    if kind == LOGIT:
        said = re.search(r'"(.*)"', str(row.get("clerp", "")))
        token = str(row["node_id"]).split("_")[1]
        return f"{LOGITS}/{_plain(said[1]) + '_' if said else ''}{token}@{position}"
    if kind == ERROR:
        return f"blocks.{int(row['layer'])}.hook_mlp_out/error@{position}"
    found = _FEATURE.fullmatch(str(row["node_id"]))
    if kind != FEATURE or found is None:
        raise UserError(
            f"node {row['node_id']!r} of kind {kind!r} is none that is read: those are {FEATURE} (named "
            f"layer_feature_position), {ERROR}, {TOKEN} and {LOGIT}."
        )
    return f"blocks.{found[1]}.hook_mlp_out/{found[2]}@{found[3]}"


def _plain(token: str) -> str:
    """Without what has a meaning in the name of a node or of a group."""
    return re.sub(r"[\s/<>@;:,]", "_", token)


def _order(name: str) -> tuple[tuple[int, int], int]:
    """Layer by layer, and position by position."""
    hook, _, rest = name.partition("/")
    return (10**9, 0) if hook == LOGITS else depth(hook), int(rest.rsplit("@", 1)[1])


# ---- ours ----


def of(circuit: Circuit, tokens: Sequence[str], slug: str) -> Traced:
    """A circuit of heads and MLPs, or of latents, as circuit-tracer's viewer can draw it: `clerp` says what a node is.
    A link is the sum of the edges into a head's queries, keys and values.

    tokens  of a prompt, which the viewer draws below

    Raises UserError where there are none, and for a circuit that was read from such a file.
    """
    if not tokens:
        raise UserError("there are no tokens; give those of a prompt, which the viewer draws below.")
    if any("@" in name for name in circuit.nodes):
        raise UserError("this graph has positions: it was read from such a file; write it with Traced.content.")
    graph, last = circuit.graph, len(tokens) - 1
    names = [name for name in (INPUT, *graph.nodes, LOGITS) if name in {*circuit.nodes, INPUT, LOGITS}]
    layers = 1 + max([_layer(name) for name in circuit.nodes], default=0)
    rows = {name: _row(name, i, last, layers) for i, name in enumerate(names)}
    weights = torch.ones(len(graph)) if circuit.weights is None else circuit.weights.double()
    total: dict[tuple[int, int], float] = {}
    at = {name: i for i, name in enumerate(names)}
    for i in circuit.kept.nonzero()[:, 0].tolist():
        s, d = graph.edges[i].tolist()
        ends = at[graph.sources[s]], at[node_of(graph.destinations[d])]
        total[ends] = total.get(ends, 0.0) + float(weights[i])
    merged = Graph(tuple(names), tuple(names), torch.tensor(list(total), dtype=torch.long).reshape(-1, 2))
    whole = replace(
        circuit, graph=merged, kept=torch.ones(len(total), dtype=torch.bool),
        weights=torch.tensor(list(total.values()), dtype=torch.float64),
    )  # fmt: skip
    metadata = {
        "slug": slug, "scan": circuit.model, "transcoder_list": [], "prompt_tokens": list(tokens),
        "prompt": "".join(tokens), "schema_version": 1, "definition": circuit.definition,
    }  # fmt: skip
    shown = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return Traced(whole, rows, metadata, shown)


def _layer(name: str) -> int:
    hook, slash, _ = name.rpartition("/")
    found = re.search(r"\d+", hook if slash else name)
    return int(found[0]) if found else 0


def _row(name: str, number: int, last: int, layers: int) -> dict[str, Any]:
    layer, kind = str(_layer(name)), ERROR if name.endswith("/error") else FEATURE
    if name in (INPUT, LOGITS):
        layer, kind = ("E", TOKEN) if name == INPUT else (str(layers + 1), LOGIT)
    id = f"{layer}_{number}_{last}"
    return {
        "node_id": id, "feature": number, "layer": layer, "ctx_idx": last, "feature_type": kind, "token_prob": 0.0,
        "is_target_logit": name == LOGITS, "run_idx": 0, "reverse_ctx_idx": 0, "jsNodeId": f"{id}-0", "clerp": name,
        "influence": None, "activation": None, OURS: name,
    }  # fmt: skip
