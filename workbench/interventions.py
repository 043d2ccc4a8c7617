"""What can be done at a site: zero, mean, resample, steer. Each is a function Tensor -> Tensor with a key.

The key is a digest of what the intervention does, so that edited activations can be stored like any others:
`store.get(model, sequences, hooks, edit={site: zero()})`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Intervention:
    """x -> scale * x + shift, with the shift broadcast over leading axes."""

    kind: str
    scale: float
    shift: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.shift is None:
            return x * self.scale if self.scale != 1 else x
        shift = self.shift.to(x.device, x.dtype)
        return shift.expand_as(x) if self.scale == 0 else x * self.scale + shift

    @property
    def key(self) -> str:
        digest = hashlib.blake2b(f"{self.kind}/{self.scale!r}".encode(), digest_size=16)
        if self.shift is not None:
            value = self.shift.detach().to("cpu", torch.float32).contiguous()
            digest.update(f"{tuple(value.shape)}".encode() + value.numpy().tobytes())
        return digest.hexdigest()


def zero() -> Intervention:
    """Zero ablation."""
    return Intervention("zero", 0.0, torch.zeros(1))


def mean(value: Tensor) -> Intervention:
    """Mean ablation: replace by the mean over a reference distribution, given without its batch axis."""
    return Intervention("mean", 0.0, value.clone())


def resample(value: Tensor) -> Intervention:
    """Replace by the value from another run, such as the corrupted prompt's: activation patching."""
    return Intervention("resample", 0.0, value.clone())


def steer(direction: Tensor, strength: float) -> Intervention:
    """Add `strength` times a direction. Strength 0 changes nothing, bit for bit."""
    return Intervention("steer", 1.0, direction * strength if strength else None)
