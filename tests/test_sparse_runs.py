"""Weight-sparse models as runs: what is trained is a model like any other, by the run's id or the preset's name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from circuits.sparse import files, train, training_run
from circuits.sparse.model import SparseConfig, SparseTransformer
from circuits.sparse.train import PRESETS, nonzero
from circuits.sparse.training_run import changed
from tests.conftest import QUICK, Wb
from workbench import places, pretrained, runs
from workbench.errors import UserError
from workbench.models import LanguageModel

LITTLE = QUICK["sparse-train"]


def test_a_trained_model_is_loaded_by_the_runs_id() -> None:
    run = runs.run("sparse-train", **LITTLE)
    assert run.record["command"] == "wb run sparse-train --seed 0 --density 0.5 --layers 1 --width 32 --tokens 4096"
    assert "task" not in run.record["key"] and "model" not in run.record["key"] and run.record["task"] == {}
    model = LanguageModel.load(run.id)
    assert model.fingerprint == pretrained.fingerprint(run.id)
    assert nonzero(model._module) == {"nonzero": run.summary["nonzero"], "weights": run.summary["of_weights"]}
    assert model._module.about["recipe"]["tokens"] == 4096
    assert all(torch.equal(x, x.half().float()) for x in model._module.parameters())
    found = runs.run("logit-lens", model=run.id, task="with_as", n=4)
    assert found.record["model_name"] == run.id and found.record["key"]["model"] == model.fingerprint


def test_a_run_that_comes_with_a_package_is_like_one_that_was_made_here(tmp_path: Path, wb: Wb) -> None:
    run = runs.run("sparse-train", **LITTLE)
    shutil.move(run.folder, tmp_path / "shipped" / run.id)
    with pytest.raises(UserError, match="no run is called"):
        runs.get_run(run.id)
    places.ship(tmp_path / "shipped")
    again = runs.run("sparse-train", **LITTLE)
    assert again.hit and again.summary == run.summary and again.folder == tmp_path / "shipped" / run.id
    assert [found.id for found in runs.all_runs()[0]] == [run.id] and run.id in wb("runs")[1]
    found = runs.run("logit-lens", model=run.id, task="with_as", n=2)
    assert {one.id for one in runs.all_runs()[0]} == {run.id, found.id}
    assert found.folder.parent != again.folder.parent


def test_the_accuracy_is_that_of_single_prompts() -> None:
    """Counted one prompt at a time, unlike the figure, and near the middle as nothing was learned."""
    run = runs.run("sparse-train", **LITTLE)
    model = LanguageModel.load(run.id)
    task = training_run.split(training_run.registry.get_task("with_as"), "test")
    batch = training_run.sample(task, model, training_run.JUDGED_ON, 0)
    right = 0
    for clean, corrupted, answer, wrong in zip(batch.clean, batch.corrupted, batch.answers, batch.wrong, strict=True):
        for tokens, more, less in ((clean, answer, wrong), (corrupted, wrong, answer)):
            logits = model.run(tokens[None]).logits
            assert logits is not None
            right += bool(logits[0, -1, more] > logits[0, -1, less])
    assert run.result.accuracy["with_as"] == right / (2 * training_run.JUDGED_ON)
    assert 0.2 < run.result.accuracy["with_as"] < 0.8 and "with_as" in run.summary["not_solved"]


def test_what_it_does_not_take_is_refused(tiny: LanguageModel) -> None:
    for given, message in (
        ({"model": tiny}, "sparse-train takes no model; leave model=tiny-"), ({"task": "ioi"}, "takes no task"),
        ({"n": 3}, "takes no n; leave n=3 out"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            runs.run("sparse-train", **given, **LITTLE)


def test_a_run_that_is_killed_after_training_does_not_train_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "accuracies", killed)
        with pytest.raises(Killed):
            runs.run("sparse-train", **LITTLE)
    monkeypatch.setattr(training_run, "accuracies", lambda model: {"with_as": 1.0})
    monkeypatch.setattr(train, "loss_of", killed)  # a second step of training would end here
    run = runs.run("sparse-train", **LITTLE)
    assert run.summary["tasks_solved"] == 1 and LanguageModel.load(run.id).config.n_layers == 1
    assert sorted(path.name for path in run.files.iterdir()) == ["model"]


def test_a_preset_has_a_name_once_it_is_trained(monkeypatch: pytest.MonkeyPatch, wb: Wb) -> None:
    with pytest.raises(UserError, match="sparse-tiny is not trained yet; run `wb run sparse-train --preset tiny`"):
        LanguageModel.load("sparse-tiny")
    here = {row["name"]: row["here"] for row in json.loads(wb("models", "--json")[1])["models"]}
    assert here["sparse-tiny"] is False
    few = changed(PRESETS["tiny"], seed=0, **LITTLE)
    monkeypatch.setitem(PRESETS, "tiny", few)
    status, out, _ = wb("run", "sparse-train", "--json")
    assert status == 0
    assert LanguageModel.load("sparse-tiny").fingerprint == LanguageModel.load(json.loads(out)["run"]).fingerprint
    assert "sparse-train" in wb("runs")[1]
    status, out, _ = wb("show", json.loads(out)["run"])
    assert status == 0 and "task   " not in out and "held_out_loss" in out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"width": 40}, "width=40 is no multiple of 16"),
        ({"tokens": 10, "seconds": 2.0}, "give one of the two"),
        ({"density": 0.01}, "leaves fewer than per_neuron=4 weights"),
    ],
)
def test_what_cannot_be_trained_is_a_sentence(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        changed(PRESETS["tiny"], seed=0, **given)


def test_density_1_is_the_dense_twin() -> None:
    """All weights and activations, its own optimiser, the same data; with AbsTopK only if that is asked for."""
    twin = changed(PRESETS["tiny"], seed=3, density=1.0)
    assert twin == replace(PRESETS["tiny"].dense(), seed=3) and not twin.sparse
    assert twin.model.afrac is None and twin.real == PRESETS["tiny"].real
    assert changed(PRESETS["tiny"], seed=3, density=1.0, afrac=0.25).model.afrac == 0.25
    wide = changed(PRESETS["small"], seed=0, width=64, layers=5, tokens=7, density=0.25).model
    assert (wide.d_model, wide.n_head, wide.d_mlp, wide.n_layer) == (64, 4, 256, 5)


def test_the_figure_ends_where_training_ended() -> None:
    from workbench import plots

    result = runs.run("sparse-train", **LITTLE).result
    lines = {trace.name: trace for trace in plots.figure(result).data}
    assert lines["held-out loss"].y[-1] == pytest.approx(result.summary()["held_out_loss"], abs=1e-3)
    assert lines["density"].y[-1] == pytest.approx(0.5)
    assert torch.tensor(lines["loss"].x[-1]) == pytest.approx(4096 / 1e6)


def test_rounding_keeps_every_weight() -> None:
    module = SparseTransformer(SparseConfig(50, 1, 16, 2, block_size=16), torch.Generator().manual_seed(0))
    weight = module.lm_head.weight.data
    weight[:2, 0] = torch.tensor([1e-9, -3e-8])
    weight[2] = 0
    before = {name: x.clone() for name, x in module.named_parameters()}
    files.round_to_half(module)
    for name, x in module.named_parameters():
        assert torch.equal(x != 0, before[name] != 0) and torch.equal(x, x.half().float())
        assert torch.equal(x.sign(), before[name].sign())
        torch.testing.assert_close(x, before[name], rtol=2**-11, atol=6e-8)
