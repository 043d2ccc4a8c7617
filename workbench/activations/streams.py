"""Shuffled batches of activation rows, from a store that may be larger than memory.

The shuffle has two levels. The sequences are permuted over the whole set and cut into windows of about `window`
tokens; the rows of a window are permuted uniformly. So any row may come anywhere, rows of one sequence come within one
window, and no more than two windows are in memory: the one that is being handed out, and the next, which is read (or
computed) meanwhile. Cold rows are never gathered one by one: that is some thirty times slower than reading whole
sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench import sites
from workbench.errors import UserError

Rows = dict[str, Float[Tensor, "row *rest"]]
Load = Callable[[Sequence[int]], Mapping[str, Tensor]]


class Stream(Iterator[Rows]):
    """An iterator over batches {hook: [rows, ...]}; each row comes exactly once, the last batch may be smaller.

    The order depends on the seed alone. `position` is the number of batches handed out so far: a stream made with
    `start=position` and the same seed, sizes and sequences goes on from there, and skips whole windows unread.
    The first `skip` rows of each sequence are left out.
    """

    def __init__(
        self,
        load: Load,
        lengths: Sequence[int],
        hooks: Sequence[str],
        *,
        rows: int = 4096,
        window: int = 2**18,
        seed: int = 0,
        start: int = 0,
        skip: int = 0,
    ):
        for name, value, least in (("rows", rows, 1), ("window", window, 1), ("start", start, 0), ("skip", skip, 0)):
            if value < least:
                raise UserError(f"{name}={value} is too small; give at least {least}.")
        for hook in hooks:
            if sites.split(hook)[1] in sites.PATTERN_HOOKS:
                raise UserError(f"{hook} has no row per token, so it cannot be streamed; use get().")
        self.rows = rows
        self.position = start
        self._load = load
        self._lengths, self._skip = lengths, skip
        self._seed = seed
        self._windows = _windows(lengths, window, seed)
        self._batches = self._run()

    def __len__(self) -> int:
        """Batches in the whole stream, whatever the start."""
        return -(-self._handed_out(range(len(self._lengths))) // self.rows)

    def __next__(self) -> Rows:
        batch = next(self._batches)
        self.position += 1
        return batch

    def feed(self, *consumers: Callable[[Rows], object]) -> None:
        """Hand every batch to every consumer: one pass over the store, however many learn from it.

        A consumer that changes a batch in place changes it for those after it.
        """
        for batch in self:
            for consumer in consumers:
                consumer(batch)

    def _handed_out(self, members: Iterable[int]) -> int:
        """Rows of some sequences."""
        return sum(max(0, self._lengths[i] - self._skip) for i in members)

    def _kept(self, members: Sequence[int]) -> np.ndarray:
        """Where these are among all rows of the sequences."""
        lengths = np.array([self._lengths[i] for i in members])
        position = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
        return np.flatnonzero(position >= self._skip)

    def close(self) -> None:
        """Stop reading ahead."""
        self._batches.close()

    def _run(self) -> Generator[Rows, None, None]:
        skip = self.position * self.rows
        numbers: list[int] = []
        for number, members in enumerate(self._windows):
            length = self._handed_out(members)
            if skip >= length and not numbers:
                skip -= length
            else:
                numbers.append(number)
        held: Rows = {}
        ahead = ThreadPoolExecutor(1)
        try:
            coming: Future[Mapping[str, Tensor]] | None = None
            for place, number in enumerate(numbers):
                coming = coming or ahead.submit(self._load, self._windows[number])
                found = coming.result()
                following = numbers[place + 1 : place + 2]
                coming = ahead.submit(self._load, self._windows[following[0]]) if following else None
                yield from self._hand_out(found, held, number, skip, last=not following)
                skip = 0
        finally:
            ahead.shutdown(wait=False, cancel_futures=True)  # not joined: the collector may end us in that very thread

    def _hand_out(self, found: Mapping[str, Tensor], held: Rows, number: int, skip: int, last: bool) -> Iterator[Rows]:
        """Full batches of a window, led by what the window before left over; the rest goes to `held`."""
        kept = self._kept(self._windows[number])
        order = torch.from_numpy(kept[_shuffled(len(kept), self._seed, number + 1)])[skip:]
        place = 0
        if held:
            place = min(self.rows - len(next(iter(held.values()))), len(order))
            batch = {hook: torch.cat([held[hook], x[order[:place]]]) for hook, x in found.items()}
            held.clear()
            if len(next(iter(batch.values()))) == self.rows or (last and place == len(order)):
                yield batch
            else:
                held |= batch
                return
        for start in range(place, len(order), self.rows):
            some = order[start : start + self.rows]
            batch = {hook: x[some] for hook, x in found.items()}
            if len(some) < self.rows and not last:
                held |= batch
            else:
                yield batch


def _windows(lengths: Sequence[int], window: int, seed: int) -> list[list[int]]:
    windows: list[list[int]] = []
    filled = window
    for i in _shuffled(len(lengths), seed, 0).tolist():
        if filled >= window:
            windows.append([])
            filled = 0
        windows[-1].append(i)
        filled += lengths[i]
    return windows


def _shuffled(n: int, seed: int, number: int) -> np.ndarray:
    """A permutation. Not torch's generator: it takes 32 bits of a seed, and neighbouring seeds begin alike."""
    return np.random.default_rng([seed % 2**64, number]).permutation(n)
