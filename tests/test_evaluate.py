"""Faithfulness and its relatives: against hand-made curves, the model's own logits, and a head that does everything."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from circuits import evaluate
from circuits.attribution import attribution_patching, eap
from circuits.evaluate import FRACTIONS, areas, curve, faithfulness, report, smallest
from circuits.graph import Circuit, EdgeScores, Graph
from circuits.patching import patching
from tests.test_attribution import draw
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.scores import NodeScores

Make = Callable[..., LanguageModel]


def test_areas_of_curves_made_by_hand() -> None:
    """A perfect curve: CPR .999 (the domain starts at .001), CMD 0. A ramp f = k: CPR and CMD near one half."""
    assert areas(FRACTIONS, [1.0] * 10) == (pytest.approx(0.999), 0.0)
    assert areas(FRACTIONS, list(FRACTIONS)) == (pytest.approx(0.5, abs=1e-6), pytest.approx(0.499, abs=1e-6))
    assert areas(FRACTIONS, [0.0] * 10)[1] == pytest.approx(0.999)
    overshoot = areas(FRACTIONS, [2.0] * 10)
    assert overshoot == (pytest.approx(1.998), pytest.approx(0.999))  # CPR rewards it, CMD does not


def test_the_whole_graph_is_faithful_and_the_empty_one_is_not(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny, n=6)
    graph = Graph.of(tiny.config)
    kept = torch.stack([torch.ones(len(graph)), torch.zeros(len(graph))]).bool()
    found = faithfulness(tiny, batch, store, graph, kept)
    torch.testing.assert_close(found.value, torch.tensor([1.0, 0.0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.mean_of_ratios, torch.tensor([1.0, 0.0]), atol=1e-3, rtol=0)
    for end in (found.low, found.high):  # in every draw of prompts, too
        torch.testing.assert_close(end, torch.tensor([1.0, 0.0]), atol=1e-3, rtol=0)
    truth = []
    for i in range(len(batch)):
        pair = [tiny.run(side[i][None], logits="last").logits[:, -1] for side in (batch.clean, batch.corrupted)]  # type: ignore[index]
        truth.append([float(batch.select([i]).score(logits)) for logits in pair])
    whole, nothing = torch.tensor(truth).mean(0).tolist()
    assert found.whole == pytest.approx(whole, abs=1e-4) and found.nothing == pytest.approx(nothing, abs=1e-4)


def test_faithfulness_without_one_node_is_its_patching_effect(tiny: LanguageModel, store: ActivationStore) -> None:
    """f(M without v) = 1 - effect(v) / gap."""
    batch = draw(tiny, n=6)
    graph = Graph.of(tiny.config)
    effects = patching(tiny, batch, store)
    kept = torch.stack([graph.between(set(graph.nodes) - {name}) for name in effects.nodes])
    found = faithfulness(tiny, batch, store, graph, kept)
    gap = found.whole - found.nothing
    torch.testing.assert_close(found.value, 1 - effects.scores / gap, rtol=1e-3, atol=1e-3)
    assert bool(((found.low <= found.value) & (found.value <= found.high)).all())


@pytest.mark.parametrize("level", ["edges", "nodes"])
def test_curves_end_at_the_model(level: str, tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny, n=6)
    scores = eap(tiny, batch, store) if level == "edges" else attribution_patching(tiny, batch, store)
    drawn = curve(tiny, batch, store, scores)
    assert drawn.level == level and drawn.items[-1] == len(scores.scores)
    assert float(drawn.faithfulness.value[-1]) == pytest.approx(1, abs=1e-3)
    assert drawn.kept.tolist() == sorted(drawn.kept.tolist()) and int(drawn.kept[-1]) == len(Graph.of(tiny.config))
    assert drawn.area > 0 and "faithfulness" in drawn.summary()["definition"]
    signed = curve(tiny, batch, store, scores, absolute=False)
    x, f = torch.tensor(FRACTIONS, dtype=torch.float64), drawn.faithfulness.value.double()
    assert drawn.summary()["cmd"] == pytest.approx(float(torch.trapezoid((1 - f).abs(), x)), abs=1e-4)
    f = signed.faithfulness.value.double()
    assert signed.summary()["cpr"] == pytest.approx(float(torch.trapezoid(f, x)), abs=1e-4)
    assert "cpr" not in drawn.summary() and "cmd" not in signed.summary()  # each ranking has its own


@pytest.mark.parametrize(
    ("curve_of", "expected"),
    [
        (lambda n: 0.31 * n, 3),  # the rung above overshoots: 2 and 4 are tried first
        (lambda n: 0.5 if n < 5 else 1.5 if n < 20 else 1.0, 24),  # no size between: the first rung that comes back
        (lambda n: 0.95 if n == 2 else 0.1, 2),
        (lambda n: 1.5 if n < 30 else 0.2 if n < 40 else 0.01 * n, 90),  # rises again, late
        (lambda n: 0.5, 128),
    ],
)
def test_smallest_looks_between_rungs_wherever_faithfulness_rises(
    curve_of: Callable[[int], float], expected: int, tiny: LanguageModel, store: ActivationStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    scores = NodeScores(tuple(f"n{i}" for i in range(128)), torch.arange(128.0), "", "")

    def measured(*args: object, **_: object) -> object:
        kept = args[4]
        assert isinstance(kept, torch.Tensor)
        return SimpleNamespace(value=torch.tensor([curve_of(int(row)) for row in kept[:, 0]], dtype=torch.float64))

    monkeypatch.setattr(evaluate, "best", lambda graph, scores, n: torch.full((len(graph),), n))
    monkeypatch.setattr(evaluate, "faithfulness", measured)
    ends = evaluate.Ends(torch.ones(1), torch.zeros(1))
    found = smallest(tiny, draw(tiny), store, scores, ends=ends)
    assert found == (expected, pytest.approx(curve_of(expected)))


def test_the_smallest_circuit_is_faithful_and_one_smaller_is_not(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny, n=6)
    scores = patching(tiny, batch, store)
    size, reached = smallest(tiny, batch, store, scores)
    assert 0.9 <= reached <= 1.1 and 0 < size <= len(scores.scores)
    graph = Graph.of(tiny.config)
    order = scores.scores.abs().argsort(descending=True).tolist()
    kept = torch.stack([graph.between(scores.nodes[i] for i in order[:n]) for n in (size, size - 1)])
    found = faithfulness(tiny, batch, store, graph, kept).value.tolist()
    assert found[0] == pytest.approx(reached, abs=1e-4) and not 0.9 <= found[1] <= 1.1


def test_a_report_knows_a_circuit_from_its_complement(make_tiny: Make, store: ActivationStore) -> None:
    """Only one head of layer 2 writes anything in a model without MLPs above layer 0: it must be in the circuit."""
    model = make_tiny(seed=3)
    batch = draw(model, n=6)
    graph = Graph.of(model.config)
    whole = report(
        model, batch, store, Circuit(graph, torch.ones(len(graph)).bool(), "everything"), subsets=4, random=2
    )
    assert whole.faithfulness == pytest.approx(1, abs=1e-3) and whole.completeness == pytest.approx(1, abs=1e-3)
    assert whole.incompleteness == pytest.approx(0, abs=1e-6)
    assert whole.random.tolist() == pytest.approx([1.0, 1.0], abs=1e-3)  # of the same make-up: the whole again
    effects = patching(model, batch, store)
    expected = torch.tensor([float(effects.scores[effects.nodes.index(name)]) for name in whole.nodes])
    torch.testing.assert_close(whole.minimality, (expected / (whole.whole - whole.nothing)).abs(), rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="no nodes besides"):
        report(model, batch, store, Circuit(graph, torch.zeros(len(graph)).bool(), "nothing"))


def test_incompleteness_is_the_mean_difference_without_the_same_random_nodes(
    tiny: LanguageModel, store: ActivationStore
) -> None:
    batch = draw(tiny, n=6)
    graph = Graph.of(tiny.config)
    nodes = ["a0.h1", "a1.h0", "a1.h2", "a2.h3", "m0", "m2"]
    circuit = Circuit(graph, graph.between(nodes), "some")
    found = report(tiny, batch, store, circuit, subsets=3, random=1, seed=7)
    generator = torch.Generator().manual_seed(7)
    differences = []
    for _ in range(3):
        removed = {name for name in circuit.nodes if float(torch.rand((), generator=generator)) < 0.5}
        kept = torch.stack([graph.between(set(some) - removed) for some in (nodes, graph.nodes)])
        f = faithfulness(tiny, batch, store, graph, kept).value
        differences.append(abs(float(f[0] - f[1])))
    assert found.incompleteness == pytest.approx(sum(differences) / 3, abs=1e-4) and found.incompleteness > 0.01


def test_random_circuits_have_the_same_make_up(tiny: LanguageModel) -> None:
    from circuits.evaluate import _random_like

    graph = Graph.of(tiny.config)
    nodes = ["a0.h1", "a2.h0", "a2.h3", "m1"]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        other = Circuit(graph, _random_like(Circuit(graph, graph.between(nodes), ""), generator), "").nodes
        assert sorted(name.split(".")[0][:2] if name[0] == "a" else "m" for name in other) == ["a0", "a2", "a2", "m"]
    some = torch.rand(len(graph), generator=generator) < 0.3
    other_kept = _random_like(Circuit(graph, some, ""), generator)
    assert int(other_kept.sum()) == int(some.sum()) and not torch.equal(other_kept, some)


def test_nothing_to_explain_is_a_sentence(make_tiny: Make, store: ActivationStore) -> None:
    model = make_tiny(seed=5)
    for layer in range(3):
        model.out_weight(layer).zero_()
        model._block(layer).get_submodule("mlp.down_proj").weight.zero_()
    batch = draw(model, n=4)
    graph = Graph.of(model.config)
    with pytest.raises(UserError, match="there is no behaviour for a circuit to explain"):
        faithfulness(model, batch, store, graph, torch.ones(1, len(graph)).bool())


def test_scores_of_heads_keep_all_mlps(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny, n=4)
    heads = patching(tiny, batch, store, mlps=False)
    graph = Graph.of(tiny.config)
    drawn = curve(tiny, batch, store, heads, fractions=(0.0, 1.0))
    assert int(drawn.kept[0]) == int(graph.between(["m0", "m1", "m2"]).sum()) and int(drawn.kept[1]) == len(graph)


def test_edge_scores_that_are_all_equal_still_rank(tiny: LanguageModel) -> None:
    graph = Graph.of(tiny.config)
    flat = EdgeScores(graph, torch.zeros(len(graph)), "flat", "none")
    assert isinstance(flat.nodes(), NodeScores) and not flat.nodes().scores.any()
