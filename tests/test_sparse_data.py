"""The training stream and its tokenizer: the same at every position, mixed as stated, nothing held out in training."""

from __future__ import annotations

import ast
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from circuits.sparse import data, tokenizer
from circuits.sparse.data import CHUNK, PIECE, TokenStream, train_tokenizer
from circuits.sparse.tokenizer import END
from workbench.errors import UserError


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer(1024, real=0.5, size=400_000)


@pytest.fixture(scope="module")
def generated(bpe: Tokenizer) -> TokenStream:
    return TokenStream(bpe, real=0.0)


@pytest.fixture(scope="module")
def mixed(bpe: Tokenizer) -> TokenStream:
    """Held out, because a twentieth of the library is quickly read."""
    return TokenStream(bpe, real=0.3, held_out=True)


def documents(bpe: Tokenizer, tokens: torch.Tensor) -> list[tuple[str, int]]:
    """The whole documents in a part of a stream, and how many tokens each has; the last may be cut and is left out."""
    starts = (tokens == bpe.token_to_id(END)).nonzero()[:, 0].tolist()
    return [(bpe.decode(tokens[at + 1 : end].tolist()), end - at) for at, end in pairwise(starts)]


def source(held_out: bool) -> str:
    return "\n\0".join(text for name, text in data.library().items() if data.held_out(name) == held_out)


# ---- tokenizer ----


@given(st.text())
def test_any_text_comes_back(bpe: Tokenizer, text: str) -> None:
    ids = bpe.encode(text).ids
    assert ids[0] == bpe.token_to_id(END) == 0
    assert bpe.decode(ids[1:], skip_special_tokens=False) == text


def test_real_source_comes_back_and_is_shorter(bpe: Tokenizer) -> None:
    for name in ("heapq.py", "json/decoder.py", "asyncio/tasks.py"):
        text = data.library()[name]
        ids = bpe.encode(text).ids
        assert bpe.decode(ids[1:]) == text
        assert len(ids) < len(text.encode()) / 2


def test_pieces_of_a_line(bpe: Tokenizer) -> None:
    lines = {
        '    v = ""\n': ["   ", " v", " =", ' "', '"', "\n"],
        "    v = set()\n": ["   ", " v", " =", " set", "()", "\n"],
        'print(f"total")\n': ["print", '(f"', "total", '")', "\n"],
        "x = ['r', 'a']\n": ["x", " =", " ['", "r", "',", " '", "a", "']", "\n"],
        "def f(a, b=None):\n": ["def", " f", "(", "a", ",", " b", "=None", "):", "\n"],
        "self.size += 12\n": ["self", ".size", " +=", " 12", "\n"],
        '"""A c"""\n': ['"""', "A", " c", '"""', "\n"],
        "open(input_file)\n\n": ["open", "(", "input", "_file", ")", "\n\n"],
    }
    for line, expected in lines.items():
        found = bpe.pre_tokenizer.pre_tokenize_str(line)
        assert [line[at:end] for _, (at, end) in found] == expected


def test_a_tokenizer_is_the_same_again_and_from_its_file(bpe: Tokenizer, tmp_path: Path) -> None:
    again = train_tokenizer(1024, real=0.5, size=400_000)
    assert again.to_str() == bpe.to_str()
    bpe.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).to_str() == bpe.to_str()


def test_bytes_must_fit() -> None:
    assert tokenizer.train([], tokenizer.SMALLEST).get_vocab_size() == tokenizer.SMALLEST
    with pytest.raises(UserError, match="vocab=256"):
        tokenizer.train([], 256)


# ---- the stream ----


def test_the_stream_depends_on_its_seed_alone(bpe: Tokenizer, generated: TokenStream) -> None:
    first = generated.read(0, 1000)
    assert torch.equal(first, TokenStream(bpe, real=0.0).read(0, 1000))
    for other in (TokenStream(bpe, real=0.0, seed=1), TokenStream(bpe, real=0.0, held_out=True)):
        assert not torch.equal(first, other.read(0, 1000))
    assert not torch.equal(first, generated.read(CHUNK, 1000))


