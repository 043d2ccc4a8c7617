"""Active latents: a few of each row, and the two products of an SAE with them, and their gradients.

Of the `latent` coordinates of a row some 32 are not 0, so everything behind the choice of latents is written as sums
over those: reconstruction, gradients of both matrices, and of the values. Only the product that decides which latents
are active is dense. The sums are the same numbers in another order as those of dense products, which are used where so
many latents are active that these are faster.

    values        of the active latents, row by row, one after another
    encode        (x - shift) W_enc + b_enc at the active latents; its gradient reaches W_enc, b_enc and the shift
    decode        sum over active latents of value times decoder row

Both matrices are held as [latent, width], so that all that belongs to a latent is together in memory.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench import gpu

AT_ONCE = 2**14
DENSE = 1 / 16  # share of active latents from which dense products are faster on a CPU


@dataclass(frozen=True)
class Active:
    """Some latents of each row, in compressed rows; starts[row] is where those of a row begin.

    starts   [row + 1]
    latents  of every value
    width    number of latents
    """

    starts: Int[Tensor, " _"]
    latents: Int[Tensor, " value"]
    width: int

    @classmethod
    def fixed(cls, latents: Int[Tensor, "row k"], width: int) -> Active:
        """k latents of each row."""
        rows, k = latents.shape
        starts = torch.arange(0, rows * k + 1, k, device=latents.device)
        made = cls(starts, latents.reshape(-1), width)
        made.__dict__["row_of"] = torch.arange(rows, device=latents.device).repeat_interleave(k)
        return made

    @classmethod
    def where(cls, chosen: Bool[Tensor, "row latent"]) -> Active:
        """Any number of each row."""
        counts = chosen.sum(-1)
        starts = F.pad(counts.cumsum(0), (1, 0))
        return cls(starts, chosen.nonzero()[:, 1], chosen.shape[1])

    @property
    def rows(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def row_of(self) -> Int[Tensor, " value"]:
        """The row of each value."""
        counts = self.starts.diff()
        return torch.repeat_interleave(torch.arange(self.rows, device=counts.device), counts)

    def part(self, low: int, high: int) -> tuple[Active, Bool[Tensor, " value"]]:
        """The latents from `low` to below `high`, and which values these are."""
        inside = (self.latents >= low) & (self.latents < high)
        counts = torch.zeros(self.rows, dtype=torch.long, device=inside.device)
        counts.index_add_(0, self.row_of[inside], torch.ones_like(self.row_of[inside]))
        return Active(F.pad(counts.cumsum(0), (1, 0)), self.latents[inside], self.width), inside

    # ---- sums ----

    def spread(self, per_latent: Float[Tensor, " latent"]) -> Float[Tensor, " value"]:
        """What belongs to a latent, at every value."""
        return per_latent[self.latents]

    def per_latent(self, values: Float[Tensor, " value"]) -> Float[Tensor, " latent"]:
        """Sum of values over rows."""
        total = torch.zeros(self.width, dtype=values.dtype, device=values.device)
        return total.index_add_(0, self.latents, values)

    def dense(self, values: Float[Tensor, " value"]) -> Float[Tensor, "row latent"]:
        out = values.new_zeros(self.rows, self.width)
        out[self.row_of, self.latents] = values
        return out

    def decode(self, values: Float[Tensor, " value"], dec: Float[Tensor, "latent d"]) -> Float[Tensor, "row d"]:
        """Sum of decoder rows, each times its value."""
        return _Decode.apply(values, dec, self)  # type: ignore[no-any-return,no-untyped-call]

    def encode(
        self,
        pre: Float[Tensor, " value"],
        x: Float[Tensor, "row d"],
        enc: Float[Tensor, "latent d"],
        bias: Float[Tensor, " latent"],
        shift: Float[Tensor, " d"] | None,
    ) -> Float[Tensor, " value"]:
        """Gives `pre`, which is (x - shift) enc^T + bias at the active latents and was computed without gradient, the
        gradient that it has."""
        return _Encode.apply(pre, x, enc, bias, shift, self)  # type: ignore[no-any-return,no-untyped-call]

    def at(self, x: Float[Tensor, "row latent"]) -> Float[Tensor, " value"]:
        return x[self.row_of, self.latents]

    @cached_property
    def _by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """Order of values by latent, their rows in this order, and where those of a latent begin."""
        latents, order = self.latents.sort(stable=True)
        starts = torch.searchsorted(latents, torch.arange(self.width, device=latents.device))
        return order, self.row_of[order], starts

    def gather(self, values: Float[Tensor, " value"], x: Float[Tensor, "row d"]) -> Float[Tensor, "latent d"]:
        """For every latent the sum over rows of value times x: the gradient of either matrix."""
        order, rows, starts = self._by_latent
        return F.embedding_bag(rows, x, starts, mode="sum", per_sample_weights=values[order])

    def dots(self, x: Float[Tensor, "row d"], matrix: Float[Tensor, "latent d"]) -> Float[Tensor, " value"]:
        """The product of a row of x and a row of the matrix, at the active latents."""
        if gpu.has_kernels(x):
            from workbench import kernels

            return kernels.dots(x, matrix, self.row_of, self.latents)
        if x.device.type == "cpu" and not torch.backends.mkl.is_available():
            chunks = zip(self.row_of.split(AT_ONCE), self.latents.split(AT_ONCE), strict=True)
            return torch.cat([(x[rows] * matrix[latents]).sum(-1) for rows, latents in chunks])
        zeros = x.new_zeros(len(self.latents))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            shape = (self.rows, self.width)
            at = torch.sparse_csr_tensor(self.starts, self.latents, zeros, shape, check_invariants=False)
        products: Tensor = torch.sparse.sampled_addmm(at, x, matrix.T, beta=0.0).values()
        return products


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, dec: Tensor, active: Active) -> Tensor:
        ctx.save_for_backward(values, dec)
        ctx.active = active
        return F.embedding_bag(active.latents, dec, active.starts[:-1], mode="sum", per_sample_weights=values)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None]:
        values, dec = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_values = ctx.active.dots(grad, dec) if ctx.needs_input_grad[0] else None
        return d_values, ctx.active.gather(values, grad) if ctx.needs_input_grad[1] else None, None


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, x: Tensor, enc: Tensor, bias: Tensor, shift: Tensor | None, active: Active
    ) -> Tensor:
        ctx.save_for_backward(x, enc, shift)
        ctx.active = active
        return pre.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, None, Tensor, Tensor, Tensor | None, None]:
        x, enc, shift = ctx.saved_tensors
        d_bias = ctx.active.per_latent(grads[0])
        d_enc = ctx.active.gather(grads[0], x)
        if shift is None:
            return None, None, d_enc, d_bias, None, None
        # Of x - shift, without making it: shift is the same in every row.
        return None, None, d_enc.addr_(d_bias, shift, alpha=-1), d_bias, -(d_bias @ enc), None
