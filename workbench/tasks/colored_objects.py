"""Colored Objects: three objects of three colours, a question about one of them, after one worked example.

    Q: On the table, there is a red cup, a blue book, and a green ball. What color is the book?
    A: blue
    Q: On the desk, I see an orange key, a black pen, and a purple hat. What color is the hat?
    A:                                    -> " purple"

The example and the question share no object and no colour, so the answer is not to be had from the example. The
corrupted prompt asks about another object of the three; the wrong answer is the right one there.

Colours are answered in lower case, as they stand in the text; the paper has them capitalised. The paper's model is
GPT-2 medium. Small models hardly do this task: smollm2-135m prefers the right colour to the wrong one in 58 % of
prompts (52 % when capitalised; chance is 50 %), so find no circuit in it here before looking at its score.

Merullo, Eickhoff & Pavlick 2024, "Circuit Component Reuse Across Tasks in Transformer Language Models", its second
task, after BIG-bench. Word lists our own.
"""

from __future__ import annotations

import random

from workbench.prompts import Prompt
from workbench.registry import task

SURFACES = ("table", "desk", "floor")
OPENINGS = ("there is", "you see", "I see")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")
OBJECTS = (
    "cup", "book", "ball", "hat", "box", "bag", "key", "coin", "phone", "spoon", "ring", "toy", "lamp", "clock", "pen",
    "brush", "shirt", "fork", "plate", "pencil",
)  # fmt: skip


@task("colored_objects", metric="logit_diff", version=1)
def colored_objects(rng: random.Random) -> Prompt:
    """Colored Objects: which colour the object asked about has, of three described."""
    colors, objects = rng.sample(COLORS, 6), rng.sample(OBJECTS, 6)
    scenes = [_scene(rng, colors[:3], objects[:3]), _scene(rng, colors[3:], objects[3:])]
    shown = rng.randrange(3)
    asked, instead = rng.sample(range(3, 6), 2)
    example = f"{scenes[0]} What color is the {objects[shown]}?\nA: {colors[shown]}"

    def ask(which: int) -> str:
        return f"{example}\n{scenes[1]} What color is the {objects[which]}?\nA:"

    return Prompt(ask(asked), ask(instead), (f" {colors[asked]}",), (f" {colors[instead]}",))


def _scene(rng: random.Random, colors: list[str], objects: list[str]) -> str:
    things = [f"{'an' if c[0] == 'o' else 'a'} {c} {o}" for c, o in zip(colors, objects, strict=True)]
    return f"Q: On the {rng.choice(SURFACES)}, {rng.choice(OPENINGS)} {things[0]}, {things[1]}, and {things[2]}."
