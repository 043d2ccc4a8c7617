"""The whole of language steering on a model in which one direction writes French tokens: it is found, and its controls
do nothing. And the judges, on texts of which it is known what they are."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saes.sae import SAE
from saes.steering import baselines, language_steering
from saes.steering import sweep as sweeps
from saes.steering.evaluate import Unsteered, Written, bits, glance, judge, prompts, write
from saes.steering.language_steering import as_long, candidates, own_tokens
from saes.steering.languages import LANGUAGES
from saes.steering.parallel import corpus
from saes.steering.side_effects import bits_of_text, side_effects
from saes.steering.steer import Steering
from saes.steering.sweep import Sweep, Writing
from workbench import runs, texts
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.plots import figure, tables

HOOK = "blocks.2.hook_resid_post"
PLANTED = 7


@pytest.fixture(scope="module")
def french(tiny: LanguageModel) -> LanguageModel:
    """`tiny`, with the unembedding of tokens that occur in French alone raised along one direction."""
    module = copy.deepcopy(tiny._module)
    model = LanguageModel(module, tiny.tokenizer, name="french", fingerprint="french")
    ids = own_tokens(model, corpus("search"), "fr")
    head = module.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    head.weight[ids] += 1.5 * direction() / module.model.norm.weight.detach()
    return model


def direction() -> Tensor:
    x = torch.randn(32, generator=torch.Generator().manual_seed(11))
    return x / x.norm()


@pytest.fixture(scope="module")
def planted(tiny_sae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE after the last block, one of whose latents writes that direction; others the coordinates, either way."""
    W_dec = torch.cat([torch.eye(32), -torch.eye(32)])
    W_dec[PLANTED] = direction()
    folder = tmp_path_factory.mktemp("planted") / "sae"
    biases = {"b_enc": torch.zeros(64), "b_dec": torch.zeros(32), "about": {"hook_name": HOOK}}
    replace(SAE.load(tiny_sae), kind="standard", k=None, W_dec=W_dec, W_enc=W_dec.T.contiguous(), **biases).save(folder)
    return folder


def sweep(model: LanguageModel) -> Sweep:
    writing = Writing(model, prompts("validation")[:6], 5, 0.5, 0)
    return Sweep(writing, "fr", own_tokens(model, corpus("search"), "fr"), writing.unsteered())


def test_mass_is_that_of_the_softmax_and_the_planted_latent_has_all_of_it(french: LanguageModel, planted: Path) -> None:
    sae, tried = SAE.load(planted), sweep(french)
    strong = Steering(HOOK, 20.0, sae=sae, latent=PLANTED)
    by_hand = []
    for text in tried.writing.given:
        x = french.run(french.tokenize(text)[None], capture=[HOOK], logits="none")[HOOK][0, -1]
        by_hand.append(float(french.unembed(x + 20 * direction()).softmax(-1)[tried.ids].sum()))
    early = Steering("blocks.0.hook_resid_post", 2.0, direction=direction())
    controls = [Steering(HOOK, 20.0, sae=sae, latent=other) for other in (3, 20)]
    strong_one, early_one, none, *others = tried.masses([strong, early, strong.at(0.0), *controls])
    assert strong_one == pytest.approx(sum(by_hand) / 6, abs=1e-5) and strong_one > 0.9
    by_hand = []
    for text in tried.writing.given:
        edit = {early.hook: lambda x: torch.cat([x[:, :1], x[:, 1:] + 2 * direction()], 1)}
        logits = french.run(french.tokenize(text)[None], edit=edit, logits="last").logits
        assert logits is not None
        by_hand.append(float(logits[0, -1].softmax(-1)[tried.ids].sum()))
    assert early_one == pytest.approx(sum(by_hand) / 6, abs=1e-6) and abs(early_one - none) > 1e-4
    assert max(others) < none + 0.2 < 0.7


