"""Kernels for GPUs, in Triton, where torch has none or a slow one: choosing the largest of each row, and some products.

The size of the k-th largest is found bit by bit, by counting: numbers are ordered as their bits are, and a row stays in
registers meanwhile, where torch.topk reads and writes memory several times. Of equal entries the first are kept, as on
a CPU.

This module imports triton, which comes with torch's CUDA builds alone; so it is imported where a tensor is on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.gpu import WIDEST


@triton.jit
def _kth(bits, k, TOP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The k-th largest of some int32s, of which bits above TOP are those of the sign."""
    count = tl.sum((bits >= 0).to(tl.int32), 0)
    least = tl.where(count >= k, 0, -(2**TOP) * 2)
    for i in range(TOP + 1):
        higher = least + (1 << (TOP - i))
        count = tl.sum((bits >= higher).to(tl.int32), 0)
        least = tl.where(count >= k, higher, least)
    return least


@triton.jit
def _chosen(bits, k, TOP: tl.constexpr):  # type: ignore[no-untyped-def]
    least = _kth(bits, k, TOP)
    above, equal = bits > least, bits == least
    room = k - tl.sum(above.to(tl.int32), 0)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))


@triton.jit
def _abs_topk(x, out, kept, k, width, HALF: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * width + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < width
    value = tl.load(x + at, inside, other=0.0)
    if HALF:
        bits = value.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    else:
        bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    keep = _chosen(tl.where(inside, bits, -1), k, 14 if HALF else 30)
    tl.store(out + at, tl.where(keep, value, 0.0), inside)
    tl.store(kept + at, keep.to(tl.int8), inside)


@triton.jit
def _topk(x, out, k, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    bits = tl.load(x + row * width + column, inside, other=0.0).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # in order below 0 too
    bits = tl.where(inside, bits, -(2**30) * 2)
    keep = inside & _chosen(bits, k, 30)
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(out + row * k + place, column.to(tl.int64), keep)


@triton.jit
def _dots(x, matrix, rows, columns, out, D: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    value = tl.program_id(0).to(tl.int64)
    row, column = tl.load(rows + value), tl.load(columns + value)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < D
        a = tl.load(x + row * D + at, inside, other=0.0)
        total += a * tl.load(matrix + column * D + at, inside, other=0.0)
    tl.store(out + value, tl.sum(total, 0))


def _block(width: int) -> dict[str, int]:
    if width > WIDEST:
        raise ValueError(f"rows of {width} are wider than {WIDEST}")
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 512))}


def topk(x: Tensor, k: int) -> Tensor:
    """Places of the k largest of each row of float32s, [row, k], in order of place."""
    x = x.contiguous()
    out = torch.empty(len(x), k, dtype=torch.long, device=x.device)
    _topk[(len(x),)](x, out, k, x.shape[1], **_block(x.shape[1]))
    return out


def dots(x: Tensor, matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Products of a row of x and a row of the matrix, of float32s, for each pair."""
    x, matrix = x.contiguous(), matrix.contiguous()
    out = torch.empty(len(rows), dtype=torch.float32, device=x.device)
    block = min(1024, triton.next_power_of_2(x.shape[1]))
    _dots[(len(rows),)](x, matrix, rows, columns, out, x.shape[1], BLOCK=block, num_warps=max(1, block // 256))
    return out


@torch.library.custom_op("workbench::abs_topk", mutates_args=())
def abs_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x with all but the k entries of largest absolute value of each row set to 0, and which were kept."""
    x = x.contiguous()
    out, kept = torch.empty_like(x), torch.empty_like(x, dtype=torch.int8)
    width = x.shape[-1]
    _abs_topk[(x.numel() // width,)](x, out, kept, k, width, HALF=x.dtype.itemsize == 2, **_block(width))
    return out, kept.view(torch.bool)


@abs_topk.register_fake
def _(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _slopes(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
    (kept,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return torch.where(kept, grad, 0), None


abs_topk.register_autograd(_slopes, setup_context=_keep)
