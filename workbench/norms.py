"""Norms as linear maps: norm(x) = gain * scale(x) * flat(x) + bias, where flat takes the mean away or does nothing.

RMSNorm and LayerNorm of every family are of this form. Gain, bias and whether a norm centres are measured with probe
vectors, so no class of norm needs a case here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import UserError


class Norm(NamedTuple):
    """The fixed parts of a norm; `apply` is the norm itself."""

    apply: Callable[[Tensor], Tensor]
    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centres: bool

    def flat(self, x: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        return x - x.mean(-1, keepdim=True) if self.centres else x

    def scale(self, x: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any 1"]:
        """What the norm divides by, inverted, at x."""
        with torch.no_grad():
            after: Tensor = (self.apply(x) - self.bias).norm(dim=-1, keepdim=True)
            before: Tensor = (self.flat(x) * self.gain).norm(dim=-1, keepdim=True)
            return after / before.clamp(min=torch.finfo(x.dtype).tiny)  # zeros stay zeros


def measure(norm: Callable[[Tensor], Tensor], like: Tensor) -> Norm:
    """The parts of a norm over the last axis of `like`. Raises UserError for an odd width: the probe needs mean 0."""
    if like.shape[-1] % 2:
        raise UserError(f"a norm over {like.shape[-1]} values cannot be measured; the width must be even.")
    probe = torch.ones(like.shape[-1], device=like.device, dtype=like.dtype)
    probe[1::2] = -1  # mean 0 and variance 1
    with torch.no_grad():
        bias = norm(torch.zeros_like(probe))
        gain = (norm(probe) - bias) * probe
        centres = bool((norm(probe + 1) - norm(probe)).abs().max() < 1e-3 * gain.abs().max())
    return Norm(norm, gain, bias, centres)


def frozen(norm: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The linear part of a norm with its scale frozen at `x`, and its bias: norm(x) == linear(x) + bias."""
    parts = measure(norm, x)
    scale = parts.scale(x)
    return lambda v: parts.flat(v) * parts.gain * scale, parts.bias
