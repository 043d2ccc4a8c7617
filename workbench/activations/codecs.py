"""How activations are stored: exactly, or smaller with a measured error.

float32     exact for a model that computes in float32 or half precision
bfloat16    2 bytes; median relative error about 1.6e-3
float16     2 bytes, each row scaled by a power of two so that nothing overflows; about 2e-4
int8        1 byte, each row scaled by its largest value; 2-3 % (massive channels dominate their row)

A row is the last axis of the tensor. Whatever the codec, values come back as float32, and what the first caller gets
is what was stored, so that every caller gets the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from workbench.errors import unknown

CODECS = ("float32", "bfloat16", "float16", "int8")


class Encoded(NamedTuple):
    data: bytes
    error: float  # relative L2 error of the whole tensor
    decoded: Tensor  # what every later reader will get


def encode(x: Tensor, codec: str) -> Encoded:
    x = x.detach().to("cpu", torch.float32).contiguous()
    scales, values = _pack(x, codec)
    data = scales + values
    decoded = x if codec == "float32" else decode(data, tuple(x.shape), codec)
    norm = float(x.norm())
    error = float((decoded - x).norm()) / norm if norm and codec != "float32" else 0.0
    return Encoded(data, error, decoded)


def decode(data: bytes | memoryview, shape: tuple[int, ...], codec: str) -> Tensor:
    """A new float32 tensor; the bytes are not kept."""
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    rows = _rows(shape)
    if codec == "float32":
        return raw.view(torch.float32).reshape(shape)
    if codec == "bfloat16":
        return raw.view(torch.bfloat16).reshape(shape).float()
    if codec == "float16":
        exponents = raw[:rows].view(torch.int8).to(torch.int32)
        values = raw[rows + rows % 2 :].view(torch.float16).float().reshape(rows, -1)
        return torch.ldexp(values, exponents[:, None]).reshape(shape)
    if codec == "int8":
        scale = raw[: 4 * rows].view(torch.float32)
        return (raw[4 * rows :].view(torch.int8).float().reshape(rows, -1) * scale[:, None]).reshape(shape)
    raise unknown("codec", codec, CODECS)


def size(shape: tuple[int, ...], codec: str) -> int:
    """Bytes that a tensor takes."""
    n = 1
    for length in shape:
        n *= length
    rows = _rows(shape)
    return {"float32": 4 * n, "bfloat16": 2 * n, "float16": 2 * n + rows + rows % 2, "int8": n + 4 * rows}[codec]


def _pack(x: Tensor, codec: str) -> tuple[bytes, bytes]:
    rows = x.reshape(_rows(tuple(x.shape)), -1)
    if codec == "float32":
        return b"", _bytes(x)
    if codec == "bfloat16":
        return b"", _bytes(x.to(torch.bfloat16))
    peak = rows.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
    if codec == "float16":
        exponents = (peak.log2().floor() - 14).clamp(-120, 120).to(torch.int8)  # the peak lands in [2^14, 2^15)
        packed = torch.ldexp(rows, -exponents.to(torch.int32)[:, None]).to(torch.float16)
        padding = b"\0" * (len(exponents) % 2)  # the values start on an even byte
        return _bytes(exponents) + padding, _bytes(packed)
    if codec == "int8":
        scale = peak / 127
        return _bytes(scale), _bytes((rows / scale[:, None]).round().to(torch.int8))
    raise unknown("codec", codec, CODECS)


def _rows(shape: tuple[int, ...]) -> int:
    n = 1
    for length in shape[:-1]:
        n *= length
    return n


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()
