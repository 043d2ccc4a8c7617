"""Computing what is missing: each forward pass once, however many threads and processes want it.

A batch is claimed before it is computed and released in the transaction that stores it; whoever finds it claimed goes
on with the next one and reads it from disk afterwards. So two processes with one request share the work, and the claim
of a killed process is void.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.activations import capture, codecs, keys
from workbench.activations.capture import Clock, Planned
from workbench.activations.disk import Allocate, Disk, NewEntry, Pass, block
from workbench.activations.keys import Edits, Key, Scope
from workbench.models import LanguageModel
from workbench.progress import track

Row = tuple[Key, Tensor, float]  # with the codec's error


@dataclass(frozen=True)
class Request:
    """Activations of some sequences at some hook points, under one set of conditions."""

    model: LanguageModel
    scopes: dict[str, Scope]  # by hook point
    sequences: list[bytes]  # digests, as asked for: one may come twice
    tokens: dict[bytes, Tensor]
    edit: Edits | None
    alone: bool

    def keys(self, sequences: Iterable[bytes] | None = None) -> list[Key]:
        digests = list(self.tokens if sequences is None else dict.fromkeys(sequences))
        return [Key(scope, digest) for scope in self.scopes.values() for digest in digests]


def stored(disk: Disk, codec: str, wanted: Iterable[Key], allocate: Allocate = block) -> Iterator[Row]:
    """The rows that are on disk."""
    for key, entry in disk.read(wanted, allocate):
        yield key, codecs.decode(entry.raw, entry.shape, codec), entry.error


class Computing:
    """One request's missing rows."""

    def __init__(
        self, disk: Disk, codec: str, clock: Clock, count: Callable[[str, int | float], None], request: Request
    ):
        self._disk = disk
        self._codec = codec
        self._clock = clock
        self._count = count
        self._request = request
        self._claimant = uuid.uuid4().hex

    def rows(self, missing: Iterable[Key]) -> Iterator[Row]:
        """Compute what nobody else is computing, batch by batch; then read what the others have made meanwhile."""
        todo = dict.fromkeys(missing)
        pause = 0.002
        while todo:
            done: set[Key] = set()
            for made in self._unclaimed(todo):
                done.add(made[0])
                yield made
                del made  # a view of its batch, which must not stay in memory while the next is computed
            for key, row, error in stored(self._disk, self._codec, [key for key in todo if key not in done]):
                self._count("waited_for", 1)
                done.add(key)
                yield key, row, error
            todo = {key: None for key in todo if key not in done}
            if todo and not done:
                time.sleep(pause)
                pause = min(2 * pause, 0.1)

    def _unclaimed(self, todo: Iterable[Key]) -> Iterator[Row]:
        request = self._request
        missing: dict[bytes, list[str]] = {}
        for key in todo:
            missing.setdefault(key.sequence, []).append(key.scope.hook)
        lengths = {sequence: len(request.tokens[sequence]) for sequence in missing}
        batches = capture.plan(request.model, lengths, missing, request.alone)
        pending: deque[tuple[Planned, capture.Captured]] = deque()
        ahead = 1 if request.model.device.type == "cuda" else 0  # a batch is written while the GPU computes the next
        try:
            for batch in track(batches, "activations", silent=len(batches) < 3):
                mine = self._claim(batch)
                if not mine.sequences:
                    continue
                pending.append((mine, self._pass(mine)))
                if len(pending) > ahead:
                    yield from self._keep(*pending.popleft())
            while pending:
                yield from self._keep(*pending.popleft())
        finally:
            self._disk.release(self._claimant)

    def _claim(self, batch: Planned) -> Planned:
        """The part of a batch that nobody else is computing, and that has not been stored since we looked."""
        scopes = [self._request.scopes[hook] for hook in batch.hooks]
        passes = {keys.pass_digest(scopes[0], sequence): sequence for sequence in batch.sequences}
        won = {passes[digest]: digest for digest in self._disk.claim(list(passes), self._claimant)}
        late = {key.sequence for key in self._disk.has(Key(scope, sequence) for scope in scopes for sequence in won)}
        if late:
            self._disk.release(self._claimant, [won[sequence] for sequence in late])
        return Planned([sequence for sequence in batch.sequences if sequence in won.keys() - late], batch.hooks)

    def _pass(self, batch: Planned) -> capture.Captured:
        request = self._request
        tokens = torch.stack([request.tokens[sequence] for sequence in batch.sequences])
        self._count("forward_passes", 1)
        return capture.run(request.model, tokens, batch.hooks, request.edit)

    def _keep(self, batch: Planned, captured: capture.Captured) -> Iterator[Row]:
        """Store what a pass gave. What comes out is what was stored, be it ours or another process's."""
        request = self._request
        entries: list[NewEntry] = []
        rows: dict[Key, tuple[Tensor, float]] = {}
        host, seconds = captured.host(), captured.seconds()
        self._count("seconds_computing", seconds)
        length = len(request.tokens[batch.sequences[0]])
        self._clock.note(request.model.config, len(batch.sequences), length, batch.hooks, seconds)
        for hook, x in host.items():
            capture.check_numbers(request.model, hook, x)
            encoded = codecs.encode(x, self._codec)
            for n, sequence in enumerate(batch.sequences):
                key = Key(request.scopes[hook], sequence)
                rows[key] = (encoded.decoded[n], encoded.errors[n])
                entries.append(NewEntry(key, encoded.pieces[n], tuple(x.shape[1:]), encoded.errors[n]))
        how = Pass(request.model.name, f"{len(batch.sequences)}x{length}", torch.get_num_threads())
        scope = request.scopes[batch.hooks[0]]
        claims = [keys.pass_digest(scope, sequence) for sequence in batch.sequences]
        taken = self._disk.write(how, entries, request.tokens, release=claims)
        for key, row, error in stored(self._disk, self._codec, taken):
            rows[key] = (row, error)
        self._count("computed", len(rows))
        for key, (row, error) in rows.items():
            yield key, row, error
