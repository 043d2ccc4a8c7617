"""Which heads write a latent, and which carry it on once it is steered.

Writers. A latent's pre-activation is a linear function of the residual stream, and that is a sum of what the embedding
and every head and MLP before wrote: each has its part of it, exactly (norms after attention are linear at the scale
they have). Of a language's latent the contrast is told, the mean part in the target language minus that in the source,
at the last token of parallel sentences. Whether a head has more than its share is told by other latents that are
active as often: `beaten` is the share of them on which the same head has as much of the layer.

Readers. Heads after the latent's layer can only carry on what is steered. Each is held at what it does without
steering, at all positions, while the rest is steered: what is lost of the probability on tokens of the target language
is what it carries (path patching, as the sum over all paths through it).

The paper (Chou et al. 2025) says that steering is "amplified by specific attention heads" and gives no formula; these
are two that can be checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saes.latents import one_of
from saes.pretrained import fit, load
from saes.steering.baselines import mean_difference
from saes.steering.evaluate import prompts
from saes.steering.language_steering import as_long, own_tokens, way
from saes.steering.parallel import OWN, both_in, corpus
from saes.steering.search import statistics
from saes.steering.steer import Steered, Steering
from workbench import scores, sites
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.registry import analysis
from workbench.sites import Site

NULLS = 50  # other latents


@dataclass(frozen=True)
class LanguageHeads:
    """
    writers    contrast of each head's part of the pre-activation, [layer, head] up to the latent's; mlps of each MLP
    rest       contrasts of embedding and biases; whole: of the pre-activation itself; error: largest difference of a
               sum of parts to it
    beaten     share of other latents on which the head has as large a part of what its layer's heads write
    readers    probability on target tokens that each later head carries, [layer, head] after the latent's
    steered    that probability steered, and unsteered
    """

    hook: str
    latent: int
    target: str
    writers: Float[Tensor, "layer head"]
    mlps: Float[Tensor, " layer"]
    rest: dict[str, float]
    whole: float
    error: float
    beaten: Float[Tensor, "layer head"]
    readers: Float[Tensor, "later head"]
    steered: tuple[float, float]
    definition: str

    def summary(self) -> dict[str, Any]:
        first = len(self.writers)
        return {
            "hook": self.hook,
            "latent": self.latent,
            "whole": round(self.whole, 3),
            "writers": [
                [scores.head(layer, head), round(x, 3), round(float(self.beaten[layer, head]), 3)]
                for layer, head, x in _top(self.writers)
            ],
            "readers": [[scores.head(layer + first, head), round(x, 4)] for layer, head, x in _top(self.readers)],
            "steered": [round(x, 4) for x in self.steered],
            "sum_error": self.error,
            "definition": self.definition,
        }


def _top(table: Float[Tensor, "layer head"], k: int = 5) -> list[tuple[int, int, float]]:
    flat = table.flatten()
    best = flat.abs().topk(min(k, len(flat))).indices.tolist() if len(flat) else []
    return [(i // table.shape[1], i % table.shape[1], float(flat[i])) for i in best]


@analysis("language-heads", model="gemma-3-270m")
def language_heads(
    model: LanguageModel,
    store: ActivationStore,
    seed: int,
    *,
    sae: str = "gemma-3-270m",
    hook: str = "",
    latent: int | None = None,
    target: str = "fr",
    source: str = "en",
    text: str = OWN,
    strength: float = 1.0,
    n_prompts: int = 20,
) -> LanguageHeads:
    """Which heads write a language's latent, and which later heads carry it on when it is steered.

    sae       a name, a run or a folder
    hook      which of its SAEs, if there are several
    latent    by number; none: the one of largest monolinguality
    target    language of the latent
    source    language of the prompts
    text      parallel sentences for the writers, see `language-latents`
    strength  of steering, in lengths of the languages' mean difference at the hook point
    n_prompts  validation prompts for the readers
    """
    parallel = both_in(text, target, source)
    chosen = one_of(load(sae), hook, sae)
    fit(model, store, chosen)
    layer, name = sites.split(chosen.hook)
    if layer is None or name != "hook_resid_post":
        raise UserError(f"{chosen.hook} is no residual stream after a block, which alone is a sum of writes.")
    stats = statistics(model, store, chosen, parallel, seed)
    found = way(chosen, stats, target, source, latent)
    assert found.latent is not None
    nulls = _alike(stats.rate.mean(0), found.latent, NULLS)
    directions = chosen.W_enc[:, [found.latent, *nulls]].T
    both = [parts(model, store, directions, layer, parallel[language]) for language in (target, source)]
    contrast = {name: both[0][name].mean(0) - both[1][name].mean(0) for name in both[0]}  # [..., direction]
    pre = contrast["resid"][0]
    total = contrast["heads"].sum((0, 1)) + contrast["mlps"].sum(0) + contrast["embedding"] + contrast["biases"]
    share = contrast["heads"] / contrast["heads"].abs().mean(1, keepdim=True).clamp(min=1e-12)
    length = strength * float(mean_difference(model, store, chosen.hook, parallel[target], parallel[source]).norm())
    later, steered = readers(model, as_long(found, length), target, prompts("validation")[:n_prompts])
    return LanguageHeads(
        chosen.hook, found.latent, target, contrast["heads"][..., 0], contrast["mlps"][..., 0],
        {part: float(contrast[part][0]) for part in ("embedding", "biases")}, float(pre),
        float((total - contrast["resid"]).abs().max()),
        (share[..., 1:].abs() >= share[..., :1].abs()).float().mean(-1), later, steered,
        f"parts of the latent's pre-activation at the last token of {stats.sentences.shape[1]} sentences, {target} "
        f"minus {source}; beaten by other latents of equal rate; readers: lost probability on {target} tokens, "
        f"{n_prompts} prompts",
    )  # fmt: skip


def _alike(rate: Float[Tensor, " latent"], latent: int, n: int) -> list[int]:
    """Other latents whose rate is nearest."""
    apart = (rate.clamp(min=1e-6).log() - rate[latent].clamp(min=1e-6).log()).abs()
    apart[latent] = torch.inf
    out: list[int] = apart.topk(min(n, len(apart) - 1), largest=False).indices.tolist()
    return out


def parts(
    model: LanguageModel, store: ActivationStore, directions: Float[Tensor, "direction d"], layer: int,
    sentences: Sequence[str],
) -> dict[str, Tensor]:  # fmt: skip
    """What everything up to a block writes along directions at the last token: `heads` [sentence, layer, head,
    direction], `mlps` [sentence, layer, direction], `embedding` and `biases` [sentence, direction], and `resid`, the
    residual stream itself, which is their sum."""
    sequences = [model.tokenize(text) for text in sentences]
    layers = range(layer + 1)
    named = {"z": "attn.hook_z", "attn": "hook_attn_out", "mlp": "hook_mlp_out"}
    hooks = [sites.block(i, name) for i in layers for name in named.values()]
    embeds = [hook for hook in model.hook_points if hook in sites.EMBED_HOOKS]
    last = sites.block(layer, "hook_resid_post")
    found = store.get(model, sequences, [*embeds, *hooks, last])
    at = {hook: torch.stack([x[-1] for x in rows]).to(model.device, model.dtype) for hook, rows in found.items()}
    along = directions.to(model.device, model.dtype).T
    heads, mlps, biases = [], [], torch.zeros(len(sequences), along.shape[1], device=model.device)
    for i in layers:
        writes = model.head_writes(i, at[sites.block(i, "attn.hook_z")])
        heads.append(writes @ along)
        biases = biases + (at[sites.block(i, "hook_attn_out")] - writes.sum(1)) @ along
        mlps.append(at[sites.block(i, "hook_mlp_out")] @ along)
    embedding = torch.stack([at[hook] for hook in embeds]).sum(0) @ along
    return {
        "heads": torch.stack(heads, 1).cpu(), "mlps": torch.stack(mlps, 1).cpu(), "embedding": embedding.cpu(),
        "biases": biases.cpu(), "resid": (at[last] @ along).cpu(),
    }  # fmt: skip


def readers(
    model: LanguageModel, steering: Steering, target: str, given: Sequence[str]
) -> tuple[Float[Tensor, "later head"], tuple[float, float]]:
    """What each head after the steered layer carries, and the probability on target tokens steered and unsteered."""
    layer, _ = sites.split(steering.hook)
    assert layer is not None
    ids = own_tokens(model, corpus("search"), target)
    later = range(layer + 1, model.config.n_layers)
    zs = [sites.block(i, "attn.hook_z") for i in later]
    lost = torch.zeros(len(later), model.config.n_heads)
    whole, plain = 0.0, 0.0
    for text in given:
        tokens = model.tokenize(text)[None]
        without = model.run(tokens, capture=zs, logits="last")

        def mass(more: Mapping[str | Site, Any], tokens: Tensor = tokens) -> float:
            edit = {steering.hook: Steered.of([steering], tokens.shape[1]), **more}
            return _mass(model.run(tokens, edit=edit, logits="last").logits, ids)

        plain += _mass(without.logits, ids)
        all_of_it = mass({})
        whole += all_of_it
        for i, hook in enumerate(zs):
            for head in range(model.config.n_heads):
                held = without[hook][:, :, head]
                lost[i, head] += all_of_it - mass({Site(hook, head=head): lambda _, held=held: held})
    return lost / len(given), (whole / len(given), plain / len(given))


def _mass(logits: Tensor | None, ids: Tensor) -> float:
    assert logits is not None
    return float(logits[0, -1].float().softmax(-1)[ids.to(logits.device)].sum())
