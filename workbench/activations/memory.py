"""The memory tiers: rows by key, least recently used first out, within a budget of bytes.

One tier lies in host memory and, where the model runs on a GPU, one on the device. Rows of pinned hook points stay
until they are unpinned. A tensor in a tier belongs to the tier: callers get copies.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import psutil
from torch import Tensor

from workbench.activations.keys import Key


class Held(NamedTuple):
    row: Tensor
    error: float  # of the codec, relative; see codecs


class Memory:
    """Safe under threads. `pinned` tells which keys may not be dropped."""

    def __init__(self, budget: int, pinned: Callable[[Key], bool] = lambda _: False):
        self.budget = budget
        self.bytes = 0
        self._pinned = pinned
        self._rows: OrderedDict[Key, Held] = OrderedDict()
        self._kept: dict[Key, Held] = {}  # pinned: apart, so that making room never walks over them
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows) + len(self._kept)

    def get(self, keys: Iterable[Key]) -> dict[Key, Held]:
        """Those that are here."""
        found: dict[Key, Held] = {}
        with self._lock:
            for key in keys:
                held = self._rows.get(key)
                if held is not None:
                    self._rows.move_to_end(key)
                else:
                    held = self._kept.get(key)
                if held is not None:
                    found[key] = held
        return found

    def put(self, key: Key, row: Tensor, error: float = 0.0) -> None:
        """Keep a row, dropping what was used longest ago; not at all if it cannot fit beside what is pinned."""
        size = _size(row)
        with self._lock:
            if size > self.budget or key in self._rows or key in self._kept:
                return
            while self.bytes + size > self.budget and self._rows:
                self.bytes -= _size(self._rows.popitem(last=False)[1].row)
            if self.bytes + size > self.budget:
                return
            (self._kept if self._pinned(key) else self._rows)[key] = Held(row, error)
            self.bytes += size

    def drop(self) -> None:
        """Forget what is not pinned."""
        with self._lock:
            self.bytes -= sum(_size(held.row) for held in self._rows.values())
            self._rows.clear()

    def sort_pins(self) -> None:
        """To be called when what is pinned has changed."""
        with self._lock:
            held = {**self._rows, **self._kept}
            self._kept = {key: row for key, row in held.items() if self._pinned(key)}
            self._rows = OrderedDict((key, row) for key, row in held.items() if key not in self._kept)

    def renew_lock(self) -> None:
        self._lock = threading.Lock()


def _size(row: Tensor) -> int:
    return row.numel() * row.element_size()


def free_bytes() -> int:
    """Host memory that can still be had."""
    return int(psutil.virtual_memory().available)
