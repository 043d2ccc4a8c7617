"""Where in a model one reads or writes.

A *hook point* is a named tensor of the forward pass, spelled as TransformerLens spells it:
`blocks.5.attn.hook_z`. A *site* is a hook point plus an optional head, position or latent.
A *basis* is anything that encodes and decodes the tensor at a site: an SAE, the neurons, a rotation.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from workbench.errors import UserError

# Order of computation inside one block; a run stops after the deepest hook point that was asked for.
BLOCK_HOOKS = (
    "hook_resid_pre",
    "attn.hook_in",  # weight-sparse models: what attention reads, after the norm and AbsTopK
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
    "attn.hook_v",  # the kernel sees values after it has seen queries and keys
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_z",
    "attn.hook_result",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_in",  # what the MLP reads, before its norm: an edit here leaves the residual stream alone
    "mlp.hook_in",  # as `attn.hook_in`
    "mlp.hook_pre",
    "mlp.hook_pre_linear",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)
EMBED_HOOKS = ("hook_embed", "hook_pos_embed")
# Hook points whose second axis after `pos` is `head`: a site may pick one head there.
HEAD_HOOKS = frozenset(f"attn.hook_{n}" for n in ("q", "k", "v", "rot_q", "rot_k", "z", "result"))
# Shaped [batch, head, query, key] instead.
PATTERN_HOOKS = frozenset({"attn.hook_attn_scores", "attn.hook_pattern"})

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


class Site(NamedTuple):
    """A hook point, and optionally one head (query head at `hook_q`, `hook_z`, `hook_result`; key-value head at
    `hook_k`, `hook_v`), one position (negative counts from the end) or one latent of a basis."""

    hook: str
    head: int | None = None
    pos: int | None = None
    latent: int | None = None


@runtime_checkable
class Basis(Protocol):
    """Anything with latents over a site."""

    @property
    def n_latents(self) -> int: ...
    def encode(self, x: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...


def block(layer: int, name: str) -> str:
    """`block(5, "attn.hook_z")` is `"blocks.5.attn.hook_z"`."""
    return f"blocks.{layer}.{name}"


def split(hook: str) -> tuple[int | None, str]:
    """Layer (None for the embeddings) and name inside the block."""
    match = _BLOCK.fullmatch(hook)
    return (int(match[1]), match[2]) if match else (None, hook)


def depth(hook: str) -> tuple[int, int]:
    """Sort key in order of computation."""
    layer, name = split(hook)
    if layer is None:
        return (-1, EMBED_HOOKS.index(name))
    return (layer, BLOCK_HOOKS.index(name))


def select(x: Tensor, site: Site) -> Tensor:
    """The part of a hook point's tensor that the site names, as a view; axes that are picked disappear."""
    return x[_index(site)]


def assign(x: Tensor, site: Site, value: Tensor) -> Tensor:
    """A copy of `x` with the site's part replaced."""
    x = x.clone()
    x[_index(site)] = value
    return x


def _index(site: Site) -> tuple[slice | int, ...]:
    _, name = split(site.hook)
    every = slice(None)
    head = every if site.head is None else site.head
    pos = every if site.pos is None else site.pos
    if name in PATTERN_HOOKS:
        return (every, head, pos)
    if name in HEAD_HOOKS:
        return (every, pos, head)
    if site.head is not None:
        raise UserError(f"{site.hook} has no head axis, but head={site.head} was asked for; leave it out.")
    return (every, pos)
