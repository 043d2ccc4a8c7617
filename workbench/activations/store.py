"""ActivationStore: activations by content, computed at most once.

`get` looks in memory, then on disk, then runs the model once for whatever is missing: one forward pass serves every
missing hook point of a sequence and stops after the deepest. Sequences of equal length are batched; nothing is padded.
Values are stored per sequence, so any other batch, order or tool finds them again. The first stored value is the one
everybody gets; a recomputation would agree to float rounding (other batch shapes change float32 by up to 1e-6).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from workbench import settings, sites
from workbench.activations import codecs
from workbench.activations.disk import Disk, NewEntry
from workbench.activations.keys import Edits, keys
from workbench.activations.memory import Memory
from workbench.backend import ModelConfig
from workbench.errors import UserError, unknown
from workbench.models import LanguageModel

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Estimate:
    """What a request would cost before it is made. Seconds come from the passes this store has timed, or, before the
    first one, from a short matrix product; they are good to a factor of about two."""

    entries: int
    missing: int
    bytes: int
    missing_bytes: int
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class Stats:
    """Counts since this store was opened, and what it holds."""

    memory_hits: int
    disk_hits: int
    computed: int
    forward_passes: int
    seconds_computing: float
    memory_entries: int
    memory_bytes: int
    memory_budget: int
    disk_entries: int
    disk_bytes: int
    disk_budget: int


class ActivationStore:
    """Safe under threads and processes; identical requests in two threads compute once."""

    def __init__(
        self,
        root: Path | None = None,
        *,
        memory_bytes: int | None = None,
        disk_bytes: int | None = None,
        codec: str = "float32",
    ):
        """A store in `root` (default: `store` under WORKBENCH_HOME), with budgets in bytes for each tier."""
        if codec not in codecs.CODECS:
            raise unknown("codec", codec, codecs.CODECS)
        self.codec = codec
        self.memory = Memory(settings.store_memory() if memory_bytes is None else memory_bytes)
        self.disk = Disk(root or settings.home() / "store", settings.store_disk() if disk_bytes is None else disk_bytes)
        self._in_flight: dict[bytes, Future[Tensor]] = {}
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(("memory_hits", "disk_hits", "computed", "forward_passes"), 0)
        self._seconds = 0.0
        self._flops = 0.0

    # ---- the request ----

    def get(
        self,
        model: LanguageModel,
        sequences: Sequence[Int[Tensor, "_"]] | Int[Tensor, "batch pos"],
        hooks: Sequence[str],
        *,
        edit: Edits | None = None,
    ) -> dict[str, list[Float[Tensor, "_ ..."]]]:
        """The activations of each sequence at each hook point, in order; copies, float32, on the CPU.

        Raises UserError for unknown hook points, interventions without a key, and a disk that cannot be written.
        """
        sequences = list(sequences)
        wanted = keys(model, sequences, hooks, self.codec, edit)
        rows: dict[bytes, Tensor] = {}
        for key in set(wanted.values()):
            row = self.memory.get(key)
            if row is not None:
                rows[key] = row
        self._count("memory_hits", len(rows))
        rows |= self._from_disk([key for key in set(wanted.values()) if key not in rows])
        missing = {place: key for place, key in wanted.items() if key not in rows}
        if missing:
            rows |= self._compute_or_wait(model, sequences, missing, edit)
        return {hook: [rows[wanted[i, hook]].clone() for i in range(len(sequences))] for hook in hooks}

    def _from_disk(self, missing: Sequence[bytes]) -> dict[bytes, Tensor]:
        rows = {}
        for key, entry in self.disk.read(missing).items():
            rows[key] = codecs.decode(entry.data, entry.shape, entry.codec)
            self.memory.put(key, rows[key])
        self._count("disk_hits", len(rows))
        return rows

    def _compute_or_wait(
        self,
        model: LanguageModel,
        sequences: Sequence[Tensor],
        missing: Mapping[tuple[int, str], bytes],
        edit: Edits | None,
    ) -> dict[bytes, Tensor]:
        """Compute what nobody else is computing, then wait for the rest."""
        mine: dict[bytes, tuple[int, str]] = {}
        theirs: dict[bytes, Future[Tensor]] = {}
        with self._lock:
            for place, key in missing.items():
                if key in self._in_flight and key not in mine:
                    theirs[key] = self._in_flight[key]
                elif key not in mine:
                    mine[key] = place
                    self._in_flight[key] = Future()
        rows: dict[bytes, Tensor] = {}
        try:
            # Somebody may have stored a row between our look-up and our claim.
            rows |= self._from_disk(list(mine))
            todo = {place: key for key, place in mine.items() if key not in rows}
            for done in self._compute(model, sequences, todo, edit):
                rows |= done
            for key in mine:
                self._in_flight[key].set_result(rows[key])
        except BaseException as error:
            for key in mine:
                if not self._in_flight[key].done():
                    self._in_flight[key].set_exception(error)
            raise
        finally:
            with self._lock:
                for key in mine:
                    del self._in_flight[key]
        return rows | {key: future.result() for key, future in theirs.items()}

    def _compute(
        self,
        model: LanguageModel,
        sequences: Sequence[Tensor],
        todo: Mapping[tuple[int, str], bytes],
        edit: Edits | None,
    ) -> Iterator[dict[bytes, Tensor]]:
        """One pass per batch of equally long sequences that miss the same hook points; stored batch by batch."""
        hooks_of: dict[int, list[str]] = {}
        for i, hook in todo:
            hooks_of.setdefault(i, []).append(hook)
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for i, missing in hooks_of.items():
            groups.setdefault((len(sequences[i]), tuple(sorted(missing))), []).append(i)
        batches: list[tuple[list[int], tuple[str, ...]]] = []
        for (length, hooks), members in sorted(groups.items()):
            size = max(1, BATCH_TOKENS // max(1, length))
            batches += [(members[start : start + size], hooks) for start in range(0, len(members), size)]
        for members, hooks in tqdm(
            batches, desc="activations", disable=None if len(batches) > 2 else True, leave=False
        ):
            tokens = torch.stack([sequences[i] for i in members])
            started = time.perf_counter()
            found = model.run(tokens, capture=hooks, edit=dict(edit) if edit else None, logits="none")
            self._note_pass(model, tokens, hooks, time.perf_counter() - started)
            yield self._keep(model, tokens, {(i, h): found[h][n] for n, i in enumerate(members) for h in hooks}, todo)

    def _keep(
        self,
        model: LanguageModel,
        tokens: Tensor,
        values: Mapping[tuple[int, str], Tensor],
        todo: Mapping[tuple[int, str], bytes],
    ) -> dict[bytes, Tensor]:
        """Store what a pass gave. What is returned is what was stored, be it ours or another process's."""
        shape = "x".join(map(str, tokens.shape))
        entries, rows = [], {}
        for (i, hook), value in values.items():
            key = todo[i, hook]
            encoded = codecs.encode(value, self.codec)
            entries.append(NewEntry(key, hook, encoded.data, tuple(value.shape), self.codec, encoded.error, shape))
            rows[key] = encoded.decoded.clone()  # a row of its own: a view would keep the whole batch in memory
        taken = self.disk.write(model.fingerprint, entries)
        for key, entry in self.disk.read(list(taken)).items():
            rows[key] = codecs.decode(entry.data, entry.shape, entry.codec)
        for key, row in rows.items():
            self.memory.put(key, row)
        return rows

    # ---- streaming ----

    def stream(
        self,
        model: LanguageModel,
        sequences: Sequence[Int[Tensor, "_"]],
        hooks: Sequence[str],
        *,
        rows: int = 4096,
        window: int = 2**18,
        seed: int = 0,
        start: int = 0,
        edit: Edits | None = None,
    ) -> Iterator[dict[str, Float[Tensor, "rows *rest"]]]:
        """Batches of `rows` activation rows (one row per token) in shuffled order, aligned over the hook points.

        Shuffle: the sequences are permuted, cut into windows of about `window` tokens, and the rows of each window
        permuted; only one window is in memory. Each row comes exactly once (the last, incomplete batch included). The
        order depends on `seed` alone; `start` is the number of batches to skip, which skips whole windows unread.
        """
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(sequences), generator=generator).tolist()
        windows: list[list[int]] = [[]]
        filled = 0
        for i in order:
            if filled >= window:
                windows.append([])
                filled = 0
            windows[-1].append(i)
            filled += len(sequences[i])
        skip = start * rows
        held: dict[str, Tensor] = {}
        for number, members in enumerate(windows):
            length = sum(len(sequences[i]) for i in members)
            if skip >= length:
                skip -= length
                continue
            found = self.get(model, [sequences[i] for i in members], hooks, edit=edit)
            shuffle = torch.randperm(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + number + 1))
            for hook in hooks:
                fresh = torch.cat(found.pop(hook))[shuffle][skip:]
                held[hook] = torch.cat([held[hook], fresh]) if hook in held else fresh
            skip = 0
            count = len(held[hooks[0]])
            for offset in range(0, count - count % rows, rows):
                yield {hook: held[hook][offset : offset + rows] for hook in hooks}
            held = {hook: held[hook][count - count % rows :] for hook in hooks}
        if held and len(held[hooks[0]]):
            yield held

    # ---- costs and upkeep ----

    def estimate(
        self,
        model: LanguageModel,
        sequences: Sequence[Int[Tensor, "_"]] | Int[Tensor, "batch pos"],
        hooks: Sequence[str],
        *,
        edit: Edits | None = None,
    ) -> Estimate:
        """Bytes, seconds and peak memory of a request, without making it."""
        sequences = list(sequences)
        for hook in hooks:
            if hook not in model.hook_points:
                raise unknown(f"hook point of {model.name}", hook, model.hook_points)
        wanted = keys(model, sequences, hooks, self.codec, edit)
        unique = {key: place for place, key in wanted.items()}
        here = {key for key in unique if self.memory.get(key) is not None}
        here |= self.disk.has([key for key in unique if key not in here])
        missing = [key for key in unique if key not in here]
        deepest: dict[int, int] = {}
        for key in missing:
            i, hook = unique[key]
            deepest[i] = max(deepest.get(i, 0), sites.depth(hook)[0] + 1)
        flops = sum(_flops(model.config, len(sequences[i]), layers) for i, layers in deepest.items())
        shapes = {key: shape_at(hook, model.config, len(sequences[i])) for key, (i, hook) in unique.items()}
        sizes = {key: codecs.size(shape, self.codec) for key, shape in shapes.items()}
        exact = {key: codecs.size(shape, "float32") for key, shape in shapes.items()}
        widest = max((sum(exact[wanted[i, h]] for h in hooks) / len(sequences[i]) for i, _ in wanted), default=0)
        returned = sum(exact[key] for key in wanted.values())
        return Estimate(
            entries=len(unique),
            missing=len(missing),
            bytes=sum(sizes.values()),
            missing_bytes=sum(sizes[key] for key in missing),
            peak_bytes=returned + sum(exact.values()) + int(widest * BATCH_TOKENS),
            seconds=flops / self._speed(model) if flops else 0.0,
        )

    def stats(self) -> Stats:
        entries, size = self.disk.totals()
        return Stats(
            **self._counts,
            seconds_computing=self._seconds,
            memory_entries=len(self.memory),
            memory_bytes=self.memory.bytes,
            memory_budget=self.memory.budget,
            disk_entries=entries,
            disk_bytes=size,
            disk_budget=self.disk.budget,
        )

    def verify(self) -> list[str]:
        """Read every stored row and compare it with its checksum; one sentence per damaged row."""
        return list(self.disk.verify())

    def evict(self, *, model: str | None = None, hook: str | None = None, keep_bytes: int = 0) -> int:
        """Drop stored activations of a model (fingerprint) or hook point, least recently used first, until `keep_bytes`
        are left of them. Returns the bytes freed."""
        if keep_bytes < 0:
            raise UserError(f"keep_bytes={keep_bytes} is negative; give the bytes that may stay.")
        self.memory.clear()
        return self.disk.evict(model=model, hook=hook, keep_bytes=keep_bytes)

    def _count(self, name: str, amount: int) -> None:
        with self._lock:
            self._counts[name] += amount

    def _note_pass(self, model: LanguageModel, tokens: Tensor, hooks: Sequence[str], seconds: float) -> None:
        layers = max(sites.depth(hook)[0] for hook in hooks) + 1
        with self._lock:
            self._counts["forward_passes"] += 1
            self._counts["computed"] += len(hooks) * len(tokens)
            self._seconds += seconds
            self._flops += len(tokens) * _flops(model.config, tokens.shape[1], layers)

    def _speed(self, model: LanguageModel) -> float:
        """Floating-point operations per second: measured in this store's passes, else in a short matrix product."""
        if self._seconds:
            return self._flops / self._seconds
        a = torch.randn(1024, 1024, device=model.device, dtype=model.dtype)
        started = time.perf_counter()
        float((a @ a @ a).sum())
        return 2 * 2 * 1024**3 / (time.perf_counter() - started)


def shape_at(hook: str, c: ModelConfig, pos: int) -> tuple[int, ...]:
    """Shape of one sequence's activation at a hook point."""
    _, name = sites.split(hook)
    if name in sites.PATTERN_HOOKS:
        return (c.n_heads, pos, pos)
    if name in sites.HEAD_HOOKS:
        shared = name in ("attn.hook_k", "attn.hook_v", "attn.hook_rot_k")
        width = c.d_model if name == "attn.hook_result" else c.d_head
        return (pos, c.n_kv_heads if shared else c.n_heads, width)
    return (pos, c.d_mlp if name.startswith("mlp.") else c.d_model)


def _flops(c: ModelConfig, pos: int, layers: int) -> float:
    """Multiply-adds, doubled, of the first `layers` blocks on one sequence."""
    per_layer = (c.n_parameters - c.d_vocab * c.d_model) / c.n_layers
    return 2.0 * pos * layers * (per_layer + pos * c.n_heads * c.d_head)
