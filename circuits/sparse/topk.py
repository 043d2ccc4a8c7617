"""The largest entries by absolute value, exactly as many as asked for: of activations, and of weights.

Selection decides the speed of a weight-sparse model. On a CPU it is done by numpy on the bits of the numbers, which are
ordered as the numbers are where these are not negative, in pieces that stay in the cache:

    activations  short runs are sorted, by vector instructions. Of two sorted runs, the larger of the i-th smallest and
                 the i-th largest, for all i, are the larger half of both; so rows shrink to one run that holds the k
                 largest. An entry is then left, or made 0, by masking its bits.
    weights      a sample tells between which two values the threshold nearly surely lies; only the entries between the
                 two are searched for it. Where the sample misled, all are.

On a GPU a kernel of our own selects activations (`workbench.kernels`), and `torch.topk` weights. All select the same
entries; of equal weights, others may be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from workbench import gpu
from workbench.errors import UserError

SAMPLE = 1 << 13  # weights, at most, that tell roughly where the threshold of a large matrix lies
PIECE = 1 << 18  # entries that are worked on at once: fewer, and threads wait for the interpreter
RUN = 512  # the longest run that is sorted wholly by vector instructions

Array = npt.NDArray[Any]
Neurons = Literal["rows", "columns"]


class AbsTopK(nn.Module):
    """Keeps the k entries of largest absolute value along the last axis; gradients flow through these alone.

    Gao et al. 2025, section 2.1 and appendix A.1.
    """

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def forward(self, x: Float[Tensor, "*any width"]) -> Float[Tensor, "*any width"]:
        if x.device.type == "cpu":
            select = _uncompiled() if torch.compiler.is_compiling() else _Kept.apply
            kept: Tensor = select(x, self.k)
            return kept
        if gpu.has_kernels(x):
            from workbench import kernels

            chosen: Tensor = kernels.abs_topk(x, self.k)[0]
            return chosen
        return torch.where(largest(x.detach().abs(), self.k), x, 0)

    def extra_repr(self) -> str:
        return f"k={self.k}"


@cache
def _uncompiled() -> Callable[[Tensor, int], Tensor]:
    """Of whose numpy the compiler would make torch. Only asked for when compiling, because this imports all of it."""
    return torch.compiler.disable(_Kept.apply)  # type: ignore[no-any-return]


class _Kept(torch.autograd.Function):
    """AbsTopK on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int) -> Tensor:
        found, kept = _select(x, k)
        ctx.save_for_backward(kept)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return _masked(gradient, kept), None


def largest(size: Float[Tensor, "*any width"], k: int) -> Bool[Tensor, "*any width"]:
    """The k largest entries of each row, none of which is negative; k = 0 is none."""
    width = size.shape[-1]
    if k >= width:
        return torch.ones_like(size, dtype=torch.bool)
    if k < 1:
        return torch.zeros_like(size, dtype=torch.bool)
    if size.device.type != "cpu":
        where = size.topk(k, dim=-1, sorted=False).indices
        return torch.zeros_like(size, dtype=torch.bool).scatter_(-1, where, True)
    return _select(size, k)[1] != 0


# ---- on a CPU: rows ----


