"""circuit-tracer's files: a graph written by hand in the format of its own classes; laws of both ways."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
import torch

from circuits import drawing, tracer_files
from circuits.graph import Circuit, Graph, transformer
from workbench import plots
from workbench.errors import UserError

TOKENS = ["<bos>", "The", " capital of", " Texas/is"]


def node(id: str, kind: str, layer: str, position: int, **more: Any) -> dict[str, Any]:
    return {
        "node_id": id, "feature": 0, "layer": layer, "ctx_idx": position, "feature_type": kind, "token_prob": 0.0,
        "is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0, "jsNodeId": f"{id}-0", "clerp": "",
        "influence": 0.5, "activation": None, **more,
    }  # fmt: skip


def file() -> dict[str, Any]:
    """Nodes not in order of computation, as in the files there are; an error is called by its position, as before 0.5,
    and by -1, as since."""
    feature, error = "cross layer transcoder", "mlp reconstruction error"
    nodes = [
        node("3_77_3", feature, "3", 3, activation=2.5), node("0_12_1", feature, "0", 1), node("0_0_2", error, "0", 2),
        node("3_-1_3", error, "3", 3), node("E_651_1", "embedding", "E", 1), node("E_9_3", "embedding", "E", 3),
        node("27_22605_3", "logit", "27", 3, clerp='Output " Austin" (p=0.130)', token_prob=0.13),
        node("27_8_3", "logit", "27", 3, clerp="jumps"), node("3_77_1", feature, "3", 1),
    ]  # fmt: skip
    links = [
        {"source": "E_651_1", "target": "0_12_1", "weight": 5.65625},
        {"source": "0_12_1", "target": "3_77_3", "weight": -0.1},
        {"source": "0_0_2", "target": "3_77_3", "weight": 1e-9},
        {"source": "3_77_3", "target": "27_22605_3", "weight": 3.0},
        {"source": "3_-1_3", "target": "27_8_3", "weight": 2.0},
    ]
    supernodes = [["state", "0_12_1", "3_77_1"], ["state", "3_77_3"], ["gone", "9_9_9"]]
    metadata = {"slug": "texas", "scan": "gemma-2-2b", "transcoder_list": [], "prompt_tokens": TOKENS}
    metadata |= {"prompt": "".join(TOKENS), "node_threshold": 0.8, "schema_version": 1, "info": {"creator_name": "x"}}
    shown = {"pinnedIds": ["3_77_3"], "supernodes": supernodes, "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": shown, "nodes": nodes, "links": links, "later": [1]}


def test_a_file_that_is_read_and_written_is_the_same() -> None:
    assert json.loads(json.dumps(tracer_files.read(file()).content())) == file()


def test_nodes_are_called_by_hook_point_number_and_position_in_order_of_computation() -> None:
    circuit = tracer_files.read(file()).circuit
    assert circuit.graph.sources == (
        "hook_embed/The@1", "hook_embed/_Texas_is@3", "blocks.0.hook_mlp_out/12@1", "blocks.0.hook_mlp_out/error@2",
        "blocks.3.hook_mlp_out/77@1", "blocks.3.hook_mlp_out/77@3", "blocks.3.hook_mlp_out/error@3",
        "logits/_Austin_22605@3", "logits/8@3",
    )  # fmt: skip
    weights = dict(zip(circuit.edges, circuit.weights.tolist(), strict=True))  # type: ignore[union-attr]
    assert weights["hook_embed/The@1->blocks.0.hook_mlp_out/12@1"] == 5.65625
    assert weights["blocks.0.hook_mlp_out/12@1->blocks.3.hook_mlp_out/77@3"] == -0.1
    assert (circuit.model, circuit.method, len(circuit)) == ("gemma-2-2b", "circuit-tracer", 5)
    for s, d in circuit.graph.edges.tolist():
        assert s < d


def test_a_part_of_it_is_written_with_the_links_that_are_kept() -> None:
    found = tracer_files.read(file())
    kept = found.circuit.kept.clone()
    kept[1:] = False
    less = tracer_files.Traced(
        Circuit(found.circuit.graph, kept, "one", weights=found.circuit.weights), found.nodes, found.metadata
    )
    content = less.content()
    assert content["links"] == file()["links"][:1] and len(content["nodes"]) == len(file()["nodes"])


def test_supernodes_are_groups_and_what_is_gone_is_left_out() -> None:
    arranged = tracer_files.read(file()).arranged
    assert arranged.groups == {
        "state": ("blocks.0.hook_mlp_out/12@1", "blocks.3.hook_mlp_out/77@1"),
        "state'": ("blocks.3.hook_mlp_out/77@3",),
    }
    assert "state" in arranged.shown.graph.sources and len(arranged.shown) == 5


def test_it_is_drawn_with_tokens_below_and_logits_on_top() -> None:
    circuit = tracer_files.read(file()).circuit
    dots = next(trace for trace in plots.figure(circuit).data if trace.mode == "markers+text")
    height = dict(zip(dots.customdata, dots.y, strict=True))
    assert set(height) == set(circuit.nodes)
    assert height["hook_embed/The@1"] < height["blocks.0.hook_mlp_out/12@1"] < height["blocks.3.hook_mlp_out/77@3"]
    assert height["blocks.3.hook_mlp_out/77@3"] < height["logits/_Austin_22605@3"] == height["logits/8@3"]
    across = dict(zip(dots.customdata, dots.x, strict=True))
    columns = [[x for name, x in across.items() if name.endswith(f"@{position}")] for position in (1, 2, 3)]
    assert max(columns[0]) < min(columns[1]) and max(columns[1]) < min(columns[2])
    places = [(across[name], height[name]) for name in across]
    assert len(set(places)) == len(places)


def test_names_are_written_where_there_is_room_for_them() -> None:
    names = (*(f"blocks.0.hook_mlp_out/{i}000@0" for i in range(60)), "logits/1@0")
    edges = torch.tensor([[i, 60] for i in range(60)])
    circuit = Circuit(Graph(names, names, edges), torch.ones(60, dtype=torch.bool), "by hand")
    dots = next(trace for trace in plots.figure(circuit).data if trace.mode == "markers+text")
    said = [(x, len(text)) for x, y, text in zip(dots.x, dots.y, dots.text, strict=True) if y == min(dots.y) and text]
    assert 10 < len(said) < 60
    per_unit = drawing.INSIDE / (max(dots.x) - min(dots.x))
    for (x, n), (other, m) in itertools.pairwise(said):
        assert (other - x) * per_unit > 6 * (n + m) / 2
    few = plots.figure(Circuit(transformer(2, 3), torch.ones(len(transformer(2, 3)), dtype=torch.bool), "all"))
    dots = next(trace for trace in few.data if trace.mode == "markers+text")
    assert set(dots.text) == set(dots.customdata)


def broken(change: str) -> dict[str, Any]:
    content = copy.deepcopy(file())
    if change == "kind":
        content["nodes"][0]["feature_type"] = "lorsa"
    elif change == "name":
        content["nodes"][0]["node_id"] = "x"
    elif change == "twice":
        content["nodes"].append(content["nodes"][1])
    elif change == "end":
        content["links"][0]["target"] = "5_5_5"
    elif change == "weight":
        content["links"][0]["weight"] = "much"
    else:
        del content[change]
    return content


@pytest.mark.parametrize(
    "change, message",
    [
        ("kind", "of kind 'lorsa' is none that is read"), ("name", "layer_feature_position"),
        ("twice", "two nodes '0_12_1'"), ("end", "leads to '5_5_5', which is none of its 9"),
        ("weight", "no graph as circuit-tracer writes it"), ("links", "no graph as circuit-tracer writes it"),
        ("metadata", "no graph as circuit-tracer writes it"),
    ],
)  # fmt: skip
def test_what_is_no_such_file_is_a_sentence(change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tracer_files.read(broken(change))


def test_a_circuit_of_ours_has_its_nodes_and_the_sums_of_its_edges() -> None:
    graph = transformer(3, 4)
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(len(graph), generator=generator) < 0.2
    weights = torch.randn(len(graph), generator=generator)
    circuit = Circuit(graph, kept, "by lot", "tiny", "ioi", "none", weights)
    made = tracer_files.of(circuit, TOKENS, "mine")
    again = tracer_files.read(json.loads(json.dumps(made.content()))).circuit
    assert set(again.nodes) == set(circuit.nodes) and again.model == "tiny"
    expected: dict[str, float] = {}
    for name, is_kept, weight in zip(graph.names, kept.tolist(), weights.tolist(), strict=True):
        if is_kept:
            ends = name.split("<")[0]
            expected[ends] = expected.get(ends, 0.0) + weight
    assert again.weights is not None
    assert dict(zip(again.edges, again.weights.tolist(), strict=True)) == pytest.approx(expected, rel=1e-6)
    rows = {row["clerp"]: row for row in made.content()["nodes"]}
    assert rows["a2.h1"]["layer"] == "2" and rows["input"]["layer"] == "E" and rows["logits"]["layer"] == "4"
    assert {row["ctx_idx"] for row in rows.values()} == {3} and len({row["node_id"] for row in rows.values()}) == len(
        rows
    )


def test_latents_and_what_a_basis_misses_have_the_viewers_kinds() -> None:
    hook = "blocks.5.hook_resid_post"
    names = (f"{hook}/7", f"{hook}/error", "logits")
    circuit = Circuit(Graph(names, names, torch.tensor([[0, 2], [1, 2]])), torch.tensor([True, True]), "by hand")
    rows = {row["clerp"]: row for row in tracer_files.of(circuit, TOKENS, "mine").content()["nodes"]}
    assert rows[names[0]]["feature_type"] == tracer_files.FEATURE and rows[names[0]]["layer"] == "5"
    assert rows[names[1]]["feature_type"] == tracer_files.ERROR
    with pytest.raises(UserError, match="no tokens"):
        tracer_files.of(circuit, [], "mine")
    with pytest.raises(UserError, match="has positions"):
        tracer_files.of(tracer_files.read(file()).circuit, TOKENS, "mine")
