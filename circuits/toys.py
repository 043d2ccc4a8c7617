"""Small models whose circuit is known, to hold every discovery method to.

Three are trained here, and their circuit is then measured, not assumed: every subset of their nodes is run with all
other nodes resampled from the corrupted prompt, and the truth is the smallest subset that keeps the behaviour. Models
whose circuit is known because a compiler put it there are in `circuits/tracr_models.py`. All are disguised
(`circuits/toy_weights.py`): among the nodes are heads that write as much as the real ones and change nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from circuits.graph import INPUT, LOGITS, PORTS, Graph, node_of
from circuits.toy_weights import Weights, accuracy, disguise, to_model, train
from workbench import sites
from workbench.errors import UserError, unknown
from workbench.interventions import resample, steer
from workbench.models import LanguageModel
from workbench.passes import Edit
from workbench.prompts import Batch, Prompt, Task, sample
from workbench.scores import every_head, head, mlp

BOS = "bos"  # the first word of every prompt: heads with nothing to do can look at it
FAITHFUL = 0.9  # share of the behaviour that a circuit has to keep
CARRIES = 0.05  # share of the behaviour that is lost when an edge of it is patched
DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Toy:
    """A model, a task, and the circuit by which the model does the task.

    nodes      the circuit; patching any of them from the corrupted prompt changes the answer of some prompts
    edges      its edges, named as in `circuits.graph.Graph`; of a trained toy those that exact patching finds to carry
    constant   nodes that the model needs but whose output is the same for all prompts of one length: no method that
               compares prompts can find them, only one that ablates
    headline   what was measured when the model was made: accuracy, faithfulness of the circuit, frequencies
    """

    name: str
    model: LanguageModel
    task: Task
    nodes: tuple[str, ...]
    edges: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()
    headline: Mapping[str, Any] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        return Graph.of(self.model.config)

    def batch(self, n: int, seed: int = 0) -> Batch:
        """n different pairs of prompts. Raises UserError when the task has fewer."""
        return sample(self.task, self.model, n, seed)


# ---- the circuit of a model, by trying all ----


def faithfulness(model: LanguageModel, batch: Batch, kept: Iterable[str]) -> float:
    """Share of the metric that is left when every head and MLP that is not kept is resampled from the corrupted prompt.

    (m(kept) - m(nothing)) / (m(everything) - m(nothing)), each m a mean over the prompts, at all positions.
    Raises UserError for unknown nodes and prompts of several lengths.
    """
    clean, corrupted = _stacked(batch)
    places = {node: _site(node) for node in Graph.of(model.config).nodes}
    kept = set(kept)
    for node in kept - places.keys():
        raise unknown(f"node of {model.name}", node, places)
    found = model.run(corrupted, capture=places.values(), logits="none")

    def metric(nodes: set[str]) -> float:
        edit: dict[str | sites.Site, Edit] = {
            places[node]: resample(found[places[node]]) for node in places.keys() - nodes
        }
        return float(batch.score(_last(model, clean, edit)).mean())

    nothing, everything = metric(set()), metric(set(places))
    return (metric(kept) - nothing) / (everything - nothing)


def _stacked(batch: Batch) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    if len(batch.buckets()) > 1:
        raise UserError("the prompts have several lengths; take one bucket: batch.select(batch.buckets()[0]).")
    return torch.stack(batch.clean), torch.stack(batch.corrupted)


def _site(node: str) -> sites.Site:
    layer, _, index = node[1:].partition(".h")
    if index:
        return sites.Site(sites.block(int(layer), "attn.hook_z"), head=int(index))
    return sites.Site(sites.block(int(layer), "hook_mlp_out"))


def smallest_circuit(model: LanguageModel, batch: Batch, nodes: Iterable[str]) -> tuple[tuple[str, ...], float]:
    """The smallest subset of some nodes that is faithful to FAITHFUL, the best of its size, found by trying all.

    Raises UserError if not even all of the nodes are.
    """
    nodes = tuple(nodes)
    for size in range(len(nodes) + 1):
        tried = {subset: faithfulness(model, batch, subset) for subset in combinations(nodes, size)}
        best = max(tried, key=lambda subset: tried[subset])
        if tried[best] >= FAITHFUL:
            return best, tried[best]
    raise UserError(f"all of {', '.join(nodes)} keep only {tried[best]:.2f} of the behaviour; a node is missing.")


def edge_effects(model: LanguageModel, batch: Batch, edges: Iterable[str]) -> dict[str, Float[Tensor, " batch"]]:
    """Exact patching of single edges: the destination alone reads what the source wrote on the corrupted prompt.

    Not `circuits.edge_patching`, on purpose: the truth that it is held to must not be its own.
    Metric of the clean run minus that of the patched run, per prompt. A model without norms reads sums, so that the
    change of one source can be added to what one destination reads.
    Raises UserError for a model with norms, unknown edges and prompts of several lengths.
    """
    if not isinstance(model.attention_norm(0), nn.Identity):
        raise UserError(f"{model.name} has norms: what a node reads is no sum, and edges cannot be patched this way.")
    edges, known = tuple(edges), Graph.of(model.config).index
    for edge in set(edges) - known.keys():
        raise unknown(f"edge of {model.name}", edge, known)
    layers, n_heads = range(model.config.n_layers), range(model.config.n_heads)
    parts = ("attn.hook_result", "hook_mlp_out")
    hooks = ["hook_embed", *(sites.block(layer, part) for layer in layers for part in parts)]
    clean, corrupted = _stacked(batch)
    here, there = (model.run(x, capture=hooks, logits="none") for x in (clean, corrupted))
    differ = {INPUT: there["hook_embed"] - here["hook_embed"]}
    for layer in layers:
        result, out = (there[hook] - here[hook] for hook in (sites.block(layer, part) for part in parts))
        differ |= {mlp(layer): out} | {head(layer, h): result[:, :, h] for h in n_heads}
    unpatched = batch.score(_last(model, clean))
    effects = {}
    for edge in edges:
        source, destination = edge.split("->")
        site, read = _reader(model, destination)
        by = differ[source] if read is None else differ[source] @ read
        effects[edge] = unpatched - batch.score(_last(model, clean, {site: steer(by, 1.0)}))
    return effects


def _reader(model: LanguageModel, destination: str) -> tuple[sites.Site, Tensor | None]:
    """Where what a destination reads can be edited, and the matrix through which it gets there."""
    if destination == LOGITS:
        return sites.Site(sites.block(model.config.n_layers - 1, "hook_resid_post")), None
    layer, _, index = node_of(destination)[1:].partition(".h")
    if not index:
        return sites.Site(sites.block(int(layer), "hook_mlp_in")), None
    port = destination[-2]
    read = model.in_weights(int(layer))[0][PORTS.index(port), int(index)]
    return sites.Site(sites.block(int(layer), f"attn.hook_{port}"), head=int(index)), read.T


def _last(model: LanguageModel, tokens: Tensor, edit: Mapping[str | sites.Site, Edit] | None = None) -> Tensor:
    logits = model.run(tokens, edit=edit, logits="last").logits
    assert logits is not None
    return logits[:, -1]


# ---- induction ----

_LENGTH, _FIRST_COPY, _INDUCTION_WORDS = 16, range(9, 13), 24


def _induction_batch(generator: torch.Generator, n: int = 64) -> tuple[Tensor, Tensor]:
    """Words that begin again after 9 to 12; asked where the next word follows from the first copy."""
    drawn = torch.rand(n, _INDUCTION_WORDS, generator=generator).argsort(1) + 1
    first = torch.randint(_FIRST_COPY.start, _FIRST_COPY.stop, (n, 1), generator=generator)
    words = drawn.gather(1, torch.arange(_LENGTH + 1) % first)
    position = torch.arange(_LENGTH)
    targets = torch.where(position >= first, words[:, 1:], -100)
    begin = torch.zeros(n, 1, dtype=torch.long)
    return torch.cat([begin, words[:, :-1]], 1), torch.cat([begin - 100, targets], 1)


def _induction_prompt(rng: random.Random) -> Prompt:
    n = rng.choice(_FIRST_COPY)
    again = _LENGTH - n
    drawn = [f"w{i}" for i in rng.sample(range(_INDUCTION_WORDS), 2 * n)]
    copy, other = drawn[:n], drawn[n:]
    answer, wrong = copy[again], rng.choice(copy[again + 1 :])
    clean, corrupted = (" ".join((BOS, *first, *copy[:again])) for first in (copy, other))
    return Prompt(clean, corrupted, (f" {answer}",), (f" {wrong}",))


def induction(seed: int = 0, *, noise_heads: int = 7) -> Toy:
    """Two layers of attention alone, one head each, trained to continue a list of words that begins again.

    The first copy varies in length, so looking back a fixed distance does not do, and in the corrupted prompt it
    consists of other words. Known from Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", and
    Olsson et al. 2022, arXiv 2209.11895: a head that attends to the previous word, and one that reads it in its keys.
    With more heads to train, the model spreads both over all of them, and no small circuit is faithful.
    """
    generator = torch.Generator().manual_seed(seed)
    words = (BOS, *(f"w{i}" for i in range(_INDUCTION_WORDS)))
    w = Weights.random(words, _LENGTH + 1, 32, 2, 1, 0, generator, d_head=16)
    w = train(w, _induction_batch, generator, steps=400, rate=1e-2)
    right = accuracy(w, *_induction_batch(generator, 1000))
    task = Task("toy-induction", 1, "logit_diff", _induction_prompt, "a list of words that begins again")
    return _finished("toy-induction", w, task, generator, noise_heads, {"accuracy": right})


def _finished(
    name: str, w: Weights, task: Task, generator: torch.Generator, noise_heads: int, headline: dict[str, Any]
) -> Toy:
    """Disguise trained weights, and measure which of their nodes and edges are the circuit."""
    n_layers, _, n_heads, *_ = w.qkv.shape
    real = [*every_head(n_layers, n_heads)]
    real += [mlp(layer) for layer in range(n_layers) if w.w_in.shape[-1]]
    at = {word: i for i, word in enumerate(w.words)}
    rng = random.Random(0)
    examples = torch.tensor([[at[word] for word in task.draw(rng).clean.split()] for _ in range(32)])
    model = to_model(disguise(w, examples, generator, heads=noise_heads, neurons=0), name)
    batch = sample(task, model, 48, seed=0)
    nodes, faithful = smallest_circuit(model, batch, real)
    graph = Graph.of(model.config)
    among = [name for name, kept in zip(graph.names, graph.between(nodes).tolist(), strict=True) if kept]
    unpatched = batch.score(_last(model, torch.stack(batch.clean))).mean()
    effects = edge_effects(model, batch, among)
    edges = tuple(edge for edge in among if abs(effects[edge].mean()) > CARRIES * unpatched)
    return Toy(name, model, task, nodes, edges, headline=headline | {"faithfulness": faithful})


# ---- indirect object identification, symbolic ----

_NAMES = tuple("ABCDEF")


def _ioi_prompt(rng: random.Random) -> Prompt:
    first, second, *others = rng.sample(_NAMES, 5)
    subject, answer = (first, second) if rng.random() < 0.5 else (second, first)
    clean, corrupted = (" ".join((BOS, *names, "to")) for names in ((first, second, subject), others))
    return Prompt(clean, corrupted, (f" {answer}",), tuple(f" {name}" for name in _NAMES if name != answer))


def _ioi_batch() -> tuple[Tensor, Tensor]:
    """All 60 prompts; words are numbered bos, to, A, B, ..."""
    n = len(_NAMES)
    rows = [(0, a, b, s, 1, a + b - s) for a in range(2, n + 2) for b in range(2, n + 2) for s in (a, b) if a != b]
    every = torch.tensor(rows)
    targets = torch.full((len(rows), 5), -100)
    targets[:, -1] = every[:, -1]
    return every[:, :-1], targets


def symbolic_ioi(seed: int = 0, *, noise_heads: int = 6) -> Toy:
    """One layer of attention alone, two heads of width 4: `bos A B A to` is continued by the name that came once.

    Adhikari 2025, arXiv 2510.25013: such a model is perfect; there one head adds the names and the other takes the
    repeated one away, here how they share it depends on the seed. Every other name is a wrong answer: between the two
    names of the prompt alone, one head can decide. The corrupted prompt has three other names, none of them twice.
    Trained anew until it is perfect on all 60 prompts.
    """
    generator = torch.Generator().manual_seed(seed)
    attempts = 10
    for _ in range(attempts):
        w = Weights.random((BOS, "to", *_NAMES), 5, 8, 1, 2, 0, generator)
        w = train(w, lambda _: _ioi_batch(), generator, steps=400, rate=2e-2)
        if accuracy(w, *_ioi_batch()) == 1:
            break
    else:
        raise UserError(f"symbolic_ioi({seed}) did not become perfect in {attempts} attempts; try another seed.")
    task = Task("toy-ioi", 1, "logit_diff", _ioi_prompt, "the name that occurs once")
    return _finished("toy-ioi", w, task, generator, noise_heads, {"accuracy": 1.0})


# ---- modular addition ----

MODULUS = 31
TRAINED_ON = 0.5  # share of the pairs


def _modular_pairs(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Tokens `a b =` and targets of the pairs to train on, and of the rest."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.cartesian_prod(torch.arange(MODULUS), torch.arange(MODULUS)).T
    tokens = torch.stack([a, b, torch.full_like(a, MODULUS)], 1)
    targets = torch.stack([torch.full_like(a, -100), torch.full_like(a, -100), (a + b) % MODULUS], 1)
    order = torch.randperm(MODULUS**2, generator=generator)
    split = int(TRAINED_ON * len(order))
    return (tokens[order[:split]], targets[order[:split]]), (tokens[order[split:]], targets[order[split:]])


def _modular_prompt(rng: random.Random) -> Prompt:
    a, b = rng.randrange(MODULUS), rng.randrange(MODULUS)
    other = rng.choice([x for x in range(MODULUS) if x != a])
    pair, corrupted = ((a, b), (other, b)) if rng.random() < 0.5 else ((b, a), (b, other))
    return Prompt(
        f"{pair[0]} {pair[1]} =", f"{corrupted[0]} {corrupted[1]} =",
        (f" {(a + b) % MODULUS}",), (f" {(other + b) % MODULUS}",),
    )  # fmt: skip


def train_modular_addition(seed: int = 0, folder: Path = DATA) -> Path:
    """Train on a share of all pairs until the rest is solved too (grokking: Power et al. 2022; Nanda et al. 2023).

    What was measured on the way is in the file's metadata. The file of seed 0 that comes with the package was made by
    `python -c "from circuits.toys import train_modular_addition as train; train(0)"`.
    """
    seen, unseen = _modular_pairs(seed)
    generator = torch.Generator().manual_seed(seed)
    w = Weights.random((*map(str, range(MODULUS)), "="), 3, 32, 1, 4, 96, generator)
    measured: dict[str, str] = {}

    def watch(step: int, w: Weights) -> bool:
        if step % 100:
            return False
        measured[f"{step:05}"] = f"{accuracy(w, *seen):.4f} {accuracy(w, *unseen):.4f}"
        return list(measured.values())[-3:] == ["1.0000 1.0000"] * 3

    w = train(w, lambda _: seen, generator, steps=20_000, rate=6e-3, decay=1.0, watch=watch)
    folder.mkdir(exist_ok=True)
    path = folder / f"modular-addition-{seed}.safetensors"
    save_file(w.map(Tensor.contiguous).tensors(), path, metadata=measured)
    return path


def key_frequencies(embed: Float[Tensor, "modulus d_model"], share: float = 0.9) -> tuple[list[int], float]:
    """The frequencies k of cos(2 pi k a / p) and sin(...) that hold a share of the embedding's variance, and theirs."""
    power = torch.fft.rfft(embed.double(), dim=0).abs().square().sum(1)[1:]
    order = power.argsort(descending=True)
    n = int((power[order].cumsum(0) / power.sum() < share).sum()) + 1
    return sorted((order[:n] + 1).tolist()), float(power[order[:n]].sum() / power.sum())


