"""What SAEs are trained to make small, by architecture; the same numbers as SAELens' losses, step by step.

Everywhere the squared error of the reconstruction, summed over the width and averaged over rows, plus

    standard      l1 times the sum over latents of value times norm of the decoder row
    topk          of each row only the k largest pre-activations, and of these only what is above 0
    batchtopk     the k n largest of n rows together (Bussmann et al. 2024)
    matryoshka    batchtopk, and the error of the first widths[0], widths[1], ... latents alone (Bussmann et al. 2025)
    jumprelu      l0 times the number of latents above their threshold, whose gradient is that of a rectangle of a given
                  bandwidth around the threshold (Rajamanoharan et al. 2024)

and for the three of them that choose the largest, `aux` times the error with which those latents that have not been
active for long explain what is left over, by the d/2 largest of them in each row (Gao et al. 2024, appendix A.2): dead
latents come back so. Which are largest is decided by pre-activation times norm of the decoder row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from saes.active import DENSE, Active
from workbench import gpu
from workbench.errors import UserError, unknown

Architecture = Literal["topk", "batchtopk", "matryoshka", "jumprelu", "standard"]
LARGEST = ("topk", "batchtopk", "matryoshka")
ALIGNED = 8  # columns beside those of the activations; one is used
BLOCKS = 16  # candidates for the largest of a row are sought in blocks of so many


@dataclass(frozen=True)
class Spec:
    """An SAE to be trained.

    k             active latents of a row; on average for batchtopk and matryoshka
    l1, l0        prices of standard and jumprelu, reached after `price_warm_up` steps
    widths        of matryoshka's inner SAEs, rising, without the whole
    aux           weight of the error that dead latents are to explain
    dead_after    a latent counts as dead after so many steps without being active
    subtract      b_dec from the input; a transcoder subtracts nothing
    norm          of decoder rows at the start
    threshold     of jumprelu at the start, and the bandwidth of its gradient
    selection     precision of the product that decides which latents are active; their values are always float32
    lr            of Adam, whose gradient is clipped to length 1
    warm_up, decay  steps of linear rise and fall of the learning rate
    """

    architecture: Architecture = "topk"
    latents: int = 4096
    k: float | int = 32
    l1: float = 1.0
    l0: float = 1.0
    price_warm_up: int = 0
    widths: tuple[int, ...] = ()
    aux: float = 1.0
    dead_after: int = 1000
    subtract: bool = True
    norm: float = 0.1
    threshold: float = 0.01
    bandwidth: float = 0.05
    selection: Literal["float32", "bfloat16"] = "float32"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    warm_up: int = 0
    decay: int = 0

    def __post_init__(self) -> None:
        if self.architecture not in get_args(Architecture):
            raise unknown("architecture", self.architecture, get_args(Architecture))
        if not 0 < self.k <= self.latents:
            raise UserError(f"k={self.k:g} of {self.latents} latents cannot be active; give 1 to {self.latents}.")
        if self.architecture == "topk" and self.k != int(self.k):
            raise UserError(f"k={self.k:g} is no whole number, and topk keeps as many in every row; use batchtopk.")
        rising = [0, *self.widths, self.latents]
        if (self.architecture == "matryoshka") != bool(self.widths) or sorted(set(rising)) != rising:
            raise UserError(
                f"widths={self.widths} are those of the SAEs inside a matryoshka SAE: rising, below {self.latents}."
            )
        if self.selection == "bfloat16" and not self.largest:
            raise UserError(f"selection=bfloat16 is for those that choose the largest; {self.architecture} has none.")

    @property
    def largest(self) -> bool:
        """Whether the largest latents are chosen."""
        return self.architecture in LARGEST


@dataclass
class Weights:
    """Parameters of an SAE in training, latents first."""

    enc: Float[Tensor, "latent d_in"]
    bias: Float[Tensor, " latent"]
    dec: Float[Tensor, "latent d_out"]
    b_dec: Float[Tensor, " d_out"]
    threshold: Float[Tensor, " latent"] | None = None

    @classmethod
    def start(cls, spec: Spec, d_in: int, d_out: int, generator: torch.Generator) -> Weights:
        """Decoder rows of one length and random direction; the encoder the same, where both have one width."""
        dec = F.normalize(torch.randn(spec.latents, d_out, generator=generator), dim=-1) * spec.norm
        enc = dec.clone()
        if d_in != d_out or not spec.subtract:  # a transcoder's input says nothing of its output's directions
            enc = F.normalize(torch.randn(spec.latents, d_in, generator=generator), dim=-1) * spec.norm
        threshold = torch.full((spec.latents,), spec.threshold) if spec.architecture == "jumprelu" else None
        return cls(enc, torch.zeros(spec.latents), dec, torch.zeros(d_out), threshold)

    def tensors(self) -> dict[str, Tensor]:
        return {name: x for name, x in vars(self).items() if x is not None}

    @property
    def norms(self) -> Float[Tensor, " latent"]:
        return self.dec.square().sum(-1).sqrt()


@dataclass
class Step:
    """One step: the losses by name, which latents were active, and how many values of a row were."""

    losses: dict[str, Float[Tensor, ""]]
    fired: Bool[Tensor, " latent"]
    l0: Float[Tensor, ""]

    @property
    def loss(self) -> Float[Tensor, ""]:
        return torch.stack(list(self.losses.values())).sum()


@dataclass
class Chooser:
    """Chooses the largest. It knows what the last step's smallest was, below which few candidates have to be sought,
    and keeps the memory of the last step's scores."""

    bound: float = -1.0
    space: Tensor | None = None

    def topk(self, score: Float[Tensor, "row latent"], k: int) -> Active:
        """The k largest of each row. The k blocks with the largest maxima hold them, whatever else is in these."""
        rows, width = score.shape
        if gpu.has_kernels(score) and score.dtype == torch.float32:
            from workbench import kernels

            return Active.fixed(kernels.topk(score, k), width)
        if width % BLOCKS or width // BLOCKS <= k:
            return Active.fixed(score.topk(k, dim=-1, sorted=False).indices, width)
        blocks = score.view(rows, BLOCKS, width // BLOCKS)  # a block: every (width / BLOCKS)th latent
        best = blocks.amax(1).topk(k, dim=-1, sorted=False).indices
        candidates = blocks.gather(2, best[:, None].expand(-1, BLOCKS, -1)).reshape(rows, -1)
        found = candidates.topk(k, dim=-1, sorted=False).indices
        return Active.fixed(found // k * (width // BLOCKS) + best.gather(1, found % k), width)

    def together(self, score: Float[Tensor, "row latent"], n: int) -> Active:
        """The n largest of all rows, as far as they are above 0."""
        for low in (0.9 * self.bound, 0.5 * self.bound, 0.0):
            chosen = score > max(low, 0.0)
            count = int(chosen.sum())
            if count >= n or low <= 0:
                break
        if count > n:
            values = score[chosen]
            keep = torch.zeros(count, dtype=torch.bool, device=score.device)
            keep[values.topk(n, sorted=False).indices] = True
            chosen[chosen.clone()] = keep
            self.bound = float(values[keep].min())
        return Active.where(chosen)


def step(
    w: Weights,
    x: Float[Tensor, "row d_in"],
    y: Float[Tensor, "row d_out"],
    spec: Spec,
    chooser: Chooser,
    dead: Bool[Tensor, " latent"] | None,
    price: float = 1.0,
) -> Step:
    """The losses of some rows, to be differentiated. y is x, or what a transcoder is to write; dead: None if no
    latent is; price: share of l1 or l0 that is charged by now."""
    before = scores(w, x, spec, chooser)
    if spec.largest:
        return _largest(w, x, y, before, spec, chooser, dead)
    if spec.architecture == "jumprelu":
        return _jumprelu(w, x, y, before, spec, price * spec.l0)
    return _standard(w, x, y, before, spec, price * spec.l1)


@torch.no_grad()
def scores(
    w: Weights, x: Float[Tensor, "row d_in"], spec: Spec, chooser: Chooser | None = None
) -> Float[Tensor, "row latent"]:
    """What decides which latents are active, without gradient, in the precision that does so: pre-activations, times
    the norms of the decoder rows where the largest are chosen.

    One product with nothing before or after it: norms are multiplied into the encoder, and the bias is a row of it that
    meets a column of ones: each pass over all rows and latents would cost a tenth of the product. So does memory that
    is new every time, which the chooser therefore keeps.
    """
    factor = _norms(w) if spec.largest else w.bias.new_ones(())
    width = x.shape[1]
    left, right = x.new_zeros(len(x), width + ALIGNED), w.enc.new_zeros(len(w.enc), width + ALIGNED)
    torch.sub(x, w.b_dec if spec.subtract else 0, out=left[:, :width])
    torch.mul(w.enc, factor[:, None] if spec.largest else factor, out=right[:, :width])
    left[:, width], right[:, width] = 1, w.bias * factor
    if spec.selection == "bfloat16":
        left, right = left.bfloat16(), right.bfloat16()
    if chooser is None or chooser.space is None or chooser.space.shape != (len(x), len(w.enc)):
        made = left @ right.T
        if chooser is not None:
            chooser.space = made
        return made
    return torch.mm(left, right.T, out=chooser.space)


def _norms(w: Weights) -> Float[Tensor, " latent"]:
    return w.norms.detach().clamp(min=1e-12)


def _encoded(w: Weights, x: Tensor, score: Tensor, active: Active, spec: Spec) -> Float[Tensor, " value"]:
    """Pre-activations at the active latents, with their gradient."""
    shift = w.b_dec if spec.subtract else None
    with torch.no_grad():
        if spec.selection == "bfloat16":
            values = active.dots(x if shift is None else x - shift, w.enc) + active.spread(w.bias)
        else:
            values = active.at(score)
            values = values / active.spread(_norms(w)) if spec.largest else values
    return active.encode(values, x, w.enc, w.bias, shift)


def _error(recon: Float[Tensor, "row d"], y: Float[Tensor, "row d"]) -> Float[Tensor, ""]:
    return (recon - y).square().sum(-1).mean()


def _largest(
    w: Weights,
    x: Tensor,
    y: Tensor,
    score: Tensor,
    spec: Spec,
    chooser: Chooser,
    dead: Bool[Tensor, " latent"] | None,
) -> Step:
    if spec.architecture == "topk":
        active = chooser.topk(score, int(spec.k))
    else:
        active = chooser.together(score, int(spec.k * len(x)))
    values = _encoded(w, x, score, active, spec).relu()
    losses, recon, low = {}, w.b_dec.expand_as(y), 0
    for width in (*spec.widths, spec.latents):
        part, inside = active.part(low, width) if spec.widths else (active, slice(None))
        recon, low = recon + part.decode(values[inside], w.dec), width
        losses["error" if width == spec.latents else f"error_{width}"] = _error(recon, y)
    losses["aux"] = _aux(w, x, (y - recon).detach(), score, spec, chooser, dead)
    with torch.no_grad():
        positive = (values > 0).float()
        return Step(losses, active.per_latent(positive) > 0, positive.sum() / len(x))


def _aux(
    w: Weights, x: Tensor, left: Tensor, score: Tensor, spec: Spec, chooser: Chooser, dead: Tensor | None
) -> Float[Tensor, ""]:
    if dead is None or spec.aux == 0:
        return left.new_zeros(())
    n = int(dead.sum())
    most = x.shape[-1] // 2
    which = dead.nonzero()[:, 0]
    found = score[:, which].topk(min(most, n), dim=-1, sorted=False).indices
    active = Active.fixed(which[found], spec.latents)
    recon = active.decode(_encoded(w, x, score, active, spec), w.dec)
    return spec.aux * min(n / most, 1.0) * _error(recon, left)


class _Jump(torch.autograd.Function):
    """Values above their threshold, and how many these are; rectangles around it give the threshold its gradient."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        on = (pre > threshold).to(pre.dtype)
        return pre * on, on

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.bandwidth / 2).to(pre.dtype) / ctx.bandwidth
        return (pre > threshold) * grads[0], -near * (threshold * grads[0] + grads[1]), None


def _jumprelu(w: Weights, x: Tensor, y: Tensor, pre: Tensor, spec: Spec, price: float) -> Step:
    """Also latents near their threshold, though below it, have a part: the threshold's gradient comes from both."""
    assert w.threshold is not None
    with torch.no_grad():
        w.threshold.clamp_(min=0.0)  # below 0 the gate would let negative values through
    chosen = pre > w.threshold.detach() - spec.bandwidth / 2
    if chosen.float().mean() > DENSE:
        inner = F.linear(x - w.b_dec if spec.subtract else x, w.enc, w.bias)
        values, on = _Jump.apply(inner, w.threshold, spec.bandwidth)  # type: ignore[no-untyped-call]
        recon, fired = values @ w.dec + w.b_dec, (on > 0).any(0)
    else:
        active = Active.where(chosen)
        inner = _encoded(w, x, pre, active, spec)
        values, on = _Jump.apply(inner, active.spread(w.threshold), spec.bandwidth)  # type: ignore[no-untyped-call]
        recon, fired = active.decode(values, w.dec) + w.b_dec, active.per_latent(on.detach()) > 0
    count = on.sum() / len(x)
    return Step({"error": _error(recon, y), "l0": price * count}, fired, count.detach())


def _standard(w: Weights, x: Tensor, y: Tensor, pre: Tensor, spec: Spec, price: float) -> Step:
    chosen = pre > 0
    if chosen.float().mean() > DENSE:
        values = F.linear(x - w.b_dec if spec.subtract else x, w.enc, w.bias).relu()
        recon, cost = values @ w.dec + w.b_dec, (values * w.norms).sum()
    else:
        active = Active.where(chosen)
        values = _encoded(w, x, pre, active, spec)
        recon, cost = active.decode(values, w.dec) + w.b_dec, (values * active.spread(w.norms)).sum()
    losses = {"error": _error(recon, y), "l1": price * cost / len(x)}
    return Step(losses, chosen.any(0), chosen.sum() / len(x))
