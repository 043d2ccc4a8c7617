"""Indirect object identification: "When Mary and John went to the store, John gave a drink to" -> " Mary".

Two people are named, one of them again as the giver; the receiver must be the other. The corrupted prompt names three
different people in the same places, so that there is nobody left out and nothing to infer: the name at the first
mention of S becomes IO's, IO's becomes a third, and the second mention of S stays. A model may still prefer IO's name
there, merely because S has just been the giver; `ioi_flip` has the other usual corruption, in which the second mention
of S becomes IO's: the rule then gives S, so the whole behaviour is at stake in patching.

In half of the prompts IO is named first (ABBA), in half S (BABA); otherwise "the answer is the first name" would do.

Wang et al. 2022, "Interpretability in the Wild", section 2. The templates and word lists are our own,
in two lengths, so that a batch falls into two groups of equally long prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from workbench.prompts import Prompt
from workbench.registry import task

# Filled by slot, never by replacing one name with another in the text: "Sara" is inside "Sarah".
TEMPLATES = (
    "When {first} and {second} went to the {place}, {giver} gave a {object} to",
    "After {first} and {second} arrived at the {place}, {giver} handed a {object} to",
    "While {first} and {second} waited near the {place}, {giver} offered a {object} to",
    "Once {first} and {second} got to the {place}, {giver} passed a {object} to",
    "As {first} and {second} walked past the {place}, {giver} showed a {object} to",
    "Because {first} and {second} worked at the {place}, {giver} lent a {object} to",
    "Before {first} and {second} left for the {place}, {giver} lent a {object} to",
    "Today {first} and {second} drove to the {place}. {giver} gave a {object} to",
    "Then {first} and {second} met near the {place}. {giver} returned a {object} to",
    "Later {first} and {second} stopped at the {place}. {giver} threw a {object} to",
    "The two friends {first} and {second} were at the {place}, where {giver} gave a {object} to",
    "On the way {first} and {second} passed by the {place}, and {giver} showed a {object} to",
    "At last {first} and {second} came back from the {place}, and {giver} offered a {object} to",
    "Last week {first} and {second} had lunch near the {place}, and {giver} gave a {object} to",
    "In the evening {first} and {second} ran to the {place}, and {giver} handed a {object} to",
)
PLACES = (
    "store", "school", "park", "hospital", "office", "station", "library", "museum", "market", "beach", "garden",
    "restaurant", "farm", "church", "hotel", "airport",
)  # fmt: skip
OBJECTS = (
    "book", "drink", "ring", "bag", "letter", "ball", "flower", "ticket", "pen", "map", "key", "coin", "hat", "gift",
    "camera", "box",
)  # fmt: skip
NAMES = (
    "Aaron", "Adam", "Alan", "Albert", "Alex", "Alice", "Amy", "Andrew", "Anna", "Anne", "Anthony", "Arthur", "Ben",
    "Brian", "Carl", "Charlie", "Chris", "Claire", "Dan", "Daniel", "David", "Diana", "Edward", "Elizabeth", "Emily",
    "Emma", "Eric", "Frank", "George", "Harry", "Helen", "Henry", "Jack", "Jacob", "James", "Jane", "Jason", "Jennifer",
    "Jeremy", "Jessica", "Joe", "John", "Jonathan", "Joseph", "Julia", "Justin", "Karen", "Kate", "Kevin", "Laura",
    "Linda", "Lisa", "Louis", "Lucy", "Luke", "Maria", "Martin", "Mary", "Matthew", "Michael", "Nancy", "Nathan",
    "Nicholas", "Nicole", "Oliver", "Oscar", "Patrick", "Paul", "Peter", "Philip", "Rachel", "Rebecca", "Richard",
    "Robert", "Ruth", "Ryan", "Samuel", "Sara", "Sarah", "Scott", "Simon", "Sophie", "Stephen", "Steven", "Susan",
    "Thomas", "Tom", "Victor", "Vincent", "Walter", "William",
)  # fmt: skip


@task("ioi", metric="logit_diff", version=1)
def ioi(rng: random.Random) -> Prompt:
    """Indirect object: who receives, of the two people named, when the other one gives."""
    fill, io, s, third = _scene(rng)
    return Prompt(fill(io, s, s), fill(third, io, s), (f" {io}",), (f" {s}",))


@task("ioi_flip", metric="logit_diff", version=1)
def ioi_flip(rng: random.Random) -> Prompt:
    """Indirect object, corrupted by making the receiver the giver, which turns the answer round."""
    fill, io, s, _ = _scene(rng)
    return Prompt(fill(io, s, s), fill(io, s, io), (f" {io}",), (f" {s}",))


def _scene(rng: random.Random) -> tuple[Callable[[str, str, str], str], str, str, str]:
    """A template that wants names at the places of IO, S and the giver; and three names."""
    io, s, third = rng.sample(NAMES, 3)
    template, place, thing = rng.choice(TEMPLATES), rng.choice(PLACES), rng.choice(OBJECTS)
    io_first = rng.random() < 0.5

    def fill(at_io: str, at_s: str, giver: str) -> str:
        first, second = (at_io, at_s) if io_first else (at_s, at_io)
        return template.format(first=first, second=second, giver=giver, place=place, object=thing)

    return fill, io, s, third
