"""What comes with the package is what its runs say: models, circuits, the twin at equal loss."""

from __future__ import annotations

import pytest
import torch

from circuits.sparse.data import TokenStream
from circuits.sparse.shipped import DATA, names
from circuits.sparse.train import HELD_OUT, loss_of, nonzero
from circuits.sparse.training_run import SparseTraining, accuracies
from workbench import places, pretrained, runs
from workbench.models import LanguageModel

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
    """As their runs say, and measured again on what is written; the text has parts of this interpreter's library."""
    models = [LanguageModel.load(name) for name in ("pycode-small", "pycode-small-dense")]
    said = [float(runs.get_run(names()[m.name]["run"]).result.curve["held_out_loss"][-1]) for m in models]
    assert abs(said[0] - said[1]) <= 0.02
    bpe = models[0].tokenizer.backend_tokenizer
    assert models[1].tokenizer.get_vocab() == models[0].tokenizer.get_vocab()
    rows = TokenStream(bpe, seed=0, real=0.25, held_out=True).read(0, HELD_OUT * 128).view(HELD_OUT, 128)
    with torch.no_grad():
        found = [float(torch.stack([loss_of(m._module, part) for part in rows.split(64)]).mean()) for m in models]
    assert found == pytest.approx(said, abs=0.05) and abs(found[0] - found[1]) <= 0.03
