"""Parallel sentences: the same in several languages, in the same order.

parallel          our own, see `workbench.texts`; the part for searching
./rows.jsonl      an object a line, with a text for each language code
./rows.tsv        columns, the first line their language codes
./flores          a folder of FLORES-200's files, `eng_Latn.dev` and the like, a sentence a line
./fra.txt         Tatoeba's pairs as ManyThings packs them: English, the other language, and who wrote them
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from saes.steering.languages import LANGUAGES, check
from workbench import texts
from workbench.errors import UserError, unknown

Split = Literal["search", "validation", "test"]
OWN = "parallel"
MOST = 1000  # rows of a file, as many as the paper's
CODES = {  # ISO 639-3
    "eng": "en", "fra": "fr", "spa": "es", "deu": "de", "ita": "it", "por": "pt", "jpn": "ja", "cmn": "zh", "zho": "zh",
    "rus": "ru",
}  # fmt: skip


def corpus(split: Split, languages: Sequence[str] = tuple(LANGUAGES)) -> dict[str, list[str]]:
    """Our own sentences, by language, in the same order."""
    rows = [json.loads(line) for line in texts.PARALLEL.read_text(encoding="utf-8").splitlines()]
    return {check(language): [row[language] for row in rows if row["split"] == split] for language in languages}


def sentences(source: str = OWN) -> dict[str, list[str]]:
    """Sentences by language, of all languages that a source has; of a file the first thousand rows that have all.

    Raises UserError for a source that is not known, cannot be read, or has no two languages.
    """
    if source == OWN:
        return corpus("search")
    if not source.startswith(texts.PATHS):
        raise unknown("parallel text", source, [OWN, "./rows.jsonl", "./rows.tsv", "./flores", "./fra.txt"])
    path = Path(source).expanduser()
    try:
        columns = _folder(path) if path.is_dir() else _file(path)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{source} cannot be read as parallel text: {error}") from error
    if len(columns) < 2:
        raise UserError(
            f"{source} has sentences in {', '.join(columns) or 'no known language'}, and two languages are needed; "
            f"known are {', '.join(LANGUAGES)}."
        )
    if len({len(column) for column in columns.values()}) > 1:
        counts = ", ".join(f"{len(column)} in {name}" for name, column in columns.items())
        raise UserError(f"{source} is not parallel: {counts}.")
    rows = [row for row in zip(*columns.values(), strict=True) if all(row)][:MOST]
    if len(rows) < 2:
        raise UserError(f"{source} has {len(rows)} rows with a sentence in each of {', '.join(columns)}; give more.")
    return dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))


def both_in(source: str, target: str, other: str) -> dict[str, list[str]]:
    """The same, of a source that has both languages. Raises UserError also if they are one."""
    if check(target) == check(other):
        raise UserError(f"the target and the source are both {target}; name another language.")
    found = sentences(source)
    for language in (target, other):
        if language not in found:
            raise UserError(f"{source} has no sentences in {language}; it has {', '.join(found)}.")
    return found


def _folder(path: Path) -> dict[str, list[str]]:
    found: dict[str, Path] = {}
    for one in sorted(path.glob("*_*.*")):
        name = CODES.get(one.name.partition("_")[0])
        if name in found:
            raise ValueError(f"{found[name].name} and {one.name} are both in {name}; leave one in the folder")
        if name is not None:
            found[name] = one
    return _ordered({name: _lines(one) for name, one in found.items()})


def _file(path: Path) -> dict[str, list[str]]:
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in _lines(path) if line.strip()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line is no JSON object")
        return _ordered(
            {
                name: [str(row.get(name, "")).strip() for row in rows]
                for name in LANGUAGES
                if any(name in row for row in rows)
            }
        )
    cells = [
        list(map(str.strip, row)) for row in csv.reader(_lines(path), delimiter="\t", quoting=csv.QUOTE_NONE) if row
    ]
    if path.suffix == ".tsv":
        header, *cells = cells or [[]]
        return _ordered({name: _column(cells, i) for i, name in enumerate(header)})
    other = CODES.get(path.stem)
    if path.suffix != ".txt" or other is None:
        raise ValueError(f"it is no .jsonl, no .tsv, and its name no language, such as {', '.join(CODES)}")
    return _ordered({"en": _column(cells, 0), other: _column(cells, 1)})


def _lines(path: Path) -> list[str]:
    """At newlines alone: sentences may hold the other characters at which `splitlines` would cut."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _column(cells: Iterable[Sequence[str]], i: int) -> list[str]:
    return [row[i] if i < len(row) else "" for row in cells]


def _ordered(columns: dict[str, list[str]]) -> dict[str, list[str]]:
    """Known languages, in the order of LANGUAGES."""
    return {name: columns[name] for name in LANGUAGES if name in columns}
