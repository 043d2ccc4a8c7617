"""`wb run steer`: what a model writes on a prompt when a latent is steered, at several strengths, beside what it writes
by itself.

All rows of a sample have the same chance: whatever differs is the steering. Each text is then read by the model as it
is, unsteered, which tells how odd it finds every token, and how active the latent is on text that it helped to write.

Strength 1 is a `unit`. For `language-steering` that is the difference of the latent's means between two languages. Here
there are no two languages: it is the latent's mean where it is active, what one token that it fires on has of it, over
everyday sentences in nine languages that come along (what `fit` looks at, and more of it), or whatever is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saes.latents import one_of, pieces, rows
from saes.pretrained import fit, load
from saes.sae import SAE
from saes.steering.languages import identify
from saes.steering.steer import Kind, Plan, Scope, Steering, positions, steer
from saes.try_on import check_text
from workbench import texts
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.progress import track
from workbench.registry import Prose, analysis

MOST = 16  # strengths, and samples
ROWS = 32  # that are written together
MEASURED, LENGTH = 8192, 16  # tokens, for the unit, and of a sequence: most sentences are short
READ = 2**24  # logits at a time
LETTERS, SURE = 20, 0.5  # from which a text is said to be in a language
# What strength and unit are to each kind.
MEANING = {
    "add": "strength x unit of the latent's decoder row is added",
    "clamp": "the latent is set to strength x unit",
    "scale": "the latent is multiplied by the strength",
    "ablate": "the latent is set to 0, whatever the strength",
    "project-out": "strength times what lies along the latent's decoder row is taken away",
    "replace": "the SAE's reconstruction, with the latent at strength x unit, takes the place of what is there",
    "swap": "the latent's value times the strength goes to the other latent",
}
IN_UNITS = ("add", "clamp", "replace")


@dataclass(frozen=True)
class Row:
    """One text.

    strength  None: unsteered
    tokens    what each adds to the text; values: of the latent at each, and logprobs: of each, in
              nats, as the unsteered model reads prompt and text
    applied   at how many positions it was steered; due: of how many
    language  that the text is in, as far as that can be told
    """

    strength: float | None
    sample: int
    text: str
    tokens: tuple[str, ...]
    values: tuple[float, ...]
    logprobs: tuple[float, ...]
    applied: int
    due: int
    language: str

    @property
    def bits(self) -> float:
        """Mean surprise of a token; not a number without any."""
        return -sum(self.logprobs) / len(self.logprobs) / math.log(2) if self.logprobs else math.nan

    @property
    def value(self) -> float:
        """Mean of the latent; not a number without tokens."""
        return sum(self.values) / len(self.values) if self.values else math.nan


@dataclass(frozen=True)
class Played:
    """Texts of a prompt: of each sample the unsteered one, and then one for each strength."""

    hook: str
    latent: int
    unit: float
    prompt: str
    rows: tuple[Row, ...]
    definition: str

    @property
    def strengths(self) -> list[float]:
        return list(dict.fromkeys(row.strength for row in self.rows if row.strength is not None))

    def at(self, strength: float | None) -> list[Row]:
        """One row for each sample."""
        return [row for row in self.rows if row.strength == strength]

    def summary(self) -> dict[str, Any]:
        return {
            "hook": self.hook,
            "latent": self.latent,
            "unit": self.unit,
            "texts": [
                {
                    "strength": row.strength, "sample": row.sample, "text": row.text,
                    "applied": f"{row.applied}/{row.due}", "bits": _short(row.bits), "value": _short(row.value),
                    "language": row.language,
                }
                for row in self.rows
            ],
            "definition": self.definition,
        }  # fmt: skip


def _short(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


@analysis("steer", model="smollm2-135m")
def steer_with(
    model: LanguageModel,
    store: ActivationStore,
    seed: int,
    *,
    sae: str = "smollm2-135m",
    hook: str = "",
    latent: int = 702,
    prompt: Prose = "I think that",
    strengths: str = "0,0.5,1,2,4",
    unit: float | None = None,
    kind: Kind = "add",
    other: int | None = None,
    scope: Scope = "all",
    decay: float = 1.0,
    steps: int = 40,
    temperature: float = 0.5,
    samples: int = 1,
) -> Played:
    """What a model writes on a prompt when a latent is steered, at several strengths, beside what it writes by itself.

    sae          a name, a run or a folder
    hook         which of its SAEs, if there are several
    latent       by number
    prompt       one's own
    strengths    in units, separated by commas
    unit         what strength 1 is; none: the latent's mean where it is active, over everyday sentences
    kind         what is done at each position
    other        latent that swap gives the value to
    scope        positions: all, those of the prompt, the new ones, or the last of each pass; never the first
    decay        what is left of the strength from one new token to the next
    steps        new tokens
    temperature  of sampling; 0: always the likeliest token
    samples      texts of each strength, each by a chance of its own
    """
    check_text(prompt, "prompt")
    wanted = strengths_of(strengths)
    if not 1 <= samples <= MOST:
        raise UserError(f"samples={samples} cannot be written; give 1 to {MOST}.")
    chosen = one_of(load(sae), hook, sae)
    if chosen.transcoder:
        raise UserError(f"{sae} at {chosen.hook} is a transcoder, which does not write where it reads; give an SAE.")
    chosen.direction(latent)
    if other is not None:
        chosen.direction(other)
    if unit is not None and not math.isfinite(unit):
        raise UserError(f"unit={unit} is no amount; give a number, or none.")
    fit(model, store, chosen)
    chosen = chosen.to(model.device)
    tokens = model.tokenize(prompt)
    if scope == "prompt" and len(tokens) == 1:
        raise UserError("the prompt is a single token, and the first position is never steered; write more.")
    how = "given"
    if unit is None and kind in IN_UNITS:
        unit, how = mean_active(model, store, chosen, latent), "its mean where it is active on everyday sentences"
    one = Steering(
        chosen.hook, 1.0, kind, sae=chosen, latent=latent, other=other, unit=1.0 if unit is None else unit,
        scope=scope, decay=decay,
    )  # fmt: skip
    found = write(model, one, tokens, wanted, steps, temperature, samples, seed)
    amount = f"; unit {one.unit:.4g}, {how}" if kind in IN_UNITS else ""
    return Played(
        chosen.hook, latent, one.unit, prompt, tuple(found),
        f"{MEANING[kind]}, at {chosen.hook}, latent {latent}{amount}; positions: {scope}"
        f"{'' if decay == 1 else f', decaying by {decay:g} from token to token'}; {steps} new tokens at temperature "
        f"{temperature:g}, by the same chance at every strength; bits and values of the latent: as the model reads the "
        "texts unsteered",
    )  # fmt: skip


def write(
    model: LanguageModel,
    one: Steering,
    prompt: Int[Tensor, " pos"],
    strengths: Sequence[float],
    steps: int,
    temperature: float,
    samples: int,
    seed: int,
) -> list[Row]:
    """The rows of a way to steer, unsteered ones first in each sample."""
    asked: list[tuple[int, float | None]] = [(i, s) for i in range(samples) for s in (None, *strengths)]
    found: list[Row] = []
    for some in track([asked[at : at + ROWS] for at in range(0, len(asked), ROWS)], "texts"):
        plan: list[Plan] = [None if strength is None else one.at(strength) for _, strength in some]
        seeds = [seed * 100_003 + sample for sample, _ in some]
        made = steer(model, prompt.expand(len(some), -1), steps, plan, temperature=temperature, seeds=seeds)
        due = positions(one.scope, len(prompt), made.steps)
        new = made.generated.tokens
        values, logprobs = read(model, one, prompt, new[:, : made.steps])
        for i, (sample, strength) in enumerate(some):
            ids = list(takewhile(lambda token: token not in model.end_tokens, new[i].tolist()))
            text, n = made.texts[i], len(ids)
            found.append(
                Row(
                    strength, sample, text, tuple(pieces(model, ids)), tuple(values[i, :n].tolist()),
                    tuple(logprobs[i, :n].tolist()), made.applied[i], 0 if strength is None else due, language_of(text),
                )
            )  # fmt: skip
    return found


def read(
    model: LanguageModel, one: Steering, prompt: Int[Tensor, " pos"], new: Int[Tensor, "row step"]
) -> tuple[Tensor, Tensor]:
    """The latent at each new token, and the token's log-probability, unsteered [row, step]."""
    assert one.sae is not None and one.latent is not None
    whole = torch.cat([prompt.expand(len(new), -1), new], 1)
    values, logprobs = [], []
    for part in whole.split(max(1, READ // (whole.shape[1] * model.config.d_vocab))):
        seen = model.run(part, capture=[one.hook])
        assert seen.logits is not None
        before = seen.logits[:, len(prompt) - 1 : -1].float().log_softmax(-1)
        drawn = part[:, len(prompt) :]
        logprobs.append(before.gather(-1, drawn[..., None].to(before.device))[..., 0].cpu())
        with torch.no_grad():
            encoded = one.sae.encode(seen[one.hook][:, len(prompt) :].to(one.sae.W_enc.device))
        values.append(encoded[..., one.latent].float().cpu())
    return torch.cat(values), torch.cat(logprobs)


def mean_active(model: LanguageModel, store: ActivationStore, sae: SAE, latent: int) -> float:
    """The latent's mean where it is active, over sentences that come along. Raises UserError where it never is."""
    some = texts.sequences(texts.load("parallel"), model, LENGTH)[: MEASURED // LENGTH]
    values = torch.cat([x[..., latent].flatten() for _, x in rows(model, store, sae, some)])
    if not bool((values > 0).any()):
        raise UserError(
            f"latent {latent} is never active on {sum(map(len, some)):,} tokens of everyday sentences; give a unit."
        )
    return float(values[values > 0].mean())


def strengths_of(text: str) -> list[float]:
    """Numbers, each once, in their order. Raises UserError for what is none, and for too many."""
    try:
        found = list(dict.fromkeys(float(word) for word in text.split(",")))
    except ValueError:
        found = []
    if not found or not all(math.isfinite(one) and abs(one) <= 1e6 for one in found):
        raise UserError(f"strengths={text[:80]!r} are no strengths; give numbers, such as 0.5,1,2.")
    if len(found) > MOST:
        raise UserError(f"there are {len(found)} strengths; give at most {MOST}.")
    return found


def language_of(text: str) -> str:
    """The language of a text that is long enough to tell, and told with some certainty; empty for others."""
    if sum(letter.isalpha() for letter in text) < LETTERS:
        return ""
    language, share = identify(text)
    return language if share >= SURE else ""
