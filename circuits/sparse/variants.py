"""Variants of a weight-sparse model that circuits are checked with.

frozen norms      RMSNorms divide by what they divide by on some prompts when nothing is masked. Otherwise a channel
                  that is masked changes the scale of all others, which pruning can make use of: what is left of the
                  model is louder, for no reason that has to do with the task (an option of Drori 2026). A trap: frozen
                  scales tell prompts apart by what the whole model makes of them. With scale and shift fitted, no
                  channels at all can be a circuit; see `Sufficiency.nothing`.
shuffled weights  each matrix with its weights in other places: as sparse, as large, and without any structure. Whatever
                  pruning finds there, it has made itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuits.sparse.model import SparseTransformer
from circuits.sparse.train import matrices
from workbench import norms, sites
from workbench.models import LanguageModel


class Frozen(nn.Module):
    """A norm whose scale is the one it has at x, whatever it is given."""

    def __init__(self, norm: nn.Module, x: Float[Tensor, "batch pos d_model"]):
        super().__init__()
        self.linear, self.bias = norms.frozen(norm, x)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return self.linear(x) + self.bias


def frozen_norms(model: LanguageModel, tokens: Int[Tensor, "batch pos"]) -> LanguageModel:
    """The model with all norms frozen at these tokens, which it then reads alone; it shares the model's weights."""
    module = _module(model)
    last = len(module.transformer.h) - 1
    before = {sites.block(i, hook): i for i in range(last + 1) for hook in ("hook_resid_pre", "hook_resid_mid")}
    final = sites.block(last, "hook_resid_post")
    run = model.run(tokens, capture=[*before, final], logits="none")
    out = _rebuilt(module, module.state_dict())
    for hook, layer in before.items():
        name = "ln_1" if hook.endswith("pre") else "ln_2"
        setattr(out.transformer.h[layer], name, Frozen(getattr(module.transformer.h[layer], name), run[hook]))
    out.transformer.ln_f = Frozen(module.transformer.ln_f, run[final])  # type: ignore[assignment]
    return LanguageModel(
        out, model.tokenizer, name=f"{model.name}, norms frozen", fingerprint=f"{model.fingerprint}-frozen"
    )


@torch.no_grad()
def shuffled(model: LanguageModel, seed: int = 0) -> LanguageModel:
    """The model with the entries of each matrix, embeddings too, in random places within it.

    Gains, biases, sinks, position channels and the bigram table stay.
    """
    module, generator = _module(model), torch.Generator().manual_seed(seed)
    state = module.state_dict()
    for name, weight, _, _ in matrices(module):
        order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
        state[name] = weight.flatten()[order].view_as(weight)
    return LanguageModel(
        _rebuilt(module, state), model.tokenizer, name=f"{model.name}, weights shuffled",
        fingerprint=f"{model.fingerprint}-shuffled-{seed}",
    )  # fmt: skip


def _module(model: LanguageModel) -> SparseTransformer:
    module: SparseTransformer = model._module
    return module


def _rebuilt(module: SparseTransformer, state: Mapping[str, Tensor]) -> SparseTransformer:
    """A module of its own, without any hooks, whose weights are these very tensors."""
    with torch.device("meta"):
        out = SparseTransformer(module.config)
    out.load_state_dict(state, assign=True)
    return out
