"""SAEs that come with the package are what their runs say, and fit the models that they are of."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from sae_lens import SAE as LensSAE

from saes.pretrained import DATA, fit, load, shipped
from saes.steering.hybrid import OWN, TURNED
from saes.steering.languages import LANGUAGES
from saes.steering.sweep import rank
from workbench import places, pretrained, runs, settings
from workbench.activations import ActivationStore
from workbench.comparing import newcombe
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
    assert (sae.hook, one.model) == (one.hook, run.record["model_name"])
    assert f"TopK, {sae.n_latents} latents, {sae.k} active, layer {one.hook.split('.')[1]} of" in one.about
    assert load(one.group)[one.hook].about == sae.about and one.model in pretrained.EMBEDDED
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
    assert found["l0"] == pytest.approx(sae.k, abs=0.1) and found["fvu"] < 0.4


def test_what_the_page_says_of_the_time_to_a_loss_is_what_was_measured() -> None:
    kept, page = json.loads((RESULTS / "sae-to-a-loss-cpu.json").read_text()), whole_page()
    longer = {name: one["wall"] for name, one in kept["times as long"].items()}
    assert f"SAELens takes {longer['saelens']:.1f} times as long" in page
    assert f"its sparse option {longer['saelens, sparse']:.1f} times" in page
    steps = kept["steps"]
    assert f"after {steps['saelens']} steps" in page and f"with ours {steps['ours']} steps do" in page
    assert longer["saelens"] * steps["ours"] / steps["saelens"] == pytest.approx(5, abs=0.25)  # a step
    left = kept["share of variance left"]
    assert max(left.values()) == left["goal"] == left["saelens"]
    assert (kept["latents"], kept["k"], kept["batch"], kept["threads"]) == (4608, 32, 2048, 2)


def test_what_the_page_says_of_whole_trainings_is_what_was_measured() -> None:
    page, kept = whole_page(), {}
    for name in ("3-4608", "15-4608", "3-18432"):
        kept[name] = json.loads((RESULTS / f"sae-run-{name}-cpu.json").read_text())
        fvu = kept[name]["held-out fvu"]
        assert fvu["ours"] <= fvu["saelens"] < fvu["ours"] + 0.04  # as much was learnt of the rows in less time
    first, deep, wide = (f"{one['times as long']['wall']:.1f}" for one in kept.values())
    assert f"{first} times as long at layer 3 and {deep} times at layer 15" in page
    assert f"with four times as many latents {wide} times at layer 3" in page
    a, b, c = (f"{one['times as long as passes alone']['ours']['wall']:.1f}" for one in kept.values())
    assert f"ours takes {a}, {b} and {c} times as long as the passes alone" in page
    assert {one["tokens"] // one["batch"] for one in kept.values()} == {29}


# ---- searches for a language ----


def searches(sae: str) -> list[str]:
    """Ids of those that come along, of a group of SAEs."""
    some = (path / "record.json" for path in (DATA / "runs").glob("language-steering-*"))
    given = {path.parent.name: json.loads(path.read_text())["key"]["parameters"]["sae"] for path in some}
    return sorted(id for id, name in given.items() if name == sae)


WIDE, NARROW = "gemma-3-270m", "gemma-3-270m-narrow"
SEARCHES = searches(WIDE)


@pytest.mark.parametrize("id", [*SEARCHES, *searches(NARROW)])
def test_a_search_is_of_the_saes_that_come_along_and_says_what_its_record_says(id: str) -> None:
    run = runs.get_run(id)
    assert run.result.summary() == run.summary
    recipe, contents = run.result.recipe, run.record["key"]["contents"]
    assert contents[recipe.sae] == places.behind(recipe.sae)  # a recipe is of no other SAE than it was found in
    kept = json.loads((RESULTS / f"steering-{recipe.sae}-cpu.json").read_text())["targets"][recipe.target]
    for name, verdict in run.result.table.items():
        assert kept["table"][name]["plain"] == pytest.approx(verdict.plain, abs=1e-3)
    assert kept["run"] == id and "def steered" in program(run.result, run)


Kept = dict[str, dict[str, Any]]  # by language


def measured(sae: str) -> tuple[Kept, dict[str, dict[str, float]]]:
    """Of each language, and the means of each method."""
    record = json.loads((RESULTS / f"steering-{sae}-cpu.json").read_text())
    return record["targets"], record["mean"]


def gaps(kept: Kept, key: str, of: str = "latent") -> dict[str, float]:
    """How far it is behind the difference of means."""
    return {target: one["table"]["DiffMean"][key] - one["table"][of][key] for target, one in kept.items()}


def apart(kept: Kept, of: str = "latent") -> dict[tuple[str, str], list[str]]:
    """Where the 95 % interval of the difference from the difference of means does not have 0 in it."""
    found = {}
    for target, one in kept.items():
        for key in ("plain", "strict"):
            ours, means = one["table"][of], one["table"]["DiffMean"]
            low, high = newcombe(ours[key], ours["n"], means[key], means["n"])
            if low > 0 or high < 0:
                found[target, key] = [f"{low:.2f}", f"{high:.2f}"]
    return found


def by_itself() -> dict[str, float]:
    kept = json.loads((RESULTS / "steering-native-gemma-3-270m-cpu.json").read_text())["languages"]
    return {language: one["clean"] for language, one in kept.items()}


@pytest.mark.parametrize("sae", [WIDE, NARROW])
def test_the_tables_of_searches_are_what_was_measured(sae: str) -> None:
    page, (kept, means), itself = whole_page(), measured(sae), by_itself()
    assert sorted(one["run"] for one in kept.values()) == searches(sae)
    assert means["latent"]["languages"] == len(kept) == 7
    for target, one in kept.items():
        table, recipe = one["table"], one["recipe"]
        keys = ("plain", "strict", "score", "clean")
        columns = [f"{table[name][key]:.2f}" for name in ("latent", "DiffMean") for key in keys]
        row = f"| {LANGUAGES[target]} | {recipe['hook'].split('.')[1]}, {recipe['latent']} | {' | '.join(columns)} |"
        assert f"{row} {itself[target]:.2f} |" in page
    for name, one in means.items():
        row = " | ".join(f"{one[key]:.3f}" for key in ("plain", "strict", "score"))
        assert name == "none" or f"| {name} | {row} |" in page, name


def test_what_the_page_says_of_wide_saes_is_what_was_measured() -> None:
    (kept, means), itself = measured(WIDE), by_itself()
    assert set(apart(kept)) == {("ru", "plain"), ("ru", "strict")}
    short = {target: round(one["table"]["latent"]["clean"] / itself[target], 1) for target, one in kept.items()}
    assert short == {"fr": 1.0, "zh": 1.0, "es": 0.8, "ja": 0.6, "de": 1.1, "it": 0.7, "ru": 0.6}
    behind = gaps(kept, "score").values()
    assert sum(gap > 0.01 for gap in behind) == 5 and min(behind) > -0.01
    assert all(gaps(kept, key)["ru"] > sum(gaps(kept, key).values()) / 2 for key in ("plain", "strict"))
    assert kept["ru"]["table"]["latent"]["labels"]["en"] == pytest.approx(60 / 3, abs=1)
    assert all(abs(means["PCA"][key] - means["DiffMean"][key]) < 0.03 for key in ("plain", "strict"))


# ---- hybrids, layers, heads ----


def shipped_runs(analysis: str) -> list[runs.Run]:
    found = [runs.get_run(path.name) for path in sorted((DATA / "runs").glob(f"{analysis}-*"))]
    assert found and all(run.result.summary() == run.summary for run in found)
    return found


def whole_page() -> str:
    return " ".join((Path(__file__).parents[1] / "docs" / "steering.md").read_text().split())


def test_what_the_page_says_of_hybrids_is_what_was_measured() -> None:
    page, found, keys = whole_page(), shipped_runs("language-hybrid"), ("plain", "strict", "score")
    assert sorted(run.summary["search"] for run in found) == searches(NARROW)
    tables = {run.summary["recipe"]["target"]: run.summary["table"] for run in found}
    for run in found:
        told, search = run.summary, runs.get_run(run.summary["search"])
        target, own = told["recipe"]["target"], told["own_latents"]
        assert told["recipe"] == search.summary["recipe"]
        columns = [f"{told['table'][name][key]:.2f}" for name in (TURNED, OWN, "DiffMean") for key in keys]
        columns += [f"{own[target]}, {own['en']}", f"{told['their_part_of_the_mean_difference']:.2f}"]
        assert f"| {LANGUAGES[target]} | {' | '.join(columns)} |" in page
        for name in ("latent", "DiffMean"):  # the same texts, but for rounding on another processor
            for key in keys:
                assert told["table"][name][key] == pytest.approx(search.summary["table"][name][key], abs=0.06)
    mean = {name: {key: fmean(one[name][key] for one in tables.values()) for key in keys} for name in tables["fr"]}
    for name, one in mean.items():
        assert f"| {name} | {' | '.join(f'{one[key]:.3f}' for key in keys)} |" in page
    more = {name: f"{mean[TURNED]['strict'] - one['strict']:.3f}" for name, one in mean.items()}
    assert (more["latent"], more["DiffMean"]) == ("0.091", "0.060") and "score (.706 and .708)" in page
    assert (more["then nothing"][:4], more["then DiffMean"][:4]) == ("0.10", "0.02")
    others = [one["strict"] for sae in (WIDE, NARROW) for one in measured(sae)[1].values() if one["strict"] is not None]
    assert mean[TURNED]["strict"] > max([one["strict"] for name, one in mean.items() if name != TURNED] + others)
    assert mean[TURNED]["plain"] > 0.95 and 0.8 - mean[TURNED]["strict"] == pytest.approx(0.03, abs=0.005)
    behind = {t: round(one["DiffMean"]["strict"] - one[TURNED]["strict"], 2) for t, one in tables.items()}
    assert {t: x for t, x in behind.items() if x >= 0} == {"it": 0.0, "es": 0.02, "de": 0.03}


def test_where_a_hybrid_is_better_or_worse_beyond_chance() -> None:
    tables = {run.summary["recipe"]["target"]: run.summary["table"] for run in shipped_runs("language-hybrid")}
    kept: Kept = {target: {"table": one} for target, one in tables.items()}
    assert apart(kept, TURNED) == {("zh", "plain"): ["-0.21", "-0.01"], ("zh", "strict"): ["-0.39", "-0.06"]}
    assert apart(kept, OWN) == {("ja", "plain"): ["0.03", "0.27"]} and gaps(kept, "plain", OWN)["ja"] > 0.149
    assert [f"{-gaps(kept, 'strict', OWN)[target]:.2f}" for target in ("fr", "ru")] == ["0.10", "0.07"]
    strict = [fmean(one[name]["strict"] for one in tables.values()) for name in (TURNED, "DiffMean")]
    assert [f"{abs(x):.2f}" for x in newcombe(strict[0], 420, strict[1], 420)] == ["0.12", "0.00"]
    chosen = [run.summary["validation"][TURNED]["strict"] for run in shipped_runs("language-hybrid")]
    means = [
        max((cell for cell in runs.get_run(id).result.cells if cell.method == "DiffMean"), key=rank).verdict
        for id in searches(NARROW)
    ]
    assert (f"{fmean(chosen):.2f}", f"{fmean(one.strict or 0.0 for one in means if one):.2f}") == ("0.80", "0.84")
    (french,) = (run for run in shipped_runs("language-hybrid") if run.summary["recipe"]["target"] == "fr")
    cells = runs.get_run(french.summary["search"]).result.cells
    assert max((cell for cell in cells if cell.method == "DiffMean"), key=rank).hook == "blocks.2.hook_resid_post"
    assert shipped_runs("language-layers")[0].summary["plain_strict_score"]["blocks.0.hook_resid_post"][1] == 0.92
    left = {target: one["rest of DiffMean"]["plain"] for target, one in tables.items()}
    assert {target for target, x in left.items() if x > 0.17} == {"fr", "it"} and left["fr"] > 0.8


def test_what_the_page_says_of_layers_is_what_was_measured() -> None:
    page, (run,) = whole_page(), shipped_runs("language-layers")
    curve, random = run.summary["plain_strict_score"], run.summary["random_direction"]
    for i, key in enumerate(("plain", "strict", "score")):
        assert f"| {key} | {' | '.join(f'{one[i]:.2f}' for one in curve.values())} |" in page
        assert max(one[i] for one in curve.values()) == curve["blocks.0.hook_resid_post"][i]
    strict = [one[1] for one in curve.values()]
    early, middle, late = (f".{100 * fmean(part):.0f}" for part in (strict[:11], strict[11:15], strict[15:]))
    assert f"strict success is {early} on average up to layer 10, {middle} up to 14 and {late} after that" in page
    assert sorted(one[1] for one in random.values())[-2:] == [0.0, 0.02]
    assert random["blocks.16.hook_resid_post"][0] == 0.58


def test_what_the_page_says_of_parts_of_the_mean_difference_is_what_was_measured() -> None:
    page, kept = whole_page(), json.loads((RESULTS / "steering-parts-gemma-3-270m-cpu.json").read_text())["saes"]
    part, wholes = {}, []
    for name, one in kept.items():
        group, hook = name.split()
        layer = int(hook.split(".")[1])
        row = [f"{best:.2f}" for _, best, _ in one["parts"].values()]
        assert f"| {layer} | {one['latents']}, {one['k']} | {' | '.join(row)} |" in page
        part[one["latents"], layer] = [best for _, best, _ in one["parts"].values()]
        wholes += [whole for _, _, whole in one["parts"].values()]
        assert (places.behind(group) is None) == (layer in (0, 3) and one["latents"] == 4096)  # which come along
    assert f".{100 * min(wholes):.0f} to .{100 * max(wholes):.0f}" in page
    assert max(x for (wide, layer), some in part.items() if wide == 4096 and layer < 11 for x in some) < 0.22
    together = {layer: [x > 0.45 for x in part[4096, layer]] for layer in (11, 13)}  # fr es zh ja de it ru
    assert [target for target, yes in zip(one["parts"], together[11], strict=True) if yes] == ["zh", "ru"]
    assert [target for target, yes in zip(one["parts"], together[13], strict=True) if yes] == ["fr", "es", "zh", "it"]
    times = [narrow / wide for narrow, wide in zip(part[128, 0], part[4096, 0], strict=True)]
    assert f"{int(min(times))} to {int(max(times))} times as much of it in one at layer 0" in page


def test_what_the_page_says_of_narrow_saes_is_what_was_measured() -> None:
    kept, means = measured(NARROW)
    behind = {key: means["DiffMean"][key] - means["latent"][key] for key in ("plain", "strict", "score")}
    assert [f"{gap:.3f}" for gap in behind.values()] == ["0.035", "0.031", "0.055"]
    score = gaps(kept, "score")
    assert (score["es"] + score["it"]) / sum(score.values()) == pytest.approx(0.8, abs=0.05)
    assert apart(kept) == {("es", "strict"): ["0.04", "0.29"], ("it", "strict"): ["0.00", "0.29"]}
    strict = {target: f"{gap:.2f}" for target, gap in gaps(kept, "strict").items() if abs(gap) > 0.02}
    assert strict == {"ja": "-0.13", "zh": "-0.07", "ru": "-0.05", "es": "0.17", "it": "0.15", "de": "0.13"}
    assert means["three latents"]["strict"] == pytest.approx(means["latent"]["strict"], abs=0.002)
    none = {
        target: {hook for hook, (*_, plain, _) in one["layers"]["PCA"].items() if not plain}
        for target, one in kept.items()
    }
    assert all("blocks.0.hook_resid_post" in some for some in none.values())
    assert {target for target, some in none.items() if len(some) == 3} == {"es", "it"}

    lost = {target: {name: x[1] - x[0] for name, x in one["effects"].items()} for target, one in kept.items()}
    missed = {target: one["ablated"] for target, one in kept.items()}
    own = set(kept) - {"fr"}
    assert all(min(lost[target], key=lost[target].__getitem__) == target for target in own)
    assert {target: f"{missed[target][target]:.2f}" for target in own} == {
        "ru": "2.07", "zh": "1.93", "ja": "1.62", "de": "0.12", "it": "0.08", "es": "0.06"
    }  # fmt: skip
    assert max(x for target in own for name, x in missed[target].items() if name != target) < 0.04
    assert max(lost["fr"], key=lost["fr"].__getitem__) == "en" and f"{lost['fr']['en']:.1f}" == "1.6"
    assert max(missed["fr"], key=missed["fr"].__getitem__) == "en" and f"{missed['fr']['en']:.3f}" == "0.005"
    assert kept["fr"]["recipe"]["unit"] < 0 < min(kept[target]["recipe"]["unit"] for target in own)

    wide, whole = measured(WIDE)
    less = [means["latent"][key] - whole["latent"][key] for key in ("plain", "strict", "score")]
    assert [f"{x:.2f}" for x in less] == ["0.10", "0.14", "0.09"]
    stricter = {t for t in kept if wide[t]["table"]["latent"]["strict"] > kept[t]["table"]["latent"]["strict"]}
    assert stricter == {"de"}


def test_what_the_page_says_of_heads_is_what_was_measured() -> None:
    page, (run,) = whole_page(), shipped_runs("language-heads")
    result, told = run.result, run.summary
    for (writer, contrast, beaten), (reader, carried) in zip(told["writers"], told["readers"], strict=True):
        share = f"{beaten:.0%}".replace("%", " %")
        assert f"| {writer} | {contrast:.0f} | {share} | {reader} | {carried:.3f} |" in page
    parts = result.writers.sum() + result.mlps.sum() + sum(result.rest.values())
    assert float(parts) == pytest.approx(result.whole, rel=1e-5) and f"{result.whole:.0f} larger" in page
    assert result.hook == "blocks.13.hook_resid_post" and f"{float(result.mlps[12:].sum()):.0f}" == "513"
    assert abs(float(result.writers.sum() - result.writers[13, 0])) < 10  # the other heads nearly cancel
    assert float(result.beaten[13, 0]) * 50 == pytest.approx(1)
    assert [f"{x:.3f}" for x in result.steered] == ["0.071", "0.002"]
