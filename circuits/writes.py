"""What every source of the graph adds to the residual stream, in the clean run and when it is ablated.

An ablation decides what a node or edge carries when it is not part of a circuit:

    resample  its value on the corrupted prompt (counterfactual patching, the field's usual choice)
    mean      its mean over the corrupted prompts of the same length, position by position
    zero      nothing

Everything comes from the activation store. Sources are in the graph's order: `input`, then heads and MLP by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from workbench import sites
from workbench.activations import ActivationStore
from workbench.errors import unknown
from workbench.models import LanguageModel

Ablation = Literal["resample", "mean", "zero"]
CHUNK_BYTES = 256 * 10**6  # of one tensor over all sources


class Writes:
    """The sources' outputs for some prompts of one length, kept small: heads as `hook_z`, not as what they write."""

    def __init__(
        self,
        model: LanguageModel,
        store: ActivationStore,
        clean: Sequence[Tensor],
        corrupted: Sequence[Tensor],
        ablation: Ablation = "resample",
    ):
        if ablation not in get_args(Ablation):
            raise unknown("ablation", ablation, get_args(Ablation))
        self.model = model
        c = model.config
        self.z_hooks = [sites.block(layer, "attn.hook_z") for layer in range(c.n_layers)]
        self.mlp_hooks = [sites.block(layer, "hook_mlp_out") for layer in range(c.n_layers)]
        self.start = sites.block(0, "hook_resid_pre")
        hooks = [self.start, *self.z_hooks, *self.mlp_hooks]
        self.clean = self._stacked(store, clean, hooks)
        if ablation == "zero":
            self.ablated = {hook: torch.zeros_like(x) for hook, x in self.clean.items()}
        else:
            self.ablated = self._stacked(store, corrupted, hooks)
        if ablation == "mean":
            self.ablated = {hook: x.mean(0, keepdim=True).expand_as(x) for hook, x in self.ablated.items()}
        # Positions before this are the same in both runs, so that no source differs there.
        same = ablation == "resample"
        differs = (torch.stack(list(clean)) != torch.stack(list(corrupted))).any(0)
        self.prefix = int(differs.nonzero()[0]) if same else 0

    def _stacked(
        self, store: ActivationStore, sequences: Sequence[Tensor], hooks: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch pos *rest"]]:
        found = store.get(self.model, list(sequences), hooks)
        return {hook: torch.stack(found[hook]).to(self.model.device, self.model.dtype) for hook in hooks}

    @property
    def n_sources(self) -> int:
        return 1 + self.model.config.n_layers * (self.model.config.n_heads + 1)

    def of(self, run: dict[str, Tensor], at: slice = slice(None)) -> Float[Tensor, "source batch pos d_model"]:
        """What all sources write in a run, at some positions."""
        first = run[self.start][:, at]
        out = first.new_empty(self.n_sources, *first.shape)
        out[0] = first
        step = self.model.config.n_heads + 1
        for layer, (z, mlp) in enumerate(zip(self.z_hooks, self.mlp_hooks, strict=True)):
            row = 1 + layer * step
            out[row : row + step - 1] = self.model.head_writes(layer, run[z][:, at]).movedim(2, 0)
            out[row + step - 1] = run[mlp][:, at]
        return out

    def differences(self, at: slice) -> Float[Tensor, "source batch pos d_model"]:
        """Clean minus ablated."""
        if all(self.model.post_attention_norm(layer) is None for layer in range(self.model.config.n_layers)):
            # Linear in z: one projection for both runs.
            return self.of({hook: x - self.ablated[hook] for hook, x in self.clean.items()}, at)
        return self.of(self.clean, at) - self.of(self.ablated, at)

    def chunks(self) -> list[slice]:
        """Slices of the positions at which anything differs, of which one tensor over all sources is small."""
        batch, length = self.clean[self.start].shape[:2]
        itemsize = self.clean[self.start].element_size()
        each = self.n_sources * batch * self.model.config.d_model * itemsize
        size = max(1, CHUNK_BYTES // each)
        return [slice(at, min(at + size, length)) for at in range(self.prefix, length, size)]