def test_the_sweep_writes_with_the_least_strength_that_does(french: LanguageModel, planted: Path) -> None:
    sae, tried = SAE.load(planted), sweep(french)
    steps = [Steering(HOOK, s, sae=sae, latent=i) for i in (3, PLANTED) for s in (1.0, 5.0, 20.0, 40.0)]
    found = tried.run("latent", steps, 2)
    cells = [cell for cell in found.cells if cell.decay == 1]
    assert [cell.mass for cell in cells] == pytest.approx([tried.masses([one])[0] for one in steps], abs=1e-6)
    written = [cell for cell in cells if cell.verdict is not None]
    assert len(written) == 2 and {cell.latent for cell in written} == {3, PLANTED}
    # Each is written with every decay as well, and the best of all is what comes of it, with its decay.
    ways = [(cell.latent, cell.strength, cell.decay) for cell in found.cells if cell.verdict is not None]
    assert ways == [(cell.latent, cell.strength, decay) for cell in written for decay in sweeps.DECAYS]
    for cell in found.cells:
        if cell.verdict is not None:
            one = next(one for one in steps if cell.is_of(one))
            (text,) = tried.writing.write([replace(one, decay=cell.decay)])
            assert sweeps.judge(text, "fr", tried.beside) == cell.verdict
    best = found.best(steps)
    assert (best.latent, best.strength) == (PLANTED, min(s.strength for s in written if s.latent == PLANTED))
    strict = {cell.decay: sweeps.rank(cell) for cell in found.cells if cell.is_of(best)}
    assert best.decay == max(strict, key=lambda decay: strict[decay])
    (mine,) = (cell for cell in written if cell.latent == PLANTED)
    most = max(cell.mass for cell in cells if cell.latent == PLANTED)
    enough = [cell.strength for cell in cells if cell.latent == PLANTED and cell.mass >= 0.9 * most]
    assert mine.strength == min(enough)


def test_around_the_best_other_strengths_and_decays_are_written_and_the_best_of_all_is_chosen(
    french: LanguageModel, planted: Path
) -> None:
    sae, tried = SAE.load(planted), sweep(french)
    steps = [Steering(HOOK, s, sae=sae, latent=i) for i in (3, PLANTED) for s in (1.0, 20.0)]
    first = tried.run("latent", steps, 4)
    best = max((cell for cell in first.cells if cell.verdict is not None), key=sweeps.rank)
    ways = first.around(steps, 1)
    assert {one.latent for one in ways} == {best.latent}
    finer = {(best.strength * f, d) for f in sweeps.FINER for d in sweeps.FINER_DECAYS}
    written = {(cell.strength, cell.decay) for cell in first.cells if cell.latent == best.latent}
    assert {(one.strength, one.decay) for one in ways} == finer - written and len(ways) == len(finer - written)
    assert len({one.latent for one in first.around(steps, 2)}) == 2
    cells, chosen = tried.choose("latent", steps, 4, 1)
    ranked = max(cells.cells, key=sweeps.rank)
    assert (chosen.latent, chosen.strength, chosen.decay) == (ranked.latent, ranked.strength, ranked.decay)
    assert len(cells.cells) == len(first.cells) + len(ways)
    (text,) = tried.writing.write([chosen])
    assert sweeps.judge(text, "fr", tried.beside) == ranked.verdict


def test_a_run_from_search_to_table(french: LanguageModel, planted: Path) -> None:
    run = runs.run(
        "language-steering",
        model=french,
        sae=str(planted),
        top=1,
        written=2,
        steps=5,
        n_validation=4,
        n_test=5,
        n_effects=3,
    )
    found = run.result
    assert {
        "latent",
        "DiffMean",
        "PCA",
        "probe",
        "random direction",
        "random latent",
        "prompting",
        "none",
    } <= found.table.keys()
    assert all(verdict.n == 5 for verdict in found.table.values())
    assert found.recipe.hook == HOOK and found.recipe.steering(SAE.load(planted)).latent == found.recipe.latent
    recipe = replace(found.recipe, decay=0.9, scope="generated", strength=2.5)
    again = recipe.steering(SAE.load(planted))
    assert all(getattr(again, name) == getattr(recipe, name) for name in ("decay", "scope", "strength", "unit", "kind"))
    assert found.detector > 0.95 and found.vocabulary > 10
    assert all(cell in found.cells for cell in found.front) and found.front
    assert set(found.effects) == set(LANGUAGES) and found.effects["fr"].plain > 0
    for name, some in found.layers.items():
        mine = [cell for cell in found.cells if cell.method == name and cell.verdict is not None]
        for hook, best in some.items():
            assert best.verdict is not None
            both = [
                (cell.verdict.strict or 0.0) + (cell.verdict.score or 0.0)
                for cell in mine
                if cell.hook == hook and cell.verdict
            ]
            assert (best.verdict.strict or 0.0) + (best.verdict.score or 0.0) == max(both)
    assert set(found.layers) == {"latent", "DiffMean", "PCA", "probe", "three latents"}
    verdicts, written = tables(found)
    assert set(verdicts.columns["method"]) == set(found.table) and len(written.columns["latent"]) == 5
    row = verdicts.columns["method"].index("DiffMean")
    assert verdicts.columns["strict success"][row].startswith(f"{found.table['DiffMean'].strict:.2f} (")
    assert written.columns["unsteered"] == [text for _, text in found.examples["none"]]
    bars = [trace for trace in figure(found).data if trace.type == "bar"]
    assert len(bars) == 3 and all(len(trace.x) == len(found.table) for trace in bars[:2])
    assert list(bars[2].x) == pytest.approx([one.ablated - one.plain for one in found.effects.values()])
    for given, message in (({"target": "en"}, "both en"), ({"target": "xx"}, "no language")):
        with pytest.raises(UserError, match=message):
            runs.run("language-steering", model=french, sae=str(planted), **given)


