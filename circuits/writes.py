"""What every source of the graph adds to the residual stream, in the clean run and when it is ablated.

An ablation decides what a node or edge carries when it is not part of a circuit:

    resample  its value on the corrupted prompt (counterfactual patching, the field's usual choice)
    mean      its mean over all corrupted prompts of the same length in the batch, position by position
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
from workbench.prompts import Batch

Ablation = Literal["resample", "mean", "zero"]
CHUNK_BYTES = 256 * 10**6  # of one tensor over all sources
PROMPTS_AT_ONCE = 32  # while a mean is taken


class Writes:
    """The sources' outputs for some prompts of one length, kept small: heads as `hook_z`, not as what they write."""

    def __init__(
        self,
        model: LanguageModel,
        store: ActivationStore,
        some: Batch,
        whole: Batch,
        ablation: Ablation = "resample",
    ):
        """some: prompts of one length; whole: the batch that they are part of, over which means are taken, so that no
        score depends on how many prompts share a pass."""
        if ablation not in get_args(Ablation):
            raise unknown("ablation", ablation, get_args(Ablation))
        self.model = model
        c = model.config
        self.z_hooks = [sites.block(layer, "attn.hook_z") for layer in range(c.n_layers)]
        self.mlp_hooks = [sites.block(layer, "hook_mlp_out") for layer in range(c.n_layers)]
        self.start = sites.block(0, "hook_resid_pre")
        hooks = [self.start, *self.z_hooks, *self.mlp_hooks]
        self.clean = self._stacked(store, some.clean, hooks)
        if ablation == "zero":
            self.ablated = {hook: torch.zeros_like(x) for hook, x in self.clean.items()}
        elif ablation == "mean":
            alike = [tokens for tokens in whole.corrupted if len(tokens) == len(some.corrupted[0])]
            self.ablated = {hook: x.expand_as(self.clean[hook]) for hook, x in self._mean(store, alike, hooks).items()}
        else:
            self.ablated = self._stacked(store, some.corrupted, hooks)
        # Positions before this are the same in both runs, so that no source differs there.
        same = ablation == "resample"
        differs = (torch.stack(some.clean) != torch.stack(some.corrupted)).any(0)
        self.prefix = int(differs.nonzero()[0]) if same else 0

    def _stacked(
        self, store: ActivationStore, sequences: Sequence[Tensor], hooks: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch pos *rest"]]:
        found = store.get(self.model, list(sequences), hooks)
        return {hook: torch.stack(found[hook]).to(self.model.device, self.model.dtype) for hook in hooks}

    def _mean(
        self, store: ActivationStore, sequences: Sequence[Tensor], hooks: Sequence[str]
    ) -> dict[str, Float[Tensor, "pos *rest"]]:
        total: dict[str, Tensor] = {}
        for start in range(0, len(sequences), PROMPTS_AT_ONCE):
            found = self._stacked(store, sequences[start : start + PROMPTS_AT_ONCE], hooks)
            total = {hook: x.double().sum(0) + total.get(hook, 0) for hook, x in found.items()}
        return {hook: (x / len(sequences)).to(self.model.dtype) for hook, x in total.items()}

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


def stored_past(
    model: LanguageModel, store: ActivationStore, clean: Sequence[Tensor], prefix: int, first: int = 0
) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values of the first `prefix` positions from a layer on, as the attention step sees them: what a run that
    leaves these positions out needs. Empty if there are none."""
    if not prefix:
        return {}
    name = "attn.hook_rot_k" if sites.block(0, "attn.hook_rot_k") in model.hook_points else "attn.hook_k"
    layers = range(first, model.config.n_layers)
    found = store.get(model, list(clean), [sites.block(at, hook) for at in layers for hook in (name, "attn.hook_v")])

    def stacked(hook: str) -> Tensor:
        return torch.stack([x[:prefix] for x in found[hook]]).to(model.device, model.dtype)

    return {at: (stacked(sites.block(at, name)), stacked(sites.block(at, "attn.hook_v"))) for at in layers}


def copies(past: dict[int, tuple[Tensor, Tensor]], k: int, first: int = 0) -> dict[int, tuple[Tensor, Tensor]]:
    """Stored keys and values from a layer on, for k copies of the prompts."""
    return {at: (key.repeat(k, 1, 1, 1), value.repeat(k, 1, 1, 1)) for at, (key, value) in past.items() if at >= first}
