"""What makes two activations the same: the key of one sequence at one hook point.

A digest of the model's weights, the numerics that change values (compute dtype, attention kernel, device type), the
exact token ids, the hook point, the codec and the interventions in force. Which batch a sequence was computed in, in
what order, and which tool asked are no part of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from workbench.errors import UserError
from workbench.interventions import Intervention
from workbench.models import LanguageModel
from workbench.sites import Site

Edits = Mapping[str | Site, Intervention]


def keys(
    model: LanguageModel, sequences: Sequence[Tensor], hooks: Iterable[str], codec: str, edits: Edits | None
) -> dict[tuple[int, str], bytes]:
    """The key of each (index of sequence, hook point): 16 bytes."""
    # In the order in which they are applied: two edits of one tensor need not commute.
    edit_key = "".join(f"{tuple(_site(site))}:{_key(edit)};" for site, edit in (edits or {}).items())
    scopes = {hook: f"{model.fingerprint}/{model.numerics}/{hook}/{codec}/{edit_key}/".encode() for hook in hooks}
    contents = [tokens.to("cpu", torch.int64).contiguous().numpy().tobytes() for tokens in sequences]
    return {
        (i, hook): hashlib.blake2b(scope + content, digest_size=16).digest()
        for hook, scope in scopes.items()
        for i, content in enumerate(contents)
    }


def _site(site: str | Site) -> Site:
    return Site(site) if isinstance(site, str) else site


def _key(edit: Intervention) -> str:
    if not isinstance(edit, Intervention):
        raise UserError(f"{edit!r} has no key, so its activations cannot be stored; use workbench.interventions.")
    return edit.key
