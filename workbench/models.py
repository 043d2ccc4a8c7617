"""LanguageModel: one forward pass, read and edited at named sites.

The model is the plain Hugging Face module; nothing is folded or centred, so logits are the model's own. Hook names
are TransformerLens' on every architecture (`workbench/architectures.py` has the table). `run` holds the model's lock:
two threads that hook one module would record each other's activations.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench import backend, norms, passes, plugins, pretrained, settings, sites, spread
from workbench.architectures import family
from workbench.backend import Resume
from workbench.errors import UserError, unknown
from workbench.passes import Edit
from workbench.sites import Site

__all__ = ["Forward", "LanguageModel", "Resume"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Forward:
    """What one pass gave: logits [batch, pos, vocab] (or None when not asked for), and a copy of each captured site."""

    logits: Float[Tensor, "batch pos vocab"] | None
    activations: dict[str | Site, Tensor]

    def __getitem__(self, site: str | Site) -> Tensor:
        return self.activations[site]


class Affine(NamedTuple):
    """x @ weight + bias."""

    weight: Float[Tensor, "d_in d_out"]
    bias: Float[Tensor, " d_out"] | None


class MlpWeights(NamedTuple):
    """An MLP: out(act(pre(x))), or out(act(pre(x)) * up(x)) where it is gated."""

    pre: Affine
    up: Affine | None
    out: Affine
    act: Callable[[Tensor], Tensor]


class LanguageModel:
    """A causal language model that can be read and edited at sites. Safe to share between threads."""

    def __init__(self, module: Any, tokenizer: Any, *, name: str, fingerprint: str):
        self.name = name
        self.fingerprint = fingerprint
        self.tokenizer = tokenizer
        self.forward_passes = 0
        self.config = backend.describe(module)
        self._module = module.eval().requires_grad_(False)
        self._family = family(self.config.model_type)
        self._bigram: Tensor | None = getattr(module, "bigram_table", None)  # added to the logits by the current token
        backend.use_attention(self._module)
        self._lock = threading.RLock()
        os.register_at_fork(after_in_child=partial(_after_fork, weakref.ref(self)))
        self.hook_points = backend.hook_points(self._family, self.config.n_layers)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: str | None = None,
        dtype: str = "float32",
        accept_terms: bool = False,
        memory: spread.Memory | None = None,
    ) -> LanguageModel:
        """Load an embedded model, a hub id (`gpt2`) or a local folder (`./folder`), and self-check it once.

        device  such as cpu or cuda:0; auto: spread over all GPUs, then memory, then what stays in the files and is
                read whenever a pass comes to it, for models larger than any of these
        memory  with auto, how much each may hold, such as {0: "20GB", "cpu": "60GB"}; None: what is free

        Raises UserError when the model is unknown or unreachable, when its terms are not accepted, when its files
        do not have the recorded digest, or when the self-check finds a difference to plain Hugging Face.
        """
        device = device or settings.device()
        shared_out = spread.options(device, memory)
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"device {device!r} was asked for, but torch sees no GPU; use --device cpu.")
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        plugins.load()  # they may read more types of models
        source = pretrained.locate(name, convert=backend.convert_gguf, accept_terms=accept_terms)
        module, tokenizer = backend.load(source.folder, DTYPES[dtype], **shared_out)
        if shared_out and backend.new_cache(module) is None:  # it is not the library's
            raise UserError(f"{name} is of a type that is not spread over devices; name one device.")
        if shared_out:
            spread.keep_norms(module)
        else:
            module.to(torch.device(device))
        model = cls(module, tokenizer, name=name, fingerprint=source.fingerprint)
        pretrained.check_once(source, model.numerics, model.self_check)
        return model

    @property
    def device(self) -> torch.device:
        return spread.main_device(self._module)

    @property
    def spread(self) -> bool:
        """Whether it lies on several devices, or in files."""
        return spread.is_spread(self._module)

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, self._module.dtype)

    @property
    def numerics(self) -> str:
        """What changes values beyond the weights: compute dtype, attention kernel and device type."""
        return numerics(str(self.dtype).removeprefix("torch."), str(self.device))

    # ---- text ----

    def tokenize(self, text: str) -> Int[Tensor, " pos"]:
        """Token ids of one text, with the special tokens (BOS) that the model's own tokenizer adds."""
        return torch.tensor(self.tokenizer(text)["input_ids"], dtype=torch.long)

    def token_ids(self, text: str) -> list[int]:
        """Token ids of a piece of text, without special tokens."""
        return cast(list[int], self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def token_strings(self, ids: Iterable[int]) -> list[str]:
        return [self.tokenizer.decode([int(i)]) for i in ids]

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Token ids that end a text."""
        ids = self._module.generation_config.eos_token_id if hasattr(self._module, "generation_config") else None
        ids = self.tokenizer.eos_token_id if ids is None else ids
        return tuple(ids) if isinstance(ids, list) else () if ids is None else (int(ids),)

    # ---- running ----

    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        capture: Iterable[str | Site] = (),
        edit: Mapping[str | Site, Edit] | None = None,
        logits: Literal["all", "last", "none"] = "all",
        stop_after: str | None = None,
        start: Resume | None = None,
        grad: bool = False,
        ungroup: bool = False,
        relevance: bool = False,
    ) -> Forward:
        """One forward pass. All sequences of a batch have one length: nothing is ever padded.

        capture      sites to return, after any edit there; copies, never views of the model's own buffers
        edit         {site: function of the tensor at that site}
        logits       "none" leaves out the unembedding and everything after the deepest captured site
        stop_after   a hook point after which the pass ends (implies logits="none")
        start        begin at a block with a given residual stream, with unchanged earlier positions left out
        grad         keep the graph: captured tensors can be differentiated with torch.autograd.grad
        ungroup      where query heads share keys and values, give each its own copy: `hook_k` and `hook_v` then have
                     as many heads as `hook_q` (TransformerLens' `ungroup_grouped_query_attention`)
        relevance    with `grad`: gradients follow the rules of relevance propagation, values do not change

        Raises UserError for tokens that do not fit, unknown hook points, and edits that change a shape or run the
        model.
        """
        passes.check_tokens(self, tokens)
        wanted = {key: Site(key) if isinstance(key, str) else key for key in capture}
        edits = [(Site(key) if isinstance(key, str) else key, fn) for key, fn in (edit or {}).items()]
        hooks = {site.hook for site in wanted.values()} | {site.hook for site, _ in edits}
        if stop_after is not None:
            hooks.add(stop_after)
            logits = "none"
        for site in [*wanted.values(), *(site for site, _ in edits), *map(Site, hooks)]:
            passes.check_site(self, site, start, ungroup)
        deepest = stop_after
        if deepest is None and logits == "none" and wanted:
            deepest = max((site.hook for site in wanted.values()), key=sites.depth)
        late = [hook for hook in hooks if deepest and sites.depth(hook) > sites.depth(deepest)]
        if late and stop_after:
            raise UserError(f"{late[0]} comes after stop_after={stop_after!r} and would never be reached.")

        found: dict[str | Site, Tensor] = {}
        in_order = sorted(hooks, key=sites.depth)
        visitors = {hook: passes.visitor(hook, wanted, edits, found, hook == deepest, grad) for hook in in_order}
        edited = frozenset(site.hook for site, _ in edits)
        if start is not None:
            start = Resume(start.layer, start.resid.to(self.device, self.dtype), start.past)
        context = backend.hooked(
            self._module,
            self._family,
            self.config.d_head,
            visitors,
            edited,
            start,
            self._results,
            grad,
            self.config.n_heads // self.config.n_kv_heads if ungroup else 1,
            relevance,
        )
        self._refuse_a_pass_inside_a_pass()
        with self._lock, nullcontext() if grad else torch.no_grad(), context:
            self.forward_passes += 1
            out = self._forward(tokens.to(self.device), logits, start)
        return Forward(out, found)

    @contextmanager
    def editing(self, edits: Mapping[Site, Edit]) -> Iterator[Callable[[Tensor, Any], Tensor]]:
        """Edits in force for several passes, as generation makes them. Gives what makes one: a function of tokens
        [batch, pos] and the cache of earlier ones (`backend.new_cache`; None: there are none) to logits [batch, vocab]
        after the last.

        Raises UserError for unknown hook points and heads, and inside of another pass.
        """
        pairs = list(edits.items())
        for site in edits:
            passes.check_site(self, site, None, False)
        hooks = sorted({site.hook for site in edits}, key=sites.depth)
        visitors = {hook: passes.visitor(hook, {}, pairs, {}, False, False) for hook in hooks}
        context = backend.hooked(
            self._module, self._family, self.config.d_head, visitors, frozenset(hooks), None, self._results, False
        )

        def next_logits(tokens: Tensor, cache: Any) -> Tensor:
            self.forward_passes += 1
            options = {} if cache is None else {"past_key_values": cache}
            hidden = self._module.base_model(tokens, use_cache=cache is not None, **options).last_hidden_state[:, -1]
            return self._logits(hidden.contiguous(), tokens[:, -1])

        self._refuse_a_pass_inside_a_pass()
        with self._lock, torch.no_grad(), context:
            yield next_logits

    def _refuse_a_pass_inside_a_pass(self) -> None:
        if self._lock._is_owned():  # type: ignore[attr-defined]  # by this thread: the outer pass would lose its hooks
            raise UserError("the model is running: an edit cannot run it again; compute what it needs beforehand.")

    def _forward(self, tokens: Tensor, logits: str, start: Resume | None) -> Tensor | None:
        options: dict[str, Any] = {"use_cache": False}
        n = tokens.shape[1] if start is None else start.resid.shape[1]
        if start is not None or self._family.pos_embed:  # one row per sequence, as at every other hook point
            position = torch.arange(tokens.shape[1] - n, tokens.shape[1], device=self.device)
            options["position_ids"] = position.expand(len(tokens) if self._family.pos_embed else 1, -1)
            tokens = tokens[:, -n:]
        try:
            hidden = self._module.base_model(tokens, **options).last_hidden_state
        except backend.Stop:
            return None
        if logits == "none":
            return None
        hidden = hidden if logits == "all" else hidden[:, -1:]
        # Flat and contiguous: a strided [batch, 1, d_model] takes a matrix-product path 20 times slower on a CPU.
        at = tokens[:, -hidden.shape[1] :].flatten()
        return self._logits(hidden.flatten(0, 1).contiguous(), at).view(*hidden.shape[:2], -1)

    # ---- weights that analyses need ----

    def head_results(self, layer: int, z: Float[Tensor, "*any head d_head"]) -> Float[Tensor, "*any head d_model"]:
        """What each head writes to the residual stream, `z_h W_O^h`, without the bias (TransformerLens' `result`)."""
        return torch.einsum("...hd,hdm->...hm", z, self.out_weight(layer))

    def head_writes(self, layer: int, z: Float[Tensor, "*any head d_head"]) -> Float[Tensor, "*any head d_model"]:
        """What each head adds to the residual stream: its result, or its share of the post-attention norm's output.

        That norm (Gemma) acts on the sum over heads. With its scale frozen at that sum it is linear, so the shares of
        all heads, and the output bias where there is one, sum to `hook_attn_out`.
        """
        self._require_linear("attn_out", layer)
        results = self.head_results(layer, z)
        norm = self.post_attention_norm(layer)
        if norm is None:
            return results
        through, _ = norms.frozen(norm, results.sum(-2, keepdim=True))
        return through(results)

    def out_bias(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """What attention adds whatever its heads do; None where there is no bias."""
        self._require_linear("attn_out", layer)
        return self._weights(self._block(layer).get_submodule(self._family.out_proj))[1]

    def _weights(self, part: nn.Module) -> tuple[Tensor, Tensor | None]:
        with self._whole():
            return spread.weights(part)

    def _whole(self) -> AbstractContextManager[Any]:
        """While a part computes or is read that may lie in files."""
        return self._lock if self.spread else nullcontext()

    def _results(self, layer: int, flat: Tensor) -> Tensor:
        return self.head_results(layer, flat.unflatten(-1, (self.config.n_heads, self.config.d_head)))

    def out_weight(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """W_O of one layer."""
        projection = self._block(layer).get_submodule(self._family.out_proj)
        weight, _ = self._weights(projection)
        rows = weight.T if isinstance(projection, nn.Linear) else weight  # GPT-2's Conv1D stores [in, out]
        return cast(Tensor, rows.unflatten(0, (self.config.n_heads, self.config.d_head)))

    def in_weights(self, layer: int) -> tuple[Float[Tensor, "3 head d_head d_model"], Float[Tensor, "3 head d_head"]]:
        """W_Q, W_K, W_V of one layer, transposed, and their biases (zeros where there are none).

        Where query heads share keys and values, each has a copy, as in `run(ungroup=True)`.
        """
        self._require_linear("attn_in", layer)
        c = self.config
        parts = [self._block(layer).get_submodule(path) for path in self._family.qkv]
        both: list[Tensor] = []
        for part in parts:
            weight, bias = self._weights(part)
            weight = weight if isinstance(part, nn.Linear) else weight.T
            rows = torch.cat([weight, (weight.new_zeros(len(weight)) if bias is None else bias)[:, None]], 1)
            if len(parts) == 3:
                both.append(rows.unflatten(0, (-1, c.d_head)))
            elif self._family.hooks.get("attn.hook_q", ("", ""))[1] == "fused0":
                both += rows.unflatten(0, (c.n_heads, 3, c.d_head)).unbind(1)
            else:
                both += rows.unflatten(0, (3, c.n_heads, c.d_head)).unbind(0)
        every = torch.stack([one.repeat_interleave(c.n_heads // len(one), 0) for one in both])
        return every[..., :-1], every[..., -1]

    def mlp_weights(self, layer: int) -> MlpWeights:
        """The parts of one layer's MLP."""
        self._require_linear("mlp", layer)

        def affine(name: str) -> Affine:
            part = self._block(layer).get_submodule(self._family.hooks[name][0])
            weight, bias = self._weights(part)
            return Affine(weight.T if isinstance(part, nn.Linear) else weight, bias)

        gated = "mlp.hook_pre_linear" in self._family.hooks
        return MlpWeights(
            affine("mlp.hook_pre"),
            affine("mlp.hook_pre_linear") if gated else None,
            affine("mlp.hook_post"),
            self._block(layer).get_submodule(self._family.act),
        )

    def attention_norm(self, layer: int) -> nn.Module:
        """The norm before the queries, keys and values."""
        return self._block(layer).get_submodule(self._family.attn_norm)

    def mlp_norm(self, layer: int) -> nn.Module:
        """The norm before the MLP."""
        return self._block(layer).get_submodule(self._family.hooks["hook_mlp_in"][0])

    def post_attention_norm(self, layer: int) -> nn.Module | None:
        """The norm between the heads' sum and the residual stream, where the architecture has one (Gemma)."""
        path, _ = self._family.hooks["hook_attn_out"]
        return None if path == self._family.attn else self._block(layer).get_submodule(path)

    def _require_linear(self, where: str, layer: int) -> None:
        """Raises UserError where more than a norm and a projection lies between the residual stream and the heads or
        neurons of a weight-sparse model: channels are its parts, not these."""
        between: Mapping[str, str] = getattr(self._block(layer), "between", dict)()
        if where in between:
            raise UserError(
                f"{self.name} has {between[where]} at {where} of block {layer}: what its heads and MLPs pass on to "
                "each other is not given by weights; its circuits are of channels (circuits.sparse)."
            )

    def _block(self, layer: int) -> nn.Module:
        return cast(nn.ModuleList, self._module.get_submodule(self._family.blocks))[layer]

    @property
    def unembed_weight(self) -> Float[Tensor, "d_model vocab"]:
        return self._weights(self._module.get_output_embeddings())[0].T

    def final_norm(self, resid: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        with torch.no_grad():
            return cast(Tensor, self._module.get_submodule(self._family.final_norm)(resid))

    def unembed(
        self,
        resid: Float[Tensor, "*any d_model"],
        tokens: Int[Tensor, "..."] | None = None,
        *,
        grad: bool = False,
        relevance: bool = False,
    ) -> Float[Tensor, "*any vocab"]:
        """Logits from a residual stream: final norm, unembedding, and the soft cap where the model has one.

        tokens           those at these positions: a model with a bigram table adds its row of each to the logits
        grad, relevance  as in `run`

        Raises UserError if the model has a bigram table and the tokens are not given.
        """
        norm, resid = self._module.get_submodule(self._family.final_norm), resid.to(self.device, self.dtype)
        with self._whole(), nullcontext() if grad else torch.no_grad():
            if relevance:
                linear, bias = norms.frozen(norm, resid)
                return self._logits(linear(resid) + bias, tokens)
            return self._logits(cast(Tensor, norm(resid)), tokens)

    def bigram(self, tokens: Int[Tensor, "..."]) -> Float[Tensor, "... vocab"] | None:
        """What each token itself adds to the logits; None in a model without a bigram table."""
        return None if self._bigram is None else self._bigram[tokens.to(self.device)]

    def _logits(self, normed: Tensor, tokens: Tensor | None) -> Tensor:
        logits = cast(Tensor, self._module.get_output_embeddings()(normed))
        if self._bigram is not None:
            if tokens is None:
                raise UserError(f"{self.name} has a bigram table: its logits need the tokens; unembed(resid, tokens).")
            logits = logits + cast(Tensor, self.bigram(tokens))
        cap = self.config.final_softcap
        return torch.tanh(logits / cap) * cap if cap else logits

    # ---- checks ----

    def self_check(self) -> dict[str, float]:
        """Compare with plain Hugging Face, and the residual stream with the sum of what was written to it.

        Raises UserError if logits differ by 1e-3 or more from the module's own eager forward (float32; 5 % of their
        range in half precision), or if embedding + attention + MLP writes do not add up to the final residual stream.
        Where AbsTopK chooses activations, rounding can decide which; then they are compared in double precision.
        """
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.config.d_vocab, (2, min(32, self.config.n_ctx)), generator=generator)
        added = ("hook_embed", "hook_pos_embed", "hook_attn_out", "hook_mlp_out")
        writes = [hook for hook in self.hook_points if hook.endswith(added)]
        last = sites.block(self.config.n_layers - 1, "hook_resid_post")
        ours = self.run(tokens, capture=[*writes, last])
        plain = self._plain(tokens)
        difference = float((cast(Tensor, ours.logits).float() - plain).abs().max())
        total = sum(ours[hook].double() for hook in writes)
        residue = float((total - ours[last].double()).norm() / ours[last].double().norm())
        exact = self.dtype == torch.float32
        limit = 1e-3 if exact else 0.05 * float(plain.abs().max())
        if exact and not difference < limit and self._chooses_activations():
            with backend.in_double(self._module):
                difference = float((cast(Tensor, self.run(tokens).logits) - self._plain(tokens)).abs().max())
        if not difference < limit:
            raise UserError(
                f"{self.name}: logits differ from plain Hugging Face by {difference:.2g} (limit {limit:.2g}); "
                "this model cannot be trusted here."
            )
        if not residue < (1e-4 if exact else 0.05):
            raise UserError(
                f"{self.name}: what the layers write does not add up to the residual stream (relative error "
                f"{residue:.2g}); the row for {self.config.model_type!r} in workbench/architectures.py is wrong."
            )
        return {"max_logit_difference": difference, "residual_sum_error": residue}

    def _plain(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        """Logits of the module's own eager forward."""
        with self._lock, torch.no_grad(), backend.plain_attention(self._module):
            logits: Tensor = self._module(tokens.to(self.device), use_cache=False).logits
        return logits if logits.dtype == torch.float64 else logits.float()

    def _chooses_activations(self) -> bool:
        blocks = [self._block(layer) for layer in range(self.config.n_layers)]
        return any("AbsTopK" in getattr(block, "between", dict)().values() for block in blocks)


def numerics(dtype: str, device: str) -> str:
    """The numerics a model loaded with these settings will have."""
    kind = torch.device(device if device != spread.SPREAD else "cuda" if torch.cuda.is_available() else "cpu").type
    reduced = kind == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return f"{dtype}-sdpa-{kind}{'-tf32' if reduced else ''}"


def _after_fork(model: weakref.ref[LanguageModel]) -> None:
    """In the child, where no thread is left to finish a pass that was under way; the next pass takes its hooks away."""
    this = model()
    if this is not None:
        this._lock = threading.RLock()
