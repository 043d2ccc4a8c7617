"""The difference of means on the prompt, a latent on what follows: against plans written by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from saes.pretrained import load
from saes.steering.evaluate import Unsteered, Verdict, judge, prompts, write
from saes.steering.figures import hybrid_figure, hybrid_tables
from saes.steering.hybrid import DECAYS, HOLDS, OWN, STRENGTHS, TURNED, TURNS, LanguageHybrid, Way, language_hybrid
from saes.steering.language_steering import Recipe
from saes.steering.parallel import corpus
from saes.steering.steer import Steering
from saes.steering.sweep import Cell, rank
from workbench import runs
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel

SMALL: dict[str, Any] = {"top": 1, "written": 2, "steps": 5, "n_validation": 3, "n_test": 4, "n_effects": 2}


@pytest.fixture
def search(tiny: LanguageModel, tiny_sae: Path) -> runs.Run:
    return runs.run("language-steering", model=tiny, sae=str(tiny_sae), seed=3, **SMALL)


def test_it_is_what_its_plans_say(
    tiny: LanguageModel, tiny_sae: Path, store: ActivationStore, search: runs.Run
) -> None:
    found = language_hybrid(tiny, store, 3, found=search.id)
    result, recipe = search.result, search.result.recipe
    for name in ("latent", "DiffMean"):  # by the same chance they do what they did there
        assert found.table[name].summary() == result.table[name].summary()
        assert found.examples[name] == result.examples[name]
    assert len(found.tried) == len(TURNS) * len(HOLDS) * len(DECAYS)
    sums = [(way.verdict.strict or 0) + (way.verdict.score or 0) for way in found.tried]
    assert found.chosen == found.tried[sums.index(max(sums))]

    alone = max((cell for cell in result.cells if cell.method == "DiffMean"), key=rank)
    means = []
    for language in ("fr", "en"):
        rows = [
            tiny.run(tiny.tokenize(x)[None], capture=[alone.hook])[alone.hook][0, 1:]
            for x in corpus("search", [language])[language]
        ]
        means.append(torch.cat(rows).mean(0))
    turn = Steering(alone.hook, found.chosen.turn, direction=means[0] - means[1], scope="prompt")
    hold = replace(
        recipe.steering(load(str(tiny_sae))[recipe.hook]), strength=recipe.strength * found.chosen.hold,
        scope="generated", decay=found.chosen.decay,
    )  # fmt: skip
    given = prompts("test")[:4]
    beside = Unsteered.of(tiny, given, 5, temperature=0.5, seed=3)
    written = write(tiny, given, [(turn, hold), turn], 5, temperature=0.5, seed=3)
    for name, one in zip((TURNED, "then nothing"), written, strict=True):
        assert judge(one, "fr", beside, tiny).summary() == found.table[name].summary()
    assert (result.recipe, search.id) == (found.recipe, found.search)
    own_latents_are_what_they_say(tiny, tiny_sae, found)
    # every position but the first and the last, which is not read again, is steered by one of the two
    assert written[0].applied == tuple(len(tiny.tokenize(text)) - 1 + 4 for text in given)


def own_latents_are_what_they_say(tiny: LanguageModel, tiny_sae: Path, found: LanguageHybrid) -> None:
    """Means, parts and texts once more, with no store and none of the search's code."""
    hook, sae = found.recipe.hook, load(str(tiny_sae))[found.recipe.hook]
    latents, activations = [], []
    languages = corpus("search")
    for rows in languages.values():
        x = [tiny.run(tiny.tokenize(text)[None], capture=[hook])[hook][0, 1:] for text in rows]
        latents.append(torch.stack([sae.encode(one).mean(0) for one in x]).mean(0))
        activations.append(torch.stack([one.mean(0) for one in x]).mean(0))
    t, s = (list(languages).index(name) for name in ("fr", "en"))
    most = [max(range(len(latents)), key=lambda i: float(latents[i][z])) for z in range(sae.n_latents)]
    active = [z for z in range(sae.n_latents) if any(float(one[z]) > 0 for one in latents)]
    own = {name: [z for z in active if most[z] == i] for name, i in (("fr", t), ("en", s))}
    assert found.own == {name: len(some) for name, some in own.items()}
    whole = activations[t] - activations[s]
    written = sum((float(latents[t][z] - latents[s][z]) * sae.W_dec[z] for z in own["fr"] + own["en"]), torch.zeros(32))
    assert found.part == pytest.approx(float(written @ whole / whole.square().sum()), abs=1e-4)

    told = [cell for cell in found.cells if cell.verdict is not None]
    assert found.together == max(told, key=rank) and {cell.method for cell in found.cells} == {OWN}
    assert {cell.strength for cell in found.cells if cell.verdict is None} < set(STRENGTHS)
    strength, decay = found.together.strength, found.together.decay
    ways = [
        Steering(hook, strength, direction=one / one.norm(), unit=float(whole.norm()), decay=decay)
        for one in (written, whole - written)
    ]
    given = prompts("test")[:4]
    beside = Unsteered.of(tiny, given, 5, temperature=0.5, seed=3)
    for name, one in zip((OWN, "rest of DiffMean"), write(tiny, given, ways, 5, temperature=0.5, seed=3), strict=True):
        assert judge(one, "fr", beside, tiny).summary() == found.table[name].summary()
        assert found.examples[name] == tuple(zip(one.prompts, one.texts, strict=True))


