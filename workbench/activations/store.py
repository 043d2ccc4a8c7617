"""ActivationStore: activations by content, computed at most once.

`get` looks on the device, in memory, then on disk, then runs the model once for whatever is missing: one forward pass
serves every missing hook point of a sequence and stops after the deepest. Sequences of equal length are batched.
Values are stored per sequence, so any other batch, order or tool finds them again. The first stored value is the one
everybody gets; a recomputation would agree to float rounding (other batch shapes change float32 by up to 1e-6).
"""

from __future__ import annotations

import copy
import os
import threading
import weakref
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench import settings
from workbench.activations import capture, codecs, inventory, keys
from workbench.activations.capture import Clock
from workbench.activations.computing import Computing, Request, Row, stored
from workbench.activations.disk import Allocate, Disk, block
from workbench.activations.inventory import Estimate, Manifest, Recheck, Series, Stats
from workbench.activations.keys import Edits, Key, Scope
from workbench.activations.memory import Memory, free_bytes
from workbench.activations.merging import Merged, merge
from workbench.activations.streams import Stream
from workbench.errors import UserError, unknown
from workbench.models import LanguageModel

Sequences = Sequence[Int[Tensor, "_"]] | Int[Tensor, "batch pos"]
COUNTS = ("device_hits", "memory_hits", "disk_hits", "computed", "waited_for", "forward_passes")


