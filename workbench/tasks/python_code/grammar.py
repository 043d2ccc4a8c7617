"""Programs of especially simple Python, drawn at random without end: what the small models are trained on.

A program is a few functions, classes and statements out of a fixed set of idioms. They are the ones the binary tasks
ask about (`pairs`), written often enough that a small model meets each thousands of times: strings with either quote,
flat and nested lists, dictionaries, sets and strings that grow under a name given before, swaps, loops, conditions,
files. Programs compile but mean nothing.

A program draws a few names and uses them again and again, as programs do: to copy a name that occurred then lowers the
loss everywhere, which tasks that ask for such a copy (`var_swap`, `class_init`) depend on. They are learned last.

What a name was bound to decides how it is used: a set grows by `.add`, a string and a number by ` +=`, a list by
`.append`. Arguments with defaults follow those without. Files named for input are read, those for output written.

After Gao et al. 2025, appendix A.6: part of their data is "especially simple, repetitive idioms", written there by a
language model and not released. The grammar here is our own.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar

from workbench.tasks.python_code.words import ATTRIBUTES, CALLED, FILES, INDICES, LETTERS, WORDS

T = TypeVar("T")
Lines = list[str]
Bound = dict[str, str]  # name -> what it was bound to: "set", "string", "list", "number"

EMPTY = {"set": ("set()",), "string": ('""', "''"), "list": ("[]",), "number": ("0", "1")}
OPERATORS = ("+", "-", "*")
COMPARISONS = ("==", "==", "<", ">", "!=")
DEFAULTS = ("None",) * 8 + ("True", "0")


class Writer:
    """A random generator, and the few names that one program uses again and again."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.letters = rng.sample(LETTERS, 4)
        self.names = [*self.letters, *rng.sample(WORDS, 2)]

    def name(self) -> str:
        return self.rng.choice(self.names)

    def letter(self) -> str:
        return self.rng.choice(self.letters)

    def two_letters(self) -> list[str]:
        return self.rng.sample(self.letters, 2)


def program(rng: random.Random) -> str:
    """One program, from a line to a screen."""
    w = Writer(rng)
    parts = [_choose(w, UNITS)(w) for _ in range(rng.randint(1, 3))]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


# ---- expressions ----


def number(w: Writer) -> str:
    return str(int(6 ** (2 * w.rng.random())) - 1)


def text(w: Writer) -> str:
    """Words without a quote."""
    return " ".join(w.rng.choices(WORDS, k=w.rng.randint(1, 5)))


def string(w: Writer) -> str:
    quote = w.rng.choice("\"'")
    return f"{quote}{text(w)}{quote}"


def flat_list(w: Writer) -> str:
    return f"[{', '.join(number(w) for _ in range(w.rng.randint(1, 5)))}]"


def nested_list(w: Writer) -> str:
    rows = 1 if w.rng.random() < 0.7 else 2
    return f"[{', '.join(flat_list(w) for _ in range(rows))}]"


def atom(w: Writer) -> str:
    draw = w.rng.random()
    if draw < 0.5:
        return w.name()
    if draw < 0.75:
        return number(w)
    return f"{w.letter()}.{w.rng.choice(WORDS)}" if draw < 0.85 else f"-{number(w)}"


def expression(w: Writer) -> str:
    draw = w.rng.random()
    if draw < 0.35:
        return atom(w)
    if draw < 0.65:
        return f"{w.name()} {w.rng.choice(OPERATORS)} {atom(w)}"
    if draw < 0.8:
        return f"{w.rng.choice(CALLED)}({w.name()})"
    return f"{w.letter()}[{w.name()}]" if draw < 0.9 else string(w)


def condition(w: Writer) -> str:
    draw = w.rng.random()
    if draw < 0.25:
        return f"{w.name()} == True"
    if draw < 0.35:
        return f"{w.name()} not in {w.name()}"
    return f"{w.name()} {w.rng.choice(COMPARISONS)} {atom(w)}"


# ---- statements of one line ----


def comment(w: Writer) -> str:
    return f"# {' '.join(w.rng.choices(WORDS, k=w.rng.randint(1, 12)))}"


def assign(w: Writer) -> str:
    return f"{w.name()} = {expression(w)}"


def assign_true(w: Writer) -> str:
    return f"{w.name()} = {'True' if w.rng.random() < 0.8 else 'False'}"


