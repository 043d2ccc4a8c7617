"""The weights of a planted circuit (`circuits.planted`), layer by layer, where every variable has its own coordinates.

The residual stream has d_model - 1 coordinates (LayerNorm takes one away). A variable is a few of them, one-hot: "the
word is `red`" is coordinate 7. What a node of the circuit needs is then a few numbers: a head whose query reads
coordinate 3 and whose key reads coordinate 9 looks from where 3 is on to where 9 is on; its values and outputs copy
coordinates to coordinates; an MLP has one neuron for each row of a table. All other parts of all nodes are random: they
read what anybody writes and write into coordinates that no node of the circuit reads. Some heads look exactly where a
head of the circuit looks, and are decoys.

Scales depend on the norm, and the norm on all that was written before. So the model is grown on example prompts: each
layer is built from the residual stream that the layers before it have made, and what is "on" there is read as 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

EPSILON = 1e-5  # of the norm
SINK = 6.0  # how much more a query that finds nothing likes the first position than any other
ANSWER_LOGIT = 8.0
LOUDNESS = (0.3, 1.8)  # norm of what a distractor writes, drawn from this range, times `Plan.loud`
RIDER = (0.4, 1.4)  # norm of what a node of the circuit writes beside its part in it


class Read(NamedTuple):
    """What one port of a node reads.

    coords    coordinates, scaled so that they are 1 where they are on
    at        the positions where they are on
    paired    coordinate i is on at position at[i] (a code of positions); else one of them is on at each position
    writers   nodes that write there
    varies    whether what is read there differs between the clean and the corrupted prompt
    """

    coords: tuple[int, ...]
    at: tuple[int, ...]
    paired: bool
    writers: tuple[str, ...]
    varies: bool


class Match(NamedTuple):
    """A term of a head's attention: it looks from where `query` is on to where the same entry of `key` is on."""

    query: Read
    key: Read
    sign: float = 1.0


class Head(NamedTuple):
    """A head of the circuit: where it looks, what it copies from there, and where to."""

    matches: tuple[Match, ...]
    value: Read
    writes: tuple[int, ...]
    gain: float


class Mlp(NamedTuple):
    """An MLP of the circuit: a table from the values of one or two variables, row by row, to entries of `writes`.

    A row's neuron is off below `low` and, if there is a `high`, constant above it: 1 is a full input.
    """

    inputs: tuple[Read, ...]
    table: tuple[int, ...]
    writes: tuple[int, ...]
    low: float
    high: float | None
    gain: float


@dataclass(frozen=True)
class Plan:
    """All that decides the weights, but chance.

    codes      coordinates of the positions; `hot` are positions that matter, which distractors prefer to look at
    words      coordinates of the words; `variables` those of what the circuit computes; distractors read both
    junk       coordinates that only distractors write to
    sharpness  attention logit by which a match beats the first position
    loud       factor to the norm of what distractors write
    final      what the unembedding reads, and `answers` the words for its entries
    """

    n_layers: int
    n_heads: int
    d_head: int
    codes: tuple[int, ...]
    hot: tuple[int, ...]
    words: tuple[int, ...]
    variables: tuple[int, ...]
    junk: tuple[int, ...]
    heads: Mapping[tuple[int, int], Head]
    mlps: Mapping[int, Mlp]
    sharpness: float
    loud: float
    final: Read
    answers: tuple[int, ...]

    @property
    def d_model(self) -> int:
        return self.n_heads * self.d_head


@dataclass(frozen=True)
class Layer:
    """Rows that read (q, k, v, w_in) and rows that write (out, w_out), in coordinates; only queries and neurons have
    biases."""

    q: Float[Tensor, "head d_head coord"]
    q_bias: Float[Tensor, "head d_head"]
    k: Float[Tensor, "head d_head coord"]
    v: Float[Tensor, "head d_head coord"]
    out: Float[Tensor, "head d_head coord"]
    w_in: Float[Tensor, "d_mlp coord"]
    b_in: Float[Tensor, " d_mlp"]
    w_out: Float[Tensor, "d_mlp coord"]


@dataclass(frozen=True)
class Weights:
    embed: Float[Tensor, "vocab coord"]
    codes: Float[Tensor, "pos coord"]
    layers: tuple[Layer, ...]
    unembed: Float[Tensor, "vocab coord"]


