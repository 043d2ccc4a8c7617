"""Contextual decomposition against its equations carried out on both parts, exact patching, and a known circuit."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from circuits import cdt as module
from circuits.cdt import Attention, cdt
from circuits.patching import patching
from circuits.planted import SUITE, plant
from circuits.writes import Writes
from tests.test_attribution import draw
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.scores import auc
from workbench.sites import block

Make = Callable[..., LanguageModel]
Pair = tuple[Tensor, Tensor]


class Pairs:
    """The equations as printed, for one source and one prompt: beta and gamma are both computed, and nothing is known
    of the clean run but the residual stream that enters the first block."""

    def __init__(self, model: LanguageModel, attention: Attention, signs: bool):
        self.model, self.attention, self.signs = model, attention, signs
        self.found: dict[str, Tensor] = {}

    def affine(self, pair: Pair, weight: Tensor, bias: Tensor | None) -> Pair:
        beta, gamma = (part @ weight for part in pair)
        if bias is None:
            return beta, gamma
        total = beta.abs() + gamma.abs() + 1e-30
        return beta + beta.abs() / total * bias, gamma + gamma.abs() / total * bias

    def norm(self, pair: Pair, norm: torch.nn.Module) -> Pair:
        beta, gamma = pair
        x = beta + gamma
        if isinstance(norm, torch.nn.LayerNorm):
            scale = norm.weight / (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
            total = beta.abs() + gamma.abs() + 1e-30
            first, second = ((part - part.mean(-1, keepdim=True)) * scale for part in pair)
            return first + norm.bias * beta.abs() / total, second + norm.bias * gamma.abs() / total
        scale = norm.weight / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        return beta * scale, gamma * scale

    def agree(self, pair: Pair) -> Pair:
        beta, gamma = pair
        if not self.signs:
            return pair
        odd, larger, x = beta * gamma < 0, beta.abs() >= gamma.abs(), beta + gamma
        return (
            torch.where(odd, torch.where(larger, x, 0), beta),
            torch.where(odd, torch.where(larger, 0, x), gamma),
        )

    def rotate(self, x: Tensor) -> Tensor:
        if self.model.config.model_type == "gpt2":
            return x
        cos, sin = self.model._module.model.rotary_emb(x, torch.arange(x.shape[0])[None])
        return apply_rotary_pos_emb(x.movedim(1, 0)[None], x.movedim(1, 0)[None], cos, sin)[0][0].movedim(0, 1)

    def heads(self, layer: int, pair: Pair) -> Pair:
        pair = self.norm(pair, self.model.attention_norm(layer))
        weight, bias = self.model.in_weights(layer)
        n, d = self.model.config.n_heads, self.model.config.d_head
        betas, gammas = [], []
        for h in range(n):
            (bq, gq), (bk, gk), (bv, gv) = (self.affine(pair, weight[i, h].T, bias[i, h]) for i in range(3))

            def turn(x: Tensor) -> Tensor:
                return self.rotate(x[:, None])[:, 0]

            bq, gq, bk, gk = turn(bq), turn(gq), turn(bk), turn(gk)
            future = torch.ones(len(bq), len(bq), dtype=torch.bool).triu(1)
            of_beta, of_all = (
                (q @ k.T / d**0.5).masked_fill(future, -torch.inf).softmax(-1)
                for q, k in ((bq, bk), (bq + gq, bk + gk))
            )
            betas.append((of_beta if self.attention == "paper" else of_all) @ bv)
            gammas.append(of_all @ (bv + gv) - betas[-1])
        return torch.stack(betas, 1), torch.stack(gammas, 1)

    def mlp(self, layer: int, pair: Pair) -> Pair:
        pre, up, out, act = self.model.mlp_weights(layer)
        normed = self.norm(pair, self.model.mlp_norm(layer))
        beta, gamma = self.agree(self.affine(normed, *pre))
        whole, rest = act(beta + gamma), act(gamma)
        if up is not None:
            beta, gamma = self.agree(self.affine(normed, *up))
            whole, rest = whole * (beta + gamma), rest * gamma
        return self.agree(self.affine((whole - rest, rest), *out))

    def run(self, layer: int, head: int | None, ablated: Tensor, resid: Tensor) -> Tensor:
        """Beta of the logits of a node whose ablated output is given; totals in `found`."""
        c = self.model.config
        pair = torch.zeros_like(resid), resid
        for at in range(c.n_layers):
            z = self.heads(at, pair)
            self.found[block(at, "attn.hook_z")] = sum(z)  # type: ignore[assignment]
            if at == layer and head is not None:
                z[0][:, head], z[1][:, head] = (z[0] + z[1])[:, head] - ablated[:, head], ablated[:, head]
            flat = z[0].flatten(1), z[1].flatten(1)
            wrote = self.affine(flat, self.model.out_weight(at).flatten(0, 1), self.model.out_bias(at))
            pair = pair[0] + wrote[0], pair[1] + wrote[1]
            out = self.mlp(at, pair)
            pair = self.agree((pair[0] + out[0], pair[1] + out[1]))
            if at == layer and head is None:
                assert not pair[0].any()
                deviation = sum(out) - ablated
                pair = deviation, pair[1] - deviation
            self.found[block(at, "hook_mlp_out")] = sum(out)  # type: ignore[assignment]
            self.found[block(at, "hook_resid_post")] = pair[0] + pair[1]
        final = self.model._module.get_submodule(self.model._family.final_norm)
        return (self.norm(pair, final)[0] @ self.model.unembed_weight)[-1]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize(("attention", "signs"), [("paper", True), ("paper", False), ("values", False)])
def test_beta_is_that_of_the_equations_and_beta_plus_gamma_the_clean_run(
    kind: str, attention: Attention, signs: bool, make_tiny: Make, store: ActivationStore
) -> None:
    model = make_tiny(kind)
    batch = draw(model, n=2)
    found = cdt(model, batch, store, ablation="resample", attention=attention, signs=signs)
    for node, name in (
        (block(0, "attn.hook_z"), "a0.h1"),
        (block(1, "hook_mlp_out"), "m1"),
        (block(2, "attn.hook_z"), "a2.h3"),
    ):
        for i in range(len(batch)):
            pairs = Pairs(model, attention, signs)
            corrupted = model.run(batch.corrupted[i][None], capture=[node])[node][0]
            hooks = [block(at, hook) for at in range(3) for hook in ("attn.hook_z", "hook_mlp_out", "hook_resid_post")]
            clean = model.run(batch.clean[i][None], capture=[block(0, "hook_resid_pre"), *hooks])
            head = int(name[-1]) if name[0] == "a" else None
            logits = pairs.run(int(name[1]), head, corrupted, clean[block(0, "hook_resid_pre")][0])
            for hook in hooks:
                torch.testing.assert_close(pairs.found[hook], clean[hook][0], rtol=1e-4, atol=1e-4)
            score = batch.select([i]).score(logits[None])
            assert found.per_prompt is not None
            got = found.per_prompt[found.nodes.index(name), i]
            torch.testing.assert_close(got, score[0], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["mistral", "qwen3", "gpt_neox"])
def test_queries_and_keys_meet_as_in_the_clean_run(kind: str, make_tiny: Make, store: ActivationStore) -> None:
    """Where all of the stream is relevant, z is that of the clean run: whatever turns, norms or windows there are."""
    model = make_tiny(kind)
    batch = draw(model).select([0])
    rules = module._Rules(model, Writes(model, store, batch, batch, "zero"), batch, "paper", False)
    for layer, clean in enumerate(rules.layers):
        z = rules.heads(layer, clean.attention_norm.x[None])[0]
        hook = block(layer, "attn.hook_z")
        torch.testing.assert_close(z, model.run(rules.tokens, capture=[hook])[hook], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_where_nothing_but_sums_follow_the_effect_is_exact(kind: str, make_tiny: Make, store: ActivationStore) -> None:
    """The last heads of a model without a final norm, whose last MLP writes the same whatever they do."""
    model = make_tiny(kind)
    model.fingerprint = f"{kind}-sums"
    if kind == "gpt2":
        model._module.transformer.ln_f = torch.nn.Identity()
        model._block(2).get_submodule("mlp.c_proj").weight.data.zero_()
    else:  # a parallel block, whose MLP does not read its heads
        model._module.gpt_neox.final_layer_norm = torch.nn.Identity()
    bias = model.out_bias(2)
    assert bias is not None
    bias.data.zero_()  # else a part of it is counted as the head's
    batch = draw(model)
    truth = patching(model, batch, store)
    last = [f"a2.h{h}" for h in range(4)]
    for signs in (False, True):
        found = cdt(model, batch, store, signs=signs)
        exact, got = (torch.stack([one.per_prompt[one.nodes.index(name)] for name in last]) for one in (truth, found))  # type: ignore[index]
        assert (
            torch.allclose(got, exact, rtol=1e-3, atol=1e-5) is not signs
        )  # the rule of signs moves what is not its own


def test_a_planted_circuit_is_found(store: ActivationStore) -> None:
    planted = plant(**SUITE[0])
    for attention in get_args(Attention):
        found = cdt(planted.model, planted.batch(8), store, attention=attention)
        label = torch.tensor([name in planted.nodes for name in found.nodes])
        assert auc(found.scores.abs().double(), label) > 0.95


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_node_that_does_not_deviate_has_no_relevance(kind: str, make_tiny: Make, store: ActivationStore) -> None:
    """Biases, which every rule shares out, give it nothing."""
    model = make_tiny(kind)
    model.fingerprint = f"{kind}-idle"  # its activations are not those of the model that others share
    if kind == "gpt2":
        part = model._block(1).get_submodule("attn.c_attn")
        part.weight.data[:, 2 * 32 : 2 * 32 + 8], part.bias.data[2 * 32 : 2 * 32 + 8] = 0, 0
    else:
        model._block(1).get_submodule("self_attn.v_proj").weight.data[:8] = 0
    found = cdt(model, draw(model), store)
    assert found.per_prompt is not None
    idle = found.per_prompt[found.nodes.index("a1.h0")]
    assert not idle.any() and bool(found.per_prompt[found.nodes.index("a1.h3")].all())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("ablation", ["resample", "mean"])
def test_what_shares_a_pass_does_not_matter(
    kind: str, ablation: str, make_tiny: Make, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny(kind)
    batch = draw(model, n=4)
    whole = cdt(model, batch, store, ablation=ablation)  # type: ignore[arg-type]
    monkeypatch.setattr(module, "TOKENS_PER_PASS", 100)
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 1)
    parts = cdt(model, batch, store, ablation=ablation)  # type: ignore[arg-type]
    torch.testing.assert_close(parts.per_prompt, whole.per_prompt, rtol=1e-3, atol=1e-5)


def test_what_has_no_rule_is_refused(make_tiny: Make, store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("gemma2", "gemma3_text"):
        model = make_tiny(kind)
        with pytest.raises(UserError, match="norms what attention writes"):
            cdt(model, draw(model), store)
    monkeypatch.setattr(LanguageModel, "post_attention_norm", lambda *_: None)
    model = make_tiny("gemma2")
    with pytest.raises(UserError, match="caps attention scores"):
        cdt(model, draw(model), store)
    model = make_tiny("gpt2")
    monkeypatch.setattr(module._Rules, "logits", lambda _, beta: beta[:, :, -1] @ model.unembed_weight * torch.nan)
    with pytest.raises(UserError, match="grew beyond all numbers"):
        cdt(model, draw(model), store)
