"""Forward passes for activations that are missing: which sequences share one, and what it costs.

A batch holds sequences of one length that miss the same hook points, as many as fit into 2,048 tokens (16,384 on a GPU)
and 256 MB of captured values; nothing is padded. A pass stops after the deepest hook point and never computes logits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from workbench import sites
from workbench.activations.keys import Edits
from workbench.backend import ModelConfig
from workbench.errors import UserError
from workbench.models import LanguageModel

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
BATCH_BYTES = 256 * 10**6
_TELLING = 1e10  # floating-point operations below which a pass is mostly overhead


class Planned(NamedTuple):
    """One forward pass: which sequences, read at which hook points."""

    sequences: list[bytes]
    hooks: tuple[str, ...]


def plan(
    model: LanguageModel, lengths: Mapping[bytes, int], missing: Mapping[bytes, Iterable[str]], alone: bool = False
) -> list[Planned]:
    """Batches for what each sequence is missing; `alone` puts every sequence in a batch of its own."""
    limit = BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"])
    groups: dict[tuple[int, tuple[str, ...]], list[bytes]] = {}
    for sequence, hooks in missing.items():
        groups.setdefault((lengths[sequence], tuple(sorted(hooks, key=sites.depth))), []).append(sequence)
    batches = []
    for (length, hooks), members in sorted(groups.items()):
        each = captured_bytes(model.config, length, hooks)
        size = 1 if alone else max(1, min(limit // max(1, length), BATCH_BYTES // max(1, each)))
        batches += [Planned(members[start : start + size], hooks) for start in range(0, len(members), size)]
    return batches


class Captured:
    """What a pass read, on its way to the host, and how long the pass took.

    From a GPU the copies run on a stream of their own, into pinned memory, while the next pass computes.
    """

    def __init__(self, pass_: Callable[[], Mapping[str, Tensor]], device: torch.device):
        self._arrived: torch.cuda.Event | None = None
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        started = time.perf_counter()
        for event in events[:1]:
            event.record()
        found = pass_()
        for event in events[1:]:
            event.record()
        self._events, self._seconds = events, time.perf_counter() - started
        self._host = dict(found)
        if device.type == "cuda":
            stream = _side_stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                self._host = {}
                for hook, x in found.items():
                    self._host[hook] = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
                    self._host[hook].copy_(x, non_blocking=True)
                    x.record_stream(stream)
                self._arrived = stream.record_event()

    def host(self) -> dict[str, Tensor]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host

    def seconds(self) -> float:
        """Of the pass; on a GPU, which it is asked to do and not waited for, by the GPU's own clock."""
        if self._events:
            self._events[1].synchronize()
            return float(self._events[0].elapsed_time(self._events[1])) / 1000
        return self._seconds


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def run(model: LanguageModel, tokens: Tensor, hooks: Sequence[str], edit: Edits | None) -> Captured:
    """One forward pass."""
    return Captured(partial(_found, model, tokens, hooks, edit), model.device)


def _found(model: LanguageModel, tokens: Tensor, hooks: Sequence[str], edit: Edits | None) -> dict[str, Tensor]:
    run = model.run(tokens, capture=hooks, edit=edit, logits="none")
    return {hook: run[hook] for hook in hooks}


def check_numbers(model: LanguageModel, hook: str, x: Tensor) -> None:
    """NaN is never stored. (Infinities may be: masked attention scores are.)

    Raises UserError. It sees what the hook point holds: torch's attention on a CPU gives zeros for queries that are
    NaN, so that a NaN there shows at `hook_q` and nowhere after it.
    """
    if bool(x.amax().isnan()):
        raise UserError(
            f"{model.name} gives NaN at {hook} when it computes in {model.numerics}; "
            "a wider dtype (float32) avoids overflow."
        )


# ---- costs ----


@dataclass
class Clock:
    """Speed of a model's passes here: measured in passes that are long enough, else in a short matrix product."""

    seconds: float = 0.0
    flops: float = 0.0
    _guess: dict[str, float] = field(default_factory=dict)

    def note(self, config: ModelConfig, sequences: int, pos: int, hooks: Sequence[str], seconds: float) -> None:
        work = sequences * flops(config, pos, layers(hooks))
        if work >= _TELLING:
            self.seconds += seconds
            self.flops += work

    def speed(self, model: LanguageModel) -> float:
        """Floating-point operations per second."""
        if self.seconds:
            return self.flops / self.seconds
        kind = f"{model.device}/{model.dtype}"
        if kind not in self._guess:
            a = torch.randn(1024, 1024, device=model.device, dtype=model.dtype)
            if model.device.type == "cuda":
                float((a @ a).sum())  # a GPU's first product loads the library for it
            started = time.perf_counter()
            float((a @ a @ a).sum())
            self._guess[kind] = 2 * 2 * 1024**3 / (time.perf_counter() - started)
        return self._guess[kind]


def layers(hooks: Iterable[str]) -> int:
    """Blocks that must run to reach all of these hook points."""
    return max(sites.depth(hook)[0] for hook in hooks) + 1


def flops(c: ModelConfig, pos: int, n_layers: int) -> float:
    """Multiply-adds, doubled, of the first blocks on one sequence."""
    per_layer = (c.n_parameters - c.d_vocab * c.d_model) / c.n_layers
    return 2.0 * pos * n_layers * (per_layer + pos * c.n_heads * c.d_head)


def working_bytes(c: ModelConfig, tokens: int) -> int:
    """Roughly what a pass needs beside weights and captured values: the widest block's intermediate results."""
    return 4 * tokens * (4 * c.d_mlp + 8 * c.d_model)


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


def captured_bytes(config: ModelConfig, pos: int, hooks: Iterable[str]) -> int:
    """What one sequence's values take in float32."""
    return 4 * sum(math.prod(shape_at(hook, config, pos)) for hook in hooks)
