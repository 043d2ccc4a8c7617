"""Measures of language on texts whose language is known, and on what identification alone is taken in by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from saes.steering import languages
from workbench import texts
from workbench.errors import UserError

CORPUS = [json.loads(line) for line in texts.PARALLEL.read_text(encoding="utf-8").splitlines()]
PROMPTS = [json.loads(line) for line in texts.PARALLEL.with_name("prompts.jsonl").read_text().splitlines()]


def test_the_corpus_is_what_it_says() -> None:
    parts = {
        part: {row["topic"] for row in CORPUS if row["split"] == part} for part in ("search", "validation", "test")
    }
    assert [len(parts[part]) for part in parts] == [14, 4, 6] and len(CORPUS) == 360
    assert len(set.union(*parts.values())) == 24  # no topic is in two parts
    for language in languages.LANGUAGES:
        assert len({row[language] for row in CORPUS}) == 360
        pure = [languages.script(row[language], language) for row in CORPUS]
        assert sum(pure) / len(pure) > 0.99
    counts = {part: sum(row["split"] == part for row in PROMPTS) for part in ("validation", "test")}
    assert counts == {"validation": 50, "test": 110} and len({row["text"] for row in PROMPTS}) == 160
    assert all(languages.identify(row["text"])[0] == "en" or len(row["text"]) < 30 for row in PROMPTS)


@pytest.mark.parametrize("language", languages.LANGUAGES)
def test_sentences_are_identified(language: str) -> None:
    """Two together, as long as what is judged: short Chinese alone is often taken for Japanese."""
    rows = [row[language] for row in CORPUS]
    joined = [f"{a}\n{b}" for a, b in zip(rows[::2], rows[1::2], strict=True)]
    right = sum(languages.identify(text)[0] == language for text in joined) / len(joined)
    assert right > 0.97
    assert sum(languages.sentences(text, language) > 0.5 for text in joined) / len(joined) > 0.9
    other = "en" if language != "en" else "fr"
    assert sum(languages.sentences(text, other) < 0.2 for text in joined) / len(joined) > 0.95


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("の" * 10, "ja"),
        ("的 的 的 的 的 的 的 的 的 的 的 的", "zh"),
        ("コンピューター makes it possible for 人間 to do things better and faster", "ja"),
    ],
)
def test_what_takes_in_identification_does_not_pass_strictly(text: str, language: str) -> None:
    assert languages.identify(text)[0] == language
    tokens = [hash(c) for c in text]
    assert not languages.is_in(text, language, tokens)


def test_a_good_text_passes_strictly() -> None:
    for row in CORPUS[:40]:
        for language in ("fr", "de", "ru", "ja"):
            text = row[language]
            if len(text) > (30 if language == "ja" else 60):
                assert languages.is_in(text, language, list(range(30))), text


def test_shares_by_hand() -> None:
    assert languages.script("abc あ", "ja") == 0.25 and languages.script("12 !", "ja") == 0
    assert languages.script("Жук a", "ru") == 0.75 and languages.script("été ß", "de") == 1
    assert languages.script("漢字", "zh") == 1 and languages.script("漢かナ", "zh") == pytest.approx(1 / 3)
    assert languages.repetition([1, 2, 1, 2, 1, 2]) == pytest.approx(1 - 2 / 5)
    assert languages.repetition([1, 2, 3]) == languages.repetition([1]) == languages.repetition([]) == 0
    half = "This is a sentence in plain English. C’est une phrase en français courant."
    letters = [
        sum(map(str.isalpha, part)) for part in ("ThisisasentenceinplainEnglish", "Cestunephraseenfrançaiscourant")
    ]
    assert languages.sentences(half, "fr") == pytest.approx(letters[1] / sum(letters))
    assert languages.identify("123 ...") == ("", 0.0)
    assert languages.harmonic(0.5, 1.0) == pytest.approx(2 / 3) and languages.harmonic(0.0, 1.0) == 0


def test_wilson_by_hand_and_against_a_simulation() -> None:
    low, high = languages.wilson(9, 10)
    assert (low, high) == (pytest.approx(0.5958, abs=1e-3), pytest.approx(0.9821, abs=1e-3))
    assert languages.wilson(0, 20)[0] == 0 and languages.wilson(20, 20)[1] == pytest.approx(1)
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for successes in torch.binomial(torch.full((2000,), 50.0), torch.full((2000,), 0.9), generator=generator).tolist():
        low, high = languages.wilson(int(successes), 50)
        covered += low <= 0.9 <= high
    assert 0.93 < covered / 2000 < 0.975
    with pytest.raises(UserError, match="no share"):
        languages.wilson(0, 0)


def test_translations_are_more_alike_than_others() -> None:
    rows = [row for row in CORPUS if row["split"] == "test"][:30]
    for language in ("fr", "zh"):
        own, floor = languages.similarity([row[language] for row in rows], [row["en"] for row in rows])
        cosine = languages.embed([row[language] for row in rows]) @ languages.embed([row["en"] for row in rows]).T
        others = [float(torch.cat([line[:i], line[i + 1 :]]).mean()) for i, line in enumerate(cosine)]
        assert floor.tolist() == pytest.approx(others, abs=1e-5) and own.tolist() == cosine.diagonal().tolist()
        assert float((own > floor).float().mean()) > 0.95 and float((own - floor).mean()) > 0.05
    same, floor = languages.similarity(["Good morning!", "The cat sleeps."], ["Good morning!", "The cat sleeps."])
    assert torch.allclose(same, torch.ones(2), atol=1e-3) and float(floor.max()) < 0.95
    for name, message in (("./no-such-encoder", "there is no folder"), ("labs", "did you mean")):
        with pytest.raises(UserError, match=message):
            languages.embed(["a"], name)
    with pytest.raises(UserError, match="at least 2 of each"):
        languages.similarity(["a"], ["b"])
    with pytest.raises(UserError, match="did you mean"):
        languages.check("frr")


def test_vectors_are_kept_and_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    some = ["one", "two", "three", "two"]
    first = languages.embed(some)
    monkeypatch.setattr(languages, "KEPT", 4)
    languages._vectors.clear()
    for _ in range(2):
        assert torch.equal(languages.embed(some), first)
    assert torch.equal(languages.embed(["four", "two"])[1], first[1]) and len(languages._vectors) <= 4
    assert torch.equal(languages.embed(["five", "one"])[1], first[0]) and len(languages._vectors) <= 4


def test_an_encoder_of_ones_own_folder(tmp_path: Path) -> None:
    """A random BERT: its pooled first token, of length 1, whatever stands beside the text."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "morning", "cats", "sleep"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    module = BertModel(config).eval()
    module.save_pretrained(tmp_path)
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    some = ["good morning", "cats", "good cats sleep", "cats"]
    found = languages.embed(some, str(tmp_path))
    ids = torch.tensor([[2, 5, 7, 8, 3]])
    with torch.no_grad():
        expected = torch.nn.functional.normalize(module(ids).pooler_output, dim=-1)
    assert torch.allclose(found[2], expected[0], atol=1e-5) and torch.equal(found[1], found[3])
    own, _ = languages.similarity(some[:3], some[1:], str(tmp_path))
    assert own.tolist() == pytest.approx((found[:3] * found[1:]).sum(-1).tolist(), abs=1e-5)
