"""Which layer carries, at which position, what differs between two prompts: exact patching of a pair that anyone types.

A prompt asks for one answer and its corrupted version for another. One run (the base) gets a single vector of the other
(the source) at one layer and one position, and the metric is read at the last position. With m the metric,

    effect[layer, position] = (m(patched) - m(base)) / (m(source) - m(base))

is 0 where nothing moved and 1 where the whole difference between the prompts did, in both directions: denoise patches
the corrupted run from the clean one, and finds what is sufficient to restore the answer; noise patches the clean run
from the corrupted one, and finds what is necessary for it. Effects may lie outside of 0 to 1, and do not add up.

Of a residual stream, a column of such a map is the path of the information: it is at the tokens that differ in layer 0,
and at the last position in the end (Meng et al. 2022, "causal tracing", with another prompt in place of noise; how the
metric and the direction matter: Heimersheim & Nanda 2024). As in `circuits.patching`, a patched run starts at the layer
that is patched and leaves the shared prefix out, and the patches of a layer share passes. What cannot move anything is
not run and is exactly 0: vectors that are equal in both runs, and those of the last layer that no block reads.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor

from circuits.patching import TOKENS_PER_PASS
from circuits.writes import copies, stored_past
from workbench import backend, pretrained, scores, sites
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.metrics import METRICS
from workbench.models import LanguageModel, Resume
from workbench.progress import track
from workbench.prompts import Prompt, Task
from workbench.registry import Prose, analysis

HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "attn": "hook_attn_out",
    "mlp": "hook_mlp_out",
    "heads": "attn.hook_z",
}
WORDS = {
    "resid_pre": "the residual stream before the block",
    "resid_post": "the residual stream after the block",
    "attn": "the output of attention",
    "mlp": "the output of the MLP",
    "heads": "the output of a head",
}
CHARACTERS, ANSWER = 20_000, 200  # of a prompt and of an answer, before anything reads them
DRAWS = 200  # of a task, until a pair fits


# ---- a pair of prompts ----


@runtime_checkable
class Reader(Protocol):
    """What reads text as tokens: a model, or its tokenizer alone."""

    @property
    def name(self) -> str: ...
    def tokenize(self, text: str) -> Int[Tensor, " pos"]: ...
    def token_strings(self, ids: Iterable[int]) -> list[str]: ...


@dataclass(frozen=True)
class Tokens:
    """A model's tokenizer without its weights; n_ctx is None where the model's configuration does not say it."""

    name: str
    n_ctx: int | None
    tokenizer: Tokenizer

    def tokenize(self, text: str) -> Int[Tensor, " pos"]:
        return torch.tensor(self.tokenizer.encode(text).ids, dtype=torch.long)

    def token_strings(self, ids: Iterable[int]) -> list[str]:
        return [self.tokenizer.decode([int(i)], skip_special_tokens=False) for i in ids]


def tokenizer_of(name: str) -> Tokens | None:
    """The tokenizer of a model that is on this machine; None if it is not. Nothing is fetched.

    Raises UserError if its files cannot be read.
    """
    if pretrained.fingerprint(name) is None:
        return None
    folder = pretrained.locate(name, convert=backend.convert_gguf).folder
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises a bare Exception
        raise UserError(
            f"the tokenizer of {name} cannot be read ({error}); the run itself reads it another way."
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    context = (config[key] for key in ("max_position_embeddings", "n_positions", "block_size") if key in config)
    return Tokens(name, next(context, None), tokenizer)


class Pair(NamedTuple):
    """Two prompts of equally many tokens, and the two tokens that the metric compares."""

    clean: Int[Tensor, " pos"]
    corrupted: Int[Tensor, " pos"]
    right: int
    wrong: int


def read_pair(
    reader: Reader, n_ctx: int | None, clean: str, corrupted: str, right: str, wrong: str, space: bool
) -> Pair:
    """The pair as tokens. Raises UserError, with the way out, for all that cannot be patched from one to the other."""
    check_texts(clean, corrupted, right, wrong)
    ids = reader.tokenize(clean), reader.tokenize(corrupted)
    if torch.equal(*ids):
        raise UserError("both prompts are the same tokens; change the words of one that ought to change the answer.")
    if len(ids[0]) != len(ids[1]):
        at = _shared(*ids)
        first = [reader.token_strings(one[at : at + 1].tolist()) for one in ids]
        words = [repr(token[0]) if token else "its end" for token in first]
        raise UserError(
            f"the clean prompt has {len(ids[0])} tokens and the corrupted one {len(ids[1])}; they first differ at "
            f"position {at}, {words[0]} and {words[1]}: pad or reword one so that they align."
        )
    if n_ctx is not None and len(ids[0]) > n_ctx:
        raise UserError(
            f"the prompts have {len(ids[0])} tokens, but {reader.name} reads at most {n_ctx}; shorten them."
        )
    tokens = [_answer(reader, clean, ids[0], text, space) for text in (right, wrong)]
    if tokens[0] == tokens[1]:
        raise UserError(f"right and wrong answer are both {reader.token_strings(tokens[:1])[0]!r}; name two words.")
    return Pair(*ids, *tokens)


def check_texts(clean: str, corrupted: str, right: str, wrong: str) -> None:
    """Raises UserError for what is not to be read as tokens at all."""
    prompts = {"clean prompt": clean, "corrupted prompt": corrupted}
    for name, text in {**prompts, "right answer": right, "wrong answer": wrong}.items():
        most = CHARACTERS if name in prompts else ANSWER
        if not text:
            raise UserError(f"the {name} is empty; type what the model reads.")
        if len(text) > most:
            raise UserError(f"the {name} has {len(text):,} characters, and at most {most:,} are read; shorten it.")
        if re.search("[\0\ud800-\udfff]", text):
            raise UserError(f"the {name} has a character that is no text (NUL or half of a pair); take it out.")


def _answer(reader: Reader, text: str, tokens: Tensor, answer: str, space: bool) -> int:
    """The token that comes next when the answer does; in place, as tokenizers merge over the end of the prompt."""
    answer = f" {answer}" if space and not answer[0].isspace() else answer
    whole = reader.tokenize(text + answer)
    n = len(tokens)
    if not torch.equal(whole[:n], tokens):
        raise UserError(
            f"{answer!r} changes how the end of the prompt is read as tokens; end the prompt a word earlier or later, "
            "and without a space."
        )
    if len(whole) != n + 1:
        parts = reader.token_strings(whole[n:].tolist())
        hint = "name another word" if answer[0].isspace() else "try a leading space"
        raise UserError(f"{answer!r} is {len(parts)} tokens {parts}; answers must be one token: {hint}.")
    return int(whole[n])


def _shared(one: Int[Tensor, "_"], other: Int[Tensor, "_"]) -> int:
    """How many tokens two sequences have in common at the beginning."""
    n = min(len(one), len(other))
    return int((one[:n] == other[:n]).long().cumprod(0).sum())


def read_positions(text: str, length: int) -> list[int]:
    """`3, 5-8, -1` as positions in order, all where it is empty. Raises UserError for what is none."""
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(-?\d{1,6})(?:-(\d{1,6}))?", part)
        if match is None:
            raise UserError(f"positions={part[:60]!r} is not understood; write 3 or 3,5-8,-1 or nothing for all.")
        first, last = int(match[1]), int(match[2] or match[1])
        if not -length <= first <= last < length:
            raise UserError(f"positions={part!r} is not in the prompt, which has positions 0 to {length - 1}.")
        found.update(at % length for at in range(first, last + 1))
    return sorted(found) or list(range(length))


# ---- pairs of a task ----


class Texts(NamedTuple):
    """A pair as it is typed. With `space`, answers are words that follow after one."""

    clean: str
    corrupted: str
    right: str
    wrong: str
    space: bool


def draw_pair(task: Task, seed: int, reader: Reader | None) -> Texts:
    """The first pair of a task that is aligned and whose answers are one token, if there is a tokenizer to tell.

    Raises UserError if none is.
    """
    rng, why = Random(seed), ""
    for _ in range(DRAWS):
        prompt = task.draw(rng)
        if reader is None:
            return _typed(prompt.clean, prompt.corrupted, prompt.answers[0], prompt.wrong[0])
        try:
            texts = _cut(prompt, reader) if prompt.whole else _first_tokens(prompt, reader)
            read_pair(reader, None, *texts)
            return texts
        except UserError as error:
            why = why or str(error)
    assert reader is not None
    raise UserError(f"no pair of {task.name} can be patched under {reader.name}'s tokenizer: {why}")


def _typed(clean: str, corrupted: str, right: str, wrong: str) -> Texts:
    if all(re.match(r" \S", answer) for answer in (right, wrong)):
        return Texts(clean, corrupted, right[1:], wrong[1:], True)
    return Texts(clean, corrupted, right, wrong, False)


def _first_tokens(prompt: Prompt, reader: Reader) -> Texts:
    """Of several answers (years), a token that begins a right one and no wrong one, and the other way round."""
    answers = prompt.answers[0], prompt.wrong[0]
    if len(prompt.answers) > 1 or len(prompt.wrong) > 1:
        n = len(reader.tokenize(prompt.clean))
        right, wrong = (
            dict.fromkeys(token for one in side for token in reader.tokenize(prompt.clean + one)[n : n + 1].tolist())
            for side in (prompt.answers, prompt.wrong)
        )
        pair = next((i for i in right if i not in wrong), None), next((i for i in wrong if i not in right), None)
        if pair[0] is None or pair[1] is None:
            raise UserError("no token begins a right answer alone, or none a wrong one.")
        answers = (reader.token_strings([pair[0]])[0], reader.token_strings([pair[1]])[0])
    return _typed(prompt.clean, prompt.corrupted, *answers)


def _cut(prompt: Prompt, reader: Reader) -> Texts:
    """Two lines, each the right one for its own beginning, cut before the first token in which their rests differ."""
    texts, rests = (prompt.clean, prompt.corrupted), (prompt.answers[0], prompt.wrong[0])
    lines = [reader.tokenize(text + rest) for text, rest in zip(texts, rests, strict=True)]
    at = min(_shared(reader.tokenize(text), line) for text, line in zip(texts, lines, strict=True))
    at += _shared(lines[0][at:], lines[1][at:])
    if at >= min(map(len, lines)):
        raise UserError("the rest of one line is the beginning of the other's.")
    start = _shared(reader.tokenize(""), lines[0])  # what the tokenizer puts before every text is not typed
    clean, corrupted = ("".join(reader.token_strings(line[start:at].tolist())) for line in lines)
    right, wrong = reader.token_strings([int(line[at]) for line in lines])
    return _typed(clean, corrupted, right, wrong)


# ---- patching ----


class Cell(NamedTuple):
    """A cell of the map; `at` is a position, or a head."""

    layer: int
    at: int
    effect: float
    metric: float


@dataclass(frozen=True)
class PositionEffects:
    """
    effect            share of the difference between the prompts that moved; NaN where a position was left out
    metric            of each patched run
    clean, corrupted  the metric of the two prompts, nothing patched
    differing         positions at which the prompts are not the same token
    heads             whether cells are heads, patched at all `positions` at once; otherwise they are positions
    definition        what the number is
    """

    effect: Float[Tensor, "layer cell"]
    metric: Float[Tensor, "layer cell"]
    clean: float
    corrupted: float
    clean_tokens: tuple[str, ...]
    corrupted_tokens: tuple[str, ...]
    differing: tuple[int, ...]
    right: str
    wrong: str
    heads: bool
    positions: tuple[int, ...]
    unit: str
    definition: str

    def strongest(self, k: int) -> list[Cell]:
        """The k cells of largest absolute effect, without those where nothing moved."""
        n = self.effect.shape[1]
        found = [
            Cell(*divmod(i, n), effect, metric)
            for i, (effect, metric) in enumerate(
                zip(self.effect.flatten().tolist(), self.metric.flatten().tolist(), strict=True)
            )
            if math.isfinite(effect) and effect
        ]
        return sorted(found, key=lambda cell: -abs(cell.effect))[:k]

    def summary(self) -> dict[str, Any]:
        named: list[list[Any]] = [
            [scores.head(cell.layer, cell.at) if self.heads else f"{cell.layer}:{cell.at}", round(cell.effect, 5)]
            for cell in self.strongest(10)
        ]
        found = {"top_heads" if self.heads else "top_cells": named} if named else {}
        metrics = {f"{self.unit}_clean": self.clean, f"{self.unit}_corrupted": self.corrupted}
        return {**found, **metrics, "unit": "share of the difference", "definition": self.definition}


@analysis("position-patching", version=1)
def position_patching(
    model: LanguageModel,
    store: ActivationStore,
    *,
    clean: Prose = "When Mary and John went to the store, John gave a book to",
    corrupted: Prose = "When Mary and John went to the store, Mary gave a book to",
    right: Prose = "Mary",
    wrong: Prose = "John",
    space: bool = True,
    what: Literal["resid_pre", "resid_post", "attn", "mlp", "heads"] = "resid_pre",
    direction: Literal["noise", "denoise"] = "denoise",
    metric: Literal["logit_diff", "prob_diff"] = "logit_diff",
    positions: str = "",
) -> PositionEffects:
    """Which layer and position carry the difference between two prompts that you type.

    clean      the prompt
    corrupted  the same with other words, of equally many tokens
    right      what comes after the clean prompt, one token
    wrong      what comes after the corrupted one
    space      put a space before answers that begin with none
    what       is patched: the residual stream before or after a block, the output of attention or MLP, or each head
    direction  noise: clean run, vector from the corrupted one; denoise: corrupted run, vector from the clean one
    metric     logit or probability of the right answer minus that of the wrong one
    positions  only these, as 3,5-8,-1; heads are patched at all of them at once
    """
    pair = read_pair(model, model.config.n_ctx, clean, corrupted, right, wrong, space)
    at = read_positions(positions, len(pair.clean))
    both = (pair.corrupted, pair.clean) if direction == "denoise" else (pair.clean, pair.corrupted)
    runs = _Patches(model, store, *both, what, at)

    def measure(logits: Tensor) -> Float[Tensor, " row"]:
        answers = [[torch.tensor([token])] * len(logits) for token in (pair.right, pair.wrong)]
        return METRICS[metric](logits.float(), *answers).double()

    ends = torch.cat([runs.end(run, run) for run in ("base", "source")])
    base, source = measure(ends).tolist()
    scale = max(1.0, float(ends[:, [pair.right, pair.wrong]].abs().max()))
    if not abs(source - base) > 8 * torch.finfo(model.dtype).eps * scale:
        raise UserError(
            f"{metric} is {base:.4g} on one prompt and {source:.4g} on the other, no further apart than rounding; "
            "change words on which the answer depends."
        )
    cells = model.config.n_heads if what == "heads" else len(pair.clean)
    patched = torch.full((model.config.n_layers, cells), torch.nan, dtype=torch.float64)
    patched[:, slice(None) if what == "heads" else at] = base
    with track(total=model.config.n_layers, desc="position patching") as bar:
        for layer in range(model.config.n_layers):
            for some in runs.passes(layer):
                patched[layer, some] = measure(runs.patched(layer, some))
            bar.update()
    from_, into = ("clean", "corrupted") if direction == "denoise" else ("corrupted", "clean")
    one = "all chosen positions" if what == "heads" else "one position"
    return PositionEffects(
        effect=((patched - base) / (source - base) + 0.0).float(),  # no negative zeros
        metric=patched.float(),
        clean=source if direction == "denoise" else base,
        corrupted=base if direction == "denoise" else source,
        clean_tokens=tuple(model.token_strings(pair.clean.tolist())),
        corrupted_tokens=tuple(model.token_strings(pair.corrupted.tolist())),
        differing=tuple((pair.clean != pair.corrupted).nonzero()[:, 0].tolist()),
        right=model.token_strings([pair.right])[0],
        wrong=model.token_strings([pair.wrong])[0],
        heads=what == "heads",
        positions=tuple(at),
        unit=metric,
        definition=f"how far {metric} moves when the {into} run gets {WORDS[what]} at {one} from the {from_} run, as a "
        "share of the whole difference between the prompts: 0 nothing moved, 1 all of it",
    )


class _Patches:
    """Every patched run of one pair, from stored activations."""

    def __init__(
        self, model: LanguageModel, store: ActivationStore, base: Tensor, source: Tensor, what: str, at: Sequence[int]
    ):
        self.model, self.what, self.at = model, what, list(at)
        self.tokens = {"base": base, "source": source}
        self.last = model.config.n_layers - 1
        self.prefix = int((base != source).nonzero()[0])  # before this both runs are the same
        self.hooks = [sites.block(layer, HOOKS[what]) for layer in range(model.config.n_layers)]
        starts = [sites.block(layer, "hook_resid_pre") for layer in range(model.config.n_layers)]
        wanted = dict.fromkeys([*starts, *self.hooks, model.hook_points[-1]])
        found = store.get(model, [base, source], list(wanted))
        self.of = {"base": {hook: rows[0] for hook, rows in found.items()}}
        self.of["source"] = {hook: rows[1] for hook, rows in found.items()}
        self.past = stored_past(model, store, [base], self.prefix)

    def end(self, resid: str, token: str) -> Float[Tensor, "1 vocab"]:
        """Logits of a run's last residual stream, of which some models add what the token itself says."""
        last = self.of[resid][self.model.hook_points[-1]][-1:]
        return self.model.unembed(last, self.tokens[token][-1:]).cpu()

    def passes(self, layer: int) -> list[list[int]]:
        """The cells of a layer that may move anything, in groups of one forward pass."""
        base, source = (self.of[run][self.hooks[layer]] for run in ("base", "source"))
        length = len(base)
        at = [i for i in self.at if i >= self.prefix and self._is_read(layer, i, length)]
        if self.what == "heads":
            cells = [h for h in range(base.shape[1]) if not torch.equal(base[at, h], source[at, h])]
        else:
            cells = [i for i in at if not torch.equal(base[i], source[i])]
        per_pass = max(1, TOKENS_PER_PASS // (length - self.prefix))
        return [cells[start : start + per_pass] for start in range(0, len(cells), per_pass)]

    def _is_read(self, layer: int, at: int, length: int) -> bool:
        """After the attention of the last layer, only the last position is read by anything."""
        return layer < self.last or at == length - 1 or self.what == "resid_pre"

    def patched(self, layer: int, cells: list[int]) -> Float[Tensor, "cell vocab"]:
        """Logits at the last position, for each cell that is patched alone."""
        if self.what == "resid_post" and layer == self.last:
            return self.end("source", "base")
        k, hook = len(cells), self.hooks[layer]
        source = self.of["source"][hook][self.prefix :].to(self.model.device, self.model.dtype)
        chosen = [i - self.prefix for i in self.at if i >= self.prefix]

        def patch(x: Tensor) -> Tensor:
            x = x.clone()
            for copy, cell in enumerate(cells):
                if self.what == "heads":
                    x[copy, chosen, cell] = source[chosen, cell]
                else:
                    x[copy, cell - self.prefix] = source[cell - self.prefix]
            return x

        first = layer + (self.what == "resid_post")
        resid = self.of["base"][sites.block(first, "hook_resid_pre")][None, self.prefix :]
        resid = resid.to(self.model.device, self.model.dtype).repeat(k, 1, 1)
        inside = not self.what.startswith("resid")
        start = Resume(first, resid if inside else patch(resid), copies(self.past, k, first))
        tokens = self.tokens["base"].repeat(k, 1)
        out = self.model.run(tokens, edit={hook: patch} if inside else {}, logits="last", start=start).logits
        assert out is not None
        return out[:, -1].cpu()
