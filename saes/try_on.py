"""`wb run try-on`: what latents of an SAE make of one's own text, and which are largest in it.

The first position is read by nobody: there activations are many times larger than anywhere else, and no SAE here was
trained on it. Its values are not numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saes.latents import AT_ONCE, Example, one_of, pieces
from saes.pretrained import fit, load
from saes.sae import SAE
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.registry import Prose, analysis

TOP = 10  # latents that are shown of a text
CHARACTERS = 100_000  # more than any model here reads; a text is refused for it before a tokenizer sees it


@dataclass(frozen=True)
class TryOn:
    """
    tokens   of the text
    asked    latents that were asked for
    top      those that are largest anywhere in the text, the largest first
    latents  all of them, each once: the rows of values
    values   at every token; not a number at the first
    """

    hook: str
    tokens: tuple[str, ...]
    asked: tuple[int, ...]
    top: tuple[int, ...]
    latents: tuple[int, ...]
    values: Float[Tensor, "latent pos"]
    definition: str

    def example(self, latent: int) -> Example:
        """The text as one of the latents sees it, around the token at which it is largest."""
        row = self.values[self.latents.index(latent)]
        return Example(self.tokens, tuple(row.tolist()), 1 + int(row[1:].argmax()))

    def summary(self) -> dict[str, Any]:
        def told(latent: int) -> list[Any]:
            one = self.example(latent)
            return [latent, round(one.value, 4), one.tokens[one.position]]

        return {
            "hook": self.hook,
            "tokens": len(self.tokens),
            "asked": [told(latent) for latent in self.asked],
            "top": [told(latent) for latent in self.top],
            "definition": self.definition,
        }


@analysis("try-on", model="smollm2-135m")
def try_on(
    model: LanguageModel,
    store: ActivationStore,
    *,
    sae: str = "smollm2-135m",
    hook: str = "",
    which: str = "",
    text: Prose = "Le train part demain à huit heures, and the next one leaves at noon.",
) -> TryOn:
    """The values of latents at every token of one's own text, and the latents that are largest in it.

    sae    a name, a run or a folder
    hook   which of its SAEs, if there are several
    which  latents by number, separated by commas; beside them the ten largest are always shown
    text   one's own
    """
    check_text(text)
    chosen = one_of(load(sae), hook, sae)
    asked = numbers(which)
    for latent in asked:
        chosen.direction(latent)
    fit(model, store, chosen)
    tokens = model.tokenize(text)
    if len(tokens) > model.config.n_ctx:
        raise UserError(f"the text has {len(tokens)} tokens, and {model.name} reads {model.config.n_ctx}; shorten it.")
    if len(tokens) < 2:
        raise UserError("the text is a single token, and the first position of a text is not read; write more.")
    x = model.run(tokens[None], capture=[chosen.hook], logits="none")[chosen.hook][0, 1:]
    top = largest(chosen, x)
    latents = list(dict.fromkeys([*asked, *top]))
    values = torch.cat([torch.full((1, len(latents)), math.nan), columns(chosen, x, latents)]).T.contiguous()
    return TryOn(
        chosen.hook, tuple(pieces(model, tokens.tolist())), tuple(asked), tuple(top), tuple(latents), values,
        f"value of a latent at {chosen.hook} at each token of the text but the first; the largest: the {TOP} with the "
        "largest value at any token",
    )  # fmt: skip


def largest(sae: SAE, x: Float[Tensor, "pos d"]) -> list[int]:
    """The latents with the largest values at any of these positions, without those that are never active."""
    most = torch.stack([part.amax(0) for part in _encoded(sae, x)]).amax(0)
    best = most.topk(min(TOP, len(most)))
    return [latent for latent, value in zip(best.indices.tolist(), best.values.tolist(), strict=True) if value > 0]


def columns(sae: SAE, x: Float[Tensor, "pos d"], latents: list[int]) -> Float[Tensor, "pos latent"]:
    return torch.cat([part[:, latents] for part in _encoded(sae, x)]).float().cpu()


def _encoded(sae: SAE, x: Float[Tensor, "pos d"]) -> Iterator[Float[Tensor, "_ latent"]]:
    for part in x.to(sae.W_enc.device).split(max(1, AT_ONCE // sae.n_latents)):
        with torch.no_grad():
            encoded = sae.encode(part)
        yield encoded


def numbers(which: str) -> list[int]:
    """Latents by number, each once. Raises UserError for what names none."""
    words = [word.strip() for word in which.split(",")] if which.strip() else []
    for word in words:
        if not re.fullmatch(r"[0-9]{1,9}", word):
            raise UserError(f"which={which[:80]!r} names no latents; give numbers, such as 12,345.")
    return list(dict.fromkeys(map(int, words)))


def check_text(text: str, what: str = "text") -> None:
    """Raises UserError for a text that is empty, or longer than any model reads."""
    if not text.strip():
        raise UserError(f"there is no {what}; write some.")
    if len(text) > CHARACTERS:
        raise UserError(f"the {what} has {len(text):,} characters; give at most {CHARACTERS:,}.")
