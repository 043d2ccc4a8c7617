"""The largest entries by absolute value, exactly as many as asked for: of activations, and of weights.

Selection decides the speed of a weight-sparse model. On a CPU numpy's partition (vectorised quickselect) finds the
threshold several times faster than `torch.topk` or `kthvalue`; on a GPU `torch.topk` does. Both select the same
entries, but for the order in which equal ones are left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class AbsTopK(nn.Module):
    """Keeps the k entries of largest absolute value along the last axis; gradients flow through these alone.

    Gao et al. 2025, section 2.1 and appendix A.1.
    """

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def forward(self, x: Float[Tensor, "*any width"]) -> Float[Tensor, "*any width"]:
        return torch.where(largest(x.detach().abs(), self.k), x, 0)

    def extra_repr(self) -> str:
        return f"k={self.k}"


def largest(size: Float[Tensor, "*any width"], k: int) -> Bool[Tensor, "*any width"]:
    """The k largest entries of each row; all that are not negative zeros or more must be finite. k = 0 is none."""
    width = size.shape[-1]
    if k >= width:
        return torch.ones_like(size, dtype=torch.bool)
    if k < 1:
        return torch.zeros_like(size, dtype=torch.bool)
    if size.device.type != "cpu":
        where = size.topk(k, dim=-1, sorted=False).indices
        return torch.zeros_like(size, dtype=torch.bool).scatter_(-1, where, True)
    flat = size.reshape(-1, width)
    least = _kth_largest(flat, k)
    kept = flat >= least
    over = kept.sum(-1) > k  # where entries equal the least: rare, but for half precision and zeros
    if bool(over.any()):
        above = flat[over] > least[over]
        equal = flat[over] == least[over]
        room = k - above.sum(-1, keepdim=True)
        kept[over] = above | (equal & (equal.cumsum(-1) <= room))
    return kept.view(size.shape)


def _kth_largest(rows: Float[Tensor, "row width"], k: int) -> Float[Tensor, "row 1"]:
    at = rows.shape[-1] - k
    values: Any = rows.float().numpy()
    return torch.from_numpy(np.partition(values, at, axis=-1)[:, at : at + 1]).to(rows.dtype)
