"""Weight-sparse transformers: the model (Gao et al. 2025, appendix A.1), with the hook points of any other.

A pre-norm decoder as GPT-2's, with RMSNorm, and AbsTopK at named sites: on what attention and MLP read (`attn_in`,
`mlp_in`), on queries, keys and values over all heads together (`attn_q`, `attn_k`, `attn_v`), on neurons
(`mlp_neuron`), and on what is added to the residual stream (`attn_out`, `mlp_out`); never on the residual stream
itself. Optional: an attention sink (one learnable logit per head that enters the softmax's denominator alone), a bigram
table (the row of the current token is added to the logits), and learnable or sinusoidal position channels that
attention and MLPs read beside the normed residual stream.

Parameters have the names of the released checkpoints. A dense model is the same with `afrac` None.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuits.sparse.topk import AbsTopK
from workbench import attention
from workbench.errors import UserError

MODEL_TYPE = "weight_sparse"
SITES = ("attn_in", "attn_q", "attn_k", "attn_v", "attn_out", "mlp_in", "mlp_neuron", "mlp_out")


@dataclass(frozen=True)
class SparseConfig:
    """The architecture; names are those of the released `beeg_config.json` where it has them.

    afrac                    share of activations that AbsTopK keeps at the sites of `afrac_loctypes`; None: all
    positions                none, or added (a table that is added to the embeddings)
    d_pos_emb                width of position channels that are read beside the residual stream; None: there are none
    sinusoidal_cat_pos_emb   these channels are fixed sinusoids
    """

    vocab_size: int
    n_layer: int
    d_model: int
    n_head: int
    d_head: int = 16
    d_mlp: int = 0  # 0: four times d_model
    block_size: int = 1024
    bias: bool = True
    activation_type: str = "gelu"
    afrac: float | None = None
    afrac_loctypes: tuple[str, ...] = SITES
    positions: str = "none"
    d_pos_emb: int | None = None
    sinusoidal_cat_pos_emb: bool = False
    sink: bool = False
    enable_bigram_table: bool = True
    learnable_bigram_table: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "d_mlp", self.d_mlp or 4 * self.d_model)
        for name in ("vocab_size", "n_layer", "d_model", "n_head", "d_head", "d_mlp", "block_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} makes no model; give at least 1.")
        for site in self.afrac_loctypes:
            if site not in SITES:
                raise UserError(f"{site!r} is no place for AbsTopK; places are {', '.join(SITES)}.")
        for name, options in (("activation_type", ("gelu", "relu")), ("positions", ("none", "added"))):
            if getattr(self, name) not in options:
                raise UserError(f"{name}={getattr(self, name)!r} is not one of {', '.join(options)}.")
        if self.afrac is not None and not 0 < self.afrac <= 1:
            raise UserError(f"afrac={self.afrac:g} must be above 0 and at most 1, the share of activations kept.")
        if self.d_pos_emb is not None and self.positions != "none":
            raise UserError("positions are either added or concatenated (d_pos_emb), not both.")

    def to_json(self) -> dict[str, Any]:
        return {"model_type": MODEL_TYPE, **asdict(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SparseConfig:
        """Raises UserError for keys that are not known, by name."""
        known = {field.name for field in fields(cls)}
        given = {name: value for name, value in values.items() if name != "model_type"}
        if "afrac_loctypes" in given:
            given["afrac_loctypes"] = tuple(given["afrac_loctypes"])
        unknown = sorted(given.keys() - known)
        if unknown:
            raise UserError(f"the configuration has {', '.join(unknown)}, which this version does not know.")
        return cls(**given)

    def kept(self, site: str, width: int) -> int | None:
        """How many of `width` activations a site keeps; None for all."""
        return None if self.afrac is None or site not in self.afrac_loctypes else max(1, int(self.afrac * width))

    # What `workbench.backend.describe` asks of a configuration.
    model_type = property(lambda self: f"{MODEL_TYPE}_positions" if self.positions == "added" else MODEL_TYPE)
    num_hidden_layers = property(lambda self: self.n_layer)
    num_attention_heads = property(lambda self: self.n_head)
    hidden_size = property(lambda self: self.d_model)
    head_dim = property(lambda self: self.d_head)
    intermediate_size = property(lambda self: self.d_mlp)
    max_position_embeddings = property(lambda self: self.block_size)


def _topk(config: SparseConfig, site: str, width: int) -> nn.Module:
    k = config.kept(site, width)
    return nn.Identity() if k is None or k >= width else AbsTopK(k)


class Sink(nn.Module):
    """One logit per head that takes part in the softmax and has no value."""

    def __init__(self, n_head: int):
        super().__init__()
        self.sink_logit = nn.Parameter(torch.zeros(n_head))


class Attention(nn.Module):
    """Queries, keys and values from one projection; `kernel` says who computes the attention step.

    sdpa       the library's fused kernel, for training
    eager      softmax written out, for comparison
    workbench  the workbench's own, which reads and edits what is inside
    """

    def __init__(self, config: SparseConfig, d_in: int):
        super().__init__()
        self.n_head, self.d_head, self.kernel = config.n_head, config.d_head, "sdpa"
        width = config.n_head * config.d_head
        self.act_in = _topk(config, "attn_in", config.d_model)
        self.c_attn = nn.Linear(d_in, 3 * width, bias=config.bias)
        self.top = nn.ModuleList(_topk(config, f"attn_{port}", width) for port in "qkv")
        self.c_proj = nn.Linear(width, config.d_model, bias=config.bias)
        self.resid_delta = _topk(config, "attn_out", config.d_model)
        self.attn_imp = Sink(config.n_head) if config.sink else None

    def forward(self, x: Float[Tensor, "batch pos d_in"], positions: Tensor | None) -> Float[Tensor, "batch pos d_in"]:
        x = _beside(self.act_in(x), positions)
        parts = [top(part) for top, part in zip(self.top, self.c_attn(x).chunk(3, -1), strict=True)]
        q, k, v = (part.unflatten(-1, (self.n_head, self.d_head)).transpose(1, 2) for part in parts)
        z = self._attend(q, k, v).flatten(-2)
        out: Tensor = self.resid_delta(self.c_proj(z))
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "batch pos head d_head"]:
        sink = None if self.attn_imp is None else self.attn_imp.sink_logit
        scale = 1 / math.sqrt(self.d_head)
        if self.kernel == "workbench":
            return attention.step(_fused, self, q, k, v, None, scaling=scale, s_aux=sink)[0]
        n = q.shape[2]
        causal = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
        if self.kernel == "eager":
            scores = (q @ k.mT * scale).masked_fill(~causal, -torch.inf)
            if sink is not None:
                scores = torch.cat([scores, sink.to(q.dtype).view(1, -1, 1, 1).expand(len(q), -1, n, 1)], -1)
            return (scores.softmax(-1)[..., :n] @ v).transpose(1, 2)
        if sink is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
        # The sink is one more key, zero and without value, whose score the mask makes.
        mask = torch.zeros(n, n, dtype=q.dtype, device=q.device).masked_fill(~causal, -torch.inf)
        mask = torch.cat([mask.expand(self.n_head, n, n), sink.to(q.dtype).view(-1, 1, 1).expand(-1, n, 1)], -1)
        k, v = (F.pad(each, (0, 0, 0, 1)) for each in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None], scale=scale).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config: SparseConfig, d_in: int):
        super().__init__()
        self.act_in = _topk(config, "mlp_in", config.d_model)
        self.c_fc = nn.Linear(d_in, config.d_mlp, bias=config.bias)
        self.act = nn.GELU() if config.activation_type == "gelu" else nn.ReLU()
        self.post_act = _topk(config, "mlp_neuron", config.d_mlp)
        self.c_proj = nn.Linear(config.d_mlp, config.d_model, bias=config.bias)
        self.resid_delta = _topk(config, "mlp_out", config.d_model)

    def forward(self, x: Float[Tensor, "batch pos d_in"], positions: Tensor | None) -> Float[Tensor, "batch pos d_in"]:
        out: Tensor = self.resid_delta(
            self.c_proj(self.post_act(self.act(self.c_fc(_beside(self.act_in(x), positions)))))
        )
        return out


class Block(nn.Module):
    def __init__(self, config: SparseConfig):
        super().__init__()
        d_in = config.d_model + (config.d_pos_emb or 0)
        self.ln_1, self.attn = nn.RMSNorm(config.d_model), Attention(config, d_in)
        self.ln_2, self.mlp = nn.RMSNorm(config.d_model), MLP(config, d_in)
        if config.d_pos_emb is not None:
            self.ln_p1, self.ln_p2 = nn.RMSNorm(config.d_pos_emb), nn.RMSNorm(config.d_pos_emb)

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], positions: Float[Tensor, "pos d_pos"] | None
    ) -> Float[Tensor, "batch pos d_model"]:
        return self.sublayer(1, self.sublayer(0, x, positions), positions)

    def sublayer(
        self, which: int, x: Float[Tensor, "batch pos d_model"], positions: Float[Tensor, "pos d_pos"] | None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after attention (0) or the MLP (1)."""
        if which == 0:
            out: Tensor = self.attn(self.ln_1(x), None if positions is None else self.ln_p1(positions))
        else:
            out = self.mlp(self.ln_2(x), None if positions is None else self.ln_p2(positions))
        return x + out

    def between(self) -> dict[str, str]:
        """What lies between the residual stream and the heads or neurons, beside norms and projections."""
        sites = {
            "attn_in": [self.attn.act_in, *self.attn.top],
            "attn_out": [self.attn.resid_delta],
            "mlp": [self.mlp.act_in, self.mlp.post_act, self.mlp.resid_delta],
        }
        found = {name: "AbsTopK" for name, parts in sites.items() if any(isinstance(p, AbsTopK) for p in parts)}
        if hasattr(self, "ln_p1"):
            found |= {name: "position channels" for name in ("attn_in", "mlp") if name not in found}
        return found


