"""The one file that touches Hugging Face: it loads modules, gives them our attention step, and registers hooks.

The library is imported where it is used, because that takes longer than all else that `wb runs` does. What is inside
attention is read and edited in `workbench/attention.py`. Everything else is an ordinary module hook, placed by the
table in `workbench/architectures.py`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from workbench import norms, sites
from workbench.architectures import Family
from workbench.attention import Taps, Visit, step
from workbench.errors import UserError

CausalLM = Any  # a PreTrainedModel, or a module that answers as one
PreTrainedTokenizer = Any  # a PreTrainedTokenizerBase
KERNEL = "workbench"  # a name with "sdpa" in it is refused for Gemma 2, whose soft cap we compute ourselves


@dataclass(frozen=True)
class ModelConfig:
    model_type: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    n_parameters: int
    final_softcap: float | None
    parallel_attn_mlp: bool = False  # attention and MLP of a block read the same residual stream


@dataclass(frozen=True)
class Resume:
    """Where a partial run starts: at `layer`, with the residual stream entering it.

    resid [batch, pos', d_model] covers the *last* pos' positions of the tokens. Earlier positions, if any, are known
    to be unchanged: `past` holds their keys (after rotation) and values for each layer from `layer` on, as captured at
    `attn.hook_rot_k` (`attn.hook_k` where there is no rotation) and `attn.hook_v`: [batch, past, kv head, d_head].
    """

    layer: int
    resid: Float[Tensor, "batch pos d_model"]
    past: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Stop(Exception):
    """Raised by a visitor to unwind the forward pass once the deepest requested site has been seen."""


# ---- loading ----


Loader = Callable[[Path, torch.dtype], nn.Module]
_loaders: dict[str, Loader] = {}


def loader(model_type: str) -> Callable[[Loader], Loader]:
    """Register what reads folders of one type of model that is not the library's: (folder, dtype) -> module.

    The module answers as the library's causal language models do; see `circuits.sparse.model`.
    """

    def register(fn: Loader) -> Loader:
        _loaders[model_type] = fn
        return fn

    return register


def load(folder: Path, dtype: torch.dtype, **options: Any) -> tuple[CausalLM, PreTrainedTokenizer]:
    """Model and tokenizer of a local folder; options: of `workbench.spread`. Raises UserError for unreadable files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    with _quiet():
        try:
            own = _loaders.get(json.loads((folder / "config.json").read_text()).get("model_type"))
            if own is not None:
                return own(folder, dtype), PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **options)
            return module, AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except UserError:
            raise
        except Exception as error:  # the backend raises many types for unreadable files
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{folder} could not be read as a model: {reason}") from error


def sentence_encoder(name: str) -> Callable[[Sequence[str]], Float[Tensor, "text d"]]:
    """Unit vectors of texts by an encoder with a pooler, such as LaBSE: a folder, or a name on the model hub.

    Raises UserError if it cannot be had.
    """
    from transformers import AutoModel, AutoTokenizer

    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            module = AutoModel.from_pretrained(name, use_safetensors=True).eval()
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"the sentence encoder {name} cannot be had: {reason}") from error

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        rows = [
            module(
                **tokenizer(list(texts[i : i + 32]), padding=True, truncation=True, return_tensors="pt")
            ).pooler_output
            for i in range(0, len(texts), 32)
        ]
        return F.normalize(torch.cat(rows).float(), dim=-1)

    return encode


def new_cache(module: CausalLM) -> Any:
    """An empty cache of keys and values for generation; None for a model that is not the library's and keeps none."""
    if not _of_the_library(module):
        return None
    from transformers import DynamicCache

    return DynamicCache(config=module.config)


def _of_the_library(module: CausalLM) -> bool:
    """Told without importing it, for nothing is an instance of a class that was not imported."""
    models = sys.modules.get("transformers.modeling_utils")
    return models is not None and isinstance(module, models.PreTrainedModel)


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizer:
    """A tokenizer of the `tokenizers` library as models are loaded with."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file to float32 safetensors and a tokenizer that load without it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        module = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
        del module.config.quantization_config  # else save_pretrained refuses: the weights are plain float32 now
        module.hf_quantizer = None
        module.is_quantized = False
        module.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # The library writes down that it was told to stay offline, which is not the model's and would change its digest.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    if "local_files_only" in config:
        config["local_files_only"] = False
        path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def describe(module: CausalLM) -> ModelConfig:
    c = module.config
    n_heads = c.num_attention_heads
    return ModelConfig(
        model_type=c.model_type,
        n_layers=c.num_hidden_layers,
        n_heads=n_heads,
        n_kv_heads=getattr(c, "num_key_value_heads", None) or n_heads,
        d_model=c.hidden_size,
        d_head=getattr(c, "head_dim", None) or c.hidden_size // n_heads,
        d_mlp=getattr(c, "intermediate_size", None) or getattr(c, "n_inner", None) or 4 * c.hidden_size,
        d_vocab=c.vocab_size,
        n_ctx=c.max_position_embeddings,
        n_parameters=sum(math.prod(p.shape) for p in module.parameters()),
        final_softcap=getattr(c, "final_logit_softcapping", None),
        parallel_attn_mlp=bool(getattr(c, "use_parallel_residual", False)),
    )


@contextmanager
def plain_attention(module: CausalLM) -> Iterator[None]:
    """The library's own eager attention, for comparison."""
    module.set_attn_implementation("eager")
    try:
        yield
    finally:
        use_attention(module)


