"""Texts by name: what is in them, how they are cut, and sentences for what is not there."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench import runs, texts
from workbench.errors import UserError
from workbench.models import LanguageModel

PAGE = """<html><body><p>navigation</p><div id="DisplayArea"><h1>{title}</h1><p>A <b>bold</b>
  word.</p><p>Note.</p><script>no()</script></div></body></html>"""


def deb(pages: dict[str, str]) -> bytes:
    """A Debian package as `ar` writes it, with an odd member before the data."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        for name, page in pages.items():
            info = tarfile.TarInfo(f"./usr/share/libreoffice/help/xx/{name}")
            info.size = len(page.encode())
            tar.addfile(info, io.BytesIO(page.encode()))
    out = b"!<arch>\n"
    for name, data in (("debian-binary", b"2.0"), ("data.tar.xz", lzma.compress(inner.getvalue()))):
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
        out += header + data + b"\n" * (len(data) % 2)
    return out


def test_help_pages_come_in_turn_without_what_was_said_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    for package, title in (("one", "Eins {}"), ("two", "Deux {}")):
        pages = {f"text/{n}.html": PAGE.format(title=title.format(n)) for n in "ba"}
        (tmp_path / package).write_bytes(deb(pages | {"media/x.html": PAGE, "text/x.css": "p {}"}))
    digests = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("one", "two")}
    monkeypatch.setattr(texts, "PACKAGES", {"de": ("one", digests["one"]), "fr": ("two", digests["two"])})
    texts._load.cache_clear()
    monkeypatch.setattr(texts, "POOL", f"file://{tmp_path}/{{}}")
    found = texts.load("libreoffice-help").documents
    assert [(one.language, one.text) for one in found] == [
        ("de", "Eins a\nA bold word.\nNote."), ("fr", "Deux a\nA bold word.\nNote."),
        ("de", "Eins b"), ("fr", "Deux b"),
    ]  # fmt: skip
    (tmp_path / "one").write_bytes(b"gone")  # what was fetched once is kept
    texts._load.cache_clear()
    assert texts.load("libreoffice-help:de").documents == (found[0], found[2])
    texts._load.cache_clear()
    (home / "texts" / "libreoffice-help-de.jsonl").unlink()
    with pytest.raises(UserError, match="does not have the recorded digest"):
        texts.load("libreoffice-help:de")
    (tmp_path / "one").unlink()
    with pytest.raises(UserError, match=r"could not be fetched.*--text ./folder"):
        texts.load("libreoffice-help:de")


def test_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "premier", "language": "fr"}\n\n{"text": "other"}\n')
    found = texts.load(str(tmp_path)).documents
    assert [(one.text, one.language) for one in found] == [("premier", "fr"), ("other", ""), ("second", "")]
    before = texts.digest(str(tmp_path))
    (tmp_path / "b.txt").write_text("changed")
    assert texts.digest(f"sae:{tmp_path}") == texts.digest(str(tmp_path))  # as a basis is named
    assert texts.digest("rotation:7") is texts.digest("./not-here") is None
    assert texts.digest(str(tmp_path)) != before and texts.digest(str(tmp_path / "b.txt")) is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "holds no text"),
        (b'{"text": 1}', 'line 1, has no "text"'),
        (b"{", "line 1, is not JSON"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_a_sentence(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts.load(str(path))


@pytest.mark.parametrize("name", ["libreoffice-hlep", "libreoffice-help:xx", "book"])
def test_unknown_texts_are_sentences(name: str) -> None:
    with pytest.raises(UserError, match=r"there is no|no text|no language"):
        texts.load(name)


def test_sequences_are_whole_begin_as_texts_do_and_come_in_the_seeds_order(tmp_path: Path, tiny: LanguageModel) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} " + "word " * 40}) + "\n" for i in range(20)))
    text = texts.load(str(tmp_path))
    found = texts.sequences(text, tiny, 16, 200, seed=1)
    assert {len(one) for one in found} == {16} and 200 <= sum(map(len, found)) < 200 + 16 * 8
    every = {tuple(one.tolist()) for one in texts.sequences(text, tiny, 16)}
    assert {tuple(one.tolist()) for one in found} <= every
    again, other = (texts.sequences(text, tiny, 16, 200, seed=seed) for seed in (1, 2))
    assert torch.equal(torch.stack(again), torch.stack(found)) and not torch.equal(
        torch.stack(other), torch.stack(found)
    )
    with pytest.raises(UserError, match=r"in sequences of 16, and 100,000 were asked for"):
        texts.sequences(text, tiny, 16, 100_000)
    with pytest.raises(UserError, match="leaves no room for text"):
        texts.sequences(text, tiny, 0)


def test_parts_share_no_document() -> None:
    text = texts.load("parallel")
    parts = [{one.text for one in text.part(out).documents} for out in (False, True)]
    assert not parts[0] & parts[1] and parts[0] | parts[1] == {one.text for one in text.documents}
    assert 0.03 < len(parts[1]) / len(text.documents) < 0.1


def test_the_text_of_a_file_is_part_of_a_runs_key(tmp_path: Path, tiny: LanguageModel) -> None:
    """A run on a file that has changed is another run."""
    path = tmp_path / "a.jsonl"
    given: dict[str, Any] = {"hooks": "1", "latents": 32, "k": 4.0, "tokens": 1000, "length": 16, "batch": 64}

    def run(word: str) -> runs.Run:
        path.write_text("".join(json.dumps({"text": f"{i} " + f"{word} " * 40}) + "\n" for i in range(60)))
        return runs.run("train-sae", model=tiny, text=str(path), **given)

    one, other, again = run("this"), run("that"), run("this")
    assert one.id != other.id and again.id == one.id and again.hit
