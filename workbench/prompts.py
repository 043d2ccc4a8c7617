"""Tasks: distributions over pairs of prompts, and batches drawn from them.

A task is a function from a random generator to one `Prompt`: a clean text, a corrupted one, and what the model should
and should not say next. Sampling, seeding, tokenising and checking happen here, once for all tasks: clean and
corrupted have equally many tokens, and each answer continues the prompt as one token. A prompt that fails is drawn
again, and how many were drawn is reported with every run.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import UserError
from workbench.metrics import METRICS
from workbench.models import LanguageModel


@dataclass(frozen=True)
class Prompt:
    """One example. The corrupted text is a minimal change after which the task's rule no longer gives the answer.

    `answers` and `wrong` are continuations of the clean text, with their leading space. With several of each, a
    tokenizer that splits them (digits) is met halfway: their first tokens count, without those both sides share.

    With `whole`, `answers` and `wrong` are one each: the rest of the clean text's line, and of the corrupted one's.
    Texts are tokenised with the rest and cut before the first token in which the rests differ.
    """

    clean: str
    corrupted: str
    answers: tuple[str, ...]
    wrong: tuple[str, ...]
    whole: bool = False


@dataclass(frozen=True)
class Task:
    name: str
    version: int
    metric: str
    draw: Callable[[random.Random], Prompt]
    about: str


@dataclass(frozen=True)
class Batch:
    """n prompts of one task, tokenised. Sequences differ in length; `buckets()` groups equal ones."""

    task: Task
    prompts: tuple[Prompt, ...]
    clean: tuple[Int[Tensor, "_"], ...]
    corrupted: tuple[Int[Tensor, "_"], ...]
    answers: tuple[Int[Tensor, "_"], ...]
    wrong: tuple[Int[Tensor, "_"], ...]
    drawn: int

    def __len__(self) -> int:
        return len(self.prompts)

    def buckets(self) -> list[Int[Tensor, " index"]]:
        """Indices of prompts of equal length, shortest first."""
        groups: dict[int, list[int]] = {}
        for i, tokens in enumerate(self.clean):
            groups.setdefault(len(tokens), []).append(i)
        return [torch.tensor(groups[length]) for length in sorted(groups)]

    def parts(
        self, n: int | None = None, *, tokens: int | None = None
    ) -> Iterator[tuple[Int[Tensor, " index"], Batch]]:
        """At most n prompts, or so many tokens, of one length at a time, with their indices: what one pass can hold."""
        for bucket in self.buckets():
            at_once = n or len(bucket)
            if tokens is not None:
                at_once = max(1, min(at_once, tokens // len(self.clean[int(bucket[0])])))
            for part in bucket.split(at_once):
                yield part, self.select(part.tolist())

    def select(self, indices: Iterable[int]) -> Batch:
        """The same batch with only some prompts."""
        keep = [int(i) for i in indices]
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in keep),
            clean=tuple(self.clean[i] for i in keep),
            corrupted=tuple(self.corrupted[i] for i in keep),
            answers=tuple(self.answers[i] for i in keep),
            wrong=tuple(self.wrong[i] for i in keep),
        )

    def score(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
        """The task's metric per prompt, from the logits at the last position."""
        return METRICS[self.task.metric](logits.float(), self.answers, self.wrong)


def sample(task: Task, model: LanguageModel, n: int, seed: int) -> Batch:
    """Draw n different prompts that pass the checks under the model's tokenizer; the same for the same seed.

    Raises UserError when too few pass, with the commonest reason.
    """
    if n < 1:
        raise UserError(f"n={n} prompts cannot be drawn; ask for at least 1.")
    rng = random.Random(f"{task.name}/{task.version}/{seed}")
    rows: list[tuple[Prompt, Tensor, Tensor, Tensor, Tensor]] = []
    seen: set[str] = set()
    reasons: Counter[str] = Counter()
    drawn = 0
    while len(rows) < n:
        if drawn >= 200 + 50 * n:
            raise UserError(
                f"only {len(rows)} of {n} {task.name} prompts pass under {model.name}'s tokenizer; "
                f"most often: {reasons.most_common(1)[0][0]}. Ask for fewer with --n."
            )
        drawn += 1
        prompt = task.draw(rng)
        try:
            row = _tokenise(prompt, model)
        except UserError as reason:
            reasons[str(reason)] += 1
            continue
        if prompt.clean in seen:
            reasons["the same prompt was drawn before"] += 1
            continue
        seen.add(prompt.clean)
        rows.append((prompt, *row))
    prompts, clean, corrupted, answers, wrong = zip(*rows, strict=True)
    return Batch(task, prompts, clean, corrupted, answers, wrong, drawn)


