"""Progress of what takes long: a bar on a terminal or in a notebook; in a job, its journal (`workbench.jobs`)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any, Protocol

from tqdm import tqdm

EVERY = 0.5  # seconds between two reports

# tqdm's own lock is shared by all forks: one that is killed while it holds it would stop the bars of all others.
os.register_at_fork(after_in_child=lambda: tqdm.set_lock(RLock()))


@dataclass(frozen=True)
class Stage:
    """An open bar.

    n, total  what is behind, of how much; total None where it is not known
    seconds   since it was opened
    rate      of n in a second since then; 0 before anything is behind
    """

    name: str
    n: float
    total: float | None
    seconds: float
    rate: float

    @property
    def left(self) -> float | None:
        """Seconds, if it goes on as it went."""
        return None if not self.rate or self.total is None else max(0.0, self.total - self.n) / self.rate

    @property
    def share(self) -> float | None:
        return min(1.0, self.n / self.total) if self.total else None

    def __str__(self) -> str:
        of = f" of {self.total:,.6g}" if self.total else ""
        done = f"{self.n:.0%}" if self.total == 1 else f"{self.n:,.6g}{of}"
        left = f" · {duration(self.left)} left" if self.left is not None else ""
        return f"{self.name} · {done}{left}"


def duration(seconds: float | None) -> str:
    """For people; nothing for None."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


class Reporter(Protocol):
    def stages(self, open: list[Stage]) -> None: ...

    def note(self, of: str, numbers: dict[str, float]) -> None: ...


_reporter: Reporter | None = None
_open: list[_Reported] = []


@contextmanager
def reported_to(reporter: Reporter) -> Iterator[None]:
    """In this block bars, the outermost first, and notes go to the reporter instead of the terminal."""
    global _reporter
    before, _reporter = _reporter, reporter
    try:
        yield
    finally:
        _reporter = before


def track(
    over: Iterable[Any] | None = None, desc: str = "", *, total: float | None = None, initial: float = 0,
    silent: bool = False,
) -> Any:  # fmt: skip
    """A bar of tqdm's over some things, or over so many; gone when it is done, and not drawn where nobody looks."""
    kind = tqdm if _reporter is None or silent else _Reported
    return kind(over, desc=desc, total=total, initial=initial, leave=False, disable=True if silent else None)


def note(of: str, **numbers: float) -> None:
    """Numbers on the way, such as a loss: points of a curve that can be looked at while it grows."""
    if _reporter is not None:
        _reporter.note(of, numbers)


class _Reported(tqdm):  # type: ignore[misc]
    def __init__(self, *args: Any, **options: Any):
        self.opened, self.began = time.monotonic(), options["initial"]
        _open.append(self)
        nowhere = open(os.devnull, "w")  # noqa: SIM115
        super().__init__(*args, **options | {"disable": False, "mininterval": EVERY, "file": nowhere})

    def display(self, *_: Any, **__: Any) -> None:
        if _reporter is not None:
            _reporter.stages([one.stage for one in _open])

    def close(self) -> None:
        if self in _open:
            _open.remove(self)
            super().close()
            self.fp.close()

    @property
    def stage(self) -> Stage:
        seconds = time.monotonic() - self.opened
        rate = (self.n - self.began) / max(seconds, 1e-9)
        return Stage(self.desc.removesuffix(": "), self.n, self.total, seconds, rate)