def _select(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x with all but the k largest of each row set to 0, and int8s that are -1, all ones, where x was left."""
    x = x.detach().contiguous()
    bits, found, kept = _rows(x), torch.empty_like(x), torch.empty_like(x, dtype=torch.int8)
    made, marks = _rows(found), _rows(kept)
    _each(lambda at: _select_rows(bits[at], k, made[at], marks[at]), _shares(bits))
    return found, kept


def _masked(x: Tensor, kept: Tensor) -> Tensor:
    """x where kept is -1, else 0; much faster than `torch.where`."""
    x = x.contiguous()
    bits, found, marks = _rows(x), torch.empty_like(x), _rows(kept)
    made = _rows(found)
    _each(lambda at: np.bitwise_and(bits[at], marks[at].astype(bits.dtype), out=made[at]), _shares(bits))
    return found


def _select_rows(bits: Array, k: int, made: Array, marks: Array) -> None:
    if not 0 < k < bits.shape[1]:
        marks.fill(-(k > 0))
        np.copyto(made, bits if k > 0 else 0)
        return
    least = _kth_largest(bits & np.iinfo(bits.dtype).max, k)[:, None]
    mask = _ones(bits, least)
    if np.count_nonzero(mask) > k * len(mask):  # some entries equal the least: zeros, or numbers of half precision
        over = np.count_nonzero(mask, axis=-1) > k
        size, least = bits[over] & np.iinfo(bits.dtype).max, least[over]
        above, equal = size > least, size == least
        room = k - above.sum(-1, keepdims=True)
        mask[over] = -(above | (equal & (equal.cumsum(-1, dtype=np.int32) <= room))).astype(mask.dtype)
    np.bitwise_and(bits, mask, out=made)
    np.copyto(marks, mask, casting="unsafe")


def _kth_largest(keys: Array, k: int) -> Array:
    """Of each row; keys are not negative, and used up."""
    rows, width = keys.shape
    run = 1 << max(6, (k - 1).bit_length())
    if width <= RUN or run > RUN:
        keys.partition(width - k, axis=-1)
        return keys[:, width - k]
    keys = np.pad(keys, ((0, 0), (0, -width % run)), constant_values=-1) if width % run else keys
    runs = keys.reshape(rows, -1, run)
    while runs.shape[1] > 1:
        runs.sort(-1)
        last = runs.shape[1] - 1
        halves = np.maximum(runs[:, 0:last:2], runs[:, 1::2, ::-1])
        runs = halves if last % 2 else np.concatenate([halves, runs[:, last:]], 1)
    least: Array = runs[:, 0].min(-1) if k == run else np.partition(runs[:, 0], run - k, axis=-1)[:, run - k]
    return least


def _rows(x: Tensor) -> Array:
    """The bits of x as integers, [row, last axis]."""
    array: Array = x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize]).numpy()
    return array.reshape(-1, x.shape[-1])


def _pieces(array: Array, size: int = PIECE) -> list[slice]:
    step = max(1, size // array.shape[1])
    return [slice(at, at + step) for at in range(0, len(array), step)]


def _shares(array: Array) -> list[slice]:
    """Pieces, one for each thread at least."""
    return _pieces(array, min(PIECE, -(-array.size // torch.get_num_threads())))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _each(work: Callable[[Any], Any], parts: Iterable[Any]) -> None:
    """On as many threads as torch has, this one among them: numpy lets go of the interpreter while it computes."""
    left, helpers = iter(parts), torch.get_num_threads() - 1
    helping = [_pool(helpers).submit(_take, work, left) for _ in range(helpers)]
    _take(work, left)
    for helper in helping:
        helper.result()


def _take(work: Callable[[Any], Any], parts: Iterator[Any]) -> None:
    for part in parts:
        work(part)


# ---- weights ----


def keep_weights(
    weight: Float[Tensor, "row column"], k: int, per_neuron: int = 0, neurons: Neurons = "rows"
) -> Bool[Tensor, "row column"]:
    """The k largest weights of a matrix, but at least `per_neuron` of every neuron; exactly k.

    Defined as published (Gao et al. 2025, appendix A.2): the largest of every neuron come first, then the others by
    size.

    Raises UserError if every neuron's share does not fit into k.
    """
    per_neuron = _checked(weight, k, per_neuron, neurons)
    if weight.device.type != "cpu":
        return _as_defined(weight, k, per_neuron, neurons)
    bits = _rows(weight.detach().contiguous())
    found = _search(bits, k, per_neuron, neurons)
    kept = (bits & np.iinfo(bits.dtype).max) >= found.least
    kept.reshape(-1)[found.without] = False
    kept.reshape(-1)[found.besides] = True
    return torch.from_numpy(kept)


def drop_weights(weights: Iterable[tuple[Tensor, int, int, Neurons]], factor: float = 1.0) -> None:
    """Set to 0, in place, what `keep_weights` does not keep, of many matrices: its arguments for each. What is left is
    multiplied by a factor, such as that of weight decay."""
    given = [(weight.detach(), k, _checked(weight, k, j, neurons), neurons) for weight, k, j, neurons in weights]
    quick = [one for one in given if one[0].dtype == torch.float32 and one[0].is_cpu and one[0].is_contiguous()]
    for one in given:
        if not any(one is other for other in quick):
            one[0].mul_(keep_weights(*one)).mul_(factor)
    _each(lambda one: _drop_weights(one, factor), quick)


def _drop_weights(one: tuple[Tensor, int, int, Neurons], factor: float) -> None:
    weight, k, per_neuron, neurons = one
    bits, values = _rows(weight), weight.numpy()
    found = _search(bits, k, per_neuron, neurons)
    besides = values.reshape(-1)[found.besides]
    for at in _pieces(bits):
        np.bitwise_and(bits[at], _ones(bits[at], found.least), out=bits[at])
        if factor != 1:
            np.multiply(values[at], np.float32(factor), out=values[at])
    values.reshape(-1)[found.without] = 0
    values.reshape(-1)[found.besides] = besides * np.float32(factor)


def _checked(weight: Tensor, k: int, per_neuron: int, neurons: Neurons) -> int:
    n, inputs = weight.shape if neurons == "rows" else weight.T.shape
    per_neuron = min(per_neuron, inputs)
    if per_neuron * n > k:
        raise UserError(
            f"{k} weights are too few for {per_neuron} of each of {n} neurons; lower the minimum per neuron to "
            f"{k // n}, or keep a larger share."
        )
    return per_neuron


def _as_defined(weight: Tensor, k: int, per_neuron: int, neurons: Neurons) -> Tensor:
    """On a GPU, for which nothing of this has to be waited for."""
    size, along = weight.detach().abs(), 1 if neurons == "rows" else 0
    if per_neuron:
        size.scatter_(along, size.topk(per_neuron, dim=along).indices, torch.inf)
    kept = torch.zeros(size.numel(), dtype=torch.bool, device=size.device)
    return kept.scatter_(0, size.flatten().topk(min(k, len(kept)), sorted=False).indices, True).view(size.shape)


# ---- on a CPU: weights, as integers ----


class _Found(NamedTuple):
    """What is kept: all whose size is `least` or more, but without some, and some others besides; flat places."""

    least: int
    without: Array
    besides: Array


class _Near(NamedTuple):
    """Entries near the threshold in order of place, and which are of the k largest."""

    places: Array
    sizes: Array
    kept: Array


def _search(bits: Array, k: int, per_neuron: int, neurons: Neurons) -> _Found:
    """From the k largest of all: neurons that have too few get theirs, and as many others, the smallest of neurons
    that have more than enough, go."""
    none = np.zeros(0, np.int64)
    if k < 1:
        return _Found(0, np.arange(bits.size), none)
    length = bits.shape[1]

    def owner(places: Array) -> Array:
        found: Array = places // length if neurons == "rows" else places % length
        return found

    least, near, equal, count = _threshold(bits, k, neurons)
    if count.min() >= per_neuron:
        return _Found(least, equal, none)
    lowest = near.places[near.kept], near.sizes[near.kept]
    count = count + np.bincount(owner(lowest[0]), minlength=len(count))
    poor = np.flatnonzero(count < per_neuron)
    if not len(poor):
        return _Found(least, equal, none)
    sizes = (bits[poor] if neurons == "rows" else bits[:, poor].T) & np.iinfo(bits.dtype).max
    others = np.where(sizes < least, sizes, -1)
    missed = equal[np.isin(owner(equal), poor)]
    others[np.searchsorted(poor, owner(missed)), missed % length if neurons == "rows" else missed // length] = least
    given = []
    for already in range(per_neuron):
        needy = np.flatnonzero(count[poor] + already < per_neuron)
        best = others[needy].argmax(1)
        others[needy, best] = -1
        given.append(poor[needy] * length + best if neurons == "rows" else best * length + poor[needy])
    besides = np.concatenate(given)
    spare = np.maximum(count - per_neuron, 0)
    without = _smallest(lowest, owner, spare, len(besides))
    if without is None:  # not among those near the threshold
        flat = bits.reshape(-1) & np.iinfo(bits.dtype).max
        places = np.setdiff1d(np.flatnonzero(flat >= least), equal, assume_unique=True)
        without = _smallest((places, flat[places]), owner, spare, len(besides))
        assert without is not None
    return _Found(least, np.concatenate([equal, without]), besides)


def _threshold(bits: Array, k: int, neurons: Neurons) -> tuple[int, _Near, Array, Array]:
    """The size of the k-th largest; some near it; places of those that are as large and yet not of the k; and how many
    of each neuron's are of the k largest and larger than those near it."""
    flat, top = bits.reshape(-1), np.iinfo(bits.dtype).max
    low, high = _bracket(flat, k)
    found, counts = [], []
    for at in _pieces(bits):
        size = bits[at] & top
        over = size > high
        counts.append(over.sum(1 if neurons == "rows" else 0, dtype=np.int32))
        near = np.flatnonzero((size >= low) ^ over)
        found.append((near + at.start * bits.shape[1], size.reshape(-1)[near]))
    count = np.concatenate(counts) if neurons == "rows" else np.sum(counts, axis=0)
    places, sizes = (np.concatenate(parts) for parts in zip(*found, strict=True))
    rank = k - int(count.sum())
    if not 0 < rank <= len(places):  # the sample misled
        places, sizes, count, rank = np.arange(len(flat)), flat & top, np.zeros_like(count), k
    least = np.partition(sizes, len(sizes) - rank)[len(sizes) - rank]
    kept = sizes >= least
    equal = np.flatnonzero(sizes == least)
    equal = equal[len(equal) - (np.count_nonzero(kept) - rank) :]  # the last of them are left out
    kept[equal] = False
    return int(least), _Near(places, sizes, kept), places[equal], count


def _ones(bits: Array, least: int | Array) -> Array:
    """All bits set where the size is the least or more, else none."""
    size = np.bitwise_and(bits, np.iinfo(bits.dtype).max)
    np.subtract(least - 1, size, out=size)  # negative there
    return np.right_shift(size, bits.dtype.itemsize * 8 - 1, out=size)


def _bracket(bits: Array, k: int) -> tuple[int, int]:
    """Two sizes between which the k-th largest nearly surely lies, by four standard deviations of a sample."""
    n, top = len(bits), int(np.iinfo(bits.dtype).max)
    some = bits[:: max(1, n // min(SAMPLE, n // 64 + 1)) | 1] & top  # odd, so that all columns are seen
    share = k / n
    slack = 4 * (len(some) * share * (1 - share)) ** 0.5 + 1
    low, high = int(len(some) * (1 - share) - slack), int(len(some) * (1 - share) + slack) + 1
    some.partition([max(0, low), min(high, len(some) - 1)])
    return 1 if low < 0 else max(1, int(some[low])), top if high >= len(some) else int(some[high])


def _smallest(of: tuple[Array, Array], owner: Callable[[Array], Array], spare: Array, n: int) -> Array | None:
    """Of places and sizes, the n places of the smallest, but at most spare[neuron] of a neuron; None: not so many."""
    places, sizes = of
    tried = n
    while tried < len(places):
        tried = min(2 * tried + 64, len(places))
        least = np.flatnonzero(sizes <= np.partition(sizes, tried - 1)[tried - 1])
        least = least[sizes[least].argsort(kind="stable")]
        mine = owner(places[least])
        by_owner = mine.argsort(kind="stable")
        rank = np.empty_like(mine)  # among those of its neuron
        rank[by_owner] = np.arange(len(mine)) - np.searchsorted(mine[by_owner], mine[by_owner])
        may: Array = places[least[rank < spare[mine]][:n]]
        if len(may) == n:
            return may
    return None
