"""Codes with a price: what exchanging a head's code for that of the corrupted prompt would do to the metric.

Unique codes say that what a head writes differs between clean and corrupted prompts, not that anything reads it. Here
each code stands for a value, the mean of the head's output over the prompts on which it has the code, and a change of
code is worth, to first order,

    effect(h) = mean over prompts of (value(code on clean) - value(code on corrupted)) . sum over positions dm/d(output)

with the gradient of the metric m on the clean prompt: attribution patching of what the codes tell apart, and of nothing
else. Where clean and corrupted prompt share a code, the effect is zero. What a head writes is held as `hook_z`, before
its linear map to the residual stream, and pooled over positions as `sae_codes` pools it.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saes.codes import Encoder, TrialSettings, assign, check, pooled_z, rescale, split, written
from workbench import sites
from workbench.activations import ActivationStore
from workbench.models import LanguageModel, Resume
from workbench.progress import track
from workbench.prompts import Batch
from workbench.registry import analysis
from workbench.scores import NodeScores, every_head

TOKENS_PER_PASS = 1024


@analysis("code-effects", version=1, n=64)
def code_effects(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    *,
    latents: int = 200,
    examples: int = 10,
    steps: int = 500,
    lam: float = 0.02,
    lr: float = 1e-3,
    trials: int = 3,
    position: Literal["mean", "last"] = "mean",
    encoder: Encoder = "sae",
    sae_seed: int = 0,
) -> NodeScores:
    """Heads by the estimated effect of exchanging their discrete codes for those of the corrupted prompt.

    latents   of the SAE, which is how many codes there can be
    examples  prompts the SAE is trained on, in whole pairs, so rounded up to even; they are not scored
    steps     of training; 0 leaves the SAE random
    lam       weight of the L1 penalty
    lr        learning rate of Adam
    trials    independent SAEs, over which effects are averaged
    position  a head's output averaged over token positions, or at the last one
    encoder   what makes codes: sae, kmeans or probe
    sae_seed  of training examples and initialisation
    """
    n = len(batch)
    settings = TrialSettings("fixed", latents, examples, steps, lam, lr, encoder=encoder)
    check(n, trials, settings)
    generator = torch.Generator().manual_seed(sae_seed)
    z = pooled_z(model, store, [*batch.clean, *batch.corrupted], position)
    x, value = rescale(written(model, z)), torch.cat([*z], 1).float()
    slope = _slopes(model, store, batch, position)
    total = torch.zeros(x.shape[1], n, device=x.device)
    counted = torch.zeros(n, device=x.device)
    for _ in track(range(trials), "code-effects"):
        train, scored = split(n, examples, "fixed", generator)
        table, _ = assign(x, train, x[train].flatten(0, 1), settings, generator)
        kept = torch.cat([scored, scored + n])
        meant = meanings(table[kept], value[kept])
        change = meant[: len(scored)] - meant[len(scored) :]
        total[:, scored] += torch.einsum("phd,phd->hp", change, slope[scored])
        counted[scored] += 1
    ever = counted > 0  # a prompt that trained every SAE is not scored
    per_prompt = (total[:, ever] / counted[ever]).cpu()
    return NodeScores(
        every_head(model.config.n_layers, model.config.n_heads),
        per_prompt.mean(1),
        f"estimated {batch.task.metric}(clean) - {batch.task.metric}(code of the corrupted prompt): difference of the "
        f"codes' mean outputs times gradient of the clean run; {encoder} codes, {position} position, {examples} "
        f"training examples, mean over {trials} trials from seed {sae_seed}, then over the prompts that did not train "
        "every one; positive: the head helps",
        batch.task.metric,
        per_prompt=per_prompt,
        headline={"prompts": int(ever.sum()), "trials": trials},
    )


def meanings(
    table: Int[Tensor, "example head"], value: Float[Tensor, "example head d_head"]
) -> Float[Tensor, "example head d_head"]:
    """What the code of each head and example stands for: its mean value over the examples that have it."""
    out = torch.empty_like(value)
    for h, codes in enumerate(table.T):
        _, at, count = codes.unique(return_inverse=True, return_counts=True)
        total = value.new_zeros(len(count), value.shape[-1]).index_add_(0, at, value[:, h])
        out[:, h] = (total / count[:, None])[at]
    return out


def _slopes(
    model: LanguageModel, store: ActivationStore, batch: Batch, position: str
) -> Float[Tensor, "pair head d_head"]:
    """Gradients of the metric on clean prompts at `hook_z`: summed over positions, or at the last one."""
    hooks = [sites.block(layer, "attn.hook_z") for layer in range(model.config.n_layers)]
    first = sites.block(0, "hook_resid_pre")
    out: list[Tensor] = [torch.empty(0)] * len(batch)
    for part, some in batch.parts(tokens=TOKENS_PER_PASS):
        start = torch.stack(store.get(model, list(some.clean), [first])[first]).to(model.device, model.dtype)
        leaf = Resume(0, start.requires_grad_())
        run = model.run(torch.stack(some.clean), capture=hooks, logits="last", start=leaf, grad=True)
        assert run.logits is not None
        grads = torch.autograd.grad(some.score(run.logits[:, -1]).sum(), [run[hook] for hook in hooks])
        pooled = torch.cat([g.sum(1) if position == "mean" else g[:, -1] for g in grads], 1).float()
        for i, row in zip(part.tolist(), pooled, strict=True):
            out[i] = row
    return torch.stack(out)
