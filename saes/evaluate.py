"""How good an SAE is: on rows of activations, and put in their place in the model."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from saes.sae import SAE
from workbench.activations import ActivationStore, capture
from workbench.errors import UserError
from workbench.models import LanguageModel

AT_ONCE = 2**28  # logits
READ = 4096  # tokens, about, that the losses are of: each takes a pass of the whole model


@dataclass(frozen=True)
class Quality:
    """
    rows       activations that the rest is about; the first position of every sequence is left out
    l0         active latents of a row, on average
    fvu        squared error of the reconstruction / squared distance from the mean; 1 for a constant
    dead       share of latents that were active on no row
    common     share of latents that were active on more than a tenth of the rows
    loss       of the model on the text, in nats per token; this and the rest on the first 4,096 tokens
    spliced    the same with the reconstruction in place of the activations, but at the first position
    without    the same with zeros in place of them
    recovered  (without - spliced) / (without - loss)
    """

    rows: int
    l0: float
    fvu: float
    dead: float
    common: float
    loss: float
    spliced: float
    without: float
    recovered: float

    def summary(self) -> dict[str, Any]:
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}


@torch.no_grad()
def quality(
    model: LanguageModel,
    store: ActivationStore,
    sae: SAE,
    sequences: Sequence[Int[Tensor, "_"]],
    hook: str | None = None,
    loss: float | None = None,
) -> Quality:
    """Of an SAE or a transcoder, on some text. The output of a transcoder takes the place of what it is to write.

    loss  of the model on that text, where it is known (`plain_loss`)

    Raises UserError if the SAE does not fit the model.
    """
    hook = hook or sae.hook
    out = sae.hook_out if sae.transcoder else hook
    check_fit(model, sae, hook)
    found = store.get(model, sequences, list(dict.fromkeys([hook, out])))
    x, y = (torch.cat([row[1:] for row in found[name]]).to(sae.W_enc.device) for name in (hook, out))
    fired, active, error = torch.zeros(sae.n_latents, device=x.device), 0, 0.0
    for part, target in zip(x.split(4096), y.split(4096), strict=True):
        latents = sae.encode(part)
        fired += (latents != 0).sum(0)
        active += int((latents != 0).sum())
        error += float((sae.decode(latents) - target).double().square().sum())
    distance = float((y.double() - y.double().mean(0)).square().sum())

    def splice(given: Tensor) -> Tensor:
        # The SAE of what the hook point has; a transcoder reads elsewhere, so its output is made beforehand.
        return torch.cat([given[:, :1], sae.decode(sae.encode(given[:, 1:])).to(given)], 1)

    def zero(given: Tensor) -> Tensor:
        return torch.cat([given[:, :1], torch.zeros_like(given[:, 1:])], 1)

    read = _first(sequences)
    plain = text_loss(model, read) if loss is None else loss
    without = text_loss(model, read, {out: zero})
    spliced = _transcoded(model, sae, hook, out, read) if sae.transcoder else text_loss(model, read, {hook: splice})
    return Quality(
        len(x), active / len(x), error / distance, float((fired == 0).double().mean()),
        float((fired > len(x) / 10).double().mean()), plain, spliced, without, (without - spliced) / (without - plain),
    )  # fmt: skip


def plain_loss(model: LanguageModel, sequences: Sequence[Int[Tensor, "_"]]) -> float:
    """Of the model itself on the part of a text on which `quality` takes losses."""
    return text_loss(model, _first(sequences))


def _first(sequences: Sequence[Int[Tensor, "_"]]) -> Sequence[Int[Tensor, "_"]]:
    ends = list(accumulate(len(one) for one in sequences))
    return sequences[: bisect_left(ends, READ) + 1]


def check_fit(model: LanguageModel, sae: SAE, hook: str) -> None:
    """Raises UserError, in one sentence, if the SAE is of another hook point or width than the model has."""
    if hook not in model.hook_points:
        raise UserError(f"the SAE reads at {hook}, and {model.name} has no such hook point; load the model it is of.")
    width = capture.shape_at(hook, model.config, 1)[-1]
    if len(sae.W_enc) != width:
        named = sae.about.get("model_name")
        raise UserError(
            f"the SAE is {len(sae.W_enc)} wide, and {hook} of {model.name} is {width}; "
            + (f"it is of {named}." if named else "load the model it is of.")
        )


def text_loss(model: LanguageModel, sequences: Sequence[Int[Tensor, "_"]], edit: Any = None) -> float:
    """Cross-entropy in nats per token of the tokens from the third on: the first position is nobody's business here."""
    total, count = 0.0, 0
    for rows in by_length(sequences, AT_ONCE // model.config.d_vocab):
        logits = model.run(rows, edit=edit or {}).logits
        assert logits is not None
        losses = F.cross_entropy(logits[:, 1:-1].flatten(0, 1).float(), rows[:, 2:].flatten().to(logits.device))
        total += float(losses) * rows[:, 2:].numel()
        count += rows[:, 2:].numel()
    return total / count


def by_length(sequences: Sequence[Int[Tensor, "_"]], tokens: int) -> list[Int[Tensor, "_ _"]]:
    """Sequences of one length together, about so many tokens at a time."""
    lengths = sorted({len(one) for one in sequences})
    groups = [torch.stack([one for one in sequences if len(one) == length]) for length in lengths]
    return [rows for group in groups for rows in group.split(max(1, tokens // group.shape[1]))]


def _transcoded(model: LanguageModel, sae: SAE, hook: str, out: str, sequences: Sequence[Int[Tensor, "_"]]) -> float:
    seen: dict[str, Tensor] = {}

    def read(given: Tensor) -> Tensor:
        seen["x"] = given
        return given

    def write(given: Tensor) -> Tensor:
        return torch.cat([given[:, :1], sae.decode(sae.encode(seen["x"][:, 1:])).to(given)], 1)

    return text_loss(model, sequences, {hook: read, out: write})
