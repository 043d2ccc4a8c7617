"""What comes with the package is what its runs say: models, circuits, the twin at equal loss."""

from __future__ import annotations

import pytest
import torch

from circuits.sparse.channels import Channels
from circuits.sparse.data import TokenStream
from circuits.sparse.prune import ask
from circuits.sparse.pruning_run import stream_of
from circuits.sparse.shipped import DATA, names
from circuits.sparse.train import loss_of, nonzero
from circuits.sparse.training_run import SparseTraining, accuracies
from workbench import places, pretrained, registry, runs
from workbench.models import LanguageModel
from workbench.prompts import sample, split

SOME = ("single_double_quote", "with_as", "for_while")


@pytest.fixture(autouse=True)
def shipped() -> None:
    places.ship(DATA / "runs")


def test_everything_that_comes_with_the_package_can_be_read() -> None:
    found, sentences = runs.all_runs()
    assert not sentences
    ids = {run.id for run in found}
    assert ids == {path.name for path in (DATA / "runs").iterdir()}
    for name, entry in names().items():
        assert entry["run"] in ids and pretrained.local()[name].about == entry["about"]
    for run in found:
        assert run.result.summary() == run.summary
    size = sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file())
    assert size < 20e6


@pytest.mark.parametrize("name", names())
def test_a_model_is_as_sparse_and_as_good_as_its_run_says(name: str) -> None:
    run, model = runs.get_run(names()[name]["run"]), LanguageModel.load(name)
    counts = nonzero(model._module)
    assert counts["weights"] == run.summary["of_weights"]
    if run.summary["nonzero"] < counts["weights"]:
        assert counts["nonzero"] == run.summary["nonzero"]
    if isinstance(run.result, SparseTraining):
        for task, share in accuracies(model, SOME).items():
            assert share == pytest.approx(run.result.accuracy[task], abs=0.011), task


def test_the_twin_has_the_loss_of_the_sparse_model() -> None:
    """On generated text alone here; on the mixture that they were trained on, within 0.02, as their runs say."""
    models = [LanguageModel.load(name) for name in ("pycode-small", "pycode-small-dense")]
    said = [runs.get_run(names()[model.name]["run"]).result.curve["held_out_loss"][-1] for model in models]
    assert abs(float(said[0] - said[1])) <= 0.02
    bpe = models[0].tokenizer.backend_tokenizer
    assert models[1].tokenizer.get_vocab() == models[0].tokenizer.get_vocab()
    rows = TokenStream(bpe, real=0.0, held_out=True).read(0, 64 * 128).view(64, 128)
    with torch.no_grad():
        one, other = (float(loss_of(model._module, rows)) for model in models)
    assert one == pytest.approx(other, abs=0.1) and one < 2


@pytest.mark.parametrize("id", sorted(path.name for path in (DATA / "runs").glob("sparse-tasks-*")))
def test_a_circuit_does_what_the_table_says(id: str) -> None:
    run = runs.get_run(id)
    model, table = LanguageModel.load(run.record["model_name"]), run.result
    assert run.record["key"]["model"] == model.fingerprint and len(table.reached) >= 8
    task = min(table.reached, key=lambda task: table.reached[task])
    row, circuit = table.rows[task], table.circuit(task, model)
    assert row.kept is not None and row.scale is not None and row.held_out is not None
    assert len(circuit) == row.edges == int(Channels(model).between(row.kept).sum())
    train, test = (sample(split(registry.get_task(task), part), model, 64, 1) for part in ("train", "test"))
    question = ask(model, train, test, stream_of(model))
    alone = question.judge.loss(row.kept.float(), row.scale)  # of other prompts, and of this machine's library
    assert alone == pytest.approx(row.held_out, abs=0.1)
