"""Where each canonical hook point lives inside a Hugging Face model: a table, no code that runs a model.

A family maps the name inside a block to (path of the submodule, side):

    in, out  what the submodule reads and gives
    stream   what it reads, but the residual stream itself: an edit also reaches what is added to it later
    branch   what it reads, and it alone: neither an edit nor a gradient goes past it
    fused0-2 queries, keys, values in an output that holds all three of each head side by side

Tensors inside attention (`hook_z`, `hook_pattern`, rotated queries and keys) need no entry: the workbench runs the
attention step itself and sees them there, in the same layout for every family, so grouped-query attention needs no
special case.

`hook_attn_out` and `hook_mlp_out` are what is *added to the residual stream*; for Gemma that is after the
post-norms. The self-check at load time verifies that they sum to it, which is what catches a wrong row here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from workbench.errors import UserError


@dataclass(frozen=True)
class Family:
    embed: str
    blocks: str
    final_norm: str
    attn: str
    attn_norm: str
    act: str
    qkv: tuple[str, ...]  # three projections, or one that makes all three
    out_proj: str
    hooks: dict[str, tuple[str, str]]
    pos_embed: str | None = None
    rotary: bool = True
    more_norms: tuple[str, ...] = ()  # of a block, besides those before attention and MLP, and those inside attention


_LLAMA_HOOKS = {
    "hook_resid_pre": ("", "in"),
    "attn.hook_q": ("self_attn.q_proj", "out"),
    "attn.hook_k": ("self_attn.k_proj", "out"),
    "hook_attn_out": ("self_attn", "out"),
    "hook_resid_mid": ("post_attention_layernorm", "stream"),
    "hook_mlp_in": ("post_attention_layernorm", "branch"),
    "mlp.hook_pre": ("mlp.gate_proj", "out"),
    "mlp.hook_pre_linear": ("mlp.up_proj", "out"),
    "mlp.hook_post": ("mlp.down_proj", "in"),
    "hook_mlp_out": ("mlp", "out"),
    "hook_resid_post": ("", "out"),
}

LLAMA = Family(
    embed="model.embed_tokens",
    blocks="model.layers",
    final_norm="model.norm",
    attn="self_attn",
    attn_norm="input_layernorm",
    act="mlp.act_fn",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out_proj="self_attn.o_proj",
    hooks=_LLAMA_HOOKS,
)
GEMMA = Family(
    embed="model.embed_tokens",
    blocks="model.layers",
    final_norm="model.norm",
    attn="self_attn",
    attn_norm="input_layernorm",
    act="mlp.act_fn",
    more_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out_proj="self_attn.o_proj",
    hooks=_LLAMA_HOOKS
    | {
        "hook_attn_out": ("post_attention_layernorm", "out"),
        "hook_resid_mid": ("pre_feedforward_layernorm", "stream"),
        "hook_mlp_in": ("pre_feedforward_layernorm", "branch"),
        "hook_mlp_out": ("post_feedforward_layernorm", "out"),
    },
)
GPT2 = Family(
    embed="transformer.wte",
    pos_embed="transformer.wpe",
    blocks="transformer.h",
    final_norm="transformer.ln_f",
    attn="attn",
    attn_norm="ln_1",
    act="mlp.act",
    qkv=("attn.c_attn",),
    out_proj="attn.c_proj",
    rotary=False,
    hooks={
        "hook_resid_pre": ("", "in"),
        "hook_attn_out": ("attn", "out"),
        "hook_resid_mid": ("ln_2", "stream"),
        "hook_mlp_in": ("ln_2", "branch"),
        "mlp.hook_pre": ("mlp.c_fc", "out"),
        "mlp.hook_post": ("mlp.c_proj", "in"),
        "hook_mlp_out": ("mlp", "out"),
        "hook_resid_post": ("", "out"),
    },
)
GPT_NEOX = Family(  # Pythia: attention and MLP read the same residual, so there is no hook_resid_mid
    embed="gpt_neox.embed_in",
    blocks="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    attn="attention",
    attn_norm="input_layernorm",
    act="mlp.act",
    qkv=("attention.query_key_value",),
    out_proj="attention.dense",
    hooks={
        "hook_resid_pre": ("", "in"),
        "attn.hook_q": ("attention.query_key_value", "fused0"),
        "attn.hook_k": ("attention.query_key_value", "fused1"),
        "hook_attn_out": ("attention", "out"),
        "hook_mlp_in": ("post_attention_layernorm", "branch"),
        "mlp.hook_pre": ("mlp.dense_h_to_4h", "out"),
        "mlp.hook_post": ("mlp.dense_4h_to_h", "in"),
        "hook_mlp_out": ("mlp", "out"),
        "hook_resid_post": ("", "out"),
    },
)
_WEIGHT_SPARSE_HOOKS = GPT2.hooks | {  # circuits/sparse/model.py: what is read, after AbsTopK
    "attn.hook_in": ("attn.act_in", "out"),
    "mlp.hook_in": ("mlp.act_in", "out"),
}
WEIGHT_SPARSE = replace(GPT2, pos_embed=None, hooks=_WEIGHT_SPARSE_HOOKS)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "weight_sparse": WEIGHT_SPARSE,
    "weight_sparse_positions": replace(WEIGHT_SPARSE, pos_embed=GPT2.pos_embed),
}


def family(model_type: str) -> Family:
    if model_type not in FAMILIES:
        raise UserError(
            f"models of type {model_type!r} are not mapped yet; mapped: {', '.join(FAMILIES)}. "
            "A new family is one entry in workbench/architectures.py."
        )
    return FAMILIES[model_type]
