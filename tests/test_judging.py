"""Judging what a run found: circuits of its scores against the same circuits made by hand, and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from circuits import evaluate, judging
from circuits.graph import Circuit, Graph
from workbench import registry, runs
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.prompts import Batch, sample

ON: dict[str, Any] = {"task": "ioi", "n": 6}


def drawn(model: LanguageModel, seed: int = 1) -> Batch:
    return sample(registry.get_task("ioi"), model, 6, seed=seed)


def test_sizes_rise_to_the_whole_model(tiny: LanguageModel, store: ActivationStore) -> None:
    found = runs.run("eap", model=tiny, **ON)
    curve = runs.run("judge-sizes", model=tiny, seed=1, found=found.id, **ON).result
    total = len(found.result.graph)
    assert curve.items.tolist() == judging.ladder(total) and total == curve.items[-1]
    assert float(curve.faithfulness.value[-1]) == pytest.approx(1, abs=1e-3)
    graph = Graph.of(tiny.config)
    kept = evaluate.best(graph, found.result, 20)
    expected = evaluate.faithfulness(tiny, drawn(tiny), store, graph, kept[None])
    at = curve.items.tolist().index(20)
    torch.testing.assert_close(curve.faithfulness.value[at], expected.value[0], rtol=1e-3, atol=1e-3)
    assert "prompts of another seed" in curve.definition


def test_a_share_of_all_is_the_size_that_it_is_of(tiny: LanguageModel, store: ActivationStore) -> None:
    """Also where share times all is a rounding error below."""
    scores = runs.run("eap", model=tiny, **ON).result
    total = len(scores.scores)
    sizes = [n for n in range(total) if int(n / total * total) != n][:3]
    curve = evaluate.curve(tiny, drawn(tiny), store, scores, fractions=[n / total for n in sizes])
    assert sizes and curve.items.tolist() == sizes


def test_the_strongest_node_is_that_through_whose_edges_most_goes(tiny: LanguageModel) -> None:
    graph = Graph.of(tiny.config)
    weights = torch.zeros(len(graph))
    for name, weight in (("a0.h1->m0", 1.0), ("a0.h1->logits", -2.0), ("m0->logits", 2.5), ("input->a0.h1<q>", 9.0)):
        weights[graph.index[name]] = weight
    circuit = Circuit(graph, weights != 0, "by hand", weights=weights)
    assert judging.strongest(circuit, None) == "a0.h1"
    without = replace(circuit, kept=circuit.kept & (weights != -2.0))  # what is not kept does not count
    assert judging.strongest(without, None) == "m0"


def test_a_circuit_without_a_node_has_that_nodes_edges_cut(tiny: LanguageModel, store: ActivationStore) -> None:
    found = runs.run("eap", model=tiny, **ON)
    graph = Graph.of(tiny.config)
    circuit = judging.circuit_of(found, 50)
    node = circuit.nodes[0]
    on = {"model": tiny, "seed": 1, "found": found.id, "size": 50, "subsets": 0, "random": 0, **ON}
    whole = runs.run("judge", **on).result
    less = runs.run("judge", without=node, each=False, **on).result
    kept = torch.stack([circuit.kept, circuit.kept & graph.between(set(graph.nodes) - {node})])
    expected = evaluate.faithfulness(tiny, drawn(tiny), store, graph, kept).value.tolist()
    assert [whole.faithfulness, less.faithfulness] == pytest.approx(expected, abs=1e-3)
    assert float(whole.without[whole.nodes.index(node)]) == pytest.approx(expected[1], abs=1e-3)
    assert whole.nodes == tuple(circuit.nodes) and less.nodes == ()
    assert less.n_edges == int(kept[1].sum()) < whole.n_edges
    assert f"without {node}" in less.definition and "random_mean" not in less.summary()


def test_nodes_and_found_circuits_are_judged_too(tiny: LanguageModel) -> None:
    scores = runs.run("patching", model=tiny, **ON)
    every = len(scores.result.scores)
    report = runs.run("judge", model=tiny, found=scores.id, size=every, subsets=0, random=0, **ON).result
    assert report.faithfulness == pytest.approx(1, abs=1e-3) and "that it was found on" in report.definition
    circuit = runs.run("extract", model=tiny, method="eap", size=30, **ON)
    assert isinstance(circuit.result, Circuit)
    report = runs.run("judge", model=tiny, found=circuit.id, subsets=0, random=0, **ON).result
    assert report.n_edges == len(circuit.result)
    with pytest.raises(UserError, match="found one circuit and no scores"):
        runs.run("judge-sizes", model=tiny, found=circuit.id, **ON)
    with pytest.raises(UserError, match="leave size out"):
        runs.run("judge", model=tiny, found=circuit.id, size=3, **ON)


def test_what_a_node_reads_and_is_read_by(tiny: LanguageModel) -> None:
    circuit = judging.circuit_of(runs.run("eap", model=tiny, **ON), 60)
    ends = {node: judging.neighbours(circuit, node) for node in circuit.nodes}
    reads = sorted(name for one in ends.values() for name, _ in one["it reads"])
    assert reads == sorted(name for name in circuit.edges if not name.endswith("->logits"))
    for some in (some for one in ends.values() for some in one.values()):
        assert [name for name, _ in some] == [name for name, _ in sorted(some, key=lambda edge: -abs(edge[1]))]


def test_bad_input_is_a_sentence(tiny: LanguageModel, make_tiny: Any) -> None:
    found = runs.run("eap", model=tiny, **ON)
    lens = runs.run("logit-lens", model=tiny, **ON)
    for given, sentence in [
        ({"found": ""}, "no run is named"),
        ({"found": "eap-nowhere"}, "no run is called 'eap-nowhere'"),
        ({"found": found.id}, "give how many of its"),
        ({"found": found.id, "size": 10**6}, "give how many of its"),
        ({"found": found.id, "size": 50, "without": "a9.h9"}, "node of the circuit"),
        ({"found": lens.id, "size": 5}, "finds no circuit"),
    ]:
        with pytest.raises(UserError, match=sentence):
            runs.run("judge", model=tiny, **ON, **given)
    with pytest.raises(UserError, match="with other weights"):
        runs.run("judge", model=make_tiny(seed=5), found=found.id, size=50, **ON)
