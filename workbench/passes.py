"""What may be asked of one forward pass, and what happens at a hook point during it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench import backend, sites
from workbench.backend import Resume
from workbench.errors import UserError, unknown
from workbench.sites import Site

if TYPE_CHECKING:
    from workbench.models import LanguageModel

Edit = Callable[[Tensor], Tensor]


def check_tokens(model: LanguageModel, tokens: Tensor) -> None:
    """Raises UserError for tokens that the model cannot read."""
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise UserError(f"tokens must have shape [batch, pos] with neither zero, not {tuple(tokens.shape)}.")
    if tokens.shape[1] > model.config.n_ctx:
        raise UserError(
            f"the text has {tokens.shape[1]} tokens, but {model.name} reads at most {model.config.n_ctx}; shorten it."
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= model.config.d_vocab:
        raise UserError(
            f"token ids must be 0 to {model.config.d_vocab - 1}, not {int(tokens.min())} to {int(tokens.max())}; "
            f"tokenize with {model.name}'s own tokenizer."
        )


def check_site(model: LanguageModel, site: Site, start: Resume | None, ungroup: bool) -> None:
    """Raises UserError for what the model does not have, or where this run does not pass."""
    if site.hook not in model.hook_points:
        raise unknown(f"hook point of {model.name}", site.hook, model.hook_points)
    layer, name = sites.split(site.hook)
    if start is not None and (layer is None or layer < start.layer):
        raise UserError(f"{site.hook} lies before block {start.layer}, where this run starts.")
    if site.head is not None:
        shared = name in ("attn.hook_k", "attn.hook_v", "attn.hook_rot_k") and not ungroup
        n = model.config.n_kv_heads if shared else model.config.n_heads
        if not 0 <= site.head < n:
            raise UserError(f"{site.hook} has heads 0 to {n - 1}, not {site.head}.")


def visitor(
    hook: str,
    wanted: Mapping[str | Site, Site],
    edits: Sequence[tuple[Site, Edit]],
    found: dict[str | Site, Tensor],
    stop: bool,
    grad: bool,
) -> Edit:
    """What happens to the tensor at one hook point: edit, then copy out, then perhaps stop."""
    keys = [key for key, site in wanted.items() if site.hook == hook]
    changes = [(site, fn) for site, fn in edits if site.hook == hook]
    whole = Site(hook)

    def visit(x: Tensor) -> Tensor:
        for site, fn in changes:
            before = x if site == whole else sites.select(x, site)
            after = fn(before)
            if after.shape != before.shape:
                raise UserError(
                    f"the edit at {hook} returned shape {tuple(after.shape)}, not {tuple(before.shape)}; "
                    "an edit must keep the shape."
                )
            x = after if site == whole else sites.assign(x, site, after)
        for key in keys:
            site = wanted[key]
            if not grad:
                found[key] = sites.select(x, site).clone(memory_format=torch.contiguous_format)
            elif site == whole:
                found[key] = x
            else:  # put the part back, so that the graph runs through what the caller holds
                found[key] = sites.select(x, site)
                x = sites.assign(x, site, found[key])
        if stop:
            raise backend.Stop
        return x

    return visit