def print_text(w: Writer) -> str:
    return f"print({string(w)})"


def print_formatted(w: Writer) -> str:
    quote = w.rng.choice("\"'")
    return f"print(f{quote}{formatted(w)} {{{w.name()}}}{quote})"


def formatted(w: Writer) -> str:
    return " ".join(w.rng.choices(WORDS, k=w.rng.randint(1, 2)))


def assign_list(w: Writer) -> str:
    return f"{w.name()} = {flat_list(w) if w.rng.random() < 0.5 else nested_list(w)}"


def names_list(w: Writer) -> str:
    """`['a', 1, 'b', 2]`: a list that differs from a dictionary by its brackets and commas."""
    return _row(w, "[]", ", ")


def dictionary(w: Writer) -> str:
    return _row(w, "{}", ": ")


def _row(w: Writer, brackets: str, between: str) -> str:
    quote = w.rng.choice("\"'")
    items = (f"{quote}{w.name()}{quote}{between}{number(w)}" for _ in range(w.rng.randint(1, 4)))
    return f"{brackets[0]}{', '.join(items)}{brackets[1]}"


def assign_row(w: Writer) -> str:
    return f"{w.name()} = {names_list(w) if w.rng.random() < 0.5 else dictionary(w)}"


def swap(w: Writer) -> str:
    x, y = w.two_letters()
    return f"{x}, {y} = {y}, {x}"


def ternary(w: Writer) -> str:
    return f"{w.name()} = {atom(w)} if {condition(w)} else {atom(w)}"


def assign_lambda(w: Writer) -> str:
    x = w.letter()
    return f"{w.name()} = lambda {x}: {x} {w.rng.choice(OPERATORS)} {atom(w)}"


def assign_open(w: Writer) -> str:
    return f"{w.name()} = open({w.name()})"


def call(w: Writer) -> str:
    return f"{w.rng.choice(CALLED)}({w.name()}, {atom(w)})"


SIMPLE: tuple[Callable[[Writer], str], ...] = (
    assign, assign, assign_true, print_text, print_text, print_formatted, assign_list, assign_list, assign_row,
    assign_row, swap, swap, swap, ternary, assign_lambda, assign_open, call,
)  # fmt: skip


def simple(w: Writer) -> str:
    return _choose(w, SIMPLE)(w)


# ---- names bound to something, and used accordingly ----


def bind(w: Writer, bound: Bound) -> str:
    """`v = set()`, and the like; remembers it."""
    name = "current" if w.rng.random() < 0.25 else w.name()
    kind = w.rng.choice(("set", "set", "string", "string", "list", "number"))
    bound[name] = kind
    return f"{name} = {w.rng.choice(EMPTY[kind])}"


def grow(w: Writer, bound: Bound) -> str:
    """`v.add(x)`, ` += "x"`, as the name was bound."""
    name = w.rng.choice(sorted(bound))
    kind = bound[name]
    if kind in ("set", "list"):
        return f"{name}.{'add' if kind == 'set' else 'append'}({w.name()})"
    return f"{name} += {string(w) if kind == 'string' else number(w)}"


# ---- statements with a body ----


def loop_header(w: Writer) -> str:
    draw = w.rng.random()
    if draw < 0.25:
        return f"for {w.letter()} in {w.name()}:"
    if draw < 0.45:
        return f"for {w.rng.choice(INDICES)} in range({atom(w)}):"
    if draw < 0.65:
        i, x = w.two_letters() if w.rng.random() < 0.2 else (w.rng.choice(INDICES), w.rng.choice(WORDS))
        return f"for {i}, {x} in enumerate({w.name()}):"
    if draw < 0.8:
        return f"while {w.letter()}:"
    return f"while {w.letter()} < {atom(w)}:" if draw < 0.9 else "while True:"


def loop(w: Writer, bound: Bound, depth: int) -> Lines:
    return [loop_header(w), *indent(body(w, bound, depth + 1))]


def conditional(w: Writer, bound: Bound, depth: int) -> Lines:
    lines = [f"if {condition(w)}:", *indent(body(w, bound, depth + 1))]
    draw = w.rng.random()
    if draw < 0.35:
        lines += [f"elif {condition(w)}:", *indent(body(w, bound, depth + 1))]
    if 0.2 < draw < 0.7:
        lines += ["else:", *indent(body(w, bound, depth + 1))]
    return lines


