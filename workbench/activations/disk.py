"""The disk tier: append-only shards and an index.

Rows are appended to shard files, one series per model and hook point and process; a SQLite index (WAL) maps each key
to shard, offset, length and checksum. The order of writing is the journal: bytes first, then one transaction for the
whole batch. A row without its index entry does not exist, so a kill at any instant loses at most the batch in flight.
Every read is checked against its checksum; a damaged row is named, dropped, and never served.

Space is given back shard by shard, least recently used first.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import xxhash

from workbench import settings
from workbench.errors import UserError

log = logging.getLogger(__name__)

VERSION = 1
SHARD_BYTES = 256 * 10**6
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shards (
    id INTEGER PRIMARY KEY, file TEXT UNIQUE, model TEXT, hook TEXT, bytes INTEGER, used REAL);
CREATE TABLE IF NOT EXISTS entries (
    key BLOB PRIMARY KEY, shard INTEGER, offset INTEGER, nbytes INTEGER, checksum TEXT,
    shape TEXT, codec TEXT, error REAL, batch TEXT, created REAL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS entries_of_shard ON entries (shard);
"""


class NewEntry(NamedTuple):
    """A row to be written; `batch` is the shape of the pass that computed it, for the manifest."""

    key: bytes
    hook: str
    data: bytes
    shape: tuple[int, ...]
    codec: str
    error: float
    batch: str


class StoredEntry(NamedTuple):
    data: bytes
    shape: tuple[int, ...]
    codec: str


@dataclass
class _Writer:
    """One open shard of this process."""

    shard: int
    file: int  # descriptor
    end: int


