"""Transformers compiled from programs: the circuit is known because the compiler put it there.

tracr (Lindner et al. 2023, arXiv 2301.05062) turns a RASP program into weights: every variable of the program has
dimensions of its own in the residual stream, a head computes an aggregate and an MLP a map, and all other weights are
zero. Its models are converted here to ours (`circuits/toy_weights.py`): hard attention by large scores, ReLU MLPs, no
norms. The answer is read at the last position.

tracr compiles for attention without a mask; ours is causal. At the last position nothing is masked, so a program
survives if what earlier positions compute for it uses only what they can see:
- `frac_prevs`, `hist`: yes. `reverse`: yes, at the last position, where the answer is the first word.
- `shuffle_dyck`: yes. Its balances look back by definition; its length, its look for negative balances and its last
  balance are needed at the last position alone.
- `sort`: no. The place of an early word depends on how many later words are smaller. It is left out.

The compiler is an optional dependency: `pip install 'mechinterp-workbench[tracr]'`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from circuits.graph import INPUT, LOGITS, node_of, transformer
from circuits.toy_weights import Weights, disguise, forward, to_model
from circuits.toys import BOS, Toy
from workbench.errors import UserError, unknown
from workbench.prompts import Prompt, Task
from workbench.scores import head, mlp

Words = tuple[str, ...]
SURE = 10.0  # logit of a word whose output is 1
PAIRS = 64  # pairs on which it is seen which nodes and edges carry a difference
MORE, LESS, BALANCED, UNBALANCED = "more", "less", "balanced", "unbalanced"


@dataclass(frozen=True)
class Program:
    """A RASP program as a task.

    build   the program, given the modules `tracr.compiler.lib` and `tracr.rasp.rasp`
    solve   what it answers, in plain Python: the law the compiled model is held to
    draw    an input; a longer one than `length` cannot be read
    change  another input of the same length; drawn again until the answer is another
    extra   noise heads per layer, besides those that the compiler leaves idle
    """

    build: Callable[[Any, Any], Any]
    vocab: Words
    length: int
    solve: Callable[[Words], str]
    draw: Callable[[random.Random], Words]
    change: Callable[[random.Random, Words], Words]
    extra: int
    about: str


def programs() -> dict[str, Program]:
    """Every program that can be compiled into a causal model, by name."""
    return dict(_PROGRAMS)


def compiled(name: str, seed: int = 0, *, neurons: int = 16) -> Toy:
    """The model of a program, disguised with noise from `seed`. Compiling takes 4 to 20 seconds.

    `nodes` and `edges` are those with non-zero weights that carry something the prompt decides; what the compiler
    made but is the same for all prompts of one length is in `constant`.
    Raises UserError for an unknown program, and when tracr is not installed.
    """
    if name not in _PROGRAMS:
        raise unknown("program", name, _PROGRAMS)
    program = _PROGRAMS[name]
    w = _compile(program)

    def prompt(rng: random.Random) -> Prompt:
        words, other = _pair(program, rng)
        clean, corrupted = (" ".join((BOS, *some)) for some in (words, other))
        return Prompt(clean, corrupted, (f" {program.solve(words)}",), (f" {program.solve(other)}",))

    rng = random.Random(0)
    pairs = [_pair(program, rng) for _ in range(PAIRS)]
    nodes, constant, edges = _structure(w, pairs)
    longest = torch.tensor(_ids(w, [words for words, _ in pairs if len(words) == program.length]))
    generator = torch.Generator().manual_seed(seed)
    model = to_model(disguise(w, longest, generator, heads=program.extra, neurons=neurons), f"tracr-{name}")
    task = Task(f"tracr-{name}", 1, "logit_diff", prompt, program.about)
    return Toy(f"tracr-{name}", model, task, nodes, edges, constant)


def _pair(program: Program, rng: random.Random) -> tuple[Words, Words]:
    while True:
        words = program.draw(rng)
        for _ in range(20):
            other = program.change(rng, words)
            if program.solve(other) != program.solve(words):
                return words, other


def _ids(w: Weights, rows: list[Words]) -> list[list[int]]:
    return [[w.words.index(word) for word in (BOS, *row)] for row in rows]


# ---- from the compiler's parameters to ours ----


def _compile(program: Program) -> Weights:
    try:
        from tracr.compiler import compiling, lib
        from tracr.rasp import rasp
    except ImportError as error:
        raise UserError(
            "compiled models need the compiler; install it with: pip install tracr-pypi==1.0.0 jax dm-haiku"
        ) from error
    source = program.build(lib, rasp)
    model = compiling.compile_rasp_to_model(
        source, vocab=set(program.vocab), max_seq_len=program.length, causal=True, compiler_bos=BOS
    )
    labels = list(model.residual_labels)
    outputs = _outputs(source.label, labels)
    words = (BOS, *program.vocab, *(word for word in outputs if word not in program.vocab))

    def parameter(module: str, name: str = "w") -> Tensor:
        return torch.tensor(model.params[module][name].tolist(), dtype=torch.float64)

    embeddings, rows = parameter("token_embed", "embeddings"), model.input_encoder.encoding_map
    embed = embeddings.new_zeros(len(words), len(labels))
    for i, word in enumerate(words):
        if word in rows:
            embed[i] = embeddings[rows[word]]
    unembed = embeddings.new_zeros(len(labels), len(words))
    for word, (label, size) in outputs.items():
        unembed[labels.index(label), words.index(word)] = size
    c = model.model_config
    layers = [f"transformer/layer_{i}" for i in range(c.num_layers)]

    def each(name: str, parameter_name: str = "w") -> Tensor:
        return torch.stack([parameter(f"{layer}/{name}", parameter_name) for layer in layers])

    by_head = [each(f"attn/{name}").unflatten(-1, (c.num_heads, c.key_size)) for name in ("query", "key", "value")]
    return Weights(
        words,
        embed,
        parameter("pos_embed", "embeddings"),
        torch.stack(by_head, 1).movedim(-2, 2),
        each("attn/linear").unflatten(1, (c.num_heads, c.key_size)),
        each("mlp/linear_1"),
        each("mlp/linear_1", "b"),
        each("mlp/linear_2"),
        unembed,
    )


def _outputs(program: str, labels: list[str]) -> dict[str, tuple[str, float]]:
    """Which direction of the residual stream speaks for which word, and how loudly.

    A number has one direction; it is compared with one half of the direction that is always one.
    """
    if program in labels:
        return {MORE: (program, 2 * SURE), LESS: ("one", SURE)}
    names = {"True": BALANCED, "False": UNBALANCED}
    values = [label.removeprefix(f"{program}:") for label in labels if label.startswith(f"{program}:")]
    return {names.get(value, value): (f"{program}:{value}", SURE) for value in values}


def _structure(w: Weights, pairs: list[tuple[Words, Words]]) -> tuple[Words, Words, Words]:
    """Nodes with weights whose output the prompt decides, the other nodes with weights, and edges that carry a
    difference between the prompts of a pair: exactly zero unless a variable of the program flows there."""
    n_layers, _, n_heads, *_ = w.qkv.shape
    graph = transformer(n_layers, n_heads)
    made = {head(layer, h) for layer, h in w.out.flatten(2).abs().amax(-1).nonzero().tolist()}
    made |= {mlp(layer) for (layer,) in w.w_out.flatten(1).abs().amax(-1).nonzero().tolist()}
    reads: dict[str, Tensor] = {LOGITS: w.unembed}
    for layer in range(n_layers):
        reads[mlp(layer)] = w.w_in[layer]
        for port, weights in zip("qkv", w.qkv[layer], strict=True):
            reads |= {f"{head(layer, h)}<{port}>": weight for h, weight in enumerate(weights)}
    moved, carrying = set[str](), set[str]()
    for words, other in pairs:
        here: dict[str, Tensor] = {}
        there: dict[str, Tensor] = {}
        forward(w, torch.tensor(_ids(w, [words])), here)
        forward(w, torch.tensor(_ids(w, [other])), there)
        differ = {name: here[name][0] - there[name][0] for name in here}
        moved |= {name for name, by in differ.items() if float(by.abs().max()) > 1e-6}
        for source, destination in graph.edges.tolist():
            start, end = graph.sources[source], graph.destinations[destination]
            what = differ[start][-1:] if end == LOGITS else differ[start]
            if start in moved and float((what @ reads[end]).abs().max()) > 1e-6:
                carrying.add(f"{start}->{end}")
    nodes = tuple(name for name in graph.nodes if name in made & moved)
    constant = tuple(name for name in graph.nodes if name in made - moved)
    kept = {*nodes, INPUT, LOGITS}
    edges = tuple(
        name
        for name, (source, destination) in zip(graph.names, graph.edges.tolist(), strict=True)
        if name in carrying and graph.sources[source] in kept and node_of(graph.destinations[destination]) in kept
    )
    return nodes, constant, edges


# ---- the programs ----


def _some(vocab: str, lengths: range) -> Callable[[random.Random], Words]:
    return lambda rng: tuple(rng.choices(vocab, k=rng.choice(lengths)))


def _one_other(vocab: str) -> Callable[[random.Random, Words], Words]:
    """Another word at one place."""

    def change(rng: random.Random, words: Words) -> Words:
        at = rng.randrange(len(words))
        return (*words[:at], rng.choice([word for word in vocab if word != words[at]]), *words[at + 1 :])

    return change


def _is_balanced(words: Words) -> str:
    for opened, closed in ("()", "{}"):
        depth = 0
        for word in words:
            depth += (word == opened) - (word == closed)
            if depth < 0:
                return UNBALANCED
        if depth:
            return UNBALANCED
    return BALANCED


def _balanced(rng: random.Random) -> Words:
    """Two kinds of brackets, each balanced in itself, shuffled together."""
    n = rng.choice((4, 6, 8))
    while True:
        words = tuple(rng.choices("(){}", k=n))
        if _is_balanced(words) == BALANCED:
            return words


def _swap_or_replace(rng: random.Random, words: Words) -> Words:
    """One bracket replaced, which leaves one open; or two swapped, which can close one before it is opened."""
    if rng.random() < 0.5:
        return _one_other("(){}")(rng, words)
    i, j = sorted(rng.sample(range(len(words)), 2))
    return (*words[:i], words[j], *words[i + 1 : j], words[i], *words[j + 1 :])


_PROGRAMS = {
    "reverse": Program(
        lambda lib, rasp: lib.make_reverse(rasp.tokens), tuple("abcd"), 6, lambda words: words[0],
        _some("abcd", range(4, 7)), _one_other("abcd"), 3, "the first word, which is the last when reversed",
    ),
    "hist": Program(
        lambda lib, rasp: lib.make_hist(), tuple("abc"), 6, lambda words: str(words.count(words[-1])),
        _some("abc", range(4, 7)), _one_other("abc"), 3, "how often the last word has occurred",
    ),
    "frac_prevs": Program(
        lambda lib, rasp: lib.make_frac_prevs(rasp.tokens == "x"), tuple("xyz"), 7,
        lambda words: MORE if 2 * words.count("x") > len(words) else LESS,
        _some("xxyz", range(5, 8, 2)), _one_other("xyz"), 3, "whether more than half of the words are x",
    ),
    "shuffle_dyck": Program(
        lambda lib, rasp: lib.make_shuffle_dyck(["()", "{}"]), tuple("(){}"), 8, _is_balanced,
        _balanced, _swap_or_replace, 0, "whether two kinds of brackets are balanced, each in itself",
    ),
}  # fmt: skip