def split(task: Task, which: Literal["train", "test"]) -> Task:
    """The task with its train or its test prompts alone: no text of one is a text of the other, whatever the seed.

    A text's digest says where it belongs, to test one in four; pairs whose two texts belong to different parts are
    drawn again.
    """

    def belongs(text: str) -> bool:
        # Not a CRC: it is linear, and two texts with the same difference never agree.
        return (hashlib.sha256(text.encode()).digest()[0] < 64) == (which == "test")

    def draw(rng: random.Random) -> Prompt:
        for _ in range(1000):
            prompt = task.draw(rng)
            if belongs(prompt.clean) and belongs(prompt.corrupted):
                return prompt
        raise UserError(f"{task.name} has too few prompts for a {which} part; use the whole task.")

    return replace(task, name=f"{task.name}-{which}", draw=draw, about=f"{task.about} ({which} prompts)")


def nonsense(task: Task) -> Task:
    """The task with labels that a coin decides: what finds a circuit here finds one anywhere.

    Half of the prompts have right and wrong answers exchanged; nothing in a prompt tells which.
    """

    def draw(rng: random.Random) -> Prompt:
        prompt = task.draw(rng)
        return replace(prompt, answers=prompt.wrong, wrong=prompt.answers) if rng.random() < 0.5 else prompt

    return replace(task, name=f"{task.name}-nonsense", draw=draw, about=f"{task.about} (labels by a coin)")


def _tokenise(prompt: Prompt, model: LanguageModel) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if prompt.whole:
        return _cut(prompt, model)
    clean, corrupted = model.tokenize(prompt.clean), model.tokenize(prompt.corrupted)
    if len(clean) != len(corrupted):
        raise UserError("clean and corrupted prompts have different numbers of tokens")
    if torch.equal(clean, corrupted):
        raise UserError("clean and corrupted prompts are the same tokens")
    single = len(prompt.answers) == len(prompt.wrong) == 1
    right = _first_tokens(prompt.clean, clean, prompt.answers, model, single)
    wrong = _first_tokens(prompt.clean, clean, prompt.wrong, model, single)
    right, wrong = right - wrong, wrong - right
    if not right or not wrong:
        raise UserError("no token continues the prompt with a right answer alone, or none with a wrong one alone")
    return clean, corrupted, torch.tensor(sorted(right)), torch.tensor(sorted(wrong))


def _cut(prompt: Prompt, model: LanguageModel) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both lines to their ends, cut where the rests first differ.

    A tokenizer may merge over the end of the prompt (`)` and a line's end): the cut is then before what it merges. The
    rests may begin alike (`]` and `]]`): the cut is then behind what they share.
    """
    texts, rests = (prompt.clean, prompt.corrupted), (prompt.answers[0], prompt.wrong[0])
    alone = [model.tokenize(text) for text in texts]
    lines = [model.tokenize(text + rest) for text, rest in zip(texts, rests, strict=True)]
    if len(alone[0]) != len(alone[1]):
        raise UserError("clean and corrupted prompts have different numbers of tokens")
    at = min(_shared(text, line) for text, line in zip(alone, lines, strict=True))
    if not torch.equal(alone[0][at:], alone[1][at:]):
        raise UserError("the answers merge with ends of the prompts that differ")
    at += _shared(lines[0][at:], lines[1][at:])
    if at >= min(map(len, lines)):
        raise UserError("the rest of one line is the beginning of the other's")
    clean, corrupted = (line[:at] for line in lines)
    if torch.equal(clean, corrupted):
        raise UserError("clean and corrupted prompts are the same tokens")
    return clean, corrupted, lines[0][at : at + 1], lines[1][at : at + 1]


def _shared(one: Int[Tensor, "_"], other: Int[Tensor, "_"]) -> int:
    """How many tokens two sequences have in common at the beginning."""
    n = min(len(one), len(other))
    return int((one[:n] == other[:n]).long().cumprod(0).sum())


def _first_tokens(text: str, tokens: Tensor, answers: tuple[str, ...], model: LanguageModel, single: bool) -> set[int]:
    """Tokens that may come next. Of several answers, one that merges with the prompt ("17" + "00") is no next token."""
    found = set()
    for answer in answers:
        try:
            found.add(_next_token(text, tokens, answer, model, single))
        except UserError:
            if single:
                raise
    return found


def _next_token(text: str, tokens: Tensor, answer: str, model: LanguageModel, single: bool) -> int:
    """The token that follows the prompt when the answer does; checked in place, as tokenizers merge over boundaries."""
    whole = model.tokenize(text + answer)
    n = len(tokens)
    if len(whole) <= n or not torch.equal(whole[:n], tokens):
        raise UserError("an answer changes how the end of the prompt is tokenised")
    if single and len(whole) != n + 1:
        raise UserError("an answer is more than one token")
    return int(whole[n])
