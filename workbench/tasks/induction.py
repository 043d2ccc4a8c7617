"""Induction: a list of random words begins again; the next word is the one that followed last time.

The words have nothing to do with each other, so only copying helps: find the last word earlier in the text and repeat
what came after it. In the corrupted prompt the first copy consists of other words, and there is nothing to find.

The wrong answer is another word that has occurred once and not again yet, so right and wrong differ in nothing but
what precedes them. The first copy's length varies while the whole stays equally long: the distance to look back is not
the same in every prompt, and a head that always looks back equally far does not solve the task.

Olsson et al. 2022, "In-context Learning and Induction Heads", section "Key concepts"; Elhage et al. 2021. Word list our
own.
"""

from __future__ import annotations

import random

from workbench.prompts import Prompt
from workbench.registry import task

# Not every tokenizer puts a beginning-of-text token first, and the first position is unlike all others: a word that
# stands there is not a fair copy of the same word later.
OPENING = "Words:"
TOTAL = 24  # words after the opening, the answer not counted
FIRST_COPY = range(14, 19)
WORDS = (
    "apple", "river", "chair", "stone", "window", "garden", "music", "paper", "bridge", "horse", "silver", "winter",
    "forest", "mountain", "island", "castle", "kitchen", "doctor", "teacher", "farmer", "captain", "engine", "bottle",
    "hammer", "mirror", "candle", "blanket", "basket", "pencil", "button", "pocket", "jacket", "cotton", "leather",
    "copper", "iron", "glass", "sand", "rain", "wind", "cloud", "fire", "smoke", "shadow", "letter", "number", "circle",
    "corner", "street", "market", "hotel", "school", "temple", "tower", "wall", "door", "floor", "table", "lamp",
    "clock", "radio", "movie", "guitar", "dance", "race", "train", "boat", "truck", "road", "valley", "lake", "desert",
    "farm", "sheep", "dog", "bird", "fish", "snake", "lion", "wolf", "bread", "butter", "cheese", "milk", "coffee",
    "sugar", "salt", "soup", "egg", "fruit",
)  # fmt: skip


@task("induction", metric="logit_diff", version=1)
def induction(rng: random.Random) -> Prompt:
    """Induction: which word follows in a list of random words that begins again."""
    n = rng.choice(FIRST_COPY)
    again = TOTAL - n  # how many words of the second copy are there
    drawn = rng.sample(WORDS, 2 * n)
    copy, other = drawn[:n], drawn[n:]
    answer, wrong = copy[again], rng.choice(copy[again + 1 :])

    def text(first: list[str]) -> str:
        return " ".join((OPENING, *first, *copy[:again]))

    return Prompt(text(copy), text(other), (f" {answer}",), (f" {wrong}",))
