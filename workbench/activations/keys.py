"""What makes two activations the same.

An entry of the store is one sequence at one hook point. Its key has two parts. The *scope* is all that decides the
value besides the tokens: the model's weights, the numerics (compute dtype, attention kernel, device type), the hook
point, the codec, and the interventions in force. The *sequence* is a digest of the exact token ids. Which batch a
sequence was computed in, in what order, and which tool asked are no part of either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.errors import UserError
from workbench.interventions import Intervention
from workbench.models import LanguageModel
from workbench.sites import Site

Edits = Mapping[str | Site, Intervention]


class Scope(NamedTuple):
    """Everything but the tokens."""

    model: str  # fingerprint of the weights
    numerics: str
    hook: str
    codec: str
    edit: str  # digest of the interventions, "" for none

    @property
    def digest(self) -> bytes:
        return _digest("\0".join(self))


class Key(NamedTuple):
    scope: Scope
    sequence: bytes  # 16-byte digest of the token ids


def scopes(
    model: LanguageModel, hooks: Sequence[str], codec: str, edits: Edits | None, canonical: bool = False
) -> dict[str, Scope]:
    """The scope of each hook point.

    A canonical scope holds only values computed with the sequence alone in its batch, at this number of threads:
    recomputing one of them on the same machine and software gives the same bits.
    """
    numerics = model.numerics + (f"-alone-{torch.get_num_threads()}threads" if canonical else "")
    # In the order in which they are applied: two edits of one tensor need not commute.
    edit = "".join(f"{tuple(_site(site))}:{_key(edit)};" for site, edit in (edits or {}).items())
    edit = _digest(edit).hex() if edit else ""
    return {hook: Scope(model.fingerprint, numerics, hook, codec, edit) for hook in hooks}


def token_bytes(tokens: Tensor) -> bytes:
    """Token ids as int64, little-endian: as they are digested."""
    return tokens.to("cpu", torch.int64).contiguous().numpy().astype("<i8", copy=False).tobytes()


def sequence_digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def sequence_digests(sequences: Iterable[Tensor]) -> list[bytes]:
    return [sequence_digest(token_bytes(one)) for one in sequences]


def pass_digest(scope: Scope, sequence: bytes) -> bytes:
    """One sequence's forward pass, whatever is read from it: what a process claims while it computes."""
    return hashlib.blake2b(
        "\0".join((scope.model, scope.numerics, scope.edit)).encode() + sequence, digest_size=16
    ).digest()


@lru_cache(maxsize=65536)
def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _site(site: str | Site) -> Site:
    return Site(site) if isinstance(site, str) else site


def _key(edit: Intervention) -> str:
    if not isinstance(edit, Intervention):
        raise UserError(f"{edit!r} has no key, so its activations cannot be stored; use workbench.interventions.")
    return edit.key