class Disk:
    """Safe under threads and processes."""

    def __init__(self, root: Path, budget: int):
        settings.writable_folder(root)
        self.root = root
        self.budget = budget
        self._local = threading.local()
        self._write_lock = threading.Lock()
        self._writers: dict[tuple[str, str], _Writer] = {}
        self._maps: dict[int, mmap.mmap] = {}
        self._map_lock = threading.Lock()
        db = self._db()
        db.executescript(_SCHEMA)
        with db:
            db.execute("INSERT OR IGNORE INTO meta VALUES ('version', ?)", (str(VERSION),))
        found = db.execute("SELECT value FROM meta WHERE name = 'version'").fetchone()[0]
        if found != str(VERSION):
            raise UserError(
                f"the activation store in {root} has format {found}, this version reads {VERSION}; "
                "set WORKBENCH_HOME to another folder or delete it."
            )
        self._remove_leftovers()

    # ---- reading ----

    def read(self, keys: Sequence[bytes]) -> dict[bytes, StoredEntry]:
        """The rows that exist and are whole."""
        rows: dict[bytes, StoredEntry] = {}
        used: set[int] = set()
        db = self._db()
        for start in range(0, len(keys), 500):
            some = keys[start : start + 500]
            query = f"""SELECT key, shard, offset, nbytes, checksum, shape, codec, file
                        FROM entries JOIN shards ON shard = id WHERE key IN ({",".join("?" * len(some))})"""
            for key, shard, offset, nbytes, checksum, shape, codec, file in db.execute(query, some):
                data = self._bytes(shard, file, offset, nbytes)
                if data is None or xxhash.xxh3_64_hexdigest(data) != checksum:
                    log.warning("stored activation %s in %s at byte %d is damaged; dropped", key.hex(), file, offset)
                    with db:
                        db.execute("DELETE FROM entries WHERE key = ?", (key,))
                    continue
                rows[key] = StoredEntry(data, tuple(json.loads(shape)), codec)
                used.add(shard)
        self._touch(used)
        return rows

    def has(self, keys: Sequence[bytes]) -> set[bytes]:
        """Which keys have a row, without reading it."""
        found: set[bytes] = set()
        for start in range(0, len(keys), 500):
            some = keys[start : start + 500]
            marks = ",".join("?" * len(some))
            found |= {key for (key,) in self._db().execute(f"SELECT key FROM entries WHERE key IN ({marks})", some)}
        return found

    def _bytes(self, shard: int, file: str, offset: int, nbytes: int) -> bytes | None:
        with self._map_lock:
            mapped = self._maps.get(shard)
            if mapped is None or len(mapped) < offset + nbytes:  # the shard has grown since it was mapped
                try:
                    with (self.root / file).open("rb") as handle:
                        mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
                except (FileNotFoundError, ValueError):  # evicted by another process, or empty
                    return None
                self._maps[shard] = mapped
            return mapped[offset : offset + nbytes] if len(mapped) >= offset + nbytes else None

    def _touch(self, shards: Iterable[int]) -> None:
        now = time.time()
        stale = [(now, shard, now - 60) for shard in shards]
        if stale:
            with suppress(sqlite3.OperationalError), self._db() as db:  # a lost timestamp is no loss
                db.executemany("UPDATE shards SET used = ? WHERE id = ? AND used < ?", stale)

    # ---- writing ----

    def write(self, model: str, entries: Sequence[NewEntry]) -> set[bytes]:
        """Store a batch. Returns the keys that another process had stored first: theirs are the values that count.

        Raises UserError when the disk is full; everything committed before stays.
        """
        with self._write_lock:
            self._make_room(sum(len(entry.data) for entry in entries))
            ends = {id(writer): writer.end for writer in self._writers.values()}
            try:
                taken: set[bytes] | None = None
                while taken is None:
                    taken = self._commit(model, entries)
                return taken
            except (OSError, sqlite3.OperationalError) as error:
                for writer in self._writers.values():
                    writer.end = ends.get(id(writer), 0)
                    with suppress(OSError):
                        os.ftruncate(writer.file, writer.end)
                raise UserError(
                    f"the activation store in {self.root} could not be written ({error}); what was stored before is "
                    "safe. Free space, run `wb store evict`, or set WORKBENCH_HOME to another disk."
                ) from error

    def _commit(self, model: str, entries: Sequence[NewEntry]) -> set[bytes] | None:
        """Bytes, then one transaction. None when another process evicted one of our shards meanwhile: try again."""
        now = time.time()
        taken: set[bytes] = set()
        rows = [(entry, *self._append(model, entry)) for entry in entries]
        used = {shard for _, shard, _ in rows}
        with self._db() as db:
            for series, writer in list(self._writers.items()):
                values = (writer.end, now, writer.shard)
                done = db.execute("UPDATE shards SET bytes = ?, used = ? WHERE id = ?", values)
                if not done.rowcount:
                    self._close(series)
                    if writer.shard in used:
                        db.rollback()
                        return None
            for entry, shard, offset in rows:
                checksum = xxhash.xxh3_64_hexdigest(entry.data)
                key = (entry.key, shard, offset, len(entry.data), checksum, json.dumps(entry.shape))
                insert = "INSERT OR IGNORE INTO entries VALUES (?,?,?,?,?,?,?,?,?,?)"
                if not db.execute(insert, (*key, entry.codec, entry.error, entry.batch, now)).rowcount:
                    taken.add(entry.key)
        return taken

    def _append(self, model: str, entry: NewEntry) -> tuple[int, int]:
        series = (model, entry.hook)
        writer = self._writers.get(series)
        if writer is None or writer.end + len(entry.data) > SHARD_BYTES:
            if writer is not None:
                self._close(series)
            writer = self._writers[series] = self._new_shard(*series)
        offset = writer.end
        view = memoryview(entry.data)
        while view:
            view = view[os.write(writer.file, view) :]
        writer.end += len(entry.data)
        return writer.shard, offset

    def _new_shard(self, model: str, hook: str) -> _Writer:
        """The index row comes before the file, so that a file without a row is always a leftover."""
        name = f"{uuid.uuid4().hex}.rows"
        with self._db() as db:
            insert = "INSERT INTO shards (file, model, hook, bytes, used) VALUES (?,?,?,0,?)"
            shard = db.execute(insert, (name, model, hook, time.time())).lastrowid
        assert shard is not None
        return _Writer(shard, os.open(self.root / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644), 0)

    def _close(self, series: tuple[str, str]) -> None:
        os.close(self._writers.pop(series).file)

    # ---- space ----

    def totals(self) -> tuple[int, int]:
        """Entries and bytes."""
        db = self._db()
        (entries,) = db.execute("SELECT count(*) FROM entries").fetchone()
        (size,) = db.execute("SELECT coalesce(sum(bytes), 0) FROM shards").fetchone()
        return entries, size

    def evict(self, *, model: str | None = None, hook: str | None = None, keep_bytes: int = 0) -> int:
        """Drop shards, least recently used first, until at most `keep_bytes` are left of those that match."""
        with self._write_lock:
            return self._evict(model, hook, keep_bytes)

    def _evict(self, model: str | None, hook: str | None, keep_bytes: int) -> int:
        db = self._db()
        query = """SELECT id, file, bytes FROM shards
                   WHERE (?1 IS NULL OR model = ?1) AND (?2 IS NULL OR hook = ?2) ORDER BY used"""
        shards = db.execute(query, (model, hook)).fetchall()
        left = sum(size for _, _, size in shards)
        freed = 0
        for shard, file, size in shards:
            if left <= keep_bytes:
                break
            for series, writer in list(self._writers.items()):
                if writer.shard == shard:
                    self._close(series)
            with db:  # index first: a row must never point at a file that is gone
                db.execute("DELETE FROM entries WHERE shard = ?", (shard,))
                db.execute("DELETE FROM shards WHERE id = ?", (shard,))
            (self.root / file).unlink(missing_ok=True)
            with self._map_lock:
                self._maps.pop(shard, None)
            left -= size
            freed += size
        return freed

    def _make_room(self, nbytes: int) -> None:
        if nbytes > self.budget:
            raise UserError(
                f"one batch of activations takes {nbytes:,} bytes, more than the disk budget of {self.budget:,}; "
                "raise WORKBENCH_STORE_DISK or ask for fewer sites."
            )
        _, size = self.totals()
        if size + nbytes > self.budget:
            self._evict(None, None, self.budget - nbytes)

    def verify(self) -> Iterator[str]:
        """Read everything; yields one sentence per damaged row."""
        query = """SELECT key, shard, offset, nbytes, checksum, file, hook
                   FROM entries JOIN shards ON shard = id ORDER BY shard, offset"""
        for key, shard, offset, nbytes, checksum, file, hook in self._db().execute(query):
            data = self._bytes(shard, file, offset, nbytes)
            if data is None:
                yield f"{key.hex()} ({hook}): {file} ends before byte {offset + nbytes}"
            elif xxhash.xxh3_64_hexdigest(data) != checksum:
                yield f"{key.hex()} ({hook}): bytes {offset} to {offset + nbytes} of {file} do not match their checksum"

    def _remove_leftovers(self) -> None:
        """Delete shard files that no index row names: an eviction was killed between index and file."""
        files = list(
            self.root.glob("*.rows")
        )  # listed before the index is read: a new shard's row is older than its file
        known = {file for (file,) in self._db().execute("SELECT file FROM shards")}
        for path in files:
            if path.name not in known:
                path.unlink(missing_ok=True)

    def _db(self) -> sqlite3.Connection:
        """One connection per thread."""
        db: sqlite3.Connection | None = getattr(self._local, "db", None)
        if db is None:
            db = sqlite3.connect(self.root / "index.sqlite", timeout=60)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            self._local.db = db
        return db
