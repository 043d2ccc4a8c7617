"""The words of the field as this workbench uses them: what each number is, as the code computes it, and where.

The terms are a file, `data/glossary.jsonl`, an object a line:

    term, also  what it is called, and other names: of fields of results, labels of figures, abbreviations
    text        one to three sentences, taken from what the code does
    source      the paper
    analyses    that compute it or use it; code: modules, classes and functions where it is done

`find` takes any of its names in any case, with spaces, hyphens or underscores. What an analysis assumes, and where it
fails, is written where it is computed: a `card` is taken from the docstrings of its function and its module.
"""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from workbench import registry
from workbench.registry import Analysis, Parameter

TERMS = Path(__file__).parent / "data" / "glossary.jsonl"


@dataclass(frozen=True)
class Term:
    term: str
    also: tuple[str, ...]
    text: str
    source: str
    analyses: tuple[str, ...]
    code: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (self.term, *self.also)


@cache
def terms() -> tuple[Term, ...]:
    """All, in alphabetical order."""
    rows = [json.loads(line) for line in TERMS.read_text(encoding="utf-8").splitlines()]
    found = [
        Term(
            row["term"], tuple(row["also"]), row["text"], row["source"], tuple(row["analyses"]), tuple(row["code"])
        )
        for row in rows
    ]  # fmt: skip
    return tuple(sorted(found, key=lambda one: one.term.casefold()))


def plain(name: str) -> str:
    """A name as it is compared: `Top-1` is `top 1`, `held_out_loss` is `held out loss`."""
    return " ".join(re.sub(r"[-_\s]+", " ", name).casefold().split())


@cache
def _names() -> dict[str, Term]:
    # A term before others' other names.
    other = {plain(name): term for term in terms() for name in term.also}
    return other | {plain(term.term): term for term in terms()}


def find(name: str) -> Term | None:
    """The term of a name, if there is one."""
    return _names().get(plain(name))


def search(words: str) -> list[Term]:
    """Terms with all words: the one that is called so first, then those with the words in a name, then in the text."""
    exact, wanted = find(words), plain(words).split()

    def within(text: str) -> bool:
        return all(word in plain(text) for word in wanted)

    named = [one for one in terms() if any(map(within, one.names))]
    told = [one for one in terms() if within(" ".join([*one.names, one.text, one.source, *one.analyses]))]
    return list(dict.fromkeys([*([exact] if exact else []), *named, *told]))


# ---- analyses ----


@dataclass(frozen=True)
class Card:
    """What is to be known of an analysis.

    prose   of its docstring besides the first paragraph and what parameters do; manual: the docstring of its module
    terms   of the glossary that name it
    """

    name: str
    about: str
    prose: str
    manual: str
    parameters: tuple[Parameter, ...]
    terms: tuple[Term, ...]


def card(analysis: Analysis) -> Card:
    doc = inspect.getdoc(analysis.fn) or ""
    parts = doc.split("\n\n")[1:]
    kept = [part for part in parts if not _describes(part, analysis)]
    return Card(
        analysis.name, analysis.about, "\n\n".join(kept),
        inspect.getdoc(inspect.getmodule(analysis.fn)) or "", tuple(analysis.parameters.values()),
        tuple(one for one in terms() if analysis.name in one.analyses),
    )  # fmt: skip


def _describes(part: str, analysis: Analysis) -> bool:
    """Whether a paragraph is the list of parameters."""
    return any(re.match(rf"\s*{name}\s{{2,}}\S", part) for name in analysis.parameters)


def cards() -> list[Card]:
    return [card(one) for one in registry.analyses().values()]
