"""The index of the disk tier: a SQLite database (WAL) that says what is stored, where, and which runs used it.

An entry without its row here does not exist. Each entry's checksum covers its bytes and, as the seed, its key, shape
and error, so that a damaged index can no more attach a row to another sequence than a damaged file can.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import xxhash
from torch import Tensor

from workbench.activations.keys import Key, Scope
from workbench.errors import UserError

T = TypeVar("T")
VERSION = 2
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE models (fingerprint TEXT PRIMARY KEY, name TEXT) WITHOUT ROWID;
CREATE TABLE scopes (id INTEGER PRIMARY KEY, model TEXT, numerics TEXT, hook TEXT, codec TEXT, edit TEXT,
    UNIQUE (model, numerics, hook, codec, edit));
CREATE TABLE sequences (id INTEGER PRIMARY KEY, digest BLOB UNIQUE, tokens BLOB);
CREATE TABLE passes (id INTEGER PRIMARY KEY, batch TEXT, threads INTEGER, software TEXT, created REAL);
CREATE TABLE shards (id INTEGER PRIMARY KEY, file TEXT UNIQUE, model TEXT, hook TEXT, bytes INTEGER, entries INTEGER,
    used REAL, sealed INTEGER DEFAULT 0);
CREATE TABLE entries (sequence INTEGER, scope INTEGER, shard INTEGER, offset INTEGER, nbytes INTEGER, checksum INTEGER,
    shape TEXT, error REAL, pass INTEGER, PRIMARY KEY (sequence, scope)) WITHOUT ROWID;
CREATE INDEX entries_of_shard ON entries (shard, offset);
CREATE TABLE claims (pass BLOB PRIMARY KEY, owner TEXT) WITHOUT ROWID;
CREATE TABLE runs (id INTEGER PRIMARY KEY, name TEXT UNIQUE);
CREATE TABLE uses (sequence INTEGER, scope INTEGER, run INTEGER, PRIMARY KEY (sequence, scope, run)) WITHOUT ROWID;
CREATE TABLE pins (model TEXT, hook TEXT, run TEXT, PRIMARY KEY (model, hook, run)) WITHOUT ROWID;
"""
_PINNED_BY_RUN = """SELECT DISTINCT shard FROM pins JOIN runs ON name = pins.run JOIN uses ON uses.run = runs.id
    JOIN entries USING (sequence, scope) WHERE pins.run != ''"""
_NONSENSE = (UnicodeDecodeError, TypeError, OverflowError)  # what damaged values give
_PATIENCE = 60  # seconds to wait for a lock of the database
_MANY = 500  # values bound in one statement
_inherited: list[sqlite3.Connection] = []  # a forked child may neither use nor close its parent's connections


class Place(NamedTuple):
    """Where an entry lies, and what it must hash to."""

    shard: int
    file: str
    offset: int
    nbytes: int
    checksum: int
    shape: tuple[int, ...]
    error: float


def checksum(pieces: Iterable[memoryview], key: Key, shape: Sequence[int], error: float) -> int:
    """64 bits over key, shape, error and bytes, as a signed integer."""
    seed = xxhash.xxh3_64_intdigest(key.scope.digest + key.sequence + f"{tuple(shape)}{error!r}".encode())
    pieces = list(pieces)
    if len(pieces) == 1:
        value = xxhash.xxh3_64_intdigest(pieces[0], seed)
    else:
        digest = xxhash.xxh3_64(seed=seed)
        for piece in pieces:
            digest.update(piece)
        value = digest.intdigest()
    return value - 2**63


