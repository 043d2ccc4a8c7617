"""A circuit that was found, channel by channel, and with fewer of its channels."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from circuits.graph import Circuit, Graph
from circuits.sparse.channels import Channels
from circuits.sparse.circuit_figures import sizes_figure
from circuits.sparse.masked import MOST_SCALE
from circuits.sparse.prune import ask
from circuits.sparse.pruning_run import drawn, stream_of
from circuits.sparse.shipped import DATA
from circuits.sparse.sizes import SizedCircuit, compact
from tests.conftest import QUICK
from workbench import places, plots, registry, results, runs
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.runs import Run

PAIRS = QUICK["sparse-tasks"]["pairs"]


@pytest.fixture(scope="module")
def made(sparse_coder: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """Circuits of some tasks, and one of them read, computed once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_HOME", str(tmp_path_factory.mktemp("made")))
        tasks = runs.run("sparse-tasks", model=sparse_coder, **QUICK["sparse-tasks"])
        return tasks, runs.run("sparse-circuit", model=sparse_coder, task="with_as", n=PAIRS, found=tasks.id)


@pytest.fixture
def tasks(made: tuple[Run, Run], home: Path) -> Run:
    shutil.copytree(made[0].folder, home / "runs" / made[0].id)
    return runs.get_run(made[0].id)


@pytest.fixture
def found(made: tuple[Run, Run]) -> SizedCircuit:
    result = made[1].result
    assert isinstance(result, SizedCircuit)
    return result


def test_all_of_it_is_the_circuit_that_was_found(found: SizedCircuit, tasks: Run, sparse_coder: LanguageModel) -> None:
    row, whole = tasks.result.rows["with_as"], tasks.result.circuit("with_as", sparse_coder)
    assert found.sizes[-1] == len(found.reading.nodes) == row.nodes and found.edges[-1] == row.edges
    assert float(found.loss[-1]) == pytest.approx(row.held_out, abs=1e-5)
    assert found.whole == pytest.approx(row.whole, abs=1e-5)
    assert set(found.circuit.edges) == set(whole.edges)
    weights = dict(zip(whole.graph.names, whole.weights.tolist(), strict=True))
    assert found.circuit.weights.tolist() == [weights[name] for name in found.circuit.graph.names]


def test_fewer_are_those_that_it_can_spare_least(found: SizedCircuit, sparse_coder: LanguageModel) -> None:
    order = sorted(found.reading.nodes, key=lambda node: -node.loss_without)
    channels = Channels(sparse_coder)
    for size, edges in zip(found.sizes.tolist(), found.edges.tolist(), strict=True):
        less = found.at(size)
        names = {node.name for node in less.reading.nodes}
        assert names == {node.name for node in order[:size]} and len(less.reading.nodes) == size
        kept = torch.tensor([name in names for name in channels.names])
        assert len(less.circuit) == edges == int(channels.between(kept).sum())
    for size in (0, len(order) + 1):
        with pytest.raises(UserError, match="give 1 to all"):
            found.at(size)


def test_a_small_graph_has_the_edges_and_weights_of_the_large_one() -> None:
    graph = Graph(("a", "b", "c"), ("b", "c", "d"), torch.tensor([[0, 0], [0, 1], [1, 1], [2, 2]]))
    kept, weights = torch.tensor([True, True, False, True]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    small = compact(Circuit(graph, kept, "by hand", weights=weights), ["a", "b", "c"])
    assert small.graph.names == ("a->b", "a->c") and small.weights.tolist() == [1.0, 2.0] and bool(small.kept.all())
    assert len(compact(Circuit(graph, kept, "by hand"), ["b", "d"])) == 0


def test_it_is_kept_and_drawn(found: SizedCircuit) -> None:
    encoded, arrays = results.encode(found)
    back = results.decode(SizedCircuit, encoded, arrays)
    assert back.summary() == found.summary() and back.reading == found.reading
    drawn = plots.figure(back)
    assert set(drawn.data[-1].customdata) == {node.name for node in found.reading.nodes}
    curve = sizes_figure(back, target=0.15)
    assert list(curve.data[0].x) == found.sizes.tolist() and len(curve.layout.shapes) == 3


def test_what_names_no_such_circuit_is_a_sentence(tasks: Run, sparse_coder: LanguageModel, tiny: LanguageModel) -> None:
    def ask(model: LanguageModel = sparse_coder, task: str = "with_as", **given: str) -> None:
        runs.run("sparse-circuit", model=model, task=task, n=PAIRS, **given)

    with pytest.raises(UserError, match="no run is named; give the id of one of sparse-tasks"):
        ask()
    with pytest.raises(UserError, match="no run is called"):
        ask(found="sparse-tasks-000000000000")
    with pytest.raises(UserError, match="circuit of the task"):
        ask(task="lambda_func", found=tasks.id)
    with pytest.raises(UserError, match="is of eap; give the id of a run of sparse-tasks"):
        ask(found=runs.run("eap", model=tiny, task="ioi", n=6).id)
    with pytest.raises(UserError, match="with other weights than"):
        ask(model=tiny, task="ioi", found=tasks.id)


@pytest.mark.slow
def test_the_loss_of_each_size_is_that_of_its_channels_alone() -> None:
    """By masks made here, and scale and shift found by another minimiser on the pairs that the circuit was found on."""
    places.ship(DATA / "runs")
    model = LanguageModel.load("pycode-small")
    tasks = next(run for run in runs.all_runs()[0] if run.id == "sparse-tasks-7cfb2f4acddb")
    task = "set_or_string_fixedvarname"
    found = runs.run("sparse-circuit", model=model, task=task, n=4, found=tasks.id).result
    train, test = drawn(registry.get_task(task), model, 4, 0)
    question = ask(model, train, test, stream_of(model))
    names, order = question.judge.channels.names, sorted(found.reading.nodes, key=lambda node: -node.loss_without)

    def loss(kept: set[str]) -> float:
        mask = torch.tensor([float(name in kept) for name in names])
        odds = [part.odds(mask).double().numpy() for part in (question.find, question.judge)]
        signs = [np.where(part.pairs.is_one.numpy(), 1.0, -1.0) for part in (question.find, question.judge)]

        def of(scale: Any, part: int) -> float:
            return float(np.logaddexp(0, -(odds[part] * scale[0] + signs[part] * scale[1])).mean())

        fitted = minimize(
            of, (1.0, 0.0), args=(0,), bounds=[(0, MOST_SCALE), (None, None)], method="L-BFGS-B", tol=1e-12
        )
        return of(fitted.x, 1)

    for size, value in zip(found.sizes.tolist()[:-1], found.loss.tolist(), strict=False):
        assert value == pytest.approx(loss({node.name for node in order[:size]}), abs=2e-3), size
    assert found.none == pytest.approx(loss(set()), abs=2e-3)
    assert float(found.loss[-1]) < min(found.none, float(found.loss[0]))
