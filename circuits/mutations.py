"""Mutations: a task with other words in it, to see what its circuit is about.

Lieberum et al. 2023, section 5: does a head that finds the letter of an answer know letters, or places in a list? The
candidate answers of a prompt are replaced, and nothing else; what still works does not depend on the words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.prompts import Prompt, Task
from workbench.tasks.induction import WORDS

MUTATIONS = ("others", "words", "letters", "numbers")
DRAWN = 300  # prompts that tell which answers there are


@lru_cache(maxsize=32)
def vocabulary(task: Task) -> tuple[str, ...]:
    """The answers, right and wrong, of many prompts of a task."""
    rng = random.Random(0)
    prompts = [task.draw(rng) for _ in range(DRAWN)]
    return tuple(sorted({answer for prompt in prompts for answer in (*prompt.answers, *prompt.wrong)}))


def mutated(task: Task, kind: str, model: LanguageModel) -> Task:
    """The task with the candidate answers in its prompts replaced, each everywhere by the same other one, which is one
    token to the model.

    others   by other candidates of the task (or each other), at random: the task itself, seen afresh
    words    by unrelated nouns
    letters  by capital letters, in no order
    numbers  by numbers below 100

    Raises UserError for a task whose answers are parts of words, as the digits of a year; its draws, for a model that
    has too few such tokens.
    """
    words = [answer[1:] for answer in vocabulary(task) if re.fullmatch(r" \w+", answer)]
    if not words:
        raise UserError(f"the answers of {task.name} are no words of their own, so none can be replaced.")
    pools = {
        "others": words,
        "words": WORDS,
        "letters": "BCDEFGHJKLMNOPRSTUVWXYZ",  # not the words A and I, nor the Q of a question
        "numbers": map(str, range(1, 100)),
    }
    fits = [word for word in pools[kind] if len(model.token_ids(f" {word}")) == 1]

    def draw(rng: random.Random) -> Prompt:
        prompt = task.draw(rng)
        answers = [answer.strip() for answer in (*prompt.answers, *prompt.wrong)]
        present = set(re.findall(r"\w+", f"{prompt.clean} {prompt.corrupted}"))
        found = sorted(present & {*words, *answers})
        pool = [word for word in fits if kind == "others" or word not in present]
        if len(pool) < len(found):
            raise UserError(
                f"{len(found)} candidates of {task.name} cannot be replaced by {len(pool)} {kind} of one token."
            )
        return _renamed(prompt, dict(zip(found, rng.sample(pool, len(found)), strict=True)))

    return replace(task, name=f"{task.name}, {kind}", draw=draw)


def _renamed(prompt: Prompt, names: Mapping[str, str]) -> Prompt:
    def change(text: str) -> str:
        return re.sub(r"\w+", lambda match: names.get(match[0], match[0]), text)

    answers, wrong = (tuple(map(change, texts)) for texts in (prompt.answers, prompt.wrong))
    return Prompt(change(prompt.clean), change(prompt.corrupted), answers, wrong)
