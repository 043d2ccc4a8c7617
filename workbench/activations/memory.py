"""The host tier: tensors by key, least recently used first out, within a budget of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict

from torch import Tensor


class Memory:
    """Safe under threads. A tensor handed in or out belongs to the tier: callers copy."""

    def __init__(self, budget: int):
        self.budget = budget
        self.bytes = 0
        self._rows: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: bytes) -> Tensor | None:
        with self._lock:
            row = self._rows.get(key)
            if row is not None:
                self._rows.move_to_end(key)
            return row

    def put(self, key: bytes, row: Tensor) -> None:
        size = row.numel() * row.element_size()
        with self._lock:
            if size > self.budget or key in self._rows:
                return
            self._rows[key] = row
            self.bytes += size
            while self.bytes > self.budget:
                _, old = self._rows.popitem(last=False)
                self.bytes -= old.numel() * old.element_size()

    def clear(self) -> None:
        with self._lock:
            self._rows.clear()
            self.bytes = 0