def test_an_sae_without_latents_of_either_language_will_not_do(
    tiny: LanguageModel, store: ActivationStore, search: runs.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saes.steering.hybrid.owned", lambda stats, language: torch.zeros(64, dtype=torch.bool))
    with pytest.raises(UserError, match="is larger in fr or en than in any other language; search another SAE"):
        language_hybrid(tiny, store, 3, found=search.id)


def test_only_a_search_of_the_same_model_will_do(
    tiny: LanguageModel, smollm: LanguageModel, store: ActivationStore, search: runs.Run
) -> None:
    other = runs.run("eap", model=tiny, task="ioi", n=4)
    with pytest.raises(UserError, match="no run is named"):
        language_hybrid(tiny, store, 0)
    with pytest.raises(UserError, match=f"{other.id} is of eap; give the id of a run of language-steering"):
        language_hybrid(tiny, store, 0, found=other.id)
    with pytest.raises(UserError, match="with other weights than smollm2-135m; go on with it there"):
        language_hybrid(smollm, store, 0, found=search.id)


def test_a_search_whose_text_was_changed_will_not_do(
    tiny: LanguageModel, tiny_sae: Path, store: ActivationStore, few_sentences: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(Path(few_sentences).read_text())
    search = runs.run("language-steering", model=tiny, sae=str(tiny_sae), text=str(path), **SMALL)
    assert language_hybrid(tiny, store, 0, found=search.id).search == search.id
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    with pytest.raises(UserError, match=r"is not what it was when run language-steering-.* search again"):
        language_hybrid(tiny, store, 0, found=search.id)


def of(plain: float, strict: float) -> Verdict:
    return Verdict(10, plain, (plain / 2, 1.0), 1.0, 0.0, {}, strict=strict, strict_interval=(0.0, 1.0), score=0.5)


def test_the_picture_and_the_tables_by_hand() -> None:
    tried = tuple(Way(t, h, d, of(1.0, t * h * d / 10)) for t in (1.0, 2.0) for h in (1.0, 3.0) for d in (1.0, 0.5))
    recipe = Recipe("m", "s", "blocks.1.hook_resid_post", 3, 1.0, 1.0, "add", "all", 1.0, "fr", "en")
    table = {TURNED: of(0.9, 0.8), "latent": of(0.7, 0.2), "DiffMean": of(1.0, 0.4)}
    examples = {name: (("a prompt", f"text of {name}"),) for name in table}
    cells = tuple(
        Cell(OWN, recipe.hook, None, x, 0.5, of(1.0, x / 10) if x < 3 else None, decay)
        for decay in (0.9, 1.0)
        for x in (2.0, 1.0, 3.0)
    )
    found = LanguageHybrid(
        "a run", recipe, tried, tried[3], cells, cells[0], {"fr": 3, "en": 2}, 0.25, table, examples, "by hand"
    )
    assert found.summary()["chosen"] == {
        TURNED: {"turn": 1.0, "hold": 3.0, "decay": 0.5},
        OWN: {"strength": 2.0, "decay": 0.9},
    }
    assert found.summary()["validation"][OWN]["strict"] == 0.2
    drawn = hybrid_figure(found).data
    assert list(drawn[0].y) == ["latent", "DiffMean", TURNED] and list(drawn[1].x) == [0.2, 0.4, 0.8]
    own = {(one.line.dash, tuple(one.x)): list(one.y) for one in drawn if one.xaxis == "x3"}
    assert own == {(None, (1.0, 2.0)): [0.1, 0.2], ("dot", (1.0, 2.0)): [0.1, 0.2]}
    lines = {(one.name, one.line.dash): list(one.y) for one in drawn if one.xaxis == "x2"}
    assert lines[("turned × 2", None)] == pytest.approx([0.2, 0.6])
    assert lines[("turned × 2", "dot")] == pytest.approx([0.1, 0.3]) and len(lines) == 4
    assert [one.name for one in drawn[2:] if one.showlegend] == ["turned × 1", "turned × 2"]
    verdicts, texts = hybrid_tables(found)
    assert verdicts.columns["method"] == [TURNED, "DiffMean", "latent"]
    assert verdicts.columns["strict success"][0] == "0.80 (0.00 to 1.00)"
    assert texts.columns[TURNED] == [f"text of {TURNED}"]
