"""The prompts of a planted task: which word stands where, and pairs of them drawn at random."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from workbench.prompts import Prompt

BOS, UNKNOWN, LAST = "<s>", "<unk>", "="
COLOURS = ("red", "blue", "green", "black", "white", "pink", "brown", "gold")
NAMES = (  # a set for each source
    ("Ann", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal"),
    ("cat", "dog", "fox", "hen", "owl", "pig", "cow", "bee"),
)
FILLERS = (
    "then", "of", "so", "at", "by", "it", "we", "go", "up", "in", "on", "as",
    "is", "to", "or", "but", "for", "with", "from", "now", "here", "there", "also", "thus",
)  # fmt: skip
WORDS = (BOS, UNKNOWN, LAST, *COLOURS, *NAMES[0], *NAMES[1], *FILLERS)
ID = {word: i for i, word in enumerate(WORDS)}


class Drawn(NamedTuple):
    """The words of one source, as indices into its sets."""

    names: tuple[int, ...]
    colours: tuple[int, ...]
    last: int | None  # the name that comes again


@dataclass(frozen=True)
class Source:
    """A part of the prompt that decides a value; `swap`: the corrupted prompt exchanges names, else the last one is
    another."""

    kind: str
    n_pairs: int
    swap: bool

    def draw(self, rng: random.Random, n_values: int) -> Drawn:
        if self.kind == "copy":
            return Drawn((), (rng.randrange(n_values),), None)
        names = rng.sample(range(n_values), self.n_pairs)
        colours = () if self.kind == "inhibition" else tuple(rng.sample(range(n_values), self.n_pairs))
        return Drawn(tuple(names), colours, rng.choice(names))

    def corrupt(self, drawn: Drawn, rng: random.Random, n_values: int) -> Drawn:
        """The same with another value."""
        if drawn.last is None:
            return drawn._replace(colours=(rng.choice([c for c in range(n_values) if c != drawn.colours[0]]),))
        other = rng.choice([name for name in drawn.names if name != drawn.last])
        if not self.swap:
            return drawn._replace(last=other)
        exchanged = {drawn.last: other, other: drawn.last}
        return drawn._replace(names=tuple(exchanged.get(name, name) for name in drawn.names))

    def value(self, drawn: Drawn) -> int:
        if drawn.last is None:
            return drawn.colours[0]
        pair = drawn.names.index(drawn.last)
        return drawn.names[1 - pair] if self.kind == "inhibition" else drawn.colours[pair]


class Slot(NamedTuple):
    """What stands at a position: a filler, or the i-th name or colour, or the last name, of a source."""

    kind: str
    source: int = 0
    nth: int = 0


@dataclass(frozen=True)
class Layout:
    """Where which word stands, the same in all prompts.

    slots   from position 0, the first token, to the last word
    meet    the position at which the sources' values come together
    merged  the value for each value of the source, or for each pair of values
    order   entry of `answers` for each merged value
    """

    sources: tuple[Source, ...]
    slots: tuple[Slot, ...]
    meet: int
    merged: tuple[int, ...]
    order: tuple[int, ...]
    answers: tuple[str, ...]
    n_values: int
    fillers: str
    one_changes: bool  # else, each source may change

    def at(self, kind: str, source: int) -> tuple[int, ...]:
        """Positions of a source's words, in their order."""
        found = [(slot.nth, p) for p, slot in enumerate(self.slots) if slot.kind == kind and slot.source == source]
        return tuple(p for _, p in sorted(found))

    def draw(self, rng: random.Random) -> Prompt:
        """A pair of prompts with different answers."""
        while True:
            clean = [source.draw(rng, self.n_values) for source in self.sources]
            chosen = [rng.random() < 0.5 for _ in self.sources]
            if self.one_changes:
                only = rng.randrange(len(self.sources))
                chosen = [i == only for i in range(len(self.sources))]
            corrupted = [
                source.corrupt(drawn, rng, self.n_values) if change else drawn
                for source, drawn, change in zip(self.sources, clean, chosen, strict=True)
            ]
            answer, wrong = self._answer(clean), self._answer(corrupted)
            if answer != wrong:
                break
        words = rng.choices(FILLERS, k=len(self.slots))
        others = {"same": words, "fresh": rng.choices(FILLERS, k=len(words)), "constant": [FILLERS[0]] * len(words)}
        return Prompt(
            self._text(clean, words), self._text(corrupted, others[self.fillers]), (f" {answer}",), (f" {wrong}",)
        )

    def _answer(self, drawn: Sequence[Drawn]) -> str:
        row = 0
        for source, one in zip(self.sources, drawn, strict=True):
            row = row * self.n_values + source.value(one)
        return self.answers[self.order[self.merged[row]]]

    def _text(self, drawn: Sequence[Drawn], fillers: Sequence[str]) -> str:
        words = []
        for slot, filler in zip(self.slots[1:], fillers[1:], strict=True):
            if slot.kind in ("filler", "end"):
                words.append(filler if slot.kind == "filler" else LAST)
            elif slot.kind == "colour":
                words.append(COLOURS[drawn[slot.source].colours[slot.nth]])
            else:
                last = drawn[slot.source].last
                name = drawn[slot.source].names[slot.nth] if slot.kind == "name" else last
                assert name is not None
                words.append(NAMES[slot.source][name])
        return " ".join(words)


def layout(
    kinds: Sequence[str], gate: str, lookup: bool, hops: int, n_values: int, fillers: str, rng: random.Random
) -> Layout:
    """Where the words of some sources stand, with fillers between them, and which answer goes with which values."""
    sources = []
    units, questions = [], []
    for b, kind in enumerate(kinds):
        n_pairs = {"copy": 0, "inhibition": 2}.get(kind, rng.randint(2, min(3, n_values)))
        swap = kind == "induction" or (kind == "pointer" and rng.random() < 0.5)
        sources.append(Source(kind, n_pairs, swap))
        if kind == "copy":
            units.append([Slot("colour", b)])
            continue
        tail = [] if kind == "inhibition" else [Slot("colour", b)]
        units += [[Slot("name", b, i), *(slot._replace(nth=i) for slot in tail)] for i in range(n_pairs)]
        questions.append([Slot("last", b)])
    rng.shuffle(units)
    rng.shuffle(questions)
    slots = [Slot("bos")]
    for unit in [*units, *questions]:
        slots += [Slot("filler")] * rng.randint(0, 1) + unit
    slots += [Slot("filler")] * (hops + 2)
    meet = len(slots) - 1
    slots += [Slot("filler")] * rng.randint(0, 1) + [Slot("end")]
    span = range(n_values)
    both = tuple((x + y) % n_values if gate == "xor" else min(x, y) for x in span for y in span)
    merged = both if len(kinds) == 2 else tuple(span)
    order = tuple(rng.sample(span, n_values) if lookup else span)
    words = NAMES[0] if list(kinds) == ["inhibition"] and not lookup else COLOURS
    one_changes = len(kinds) == 1 or gate == "xor"
    answers = words[:n_values]
    return Layout(tuple(sources), tuple(slots), meet, merged, order, answers, n_values, fillers, one_changes)
