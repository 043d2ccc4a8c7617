"""The files of the disk tier: append-only shards, one series for each model and hook point.

A shard that is being written is locked by its writer (flock), so two processes never append to one file; a shard whose
writer has gone is taken up again, and what it had appended but not committed is cut off. Rows are read with `pread`:
it is faster than a memory map here, and a file that another process has cut short is an error, not a crash.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from workbench.activations.index import Index

SHARD_BYTES = 256 * 10**6
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_OPEN = 128  # files held open for writing, and as many for reading
_PIECES = 1000  # buffers in one call, below every system's IOV_MAX


@dataclass
class Writer:
    """One open shard of this process."""

    shard: int
    name: str
    file: int  # descriptor
    end: int  # including what is not committed yet
    committed: int


class Writers:
    """The shards that this process appends to. Not safe under threads: the disk tier holds its lock."""

    def __init__(self, root: Path, index: Index):
        self._root = root
        self._index = index
        self._open: OrderedDict[tuple[str, str], Writer] = OrderedDict()

    def append(self, series: tuple[str, str], pieces: Sequence[memoryview]) -> tuple[Writer, int]:
        """Write after the end of the series' shard; returns the offset. It counts once it is committed."""
        writer = self._open.get(series)
        if writer is not None and writer.end >= SHARD_BYTES:
            self.close(series)
            writer = None
        if writer is None:
            writer = self._open[series] = self._adopt(*series) or self._create(*series)
        self._open.move_to_end(series)
        offset = writer.end
        todo = list(pieces)
        while todo:
            written = os.pwritev(writer.file, todo[:_PIECES], writer.end)
            writer.end += written
            while todo and written >= len(todo[0]):
                written -= len(todo.pop(0))
            if written:
                todo[0] = todo[0][written:]
        return writer, offset

    def rollback(self) -> None:
        """Cut off what was not committed, and close those shards: whoever opens them again asks the index."""
        for series, writer in list(self._open.items()):
            if writer.end != writer.committed:
                # The index knows better than we: an interrupt may have come between the commit and our noting it.
                query = "SELECT bytes FROM shards WHERE id = ? AND file = ?"
                row = self._index.db().execute(query, (writer.shard, writer.name)).fetchone()
                if row is not None:
                    with suppress(OSError):  # the next writer of this shard does it
                        os.ftruncate(writer.file, row[0])
                self.close(series)

    def settle(self) -> None:
        """After a commit. Only now may files be closed: a writer in use must keep its lock."""
        for writer in self._open.values():
            writer.committed = writer.end
        while len(self._open) > _OPEN:
            self.close(next(iter(self._open)))

    def close(self, series: tuple[str, str]) -> None:
        os.close(self._open.pop(series).file)

    def close_all(self) -> None:
        for series in list(self._open):
            self.close(series)

    def forget(self, shards: set[int]) -> None:
        """Close shards that exist no more."""
        for series, writer in list(self._open.items()):
            if writer.shard in shards:
                self.close(series)

    def _adopt(self, model: str, hook: str) -> Writer | None:
        """A shard of this series with room in it, whose writer has gone."""
        db = self._index.db()
        query = "SELECT id, file FROM shards WHERE model = ? AND hook = ? AND bytes < ? AND NOT sealed"
        for shard, name in db.execute(query, (model, hook, SHARD_BYTES)).fetchall():
            try:
                file = os.open(self._root / name, os.O_WRONLY)
            except (OSError, ValueError):  # just created, just evicted, no file any more, or a damaged name
                continue
            if _lock(file):
                row = db.execute("SELECT bytes FROM shards WHERE id = ? AND file = ?", (shard, name)).fetchone()
                if row is not None and os.fstat(file).st_size >= row[0]:
                    os.ftruncate(file, row[0])
                    return Writer(shard, name, file, row[0], row[0])
            os.close(file)
        return None

    def _create(self, model: str, hook: str) -> Writer:
        """The index row comes before the file, so that a file without a row is always a leftover."""
        name = f"{uuid.uuid4().hex}.rows"
        insert = "INSERT INTO shards (file, model, hook, bytes, entries, used) VALUES (?,?,?,0,0,?)"
        shard = self._index.db().execute(insert, (name, model, hook, time.time())).lastrowid
        assert shard is not None
        file = os.open(self._root / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        if not _lock(file):  # another process looking for a shard was quicker
            os.close(file)
            return self._create(model, hook)
        return Writer(shard, name, file, 0, 0)


class Readers:
    """Open files to read from, least recently used closed first. Safe under threads."""

    def __init__(self, root: Path):
        self._root = root
        self._files: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str, offset: int, buffers: Sequence[Tensor]) -> int:
        """Fill byte tensors from one place on; returns how many bytes there were, 0 for a file that is gone or cannot
        be read.

        Raises OSError when it is the system that has no more (open files, memory): that is no damage.
        """
        views = [buffer.numpy().data for buffer in buffers]
        with self._lock:
            file = self._files.pop(name, None)
        got = 0
        try:
            file = os.open(self._root / name, os.O_RDONLY) if file is None else file
        except (OSError, ValueError) as error:  # ValueError: a damaged name
            if getattr(error, "errno", None) in _EXHAUSTED:
                raise
            return 0
        try:
            for start in range(0, len(views), _PIECES):
                some = views[start : start + _PIECES]
                size = sum(map(len, some))
                while size:
                    count = os.preadv(file, some, offset + got)
                    got += count
                    size -= count
                    if not count:
                        return got
                    if size:  # a short read: go on inside the buffers
                        while count and count >= len(some[0]):
                            count -= len(some.pop(0))
                        some[0] = some[0][count:]
            return got
        except (OSError, OverflowError) as error:  # not a file, a damaged disk, a damaged offset
            if getattr(error, "errno", None) in _EXHAUSTED:
                raise
            return got
        finally:
            self._give_back(name, file)

    def _give_back(self, name: str, file: int) -> None:
        with self._lock:
            if name in self._files:
                os.close(file)
            else:
                self._files[name] = file
            while len(self._files) > _OPEN:
                os.close(self._files.popitem(last=False)[1])

    def close(self, name: str) -> None:
        with self._lock:
            if name in self._files:
                os.close(self._files.pop(name))

    def close_all(self) -> None:
        for name in list(self._files):
            self.close(name)

    def renew_lock(self) -> None:
        """In a forked child, where the thread that held it does not exist."""
        self._lock = threading.Lock()


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