class ActivationStore:
    """Safe under threads, processes and forks; what two of them ask for at once is computed once."""

    def __init__(
        self,
        root: Path | None = None,
        *,
        memory_bytes: int | None = None,
        disk_bytes: int | None = None,
        device_bytes: int | None = None,
        codec: str = "float32",
    ):
        """A store in `root` (default: `store` under WORKBENCH_HOME), with budgets in bytes for each tier."""
        if codec not in codecs.CODECS:
            raise unknown("codec", codec, codecs.CODECS)
        self.codec = codec
        self.disk = Disk(root or settings.home() / "store", settings.store_disk() if disk_bytes is None else disk_bytes)
        self._pins = inventory.Pins(self.disk.index)
        self.memory = Memory(settings.store_memory() if memory_bytes is None else memory_bytes, self._pins.covers)
        self.device = Memory(settings.store_device() if device_bytes is None else device_bytes, self._pins.covers)
        self._clock = Clock()
        self.used: dict[Scope, set[bytes]] | None = None
        self._begin()

    def session(self) -> ActivationStore:
        """The same store with counts of its own and a record of the entries `used`: what one run did."""
        other = copy.copy(self)
        other._begin()
        other.used = {}
        return other

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int | float] = {**dict.fromkeys(COUNTS, 0), "seconds_computing": 0.0}
        os.register_at_fork(after_in_child=partial(_renew_locks, weakref.ref(self)))

    # ---- the request ----

    def get(
        self,
        model: LanguageModel,
        sequences: Sequences,
        hooks: Sequence[str],
        *,
        edit: Edits | None = None,
        device: str | torch.device = "cpu",
        max_error: float | None = None,
        canonical: bool = False,
    ) -> dict[str, list[Float[Tensor, "_ ..."]]]:
        """The activations of each sequence at each hook point, in order; float32, the caller's own.

        edit       interventions in force, part of the key
        device     where to have them; on a GPU they are kept there too
        max_error  the largest relative error of a row that the codec may have made
        canonical  only values computed with the sequence alone in its batch: bitwise reproducible, slower

        Raises UserError for unknown hook points, interventions without a key, a request larger than the memory that is
        free, a stored error above `max_error`, and a disk that cannot be written.
        """
        request = self._request(model, sequences, hooks, edit, canonical)
        self._refuse_what_cannot_fit(request)
        wanted = request.keys()
        rows: dict[Key, Tensor] = {}
        target = torch.device(device)
        if target.type != "cpu":
            rows = self._on_device(request, wanted, target, max_error)
        else:
            with closing(self._rows(request, wanted)) as found:  # closed in any case: it holds claims
                for key, row, error in found:
                    _check_error(key, error, max_error)
                    rows[key] = row
        return {
            hook: _each_its_own([rows[Key(scope, digest)] for digest in request.sequences])
            for hook, scope in request.scopes.items()
        }

    def fill(
        self, model: LanguageModel, sequences: Sequences, hooks: Sequence[str], *, edit: Edits | None = None,
        canonical: bool = False,
    ) -> None:  # fmt: skip
        """Compute and store what is missing, and return nothing: memory does not grow with the number of sequences.

        Raises UserError, besides what `get` does, for more than the disk's budget.
        """
        request = self._request(model, sequences, hooks, edit, canonical)
        self._refuse_what_no_disk_holds(request)
        digests = list(request.tokens)
        size = max(1, 2**16 // max(1, len(hooks)))
        for start in range(0, len(digests), size):
            some = request.keys(digests[start : start + size])
            here = self.disk.has(some)
            for row in self._computing(request).rows(key for key in some if key not in here):
                del row  # it keeps its batch in memory
            self._note_used(some)

    def stream(
        self,
        model: LanguageModel,
        sequences: Sequence[Int[Tensor, "_"]] | Int[Tensor, "batch pos"],
        hooks: Sequence[str],
        *,
        rows: int = 4096,
        window: int = 2**18,
        seed: int = 0,
        start: int = 0,
        skip: int = 0,
        edit: Edits | None = None,
    ) -> Stream:
        """Batches of `rows` activation rows (one per token) in shuffled order, aligned over the hook points.

        Works on a store larger than memory; see `Stream` for the shuffle and how to resume at `start`.
        The first `skip` positions of each sequence are left out: what is at the very first is many times larger than
        the rest, and tells nothing of the text.
        """
        request = self._request(model, sequences, hooks, edit, False)
        lengths = [len(request.tokens[digest]) for digest in request.sequences]
        shapes = {hook: capture.shape_at(hook, model.config, 1) for hook in hooks}

        def load(members: Sequence[int]) -> dict[str, Tensor]:
            return self._window(request, [request.sequences[i] for i in members], shapes)

        return Stream(load, lengths, list(hooks), rows=rows, window=window, seed=seed, start=start, skip=skip)

    def _request(
        self, model: LanguageModel, sequences: Sequences, hooks: Sequence[str], edit: Edits | None, canonical: bool
    ) -> Request:
        for hook in hooks:
            if hook not in model.hook_points:
                raise unknown(f"hook point of {model.name}", hook, model.hook_points)
        # Copies: a caller may change the tokens while a stream is still to compute them.
        tokens = [one.detach().to("cpu", torch.int64, copy=True) for one in sequences]
        digests = keys.sequence_digests(tokens)
        return Request(
            model=model,
            scopes=keys.scopes(model, list(dict.fromkeys(hooks)), self.codec, edit, canonical),
            sequences=digests,
            tokens=dict(zip(digests, tokens, strict=True)),
            edit=dict(edit) if edit else None,
            alone=canonical,
        )

    # ---- tiers ----

    def _rows(
        self,
        request: Request,
        wanted: Sequence[Key],
        *,
        admit: bool = True,
        own: bool = True,
        allocate: Allocate = block,
    ) -> Generator[Row, None, None]:
        """Each key with its row. `admit`: keep a copy in memory. Without `own` the row may be the memory tier's."""
        held = self.memory.get(wanted)
        self._count("memory_hits", len(held))
        self._note_used(held)
        for key, (row, error) in held.items():
            yield key, row.clone() if own else row, error
        missing = {key: None for key in wanted if key not in held}  # in order: batches must not depend on hashes
        for key, row, error in stored(self.disk, self.codec, list(missing), allocate):
            self._count("disk_hits", 1)
            del missing[key]
            yield self._taken(key, row, error, admit)
        for key, row, error in self._computing(request).rows(missing):
            yield self._taken(key, row, error, admit)

    def _taken(self, key: Key, row: Tensor, error: float, admit: bool) -> Row:
        if admit:
            self._remember(key, row, error)
        self._note_used([key])
        return key, row, error

    def _computing(self, request: Request) -> Computing:
        return Computing(self.disk, self.codec, self._clock, self._count, request)

    def _remember(self, key: Key, row: Tensor, error: float) -> None:
        """A copy for the memory tier; pinned where a GPU will want it, so that it can travel beside the computation."""
        if row.numel() * row.element_size() > self.memory.budget:
            return
        mine = torch.empty(row.shape, dtype=row.dtype, pin_memory=torch.cuda.is_available())
        self.memory.put(key, mine.copy_(row), error)

    def _on_device(
        self, request: Request, wanted: Sequence[Key], device: torch.device, max_error: float | None
    ) -> dict[Key, Tensor]:
        """Rows on a GPU: those that are there already, then the rest through the host."""
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device {str(device)!r} was asked for, but torch sees no GPU; leave device out.")
        rows: dict[Key, Tensor] = {}
        for key, (row, error) in self.device.get(wanted).items():
            if row.device == device or device.index is None:
                _check_error(key, error, max_error)
                rows[key] = row.clone()
        self._count("device_hits", len(rows))
        self._note_used(rows)
        with closing(self._rows(request, [key for key in wanted if key not in rows], own=False)) as found:
            for key, row, error in found:
                _check_error(key, error, max_error)
                rows[key] = row.to(device, non_blocking=True)
                self.device.put(key, rows[key].clone(), error)
        return rows

    def _window(
        self, request: Request, digests: Sequence[bytes], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Tensor]:
        """The rows of some sequences, one after the other; stored float32 ones are read right into place."""
        total = sum(len(request.tokens[digest]) for digest in digests)
        # numpy puts large arrays on huge pages, see `block`
        into = {hook: torch.from_numpy(np.empty((total, *shape[1:]), np.float32)) for hook, shape in shapes.items()}
        first: dict[bytes, int] = {}
        place = 0
        places: list[tuple[int, int, bytes]] = []
        for digest in digests:
            end = place + len(request.tokens[digest])
            places.append((place, end, digest))
            first.setdefault(digest, place)
            place = end

        def part(key: Key) -> Tensor:
            start = first[key.sequence]
            return into[key.scope.hook][start : start + len(request.tokens[key.sequence])]

        def in_place(wanted: Sequence[tuple[Key, int]]) -> list[Tensor]:
            return [part(key).view(-1).view(torch.uint8) for key, _ in wanted]

        allocate = in_place if self.codec == "float32" else block

        for key, row, _ in self._rows(request, request.keys(digests), admit=False, allocate=allocate):
            target = part(key)
            if target.data_ptr() != row.data_ptr():
                target.copy_(row)
        for start, end, digest in places:  # a sequence that comes again
            if first[digest] != start:
                for x in into.values():
                    x[start:end] = x[first[digest] : first[digest] + end - start]
        return into

    # ---- costs and upkeep ----

    def estimate(
        self,
        model: LanguageModel,
        sequences: Sequences,
        hooks: Sequence[str],
        *,
        edit: Edits | None = None,
        canonical: bool = False,
    ) -> Estimate:
        """Bytes, seconds and peak memory of a request, without making it."""
        request = self._request(model, sequences, hooks, edit, canonical)
        wanted = request.keys()
        here = set(self.memory.get(wanted))
        here |= self.disk.has(key for key in wanted if key not in here).keys()
        missing = [key for key in wanted if key not in here]
        room = self.memory.budget - self.memory.bytes
        return inventory.estimate(
            model, self.codec, request.tokens, request.sequences, wanted, missing, self._clock, request.alone, room
        )

    def stats(self) -> Stats:
        entries, size = self.disk.totals()
        return Stats(
            **self._counts,  # type: ignore[arg-type]
            device_entries=len(self.device),
            device_bytes=self.device.bytes,
            device_budget=self.device.budget if torch.cuda.is_available() else 0,
            memory_entries=len(self.memory),
            memory_bytes=self.memory.bytes,
            memory_budget=self.memory.budget,
            disk_entries=entries,
            disk_bytes=size,
            disk_budget=self.disk.budget,
        )

    def series(self) -> list[Series]:
        """What is on disk, by model and hook point."""
        return inventory.series(self.disk.index)

    def show(self, *, sequence: str = "", hook: str = "", run: str = "", limit: int = 100) -> list[Manifest]:
        """Entries on disk: by the first letters of a sequence's digest, by hook point, by a run that used them.

        Raises UserError when nothing matches.
        """
        return inventory.manifests(self.disk.index, sequence=sequence, hook=hook, run=run, limit=limit)

    def merge(self, folder: Path) -> Merged:
        """Take in what the store in another folder has and this one lacks, checked and with its manifests.

        Raises UserError if there is no store in it, or it is this one.
        """
        return merge(self.disk, folder)

    def verify(self) -> list[str]:
        """Read every stored entry and compare it with its checksum; one sentence per damaged entry."""
        return list(self.disk.verify())

    def recheck(self, model: LanguageModel, *, n: int = 8, seed: int = 0) -> list[Recheck]:
        """Compute n stored entries of a model anew and compare: catches what checksums cannot, such as values of other
        software. Only activations without interventions: of those the store knows only a digest.

        Raises UserError when the store has none of this model with these numerics.
        """
        found = []
        for key, tokens in inventory.draw(self.disk.index, model, n, seed):
            for _, row, error in stored(self.disk, key.scope.codec, [key]):
                hook = key.scope.hook
                anew = model.run(tokens[None], capture=[hook], logits="none")[hook][0].cpu().float()
                gap = torch.where(anew == row, 0, anew - row).norm() / anew[anew.isfinite()].norm().clamp_min(1e-30)
                limit = (1e-5 if model.dtype == torch.float32 else 0.05) + 2 * error
                found.append(Recheck(key.sequence.hex(), hook, float(gap), limit))
        return found

    def evict(self, *, model: str | None = None, hook: str | None = None, keep_bytes: int = 0) -> int:
        """Drop stored activations of a model (fingerprint) or hook point, least recently used first, until `keep_bytes`
        are left of them. Returns the bytes freed on disk; what is pinned stays."""
        if keep_bytes < 0:
            raise UserError(f"keep_bytes={keep_bytes} is negative; give the bytes that may stay.")
        self.memory.drop()
        self.device.drop()
        return self.disk.evict(model=model, hook=hook, keep_bytes=keep_bytes)

    def note_run(self, run: str) -> None:
        """Write down that a run used the entries that this session handed out."""
        with self.disk.index.guard():
            self.disk.index.note_run(run, self.used or {})

    def pin(self, *, model: str = "", hook: str = "", run: str = "") -> None:
        """Keep the activations of a model (fingerprint), a hook point or a run from eviction, in every tier."""
        self._pins.add(model, hook, run)
        self.memory.sort_pins()
        self.device.sort_pins()

    def unpin(self, *, model: str = "", hook: str = "", run: str = "") -> None:
        """Take a pin back. Raises UserError if there is none."""
        self._pins.remove(model, hook, run)
        self.memory.sort_pins()
        self.device.sort_pins()

    def pins(self) -> list[dict[str, str]]:
        """What is pinned: model, hook point and run of each pin, empty for any."""
        return self._pins.rules()

    def _refuse_what_cannot_fit(self, request: Request) -> None:
        config, hooks = request.model.config, list(request.scopes)
        lengths = Counter(len(request.tokens[digest]) for digest in request.sequences)
        size = sum(n * capture.captured_bytes(config, length, hooks) for length, n in lengths.items())
        free = free_bytes()
        if size > free:
            raise UserError(
                f"{len(request.sequences):,} sequences at {len(hooks)} hook points are {size / 1e9:,.1f} GB, but "
                f"{free / 1e9:,.1f} GB of memory are free; use stream(), fewer hook points or fewer sequences."
            )

    def _refuse_what_no_disk_holds(self, request: Request) -> None:
        config = request.model.config
        size = sum(
            n * codecs.size(capture.shape_at(hook, config, length), self.codec)
            for length, n in Counter(map(len, request.tokens.values())).items()
            for hook in request.scopes
        )
        if size > self.disk.budget or size > self.disk.room(request.keys()):
            raise UserError(
                f"{len(request.tokens):,} sequences at {len(request.scopes)} hook points take {size:,} bytes as "
                f"{self.codec}, but of the disk tier's {self.disk.budget:,} bytes {self.disk.room(request.keys()):,} "
                "are not pinned for something else; raise WORKBENCH_STORE_DISK, choose a smaller codec or ask for less."
            )

    def _count(self, name: str, amount: int | float) -> None:
        with self._lock:
            self._counts[name] += amount

    def _note_used(self, some: Iterable[Key]) -> None:
        if self.used is not None:
            with self._lock:
                for key in some:
                    self.used.setdefault(key.scope, set()).add(key.sequence)


def _renew_locks(store: weakref.ref[ActivationStore]) -> None:
    """In a forked child, where the thread that held one does not exist."""
    this = store()
    if this is not None:
        this._lock = threading.Lock()
        this.memory.renew_lock()
        this.device.renew_lock()


def _each_its_own(rows: list[Tensor]) -> list[Tensor]:
    """The same sequence twice in one request: two tensors."""
    seen: set[int] = set()
    for i, row in enumerate(rows):
        if id(row) in seen:
            rows[i] = row.clone()
        seen.add(id(row))
    return rows


def _check_error(key: Key, error: float, limit: float | None) -> None:
    if limit is not None and not error <= limit:
        raise UserError(
            f"{key.scope.hook} is stored as {key.scope.codec} with a relative error of {error:.2g}, more than "
            f"max_error={limit:g}; use a store with a finer codec, such as ActivationStore(codec='float32')."
        )


def shared() -> ActivationStore:
    """The store under WORKBENCH_HOME, one for the whole process: what one run has in memory serves the next."""
    return _shared(settings.home() / "store", settings.store_memory(), settings.store_disk(), settings.store_device())


@cache
def _shared(root: Path, memory: int, disk: int, device: int) -> ActivationStore:
    return ActivationStore(root, memory_bytes=memory, disk_bytes=disk, device_bytes=device)
