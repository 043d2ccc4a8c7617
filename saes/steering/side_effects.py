"""What steering with a latent, or taking it away, does to the model's languages: bits per byte of text that it reads.
A latent that is a language's own changes that language alone when it is ablated (LangFIR 2026 tests it so); one that
every language uses changes them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from saes.evaluate import by_length
from saes.steering.steer import Plan, Steered, Steering
from workbench.models import LanguageModel
from workbench.progress import track

TOKENS = 512  # at once: logits of a large vocabulary are half a gigabyte


@dataclass(frozen=True)
class Bits:
    """Of the tokens of all texts but the first, per byte of the texts."""

    plain: float
    steered: float
    ablated: float


def side_effects(model: LanguageModel, one: Steering, texts: Mapping[str, Sequence[str]]) -> dict[str, Bits]:
    """Of texts in each language: unsteered, steered by a latent as given, and with that latent taken away."""
    without = replace(one, kind="ablate", scope="all")
    return {
        language: Bits(*(bits_of_text(model, some, plan) for plan in (None, one, without)))
        for language, some in track(texts.items(), "side effects")
    }


def bits_of_text(model: LanguageModel, texts: Sequence[str], plan: Plan = None) -> float:
    """Bits per byte of texts that are read, steered. Raises UserError if one of them is empty."""
    total = 0.0
    for rows in by_length([model.tokenize(text) for text in texts], TOKENS):
        steps = plan if isinstance(plan, tuple) else () if plan is None else (plan,)
        edit: Mapping[Any, Callable[[Tensor], Tensor]] = {
            hook: Steered.of([tuple(one for one in steps if one.hook == hook)] * len(rows), rows.shape[1])
            for hook in {one.hook for one in steps}
        }
        logits = model.run(rows, edit=edit).logits
        assert logits is not None
        chance = logits[:, :-1].float().log_softmax(-1)
        total -= float(chance.gather(-1, rows[:, 1:, None].to(logits.device)).double().sum())
    return total / math.log(2) / sum(len(text.encode()) for text in texts)
