"""What steering does to texts: written for many prompts in many ways at once, and judged.

    plain      share of texts that are identified as the target language
    strict     share that are identified so, pure in script and sentences, not repetitive, and more like the text that
               the model writes on the same prompt unsteered than like those on other prompts
    fidelity   (similarity to the unsteered text - floor) / (ceiling - floor): the floor is that to texts on other
               prompts, the ceiling that of two unsteered texts on the same prompt
    score      harmonic mean of plain and fidelity (as CLaS-Bench's)
    bits       of the new text per byte of it, under the model without steering: how odd it finds it; of the first 50

Sampling is from each prompt's own seed, so that every way to steer meets the same chance.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saes.steering import languages
from saes.steering.steer import Plan, steer
from workbench import texts
from workbench.models import LanguageModel
from workbench.progress import track

PROMPTS = texts.PARALLEL.with_name("prompts.jsonl")
ROWS = 192  # texts that are written at once
READ = 50  # texts whose bits are counted: reading one costs the model as much as writing it


def prompts(split: Literal["validation", "test"]) -> list[str]:
    """Beginnings of English texts, of which those of the test are not looked at before."""
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    return [row["text"] for row in rows if row["split"] == split]


@dataclass(frozen=True)
class Written:
    """New texts on the same prompts: tokens and text of each, and at how many positions it was steered."""

    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    applied: tuple[int, ...]


def write(
    model: LanguageModel,
    given: Sequence[str],
    plans: Sequence[Plan],
    steps: int,
    *,
    temperature: float = 0.5,
    seed: int | Sequence[int] = 0,
) -> list[Written]:
    """A text for every plan and prompt. Prompts of one length and all plans run together.

    seed  of all plans, or one for each

    Raises UserError for an empty prompt.
    """
    sequences = [model.tokenize(text) for text in given]
    chances = [seed] * len(plans) if isinstance(seed, int) else seed
    found: dict[tuple[int, int], tuple[str, tuple[int, ...], int]] = {}
    chunks = []
    for length in sorted({len(one) for one in sequences}):
        cells = [(p, i) for p in range(len(plans)) for i, one in enumerate(sequences) if len(one) == length]
        chunks += [cells[start : start + ROWS] for start in range(0, len(cells), ROWS)]
    for some in track(chunks, "texts"):
        made = steer(
            model, torch.stack([sequences[i] for _, i in some]), steps, [plans[p] for p, _ in some],
            temperature=temperature, seeds=[chances[p] * 100_003 + i for p, i in some],
        )  # fmt: skip
        for cell, text, row, applied in zip(some, made.texts, made.generated.tokens, made.applied, strict=True):
            found[cell] = (text, _until(row.tolist(), model.end_tokens), applied)
    every = range(len(given))
    return [Written(tuple(given), *zip(*(found[p, i] for i in every), strict=True)) for p in range(len(plans))]


def _until(tokens: list[int], ends: tuple[int, ...]) -> tuple[int, ...]:
    """Without the end of the text and what comes after it."""
    return tuple(takewhile(lambda token: token not in ends, tokens))


@dataclass(frozen=True)
class Verdict:
    """How texts stand, with 95 % intervals of the shares; see above. None where it was not measured."""

    n: int
    plain: float
    plain_interval: tuple[float, float]
    clean: float
    repetition: float
    labels: dict[str, int]
    strict: float | None = None
    strict_interval: tuple[float, float] | None = None
    similarity: float | None = None
    floor: float | None = None
    fidelity: float | None = None
    to_prompt: float | None = None
    score: float | None = None
    bits: float | None = None

    def summary(self) -> dict[str, Any]:
        def short(value: Any) -> Any:
            if isinstance(value, float):
                return round(value, 3)
            return [round(x, 3) for x in value] if isinstance(value, tuple) else value

        return {name: short(value) for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Unsteered:
    """What the model writes by itself on the same prompts: the texts steered ones are compared with, and another sample
    of them, by which the ceiling is measured.

    encoder  of the sentences that are compared, see `languages.embed`
    """

    written: Written
    again: Written
    encoder: str = "e5"

    @classmethod
    def of(
        cls, model: LanguageModel, given: Sequence[str], steps: int, *, temperature: float = 0.5, seed: int = 0,
        encoder: str = "e5",
    ) -> Unsteered:  # fmt: skip
        first, second = write(model, given, [None, None], steps, temperature=temperature, seed=(seed, seed + 1))
        return cls(first, second, encoder)

    def ceiling(self) -> tuple[float, float]:
        """Mean similarity of two texts on one prompt, and on different ones."""
        own, floor = languages.similarity(self.again.texts, self.written.texts, self.encoder)
        return float(own.mean()), float(floor.mean())


def glance(written: Written, target: str) -> Verdict:
    """What the texts alone tell: identification, script, sentences and repetition; quick."""
    labels = [languages.identify(text)[0] for text in written.texts]
    n, hits = len(labels), sum(label == target for label in labels)
    pairs = list(zip(written.texts, written.tokens, strict=True))
    clean = sum(languages.is_in(text, target, tokens) for text, tokens in pairs) / n
    repeated = sum(languages.repetition(tokens) for tokens in written.tokens) / n
    counts = {label or "none": labels.count(label) for label in sorted(set(labels), key=lambda one: -labels.count(one))}
    return Verdict(n, hits / n, languages.wilson(hits, n), clean, repeated, counts)


def judge(written: Written, target: str, beside: Unsteered, model: LanguageModel | None = None) -> Verdict:
    """Everything. model: also how odd the model itself finds the texts."""
    seen = glance(written, target)
    own, floor = languages.similarity(written.texts, beside.written.texts, beside.encoder)
    ceiling, apart = beside.ceiling()
    rows = zip(written.texts, written.tokens, (own > floor).tolist(), strict=True)
    strict = sum(alike and languages.is_in(text, target, tokens) for text, tokens, alike in rows)
    low = float(floor.mean())
    fidelity = min(1.0, max(0.0, (float(own.mean()) - low) / max(1e-6, ceiling - apart)))
    to_prompt, _ = languages.similarity(written.texts, written.prompts, beside.encoder)
    return Verdict(
        **{name: getattr(seen, name) for name in ("n", "plain", "plain_interval", "clean", "repetition", "labels")},
        strict=strict / seen.n, strict_interval=languages.wilson(strict, seen.n), similarity=float(own.mean()),
        floor=low, fidelity=fidelity, to_prompt=float(to_prompt.mean()), score=languages.harmonic(seen.plain, fidelity),
        bits=None if model is None else bits(model, written),
    )  # fmt: skip


def bits(model: LanguageModel, written: Written) -> float:
    """Of the first texts together, per byte, by the model unsteered."""
    total, size = 0.0, 0
    for prompt, tokens, text in list(zip(written.prompts, written.tokens, written.texts, strict=True))[:READ]:
        if text:
            start = model.tokenize(prompt)
            whole = torch.cat([start, torch.tensor(tokens)])
            logits = model.run(whole[None]).logits
            assert logits is not None
            total += float(_surprise(logits[0, len(start) - 1 : -1], whole[len(start) :].to(logits.device)))
            size += len(text.encode())
    return total / math.log(2) / size if size else math.nan


def _surprise(logits: Float[Tensor, "pos vocab"], tokens: Tensor) -> Float[Tensor, ""]:
    """In nats."""
    return -logits.float().log_softmax(-1).gather(-1, tokens[:, None]).sum()
