"""The largest entries by absolute value, exactly as many as asked for: of activations, and of weights.

Selection decides the speed of a weight-sparse model. On a CPU numpy's partition (vectorised quickselect) finds the
threshold several times faster than `torch.topk` or `kthvalue`; on a GPU `torch.topk` does. Both select the same
entries, but for the order in which equal ones are left out.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from workbench.errors import UserError

SAMPLE = 1 << 14  # weights that tell roughly where the threshold of a large matrix lies


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


# ---- weights ----


def keep_weights(
    weight: Float[Tensor, "row column"], k: int, per_neuron: int = 0, neurons: Literal["rows", "columns"] = "rows"
) -> Bool[Tensor, "row column"]:
    """The k largest weights of a matrix, but at least `per_neuron` of every neuron; exactly k.

    Defined as published (Gao et al. 2025, appendix A.2): the largest of every neuron come first, then the others by
    size. Found from the k largest of all: neurons that have too few get theirs, and as many others, the smallest of
    neurons that have more than enough, go.

    Raises UserError if every neuron's share does not fit into k.
    """
    rows = weight.detach().abs()
    rows = rows if neurons == "rows" else rows.T
    per_neuron = min(per_neuron, rows.shape[1])
    if per_neuron * len(rows) > k:
        raise UserError(
            f"{k} weights are too few for {per_neuron} of each of {len(rows)} neurons; lower the minimum per neuron to "
            f"{k // len(rows)}, or keep a larger share."
        )
    kept = _largest_of_all(rows, k)
    count = kept.sum(1)
    poor = count < per_neuron
    if bool(poor.any()):
        given = largest(rows[poor], per_neuron) & ~kept[poor]
        kept[poor] |= given
        _drop(kept, rows, count - per_neuron, int(given.sum()))
    return kept if neurons == "rows" else kept.T


def _largest_of_all(size: Float[Tensor, "row column"], k: int) -> Bool[Tensor, "row column"]:
    flat = size.flatten()
    if k < len(flat) and len(flat) > 4 * SAMPLE:
        # A bound that nearly surely lies below the k-th largest, so that few entries have to be looked at closely.
        share = k / len(flat)
        some = flat[:: len(flat) // SAMPLE]
        wanted = min(1.0, share + 4 * (share * (1 - share) / len(some)) ** 0.5)
        bound = _kth_largest(some[None], max(1, int(wanted * len(some))))[0, 0]
        near = flat >= bound
        if int(near.sum()) >= k:
            kept = torch.zeros_like(flat, dtype=torch.bool)
            kept[near] = largest(flat[near][None], k)[0]
            return kept.view(size.shape)
    return largest(flat[None], k)[0].view(size.shape)


def _drop(kept: Bool[Tensor, "row column"], size: Float[Tensor, "row column"], spare: Tensor, n: int) -> None:
    """Take away the n smallest of what is kept, at most spare[row] of a row, in place."""
    row, column = (kept & (spare > 0)[:, None]).nonzero().T
    order = size[row, column].argsort(stable=True)
    row, column = row[order], column[order]
    by_row = row.argsort(stable=True)
    start = torch.searchsorted(row[by_row], row[by_row])  # where its row begins
    rank = torch.empty_like(row)
    rank[by_row] = torch.arange(len(row), device=row.device) - start
    may = (rank < spare[row]).nonzero()[:n, 0]
    kept[row[may], column[may]] = False
