"""How activations are stored: exactly, or smaller with a measured error.

float32     exact for a model that computes in float32 or half precision
bfloat16    2 bytes; exact for a model that computes in bfloat16
float16     2 bytes, each row scaled by a power of two so that nothing overflows
int8        1 byte: each row scaled by its largest value, after each channel by a power of two where that errs less

A row is the last axis of the tensor, a channel one place on it. The error in the manifest is the largest relative L2
error of any row: an error over the whole tensor would be that of the first token, whose norm can be a thousand times
that of the others. Whatever the codec, values come back as float32, and what the first caller gets is what was stored.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from workbench.errors import UserError, unknown

CODECS = ("float32", "bfloat16", "float16", "int8")
Pieces = tuple[memoryview, ...]


class Encoded(NamedTuple):
    """A batch, each sequence by itself."""

    pieces: list[Pieces]  # the bytes of each sequence, in order; float32 ones are not copied
    errors: list[float]  # largest relative L2 error of a row of each sequence
    decoded: Float[Tensor, "batch ..."]  # what every later reader will get


def encode(x: Tensor, codec: str) -> Encoded:
    """Encode a batch of equally shaped activations [batch, ..., channel].

    Raises UserError for values that the codec cannot hold.
    """
    x = x.detach().to("cpu", torch.float32).contiguous()
    n, channels = len(x), x.shape[-1]
    rows = x.reshape(n, -1, channels)
    parts = _pack(rows, codec)
    pieces = list(zip(*(_memory(part) for part in parts), strict=True))
    if codec == "float32":
        return Encoded(pieces, [0.0] * n, x)
    decoded = _unpack(parts, codec)
    return Encoded(pieces, _errors(rows, decoded).tolist(), decoded.reshape(x.shape))


def decode(raw: UInt8[Tensor, " byte"], shape: tuple[int, ...], codec: str) -> Float[Tensor, "..."]:
    """One sequence's activation from its bytes. With float32 the tensor shares their memory."""
    if codec == "float32":
        return raw.view(torch.float32).reshape(shape)
    parts, start = [], 0
    for kind, dims in _layout((1, math.prod(shape[:-1]), shape[-1]), codec):
        stop = start + math.prod(dims) * kind.itemsize
        parts.append(raw[start:stop].view(kind).reshape(dims))
        start = stop
    return _unpack(parts, codec).reshape(shape)


def size(shape: tuple[int, ...], codec: str) -> int:
    """Bytes that one sequence's activation takes."""
    rows = (1, math.prod(shape[:-1]), shape[-1])
    return sum(math.prod(dims) * kind.itemsize for kind, dims in _layout(rows, codec))


def _layout(shape: tuple[int, int, int], codec: str) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of each part; wide types first, so that all are aligned."""
    n, rows, channels = shape
    if codec == "int8":
        return [(torch.float32, (n, rows, 1)), (torch.int8, (n, 1, channels)), (torch.int8, shape)]
    if codec == "float16":
        return [(torch.float16, shape), (torch.int8, (n, rows, 1))]
    if codec in ("float32", "bfloat16"):
        return [(getattr(torch, codec), shape)]
    raise unknown("codec", codec, CODECS)


def _pack(x: Float[Tensor, "batch row channel"], codec: str) -> list[Tensor]:
    if codec == "float32":
        return [x]
    if codec == "bfloat16":
        return [x.to(torch.bfloat16)]
    if codec == "float16":
        peak = torch.where(x.isfinite(), x, 0).abs().amax(-1, keepdim=True)
        exponents = (_exponent(peak) - 14).clamp(-120, 120)  # the peak lands in [2^14, 2^15)
        return [torch.ldexp(x, -exponents).to(torch.float16), exponents.to(torch.int8)]
    if codec == "int8":
        if not bool(x.isfinite().all()):
            raise UserError("int8 cannot hold infinite values (masked attention scores); use another codec there.")
        plain = _bytes_of(x, torch.zeros(len(x), 1, x.shape[-1], dtype=torch.int32))
        by_channel = _bytes_of(x, _channel_exponents(x))
        better = _errors(x, _unpack(by_channel, codec)) < _errors(x, _unpack(plain, codec))
        return [torch.where(better[:, None, None], a, b) for a, b in zip(by_channel, plain, strict=True)]
    raise unknown("codec", codec, CODECS)


def _channel_exponents(x: Float[Tensor, "batch row channel"]) -> Int[Tensor, "batch 1 channel"]:
    """Powers of two that make channels alike. By the median: one massive row (the first token) must not set the scale
    of a channel for all the others."""
    exponents = _exponent(x.abs().median(1, keepdim=True).values)
    middle = exponents.float().median(-1, keepdim=True).values.to(torch.int32)
    return (exponents - middle).clamp(-2, 20)


def _bytes_of(x: Float[Tensor, "batch row channel"], exponents: Int[Tensor, "batch 1 channel"]) -> list[Tensor]:
    scaled = torch.ldexp(x, -exponents)
    scale = scaled.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return [scale, exponents.to(torch.int8), (scaled / scale).round().to(torch.int8)]


def _errors(
    x: Float[Tensor, "batch row channel"], decoded: Float[Tensor, "batch row channel"]
) -> Float[Tensor, " batch"]:
    """Largest relative L2 error of a row of each sequence; equal infinities differ by nothing."""
    gap = torch.where(decoded == x, 0, decoded - x).norm(dim=-1)
    size = torch.where(x.isfinite(), x, 0).norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    worst: Tensor = (gap / size).amax(-1)
    return worst


def _unpack(parts: list[Tensor], codec: str) -> Float[Tensor, "batch row channel"]:
    if codec == "float16":
        return torch.ldexp(parts[0].float(), parts[1].to(torch.int32))
    if codec == "int8":
        scale, exponents, values = parts
        return torch.ldexp(values.float() * scale, exponents.to(torch.int32))
    return parts[0].float()


def _exponent(x: Tensor) -> Tensor:
    """floor(log2 x), and -127 for zero."""
    return (torch.frexp(x).exponent - 1).where(x > 0, torch.tensor(-127)).to(torch.int32)


def _memory(x: Tensor) -> list[memoryview]:
    """The bytes of each member of a batch, not copied."""
    flat = x.contiguous().view(torch.uint8).reshape(len(x), -1).numpy()
    return [row.data for row in flat]
