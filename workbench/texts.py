"""Texts that models are run on, by name: what SAEs are trained on, and what latents are looked up in.

    libreoffice-help     help pages of LibreOffice 7.4 in nine languages, in equal parts (MPL-2.0; 28 MB from Debian)
    libreoffice-help:fr,ja   of some of them
    parallel             the everyday sentences that come with the workbench, of its "search" part
    ./folder, ./a.txt, ./a.jsonl   a document per file, or per line {"text": ...} with an optional "language"

Nothing is shipped of the first: the pinned packages are fetched once, checked by their digests, and their text is kept
under WORKBENCH_HOME. A text has a fingerprint of all its documents, which is part of the key of every run on it.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import lzma
import os
import random
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from workbench import settings
from workbench.errors import UserError, unknown
from workbench.models import LanguageModel

log = logging.getLogger(__name__)
PARALLEL = Path(__file__).parent / "data" / "parallel.jsonl"
HELP = "libreoffice-help"
POOL = "http://deb.debian.org/debian/pool/main/libr/libreoffice/libreoffice-help-{}_7.4.7-1+deb12u14_all.deb"
# The package's name for each language, and the digest of the package.
PACKAGES = {
    "en": ("en-us", "8faa840285734d6cfe1ed25537b48f07e74bd6412e3917bf8e5f8a653f7b3712"),
    "fr": ("fr", "c796530d3e95af1ea4d054076682efc8aad2b569ae9513f3d4a776b2df3fd206"),
    "es": ("es", "9128a84d83d92c8b1c618d90469d16affddb7d1290b09d42a0c5109cb16f0480"),
    "de": ("de", "00490b63c509ac96f7f212d6a6e40452d3e0d1f97ccf4b824dd5ec4c01e8277f"),
    "it": ("it", "7fa29342a302bb495981fdabf98f3a9c3628123f3f191b2a5c95cb583c9ff212"),
    "pt": ("pt-br", "600d4294e52a6534be923521aff7b1b9eb7e6ddb7e30b2598ad04b2fe9cf8278"),
    "ja": ("ja", "7799ace9bfe0845771ed2499913e7f7e521318cf3727c007672e3b020f8eb7b9"),
    "zh": ("zh-cn", "db867cdece4c2f9c7eebe65e519c6cf386fdcf49d6e061db3dffec893b3e1dee"),
    "ru": ("ru", "5a2f75d5b0dfcf660275070647af528a81be28b5d3e9c3ec2d419ef5518db7a2"),
}
PATHS = (".", "/", "~")
HELD_OUT = 16  # one document in so many is held out


@dataclass(frozen=True)
class Document:
    text: str
    language: str = ""


@dataclass(frozen=True)
class Text:
    """Documents in an order of their own, and a digest of them."""

    name: str
    documents: tuple[Document, ...]

    @property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for one in self.documents:
            digest.update(f"{len(one.text)}/{one.language}/{one.text}".encode())
        return digest.hexdigest()

    def part(self, held_out: bool) -> Text:
        """The documents that are held out, or the others. A document's digest says where it belongs."""

        def out(one: Document) -> bool:
            return hashlib.sha256(one.text.encode()).digest()[0] % HELD_OUT == 0

        return Text(self.name, tuple(one for one in self.documents if out(one) == held_out))


def load(name: str) -> Text:
    """A text by name. Raises UserError for an unknown one, an empty one, and what cannot be fetched or read."""
    return _load(name, digest(name))


@lru_cache(maxsize=2)
def _load(name: str, _digest: str | None) -> Text:
    base, _, argument = name.partition(":")
    if base == HELP:
        languages = [one.strip() for one in argument.split(",")] if argument else list(PACKAGES)
        for one in languages:
            if one not in PACKAGES:
                raise unknown(f"language of {HELP}", one, PACKAGES)
        documents = list(_in_turn([_pages(one) for one in languages]))
    elif name == "parallel":
        rows = [row for row in _lines(PARALLEL) if row["split"] == "search"]
        documents = [Document(row[one], one) for row in rows for one in PACKAGES]
    elif name.startswith(PATHS):
        documents = list(_files(Path(name).expanduser()))
    else:
        raise unknown("text", name, [HELP, "parallel", "./file.txt"])
    documents = [one for one in documents if one.text.strip()]
    if not documents:
        raise UserError(f"{name} holds no text.")
    return Text(name, tuple(documents))


def digest(name: str) -> str | None:
    """What decides the documents of a name, or all that is in a file or folder, without fetching or parsing anything;
    None if it names nothing that is here, or a model, which has a fingerprint of its own."""
    found = hashlib.blake2b(digest_size=16)
    if name.partition(":")[0] == HELP:
        found.update(json.dumps([name, PACKAGES]).encode())
        return found.hexdigest()
    place = name if name.startswith(PATHS) else name.partition(":")[2]  # of `sae:./folder`
    path = PARALLEL if name == "parallel" else Path(place).expanduser()
    if (not place.startswith(PATHS) and path is not PARALLEL) or not path.exists():
        return None
    if (path / "config.json").is_file():
        return None  # a model
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    for one in files:
        found.update(one.name.encode() + one.read_bytes())
    return found.hexdigest()