def grow(
    plan: Plan,
    embed: Float[Tensor, "vocab coord"],
    codes: Float[Tensor, "pos coord"],
    tokens: Int[Tensor, "batch pos"],
    generator: torch.Generator,
) -> Weights:
    """The weights of a plan, scaled on example prompts."""
    x = embed[tokens] + codes
    layers = []
    for index in range(plan.n_layers):
        seen = normed(x)
        heads = [_head(plan, index, h, seen, generator) for h in range(plan.n_heads)]
        q, q_bias, k, v, out = (torch.stack(parts) for parts in zip(*heads, strict=True))
        x = x + attend(seen, q, q_bias, k, v, out)
        seen = normed(x)
        w_in, b_in, w_out = _mlp(plan, index, seen, generator)
        x = x + (seen @ w_in.T + b_in).relu() @ w_out
        layers.append(Layer(q, q_bias, k, v, out, w_in, b_in, w_out))
    unembed = torch.zeros_like(embed)
    unembed[list(plan.answers)] = ANSWER_LOGIT * _rows(plan.final, normed(x))
    return Weights(embed, codes, tuple(layers), unembed)


def normed(x: Float[Tensor, "*any coord"]) -> Float[Tensor, "*any coord"]:
    """LayerNorm, where the mean over d_model is zero by construction."""
    return x / (x.square().sum(-1, keepdim=True) / (x.shape[-1] + 1) + EPSILON).sqrt()


def attend(
    seen: Float[Tensor, "batch pos coord"],
    q: Float[Tensor, "head d_head coord"],
    q_bias: Float[Tensor, "head d_head"],
    k: Float[Tensor, "head d_head coord"],
    v: Float[Tensor, "head d_head coord"],
    out: Float[Tensor, "head d_head coord"],
) -> Float[Tensor, "batch pos coord"]:
    """What causal softmax attention writes, summed over heads."""
    queries = torch.einsum("bpc,hdc->bhpd", seen, q) + q_bias[:, None]
    keys = torch.einsum("bpc,hdc->bhpd", seen, k)
    z = _pattern(queries @ keys.mT / math.sqrt(q.shape[1])) @ torch.einsum("bpc,hdc->bhpd", seen, v)
    return torch.einsum("bhpd,hdc->bpc", z, out)


def _pattern(scores: Float[Tensor, "*batch pos key"]) -> Float[Tensor, "*batch pos key"]:
    late = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(late, -torch.inf).softmax(-1)


# ---- heads ----


