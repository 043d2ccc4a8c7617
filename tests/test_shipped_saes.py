"""SAEs that come with the package are what their runs say, and fit the models that they are of."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from sae_lens import SAE as LensSAE

from saes.pretrained import DATA, fit, load, shipped
from workbench import places, pretrained, runs, settings
from workbench.activations import ActivationStore
from workbench.models import LanguageModel
from workbench.standalone import program

RESULTS = Path(__file__).parent / "benchmarks" / "results"
PAGE = (Path(__file__).parents[1] / "docs" / "steering.md").read_text()


@pytest.fixture(autouse=True)
def runs_of_the_package() -> None:
    places.ship(DATA / "runs")


@pytest.mark.parametrize("name", shipped())
def test_a_name_is_an_sae_of_its_run(name: str) -> None:
    one = shipped()[name]
    run = runs.get_run(one.run)
    (sae,) = load(name).values()
    assert (sae.hook, sae.n_latents, one.model) == (one.hook, 4096, run.record["model_name"])
    assert load(one.model)[one.hook].about == sae.about and one.model in pretrained.EMBEDDED
    assert all(bool(x.isfinite().all()) for x in sae.tensors().values())
    size = (DATA / "runs" / one.run / "files" / one.hook / "sae_weights.safetensors").stat().st_size
    assert size <= 16e6
    found = run.result.quality[one.hook].summary()
    (row,) = re.findall(rf"^\| `{name}` \|(.+)\|$", PAGE, re.M)
    assert [cell.strip() for cell in row.split("|")] == [
        f"{found['l0']:.1f}", f"{found['fvu']:.3f}", f"{found['dead']:.1%}".replace("%", " %"),
        f"{found['loss']:.3f}", f"{found['spliced']:.3f}", f"{found['recovered']:.1%}".replace("%", " %"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", shipped())
def test_saelens_opens_it_with_equal_outputs(name: str) -> None:
    (sae,) = load(name).values()
    theirs = LensSAE.load_from_disk(DATA / "runs" / shipped()[name].run / "files" / sae.hook, dtype="float32")
    x = torch.randn(20, len(sae.b_dec), generator=torch.Generator().manual_seed(0)) * 30 + sae.b_dec
    torch.testing.assert_close(theirs(x), sae.decode(sae.encode(x)), rtol=1e-5, atol=1e-3)


def test_that_of_the_default_model_fits_it(smollm: LanguageModel, store: ActivationStore) -> None:
    """On everyday sentences in nine languages, which are no help pages."""
    (sae,) = load("smollm2-135m").values()
    found = fit(smollm, store, sae)
    assert found["l0"] == pytest.approx(32, abs=0.1) and found["fvu"] < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, one in shipped().items() if one.model == "gemma-3-270m"])
def test_those_of_gemma_fit_it(name: str, shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_HOME", str(shared_home))
    if "gemma-3-270m" not in settings.accepted_terms():
        pytest.skip("its terms are not accepted")
    (sae,) = load(name).values()
    found = fit(LanguageModel.load("gemma-3-270m"), None, sae)
    assert found["l0"] == pytest.approx(32, abs=0.1) and found["fvu"] < 0.4


# ---- searches for a language ----


SEARCHES = sorted(path.name for path in (DATA / "runs").glob("language-steering-*"))


@pytest.mark.parametrize("id", SEARCHES)
def test_a_search_is_of_the_saes_that_come_along_and_says_what_its_record_says(id: str) -> None:
    run = runs.get_run(id)
    assert run.result.summary() == run.summary
    recipe, contents = run.result.recipe, run.record["key"]["contents"]
    assert contents[recipe.sae] == places.behind(recipe.sae)  # a recipe is of no other SAE than it was found in
    kept = json.loads((RESULTS / "steering-gemma-3-270m-cpu.json").read_text())["targets"][recipe.target]
    for name, verdict in run.result.table.items():
        assert kept["table"][name]["plain"] == pytest.approx(verdict.plain, abs=1e-3)
    assert kept["run"] == id and "def steered" in program(run.result, run)


def test_what_the_page_says_of_the_searches_is_what_was_measured() -> None:
    page = " ".join((Path(__file__).parents[1] / "docs" / "steering.md").read_text().split())
    kept = json.loads((RESULTS / "steering-gemma-3-270m-cpu.json").read_text())
    itself = json.loads((RESULTS / "steering-native-gemma-3-270m-cpu.json").read_text())["languages"]
    short, scores = {}, {}
    for target, one in kept["targets"].items():
        table, recipe = one["table"], one["recipe"]
        keys = ("plain", "strict", "score", "clean")
        columns = [f"{table[name][key]:.2f}" for name in ("latent", "DiffMean") for key in keys]
        layer = recipe["hook"].split(".")[1]
        assert f"| {layer}, {recipe['latent']} | {' | '.join(columns)} | {itself[target]['clean']:.2f} |" in page
        for key in ("plain_interval", "strict_interval"):
            (low, high), (least, most) = table["latent"][key], table["DiffMean"][key]
            assert (low <= most and least <= high) == (target != "ru"), (target, key)
        scores[target] = table["latent"]["score"] - table["DiffMean"]["score"]
        short[target] = table["latent"]["clean"] / itself[target]["clean"]
    rounded = {target: round(x, 1) for target, x in short.items()}
    assert rounded == {"fr": 1.0, "zh": 1.0, "es": 0.8, "ja": 0.6, "de": 1.1, "it": 0.7, "ru": 0.6}
    assert sum(one < -0.01 for one in scores.values()) == 5 and max(scores.values()) < 0.01
    plain = {
        t: one["table"]["DiffMean"]["plain"] - one["table"]["latent"]["plain"] for t, one in kept["targets"].items()
    }
    strict = {
        t: one["table"]["DiffMean"]["strict"] - one["table"]["latent"]["strict"] for t, one in kept["targets"].items()
    }
    assert all(gap["ru"] > sum(gap.values()) / 2 for gap in (plain, strict))
    assert kept["targets"]["ru"]["table"]["latent"]["labels"]["en"] == pytest.approx(60 / 3, abs=1)
    for name, one in kept["mean"].items():
        row = " | ".join(f"{one[key]:.3f}" for key in ("plain", "strict", "score"))
        assert name == "none" or f"| {name} | {row} |" in page, name
        assert name != "PCA" or all(abs(one[key] - kept["mean"]["DiffMean"][key]) < 0.03 for key in ("plain", "strict"))
    assert kept["mean"]["latent"]["languages"] == len(kept["targets"]) == len(SEARCHES)