def modular_addition(seed: int = 0, *, noise_heads: int = 2, folder: Path = DATA) -> Toy:
    """One layer trained on a + b mod 31 until it generalised: `a b =` is continued by the sum.

    Nanda et al. 2023, arXiv 2301.05217: the embedding holds a few frequencies, and the MLP multiplies them.
    Raises UserError for a seed whose trained weights are not in the folder.
    """
    path = folder / f"modular-addition-{seed}.safetensors"
    if not path.exists():
        raise UserError(f"there is no {path}; make it with train_modular_addition({seed}), a minute or two.")
    w = Weights((*map(str, range(MODULUS)), "="), **load_file(path))
    with safe_open(path, "pt") as file:
        curve = [(int(step), *map(float, both.split())) for step, both in sorted(file.metadata().items())]
    memorised = next(point for point in curve if point[1] == 1)
    frequencies, share = key_frequencies(w.embed[:MODULUS])
    headline = {
        "memorised": {"step": memorised[0], "accuracy_seen": memorised[1], "accuracy_unseen": memorised[2]},
        "generalised": {"step": curve[-1][0], "accuracy_seen": curve[-1][1], "accuracy_unseen": curve[-1][2]},
        "key_frequencies": frequencies,
        "share_of_embedding": share,
    }
    task = Task("toy-modular-addition", 1, "logit_diff", _modular_prompt, f"the sum of two numbers modulo {MODULUS}")
    generator = torch.Generator().manual_seed(seed)
    return _finished("toy-modular-addition", w, task, generator, noise_heads, headline)