def _head(
    plan: Plan, layer: int, index: int, seen: Float[Tensor, "batch pos coord"], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows q, q_bias, k, v, out of one head: the circuit's, if it has a part in it, and random ones in the rest."""
    n, head = seen.shape[-1], plan.heads.get((layer, index))
    model = head or _imitated(plan, layer, generator)
    q, k = _looks(plan, model, seen) if model else _looks_anywhere(plan, seen, generator)
    q_bias = seen.new_zeros(len(q))
    if model:  # a query that finds nothing looks at the first position
        q = torch.cat([q, q.new_zeros(1, n)])
        k = torch.cat([k, _rows(_positions(plan, (0,)), seen)])
        q_bias = torch.cat([q_bias, q_bias.new_full((1,), SINK * math.sqrt(plan.d_head))])
    own = len(head.writes) if head else 0
    v, out = seen.new_zeros(plan.d_head, n), seen.new_zeros(plan.d_head, n)
    v[own:] = _anything(plan, plan.d_head - own, seen, generator)
    out[own:] = _random_rows(plan.d_head - own, plan.junk, seen, generator)
    scores = (seen @ q.T + q_bias) @ (seen @ k.T).mT / math.sqrt(plan.d_head)
    out *= _loudness(plan, head is not None, generator) / _peak(_pattern(scores) @ (seen @ v.T) @ out)
    if head:
        v[:own] = _rows(head.value, seen)
        out[range(own), list(head.writes)] = head.gain
    turn, turn_out = (_rotation(plan.d_head, generator).to(seen.dtype) for _ in range(2))
    used = turn[:, : len(q)]
    return used @ q, used @ q_bias, used @ k, turn_out @ v, turn_out @ out


def _imitated(plan: Plan, layer: int, generator: torch.Generator) -> Head | None:
    """For every other distractor, if possible, a head of the circuit that it looks like: what that one reads is there
    from its own layer on."""
    known = [head for (at, _), head in sorted(plan.heads.items()) if at <= layer]
    if not known or float(torch.rand((), generator=generator)) < 0.5:
        return None
    return known[int(torch.randint(len(known), (), generator=generator))]


def _looks(plan: Plan, head: Head, seen: Tensor) -> tuple[Tensor, Tensor]:
    height = (plan.sharpness + SINK) * math.sqrt(plan.d_head)
    q = torch.cat([match.sign * height * _rows(match.query, seen) for match in head.matches])
    return q, torch.cat([_rows(match.key, seen) for match in head.matches])


def _looks_anywhere(plan: Plan, seen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Queries and keys of a distractor: by position, by content (sharp), or spread over everything (flat)."""
    n_pos = seen.shape[1]
    kind, height = torch.rand(2, generator=generator, dtype=seen.dtype).tolist()
    if kind < 0.4:
        to = []
        for here in range(n_pos):
            options = [p for p in plan.hot if p <= here] or [0]
            anywhere = int(torch.randint(here + 1, (), generator=generator))
            preferred = options[int(torch.randint(len(options), (), generator=generator))]
            to.append(preferred if float(torch.rand((), generator=generator)) < 0.7 else anywhere)
        q = _rows(_positions(plan, tuple(range(n_pos))), seen)
        k = _rows(_positions(plan, tuple(range(n_pos))), seen)[to]
        return (2 + 6 * height) * math.sqrt(plan.d_head) * q, k
    rank = min(8, plan.d_head)
    q, k = (_anything(plan, rank, seen, generator) for _ in range(2))
    scores = (seen @ q.T) @ (seen @ k.T).mT / math.sqrt(plan.d_head)
    return q * ((1 + 3 * height) if kind < 0.8 else 0.3) / scores.std(), k


def _positions(plan: Plan, at: tuple[int, ...]) -> Read:
    return Read(tuple(plan.codes[p] for p in at), at, True, ("input",), False)


# ---- MLPs ----


def _mlp(
    plan: Plan, layer: int, seen: Float[Tensor, "batch pos coord"], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """w_in, b_in, w_out: neurons of the table, if the circuit has one here, and random ones, in random order."""
    n, mlp = 4 * plan.d_model, plan.mlps.get(layer)
    w_in = _anything(plan, n, seen, generator)
    w_in /= (seen @ w_in.T).std(dim=(0, 1))[:, None]
    b_in = 0.5 * torch.randn(n, generator=generator, dtype=seen.dtype)
    w_out = _random_rows(n, plan.junk, seen, generator)
    rows, bias, writes = _table(mlp, seen) if mlp else (w_in[:0], b_in[:0], w_out[:0])
    w_in[: len(rows)], b_in[: len(rows)], w_out[: len(rows)] = rows, bias, 0
    w_out *= _loudness(plan, mlp is not None, generator) / _peak((seen @ w_in.T + b_in).relu() @ w_out)
    w_out[: len(rows)] = writes
    order = torch.randperm(n, generator=generator)
    return w_in[order], b_in[order], w_out[order]


def _table(mlp: Mlp, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inputs = [_rows(read, seen) for read in mlp.inputs]
    rows = inputs[0] if len(inputs) == 1 else (inputs[0][:, None] + inputs[1][None]).flatten(0, 1)
    to = torch.eye(seen.shape[-1], dtype=seen.dtype)[[mlp.writes[entry] for entry in mlp.table]]
    on = len(inputs) - 1.0  # both inputs of a row must be on
    slope = mlp.gain / ((mlp.high or 1.0) - mlp.low)
    bias = rows.new_full((len(rows),), -on - mlp.low)
    if mlp.high is None:
        return rows, bias, slope * to
    return rows.repeat(2, 1), torch.cat([bias, bias + mlp.low - mlp.high]), torch.cat([slope * to, -slope * to])


# ---- parts ----


def _rows(read: Read, seen: Float[Tensor, "batch pos coord"]) -> Float[Tensor, "row coord"]:
    """Rows that read coordinates of the normed stream, scaled so that on the examples the mean of "on" is 1."""
    at = list(read.at)
    if read.paired:
        on = seen[:, at, list(read.coords)].mean(0)
    else:
        on = seen[:, at][:, :, list(read.coords)].amax(-1).mean().expand(len(read.coords))
    rows = seen.new_zeros(len(read.coords), seen.shape[-1])
    rows[range(len(rows)), list(read.coords)] = 1 / on
    return rows


def _random_rows(n: int, coords: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    rows = like.new_zeros(n, like.shape[-1])
    rows[:, list(coords)] = torch.randn(n, len(coords), generator=generator, dtype=like.dtype)
    return rows


def _anything(plan: Plan, n: int, seen: Tensor, generator: torch.Generator) -> Tensor:
    """Rows that read words, and less of what other distractors wrote, however loud they are, and of variables: if they
    read more of those, the circuit would stand out by what distractors make of it."""
    ratio = seen[..., list(plan.words)].norm() / seen[..., list(plan.junk)].norm().clamp(min=1e-9)
    parts = [(plan.words, 1.0), (plan.junk, 0.7 * min(float(ratio), 1.0)), (plan.variables, 0.4)]
    return torch.stack([weight * _random_rows(n, coords, seen, generator) for coords, weight in parts]).sum(0)


def _rotation(n: int, generator: torch.Generator) -> Float[Tensor, "n n"]:
    return cast(Tensor, torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q)


def _loudness(plan: Plan, rider: bool, generator: torch.Generator) -> float:
    """Drawn on a logarithmic scale."""
    low, high = RIDER if rider else LOUDNESS
    draw = low * math.exp(math.log(high / low) * float(torch.rand((), generator=generator)))
    return draw if rider else plan.loud * draw


def _peak(written: Float[Tensor, "batch pos coord"]) -> float:
    """Norm of what is written, at the position where it is largest (but for the first): a head may rest elsewhere."""
    return float(written[:, 1:].square().sum(-1).mean(0).amax().sqrt())


# ---- back to the residual stream ----


def basis(n: int, rotate: bool, generator: torch.Generator) -> Float[Tensor, "coord d_model"]:
    """Orthonormal directions for n - 1 coordinates, orthogonal to the mean: cosines, or cosines rotated at random."""
    wave = torch.arange(1, n, dtype=torch.float64)[:, None] * (torch.arange(n, dtype=torch.float64) + 0.5) / n
    directions = math.sqrt(2 / n) * (math.pi * wave).cos()
    turn = _rotation(n - 1, generator)
    return (turn @ directions if rotate else directions).float()


def gpt2(weights: Weights, directions: Float[Tensor, "coord d_model"]) -> dict[str, Float[Tensor, "..."]]:
    """The same weights as the state of a Hugging Face GPT-2, float32; its linear maps are stored [in, out]."""
    n = directions.shape[1]
    state = {
        "transformer.wte.weight": weights.embed @ directions,
        "transformer.wpe.weight": weights.codes @ directions,
        "transformer.ln_f.weight": torch.ones(n),
        "transformer.ln_f.bias": torch.zeros(n),
        "lm_head.weight": weights.unembed @ directions,
    }
    for i, layer in enumerate(weights.layers):
        reads = torch.cat([rows.flatten(0, 1) for rows in (layer.q, layer.k, layer.v)])
        state |= {
            f"transformer.h.{i}.{name}": value
            for name, value in {
                "ln_1.weight": torch.ones(n),
                "ln_1.bias": torch.zeros(n),
                "attn.c_attn.weight": (reads @ directions).T,
                "attn.c_attn.bias": torch.cat([layer.q_bias.flatten(), torch.zeros(2 * n)]),
                "attn.c_proj.weight": layer.out.flatten(0, 1) @ directions,
                "attn.c_proj.bias": torch.zeros(n),
                "ln_2.weight": torch.ones(n),
                "ln_2.bias": torch.zeros(n),
                "mlp.c_fc.weight": (layer.w_in @ directions).T,
                "mlp.c_fc.bias": layer.b_in,
                "mlp.c_proj.weight": layer.w_out @ directions,
                "mlp.c_proj.bias": torch.zeros(n),
            }.items()
        }
    return {name: value.float().contiguous() for name, value in state.items()}
