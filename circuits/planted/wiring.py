"""The circuit that solves a planted task, placed into layers and heads.

`design` lays it out from the sources of the answer to the unembedding, and the draft notes for every port of every node
who writes what is read there, and whether that differs between clean and corrupted prompts: these are the true edges.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.graph import INPUT, LOGITS
from circuits.planted.prompts import COLOURS, FILLERS, ID, LAST, NAMES, WORDS, Layout
from circuits.planted.weights import Head, Match, Mlp, Plan, Read
from workbench import scores
from workbench.errors import UserError

FILLER_COORDS = 8  # fillers share a few coordinates; other words have one each
MIN_JUNK = 16
NEGATIVE = -0.4  # what all negative heads together write, of what the movers write
GAIN = (0.8, 2.5)  # norm of what a node of the circuit writes, drawn from this range


@dataclass
class Draft:
    """A circuit while it is laid out: what is taken, and what has been noted."""

    n_layers: int
    n_heads: int
    rng: random.Random
    taken: int = 0
    heads: dict[tuple[int, int], Head] = field(default_factory=dict)
    mlps: dict[int, Mlp] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    edges: set[str] = field(default_factory=set)
    scaffold: set[str] = field(default_factory=set)
    gains: dict[tuple[int, ...], float] = field(default_factory=dict)

    def register(self, n: int) -> tuple[int, ...]:
        """Coordinates for a variable, and how large it is."""
        coords = self.coords(n)
        self.gains[coords] = math.exp(self.rng.uniform(*map(math.log, GAIN)))
        return coords

    def coords(self, n: int) -> tuple[int, ...]:
        self.taken += n
        return tuple(range(self.taken - n, self.taken))

    def head(
        self,
        role: str,
        matches: Sequence[Match],
        value: Read,
        at: Sequence[int],
        later: int,
        *,
        into: tuple[int, ...] | None = None,
        copies: int = 1,
        total: float = 1.0,
    ) -> Read:
        """Place a head, or several that share its work, and say how what it writes at some positions is read.

        later   layers that must come after it
        """
        reads = [*(match.query for match in matches), *(match.key for match in matches), value]
        first = 1 + max(_layer(writer) for read in reads for writer in read.writers)
        writes = self.register(len(value.coords)) if into is None else into
        names = []
        for _ in range(copies):
            free = [
                (layer, h)
                for layer in range(first, self.n_layers - later)
                for h in range(self.n_heads)
                if (layer, h) not in self.heads
            ]
            if not free:
                raise self._full()
            layer = self.rng.choice(sorted({layer for layer, _ in free}))
            h = self.rng.choice([h for at_layer, h in free if at_layer == layer])
            self.heads[layer, h] = Head(tuple(matches), value, writes, total * self.gains[writes] / copies)
            names.append(scores.head(layer, h))
            self.roles[names[-1]] = role
            for match in matches:
                self._note(match.query, f"{names[-1]}<q>")
                self._note(match.key, f"{names[-1]}<k>")
            self._note(value, f"{names[-1]}<v>")
        return Read(writes, tuple(at), False, tuple(names), True)

    def mlp(
        self, role: str, inputs: Sequence[Read], table: tuple[int, ...], later: int, clip: tuple[float, float | None]
    ) -> Read:
        """Place an MLP that looks the values of its inputs up in a table."""
        writers = [writer for read in inputs for writer in read.writers]
        first = max(_layer(writer) + (not writer.startswith("a")) for writer in writers)
        free = [layer for layer in range(first, self.n_layers - later) if layer not in self.mlps]
        if not free:
            raise self._full()
        layer = self.rng.choice(free)
        writes = self.register(len(inputs[0].coords))
        self.mlps[layer] = Mlp(tuple(inputs), table, writes, *clip, self.gains[writes])
        self.roles[scores.mlp(layer)] = role
        for read in inputs:
            self._note(read, scores.mlp(layer))
        return Read(writes, inputs[0].at, False, (scores.mlp(layer),), True)

    def _note(self, read: Read, destination: str) -> None:
        (self.edges if read.varies else self.scaffold).update(f"{writer}->{destination}" for writer in read.writers)

    def logits(self, read: Read) -> None:
        self._note(read, LOGITS)

    def _full(self) -> UserError:
        return UserError(
            f"the circuit does not fit into {self.n_layers} layers of {self.n_heads} heads; ask for more of them, or "
            "for a circuit with fewer hops or heads."
        )


def _layer(writer: str) -> int:
    return -1 if writer == INPUT else int(writer[1:].split(".")[0])


@dataclass(frozen=True)
class Design:
    plan: Plan
    embed: Float[Tensor, "vocab coord"]
    codes: Float[Tensor, "pos coord"]
    movers: frozenset[str]


def design(
    draft: Draft,
    words: Layout,
    d_head: int,
    *,
    lookup: str,
    hops: int,
    width: int,
    movers: int,
    negative: int,
    redundant: bool,
    saturated: bool,
    loud: float,
    generator: torch.Generator,
) -> Design:
    """Lay the circuit out in the draft. Raises UserError if it does not fit."""
    n_pos, n_values, last = len(words.slots), words.n_values, len(words.slots) - 1
    stream = _Stream(draft, words)
    clip = (0.25, 0.75) if saturated else (0.2, None)
    values = [_source(draft, stream, words, b, hops, width) for b in range(len(words.sources))]
    value = values[0]
    if len(values) == 2 or lookup == "before":
        table = tuple(words.order[entry] for entry in words.merged) if lookup == "before" else words.merged
        role = "merges the two sources" if len(values) == 2 else "looks the value up"
        value = draft.mlp(role, values, table, 1, clip)
    at_end = redundant or lookup == "after"
    match = Match(stream.code(last), stream.code(*value.at))
    final = draft.head("carries the result to the last position", [match], value, (last,), 0, copies=movers)
    carriers = final.writers
    if negative:
        against = draft.head(
            "writes against the result", [match], value, (last,), 0, into=final.coords, copies=negative, total=NEGATIVE
        )
        final = final._replace(writers=carriers + against.writers)
    if at_end:
        table = words.order if lookup == "after" else tuple(range(n_values))
        role = "takes the majority of the movers" if redundant else "looks the result up"
        final = draft.mlp(role, [final], table, 0, (0.42, 0.58) if redundant else clip)
    draft.logits(final)
    variables = tuple(range(stream.variables, draft.taken))
    junk = tuple(range(draft.taken, draft.n_heads * d_head - 1))
    if len(junk) < MIN_JUNK or n_pos > d_head:
        width_needed = -(-(draft.taken + 1 + MIN_JUNK) // draft.n_heads)
        raise UserError(f"d_head={d_head} is too small for this circuit; take at least {max(width_needed, n_pos)}.")
    hot = tuple(p for p, slot in enumerate(words.slots) if slot.kind in ("name", "colour", "last") or p == words.meet)
    sharpness = draft.rng.uniform(14, 24) if saturated else draft.rng.uniform(2.5, 4)
    plan = Plan(
        draft.n_layers, draft.n_heads, d_head, stream.codes, hot, stream.words, variables, junk, draft.heads,
        draft.mlps, sharpness, loud, final, tuple(ID[word] for word in words.answers),
    )  # fmt: skip
    # A large constant direction, as trained models have: one loud distractor must not rescale all that is written.
    constant = math.sqrt(1 + max(1.0, loud) ** 2 * draft.n_layers * (draft.n_heads + 1))
    embed, codes = stream.embeddings(draft.n_heads * d_head - 1, constant, generator)
    return Design(plan, embed, codes, frozenset(carriers))


class _Stream:
    """Coordinates of what is in the stream from the start: words and positions."""

    def __init__(self, draft: Draft, words: Layout):
        self.constant, self.end = draft.coords(2)
        self.codes = draft.coords(len(words.slots))
        first = draft.taken
        self.colours = draft.coords(words.n_values)
        self.names = [draft.coords(words.n_values) for _ in words.sources]
        self.fillers = draft.coords(FILLER_COORDS)
        self.variables = draft.taken
        self.words = tuple(range(first, self.variables))

    def code(self, *at: int) -> Read:
        """Where one is: the same in every prompt."""
        return Read(tuple(self.codes[p] for p in at), at, True, (INPUT,), False)

    def embeddings(self, size: int, constant: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        embed = torch.zeros(len(WORDS), size)
        embed[ID[LAST], self.end] = 1
        for words, coords in [(COLOURS, self.colours), *zip(NAMES, self.names, strict=False)]:
            for word, coord in zip(words, coords, strict=False):
                embed[ID[word], coord] = 1
        random_rows = torch.randn(len(FILLERS), FILLER_COORDS, generator=generator)
        embed[ID[FILLERS[0]] :, list(self.fillers)] = random_rows / random_rows.norm(dim=1, keepdim=True)
        codes = torch.zeros(len(self.codes), size)
        codes[range(len(codes)), list(self.codes)] = 1
        codes[:, self.constant] = constant
        return embed, codes


def _source(draft: Draft, stream: _Stream, words: Layout, b: int, hops: int, width: int) -> Read:
    """The heads of one source, up to its value at the position where the sources meet, or where it is, if alone."""
    source, meet = words.sources[b], words.meet
    name_at, colour_at, last_at = (words.at(kind, b) for kind in ("name", "colour", "last"))

    def word(coords: tuple[int, ...], at: tuple[int, ...], varies: bool) -> Read:
        return Read(coords, at, False, (INPUT,), varies)

    def carry(value: Read, n: int, later: int) -> Read:
        """By n heads, each to a later position, to where the sources meet."""
        between = draft.rng.sample(range(value.at[0] + 1, meet), n - 1) if n else []
        for i, stop in enumerate([*sorted(between), meet] if n else []):
            match = Match(stream.code(stop), stream.code(*value.at))
            value = draft.head("carries a value on", [match], value, (stop,), later + n - 1 - i, copies=width)
        return value

    if source.kind == "copy":
        return carry(word(stream.colours, colour_at, True), hops + 1, 1)
    names = stream.names[b]
    if source.kind == "induction":
        n = hops + (len(words.sources) == 2)
        places = range(1, len(words.slots))
        match = Match(stream.code(*places), stream.code(*(p - 1 for p in places)))
        previous = draft.head("previous token", [match], word(names, name_at, True), colour_at, 2 + n, copies=width)
        match = Match(word(names, last_at, False), previous)
        value = word(stream.colours, colour_at, False)
        return carry(draft.head("induction", [match], value, last_at, 1 + n, copies=width), n, 1)
    repeated = Match(word(names, last_at, not source.swap), word(names, name_at, source.swap))
    not_itself = Match(stream.code(*last_at), stream.code(*last_at), -2.0)
    where = draft.head(
        "duplicate token: finds where", [repeated, not_itself], stream.code(*name_at), last_at, 3 + hops, copies=width
    )
    where = carry(where, hops + 1, 2)
    if source.kind == "pointer":
        value = word(stream.colours, colour_at, False)
        return draft.head("looks there", [Match(where, stream.code(*colour_at))], value, (meet,), 1, copies=width)
    both = Match(stream.code(meet, meet), stream.code(*name_at))
    not_there = Match(where, stream.code(*name_at), -1.0)
    value = word(names, name_at, False)
    return draft.head("looks at the other", [both, not_there], value, (meet,), 1, copies=width)