def sequences(
    text: Text, model: LanguageModel, length: int, tokens: int | None = None, seed: int = 0
) -> list[Int[Tensor, " pos"]]:
    """Documents in shuffled order as token ids, cut into sequences of `length`, each with the special tokens that begin
    a text of this model; so many tokens in all, or all there are. What is left at the end of a document is left out:
    sequences of one length run together, and nothing is ever padded.

    Raises UserError if there are fewer tokens.
    """
    start = model.tokenize("")
    room = length - len(start)
    if room < 1:
        raise UserError(f"length={length} leaves no room for text; give at least {len(start) + 1}.")
    order = list(text.documents)
    random.Random(f"{text.name}/{seed}").shuffle(order)
    found: list[Tensor] = []
    total = 0
    for one in order:
        ids = torch.tensor(model.token_ids(one.text), dtype=torch.long)
        for part in ids.split(room):
            if len(part) == room:
                found.append(torch.cat([start, part]))
                total += len(found[-1])
        if tokens is not None and total >= tokens:
            return found
    if tokens is not None:
        raise UserError(
            f"{text.name} has {total:,} tokens of {model.name} in sequences of {length}, and {tokens:,} were asked "
            "for; ask for fewer, or give more text."
        )
    return found


# ---- readers ----


def _in_turn(parts: Sequence[Sequence[Document]]) -> Iterator[Document]:
    """One of each, as long as all have some: equal parts."""
    for row in zip(*parts, strict=False):
        yield from row


def _lines(path: Path) -> Iterator[dict[str, str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}, is not JSON ({error}).") from error


def _files(path: Path) -> Iterator[Document]:
    if not path.exists():
        raise UserError(f"{path} does not exist; give a text file, a .jsonl file or a folder of text files.")
    paths = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    for one in paths:
        try:
            if one.suffix == ".jsonl":
                for number, row in enumerate(_lines(one), 1):
                    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                        raise UserError(f'{one}, line {number}, has no "text".')
                    yield Document(row["text"], str(row.get("language", "")))
            else:
                yield Document(one.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{one} is not UTF-8 text ({error}).") from error


def _pages(language: str) -> list[Document]:
    """The help pages in a language, in the order of their names, which is the same in all."""
    path = settings.home() / "texts" / f"{HELP}-{language}.jsonl"
    if not path.exists():
        package, digest = PACKAGES[language]
        pages = _once(sorted(_unpacked(_fetched(POOL.format(package), digest))))
        settings.writable_folder(path.parent)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in pages), "utf-8")
        os.replace(aside, path)
    return [Document(row["text"], language) for row in _lines(path)]


def _once(pages: Iterable[tuple[str, list[str]]]) -> Iterator[str]:
    """Pages without what an earlier one had: many share their notes. Empty ones stay, to keep languages in step."""
    seen: set[str] = set()
    for _, paragraphs in pages:
        fresh = [one for one in paragraphs if one not in seen]
        seen.update(fresh)
        yield "\n".join(fresh)


def _fetched(url: str, sha256: str) -> bytes:
    log.info("fetching %s", url)
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            data: bytes = answer.read()
    except (urllib.error.URLError, OSError) as error:
        raise UserError(
            f"{url} could not be fetched ({error}); if Debian has replaced it by a newer one, give a text of your own: "
            "--text ./folder."
        ) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{url} does not have the recorded digest; it is not used.")
    return data


def _unpacked(deb: bytes) -> Iterator[tuple[str, list[str]]]:
    """Names and paragraphs of the pages of a package: an `ar` archive with a tar in it."""
    place = 8
    while place < len(deb):
        name, size = deb[place : place + 16].decode().strip(), int(deb[place + 48 : place + 58])
        place += 60
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(lzma.decompress(deb[place : place + size]))) as tar:
                for member in tar:
                    file = (
                        tar.extractfile(member) if member.name.endswith(".html") and "/text/" in member.name else None
                    )
                    if file is not None:
                        page = _Page()
                        page.feed(file.read().decode("utf-8"))
                        yield member.name.split("/text/")[1], page.paragraphs
        place += size + size % 2


class _Page(HTMLParser):
    """The paragraphs and headings of a help page, without its navigation."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._words: list[str] | None = None
        self._inside = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._inside = self._inside or (tag == "div" and ("id", "DisplayArea") in attributes)
        if self._inside and tag in ("p", "h1", "h2", "h3"):
            self._words = []

    def handle_endtag(self, tag: str) -> None:
        if self._words is not None and tag in ("p", "h1", "h2", "h3"):
            words = " ".join("".join(self._words).split())
            if words:
                self.paragraphs.append(words)
            self._words = None

    def handle_data(self, data: str) -> None:
        if self._words is not None:
            self._words.append(data)