class Index:
    """Safe under threads, processes and forks: one connection for each thread of each process."""

    def __init__(self, root: Path):
        self.path = root / "index.sqlite"
        self._local = threading.local()
        self._scopes: dict[Scope, int] = {}
        with self.guard():
            self._open()

    def _open(self) -> None:
        db = self.db()
        with self.transaction():
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute("INSERT INTO meta VALUES ('version', ?)", (str(VERSION),))
            (found,) = db.execute("SELECT value FROM meta WHERE name = 'version'").fetchone()
        if found != str(VERSION):
            older = found.isdigit() and int(found) < VERSION
            raise UserError(
                f"the activation store in {self.path.parent} has format {found}, this version reads {VERSION}; "
                + ("its keys cannot be carried over, so delete that folder (what is needed is computed again) "
                   "or set WORKBENCH_HOME to another." if older else "update the workbench or set WORKBENCH_HOME to "
                   "another folder.")
            )  # fmt: skip

    def db(self) -> sqlite3.Connection:
        if getattr(self._local, "pid", None) != os.getpid():
            if hasattr(self._local, "db"):
                _inherited.append(self._local.db)
            self._local.db = _connect(self.path)
            self._local.pid = os.getpid()
        db: sqlite3.Connection = self._local.db
        return db

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One write, whole or not at all. The lock is taken first, so that what is read in it stays true."""
        db = self.db()
        if db.in_transaction:  # left open by an interrupt
            db.execute("ROLLBACK")
        try:
            db.execute("BEGIN IMMEDIATE")
            yield db
            if db.in_transaction:  # unless the caller has rolled it back
                db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Errors of the database and the files as one sentence."""
        try:
            yield
        except (sqlite3.OperationalError, OSError) as error:
            raise UserError(
                f"the activation store in {self.path.parent} could not be used ({error}); what was stored before is "
                "safe. Free space, run `wb store evict`, or set WORKBENCH_HOME to another disk."
            ) from error
        except (sqlite3.DatabaseError, *_NONSENSE) as error:
            raise UserError(
                f"the index of the activation store is damaged ({error}): {self.path}. Delete the folder "
                f"{self.path.parent}; what is needed is computed again."
            ) from error

    # ---- entries ----

    def scope_id(self, scope: Scope) -> int | None:
        """None for a scope that has never been stored."""
        if scope not in self._scopes:
            id = _scope_id(self.db(), scope)
            if id is None:
                return None
            self._scopes[scope] = id
        return self._scopes[scope]

    def find(self, keys: Iterable[Key]) -> Iterator[tuple[Key, Place]]:
        """The entries that exist among the keys."""
        wanted: dict[Scope, set[bytes]] = {}
        for key in keys:
            wanted.setdefault(key.scope, set()).add(key.sequence)
        groups: dict[frozenset[bytes], dict[int, Scope]] = {}  # scopes that want the same sequences: one query
        for scope, digests in wanted.items():
            id = self.scope_id(scope)
            if id is not None:
                groups.setdefault(frozenset(digests), {})[id] = scope
        for shared, scopes in groups.items():
            for ids in _chunks(list(scopes)):
                query = f"""SELECT digest, scope, shard, file, offset, nbytes, checksum, shape, error
                            FROM sequences JOIN entries ON sequence = sequences.id JOIN shards ON shard = shards.id
                            WHERE digest IN ({{}}) AND scope IN ({_marks(ids)})"""
                for some in _chunks(sorted(shared)):
                    found = self.db().execute(query.format(_marks(some)), [*some, *ids]).fetchall()
                    for digest, scope, shard, file, offset, nbytes, check, shape, error in found:
                        if scope not in scopes or digest not in shared:
                            raise sqlite3.DatabaseError("it gives entries that were not asked for")
                        place = Place(shard, file, offset, nbytes, check, _shape(shape), error)
                        yield Key(scopes[scope], digest), place

    def insert(
        self, db: sqlite3.Connection, pass_id: int, rows: Sequence[tuple[Key, Place]], tokens: Mapping[bytes, Tensor]
    ) -> set[Key]:
        """Add entries inside a transaction. Returns the keys that were there already: the first value stays."""
        taken = {key for key, _ in self.find(key for key, _ in rows)}
        rows = [row for row in rows if row[0] not in taken]
        for scope in {key.scope for key, _ in rows}:
            db.execute("INSERT OR IGNORE INTO scopes (model, numerics, hook, codec, edit) VALUES (?,?,?,?,?)", scope)
        digests = sorted({key.sequence for key, _ in rows})
        compact = [(digest, tokens[digest].to("cpu", torch.int32).numpy().tobytes()) for digest in digests]
        db.executemany("INSERT OR IGNORE INTO sequences (digest, tokens) VALUES (?,?)", compact)
        ids: dict[bytes, int] = {}
        for some in _chunks(digests):
            ids |= db.execute(f"SELECT digest, id FROM sequences WHERE digest IN ({_marks(some)})", some).fetchall()
        # Not through the cache: this transaction may still be rolled back.
        scopes = {scope: _scope_id(db, scope) for scope in {key.scope for key, _ in rows}}
        db.executemany(
            "INSERT INTO entries VALUES (?,?,?,?,?,?,?,?,?)",
            [
                (ids[key.sequence], scopes[key.scope], p.shard, p.offset, p.nbytes, p.checksum,
                 ",".join(map(str, p.shape)), p.error, pass_id)
                for key, p in rows
            ],
        )  # fmt: skip
        return taken

    def forget(self, key: Key, place: Place) -> None:
        """Drop a damaged entry, unless it has been evicted or replaced meanwhile."""
        with self.transaction() as db:
            entry = "sequence = (SELECT id FROM sequences WHERE digest = ?) AND scope = ?"
            which = (key.sequence, self.scope_id(key.scope))
            gone = db.execute(
                f"DELETE FROM entries WHERE {entry} AND shard = ? AND offset = ?", (*which, place.shard, place.offset)
            )
            if gone.rowcount:
                db.execute(f"DELETE FROM uses WHERE {entry}", which)
                db.execute("UPDATE shards SET entries = entries - 1 WHERE id = ?", (place.shard,))
        if dict(self.find([key])).get(key) == place:
            raise sqlite3.DatabaseError("a damaged entry cannot be dropped")

    def everything(self) -> Iterator[tuple[Key, Place, Tensor]]:
        """Every entry with its tokens, in the order of the files; what changes meanwhile may be in it or not."""
        query = f"""SELECT digest, tokens, model, numerics, hook, codec, edit, shard, file, offset, nbytes, checksum,
                    shape, error FROM (SELECT id AS shard_id, file FROM shards WHERE id = ?)
                    JOIN entries ON shard = shard_id JOIN sequences ON sequence = sequences.id
                    JOIN scopes ON scope = scopes.id
                    WHERE offset > ? ORDER BY offset LIMIT {_MANY}"""
        for (id,) in self.db().execute("SELECT id FROM shards ORDER BY id").fetchall():
            last = -1
            # In pieces: an open query would hold on to the index as it was when it began.
            while rows := self.db().execute(query, (id, last)).fetchall():
                before = last
                for digest, tokens, *row in rows:
                    shard, file, last, nbytes, check, shape, error = row[5:]
                    place = Place(shard, file, last, nbytes, check, _shape(shape), error)
                    yield Key(Scope(*row[:5]), digest), place, token_ids(tokens)
                if last <= before:
                    raise sqlite3.DatabaseError("entries and their index disagree")

    def forget_shard(self, shard: int) -> None:
        """Drop a shard, its entries, and the sequences of which nothing is left."""
        with self.transaction() as db:
            gone = db.execute("SELECT sequence, scope FROM entries WHERE shard = ?", (shard,)).fetchall()
            db.executemany("DELETE FROM uses WHERE sequence = ? AND scope = ?", gone)
            db.execute("DELETE FROM entries WHERE shard = ?", (shard,))
            db.execute("DELETE FROM shards WHERE id = ?", (shard,))
            db.executemany(
                "DELETE FROM sequences WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM entries WHERE sequence = ?1)",
                [(sequence,) for sequence in {sequence for sequence, _ in gone}],
            )

    # ---- claims ----

    def claim(self, passes: Sequence[bytes], owner: str, alive: Callable[[str], bool]) -> set[bytes]:
        """Those of these forward passes that nobody alive is computing; they are the owner's until released."""
        with self.transaction() as db:
            others: dict[str, list[bytes]] = {}
            for some in _chunks(passes):
                for digest, name in db.execute(f"SELECT pass, owner FROM claims WHERE pass IN ({_marks(some)})", some):
                    others.setdefault(name, []).append(digest)
            dead = [name for name in others if not alive(name)]
            db.executemany("DELETE FROM claims WHERE owner = ?", [(name,) for name in dead])
            theirs = {digest for name in others if name not in dead for digest in others[name]}
            mine = [digest for digest in passes if digest not in theirs]
            db.executemany("INSERT INTO claims VALUES (?,?)", [(digest, owner) for digest in mine])
        return set(mine)

    def release(self, owner: str, passes: Sequence[bytes] | None = None) -> None:
        """Give back some of an owner's claims, or all of them."""
        with self.transaction() as db:
            if passes is None:
                db.execute("DELETE FROM claims WHERE owner = ?", (owner,))
            else:
                db.executemany("DELETE FROM claims WHERE owner = ? AND pass = ?", [(owner, one) for one in passes])

    # ---- use ----

    def touch(self, shards: Iterable[int]) -> None:
        """Note that shards were used, to the minute: a timestamp on every read would make every read a write."""
        now = time.time()
        db = self.db()
        for some in _chunks(sorted(shards)):
            stale = f"SELECT id FROM shards WHERE id IN ({_marks(some)}) AND used < ?"
            for (shard,) in db.execute(stale, [*some, now - 60]).fetchall():
                db.execute("UPDATE shards SET used = ? WHERE id = ?", (now, shard))

    def note_run(self, name: str, used: Mapping[Scope, Iterable[bytes]]) -> None:
        """Record which entries a run used; entries that are gone by now are left out."""
        with self.transaction() as db:
            db.execute("INSERT OR IGNORE INTO runs (name) VALUES (?)", (name,))
            (run,) = db.execute("SELECT id FROM runs WHERE name = ?", (name,)).fetchone()
            for scope, digests in used.items():
                db.executemany(
                    """INSERT OR IGNORE INTO uses SELECT sequence, scope, ? FROM entries
                       WHERE sequence = (SELECT id FROM sequences WHERE digest = ?) AND scope = ?""",
                    [(run, digest, self.scope_id(scope)) for digest in digests],
                )

    def pin(self, model: str, hook: str, run: str) -> None:
        with self.transaction() as db:
            db.execute("INSERT OR IGNORE INTO pins VALUES (?,?,?)", (model, hook, run))
            # Nothing more goes into a shard that is kept for what is in it.
            db.execute(f"UPDATE shards SET sealed = 1 WHERE id IN ({_PINNED_BY_RUN})")

    def unpin(self, model: str, hook: str, run: str) -> int:
        with self.transaction() as db:
            return db.execute("DELETE FROM pins WHERE model = ? AND hook = ? AND run = ?", (model, hook, run)).rowcount

    def pins(self) -> list[tuple[str, str, str]]:
        return self.db().execute("SELECT model, hook, run FROM pins").fetchall()

    def pinned_shards(self) -> set[int]:
        """Shards that a pin covers, by model and hook point or because a pinned run used an entry in them."""
        named = """SELECT shards.id FROM shards JOIN pins ON run = '' AND pins.model IN ('', shards.model)
                   AND pins.hook IN ('', shards.hook)"""
        return {shard for query in (named, _PINNED_BY_RUN) for (shard,) in self.db().execute(query)}


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None)
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            # A power cut may lose the last transactions or shard bytes behind the index; checksums tell the latter.
            db.execute("PRAGMA synchronous = NORMAL")
            # New keys fall anywhere in the tree of digests: room for more of it, and fewer checkpoints, each of which
            # writes all of its changed pages once.
            db.execute("PRAGMA cache_size = -16000")
            db.execute("PRAGMA wal_autocheckpoint = 4000")
            return db
        except sqlite3.OperationalError as error:  # while another process opens or closes, SQLite does not wait itself
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.01)


def token_ids(stored: bytes) -> Tensor:
    """A sequence's token ids, kept as int32."""
    return torch.frombuffer(bytearray(stored), dtype=torch.int32).long()


def _scope_id(db: sqlite3.Connection, scope: Scope) -> int | None:
    where = "model = ? AND numerics = ? AND hook = ? AND codec = ? AND edit = ?"
    row = db.execute(f"SELECT id FROM scopes WHERE {where}", scope).fetchone()
    return None if row is None else int(row[0])


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except (ValueError, TypeError, AttributeError):  # damaged: no checksum will fit it
        return ()


def _chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), _MANY):
        yield items[start : start + _MANY]


def _marks(items: Sequence[object]) -> str:
    return ",".join("?" * len(items))
