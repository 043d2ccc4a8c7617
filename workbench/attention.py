"""The attention step: the library's scaled-dot-product kernel within our own function.

That is the one place where queries, keys, patterns and per-head outputs have the same layout in every family, so what
is inside attention is read and edited here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from workbench import sites

Visit = Callable[[Tensor], Tensor]
Kernel = Callable[..., tuple[Tensor, Any]]


@dataclass
class Taps:
    """What is to be read and changed inside one attention module during one run."""

    visit: Mapping[str, Visit] = field(default_factory=dict)
    edited: frozenset[str] = frozenset()
    past: tuple[Tensor, Tensor] | None = None
    relevance: bool = False

    def __call__(self, name: str, x: Tensor) -> Tensor:
        return self.visit[name](x) if name in self.visit else x

    def swapped(self, name: str, x: Tensor) -> Tensor:
        """Hooks see [batch, pos, head, d_head]; the kernel wants [batch, head, pos, d_head]."""
        return self.visit[name](x.transpose(1, 2)).transpose(1, 2) if name in self.visit else x


_NO_TAPS = Taps()


def step(
    kernel: Kernel,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """One step: query [batch, head, pos, d_head], key and value [batch, kv head, pos, d_head].

    kernel   the library's; module is the attention module that it is called for
    options  scaling; sliding_window, softcap and s_aux (a sink: one logit per head that enters the softmax alone)

    A pattern that is only read is computed beside the kernel's output, so that reading never changes a value.
    """
    taps = cast(Taps, getattr(module, "workbench_taps", _NO_TAPS))
    query = taps.swapped("attn.hook_rot_q", query)
    key = taps.swapped("attn.hook_rot_k", key)
    value = taps.swapped("attn.hook_v", value)
    window = options.get("sliding_window")
    if taps.past is not None:
        key = torch.cat([_as_many(taps.past[0].transpose(1, 2), key), key], dim=2)
        value = torch.cat([_as_many(taps.past[1].transpose(1, 2), value), value], dim=2)
        attention_mask = _causal(query, key, window)  # the backend's mask knows nothing of the past
    softcap, sink = options.get("softcap"), options.pop("s_aux", None)
    rewritten = softcap is not None or sink is not None or taps.relevance or bool(taps.edited & sites.PATTERN_HOOKS)
    z = None
    if rewritten or taps.visit.keys() & sites.PATTERN_HOOKS:
        groups = query.shape[1] // key.shape[1]
        scores = query @ _repeated(key, groups).transpose(2, 3) * options["scaling"]
        scores = _half(scores) if taps.relevance else scores
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        mask = _causal(query, key, window) if attention_mask is None else attention_mask
        scores = taps("attn.hook_attn_scores", scores.masked_fill(~mask, -torch.inf))
        if sink is not None:  # no key: what it draws is missing from the pattern
            scores = torch.cat([scores, sink.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        pattern = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        pattern = taps("attn.hook_pattern", pattern if sink is None else pattern[..., :-1])
        if rewritten:
            z = (pattern @ _repeated(value, groups)).transpose(1, 2)
            z = _half(z) if taps.relevance else z
    if z is None:
        ungrouped = query.shape[1] == key.shape[1]  # the kernel would repeat keys and values that have been already
        z = kernel(_PLAIN if ungrouped else module, query, key, value, attention_mask, **options)[0]
    return taps("attn.hook_z", z).contiguous(), None


def _repeated(x: Tensor, groups: int) -> Tensor:
    """Each of a group's heads, at dimension 1, as often as queries share it."""
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def _half(product: Tensor) -> Tensor:
    """The same value with half the gradient: each factor of a product is given half of what it explains."""
    return (product + product.detach()) / 2


_PLAIN = nn.Identity()  # an attention module that says nothing of groups


def _as_many(past: Tensor, now: Tensor) -> Tensor:
    """[batch, kv head, pos, d_head], with each head repeated if those of `now` were."""
    return _repeated(past, now.shape[1] // past.shape[1])


def _causal(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """[1, 1, query, key], true where a query may look; the queries are the last positions of the keys."""
    n_query, n_key = query.shape[2], key.shape[2]
    position = torch.arange(n_key, device=query.device)
    distance = position[n_key - n_query :, None] - position[None]
    allowed = distance >= 0
    return (allowed if window is None else allowed & (distance < window))[None, None]