def opened(w: Writer) -> str:
    """`open(input_file, 'r')`: the name says how."""
    draw = w.rng.random()
    if draw < 0.4:
        return f"open({w.name()})"
    quote = w.rng.choice("'''\"")
    files = w.rng.choice(FILES)
    return f"open({files[0]}, {quote}r{quote})" if draw < 0.7 else f"open({files[1]}, {quote}w{quote})"


def with_file(w: Writer, bound: Bound, depth: int) -> Lines:
    return [f"with {opened(w)} as {w.name()}:", *indent(body(w, bound, depth + 1))]


COMPOUND: tuple[Callable[[Writer, Bound, int], Lines], ...] = (loop, loop, conditional, conditional, with_file)


def body(w: Writer, bound: Bound, depth: int) -> Lines:
    """One to three statements, nested up to two deep."""
    lines: Lines = []
    for _ in range(w.rng.choice((1, 1, 2, 2, 3)) if depth else w.rng.randint(1, 5)):
        if w.rng.random() < 0.08:
            lines.append(comment(w))
        draw = w.rng.random()
        if draw < 0.3 and depth < 3:
            lines += _choose(w, COMPOUND)(w, bound, depth)
        elif draw < 0.5 and bound:
            lines.append(grow(w, bound))
        else:
            lines.append(simple(w))
    return lines


# ---- what programs are made of ----


def script(w: Writer) -> Lines:
    return body(w, {}, 0)


def accumulate(w: Writer) -> Lines:
    """One or two names bound to something empty, and a loop in which they grow."""
    bound: Bound = {}
    lines = [bind(w, bound) for _ in range(1 if w.rng.random() < 0.7 else 2)]
    header = items_header(w) if w.rng.random() < 0.4 else loop_header(w)
    inner = body(w, bound, 2) if w.rng.random() < 0.5 else []
    return [*lines, header, *indent([*inner, grow(w, bound)])]


def items_header(w: Writer) -> str:
    x, y = w.two_letters()
    return f"for {x}, {y} in {w.name()}[{w.name()}].items():"


def parameters(w: Writer) -> list[str]:
    """Names, from some point on with defaults."""
    names = w.rng.sample(w.names, w.rng.randint(1, 4))
    plain = w.rng.choice((0, 1, len(names), len(names)))
    return [name if i < plain else f"{name}={w.rng.choice(DEFAULTS)}" for i, name in enumerate(names)]


def function(w: Writer) -> Lines:
    bound: Bound = {}
    lines = [bind(w, bound)] if w.rng.random() < 0.5 else []
    lines += body(w, bound, 1)
    draw = w.rng.random()
    if draw < 0.35:
        lines.append("return True")
    elif draw < 0.7:
        lines.append(f"return {w.rng.choice(sorted(bound)) if bound else expression(w)}")
    name = w.letter() if w.rng.random() < 0.3 else f"{w.rng.choice(CALLED)}_{w.rng.choice(WORDS)}"
    return [f"def {name}({', '.join(parameters(w))}):", *indent(lines)]


def cls(w: Writer) -> Lines:
    """A class that keeps its arguments under their names."""
    names = w.rng.sample(ATTRIBUTES, w.rng.randint(2, 4))
    kept = [f"self.{name} = {name}" for name in (names if w.rng.random() < 0.5 else w.rng.sample(names, len(names)))]
    lines = [f"def __init__(self, {', '.join(names)}):", *indent(kept)]
    draw = w.rng.random()
    if draw < 0.3:
        name = w.rng.choice(names)
        lines += ["", f"def set_{name}(self, {name}):", *indent([f"self.{name} = {name}"])]
    elif draw < 0.6:
        lines += ["", f"def {w.rng.choice(CALLED)}(self):", *indent([simple(w), f"return self.{w.rng.choice(names)}"])]
    return [f"class {w.letter().upper()}:", *indent(lines)]


UNITS: tuple[Callable[[Writer], Lines], ...] = (
    script, script, script, accumulate, accumulate, function, function, function, cls, cls,
)  # fmt: skip


def indent(lines: Lines) -> Lines:
    return [f"    {line}" if line else line for line in lines]


def _choose(w: Writer, options: tuple[T, ...]) -> T:
    return options[int(w.rng.random() * len(options))]
