"""The graph of a weight-sparse model's channels: its nodes are what a circuit is made of, its edges are weights.

A node is one channel of one site, at all positions: of what attention reads (`0.attn.act_in:17`), of queries, keys and
values over all heads (`0.attn.q:3`), of what attention adds (`0.attn.resid_delta:5`), of what an MLP reads
(`0.mlp.act_in:9`), of its neurons (`0.mlp.post_act:40`) and of what it adds (`0.mlp.resid_delta:2`). Names of sites are
those of the released circuits. An edge is a nonzero weight between two channels; biases, the softmax, the residual
stream itself, embedding and unembedding are no edges (Gao et al. 2025, section 2.2 and footnote 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.graph import Graph
from circuits.sparse.model import SparseTransformer
from workbench import sites
from workbench.errors import UserError
from workbench.models import LanguageModel

# Site, its hook point inside a block, in order of computation.
SITES = {
    "attn.act_in": "attn.hook_in",
    "attn.q": "attn.hook_q",
    "attn.k": "attn.hook_k",
    "attn.v": "attn.hook_v",
    "attn.resid_delta": "hook_attn_out",
    "mlp.act_in": "mlp.hook_in",
    "mlp.post_act": "mlp.hook_post",
    "mlp.resid_delta": "hook_mlp_out",
}
PER_HEAD = ("attn.q", "attn.k", "attn.v")
Fill = Mapping[str, Tensor]  # by hook point, what a channel carries when it is ablated


@dataclass(frozen=True)
class Channels:
    """All channels of a model, numbered layer by layer and site by site."""

    model: LanguageModel

    def __post_init__(self) -> None:
        if not isinstance(self.model._module, SparseTransformer):
            raise UserError(
                f"{self.model.name} is no model of circuits.sparse: channels are nodes there alone; for others use "
                "eap-ig or node-pruning."
            )

    @property
    def module(self) -> SparseTransformer:
        module: SparseTransformer = self.model._module
        return module

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def spans(self) -> list[tuple[int, str, slice]]:
        """Layer, site, and which numbers its channels have."""
        c = self.model.config
        heads = c.n_heads * c.d_head
        width = {"attn.q": heads, "attn.k": heads, "attn.v": heads, "mlp.post_act": c.d_mlp}
        out, start = [], 0
        for layer in range(c.n_layers):
            for site in SITES:
                stop = start + width.get(site, c.d_model)
                out.append((layer, site, slice(start, stop)))
                start = stop
        return out

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{layer}.{site}:{i}" for layer, site, span in self.spans for i in range(span.stop - span.start))

    @cached_property
    def hooks(self) -> tuple[str, ...]:
        return tuple(sites.block(layer, SITES[site]) for layer, site, _ in self.spans)

    def split(self, values: Float[Tensor, " channel"]) -> dict[str, Tensor]:
        """Values of all channels, by hook point and in the shape that channels have there."""
        c, out = self.model.config, {}
        for layer, site, span in self.spans:
            part = values[span]
            out[sites.block(layer, SITES[site])] = part.unflatten(0, (c.n_heads, -1)) if site in PER_HEAD else part
        return out

    def edits(self, mask: Float[Tensor, " channel"], fill: Fill) -> dict[str | sites.Site, Callable[[Tensor], Tensor]]:
        """Edits after which each channel carries mask * its value + (1 - mask) * its fill; mask may need gradients."""
        split = self.split(mask.to(self.model.device, self.model.dtype))
        return {hook: partial(_mix, split[hook], fill[hook].to(self.model.device)) for hook in self.hooks}

    @cached_property
    def graph(self) -> Graph:
        """Every nonzero weight between two channels."""
        found = [edges for edges, _ in self._matrices()]
        return Graph(self.names, self.names, torch.cat(found) if found else torch.zeros(0, 2, dtype=torch.long))

    @cached_property
    def weights(self) -> Float[Tensor, " edge"]:
        """The weights of the graph's edges."""
        return torch.cat([values for _, values in self._matrices()])

    def between(self, kept: Bool[Tensor, " channel"]) -> Bool[Tensor, " edge"]:
        """The edges whose two ends are kept."""
        return kept[self.graph.edges[:, 0]] & kept[self.graph.edges[:, 1]]

    def _matrices(self) -> list[tuple[Int[Tensor, "edge 2"], Float[Tensor, " edge"]]]:
        at = {(layer, site): span.start for layer, site, span in self.spans}
        out = []
        d, width = self.model.config.d_model, self.model.config.n_heads * self.model.config.d_head
        state = {name: x.detach().cpu() for name, x in self.module.named_parameters()}
        for layer in range(self.model.config.n_layers):
            block = f"transformer.h.{layer}"
            qkv = state[f"{block}.attn.c_attn.weight"][:, :d]  # position channels, behind these, are no nodes
            parts = [("attn.act_in", f"attn.{port}", qkv[i * width : (i + 1) * width]) for i, port in enumerate("qkv")]
            parts.append(("attn.v", "attn.resid_delta", state[f"{block}.attn.c_proj.weight"]))
            parts.append(("mlp.act_in", "mlp.post_act", state[f"{block}.mlp.c_fc.weight"][:, :d]))
            parts.append(("mlp.post_act", "mlp.resid_delta", state[f"{block}.mlp.c_proj.weight"]))
            for source, destination, weight in parts:
                where = weight.nonzero()  # [destination, source]
                offset = torch.tensor([at[layer, destination], at[layer, source]])
                out.append(((where + offset).flip(1), weight[where[:, 0], where[:, 1]]))
        return out


def _mix(mask: Tensor, fill: Tensor, x: Tensor) -> Tensor:
    return fill + mask * (x - fill)
