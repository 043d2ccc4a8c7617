"""What a model writes on, token by token, with edits in force at every one.

Keys and values of earlier tokens are kept, so that each step computes one position; an edit sees the prompt once, as
[batch, pos, ...], and then every token as [batch, 1, ...] when it is read. Rows are prompts of one length: nothing is
padded, and a row's text does not depend on what else is in the batch. Chance is one uniform number for each row and
step, from the row's own seed: the same seed with another edit is the same chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench import backend, passes
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.passes import Edit
from workbench.sites import Site


@dataclass(frozen=True)
class Generated:
    """
    tokens  [batch, step], of the new text alone; where a row has ended, its end token goes on
    texts   the new text of each row, up to its end
    passes  forward passes made: one for the prompt, and one for every new token but the last
    calls   how often each edit was called
    """

    tokens: Int[Tensor, "batch step"]
    texts: tuple[str, ...]
    passes: int
    calls: dict[str, int]


def generate(
    model: LanguageModel,
    tokens: Int[Tensor, "batch pos"],
    steps: int,
    *,
    edit: Mapping[str | Site, Edit] | None = None,
    temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
    cache: bool = True,
) -> Generated:
    """So many new tokens after each prompt.

    temperature  0: always the likeliest
    seeds        of each row, where there is chance; None: 0, 1, 2, ...
    cache        keep keys and values, if the model can; False reads everything again at every step, and gives the
                 same to rounding

    Raises UserError for tokens that do not fit, steps or temperatures that are none, and edits that change a shape.
    """
    passes.check_tokens(model, tokens)
    rows, start = tokens.shape
    if steps < 1:
        raise UserError(f"steps={steps} writes nothing; give at least 1.")
    if start + steps > model.config.n_ctx:
        raise UserError(
            f"{start} tokens and {steps} new ones are more than the {model.config.n_ctx} that {model.name} reads."
        )
    if temperature < 0:
        raise UserError(f"temperature={temperature:g} is below 0; give 0 for the likeliest token, or more for chance.")
    seeds = list(range(rows)) if seeds is None else list(seeds)
    if len(seeds) != rows:
        raise UserError(f"there are {rows} rows and {len(seeds)} seeds; give one for each.")
    chance = torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    calls: dict[str, int] = {}
    edits = {Site(key) if isinstance(key, str) else key: _counted(key, fn, calls) for key, fn in (edit or {}).items()}
    new: list[Tensor] = []
    ended = torch.zeros(rows, dtype=torch.bool, device=model.device)
    ends = torch.tensor(model.end_tokens, device=model.device)
    prompt = tokens.to(model.device)
    kept = backend.new_cache(model._module) if cache else None
    with model.editing(edits) as next_logits:
        for step in range(steps):
            read = new[-1] if new and kept is not None else torch.cat([prompt, *new], 1)
            logits = next_logits(read, kept)
            following = _drawn(logits, temperature, chance[:, step].to(model.device))
            following = torch.where(ended, new[-1][:, 0], following) if new else following
            ended = ended | torch.isin(following, ends)
            new.append(following[:, None])
            if bool(ended.all()):
                break
    found = torch.cat(new, 1)
    found = torch.cat([found, found[:, -1:].expand(-1, steps - found.shape[1])], 1).cpu()
    return Generated(found, tuple(_text(model, row, ends.cpu()) for row in found), len(new), calls)


def _counted(key: str | Site, fn: Edit, calls: dict[str, int]) -> Edit:
    name = key if isinstance(key, str) else key.hook
    calls.setdefault(name, 0)

    def call(x: Tensor) -> Tensor:
        calls[name] += 1
        return fn(x)

    return call


def _drawn(
    logits: Float[Tensor, "batch vocab"], temperature: float, chance: Float[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    if temperature == 0:
        return logits.argmax(-1)
    total = (logits.float() / temperature).softmax(-1).cumsum(-1, dtype=torch.float32)
    # Rounding may leave the last sum below 1: then it is the last token that has any probability.
    return torch.searchsorted(total, (chance * total[:, -1])[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _text(model: LanguageModel, row: Int[Tensor, " step"], ends: Int[Tensor, " _"]) -> str:
    over = torch.isin(row, ends).nonzero()[:, 0]
    kept = row[: int(over[0])] if len(over) else row
    text: str = model.tokenizer.decode(kept.tolist())
    return text
