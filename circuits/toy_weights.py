"""Transformers as plain tensors: trained, disguised, and turned into models of the library.

A toy's weights are made here, outside any library, so that parts can be added and the basis turned with a line of
algebra; `to_model` puts the result into a GPT-2 module without norms and with ReLU, on which hooks, patching and
attribution work as on any model.

An idle head writes nothing, which would make any score that looks at sizes perfect. So toys are *disguised*: their
residual stream is turned by a random rotation, and heads and neurons are added that read everything, write as much as
the real ones do, and write it where no real part reads. Their effect on the logits is zero by construction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from circuits import handmade
from circuits.graph import INPUT
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.scores import head, mlp

UNKNOWN = "?"
SPARE = 16  # dimensions that no real part reads: where the noise goes, at least
Draw = Callable[[torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Weights:
    """A transformer without norms: causal softmax attention with scale 1/sqrt(d_head), and ReLU MLPs."""

    words: tuple[str, ...]
    embed: Float[Tensor, "vocab d_model"]
    pos: Float[Tensor, "ctx d_model"]
    qkv: Float[Tensor, "layer 3 head d_model d_head"]
    out: Float[Tensor, "layer head d_head d_model"]
    w_in: Float[Tensor, "layer d_model d_mlp"]
    b_in: Float[Tensor, "layer d_mlp"]
    w_out: Float[Tensor, "layer d_mlp d_model"]
    unembed: Float[Tensor, "d_model vocab"]

    @classmethod
    def random(
        cls,
        words: Iterable[str],
        ctx: int,
        d_model: int,
        layers: int,
        heads: int,
        d_mlp: int,
        generator: torch.Generator,
        *,
        d_head: int | None = None,
    ) -> Weights:
        """Normal weights that keep the size of what they read; d_head is d_model / heads unless given."""

        def normal(*shape: int, scale: float) -> Tensor:
            return torch.randn(*shape, generator=generator) * scale

        words, d_head = tuple(words), d_head or d_model // heads
        narrow = d_model**-0.5
        return cls(
            words,
            normal(len(words), d_model, scale=narrow),
            normal(ctx, d_model, scale=narrow),
            normal(layers, 3, heads, d_model, d_head, scale=narrow),
            normal(layers, heads, d_head, d_model, scale=narrow),
            normal(layers, d_model, d_mlp, scale=narrow),
            torch.zeros(layers, d_mlp),
            normal(layers, d_mlp, d_model, scale=max(1, d_mlp) ** -0.5),
            normal(d_model, len(words), scale=narrow),
        )

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "words"}

    def map(self, fn: Callable[[Tensor], Tensor]) -> Weights:
        changed: dict[str, Any] = {name: fn(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)


def forward(
    w: Weights, tokens: Int[Tensor, "batch pos"], writes: dict[str, Tensor] | None = None
) -> Float[Tensor, "batch pos vocab"]:
    """Logits; `writes` receives what each source of the graph adds to the residual stream [batch, pos, d_model]."""
    n = tokens.shape[1]
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    x = w.embed[tokens] + w.pos[:n]
    if writes is not None:
        writes[INPUT] = x
    for layer in range(len(w.qkv)):
        q, k, v = torch.einsum("bpd,thde->tbhpe", x, w.qkv[layer])
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -torch.inf)
        z = scores.softmax(-1) @ v
        if writes is not None:
            results = torch.einsum("bhpe,hed->hbpd", z, w.out[layer])
            writes.update({head(layer, h): result for h, result in enumerate(results)})
        x = x + torch.einsum("bhpe,hed->bpd", z, w.out[layer])
        added = (x @ w.w_in[layer] + w.b_in[layer]).relu() @ w.w_out[layer]
        if writes is not None:
            writes[mlp(layer)] = added
        x = x + added
    return x @ w.unembed


def disguise(
    w: Weights, examples: Int[Tensor, "batch pos"], generator: torch.Generator, *, heads: int, neurons: int
) -> Weights:
    """The same function in a rotated residual stream, with `heads` more heads and `neurons` more neurons per layer.

    The new heads, and those that write nothing, read the whole stream and write to dimensions that only they read;
    what they write on the examples has 0.5 to 2 times the mean size of what the real heads write. So do the neurons.
    """
    w = w.map(Tensor.double)
    n_layers, _, n_heads, d, d_head = w.qkv.shape
    total = n_heads + heads
    wide = max(d_head, math.ceil((d + SPARE) / total))
    d_model = total * wide

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    qkv = pad(w.qkv, n_layers, 3, total, d_model, wide)
    qkv[:, 0] *= math.sqrt(wide / d_head)  # the scale of attention is that of the wider heads now
    out = pad(w.out, n_layers, total, wide, d_model)
    noise = (out == 0).flatten(2).all(-1)
    for layer, index in noise.nonzero().tolist():
        qkv[layer, :, index] = normal(3, d_model, wide)
        out[layer, index, :, d:] = normal(wide, d_model - d)
    unread = torch.cat([w.w_out.new_zeros(n_layers, neurons, d), normal(n_layers, neurons, d_model - d)], -1)
    w = Weights(
        w.words,
        pad(w.embed, len(w.embed), d_model),
        pad(w.pos, len(w.pos), d_model),
        qkv,
        out,
        torch.cat([pad(w.w_in, n_layers, d_model, w.w_in.shape[-1]), normal(n_layers, d_model, neurons)], -1),
        torch.cat([w.b_in, w.b_in.new_zeros(n_layers, neurons)], -1),
        torch.cat([pad(w.w_out, n_layers, w.w_out.shape[1], d_model), unread], 1),
        pad(w.unembed, d_model, len(w.words)),
    )
    w = _sized(w, noise, neurons, d, examples, generator)
    turn = torch.linalg.qr(normal(d_model, d_model)).Q
    return Weights(
        w.words, w.embed @ turn, w.pos @ turn, turn.T @ w.qkv, w.out @ turn, turn.T @ w.w_in, w.b_in, w.w_out @ turn,
        turn.T @ w.unembed,
    ).map(Tensor.float)  # fmt: skip


def pad(x: Tensor, *shape: int) -> Tensor:
    """The tensor in a corner of a larger one of zeros."""
    big = x.new_zeros(shape)
    big[tuple(slice(n) for n in x.shape)] = x
    return big


def _sized(w: Weights, noise: Tensor, neurons: int, real: int, examples: Tensor, generator: torch.Generator) -> Weights:
    """Scale what the noise writes, layer by layer: later noise reads earlier noise."""

    def size(name: str) -> float:
        writes: dict[str, Tensor] = {}
        forward(w, examples, writes)
        return float(writes[name][..., real if name.startswith("m") else 0 :].norm(dim=-1).mean())

    def wanted() -> float:
        return mean * 2 ** float(torch.rand((), generator=generator) * 2 - 1)

    mean = sum(size(head(layer, h)) for layer, h in (~noise).nonzero().tolist()) / int((~noise).sum())
    for layer in range(len(noise)):
        for index in noise[layer].nonzero()[:, 0].tolist():
            w.out[layer, index] *= wanted() / size(head(layer, index))
        if neurons:
            w.w_out[layer, -neurons:] *= wanted() / size(mlp(layer))
    return w


def to_model(w: Weights, name: str) -> LanguageModel:
    """A GPT-2 of the library with these weights, its norms taken out, and a tokenizer of words between spaces.

    Words that it does not know become one more, whose logit is the mean of all others: it is never the likeliest.
    """
    n_layers, _, n_heads, d_model, d_head = w.qkv.shape
    if n_heads * d_head != d_model:
        raise UserError(f"GPT-2 has d_model = heads x d_head, not {d_model} = {n_heads} x {d_head}; disguise it first.")
    n_inner = max(1, w.w_in.shape[-1])  # without MLPs: one neuron, all zero
    vocab = {word: i for i, word in enumerate((*w.words, UNKNOWN))}
    state = {
        "transformer.wte.weight": torch.cat([w.embed, w.embed.new_zeros(1, d_model)]),
        "transformer.wpe.weight": w.pos,
        "lm_head.weight": torch.cat([w.unembed.T, w.unembed.mean(1)[None]]),
    }
    for layer in range(n_layers):
        block = f"transformer.h.{layer}"
        state[f"{block}.attn.c_attn.weight"] = w.qkv[layer].permute(2, 0, 1, 3).flatten(1)
        state[f"{block}.attn.c_attn.bias"] = torch.zeros(3 * d_model)
        state[f"{block}.attn.c_proj.weight"] = w.out[layer].flatten(0, 1)
        state[f"{block}.attn.c_proj.bias"] = torch.zeros(d_model)
        state[f"{block}.mlp.c_fc.weight"] = pad(w.w_in[layer], d_model, n_inner)
        state[f"{block}.mlp.c_fc.bias"] = pad(w.b_in[layer], n_inner)
        state[f"{block}.mlp.c_proj.weight"] = pad(w.w_out[layer], n_inner, d_model)
        state[f"{block}.mlp.c_proj.bias"] = torch.zeros(d_model)
    config = {"n_positions": len(w.pos), "n_embd": d_model, "n_layer": n_layers, "n_head": n_heads, "n_inner": n_inner}
    module, words, digest = handmade.gpt2(config, state, vocab, UNKNOWN)
    for block in module.transformer.h:
        block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
    module.transformer.ln_f = nn.Identity()
    return LanguageModel(module, words, name=name, fingerprint=f"{name}-{digest}")


# ---- training ----


def train(
    w: Weights,
    draw: Draw,
    generator: torch.Generator,
    *,
    steps: int,
    rate: float,
    decay: float = 0.0,
    watch: Callable[[int, Weights], bool] | None = None,
) -> Weights:
    """Minimise cross-entropy on batches of `draw`: tokens and targets [batch, pos], -100 where nothing is asked.

    AdamW; the rate rises over 20 steps and then falls to zero in a straight line. `watch` is called before every step
    and ends the training by returning true.
    """
    w = w.map(lambda x: x.clone().requires_grad_())
    optimiser = torch.optim.AdamW(w.tensors().values(), lr=rate, betas=(0.9, 0.98), weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: min((i + 1) / 20, 1 - i / steps))
    for step in range(steps):
        if watch is not None and watch(step, w):
            break
        tokens, targets = draw(generator)
        asked = targets != -100
        loss = cross_entropy(forward(w, tokens)[asked], targets[asked])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return w.map(Tensor.detach)


def accuracy(w: Weights, tokens: Int[Tensor, "batch pos"], targets: Int[Tensor, "batch pos"]) -> float:
    """Share of the asked positions at which the most likely word is the target."""
    asked = targets != -100
    with torch.no_grad():
        return float((forward(w, tokens)[asked].argmax(-1) == targets[asked]).double().mean())
