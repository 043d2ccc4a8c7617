"""The disk tier: entries in shard files, found through the index.

The order of writing is the journal: bytes first, then one transaction for the whole batch. An entry without its index
row does not exist, so a kill at any instant loses at most the batch in flight. Every read is checked against its
checksum; a damaged entry is named, dropped, and never served. Space is given back shard by shard, least recently used
first, pinned ones never.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import logging
import os
import platform
import re
import sqlite3
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from workbench import settings
from workbench.activations import codecs
from workbench.activations.codecs import Pieces
from workbench.activations.index import Index, Place, checksum
from workbench.activations.keys import Key, sequence_digest, token_bytes
from workbench.activations.shards import Readers, Writers
from workbench.errors import UserError

log = logging.getLogger(__name__)


class NewEntry(NamedTuple):
    key: Key
    pieces: Pieces
    shape: tuple[int, ...]
    error: float


class StoredEntry(NamedTuple):
    raw: Tensor  # bytes; the caller's own
    shape: tuple[int, ...]
    error: float


class Pass(NamedTuple):
    """How a batch was computed, for the manifest; empty: by this software, now."""

    model_name: str
    batch: str  # sequences x tokens
    threads: int
    software: str = ""
    created: float = 0.0


Allocate = Callable[[Sequence[tuple[Key, int]]], list[Tensor]]


def block(wanted: Sequence[tuple[Key, int]]) -> list[Tensor]:
    """Buffers of bytes for some entries, as parts of one block: numpy puts large ones on huge pages, and faulting in
    small pages would take longer than reading."""
    starts = list(accumulate((-(-size // 64) * 64 for _, size in wanted), initial=0))
    whole = torch.from_numpy(np.empty(starts[-1], dtype=np.uint8))
    return [whole[start : start + size] for start, (_, size) in zip(starts, wanted, strict=False)]


class Disk:
    """Safe under threads and processes."""

    def __init__(self, root: Path, budget: int):
        settings.writable_folder(root)
        self.root = root
        self.budget = budget
        self.index = Index(root)
        self._owner: tuple[str, int] | None = None  # name and descriptor of our lock file
        self._reset()
        self._remove_leftovers()
        # A forked child may use the store, but neither its parent's locks nor its open shards.
        os.register_at_fork(after_in_child=partial(_after_fork, weakref.ref(self)))

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._writers = Writers(self.root, self.index)
        self._readers = Readers(self.root)
        weakref.finalize(self, _close, self._writers, self._readers)

    # ---- reading ----

    def read(self, keys: Iterable[Key], allocate: Allocate = block) -> Iterator[tuple[Key, StoredEntry]]:
        """The entries that exist and are whole, in the order of the files.

        Neighbours are read in one go, each into the buffer of bytes that `allocate` gives for it.
        """
        with self.index.guard():
            places = sorted(self.index.find(keys), key=lambda item: (item[1].file, item[1].offset))
            for key, place in places:
                if not _plausible(key, place):
                    self._drop(key, place)
            for run in _runs([item for item in places if _plausible(*item)]):
                buffers = allocate([(key, place.nbytes) for key, place in run])
                first = run[0][1]
                got = self._readers.read(first.file, first.offset, buffers)
                for (key, place), raw in zip(run, buffers, strict=True):
                    whole = place.offset + place.nbytes <= first.offset + got
                    if whole and _matches(raw, key, place):
                        yield key, StoredEntry(raw, place.shape, place.error)
                        continue
                    self._drop(key, place)
            with suppress(sqlite3.OperationalError):  # a lost timestamp is no loss
                self.index.touch({place.shard for _, place in places})

    def _drop(self, key: Key, place: Place) -> None:
        """A damaged entry; or one that has been evicted meanwhile, which is no damage."""
        if self.has([key]).get(key) == place:
            log.warning("%s; dropped", _damage(key, place))
            self.index.forget(key, place)

    def has(self, keys: Iterable[Key]) -> dict[Key, Place]:
        """Which keys have an entry, and where, without reading it."""
        with self.index.guard():
            return dict(self.index.find(keys))

    # ---- writing ----

    def write(
        self, how: Pass, entries: Sequence[NewEntry], tokens: Mapping[bytes, Tensor], release: Iterable[bytes] = ()
    ) -> set[Key]:
        """Store a batch, and release claims, in one transaction. `tokens` has the token ids of each sequence.

        Returns the keys that were stored before: theirs are the values that count. Raises UserError when the disk is
        full or its budget taken by pins; everything committed before stays.
        """
        with self._lock, self.index.guard():
            self._make_room(sum(len(piece) for entry in entries for piece in entry.pieces))
            try:
                taken: set[Key] | None = None
                while taken is None:
                    taken = self._commit(how, entries, tokens, release)
                return taken
            except OSError as error:
                raise UserError(
                    f"the activation store in {self.root} could not be written ({error}); what was stored before is "
                    "safe. Free space, run `wb store evict`, or set WORKBENCH_HOME to another disk."
                ) from error
            finally:
                self._writers.rollback()

    def _commit(
        self, how: Pass, entries: Sequence[NewEntry], tokens: Mapping[bytes, Tensor], release: Iterable[bytes]
    ) -> set[Key] | None:
        """Bytes, then one transaction. None when one of our shards was evicted or sealed meanwhile: try again."""
        by_series: dict[tuple[str, str], list[NewEntry]] = {}
        for entry in entries:
            by_series.setdefault((entry.key.scope.model, entry.key.scope.hook), []).append(entry)
        rows: list[tuple[Key, Place]] = []
        grown = []
        for series, some in by_series.items():
            writer, offset = self._writers.append(series, [piece for entry in some for piece in entry.pieces])
            grown.append((writer, some))
            for entry in some:
                nbytes = sum(map(len, entry.pieces))
                check = checksum(entry.pieces, entry.key, entry.shape, entry.error)
                place = Place(writer.shard, writer.name, offset, nbytes, check, entry.shape, entry.error)
                rows.append((entry.key, place))
                offset += nbytes
        now = time.time()
        with self.index.transaction() as db:
            insert = "INSERT INTO passes (batch, threads, software, created) VALUES (?,?,?,?)"
            origin = (how.batch, how.threads, how.software or _software(), how.created or now)
            pass_id = db.execute(insert, origin).lastrowid
            assert pass_id is not None
            for model in {entry.key.scope.model for entry in entries}:
                db.execute("INSERT OR REPLACE INTO models VALUES (?,?)", (model, how.model_name))
            taken = self.index.insert(db, pass_id, rows, tokens)
            db.executemany("DELETE FROM claims WHERE pass = ?", [(digest,) for digest in release])
            gone = set()
            for writer, some in grown:
                added = sum(entry.key not in taken for entry in some)
                update = """UPDATE shards SET bytes = ?, entries = entries + ?, used = ?
                            WHERE id = ? AND file = ? AND NOT sealed"""
                if not db.execute(update, (writer.end, added, now, writer.shard, writer.name)).rowcount:
                    gone.add(writer.shard)
            if gone:
                db.execute("ROLLBACK")
        if gone:
            self._writers.forget(gone)
            self._writers.rollback()
            return None
        self._writers.settle()
        return taken

    # ---- claims: what is being computed, by whom ----

    def claim(self, passes: Sequence[bytes], claimant: str) -> set[bytes]:
        """Those of these forward passes that nobody else, in this process or another, is computing.

        A claim lasts until it is written or released, or until its process is no more: every store that computes holds
        a lock on a file of its own, which the kernel gives back.
        """
        with self._lock, self.index.guard():
            if self._owner is None:
                self._owner = _new_owner(self.root)
                self._disown = weakref.finalize(
                    self, _release_owner, self.root / self._owner[0], self._owner[1], os.getpid()
                )
            return self.index.claim(passes, f"{self._owner[0]}/{claimant}", self._alive)

    def _alive(self, owner: str) -> bool:
        name = owner.split("/")[0]
        return (self._owner is not None and name == self._owner[0]) or _locked(self.root / name)

    def release(self, claimant: str, passes: Sequence[bytes] | None = None) -> None:
        """Give back claims: some, or all."""
        with self._lock:
            if self._owner is None:
                return
            try:
                with self.index.guard():
                    self.index.release(f"{self._owner[0]}/{claimant}", passes)
            except BaseException:  # a full disk, an interrupt: nobody must wait for what is not being computed
                self._owner = None
                self._disown()  # voids all claims of this store; what it still computes, another may compute too
                raise

    # ---- space ----

    def totals(self) -> tuple[int, int]:
        """Entries, and bytes; what dropped entries took counts until their shard goes."""
        with self.index.guard():
            query = "SELECT coalesce(sum(entries), 0), coalesce(sum(bytes), 0) FROM shards"
            entries, size = self.index.db().execute(query).fetchone()
        return entries, size

    def evict(self, *, model: str | None = None, hook: str | None = None, keep_bytes: int = 0) -> int:
        """Drop shards, least recently used first, until at most `keep_bytes` are left of those that match."""
        with self._lock, self.index.guard():
            return self._evict(model, hook, keep_bytes)

    def _evict(self, model: str | None, hook: str | None, keep_bytes: int) -> int:
        query = """SELECT id, file, bytes FROM shards
                   WHERE (?1 IS NULL OR model = ?1) AND (?2 IS NULL OR hook = ?2) ORDER BY used"""
        shards = self.index.db().execute(query, (model, hook)).fetchall()
        pinned = self.index.pinned_shards()
        left = sum(size for _, _, size in shards)
        freed = 0
        for shard, file, size in shards:
            if left <= keep_bytes:
                break
            if shard in pinned:
                continue
            self._writers.forget({shard})
            try:
                self.index.forget_shard(shard)  # index first: what it names should be there
                self._delete(file)
            except sqlite3.OperationalError:  # no room for that; entries whose bytes are gone are found to be missing
                self._delete(file)
                self.index.forget_shard(shard)
            self._readers.close(file)
            left -= size
            freed += size
        return freed

    def _delete(self, file: str) -> None:
        if not re.fullmatch(r"[0-9a-f]{32}\.rows", file):  # a damaged index must not name other files
            return
        with suppress(OSError):
            os.truncate(self.root / file, 0)  # gives back the space even while another process has the file open
        (self.root / file).unlink(missing_ok=True)

    def room(self, wanted: Iterable[Key] = ()) -> int:
        """Bytes for entries once everything that is not pinned has been evicted; those of `wanted` that are pinned
        already have their place."""
        with self.index.guard():
            pinned = self.index.pinned_shards()
            shards = self.index.db().execute("SELECT id, bytes FROM shards").fetchall() if pinned else ()
            placed = sum(place.nbytes for _, place in self.index.find(wanted) if place.shard in pinned) if pinned else 0
        return self.budget - sum(int(size) for id, size in shards if id in pinned) + placed

    def _make_room(self, nbytes: int) -> None:
        for _ in range(100):  # others write meanwhile
            if self.totals()[1] + nbytes <= self.budget:
                return
            if not self._evict(None, None, self.budget - nbytes) and nbytes > self.room():
                break
        raise UserError(
            f"one batch of activations takes {nbytes:,} bytes, more than is left of the disk budget of "
            f"{self.budget:,} ({self.budget - self.room():,} are pinned); raise WORKBENCH_STORE_DISK, unpin, or ask "
            "for fewer sites."
        )

    # ---- upkeep ----

    def verify(self) -> Iterator[str]:
        """Read everything; yields one sentence per damaged entry."""
        with self.index.guard():
            for (sentence,) in self.index.db().execute("PRAGMA integrity_check"):
                if sentence != "ok":
                    yield f"the index is damaged: {sentence}"
            for key, place, tokens in self.index.everything():
                whole = False
                if _plausible(key, place):
                    (raw,) = block([(key, place.nbytes)])
                    got = self._readers.read(place.file, place.offset, [raw])
                    whole = got == place.nbytes and _matches(raw, key, place)
                if sequence_digest(token_bytes(tokens)) != key.sequence:
                    yield f"{key.sequence.hex()} ({key.scope.hook}): its token ids do not match its digest"
                elif not whole and self.has([key]).get(key) == place:  # else it has been evicted meanwhile
                    yield _damage(key, place)

    def _remove_leftovers(self) -> None:
        """Delete shard files that no index row names (an eviction was killed between index and file), empty shards that
        have no file (a writer was killed between the two), and the lock files of stores that have gone."""
        # Listed before the index is read: a new shard's row is older than its file.
        files = list(self.root.glob("*.rows"))
        with self.index.guard():
            known = {file for (file,) in self.index.db().execute("SELECT file FROM shards")}
            for path in files:
                if path.name not in known:
                    path.unlink(missing_ok=True)
            empty = self.index.db().execute("SELECT id, file FROM shards WHERE entries = 0 AND bytes = 0").fetchall()
            for shard, file in empty:
                if not (self.root / file).exists():  # should its writer be alive after all, it makes another
                    self.index.forget_shard(shard)
            for path in self.root.glob("*.owner"):
                if not _locked(path):
                    self.index.db().execute("DELETE FROM claims WHERE owner GLOB ? || '/*'", (path.name,))


def _runs(places: Sequence[tuple[Key, Place]]) -> Iterator[list[tuple[Key, Place]]]:
    """Neighbours in one file, some 4 MB together: enough for huge pages, and still in the cache for the checksum."""
    run: list[tuple[Key, Place]] = []
    size = 0
    for item in places:
        last = run[-1][1] if run else None
        place = item[1]
        if last and (last.file != place.file or last.offset + last.nbytes != place.offset or size >= 2**22):
            yield run
            run, size = [], 0
        run.append(item)
        size += place.nbytes
    if run:
        yield run


def _plausible(key: Key, place: Place) -> bool:
    """Whether the length fits the shape: no buffer is made for a length that a damaged index made up."""
    return bool(place.shape) and place.nbytes == codecs.size(place.shape, key.scope.codec)


def _matches(raw: Tensor, key: Key, place: Place) -> bool:
    return checksum([raw.numpy().data], key, place.shape, place.error) == place.checksum


def _damage(key: Key, place: Place) -> str:
    return (
        f"stored activation {key.sequence.hex()} at {key.scope.hook}, bytes {place.offset} to "
        f"{place.offset + place.nbytes} of {place.file}, is damaged"
    )


@cache
def _software() -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")]
    return ", ".join([*versions, f"python {platform.python_version()}"])


def _locked(path: Path) -> bool:
    """Whether the store that owns this lock file is alive. The file of a dead one is deleted."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except OSError:
        return True
    finally:
        os.close(file)
    return False


def _after_fork(disk: weakref.ref[Disk]) -> None:
    """In the child. A lock lives until every process that inherited its file has closed it."""
    this = disk()
    if this is not None:
        if this._owner is not None:
            os.close(this._owner[1])
            this._owner = None
        this._readers.renew_lock()
        _close(this._writers, this._readers)
        this._reset()


def _close(writers: Writers, readers: Readers) -> None:
    writers.close_all()
    readers.close_all()


def _new_owner(root: Path) -> tuple[str, int]:
    while True:
        name = f"{uuid.uuid4().hex}.owner"
        file = os.open(root / name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        fcntl.flock(file, fcntl.LOCK_EX)
        if (root / name).exists():
            return name, file
        os.close(file)  # another process saw it before it was locked, and took it for dead


def _release_owner(path: Path, file: int, pid: int) -> None:
    if pid == os.getpid():  # a forked child shares the lock with its parent, who may still hold claims
        path.unlink(missing_ok=True)
        os.close(file)
