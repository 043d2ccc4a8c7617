"""Finished parts of a run, so that one that is killed goes on where it was.

`runs.run` names a folder by the run's id, which holds all that decides the result; in it `once` keeps each part that
the analysis finishes, and finds it at the next attempt. The folder is gone when the run is saved. Outside of a run,
where nothing says what decides the result, everything is computed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from workbench import results, settings
from workbench.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
SECONDS = "seconds"  # the file


@dataclass
class Parts:
    """
    found    how many parts an earlier attempt had finished
    earlier  seconds that earlier attempts took, up to the last that they kept
    """

    folder: Path
    found: int = 0
    earlier: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if (self.folder / SECONDS).exists():
            self.earlier = float((self.folder / SECONDS).read_text())

    @property
    def seconds(self) -> float:
        """Of all attempts so far."""
        return self.earlier + time.perf_counter() - self.started


_current: ContextVar[Parts | None] = ContextVar("parts", default=None)


@contextmanager
def kept_in(folder: Path) -> Iterator[Parts]:
    """Keep finished parts in the folder until the block ends without an error."""
    parts = Parts(folder)
    token = _current.set(parts)
    try:
        yield parts
    finally:
        _current.reset(token)
    shutil.rmtree(folder, ignore_errors=True)


def once(name: str, kind: type[T], compute: Callable[[], T]) -> T:
    """The part of this name, from an earlier attempt at the same run if it got that far.

    kind  a frozen dataclass of tensors and plain values, as results are

    Raises UserError if the part cannot be kept.
    """
    parts = _current.get()
    if parts is None:
        return compute()
    path = parts.folder / f"{name}.safetensors"
    if path.exists():
        try:
            value = _read(path, kind)
        except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError) as error:
            log.warning("%s cannot be read (%s) and is computed again", path, error)
        else:
            parts.found += 1
            return value
    value = compute()
    _write(path, value)
    mark()
    return value


def mark() -> None:
    """Note the time, when something is kept that the next attempt need not do again."""
    parts = _current.get()
    if parts is not None:
        settings.writable_folder(parts.folder)
        aside = parts.folder / f"{SECONDS}.writing"
        aside.write_text(str(parts.seconds))
        os.replace(aside, parts.folder / SECONDS)


def _read(path: Path, kind: type[T]) -> T:
    with safe_open(path, "pt") as file:
        text = file.metadata()["value"]
    value: T = results.decode(kind, json.loads(text), load_file(path))
    return value


def _write(path: Path, value: object) -> None:
    encoded, arrays = results.encode(value)
    settings.writable_folder(path.parent)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    os.close(handle)
    try:
        save_file(arrays, aside, {"value": json.dumps(encoded)})
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        Path(aside).unlink(missing_ok=True)
        raise UserError(f"{path} could not be saved ({error}); free space and run it again.") from error