def test_the_sweep_writes_with_the_best_of_every_layer_first(french: LanguageModel, planted: Path) -> None:
    """Though two latents of the last layer both have more mass than any of the first."""
    sae, tried = SAE.load(planted), sweep(french)
    early = "blocks.0.hook_resid_post"
    some = [
        Steering(hook, 1.0, sae=sae, latent=i, direction=size * direction() if hook == HOOK else None)
        for hook, i, size in ((HOOK, PLANTED, 20.0), (HOOK, 9, 15.0), (early, 3, 0.0), (early, 4, 0.0))
    ]
    cells = [cell for cell in tried.run("latent", some, 2).cells if cell.decay == 1]
    masses = [cell.mass for cell in cells]
    assert masses[0] > masses[1] > 0.7 > max(masses[2:])
    assert [cell.verdict is not None for cell in cells[:2]] == [True, False]
    assert sum(cell.verdict is not None for cell in cells[2:]) == 1


def test_candidates_are_tried_as_long_as_the_mean_difference_and_the_best_of_each_layer_kept(
    french: LanguageModel, store: ActivationStore, planted: Path
) -> None:
    sae, some = SAE.load(planted), {name: rows[:12] for name, rows in corpus("search", ["en", "fr", "ru"]).items()}
    stats = language_steering.statistics(french, store, sae, some)
    length = baselines.directions(french, store, HOOK, some["fr"], some["en"])["DiffMean"].unit
    found = [as_long(one, length) for one in candidates(sae, stats, "fr", "en", 5)]
    assert len({one.latent for one in found}) == len(found) >= 5
    for one in found:
        assert float(one.change(torch.zeros(1, 32), torch.ones(1, 1)).norm()) == pytest.approx(length, rel=1e-4)
    early = [replace(one, hook="blocks.0.hook_resid_post") for one in found[:3]]
    tried = [*found, *early]
    masses = sweep(french).masses(tried)
    kept = sweep(french).look("latent", tried).most(tried, 2)
    assert [one.hook for one in kept] == [HOOK, HOOK, early[0].hook, early[0].hook]
    assert kept[0] is tried[masses.index(max(masses[: len(found)]))]
    twice = [one for short in found for one in (short.at(2 * short.strength), short)]
    both = sweep(french).look("latent", twice).most(twice, 2)
    assert len({one.latent for one in both}) == 2 and both[0].latent == kept[0].latent
    empty = replace(stats, sentences=torch.zeros_like(stats.sentences))
    with pytest.raises(UserError, match="no latent of the SAE"):
        candidates(sae, empty, "fr", "en", 5)


# ---- side effects ----


def test_bits_of_text_by_hand_and_nothing_at_strength_0(french: LanguageModel, planted: Path) -> None:
    sae = SAE.load(planted)
    some = corpus("test", ["fr"])["fr"][:5]
    total = 0.0
    for text in some:
        row = french.tokenize(text)
        logits = french.run(row[None]).logits
        assert logits is not None
        total += float(torch.nn.functional.cross_entropy(logits[0, :-1].double(), row[1:], reduction="sum"))
    plain = total / math.log(2) / len("".join(some).encode())
    assert bits_of_text(french, some) == pytest.approx(plain, rel=1e-5)
    one = Steering(HOOK, 0.0, sae=sae, latent=PLANTED)
    assert bits_of_text(french, some, one) == bits_of_text(french, some)


