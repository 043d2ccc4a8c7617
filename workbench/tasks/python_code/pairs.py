"""Twenty binary tasks on Python: which of two tokens continues a line, decided by something earlier.

A pair is two prompts of equally many tokens, one per class, each with the rest of its line:

    print("count of lines  -> ")        class 1
    print('count of lines  -> ')        class 2

A task draws one of the two as the clean prompt, so that both classes are equally frequent, and the other as the
corrupted one. Prompt and rest are tokenised as one text and cut where the classes first differ (`Prompt.whole`): what
is asked for is one token that the model has met, under any tokenizer. Both prompts follow the same zero to two lines.

Within a pair the prompts differ in what decides the class, and end in the same token (but for `else_elif`, where that
is the token that decides). Where deciding takes more tokens in one class (`if x` and `x`), the other class makes up
for it by one to three words more in a comment before, where their number varies from one to twelve.

Gao et al. 2025, "Weight-sparse transformers have interpretable circuits", table 1. The paper's prompts are not
released: these follow its descriptions, in the idioms of `grammar`.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.metrics import binary_loss
from workbench.prompts import Batch, Prompt
from workbench.registry import task
from workbench.tasks.python_code import grammar
from workbench.tasks.python_code.grammar import Writer
from workbench.tasks.python_code.words import ATTRIBUTES, CALLED, FILES, INDICES, WORDS


class Side(NamedTuple):
    prompt: str
    rest: str  # of the line


Pair = tuple[Side, Side]  # class 1, class 2
PAIRS: dict[str, Callable[[Writer], Pair]] = {}
# Tasks whose second answer is "anything else": task -> how class 1's answer begins.
ONE_VS_REST: dict[str, str] = {}


def binary(name: str, *, or_not: str | None = None) -> Callable[[Callable[[Writer], Pair]], object]:
    """Register a function that draws a pair as a task."""

    def register(pair: Callable[[Writer], Pair]) -> object:
        @functools.wraps(pair)
        def draw(rng: random.Random) -> Prompt:
            w = Writer(rng)
            before = "".join(f"{grammar.simple(w)}\n" for _ in range(rng.choice((0, 1, 1, 2))))
            one, two = pair(w) if rng.random() < 0.5 else reversed(pair(w))
            return Prompt(before + one.prompt, before + two.prompt, (one.rest,), (two.rest,), whole=True)

        PAIRS[name] = pair
        if or_not is not None:
            ONE_VS_REST[name] = or_not
        return task(name, metric="logit_diff", version=1)(draw)

    return register


def pair_loss(
    batch: Batch, clean: Float[Tensor, "batch vocab"], corrupted: Float[Tensor, "batch vocab"]
) -> Float[Tensor, " batch"]:
    """The loss of a binary task, in nats per prompt: the mean of `binary_loss` over the two prompts of each pair.

    clean, corrupted  logits at the last position. The corrupted prompt's answer is the clean one's wrong answer. Where
                      one answer is "anything else" it is scored against the whole vocabulary.

    Gao et al. 2025, section 2.2; stored values of theirs are the sum of both, reported ones the mean. Chance is ln 2.
    """
    one, two, first = pair_sides(batch)
    sides = list(zip(one, two, first.tolist(), strict=True))
    answers = [a if is_first else b for a, b, is_first in sides]
    wrong = [b if is_first else a for a, b, is_first in sides]
    return (binary_loss(clean, answers, wrong) + binary_loss(corrupted, wrong, answers)) / 2


def pair_sides(batch: Batch) -> tuple[list[Tensor], list[Tensor], Bool[Tensor, " pair"]]:
    """Of each pair: ids of one answer, ids of the other, and whether the first is right for the clean prompt.

    The first is what a task names where the other is "anything else" (its ids are then none), and the lower id
    elsewhere: the same token of a task whose two answers are always the same.
    """
    stated = ONE_VS_REST.get(batch.task.name.split("-")[0])
    one, two, is_one = [], [], []
    for prompt, right, wrong in zip(batch.prompts, batch.answers, batch.wrong, strict=True):
        first = int(right[0]) < int(wrong[0]) if stated is None else prompt.answers[0].startswith(stated)
        one.append(right if first else wrong)
        two.append((wrong if first else right) if stated is None else right[:0])
        is_one.append(first)
    return one, two, torch.tensor(is_one)


def _comments(w: Writer, more: int) -> tuple[str, str]:
    """The same comment twice, the second with `more` words more (the first, if negative)."""
    words = w.rng.choices(WORDS, k=w.rng.randint(1, 9) + abs(more))
    short, long = (f"# {' '.join(words[:n])}\n" for n in (len(words) - abs(more), len(words)))
    return (short, long) if more > 0 else (long, short)


def _line(w: Writer) -> str:
    return f"{grammar.assign(w)}\n"


def _def(w: Writer) -> str:
    return f"def {w.rng.choice(CALLED)}_{w.rng.choice(WORDS)}({w.letter()}):\n"


# ---- strings and brackets ----


@binary("single_double_quote")
def single_double_quote(w: Writer) -> Pair:
    """Which quote closes a string: the one that opened it."""
    text = grammar.text(w)
    return Side(f'print("{text}', '")\n'), Side(f"print('{text}", "')\n")


@binary("fstring_brace", or_not=" {")
def fstring_brace(w: Writer) -> Pair:
    """Whether a brace may follow in a string: it does in one with the prefix f."""
    quote, text, name = w.rng.choice("\"'"), grammar.formatted(w), w.name()
    end = f"{quote})\n"
    return Side(f"print(f{quote}{text}", f" {{{name}}}{end}"), Side(
        f"print({quote}{text}", f" {w.rng.choice(WORDS)}{end}"
    )


@binary("bracket_counting")
def bracket_counting(w: Writer) -> Pair:
    """How many brackets close a list of numbers: as many as are open."""
    name, numbers = w.name(), ", ".join(grammar.number(w) for _ in range(w.rng.randint(2, 5)))
    return Side(f"{name} = [{numbers}", "]\n"), Side(f"{name} = [[{numbers}", "]]\n")


@binary("bracket_brace")
def bracket_brace(w: Writer) -> Pair:
    """What follows a string: a colon in a dictionary, a comma in a list."""
    name, quote, *keys = w.name(), w.rng.choice("\"'"), *w.rng.sample(w.letters, w.rng.randint(2, 4))
    values = [grammar.number(w) for _ in keys]

    def side(brackets: str, between: str) -> Side:
        items = [f"{quote}{key}{quote}{between} {value}" for key, value in zip(keys, values, strict=True)]
        rest = f"{quote}{between} {values[-1]}{brackets[1]}\n"
        return Side(f"{name} = {brackets[0]}{', '.join(items[:-1])}, {quote}{keys[-1]}", rest)

    return side("{}", ":"), side("[]", ",")


# ---- names that occur again ----


def _collection(w: Writer, name: str) -> Pair:
    within = f"    if {grammar.condition(w)}:\n        {_line(w)}" if w.rng.random() < 0.5 else ""
    header = grammar.items_header(w) if w.rng.random() < 0.5 else grammar.loop_header(w)
    between = f"{header}\n{within}"
    if re.search(rf"\b{name}\b", between):  # it would be another thing of the same name
        return _collection(w, name)
    added, empty = w.rng.choice([other for other in w.letters if other != name]), w.rng.choice(("''", '""'))
    return (
        Side(f"{name} = set()\n{between}    {name}", f".add({added})\n"),
        Side(f"{name} = {empty}\n{between}    {name}", f" += {added}\n"),
    )


@binary("set_or_string")
def set_or_string(w: Writer) -> Pair:
    """How a collection grows: .add if it was bound to a set, += if to a string; the name varies."""
    return _collection(w, w.name())


@binary("set_or_string_fixedvarname")
def set_or_string_fixedvarname(w: Writer) -> Pair:
    """How a collection grows: .add if it was bound to a set, += if to a string; the name is always the same."""
    return _collection(w, "current")


@binary("class_init")
def class_init(w: Writer) -> Pair:
    """Which argument an attribute takes in __init__: the one of its own name."""
    names = w.rng.sample(ATTRIBUTES, w.rng.randint(3, 4))
    head = f"class {w.letter().upper()}:\n    def __init__(self, {', '.join(names)}):\n"
    first, one, two = w.rng.sample(names, 3)
    kept = f"        self.{first} = {first}\n        self."
    return Side(f"{head}{kept}{one} =", f" {one}\n"), Side(f"{head}{kept}{two} =", f" {two}\n")


@binary("var_swap")
def var_swap(w: Writer) -> Pair:
    """Which variable ends a swap: the one that it began with."""
    x, y, other_x, other_y = w.rng.sample(w.letters, 4)
    return Side(f"{x}, {y} = {y},", f" {x}\n"), Side(f"{other_x}, {other_y} = {other_y},", f" {other_x}\n")


# ---- arguments and files ----


@binary("final_kwarg")
def final_kwarg(w: Writer) -> Pair:
    """Whether the last parameter has a default: if those before it have."""
    called, names = w.letter(), w.rng.sample(w.names, w.rng.randint(2, 4))
    one, two = _comments(w, len(names) - 1)
    return (
        Side(f"{one}def {called}({'=None, '.join(names)}", "=None):\n"),
        Side(f"{two}def {called}({', '.join(names)}", "):\n"),
    )


@binary("with_open")
def with_open(w: Writer) -> Pair:
    """How a file is opened: for reading or for writing, as its name says."""
    head, (source, target), name = _def(w), w.rng.choice(FILES), w.name()
    return (
        Side(f"{head}    with open({source}, '", f"r') as {name}:\n"),
        Side(f"{head}    with open({target}, '", f"w') as {name}:\n"),
    )


@binary("with_as")
def with_as(w: Writer) -> Pair:
    """What follows a call of open: as after with, the end of the line after an assignment."""
    one, two = _comments(w, -1)
    file, name = w.rng.sample(w.names, 2)
    return Side(f"{one}with open({file})", f" as {name}:\n"), Side(f"{two}{name} = open({file})", "\n")


# ---- statements told apart by their keyword ----


@binary("for_while")
def for_while(w: Writer) -> Pair:
    """What follows the name in a loop's header: in after for, a colon after while."""
    head, name, names = _def(w), w.letter(), w.name()
    return Side(f"{head}    for {name}", f" in {names}:\n"), Side(f"{head}    while {name}", ":\n")


