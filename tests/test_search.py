"""Scores of latents: planted ones are found, sums are those of single passes, nothing is found on permuted labels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from saes.sae import SAE
from saes.steering import parallel, search
from saes.steering.search import SCORES, LanguageStats, auroc, scores, statistics, vanished
from workbench import runs
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel

LANGUAGES = ("en", "fr", "ja")
N, LATENTS = 40, 30


def planted(seed: int = 0) -> LanguageStats:
    """Latent 3 is French, 4 is Japanese, 5 is Japanese full stops, 6 is everything, the rest is noise."""
    generator = torch.Generator().manual_seed(seed)
    sentences = torch.rand(3, N, LATENTS, generator=generator) * (torch.rand(3, N, LATENTS, generator=generator) < 0.2)
    last = torch.rand(3, LATENTS, generator=generator) * 0.1
    bare = last + 0.01 * torch.rand(3, LATENTS, generator=generator)
    rate = 0.05 * torch.rand(3, LATENTS, generator=generator) + 0.01
    fired = rate * 5
    for latent, language in ((3, 1), (4, 2)):
        sentences[language, :, latent] += 2
        last[language, latent] = bare[language, latent] = 2.0
        rate[:, latent], rate[language, latent] = 0.001, 0.8
        fired[:, latent], fired[language, latent] = 0.01, 1.0
    last[2, 5] = 3.0  # and nothing without the full stop
    sentences[:, :, 6] += 2
    last[:, 6] = bare[:, 6] = 2.0
    rate[:, 6], fired[:, 6] = 0.8, 1.0
    noise = torch.full((LATENTS,), 0.02)
    noise[6] = 0.9
    dec = torch.linalg.qr(torch.randn(2 * LATENTS, LATENTS, generator=generator)).Q.T
    means = sentences.mean(1) @ dec  # each latent is a direction of its own, and nothing is left over
    return LanguageStats("blocks.1.hook_resid_post", LANGUAGES, last, bare, sentences, rate, fired, noise, means, dec)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("language", "latent"), [("fr", 3), ("ja", 4)])
def test_planted_latents_are_found(score: str, language: str, latent: int) -> None:
    stats = planted()
    found = scores(stats, language)[score]
    best = int(found.abs().argmax() if score == "difference" else found.argmax())
    if score == "difference" and language == "ja":
        assert best == 5  # the paper's score is taken in by the full stop
        assert vanished(stats, "ja", k=2) == 0.5 and vanished(stats, "fr", k=1) == 0
    else:
        assert best == latent


def test_nothing_is_found_on_permuted_labels() -> None:
    """Sentences of all languages shuffled: AUROC of all latents about one half, the planted ones too."""
    stats = planted()
    order = torch.randperm(3 * N, generator=torch.Generator().manual_seed(1))
    mixed = stats.sentences.flatten(0, 1)[order].view_as(stats.sentences)
    found = scores(replace(stats, sentences=mixed), "fr")
    assert float((found["auroc"] - 0.5).abs().max()) < 0.2 and float(found["effect"].abs().max()) < 0.8
    assert float(scores(stats, "fr")["auroc"][3]) > 0.99


def test_auroc_is_sklearns_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    own, others = (torch.randint(0, 4, (n, 12), generator=generator).float() for n in (17, 40))
    own[:, 0] = others[:, 0] = 0.0  # all equal
    labels = [1] * 17 + [0] * 40
    for column in range(12):
        expected = roc_auc_score(labels, torch.cat([own, others])[:, column].numpy())
        assert float(auroc(own, others)[column]) == pytest.approx(expected, abs=1e-6)


def test_statistics_are_means_over_the_models_own_activations(
    tiny: LanguageModel, store: ActivationStore, tiny_sae: Path
) -> None:
    sae = SAE.load(tiny_sae)
    rows = {"en": ["One day.", "Why not?"], "fr": ["Un jour.", "Pourquoi pas ?"]}
    stats = statistics(tiny, store, sae, rows)

    def latents(text: str) -> Tensor:
        x = tiny.run(tiny.tokenize(text)[None], capture=[sae.hook], logits="none")[sae.hook][0]
        return sae.encode(x)[1:]

    for i, texts in enumerate(rows.values()):
        z = [latents(text) for text in texts]
        assert torch.allclose(stats.last[i], (z[0][-1] + z[1][-1]) / 2, atol=1e-5)
        assert torch.allclose(stats.sentences[i, 1], z[1].mean(0), atol=1e-5)
        assert torch.allclose(stats.rate[i], (torch.cat(z) > 0).float().mean(0))
        assert torch.allclose(stats.fired[i], torch.stack([(one > 0).any(0) for one in z]).float().mean(0))
        x = [tiny.run(tiny.tokenize(text)[None], capture=[sae.hook], logits="none")[sae.hook][0, 1:] for text in texts]
        assert torch.allclose(stats.mean[i], (x[0].mean(0) + x[1].mean(0)) / 2, atol=1e-5)
    bare = (latents("Un jour")[-1] + latents("Pourquoi pas")[-1]) / 2
    assert torch.allclose(stats.bare[1], bare, atol=1e-5)
    made = [torch.stack([sae.decode(latents(text)).mean(0) for text in texts]).mean(0) for texts in rows.values()]
    between = stats.mean[1] - stats.mean[0]
    whole = (made[1] - made[0]) @ between / (between @ between)
    assert float(scores(stats, "fr")["diffmean"].sum()) == pytest.approx(float(whole), abs=1e-4)
    assert stats.noise.shape == (64,) and 0 < float(stats.noise.mean()) < 1
    search.prepare(tiny, store, [sae.hook, "blocks.2.hook_resid_post"], rows)
    before = store.stats().forward_passes
    for hook in (sae.hook, "blocks.2.hook_resid_post"):
        statistics(tiny, store, replace(sae, about={"hook_name": hook}), rows)
    assert store.stats().forward_passes == before


def test_means_of_a_transcoder_are_of_what_it_writes(
    tiny: LanguageModel, store: ActivationStore, tiny_sae: Path
) -> None:
    sae, hook_out = SAE.load(tiny_sae), "blocks.2.hook_mlp_out"
    about = {"hook_name": sae.hook, "hook_name_out": hook_out}
    stats = statistics(tiny, store, replace(sae, transcoder=True, subtract=False, about=about), {"en": ["One day."]})
    x = tiny.run(tiny.tokenize("One day.")[None], capture=[hook_out], logits="none")[hook_out]
    assert torch.allclose(stats.mean, x[:, 1:].mean(1), atol=1e-5)


def test_parts_of_the_difference_of_means_are_the_reconstructions() -> None:
    """Summed over latents they are how far the mean reconstruction goes towards the target, 1 where it is the mean;
    half as much where latents make half of it, and the other way round they are the same."""
    stats = planted()
    parts = scores(stats, "fr")["diffmean"]
    assert float(parts.sum()) == pytest.approx(1, abs=1e-5) and float(parts[3]) > 0.9
    assert torch.allclose(scores(stats, "en", "fr")["diffmean"], parts, atol=1e-6)
    assert torch.allclose(scores(replace(stats, mean=2 * stats.mean), "fr")["diffmean"], parts / 2, atol=1e-6)
    mixed = replace(stats, mean=stats.mean + torch.randn(2 * LATENTS))
    assert torch.allclose(scores(mixed, "fr")["diffmean"], parts, atol=1e-5)  # what all languages have is no one's


def test_the_corpus_is_parallel_and_its_parts_apart() -> None:
    parts = [parallel.corpus(part) for part in ("search", "validation", "test")]
    assert [len(part["en"]) for part in parts] == [210, 60, 90]
    assert not set(parts[0]["ja"]) & set(parts[2]["ja"])


def test_a_run(tiny: LanguageModel, tiny_sae: Path) -> None:
    found = runs.run("language-latents", model=tiny, sae=str(tiny_sae), targets="fr,ja").result
    assert found.scores.keys() == {"fr", "ja"} and found.overlap["fr"]["difference"] == 1
    row = found.scores["fr"][0]
    assert found.top("fr", "difference", 1) == [(int(row.abs().argmax()), float(row[row.abs().argmax()]))]
    assert found.top("ja", "auroc", 2)[0][1] == float(found.scores["ja"][3].max())


@pytest.mark.parametrize(
    ("given", "message"),
    [(("xx", "en"), "no language"), (("de", "en"), "no sentences in de"), (("en", "en"), "both en")],
)
def test_impossible_targets_are_sentences(given: tuple[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        scores(planted(), *given)


# ---- parallel text of one's own ----

ROWS = [
    ("One day.", "Un\u2028jour.", "Eines Tages."),
    ("Why not?", "Pourquoi pas ?", "Warum nicht?"),
    ("Yes.", "Oui.", "Ja."),
]


def written(folder: Path, kind: str) -> Path:
    """The same three rows in each format that is read."""
    names = ("en", "fr", "de")
    if kind == "flores":
        (folder / "flores").mkdir()
        for i, code in enumerate(("eng_Latn", "fra_Latn", "deu_Latn", "wol_Latn")):
            (folder / "flores" / f"{code}.dev").write_text("\n".join(row[i % 3] for row in ROWS))
        return folder / "flores"
    path = folder / {"jsonl": "rows.jsonl", "tsv": "rows.tsv", "tatoeba": "fra.txt"}[kind]
    lines = {
        "jsonl": [json.dumps({"id": 3, **dict(zip(names, row, strict=True))}) for row in ROWS],
        "tsv": ["\t".join(("topic", *names)), *("\t".join(("day", *row)) for row in ROWS)],
        "tatoeba": ["\t".join((*row[:2], "CC-BY 2.0 (France) ...")) for row in ROWS],
    }[kind]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("kind", ["flores", "jsonl", "tsv", "tatoeba"])
def test_parallel_text_is_read_in_each_format(kind: str, tmp_path: Path) -> None:
    found = parallel.sentences(str(written(tmp_path, kind)))
    expected = {"en": [row[0] for row in ROWS], "fr": [row[1] for row in ROWS], "de": [row[2] for row in ROWS]}
    assert found == {name: expected[name] for name in (("en", "fr") if kind == "tatoeba" else ("en", "fr", "de"))}


def test_two_files_of_one_language_are_no_choice_of_ours(tmp_path: Path) -> None:
    folder = written(tmp_path, "flores")
    (folder / "fra_Latn.devtest").write_text("Un autre jour.")
    with pytest.raises(UserError, match=r"fra_Latn\.dev and fra_Latn\.devtest are both in fr"):
        parallel.sentences(str(folder))


def test_latents_of_a_language_from_ones_own_sentences(tiny: LanguageModel, tiny_sae: Path, tmp_path: Path) -> None:
    path = str(written(tmp_path, "tatoeba"))
    run = runs.run("language-latents", model=tiny, sae=str(tiny_sae), targets="fr", text=path)
    assert "3 parallel sentences in 2 languages" in run.result.definition
    (tmp_path / "fra.txt").write_text("A day.\tUn jour.\nNo.\tNon.\n")
    again = runs.run("language-latents", model=tiny, sae=str(tiny_sae), targets="fr", text=path)
    assert again.id != run.id  # what is in the file is part of the key
    with pytest.raises(UserError, match="no sentences in ru"):
        runs.run("language-latents", model=tiny, sae=str(tiny_sae), targets="ru", text=path)
    with pytest.raises(UserError, match="has no sentences in de; it has en, fr"):
        runs.run("language-steering", model=tiny, sae=str(tiny_sae), target="de", text=path)
    with pytest.raises(UserError, match="has no sentences in de; it has en, fr"):
        runs.run("language-heads", model=tiny, sae=str(tiny_sae), target="de", text=path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"en": "a"}', "two languages are needed"),
        ("rows.jsonl", "{", "cannot be read as parallel text"),
        ("rows.tsv", "en\tfr\na\t\n", "has 0 rows with a sentence in each"),
        ("klingon.txt", "a\tb", "its name no language"),
        ("missing.jsonl", None, "cannot be read as parallel text"),
        ("rows.jsonl", "[1]", "no JSON object"),
    ],
)
def test_parallel_text_that_is_none_is_a_sentence(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        parallel.sentences(str(tmp_path / name))
    with pytest.raises(UserError, match="no parallel text"):
        parallel.sentences("paralel")
