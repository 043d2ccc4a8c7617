"""Exact activation patching: replace one node's output by its value on the other prompt, and look at the metric.

This is the causal truth that every approximation is held to (Vig et al. 2020; Meng et al. 2022; the procedure and its
pitfalls in Heimersheim & Nanda 2024). A node is one attention head's `hook_z` or one MLP's `hook_mlp_out`, at every
position at once.

Patching a node of layer L cannot change anything below L, nor any position before the two prompts first differ. So a
patched run starts at block L with the stored residual stream, leaves out the shared prefix (its keys and values are
stored too), and computes logits at the last position alone; all patches of one layer share one batch. The result is
that of one full forward pass per node, up to float rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.writes import copies, stored_past
from workbench import scores, sites
from workbench.activations import ActivationStore
from workbench.models import LanguageModel, Resume
from workbench.progress import track
from workbench.prompts import Batch
from workbench.registry import analysis
from workbench.scores import NodeScores

TOKENS_PER_PASS = 2048
PROMPTS_AT_ONCE = 64  # bounds memory: the activations of this many prompts are held at a time


@analysis("patching", version=1, n=32)
def patching(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    *,
    direction: Literal["noise", "denoise"] = "noise",
    mlps: bool = True,
) -> NodeScores:
    """Exact activation patching of every head and MLP, one at a time.

    direction  noise: clean run, node from the corrupted one; denoise: corrupted run, node from the clean one
    mlps       patch the MLPs too
    """
    nodes = [*scores.every_head(model.config.n_layers, model.config.n_heads)]
    nodes += [scores.mlp(layer) for layer in range(model.config.n_layers)] if mlps else []
    patched = torch.empty(len(nodes), len(batch))
    unpatched = torch.empty(len(batch))
    chunks = list(batch.parts(PROMPTS_AT_ONCE))
    with track(total=len(chunks) * model.config.n_layers, desc="patching") as bar:
        for chunk, some in chunks:
            pair = (some.clean, some.corrupted)
            runs = _Patches(model, store, *(pair if direction == "noise" else pair[::-1]), mlps)
            unpatched[chunk] = some.score(runs.unpatched())
            for layer in range(model.config.n_layers):
                names, logits = runs.layer(layer)
                where = torch.tensor([nodes.index(name) for name in names])
                patched[where[:, None], chunk] = torch.stack([some.score(rows) for rows in logits])
                bar.update()
    effect = unpatched - patched if direction == "noise" else patched - unpatched
    unit = batch.task.metric
    definition = {
        "noise": f"{unit}(clean) - {unit}(clean run with the node's output from the corrupted prompt), all positions, "
        "mean over prompts; positive: the node helps",
        "denoise": f"{unit}(corrupted run with the node's output from the clean prompt) - {unit}(corrupted), all "
        "positions, mean over prompts; positive: the node restores the behaviour",
    }[direction]
    return NodeScores(
        nodes=tuple(nodes),
        scores=effect.mean(1),
        definition=definition,
        unit=unit,
        per_prompt=effect,
        headline={"direction": direction, f"{unit}_unpatched": float(unpatched.mean()), "prompts": len(batch)},
    )


class _Patches:
    """Every patched run of one bucket of prompts, from stored activations."""

    def __init__(
        self, model: LanguageModel, store: ActivationStore, base: Sequence[Tensor], source: Sequence[Tensor], mlps: bool
    ):
        self.model = model
        self.tokens = torch.stack(list(base))
        self.mlps = mlps
        differs = (self.tokens != torch.stack(list(source))).any(0)
        self.prefix = int(differs.nonzero()[0])  # positions before this are the same in both runs, whatever is patched
        c = model.config
        taken = ["attn.hook_z"] + (["hook_mlp_out"] if mlps else [])

        def fetch(sequences: Sequence[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
            hooks = [sites.block(layer, name) for name in names for layer in range(c.n_layers)]
            found = store.get(
                model, sequences, [*hooks, *([model.hook_points[-1]] if "hook_resid_pre" in names else [])]
            )
            return {hook: torch.stack(found[hook]) for hook in found}

        self.base = fetch(base, ["hook_resid_pre"])
        self.source = fetch(source, taken)
        self.past = stored_past(model, store, base, self.prefix)

    def unpatched(self) -> Float[Tensor, "batch vocab"]:
        """Logits of the base run at the last position."""
        return self.model.unembed(self.base[self.model.hook_points[-1]][:, -1], self.tokens[:, -1]).cpu()

    def layer(self, layer: int) -> tuple[list[str], list[Float[Tensor, "batch vocab"]]]:
        """The nodes of one layer and, for each, the logits at the last position when it is patched."""
        names = [scores.head(layer, h) for h in range(self.model.config.n_heads)]
        names += [scores.mlp(layer)] if self.mlps else []
        n_prompts, length = self.tokens.shape
        per_pass = max(1, TOKENS_PER_PASS // (n_prompts * (length - self.prefix)))
        logits: list[Tensor] = []
        for start in range(0, len(names), per_pass):
            logits += self._pass(layer, range(start, min(start + per_pass, len(names))))
        return names, logits

    def _pass(self, layer: int, patches: range) -> list[Tensor]:
        """One forward pass from `layer` on, in which copy k of the prompts has node `patches[k]` patched."""
        k, n_prompts = len(patches), len(self.tokens)
        n_heads = self.model.config.n_heads
        z = self.source[sites.block(layer, "attn.hook_z")][:, self.prefix :].to(self.model.device, self.model.dtype)
        mlp = self.source.get(sites.block(layer, "hook_mlp_out"))

        def patch_heads(x: Tensor) -> Tensor:
            x = x.unflatten(0, (k, n_prompts)).clone()
            for copy, node in enumerate(patches):
                if node < n_heads:
                    x[copy, :, :, node] = z[:, :, node]
            return x.flatten(0, 1)

        def patch_mlp(x: Tensor) -> Tensor:
            assert mlp is not None
            x = x.unflatten(0, (k, n_prompts)).clone()
            x[patches.index(n_heads)] = mlp[:, self.prefix :].to(x)
            return x.flatten(0, 1)

        edit: dict[str | sites.Site, object] = {sites.block(layer, "attn.hook_z"): patch_heads}
        if n_heads in patches:
            edit[sites.block(layer, "hook_mlp_out")] = patch_mlp
        resid = self.base[sites.block(layer, "hook_resid_pre")][:, self.prefix :]
        start = Resume(layer, resid.repeat(k, 1, 1), copies(self.past, k, layer))
        out = self.model.run(self.tokens.repeat(k, 1), edit=edit, logits="last", start=start).logits  # type: ignore[arg-type]
        assert out is not None
        return list(out[:, -1].cpu().unflatten(0, (k, n_prompts)))
