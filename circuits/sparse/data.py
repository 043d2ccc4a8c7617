"""The training stream: generated programs and real Python source, mixed by the token, the same at every position.

The generated programs are those of `workbench.tasks.python_code.grammar`. The real source is the running interpreter's
own library, so that nothing is downloaded: without tests, packages installed beside it and tables of data. One file in
twenty is held out whole, by a checksum of its name; generated programs of the held-out stream have seeds of their own.

The stream has no end. It is written in chunks, each from a seed that names it: any position can be read without what
lies before it, so a killed training goes on at the token where it was. Within a chunk the next document is always of
the kind that falls short of its share, so the share holds everywhere, to within one piece of real source.

Gao et al. 2025, appendix A.6, train on 10 billion tokens of very simple Python and 25 billion of ordinary Python, both
written by a language model and not released; this is what can be had in their place.
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

from circuits.sparse import tokenizer as bpe
from workbench.errors import UserError
from workbench.tasks.python_code.grammar import program

CHUNK = 1 << 15  # tokens
PIECE = 768  # characters of real source in a row, about as many tokens as two programs have
BATCH = 32  # documents that are encoded at once
# Tests, tables of data, and what is installed beside the library or was only generated.
LEFT_OUT = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3", "turtledemo",
    "__pycache__",
}  # fmt: skip


@cache
def library() -> dict[str, str]:
    """Files of the interpreter's library by name, relative and with `/`. Raises UserError where there are none."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not LEFT_OUT & set(name.parts):
            with tokenize.open(path) as file:  # in the encoding that the file declares
                found[name.as_posix()] = file.read()
    if not found:
        raise UserError(f"{root} holds no Python source; this interpreter came without its library, use real=0.")
    return {name: text for name, text in found.items() if text.strip()}


def held_out(name: str) -> bool:
    """Whether a file of the library is kept from training."""
    return zlib.crc32(name.encode()) % 20 == 0


def programs(seed: int | str) -> Iterator[str]:
    """Generated programs without end."""
    rng = random.Random(f"programs/{seed}")
    while True:
        yield program(rng)


def train_tokenizer(vocab: int, *, real: float = 0.5, size: int = 4_000_000, seed: int = 0) -> Tokenizer:
    """A tokenizer for the stream, trained on `size` characters of it, `real` of them real source.

    With half of them real, 1,024 tokens hold every word of the binary tasks; with 512, train it on generated programs
    alone (`real=0.0`), or some tasks' prompts are refused because their two classes differ in length.
    """
    _check(real)
    return bpe.train(_sample_texts(real, size, seed), vocab)


class TokenStream:
    """Tokens without end, by position.

    tokenizer  as `train_tokenizer` makes it
    seed       another seed, another stream
    real       share of the tokens that are real source
    held_out   only files that no training stream reads, and programs of other seeds

    Raises UserError if `real` is not a share.
    """

    def __init__(self, tokenizer: Tokenizer, *, seed: int = 0, real: float = 0.5, held_out: bool = False):
        _check(real)
        self.tokenizer = tokenizer
        self.seed = seed
        self.real = real
        self.held_out = held_out
        self._pieces = _pieces(held_out) if real else []
        self._chunk: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.long))

    @property
    def fingerprint(self) -> str:
        """Changes with whatever changes the stream: tokenizer, library, grammar, seed, share. To check on resuming."""
        digest = hashlib.sha256(repr((self.seed, self.real, self.held_out, CHUNK, PIECE)).encode())
        digest.update(self.tokenizer.to_str().encode())
        digest.update("".join(islice(programs(0), 100)).encode())
        for piece in self._pieces:
            digest.update(piece.encode())
        return digest.hexdigest()[:16]

    def chunk(self, number: int) -> Int[Tensor, " pos"]:
        """CHUNK tokens from position number * CHUNK on."""
        key = f"{self.held_out}/{self.seed}/{number}"
        written, found = self._encoded(programs(key)), self._encoded(self._drawn(key))
        tokens: list[int] = []
        n_real = 0
        while len(tokens) < CHUNK:
            if n_real < self.real * (len(tokens) + 1):
                document = next(found)
                n_real += len(document)
            else:
                document = next(written)
            tokens += document
        return torch.tensor(tokens[:CHUNK])

    def read(self, position: int, n: int) -> Int[Tensor, " pos"]:
        """n tokens from a position on."""
        parts = []
        while n > 0:
            number, at = divmod(position, CHUNK)
            if self._chunk[0] != number:
                self._chunk = (number, self.chunk(number))
            parts.append(self._chunk[1][at : at + n])
            position, n = position + len(parts[-1]), n - len(parts[-1])
        return torch.cat(parts)

    def batches(self, batch: int, length: int, *, start: int = 0) -> Iterator[Int[Tensor, "batch pos"]]:
        """Batches in the stream's order, from batch number `start` on: what a run that was killed goes on with."""
        while True:
            yield self.read(start * batch * length, batch * length).view(batch, length)
            start += 1

    def _drawn(self, key: str) -> Iterator[str]:
        """Pieces of real source, each as likely as any other."""
        rng = random.Random(f"pieces/{key}")
        while True:
            yield rng.choice(self._pieces)

    def _encoded(self, texts: Iterator[str]) -> Iterator[list[int]]:
        while True:
            for encoded in self.tokenizer.encode_batch_fast(list(islice(texts, BATCH))):
                yield encoded.ids


def _pieces(of_held_out: bool) -> list[str]:
    """The library in pieces of whole lines, at most PIECE characters each unless one line is longer."""
    found = []
    for text in (text for name, text in library().items() if held_out(name) == of_held_out):
        piece = ""
        for line in text.splitlines(keepends=True):
            if piece and len(piece) + len(line) > PIECE:
                found.append(piece)
                piece = ""
            piece += line
        found.append(piece)
    return found


def _sample_texts(real: float, size: int, seed: int) -> Iterator[str]:
    """Training files in a random order and generated programs, `real` of `size` characters from the files."""
    rng = random.Random(f"tokenizer/{seed}")
    if real:
        files = [text for name, text in library().items() if not held_out(name)]
        rng.shuffle(files)
        left = int(real * size)
        for text in files:
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break
    left = int((1 - real) * size)
    for text in programs(f"tokenizer/{seed}"):
        if left <= 0:
            return
        yield text
        left -= len(text)


def _check(real: float) -> None:
    if not 0 <= real <= 1:
        raise UserError(f"real={real:g} is not a share of the tokens; it is between 0 and 1.")