@contextmanager
def in_double(module: CausalLM) -> Iterator[None]:
    """Computing in float64; the float32 weights come back bit for bit."""
    module.double()
    try:
        yield
    finally:
        module.float()


@contextmanager
def _quiet() -> Iterator[None]:
    """The backend's progress bars and advice are not for our users."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


# ---- the attention step ----


def attention(module: nn.Module, *args: Any, **options: Any) -> tuple[Tensor, None]:
    """`workbench.attention.step` around the library's kernel."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return step(sdpa_attention_forward, module, *args, **options)


def use_attention(module: CausalLM) -> None:
    """From here on the module's attention step is ours."""
    if _of_the_library(module):
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register(KERNEL, attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(KERNEL, sdpa_mask)
    module.set_attn_implementation(KERNEL)


# ---- hooks ----


@contextmanager
def hooked(
    module: CausalLM,
    family: Family,
    d_head: int,
    visitors: Mapping[str, Visit],
    edited: frozenset[str],
    start: Resume | None,
    result_of: Callable[[int, Tensor], Tensor],
    grad: bool,
    groups: int = 1,
    relevance: bool = False,
) -> Iterator[None]:
    """Install one run's visitors (hook point -> function of the tensor there), and take all of them away after it.

    Visitors come in order of computation. With `groups` > 1, keys and values are repeated that often before they are
    visited, so that each query head has its own. With `relevance`, gradients follow the rules of relevance propagation.
    """
    if module.__dict__.get("workbench_under_way"):
        _sweep(module)
    # Set before anything is installed: an interrupt may come between installing a hook and noting how to remove it.
    module.__dict__["workbench_under_way"] = True
    blocks = cast(nn.ModuleList, module.get_submodule(family.blocks))
    with ExitStack() as stack:
        install = partial(_install, stack)
        if start is not None:
            resid = start.resid
            for block in blocks[: start.layer]:
                _skip(stack, block)
            install(blocks[start.layer].register_forward_pre_hook, lambda _, args: (resid, *args[1:]))
        elif grad:  # parameters are frozen, so the graph has to begin somewhere
            embed = module.get_submodule(family.embed)
            install(embed.register_forward_hook, lambda _, __, out: out.requires_grad_())
        if relevance:
            for part, rule in _rules(module, family, blocks):
                install(part.register_forward_hook, rule)
        for block in blocks if groups > 1 else ():
            for path in family.qkv[1:]:
                install(block.get_submodule(path).register_forward_hook, partial(_repeat, d_head, groups))
        for hook, visit in visitors.items():
            layer, name = sites.split(hook)
            if layer is None:
                path = family.embed if name == "hook_embed" else cast(str, family.pos_embed)
                install(module.get_submodule(path).register_forward_hook, partial(_on_output, visit, None))
            elif name == "attn.hook_result":
                projection = blocks[layer].get_submodule(family.out_proj)
                install(projection.register_forward_hook, partial(_on_result, visit, layer, result_of))
            elif name in family.hooks:
                path, side = family.hooks[name]
                submodule = blocks[layer].get_submodule(path)
                if side in ("in", "stream", "branch"):
                    install(submodule.register_forward_pre_hook, partial(_on_input, visit, side), with_kwargs=True)
                elif side.startswith("fused"):
                    install(submodule.register_forward_hook, partial(_on_part, visit, d_head, int(side[-1])))
                else:
                    per_head = d_head if name in sites.HEAD_HOOKS else None
                    install(submodule.register_forward_hook, partial(_on_output, visit, per_head))
        for layer in range(start.layer if start else 0, len(blocks)):
            inside = {sites.block(layer, name): name for name in _attention_names(family)}
            visit_inside = {_tap_name(family, inside[hook]): visitors[hook] for hook in inside if hook in visitors}
            past = start.past.get(layer) if start else None
            if visit_inside or past or relevance:
                attn = blocks[layer].get_submodule(family.attn)
                names = frozenset(inside[hook] for hook in inside if hook in edited)
                stack.callback(attn.__dict__.pop, "workbench_taps", None)
                attn.workbench_taps = Taps(visit_inside, names, past, relevance)  # type: ignore[assignment]
        yield
    module.__dict__["workbench_under_way"] = False


def _install(
    stack: ExitStack, register: Callable[..., RemovableHandle], fn: Callable[..., Any], **options: bool
) -> None:
    fn.workbench = True  # type: ignore[attr-defined]
    stack.callback(register(fn, **options).remove)


def _sweep(module: nn.Module) -> None:
    """Take away whatever a pass that did not end in order (an interrupt, a fork) has left in the module: an edit that
    stayed would change every later pass."""
    for part in module.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for key in [key for key, fn in hooks.items() if hasattr(fn, "workbench")]:
                del hooks[key]
        part.__dict__.pop("workbench_taps", None)
        if hasattr(part.__dict__.get("forward"), "workbench"):
            del part.__dict__["forward"]


def _rules(
    module: CausalLM, family: Family, blocks: nn.ModuleList
) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    """Modules whose gradient is replaced, with what replaces their output: the same value, another slope.

    Layer-wise relevance propagation for transformers (Achtibat et al. 2024) as gradients: a norm's scale is a constant,
    an activation function is a multiplication with f(x) / x, and a product gives each factor half.
    """

    def norm(part: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        parts = norms.measure(part.forward, args[0])
        linear = parts.flat(args[0]) * parts.gain * parts.scale(args[0])
        return out.detach() + (linear - linear.detach())

    def activation(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = args[0]
        slope = torch.where(x.abs() > 1e-6, out / x, 0.5).detach()
        return out.detach() + slope * (x - x.detach())

    def product(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out.detach() + (out - out.detach()) / 2

    yield module.get_submodule(family.final_norm), norm
    for block in blocks:
        for path in (family.attn_norm, family.hooks["hook_mlp_in"][0], *family.more_norms):
            yield block.get_submodule(path), norm
        attn = block.get_submodule(family.attn)
        yield from ((getattr(attn, name), norm) for name in ("q_norm", "k_norm") if hasattr(attn, name))
        yield block.get_submodule(family.act), activation
        if (
            "mlp.hook_pre_linear" in family.hooks
        ):  # linear, so that half the slope of its output is half that of its input
            yield block.get_submodule(family.hooks["mlp.hook_post"][0]), product


def _attention_names(family: Family) -> tuple[str, ...]:
    queries = ("attn.hook_rot_q", "attn.hook_rot_k") if family.rotary else ("attn.hook_q", "attn.hook_k")
    return (*queries, "attn.hook_v", "attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z")


def _tap_name(family: Family, name: str) -> str:
    """Without rotation the kernel's queries and keys are simply `hook_q` and `hook_k`."""
    plain = {"attn.hook_q": "attn.hook_rot_q", "attn.hook_k": "attn.hook_rot_k"}
    return name if family.rotary else plain.get(name, name)


def hook_points(family: Family, n_layers: int) -> tuple[str, ...]:
    """Every hook point of a model, in order of computation."""
    inside = {*_attention_names(family), "attn.hook_result", *family.hooks}
    names = [name for name in sites.BLOCK_HOOKS if name in inside]
    embeds = sites.EMBED_HOOKS if family.pos_embed else sites.EMBED_HOOKS[:1]
    return (*embeds, *(sites.block(layer, name) for layer in range(n_layers) for name in names))


def _skip(stack: ExitStack, block: nn.Module) -> None:
    """A block that passes its input on: the residual stream it would have made is known already."""
    forward: Any = partial(_passed_on)
    forward.workbench = True
    stack.callback(block.__dict__.pop, "forward", None)
    block.forward = forward


def _passed_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


# Below are what a pass's hooks do, after the arguments that `partial` gives them: torch's own come last.


def _on_input(
    visit: Visit, side: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    before = args[0].view_as(args[0]) if side == "branch" else args[0]
    after = visit(before)
    if side == "stream" and after is not before:  # in place, as the block adds to this very tensor later
        after = before.copy_(after)
    return (after, *args[1:]), kwargs


def _on_part(visit: Visit, d_head: int, part: int, _: nn.Module, __: Any, out: Tensor) -> Tensor:
    """Queries (0), keys (1) or values (2) of an output that has them side by side for each head."""
    parts = list(out.unflatten(-1, (-1, 3, d_head)).unbind(-2))
    parts[part] = visit(parts[part])
    return torch.stack(parts, -2).flatten(-3)


def _repeat(d_head: int, groups: int, _: nn.Module, __: Any, out: Tensor) -> Tensor:
    """Keys or values, each key-value head repeated for every query head that uses it."""
    return out.unflatten(-1, (-1, d_head)).repeat_interleave(groups, -2).flatten(-2)


def _on_output(visit: Visit, d_head: int | None, _: nn.Module, __: Any, out: Any) -> Any:
    x = out[0] if isinstance(out, tuple) else out
    x = visit(x.unflatten(-1, (-1, d_head))).flatten(-2) if d_head else visit(x)
    return (x, *out[1:]) if isinstance(out, tuple) else x


def _on_result(
    visit: Visit, layer: int, result_of: Callable[[int, Tensor], Tensor],
    _: nn.Module, args: tuple[Tensor, ...], out: Tensor,
) -> Tensor:  # fmt: skip
    """What each head adds exists only inside the output projection, so it is computed from the projection's input."""
    result = result_of(layer, args[0])
    after = visit(result)
    return out if after is result else out + (after - result).sum(-2)