@binary("enumerate_range")
def enumerate_range(w: Writer) -> Pair:
    """What a loop runs over: enumerate with two names, range with an index alone."""
    one, two = _comments(w, 2)
    i, item, names = w.rng.choice(INDICES), w.rng.choice(WORDS), w.letter()
    return Side(f"{one}for {i}, {item} in", f" enumerate({names}):\n"), Side(f"{two}for {i} in", f" range({names}):\n")


@binary("indent_for")
def indent_for(w: Writer) -> Pair:
    """How far the next line is indented: further after a loop's header, as far after another statement."""
    head, line, (x, y, z) = _def(w), _line(w), w.rng.sample(w.letters, 3)
    return (
        Side(f"{head}    for {x} in {y}:\n", f"        {line}"),
        Side(f"{head}    {x} = {y} + {z}\n", f"    {line}"),
    )


@binary("lambda_func")
def lambda_func(w: Writer) -> Pair:
    """What follows a name: a colon after lambda, a bracket after def."""
    one, two = _comments(w, 2)
    name, x, y = w.rng.sample(w.letters, 3)
    return Side(f"{one}{name} = lambda {x}", f": {x} + {y}\n"), Side(f"{two}def {x}", f"({y}):\n")


@binary("while_return_true")
def while_return_true(w: Writer) -> Pair:
    """What follows True: a colon after while, the end of the line after return."""
    head = _def(w)
    return Side(f"{head}    while True", ":\n"), Side(f"{head}    return True", "\n")


