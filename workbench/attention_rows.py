"""Rows of attention, in double precision: one sequence and one layer at a time, however many prompts there are.

A row is a softmax over the keys that a query may see. Where a head has a learned sink (weight-sparse models), one logit
enters the softmax that belongs to no key: the model's pattern then sums to less than 1. Here the sink is one more
outcome, the last one, so that every row is a whole distribution. Its logit is read off the row of the sequence in which
it draws nearest to half of the attention: of those pairs it is known best. A head whose sink draws less than rounding
could, in every row of a sequence, has none there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench import sites
from workbench.activations import ActivationStore
from workbench.models import LanguageModel

SCORES, PATTERN = "attn.hook_attn_scores", "attn.hook_pattern"
AT_ONCE, NUMBERS = 16, 2**26  # prompts, and numbers of their patterns, that are held at once


def by_layer(
    model: LanguageModel, store: ActivationStore, sequences: Sequence[Int[Tensor, "_"]], names: Sequence[str]
) -> Iterator[tuple[int, int, list[Tensor]]]:
    """Index of the sequence, layer, and what is at these hook points of the block."""
    c = model.config
    hooks = {(layer, name): sites.block(layer, name) for layer in range(c.n_layers) for name in names}
    longest = max(len(tokens) for tokens in sequences)
    size = max(1, min(AT_ONCE, NUMBERS // (len(names) * c.n_layers * c.n_heads * longest**2)))
    for start in range(0, len(sequences), size):
        some = sequences[start : start + size]
        found = store.get(model, some, list(hooks.values()))
        for i in range(len(some)):
            for layer in range(c.n_layers):
                yield start + i, layer, [found[hooks[layer, name]][i] for name in names]


def with_sink(
    scores: Float[Tensor, "head query key"], pattern: Float[Tensor, "head query key"], eps: float
) -> Float[Tensor, "head query outcome"]:
    """Logits over the keys and, last, the sink; minus infinity for what a query does not see and where there is none.

    eps  the rounding error of the model's own numbers
    """
    scores = scores.double()
    missing = 1 - pattern.double().sum(-1)
    best = (missing - 0.5).abs().argmin(-1, keepdim=True)
    drawn = missing.gather(-1, best).clamp_max(1 - 2.0**-24)
    logit = scores.logsumexp(-1).gather(-1, best) + torch.log(drawn.clamp_min(0) / (1 - drawn))
    logit = torch.where(drawn > max(1e-5, eps), logit, -torch.inf)
    return torch.cat([scores, logit[:, None].expand(*scores.shape[:2], 1)], -1)