def _fused(
    _: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scaling: float
) -> tuple[Tensor, None]:
    """The kernel of `workbench.attention.step`: torch's own, for models with as many keys as queries."""
    causal = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scaling).transpose(1, 2), None


def _beside(x: Tensor, positions: Tensor | None) -> Tensor:
    return x if positions is None else torch.cat([x, positions.expand(*x.shape[:-1], -1)], -1)


class Hidden(NamedTuple):
    """last_hidden_state  after the final norm, as the library's models give it."""

    last_hidden_state: Float[Tensor, "batch pos d_model"]
    hidden_states: tuple[Tensor, ...] | None = None


class Output(NamedTuple):
    """hidden_states  the residual stream before every block, and after the final norm, if asked for"""

    logits: Float[Tensor, "batch pos vocab"]
    hidden_states: tuple[Tensor, ...] | None = None


class Stack(nn.Module):
    """Embeddings, blocks and final norm."""

    def __init__(self, config: SparseConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        width = config.d_pos_emb or (config.d_model if config.positions == "added" else 0)
        self.wpe = nn.Embedding(config.block_size, width) if width else None
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.RMSNorm(config.d_model)

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        position_ids: Tensor | None = None,
        output_hidden_states: bool = False,
        use_cache: bool = False,
    ) -> Hidden:
        """position_ids  of the tokens, if they are not the first ones"""
        x, positions = self.embed(tokens, position_ids)
        before = []
        for block in self.h:
            before.append(x)
            x = block(x, positions)
        x = self.ln_f(x)
        return Hidden(x, (*before, x) if output_hidden_states else None)

    def embed(
        self, tokens: Int[Tensor, "batch pos"], position_ids: Tensor | None = None
    ) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "pos d_pos"] | None]:
        """The residual stream before the first block, and the position channels where there are any."""
        x = self.wte(tokens)
        if self.wpe is None:
            return x, None
        at = torch.arange(tokens.shape[1], device=tokens.device) if position_ids is None else position_ids
        found = self.wpe(at)
        if self.config.d_pos_emb is None:
            return x + found, None
        return x, found if found.ndim == 2 else found[0]

    def streams(self, tokens: Int[Tensor, "batch pos"]) -> list[Float[Tensor, "batch pos d_model"]]:
        """The residual stream at every boundary between sublayers: before each attention (2 layer), before each MLP
        (2 layer + 1), and after the last (2 n_layer)."""
        x, positions = self.embed(tokens)
        found = [x]
        for i in range(2 * len(self.h)):
            found.append(self.sublayer(i, found[-1], positions))
        return found

    def sublayer(
        self, boundary: int, x: Float[Tensor, "batch pos d_model"], positions: Float[Tensor, "pos d_pos"] | None
    ) -> Float[Tensor, "batch pos d_model"]:
        """From one boundary to the next."""
        return cast(Block, self.h[boundary // 2]).sublayer(boundary % 2, x, positions)


class SparseTransformer(nn.Module):
    """The whole model. As the library's models: `base_model`, `config`, `device`, `dtype`, logits from a call."""

    def __init__(self, config: SparseConfig, generator: torch.Generator | None = None):
        """Random weights: N(0, 0.02^2), output projections N(0, 0.02^2 / (2 n_layer)), biases, sinks and added
        positions 0, gains 1; the bigram table is 0."""
        super().__init__()
        self.config = config
        self.about: dict[str, Any] = {}  # how it was made, where that is known
        self.folder: Path | None = None  # where it was read, with what belongs to it
        self.transformer = Stack(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        table = torch.zeros(config.vocab_size, config.vocab_size) if config.enable_bigram_table else None
        if table is not None and config.learnable_bigram_table:
            self.bigram_table: Tensor | None = nn.Parameter(table)
        else:
            self.register_buffer("bigram_table", table)
        self._initialise(generator)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator | None) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or (name.endswith("wpe.weight") and self.config.positions == "added"):
                parameter.zero_()
            elif parameter.ndim == 2 and name != "bigram_table":
                out = name.endswith("c_proj.weight")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if out else 0.02
                parameter.normal_(0, std, generator=generator)
        if self.config.sinusoidal_cat_pos_emb and self.config.d_pos_emb is not None:
            assert self.transformer.wpe is not None
            self.transformer.wpe.weight.copy_(sinusoids(self.config.block_size, self.config.d_pos_emb))
            self.transformer.wpe.weight.requires_grad_(False)

    def forward(
        self, tokens: Int[Tensor, "batch pos"], *, output_hidden_states: bool = False, use_cache: bool = False
    ) -> Output:
        """`use_cache` is taken from callers of the library's models, and nothing is cached."""
        hidden = self.transformer(tokens, output_hidden_states=output_hidden_states)
        return Output(self._unembed(hidden.last_hidden_state, tokens), hidden.hidden_states)

    def run_from(
        self, boundary: int, stream: Float[Tensor, "batch pos d_model"], tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos vocab"]:
        """Logits, from the residual stream at a boundary (see `Stack.streams`) on."""
        stack = self.transformer
        positions = None if self.config.d_pos_emb is None else stack.embed(tokens)[1]
        for i in range(boundary, 2 * len(stack.h)):
            stream = stack.sublayer(i, stream, positions)
        return self._unembed(stack.ln_f(stream), tokens)

    def _unembed(self, normed: Tensor, tokens: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(normed)
        return logits if self.bigram_table is None else logits + self.bigram_table[tokens]

    @property
    def base_model(self) -> Stack:
        return self.transformer

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_attn_implementation(self, kernel: str) -> None:
        for part in self.modules():
            if isinstance(part, Attention):
                part.kernel = kernel


def sinusoids(n: int, width: int) -> Float[Tensor, "pos width"]:
    """Sines, then cosines, of periods evenly spaced in their logarithm from 4 to n."""
    half = max(1, width // 2)
    periods = torch.logspace(math.log10(4), math.log10(max(4, n)), half)
    angles = torch.arange(n)[:, None] * (2 * math.pi / periods)
    return F.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, max(0, width - 2 * half)))[:, :width]