def test_reading_anywhere_is_reading_from_the_start(bpe: Tokenizer, mixed: TokenStream) -> None:
    whole = mixed.read(0, 3 * CHUNK)
    assert len(whole) == 3 * CHUNK
    # Backwards too, across the ends of chunks, and in a stream that has read nothing before.
    for at, n in (
        (2 * CHUNK - 7, 100),
        (CHUNK - 1, 2),
        (0, 5),
        (CHUNK, 1),
        (CHUNK // 2, 2 * CHUNK),
        (2 * CHUNK, CHUNK),
    ):
        assert torch.equal(mixed.read(at, n), whole[at : at + n])
    assert torch.equal(TokenStream(bpe, real=0.3, held_out=True).read(2 * CHUNK + 11, 50), whole[2 * CHUNK + 11 :][:50])


def test_a_run_that_was_killed_goes_on_where_it_was(generated: TokenStream) -> None:
    uninterrupted = list(islice(generated.batches(3, 7001), 6))
    resumed = islice(generated.batches(3, 7001, start=2), 4)
    assert all(torch.equal(a, b) for a, b in zip(uninterrupted[2:], resumed, strict=True))
    assert torch.equal(torch.cat(uninterrupted).flatten(), generated.read(0, 6 * 3 * 7001))


def test_generated_documents_compile(bpe: Tokenizer, generated: TokenStream) -> None:
    found = documents(bpe, generated.read(0, CHUNK))
    for text, _ in found:
        ast.parse(text)
    assert len({text for text, _ in found}) > 0.95 * len(found) > 100


@pytest.mark.parametrize("real", [0.0, 0.3, 0.8, 1.0])
def test_the_share_of_real_source_is_as_stated_at_every_position(real: float, bpe: Tokenizer) -> None:
    text = source(held_out=True)
    tokens = TokenStream(bpe, real=real, held_out=True).read(0, CHUNK)
    n = n_real = 0
    for document, length in documents(bpe, tokens):
        n, n_real = (
            n + length,
            n_real + length * (document in text and len(document) > 40),
        )  # a shorter one may be in both
        assert abs(n_real - real * n) <= PIECE  # tokens, of which a piece has fewer than characters
    assert n > CHUNK - 3000


def test_files_held_out_are_in_no_training_stream(bpe: Tokenizer) -> None:
    names = [name for name in data.library() if data.held_out(name)]
    assert 0.02 < len(names) / len(data.library()) < 0.1
    kept, trained = source(held_out=True), source(held_out=False)
    for held_out, inside, outside in ((False, trained, kept), (True, kept, trained)):
        stream = TokenStream(bpe, real=1.0, held_out=held_out)
        found = [text for text, _ in documents(bpe, stream.read(0, 2 * CHUNK))]
        assert len(found) > 200
        assert all(text in inside for text in found)
        # The ends of files, and what one module copied from another, may be in both.
        assert sum(text in outside for text in set(found) if len(text) > 200) < 0.02 * len(set(found))


def test_fingerprint_tells_streams_apart(bpe: Tokenizer, generated: TokenStream, mixed: TokenStream) -> None:
    others = [
        TokenStream(bpe, real=0.0, seed=1),
        TokenStream(bpe, real=0.0, held_out=True),
        TokenStream(tokenizer.train(islice(data.programs(0), 100), 300), real=0.0),
        mixed,
        TokenStream(bpe, real=0.4, held_out=True),
    ]
    assert len({stream.fingerprint for stream in (generated, *others)}) == 6
    assert TokenStream(bpe, real=0.0).fingerprint == generated.fingerprint


def test_a_share_is_a_share(bpe: Tokenizer) -> None:
    for real in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="is not a share"):
            TokenStream(bpe, real=real)
        with pytest.raises(UserError, match="is not a share"):
            train_tokenizer(512, real=real)


def test_the_library_is_source_without_tests() -> None:
    names = list(data.library())
    assert "json/decoder.py" in names and len(names) > 300
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
