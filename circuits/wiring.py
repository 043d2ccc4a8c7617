"""A forward pass in which every edge is kept or cut.

In the model every destination reads the sum of all earlier sources. Here each reads a sum of its own: what the kept
edges carry now plus what the cut ones carry when ablated,

    input(v) = sum over earlier u of  keep[u, v] * output(u) + (1 - keep[u, v]) * ablated(u)   + biases

so that a cut early on changes what later sources write, as it does in the circuit. `keep` may be anything between 0
and 1, and gradients reach it. All edges kept is the model; all cut is the ablated run (the corrupted prompt's, where
that is the ablation).

Many ways of cutting are run together as copies of one batch. Layers up to the first cut come from the store, and so do
the positions before clean and corrupted prompt first differ.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.graph import PORTS, Graph
from circuits.writes import Ablation, Writes, copies, stored_past
from workbench import sites
from workbench.activations import ActivationStore
from workbench.models import LanguageModel, Resume
from workbench.prompts import Batch

COPY_BYTES = 512 * 10**6  # of what all sources write, over the copies that are run together
PROMPTS_AT_ONCE = 32
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
        return torch.cat([_Pass(self, some, grad).logits() for some in keep.split(self.max_copies())])


class _Pass:
    """One pass: the state that the edits of the layers share."""

    def __init__(self, wiring: Wiring, keep: Keep, grad: bool):
        self.wiring, self.model, self.keep, self.grad = wiring, wiring.model, keep, grad
        c = self.model.config
        self.per_layer = 3 * c.n_heads + 1
        self.first = _first_cut(keep, wiring.graph, self.per_layer)
        known = 1 + self.first * (c.n_heads + 1)
        # What sources write now, less what they write when ablated: [source, batch, pos, d_model] shared by all copies
        # for the layers before the first cut, [copy, source, batch, pos, d_model] after it.
        self.shared = wiring.clean[:known] - wiring.ablated[:known]
        self.parts: list[Tensor] = []
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
        mixed = self._mix(slice(-1, None), self.base[:, last], last)  # [copy, 1, batch, 1, d_model]
        return self.model.unembed(mixed[:, 0, :, 0], grad=self.grad)

    def _mix(self, columns: slice, base: Tensor, at: slice = slice(None)) -> Float[Tensor, "copy dst batch pos d"]:
        """What some destinations read, of the sources so far."""
        keep = self.keep[:, :, columns].mT  # [copy, destination, source]
        shared = self.shared[:, :, at]
        n = len(shared)
        out: Tensor = torch.einsum("kes,sx->kex", keep[..., :n], shared.flatten(1))
        for part in self.parts:  # part by part: a source that is kept back for a gradient must not be overwritten
            part = part[:, :, :, at]
            out = out + torch.bmm(keep[..., n : n + part.shape[1]], part.flatten(2))
            n += part.shape[1]
        mixed: Tensor = out.unflatten(-1, base.shape) + base
        return mixed

    def _port(self, layer: int, port: str, x: Tensor) -> Tensor:
        """Queries, keys or values of all heads, each from its own input."""
        c = self.model.config
        if port == "q":
            column = layer * self.per_layer
            mixed = self._mix(slice(column, column + 3 * c.n_heads), self.base)
            normed = self.model.attention_norm(layer)(mixed).movedim(1, 0)  # [3 * head, copy, batch, pos, d_model]
            weight, bias = self.model.in_weights(layer)
            rows = torch.baddbmm(bias.flatten(0, 1)[:, None], normed.flatten(1, 3), weight.flatten(0, 1).mT)
            rows = rows.unflatten(1, (len(self.keep) * mixed.shape[2], -1)).unflatten(0, (3, -1))
            self.ports = {name: one.permute(1, 2, 0, 3) for name, one in zip(PORTS, rows, strict=True)}
        return self.ports[port].to(x.dtype)

    def _heads(self, layer: int, z: Tensor) -> Tensor:
        wrote = self.model.head_writes(layer, z).unflatten(0, (len(self.keep), -1)).movedim(3, 1)
        ablated = self._ablated(layer, slice(0, -1))
        self.parts.append(wrote - ablated)
        bias = self.model.out_bias(layer)
        self.before_heads = self.base
        self.base = self.base + ablated.sum(0) + (0 if bias is None else bias)
        return z

    def _mlp_in(self, layer: int, x: Tensor) -> Tensor:
        column = layer * self.per_layer + self.per_layer - 1
        parallel = self.model.config.parallel_attn_mlp
        hidden = [self.parts.pop()] if parallel else []  # a parallel MLP does not read the heads beside it
        mixed = self._mix(slice(column, column + 1), self.before_heads if parallel else self.base)
        self.parts += hidden
        return mixed[:, 0].flatten(0, 1).to(x.dtype)

    def _mlp_out(self, layer: int, x: Tensor) -> Tensor:
        ablated = self._ablated(layer, slice(-1, None))
        self.parts.append(x.unflatten(0, (len(self.keep), 1, -1)) - ablated)
        self.base = self.base + ablated[0]
        return x

    def _ablated(self, layer: int, which: slice) -> Tensor:
        step = self.model.config.n_heads + 1
        return self.wiring.ablated[1 + layer * step : 1 + (layer + 1) * step][which]


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
    for part, some in batch.parts(PROMPTS_AT_ONCE):
        logits = Wiring(model, store, some, ablation, whole=batch).run(keep)
        out[:, part] = torch.stack([some.score(rows.cpu()) for rows in logits])
    return out
