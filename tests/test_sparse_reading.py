"""What a circuit's channels do, on the circuit that was put there by hand, and how it is drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from circuits.sparse import pruning_run, validate
from circuits.sparse.channels import Channels
from circuits.sparse.circuit_figures import places_of, through_the_stream
from circuits.sparse.masked import Masked, fills
from circuits.sparse.prune import Pruned, Question, Settings
from circuits.sparse.pruning_run import Row, SparseCircuit, TaskCircuits, judges
from circuits.sparse.reading import Reading, read
from tests.conftest import QUICK as SHORT
from tests.test_sparse_prune import TRUE, A, B, by_hand
from workbench import plots, results, runs
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.tasks.python_code import TASKS

QUICK = (Settings(k_coef=1e-4, lr=3e-2, steps=100),)


@pytest.fixture(scope="module")
def found() -> tuple[LanguageModel, Question, Pruned, Reading]:
    model, some = by_hand()
    model.tokenizer = Words()
    question = Question.of(model, some, some, ablation="zero")
    best = question.search(QUICK).best
    assert best is not None and set(best.nodes) == set(TRUE)
    return model, question, best, read(question, best.kept, best.scale)


class Words:
    """Names of the tokens of a model that has no tokenizer."""

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(f"t{i}" for i in ids)


def test_channels_say_what_was_put_there(found: tuple[LanguageModel, Question, Pruned, Reading]) -> None:
    model, _, _, reading = found
    assert [node.name for node in reading.nodes] == sorted(TRUE, key=Channels(model).names.index)
    source, value, end = (reading[name] for name in ("0.attn.act_in:0", "0.attn.v:9", "1.mlp.resid_delta:7"))
    # Channel 0 is 1 for token A and -1 for B, and nothing else writes to it.
    assert sorted(source.tokens) == [f"+t{A}", f"-t{B}"]
    assert source.one == pytest.approx(-source.two, rel=0.01) and source.one > 0.1
    assert value.one == pytest.approx(source.one, rel=0.05)  # weight 1
    # The unembedding has 0.4 and -0.4 in channel 7 for the two answers.
    assert end.towards_one == pytest.approx(0.8) and end.one > 0 > end.two
    assert reading["1.mlp.post_act:20"].one > reading["1.mlp.post_act:20"].two == pytest.approx(0, abs=1e-6)
    assert reading["0.attn.resid_delta:6"].towards_one == pytest.approx(0) and value.towards_one is None


def test_the_loss_without_a_channel_is_that_of_the_circuit_without_it(
    found: tuple[LanguageModel, Question, Pruned, Reading],
) -> None:
    model, question, best, reading = found
    channels = Channels(model)
    masked = Masked(channels, question.judge.pairs, fills(channels, question.judge.pairs, "zero"))
    for node in reading.nodes:
        mask = best.kept.float()
        base = masked.loss(mask, best.scale)
        mask[channels.names.index(node.name)] = 0
        assert node.loss_without == pytest.approx(masked.loss(mask, best.scale) - base, abs=1e-5)
    chain = {"0.attn.act_in:0", "0.attn.v:9", "0.attn.resid_delta:6", "1.mlp.act_in:6", "1.mlp.resid_delta:7"}
    assert {node.name for node in reading.strongest(5)} == chain  # each neuron serves one class alone


def test_the_drawing_has_every_channel_weight_and_passage(
    found: tuple[LanguageModel, Question, Pruned, Reading],
) -> None:
    _, _, best, reading = found
    fig = plots.figure(SparseCircuit(best, reading, None))
    weights = [trace.hovertext for trace in fig.data if isinstance(trace.hovertext, str)]
    assert len(weights) == len(best.circuit) == 6 and any("weight −3" in text for text in weights)
    assert through_the_stream(list(best.nodes)) == [("0.attn.resid_delta:6", "1.mlp.act_in:6")]
    places = places_of(reading, best.circuit)
    assert len(set(places.values())) == len(places) == 7
    for s, d in best.circuit.graph.edges[best.circuit.kept].tolist():
        assert places[best.circuit.graph.sources[s]][0] < places[best.circuit.graph.destinations[d]][0]
    assert sorted(fig.data[-1].text) == sorted(name.split(":")[1] for name in TRUE)


def test_a_circuit_comes_back_from_disk(found: tuple[LanguageModel, Question, Pruned, Reading]) -> None:
    _, _, best, reading = found
    value = SparseCircuit(best, reading, None)
    encoded, arrays = results.encode(value)
    back = results.decode(SparseCircuit, encoded, arrays)
    assert back.summary() == value.summary() and back.reading == reading
    assert back.summary()["n_edges"] == 6 and torch.equal(back.pruned.kept, best.kept)


def test_tasks_without_a_circuit_are_shown_and_not_averaged() -> None:
    row = Row(0.99, 0.02, 0.14, 12, 20, 0.16, 0.6, 0.001)
    table = TaskCircuits(
        "m", {"a": row, "b": dataclasses.replace(row, edges=80), "c": Row(0.6, 0.6, 0.5)}, "what is counted"
    )
    summary = table.summary()
    assert summary["geometric_mean_edges"] == 40 and summary["circuits"] == 2 and summary["solved"] == 2
    fig = plots.figure(table)
    assert list(fig.data[0].y) == ["b", "a", "c (no circuit)"] and list(fig.data[0].x) == [80, 20, None]
    (shown,) = plots.tables(table)
    assert shown.columns["task"] == ["a", "b", "c"] and shown.columns["edges"] == ["20", "80", "none"]
    assert TaskCircuits("m", {"c": Row(0.6, 0.6, 0.5)}, "").summary()["geometric_mean_edges"] is None


def test_solved_tasks_alone_if_that_is_asked_for(sparse_coder: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = SHORT["sparse-tasks"] | {"tasks": "solved"}
    shares = {name: 0.95 if name == "for_while" else 0.94 for name in TASKS}
    monkeypatch.setattr(pruning_run, "accuracies", lambda model, names: {name: shares[name] for name in names})
    assert list(runs.run("sparse-tasks", model=sparse_coder, **quick).result.rows) == ["for_while"]
    shares["for_while"] = 0.94
    with pytest.raises(UserError, match="solves none of the 20 tasks; name some"):
        runs.run("sparse-tasks", model=sparse_coder, seed=1, **quick)


def test_the_table_has_the_circuits_that_pruning_finds(sparse_coder: LanguageModel) -> None:
    quick = SHORT["sparse-tasks"]
    table = runs.run("sparse-tasks", model=sparse_coder, **quick).result
    assert table.reached
    for task in table.reached:
        row = table.rows[task]
        alone = runs.run("sparse-prune", model=sparse_coder, task=task, n=4, controls=False, target=0.7, sure=0.0,
                         settings=1, steps=3).result  # fmt: skip
        circuit = table.circuit(task, sparse_coder)
        assert torch.equal(row.kept, alone.pruned.kept) and row.scale == alone.pruned.scale
        assert circuit.edges == alone.circuit.edges and len(circuit) == row.edges
    with pytest.raises(UserError, match="circuit of the task"):
        table.circuit("bananas", sparse_coder)


@pytest.mark.slow
def test_a_circuit_is_validated_unless_told_otherwise(sparse_coder: LanguageModel) -> None:
    quick = {name: value for name, value in SHORT["sparse-prune"].items() if name != "controls"}
    found = runs.run("sparse-prune", model=sparse_coder, task="with_as", n=2, **quick).result
    assert found.validation is not None
    assert found.validation.sufficiency.loss == pytest.approx(found.pruned.held_out)
    assert {"necessity", "nonsense"} & set(found.summary()) and not {"necessity"} & set(found.pruned.summary())


def test_a_validation_that_is_killed_goes_on(sparse_coder: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    quick = {name: value for name, value in SHORT["sparse-prune"].items() if name != "controls"}
    again: dict[str, Any] = {"model": sparse_coder, "task": "with_as", "n": 2, **quick, "sure": 0.5}
    calls: list[str] = []
    asked: set[float] = set()
    few = {
        "necessity": partial(validate.necessity, draws=1, seed=0),
        "subsets": partial(validate.subsets, draws=1, settings=Settings(k_coef=1e-4, lr=3e-2, steps=2)),
    }

    def quickly(name: str) -> Callable[..., Any]:
        return lambda *given, **_: (calls.append(name), few[name](*given))[1]

    def control(name: str) -> Callable[..., validate.Control]:
        return lambda question, *_: (
            calls.append(name), asked.add(question.sure), validate.Control(False, 0.1, 0.1),
        )[2]  # fmt: skip

    def killed(*_: Any) -> Any:
        raise Killed

    for name in few:
        monkeypatch.setattr(validate, name, quickly(name))
    for name in ("nonsense", "random_weights", "backup"):
        monkeypatch.setattr(validate, name, control(name))
    with monkeypatch.context() as patch:
        patch.setattr(validate, "stability", killed)
        with pytest.raises(Killed):
            runs.run("sparse-prune", **again)
    monkeypatch.setattr(validate, "stability", lambda *_: validate.Stability((0,), (0,), (1,), (1,), None, None))
    found = runs.run("sparse-prune", **again).result.validation
    assert sorted(calls) == ["backup", "necessity", "nonsense", "random_weights", "subsets"]
    assert asked == {0.5}  # the controls are asked what the circuit was
    assert found.nonsense == found.backup == validate.Control(False, 0.1, 0.1) and found.subsets.summary()


def test_a_circuit_is_judged_on_more_pairs_than_it_is_found_on_and_never_on_fewer() -> None:
    assert [judges(pairs) for pairs in (2, 128, 200, 512, 1024)] == [8, 512, 512, 512, 1024]