def test_a_latent_that_writes_french_changes_french(french: LanguageModel, planted: Path) -> None:
    """Added, it makes text of French tokens less surprising, and text of others more."""
    ids = own_tokens(french, corpus("search"), "fr").tolist()
    some = {"fr": [french.tokenizer.decode([i]) * 4 for i in ids], "ru": corpus("test")["ru"][:20]}
    one = Steering(HOOK, 2.0, sae=SAE.load(planted), latent=PLANTED)
    found = side_effects(french, one, some)
    assert found["fr"].steered < found["fr"].plain - 0.05 and found["ru"].steered > found["ru"].plain + 0.05
    away = replace(one, kind="ablate")
    assert found["ru"].ablated == bits_of_text(french, some["ru"], away) != found["ru"].plain


# ---- writing and judging ----


def test_texts_are_those_of_each_plan_and_prompt_alone(tiny: LanguageModel, tiny_sae: Path) -> None:
    sae = SAE.load(tiny_sae)
    given = prompts("validation")[:7]
    one = Steering(sae.hook, 3.0, sae=sae, latent=5)
    both = write(tiny, given, [None, one], 6)
    for plan, written in zip((None, one), both, strict=True):
        alone = [write(tiny, given, [plan], 6)[0].texts[i] for i in range(7)]
        assert list(written.texts) == alone and written.prompts == tuple(given)
    assert all(n == 0 for n in both[0].applied) and all(n > 5 for n in both[1].applied)
    assert both[0].texts != both[1].texts
    with pytest.raises(UserError, match="neither zero"):
        write(tiny, ["", "a"], [None], 2)


def test_unsteered_texts_are_two_draws_each_of_its_own_seed(tiny: LanguageModel) -> None:
    given = prompts("validation")[:4]
    beside = Unsteered.of(tiny, given, 6, temperature=0.7, seed=3)
    for written, seed in ((beside.written, 3), (beside.again, 4)):
        assert written == write(tiny, given, [None], 6, temperature=0.7, seed=seed)[0]
    assert beside.written.texts != beside.again.texts


def fake(some: list[str], given: list[str]) -> Written:
    return Written(tuple(given), tuple(some), tuple(tuple(range(30)) for _ in some), (0,) * len(some))


def test_verdicts_on_texts_that_are_known() -> None:
    """Translations of the unsteered texts succeed strictly; translations of others' texts only plainly."""
    rows = [
        row
        for row in map(json.loads, texts.PARALLEL.read_text(encoding="utf-8").splitlines())
        if row["split"] == "search"
    ]
    rows = [row for row in rows if len(row["fr"]) > 70][:30]
    english, french = ([row[language] for row in rows] for language in ("en", "fr"))
    beside = Unsteered(fake(english, english), fake(english, english))
    right = judge(fake(french, english), "fr", beside)
    wrong = judge(fake(french[7:] + french[:7], english), "fr", beside)
    assert right.plain == wrong.plain == 1 and right.strict is not None and wrong.strict is not None
    assert right.strict > 0.9 and wrong.strict < 0.75
    assert right.fidelity is not None and wrong.fidelity is not None and right.fidelity > wrong.fidelity + 0.3
    assert judge(fake(english, english), "fr", beside).plain < 0.1
    same = judge(fake(english, english), "en", beside)
    assert same.fidelity == pytest.approx(1, abs=0.02) and same.score == pytest.approx(1, abs=0.02)
    seen = glance(fake(french[:5] + english[:5], english[:10]), "fr")
    assert seen.plain == 0.5 and seen.labels == {"fr": 5, "en": 5}


def test_bits_per_byte_by_hand(tiny: LanguageModel) -> None:
    written = write(tiny, prompts("test")[:2], [None], 4)[0]
    total = 0.0
    for prompt, tokens in zip(written.prompts, written.tokens, strict=True):
        row = tiny.tokenize(prompt).tolist()
        for token in tokens:
            logits = tiny.run(torch.tensor([row]), logits="last").logits
            assert logits is not None
            total -= float(logits[0, -1].log_softmax(-1)[token]) / torch.log(torch.tensor(2.0)).item()
            row.append(token)
    assert bits(tiny, written) == pytest.approx(total / sum(len(text.encode()) for text in written.texts), rel=1e-4)


# ---- baselines ----


