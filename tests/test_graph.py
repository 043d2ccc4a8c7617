"""Graphs, circuits and their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from circuits.graph import Circuit, EdgeScores, Graph, from_eap, to_eap, top_edges, transformer
from workbench import results
from workbench.errors import UserError

FIXTURE = Path(__file__).parents[2] / "shared" / "data" / "ioi-eap-ig.json"


def scored(graph: Graph, seed: int = 0) -> EdgeScores:
    values = torch.randn(len(graph), generator=torch.Generator().manual_seed(seed))
    return EdgeScores(graph, values, "random", "none")


def circuit(graph: Graph, *edges: str) -> Circuit:
    kept = torch.zeros(len(graph), dtype=torch.bool)
    kept[[graph.index[name] for name in edges]] = True
    return Circuit(graph, kept, "by hand", weights=kept.float())


def test_pairs_of_heads_take_the_best_port() -> None:
    graph = transformer(2, 2)
    values = torch.zeros(len(graph))
    for name, value in {
        "a0.h1->a1.h0<k>": -3.0,
        "a0.h1->a1.h0<v>": 2.0,
        "a0.h0->m1": 9.0,
        "input->a1.h0<q>": 9,
    }.items():
        values[graph.index[name]] = value
    found = EdgeScores(graph, values, "by hand", "none").head_pairs()
    pairs = dict(zip(found.pairs, found.scores.tolist(), strict=True))
    assert pairs == {"a0.h0->a1.h0": 0, "a0.h0->a1.h1": 0, "a0.h1->a1.h0": 3, "a0.h1->a1.h1": 0}


def test_the_graph_of_gpt2_small_is_that_of_eap_ig() -> None:
    """158 nodes and 32,491 edges, as in its published file."""
    graph = transformer(12, 12)
    assert len(graph.nodes) + 2 == 158 and len(graph) == 32491
    assert graph.index["a9.h6->a10.h0<q>"] >= 0 and "a9.h6->a9.h7<q>" not in graph.index


def test_a_graph_by_hand() -> None:
    """One layer, two heads: input feeds everything, heads feed the MLP and the logits."""
    graph = transformer(1, 2)
    ports = [f"input->a0.h{h}<{port}>" for port in "qkv" for h in range(2)]
    assert set(graph.names) == {
        *ports, "input->m0", "a0.h0->m0", "a0.h1->m0",
        "input->logits", "a0.h0->logits", "a0.h1->logits", "m0->logits",
    }  # fmt: skip
    parallel = transformer(1, 2, parallel_attn_mlp=True)
    assert set(graph.names) - set(parallel.names) == {"a0.h0->m0", "a0.h1->m0"}


@pytest.mark.parametrize("parallel", [False, True])
def test_edges_go_forward_only_and_come_in_order_of_computation(parallel: bool) -> None:
    graph = transformer(3, 2, parallel)
    order = graph.edges[:, 1]
    assert torch.equal(order, order.sort(stable=True).values)
    for source, destination in (name.split("->") for name in graph.names):
        if source != "input" and destination != "logits":
            assert (source[1], source[0] == "m") < (destination[1], destination[0] == "m"), (source, destination)


def test_dense_and_flat_are_inverse() -> None:
    graph = transformer(2, 3)
    values = scored(graph).scores
    assert torch.equal(graph.flat(graph.dense(values)), values)
    assert int(graph.dense(torch.ones(len(graph))).sum()) == len(graph)


def test_edges_between_nodes() -> None:
    graph = transformer(2, 2)
    kept = graph.between(["a0.h1", "m1"])
    names = {graph.names[i] for i in kept.nonzero()[:, 0].tolist()}
    assert names == {
        "input->a0.h1<q>", "input->a0.h1<k>", "input->a0.h1<v>", "input->m1", "a0.h1->m1",
        "input->logits", "a0.h1->logits", "m1->logits",
    }  # fmt: skip
    with pytest.raises(UserError, match=r"'a2\.h1'"):
        graph.between(["a2.h1"])


def test_node_scores_by_hand() -> None:
    graph = transformer(1, 2)
    values = torch.zeros(len(graph))
    for name, value in {"input->a0.h1<k>": -3.0, "a0.h1->logits": 2.0, "a0.h1->m0": -0.5, "m0->logits": 1.0}.items():
        values[graph.index[name]] = value
    found = EdgeScores(graph, values, "by hand", "none")
    largest = dict(zip(found.nodes("max").nodes, found.nodes("max").scores.tolist(), strict=True))
    assert largest == {"a0.h0": 0.0, "a0.h1": 3.0, "m0": 1.0}
    out = dict(zip(found.nodes("sum").nodes, found.nodes("sum").scores.tolist(), strict=True))
    assert out == {"a0.h0": 0.0, "a0.h1": 1.5, "m0": 1.0}
    assert found.top(2) == [("input->a0.h1<k>", -3.0), ("a0.h1->logits", 2.0)]


def test_pruning_leaves_what_lies_on_a_path() -> None:
    graph = transformer(3, 1)
    on_path = ["input->a0.h0<v>", "a0.h0->a1.h0<q>", "a1.h0->logits"]
    dangling = ["input->m0", "m0->a2.h0<k>", "m1->logits", "a1.h0->m2"]  # lead nowhere, or come from nowhere
    found = circuit(graph, *on_path, *dangling).pruned()
    assert found.edges == sorted(on_path, key=lambda name: graph.index[name])
    assert found.nodes == ["a0.h0", "a1.h0"]
    assert len(circuit(graph, *dangling).pruned()) == 0


def test_top_edges_by_absolute_and_signed_score() -> None:
    graph = transformer(1, 1)
    scores = EdgeScores(graph, torch.arange(len(graph)).float() - 4, "ramp", "none")
    assert top_edges(scores, 1).edges == [graph.names[0]]
    assert top_edges(scores, 1, absolute=False).edges == [graph.names[-1]]
    assert len(top_edges(scores, 0)) == 0 and len(top_edges(scores, 99)) == len(graph)


def test_circuits_come_back_from_files(tmp_path: Path) -> None:
    graph = transformer(2, 2)
    before = top_edges(scored(graph), 7)
    before.save(tmp_path / "c")
    after = Circuit.load(tmp_path / "c")
    assert after.graph.same_as(graph) and torch.equal(after.kept, before.kept) and after.edges == before.edges
    assert torch.equal(after.weights, before.weights) and after.definition == before.definition  # type: ignore[arg-type]
    with pytest.raises(UserError, match="holds no circuit"):
        Circuit.load(tmp_path)


def test_results_of_graphs_go_through_the_store_of_runs() -> None:
    before = top_edges(scored(transformer(2, 2)), 7)
    content, arrays = results.encode(before)
    after = results.decode(Circuit, json.loads(json.dumps(content)), arrays)
    assert after.edges == before.edges and after.graph.same_as(before.graph)


@pytest.mark.parametrize("parallel", [False, True])
def test_files_of_eap_ig_round_trip(parallel: bool) -> None:
    before = top_edges(scored(transformer(2, 3, parallel)), 9)
    content = json.loads(json.dumps(to_eap(before, d_model=32)))
    scores, after = from_eap(content)
    assert after.edges == before.edges and after.graph.same_as(before.graph)
    torch.testing.assert_close(scores.scores, before.weights)
    assert content["cfg"]["d_model"] == 32 and content["nodes"]["logits"] == {"in_graph": True}
    del content["edges"]["input->m0"]
    with pytest.raises(UserError, match="has not the edges of a 2-layer transformer: 'input->m0'"):
        from_eap(content)
    with pytest.raises(UserError, match="not a graph as EAP-IG writes it"):
        from_eap({"nodes": {}})


@pytest.mark.skipif(not FIXTURE.exists(), reason="the published file lies beside the project, not in it")
def test_the_published_file_is_read() -> None:
    content = json.loads(FIXTURE.read_text())
    scores, published = from_eap(content)
    assert len(published) == sum(edge["in_graph"] for edge in content["edges"].values())
    name, edge = max(content["edges"].items(), key=lambda item: abs(item[1]["score"]))
    assert scores.top(1) == [(name, pytest.approx(edge["score"]))]
    assert published.pruned().edges == published.edges  # EAP-IG prunes as we do
