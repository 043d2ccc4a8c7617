"""Analyses that need only a model: logit lens, direct logit attribution, attention patterns.

Each reads stored activations and multiplies by weights; none intervenes, so none is causal evidence. Where a frozen
norm is needed it is measured from the norm itself rather than from its kind, so RMSNorm, LayerNorm and Gemma's
variants need no case of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench import norms, scores, sites
from workbench.activations import ActivationStore
from workbench.metrics import top1
from workbench.models import LanguageModel
from workbench.prompts import Batch
from workbench.registry import analysis
from workbench.scores import NodeScores

# ---- logit lens ----


@dataclass(frozen=True)
class LensResult:
    """The task's metric read off the residual stream after each block, and the likeliest tokens for one prompt.

    metric         [layer + 1] mean over prompts; entry 0 is the embedding, the last is the model's own output
    metric_std     its standard deviation over prompts
    top1           share of prompts whose right answer is the likeliest token there
    tokens         the example prompt; `top_tokens[layer][pos]` is what the lens reads there, `top_probs` how sure it is
    """

    metric: Float[Tensor, " layer"]
    metric_std: Float[Tensor, " layer"]
    top1: Float[Tensor, " layer"]
    unit: str
    tokens: list[str]
    top_tokens: list[list[str]]
    top_probs: Float[Tensor, "layer pos"]

    def summary(self) -> dict[str, Any]:
        final = float(self.metric[-1])
        reached = [i for i, value in enumerate(self.metric.tolist()) if final and value / final >= 0.5]
        return {
            "final_metric": final,
            "unit": self.unit,
            "metric_by_layer": [round(x, 4) for x in self.metric.tolist()],
            "half_reached_after_block": reached[0] - 1 if reached else None,
        }


@analysis("logit-lens", version=1, n=32)
def logit_lens(model: LanguageModel, batch: Batch, store: ActivationStore) -> LensResult:
    """The model's prediction read off every layer: final norm and unembedding applied early.

    nostalgebraist 2020. The norm's scale is recomputed at each layer, as in the original.
    """
    hooks = _residual_stream(model)
    found = store.get(model, batch.clean, hooks)
    metric, first = [], []
    example = torch.stack([found[hook][0] for hook in hooks])
    at_end = torch.stack([tokens[-1] for tokens in batch.clean])
    for hook in hooks:
        logits = model.unembed(torch.stack([x[-1] for x in found[hook]]), at_end).cpu()
        metric.append(batch.score(logits))
        first.append(top1(logits, batch.answers))
    probs = model.unembed(example, batch.clean[0]).softmax(-1).max(-1)
    return LensResult(
        metric=torch.stack([m.mean() for m in metric]),
        metric_std=torch.stack([m.std(correction=0) for m in metric]),
        top1=torch.stack([f.mean() for f in first]),
        unit=batch.task.metric,
        tokens=model.token_strings(batch.clean[0].tolist()),
        top_tokens=[model.token_strings(row.tolist()) for row in probs.indices],
        top_probs=probs.values.cpu(),
    )


# ---- direct logit attribution ----


@analysis("direct-logit-attribution", version=1, n=32)
def direct_logit_attribution(model: LanguageModel, batch: Batch, store: ActivationStore) -> NodeScores:
    """What each head and MLP adds directly to the logit difference, final norm's scale frozen.

    Elhage et al. 2021; Wang et al. 2022, section 3.1. The parts (heads, MLPs, embedding, biases) sum to the logit
    difference; how exactly is in `sum_error`.
    """
    c = model.config
    last = model.hook_points[-1]
    writes = [
        h for h in model.hook_points if h.endswith(("hook_embed", "hook_pos_embed", "hook_attn_out", "hook_mlp_out"))
    ]
    zs = [sites.block(layer, "attn.hook_z") for layer in range(c.n_layers)]
    found = store.get(model, batch.clean, [*writes, *zs, last])
    at_end = {hook: torch.stack([x[-1] for x in found[hook]]).to(model.device, model.dtype) for hook in found}
    unembed = model.unembed_weight
    ids = list(zip(batch.answers, batch.wrong, strict=True))
    direction = torch.stack([unembed[:, a].mean(1) - unembed[:, w].mean(1) for a, w in ids])
    to_logits, bias = norms.frozen(model.final_norm, at_end[last])

    def effect(write: Tensor) -> Tensor:
        return (to_logits(write) * direction).sum(-1)

    parts: dict[str, Tensor] = {}
    rest = (bias * direction).sum(-1)
    for layer in range(c.n_layers):
        heads = model.head_writes(layer, at_end[sites.block(layer, "attn.hook_z")])
        total = at_end[sites.block(layer, "hook_attn_out")]
        for h in range(c.n_heads):
            parts[scores.head(layer, h)] = effect(heads[:, h])
        rest = rest + effect(total - heads.sum(1))  # the output bias, where there is one
        parts[scores.mlp(layer)] = effect(at_end[sites.block(layer, "hook_mlp_out")])
    embedding = sum((effect(at_end[hook]) for hook in writes if hook in sites.EMBED_HOOKS), torch.zeros(()))
    direct = torch.zeros(())
    table = model.bigram(torch.stack([tokens[-1] for tokens in batch.clean]))
    if table is not None:
        direct = torch.stack([row[a].mean() - row[w].mean() for row, (a, w) in zip(table, ids, strict=True)])
    embedding = embedding + direct
    per_prompt = torch.stack(list(parts.values())).cpu()
    truth = (model.final_norm(at_end[last]) * direction).sum(-1) + direct
    error = (per_prompt.sum(0) + (rest + embedding).cpu() - truth.cpu()).abs().max()
    return NodeScores(
        nodes=tuple(parts),
        scores=per_prompt.mean(1),
        definition="direct effect of the node's write at the last position on logit(answer) - logit(wrong), final norm "
        "frozen at its clean scale"
        + (", logits before the model's soft cap" if c.final_softcap else "")
        + ", mean over prompts; positive: pushes towards the answer",
        unit="logit_diff",
        per_prompt=per_prompt,
        headline={
            "logit_difference": float(truth.mean()),
            "embedding": float(embedding.mean()),
            "biases": float(rest.mean()),
            "sum_error": float(error),
        },
    )


# ---- attention patterns ----


@dataclass(frozen=True)
class AttentionResult:
    """Where each head looks: mean attention by class of key [layer, head], and all patterns of one prompt.

    previous   the position before the query
    first      position 0
    duplicate  earlier positions with the query's own token
    induction  positions just after those
    Each is averaged over the query positions where its class is not empty, and over prompts.
    """

    classes: dict[str, Float[Tensor, "layer head"]]
    tokens: list[str]
    patterns: Float[Tensor, "layer head query key"]

    def summary(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, grid in self.classes.items():
            if grid.isnan().all():  # no such key in any prompt
                continue
            best = int(grid.nan_to_num(-1).argmax())
            layer, index = divmod(best, grid.shape[1])
            out[name] = {"head": scores.head(layer, index), "attention": round(float(grid[layer, index]), 4)}
        return out


@analysis("attention-patterns", version=1, n=32)
def attention_patterns(model: LanguageModel, batch: Batch, store: ActivationStore) -> AttentionResult:
    """Where each head looks: previous token, first token, duplicates, and the token after a duplicate.

    Olsson et al. 2022 (induction heads); Wang et al. 2022 (duplicate-token heads).
    """
    c = model.config
    hooks = [sites.block(layer, "attn.hook_pattern") for layer in range(c.n_layers)]
    sums: dict[str, Tensor] = {}
    counts: dict[str, float] = {}
    example = None
    for start in range(0, len(batch), 16):
        some = batch.clean[start : start + 16]
        found = store.get(model, some, hooks)
        for i, tokens in enumerate(some):
            pattern = torch.stack([found[hook][i] for hook in hooks])
            example = pattern if example is None else example
            for name, keys in key_classes(tokens).items():
                defined = keys.any(1)
                seen = (pattern * keys).sum(-1)[..., defined].sum(-1)
                sums[name] = sums.get(name, torch.zeros(c.n_layers, c.n_heads)) + seen
                counts[name] = counts.get(name, 0.0) + float(defined.sum())
    assert example is not None
    return AttentionResult(
        classes={name: total / counts[name] if counts[name] else total * torch.nan for name, total in sums.items()},
        tokens=model.token_strings(batch.clean[0].tolist()),
        patterns=example,
    )


def key_classes(tokens: Tensor) -> dict[str, Tensor]:
    """For each class a mask [query, key]; only earlier keys count."""
    n = len(tokens)
    earlier = torch.ones(n, n).tril(-1).bool()
    same = (tokens[:, None] == tokens[None]) & earlier
    after = torch.zeros_like(same)
    after[:, 1:] = same[:, :-1]
    return {
        "previous": torch.eye(n).roll(-1, 1).tril().bool(),
        "first": torch.zeros(n, n).index_fill(1, torch.tensor([0]), 1).bool() & earlier,
        "duplicate": same,
        "induction": after & (earlier | torch.eye(n).bool()),
    }


def _residual_stream(model: LanguageModel) -> list[str]:
    first = sites.block(0, "hook_resid_pre")
    return [first, *(sites.block(layer, "hook_resid_post") for layer in range(model.config.n_layers))]