@binary("else_elif", or_not=":")
def else_elif(w: Writer) -> Pair:
    """Whether a colon follows: after else it does, after elif a condition comes first."""
    head = f"if {grammar.condition(w)}:\n    {_line(w)}"
    return Side(f"{head}else", ":\n"), Side(f"{head}elif", f" {grammar.condition(w)}:\n")


# ---- conditions and assignments ----


@binary("if_equals")
def if_equals(w: Writer) -> Pair:
    """Which equals sign follows a name: two after if, one in an assignment."""
    one, two = _comments(w, 1)
    # Indented, or the name would begin a line in one class and follow a space in the other.
    loop, name, value = grammar.loop_header(w), w.name(), grammar.number(w)
    return (
        Side(f"{one}{loop}\n    if {name}", f" == {value}:\n"),
        Side(f"{two}{loop}\n    {name}", f" = {value}\n"),
    )


@binary("if_ternary", or_not=":")
def if_ternary(w: Writer) -> Pair:
    """Whether a colon follows a condition: after the statement if it does, in a conditional expression else comes."""
    one, two = _comments(w, -3)
    name, value, other = w.name(), grammar.number(w), grammar.number(w)
    condition = f"{w.name()} == {w.name()}"
    return Side(f"{one}if {condition}", ":\n"), Side(f"{two}{name} = {value} if {condition}", f" else {other}\n")


@binary("var_if")
def var_if(w: Writer) -> Pair:
    """What follows True: a colon after a comparison, the end of the line after an assignment."""
    one, two = _comments(w, 1)
    name = w.name()
    return Side(f"{one}if {name} == True", ":\n"), Side(f"{two}{name} = True", "\n")


TASKS = tuple(PAIRS)
