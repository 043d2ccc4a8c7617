"""A forward pass in which every edge is kept or cut.

In the model every destination reads the sum of all earlier sources. Here each reads a sum of its own: what the kept
edges carry now plus what the cut ones carry when ablated,

    input(v) = sum over earlier u of  keep[u, v] * output(u) + (1 - keep[u, v]) * ablated(u)   + biases

so that a cut early on changes what later sources write, as it does in the circuit. `keep` may be anything between 0
and 1, and gradients reach it. All edges kept is the model; all cut is the ablated run (the corrupted prompt's, where
that is the ablation).

Many ways of cutting are run together as copies of one batch. Layers up to the first cut come from the store, and so do
the positions before clean and corrupted prompt first differ. Destinations that read the same sources share one sum, and
a sum is made of the few edges that are kept, or of the whole less the few that are cut.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.graph import PORTS, Graph
from circuits.writes import Ablation, Writes, copies, stored_past
from workbench import sites
from workbench.activations import ActivationStore
from workbench.models import LanguageModel, Resume
from workbench.progress import track
from workbench.prompts import Batch

COPY_BYTES = 512 * 10**6  # of what all sources write, over the copies that are run together
PROMPTS_AT_ONCE = 32
FEW = 2**24  # products of one layer and copy below which it is not worth looking for equal or empty sums
Keep = Float[Tensor, "copy source destination"]


class Wiring:
    """Some prompts of one length, ready to be run with any edges cut."""

    def __init__(
        self,
        model: LanguageModel,
        store: ActivationStore,
        batch: Batch,
        ablation: Ablation = "resample",
        *,
        whole: Batch | None = None,
    ):
        """whole: the batch that these prompts are part of, over which means are taken; itself, unless given."""
        self.model, self.graph = model, Graph.of(model.config)
        self.tokens = torch.stack(batch.clean)
        writes = Writes(model, store, batch, whole or batch, ablation)
        at = slice(writes.prefix, None)
        self.ablated = writes.of(writes.ablated, at)  # [source, batch, pos, d_model]
        self.clean = writes.of(writes.clean, at)
        self.past = stored_past(model, store, batch.clean, writes.prefix)

    def replaced(self, constants: Float[Tensor, "source d_model"]) -> Wiring:
        """The same prompts, where every cut edge carries one vector per source, whatever the prompt and position."""
        other = copy(self)
        other.ablated = constants[:, None, None].expand_as(self.ablated)
        return other

    def max_copies(self) -> int:
        """How many copies run together within the memory budget."""
        return max(1, COPY_BYTES // (self.ablated.numel() * self.ablated.element_size()))

    def run(self, keep: Keep, *, grad: bool = False) -> Float[Tensor, "copy batch vocab"]:
        """Logits at the last position for each way of cutting; with `grad`, differentiable in `keep`."""
        keep = keep.to(self.model.device, self.model.dtype)
        if grad:
            return _Pass(self, keep, grad).logits()
        some = keep.split(self.max_copies())
        return torch.cat([_Pass(self, one, grad).logits() for one in track(some, "circuits", silent=len(some) < 4)])


class Sums(NamedTuple):
    """What destinations read: the different sums, and which of them each destination reads."""

    sums: Float[Tensor, "group batch pos d_model"]
    which: Int[Tensor, " destination"]


class _Pass:
    """One pass: the state that the edits of the layers share."""

    def __init__(self, wiring: Wiring, keep: Keep, grad: bool):
        self.wiring, self.model, self.keep, self.grad = wiring, wiring.model, keep, grad
        c = self.model.config
        self.per_layer = 3 * c.n_heads + 1
        self.first = _first_cut(keep, wiring.graph, self.per_layer)
        known = 1 + self.first * (c.n_heads + 1)
        # What sources write now, less what they write when ablated: [source, batch, pos, d_model] shared by all copies
        # for the layers before the first cut, [copy, source, batch, pos, d_model] after it. A gradient needs sources
        # that nothing overwrites: then they are kept in parts.
        self.shared = wiring.clean[:known] - wiring.ablated[:known]
        self.parts: list[Tensor] = []
        later = [len(keep), len(wiring.ablated) - known, *wiring.ablated.shape[1:]]
        self.own = wiring.ablated.new_empty([0] if grad else later)
        self.n_own = 0  # rows of `own` that are written
        self.total = self.shared.sum(0).repeat(len(keep), 1, 1, 1)
        self.base = wiring.ablated[:known].sum(0)  # what a destination would read if all its edges were cut
        for layer in range(self.first):
            bias = self.model.out_bias(layer)
            self.base = self.base if bias is None else self.base + bias
        self.before_heads = self.base
        self.ports: dict[str, Tensor] = {}

    def logits(self) -> Float[Tensor, "copy batch vocab"]:
        c, n = self.model.config, len(self.keep)
        edit: dict[str | sites.Site, Callable[[Tensor], Tensor]] = {}
        for layer in range(self.first, c.n_layers):
            for port in PORTS:
                edit[sites.block(layer, f"attn.hook_{port}")] = partial(self._port, layer, port)
            edit[sites.block(layer, "attn.hook_z")] = partial(self._heads, layer)
            edit[sites.block(layer, "hook_mlp_in")] = partial(self._mlp_in, layer)
            edit[sites.block(layer, "hook_mlp_out")] = partial(self._mlp_out, layer)
        if self.first < c.n_layers:
            resid = self.base + self.shared.sum(0)
            self.model.run(
                self.wiring.tokens.repeat(n, 1),
                edit=edit,
                stop_after=sites.block(c.n_layers - 1, "hook_mlp_out"),
                start=Resume(self.first, resid.repeat(n, 1, 1), copies(self.wiring.past, n, self.first)),
                ungroup=True,
                grad=self.grad,
            )
        last = slice(-1, None)
        mixed = torch.stack([sums[0, :, 0] for sums, _ in self._mix(last, self.base[:, last], last)])
        return self.model.unembed(mixed, self.wiring.tokens[:, -1], grad=self.grad)

    def _mix(self, columns: slice, base: Tensor, at: slice = slice(None), hidden: int = 0) -> list[Sums]:
        """What some destinations read of the sources so far, but for the last few, copy by copy."""
        n, known = self.n_own - hidden, len(self.shared)
        keep = self.keep[:, :, columns]
        if self.grad or keep[0].numel() * base.numel() < FEW:
            return self._all_mixed(keep.mT, base, at, hidden)
        out: list[Sums] = []
        for i in range(len(self.keep)):
            groups, which = keep[i, : known + n].unique(dim=1, return_inverse=True)
            mostly = groups.mean(0) > 0.5  # these are the whole less what is cut
            groups = torch.where(mostly, 1 - groups, groups)
            mixed = _sums(groups[:known], self.shared[:, :, at]) + _sums(groups[known:], self.own[i, :n, :, at])
            if bool(mostly.any()):
                total = self.total[i, :, at] - self.own[i, n : self.n_own, :, at].sum(0)
                mixed[mostly] = total - mixed[mostly]
            out.append(Sums(mixed + base, which))
        return out

    def _all_mixed(self, keep: Tensor, base: Tensor, at: slice, hidden: int) -> list[Sums]:
        """The same by plain products: differentiable, and quicker where there is little to add up."""
        shared = self.shared[:, :, at]
        n = len(shared)
        out: Tensor = torch.einsum("kes,sx->kex", keep[..., :n], shared.flatten(1))
        parts = self.parts[: len(self.parts) - bool(hidden)] if self.grad else [self.own[:, : self.n_own - hidden]]
        for part in parts:
            part = part[:, :, :, at]
            out = out + torch.bmm(keep[..., n : n + part.shape[1]], part.flatten(2))
            n += part.shape[1]
        each = torch.arange(keep.shape[1], device=keep.device)
        return [Sums(sums, each) for sums in out.unflatten(-1, base.shape) + base]

    def _write(self, now: Float[Tensor, "copy source batch pos d_model"]) -> None:
        """Remember what further sources write, less what they write when ablated."""
        if self.grad:
            self.parts.append(now)
            return
        self.own[:, self.n_own : self.n_own + now.shape[1]] = now
        self.n_own += now.shape[1]
        self.total += now.sum(1)

    def _port(self, layer: int, port: str, x: Tensor) -> Tensor:
        """Queries, keys or values of all heads, each from its own input."""
        c = self.model.config
        if port == "q":
            column = layer * self.per_layer
            weight, bias = self.model.in_weights(layer)
            weight, bias = weight.flatten(0, 1).mT, bias.flatten(0, 1)[:, None]
            rows = []
            for sums, which in self._mix(slice(column, column + 3 * c.n_heads), self.base):
                normed = self.model.attention_norm(layer)(sums).flatten(1, 2)
                rows.append(torch.baddbmm(bias, normed[which], weight))  # [3 * head, batch * pos, d_head]
            every = torch.stack(rows).unflatten(1, (3, -1)).unflatten(3, (-1, x.shape[1]))
            ports = every.permute(1, 0, 3, 4, 2, 5).flatten(1, 2)  # [3, copy * batch, pos, head, d_head]
            self.ports = dict(zip(PORTS, ports, strict=True))
        return self.ports[port].to(x.dtype)

    def _heads(self, layer: int, z: Tensor) -> Tensor:
        wrote = self.model.head_writes(layer, z).unflatten(0, (len(self.keep), -1)).movedim(3, 1)
        ablated = self._ablated(layer, slice(0, -1))
        self._write(wrote - ablated)
        bias = self.model.out_bias(layer)
        self.before_heads = self.base
        self.base = self.base + ablated.sum(0) + (0 if bias is None else bias)
        return z

    def _mlp_in(self, layer: int, x: Tensor) -> Tensor:
        column = slice((layer + 1) * self.per_layer - 1, (layer + 1) * self.per_layer)
        if self.model.config.parallel_attn_mlp:  # a parallel MLP does not read the heads beside it
            mixed = self._mix(column, self.before_heads, hidden=self.model.config.n_heads)
        else:
            mixed = self._mix(column, self.base)
        return torch.cat([sums[0] for sums, _ in mixed]).to(x.dtype)

    def _mlp_out(self, layer: int, x: Tensor) -> Tensor:
        ablated = self._ablated(layer, slice(-1, None))
        self._write(x.unflatten(0, (len(self.keep), 1, -1)) - ablated)
        self.base = self.base + ablated[0]
        return x

    def _ablated(self, layer: int, which: slice) -> Tensor:
        step = self.model.config.n_heads + 1
        return self.wiring.ablated[1 + layer * step : 1 + (layer + 1) * step][which]


def _sums(
    keep: Float[Tensor, "source group"], now: Float[Tensor, "source batch pos d_model"]
) -> Float[Tensor, "group batch pos d_model"]:
    """What each group reads of some sources, without those that no group reads."""
    read = keep.any(1).nonzero()[:, 0]
    if len(read) < len(keep):
        keep, now = keep[read], now[read]
    mixed: Tensor = (keep.T @ now.flatten(1)).unflatten(1, now.shape[1:])
    return mixed


def _first_cut(keep: Keep, graph: Graph, per_layer: int) -> int:
    """The first layer with an edge into it that is not wholly kept in some copy; the number of layers if none is."""
    if keep.requires_grad:
        return 0
    cut = (graph.flat(keep) != 1).any(0)
    if not bool(cut.any()):
        return (len(graph.destinations) - 1) // per_layer
    return int(graph.edges[cut, 1].min()) // per_layer


def metric(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    keep: Keep,
    ablation: Ablation = "resample",
) -> Float[Tensor, "copy batch"]:
    """The task's metric per prompt when only some edges are kept, for each way of cutting."""
    out = torch.empty(len(keep), len(batch))
    parts = list(batch.parts(PROMPTS_AT_ONCE))
    for part, some in track(parts, "prompts", silent=len(parts) < 4):
        logits = Wiring(model, store, some, ablation, whole=batch).run(keep)
        out[:, part] = torch.stack([some.score(rows.cpu()) for rows in logits])
    return out