def test_directions_are_those_of_the_means(tiny: LanguageModel, store: ActivationStore) -> None:
    """DiffMean by hand; all of length 1 and pointing to the target; the probe tells the languages apart."""
    parallel = corpus("search", ["en", "ru"])
    ours, theirs = parallel["ru"][:40], parallel["en"][:40]
    found = baselines.directions(tiny, store, HOOK, ours, theirs)

    def tokens(some: list[str]) -> list[Tensor]:
        return [tiny.run(tiny.tokenize(t)[None], capture=[HOOK], logits="none")[HOOK][0, 1:] for t in some]

    mean = torch.cat(tokens(ours)).mean(0) - torch.cat(tokens(theirs)).mean(0)
    assert torch.allclose(found["DiffMean"].vector * found["DiffMean"].unit, mean, atol=1e-4)
    for one in found.values():
        assert float(one.vector.norm()) == pytest.approx(1, abs=1e-4) and float(one.vector @ mean) > 0
        assert one.unit == pytest.approx(float(mean.norm()), rel=1e-4)
    sides = [torch.stack([x.mean(0) for x in tokens(some)]) @ found["probe"].vector for some in (ours, theirs)]
    assert float((sides[0][:, None] > sides[1][None]).float().mean()) > 0.95


def test_several_latents_move_in_the_proportion_of_their_differences(
    tiny: LanguageModel, store: ActivationStore, tiny_sae: Path
) -> None:
    sae = SAE.load(tiny_sae)
    some = {name: rows[:15] for name, rows in corpus("search", ["en", "ru", "ja"]).items()}
    stats = language_steering.statistics(tiny, store, sae, some)
    found = baselines.several(sae, stats, "ru", "en", length=7.0)
    top = language_steering.scores(stats, "ru", "en")["monolinguality"].argsort(descending=True)[:3].tolist()
    alone = sum(
        language_steering.way(sae, stats, "ru", "en", one).change(torch.zeros(1, 32), torch.ones(1, 1)) for one in top
    )
    expected = 7 * torch.nn.functional.normalize(torch.as_tensor(alone), dim=-1)
    assert torch.allclose(found.change(torch.zeros(1, 32), torch.ones(1, 1)), expected, atol=1e-5)


def test_neurons_are_of_one_language_and_move_by_its_difference(tiny: LanguageModel) -> None:
    parallel = {name: some[:20] for name, some in corpus("search", ["en", "ru", "ja"]).items()}
    found = baselines.lape(tiny, parallel, "ru", "en")
    assert found and sum(int((one.vector != 0).sum()) for one in found) <= 0.03 * 3 * 64 + 1
    one = found[0]
    neuron = int(one.vector.abs().argmax())
    levels = {}
    for name, some in parallel.items():
        x = torch.cat(
            [tiny.run(tiny.tokenize(t)[None], capture=[one.hook], logits="none")[one.hook][0, 1:] for t in some]
        )
        levels[name] = (float(x[:, neuron].mean()), float((x[:, neuron] > 0).float().mean()))
    assert float(one.vector[neuron]) == pytest.approx(levels["ru"][0] - levels["en"][0], rel=1e-3)
    assert levels["ru"][1] == max(rate for _, rate in levels.values())


def test_controls_are_as_long_as_what_the_latent_adds(
    tiny: LanguageModel, store: ActivationStore, tiny_sae: Path
) -> None:
    sae = SAE.load(tiny_sae)
    stats = language_steering.statistics(
        tiny, store, sae, {n: s[:10] for n, s in corpus("search", ["en", "fr"]).items()}
    )
    best = Steering(sae.hook, 3.0, sae=sae, latent=4, unit=-1.7, scope="generated", decay=0.9)  # one taken away
    found = baselines.controls(best, stats, Steering(sae.hook, 1.0, sae=sae, latent=9, unit=2.0))
    added = best.change(torch.zeros(1, 32), torch.ones(1, 1))
    for plan in found.values():
        assert isinstance(plan, Steering)
        other = plan.change(torch.zeros(1, 32), torch.ones(1, 1))
        assert float(other.norm()) == pytest.approx(float(added.norm()), rel=1e-5)
        assert (plan.scope, plan.decay) == ("generated", 0.9)
    alike = found["random latent"]
    assert isinstance(alike, Steering) and alike.unit > 0  # added, as a latent is
    wrong = found["wrong language"]
    assert isinstance(wrong, Steering)
    assert float(wrong.change(torch.zeros(1, 32), torch.ones(1, 1))[0] @ sae.W_dec[9]) > 0
    assert baselines.instructed(["A"], "fr") == ["Le texte suivant est en français.\nA"]
