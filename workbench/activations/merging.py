"""Stores made apart, such as one on each node of a cluster, brought together: entry by entry, checked as it is read.

An entry keeps what its manifest said: which batch it was computed in, by which software, when. What is here already
stays, as the first stored activation is the one that everybody gets. Nothing is changed in the other store.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from workbench.activations import codecs
from workbench.activations.disk import Disk, NewEntry, Pass
from workbench.activations.index import Index, Place, checksum
from workbench.activations.keys import Key
from workbench.activations.shards import Readers
from workbench.errors import UserError

AT_ONCE = 2**26  # bytes
_ORIGIN = """SELECT models.name, batch, threads, software, created FROM entries
    JOIN sequences ON sequence = sequences.id JOIN scopes ON scope = scopes.id JOIN passes ON pass = passes.id
    JOIN models ON model = fingerprint
    WHERE digest = ? AND model = ? AND numerics = ? AND hook = ? AND codec = ? AND edit = ?"""


@dataclass(frozen=True)
class Merged:
    """How many entries were taken in, were here already, and were damaged there; bytes: of those taken in."""

    taken: int
    here: int
    damaged: int
    bytes: int


def merge(into: Disk, folder: Path) -> Merged:
    """Take in what the store in a folder has. Raises UserError if there is none, or it is this one."""
    folder = folder.expanduser()
    if not (folder / "index.sqlite").is_file():
        raise UserError(f"{folder} holds no activation store: no index.sqlite in it.")
    if folder.resolve() == into.root.resolve():
        raise UserError(f"{folder} is this store itself; name another one.")
    index, readers = Index(folder), Readers(folder)
    taken = here = damaged = size = 0
    with ExitStack() as stack, index.guard():
        stack.callback(readers.close_all)
        (whole,) = index.db().execute("SELECT coalesce(sum(nbytes), 0) FROM entries").fetchone()
        if whole > into.budget:
            raise UserError(
                f"the store in {folder} has {whole / 1e9:.1f} GB, more than the {into.budget / 1e9:.1f} GB that this "
                "one may have; raise WORKBENCH_STORE_DISK."
            )
        for batch in _batches(index):
            known = into.has([key for key, _, _ in batch])
            new = [row for row in batch if row[0] not in known]
            read = {key: raw for key, place, _ in new if (raw := _raw(readers, key, place)) is not None}
            here, damaged = here + len(known), damaged + len(new) - len(read)
            passes: dict[Pass, list[tuple[Key, Place, Tensor]]] = {}
            for row in new:
                if row[0] in read:
                    passes.setdefault(_origin(index, row[0]), []).append(row)
            for how, rows in passes.items():
                entries = [NewEntry(key, (read[key].numpy().data,), place.shape, place.error) for key, place, _ in rows]
                first = into.write(how, entries, {key.sequence: ids for key, _, ids in rows})
                here, taken = here + len(first), taken + len(rows) - len(first)
                size += sum(place.nbytes for key, place, _ in rows if key not in first)
    return Merged(taken, here, damaged, size)


def _batches(index: Index) -> Iterator[list[tuple[Key, Place, Tensor]]]:
    batch, size = [], 0
    for row in index.everything():
        batch.append(row)
        size += row[1].nbytes
        if size >= AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _raw(readers: Readers, key: Key, place: Place) -> Tensor | None:
    """The bytes of an entry; None if they are not those that were written."""
    if not place.shape or place.nbytes != codecs.size(place.shape, key.scope.codec):
        return None  # no buffer is made for a length that a damaged index made up
    raw = torch.empty(place.nbytes, dtype=torch.uint8)
    whole = readers.read(place.file, place.offset, [raw]) == place.nbytes
    found = checksum([raw.numpy().data], key, place.shape, place.error)
    return raw if whole and found == place.checksum else None


def _origin(index: Index, key: Key) -> Pass:
    found = index.db().execute(_ORIGIN, (key.sequence, *key.scope)).fetchone()
    if found is None:
        raise UserError(
            f"the store in {index.path.parent} changed while it was read; merge it when nothing writes there."
        )
    return Pass(*found)
