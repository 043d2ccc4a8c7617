"""Weight-sparse models as folders: config.json, tokenizer.json, and weights of which only the nonzeros are written.

A matrix of which less than half is nonzero is `NAME.values` and `NAME.index` (positions in the flattened matrix, in
ascending order). Tensors that half precision holds exactly are written in half precision. Reading gives back every bit.

The released checkpoints (`beeg_config.json` beside `final_model.pt`) are converted once by `from_release`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from circuits.sparse.model import MODEL_TYPE, SparseConfig, SparseTransformer
from workbench import backend, runs
from workbench.errors import UserError

WEIGHTS = "model.safetensors"
SMALLEST = 2.0**-24  # above 0 in half precision
# Keys of `beeg_config.json` that say nothing about what a trained model computes.
_TRAINING_ONLY = {
    "afrac_approx", "bigram_table_rank", "debug_exact_topk", "debug_nans", "dropout_cat_pos_emb", "expansion_factor",
    "enable_sparse_kernels", "expansion_factor_mlp", "flash", "grad_checkpointing", "ignore_dw_grad", "ln_bias",
    "n_embd", "pfrac", "rtopk", "sparse_matmul_impl", "tokenizer_name",
}  # fmt: skip
_ONLY = {"dropout": 0.0, "residual_activation_type": "identity", "rms_norm": True, "tied_unembed": False}
# What a key that is left out means in a release; it need not be what it means here.
_LEFT_OUT: dict[str, Any] = {
    "dropout": 0.0, "residual_activation_type": "identity", "rms_norm": False, "tied_unembed": True,
    "afrac_loctypes": "attn_in,attn_out,mlp_in,mlp_out", "enable_bigram_table": False,
}  # fmt: skip


def save(module: SparseTransformer, tokenizer: Any, folder: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write a folder that `LanguageModel.load` reads, aside and then renamed; a folder of this name must not exist.

    about  written beside it as about.json: how the model was made
    """
    if folder.exists():
        raise UserError(f"{folder} exists; give another name, so that no model is overwritten.")
    with runs.whole(folder) as aside:
        write(module, tokenizer, aside, about)


def write(module: SparseTransformer, tokenizer: Any, folder: Path, about: Mapping[str, Any] | None = None) -> None:
    """The files of a model, in a folder that exists."""
    (folder / "config.json").write_text(json.dumps(module.config.to_json(), indent=1))
    save_file(pack(module.state_dict()), folder / WEIGHTS)
    if about is not None:
        (folder / "about.json").write_text(json.dumps(about, indent=1))
    tokenizer.save_pretrained(folder)


def pack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Only the nonzeros of sparse matrices, and no bit more than needed."""
    out: dict[str, Tensor] = {}
    for name, whole in state.items():
        x = whole.detach().cpu().contiguous()
        if x.ndim > 1 and 2 * int(x.count_nonzero()) < x.numel():
            flat = x.flatten()
            where = flat.nonzero()[:, 0]
            out[f"{name}.index"], out[f"{name}.values"] = where.int(), _narrow(flat[where])
        else:
            out[name] = _narrow(x).clone()
    return out


@torch.no_grad()
def round_to_half(module: nn.Module) -> None:
    """Round all weights to what half precision holds, in place, so that they are written in half precision.

    None becomes 0: the smallest number of half precision stands for those that are smaller.
    """
    for x in module.parameters():
        rounded = x.half()
        lost = (rounded == 0) & (x != 0)
        x.copy_(torch.where(lost, torch.copysign(torch.full_like(x, SMALLEST), x), rounded.to(x.dtype)))


def _narrow(x: Tensor) -> Tensor:
    half = x.half()
    return half if x.dtype == torch.float32 and torch.equal(half.float(), x) else x


def unpack(packed: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `pack`, for a module whose state dict is `like`. Raises UserError if they do not fit."""
    out: dict[str, Tensor] = {}
    known = {f"{name}{part}" for name in like for part in ("", ".index", ".values")}
    if packed.keys() - known:
        raise UserError(f"the weights hold {min(packed.keys() - known)}, which this model has not.")
    for name, empty in like.items():
        if f"{name}.index" in packed:
            values = packed[f"{name}.values"].to(empty.dtype)
            flat = torch.zeros(empty.numel(), dtype=empty.dtype)
            out[name] = flat.scatter_(0, packed[f"{name}.index"].long(), values).view(empty.shape)
        elif name in packed and packed[name].shape == empty.shape:
            out[name] = packed[name].to(empty.dtype)
        else:
            raise UserError(f"the weights hold no {name} of shape {tuple(empty.shape)}; they are of another model.")
    return out


@backend.loader(MODEL_TYPE)
def load(folder: Path, dtype: torch.dtype) -> SparseTransformer:
    """Read a folder that `save` wrote. Raises UserError if it is of another model or damaged."""
    module = SparseTransformer(SparseConfig.from_json(json.loads((folder / "config.json").read_text())))
    try:
        packed = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read ({error}).") from error
    module.load_state_dict(unpack(packed, module.state_dict()))
    if (folder / "about.json").is_file():
        module.about = json.loads((folder / "about.json").read_text())
    module.folder = folder
    return module.to(dtype)


# ---- released checkpoints ----


def release_config(values: Mapping[str, Any], positions: str = "none") -> SparseConfig:
    """The configuration in a `beeg_config.json`. Raises UserError for keys and values that are not known, by name."""
    given: dict[str, Any] = _LEFT_OUT | {name: value for name, value in values.items() if name not in _TRAINING_ONLY}
    for name, only in _ONLY.items():
        if (value := given.pop(name)) != only:
            raise UserError(f"{name}={value!r} is not supported, only {only!r}.")
    if "n_mlp" in given:  # its name in older files
        given["d_mlp"] = given.pop("n_mlp")
    if isinstance(given.get("afrac_loctypes"), str):
        given["afrac_loctypes"] = tuple(given["afrac_loctypes"].split(","))
    for name in ("d_mlp", "d_head"):
        if given.get(name) is None:
            given[name] = 4 * given["d_model"] if name == "d_mlp" else given["d_model"] // given["n_head"]
    return SparseConfig.from_json(given | {"positions": positions})


def from_release(source: Path, tokenizer: Any, folder: Path) -> SparseTransformer:
    """Convert a folder with `beeg_config.json` and `final_model.pt` (or `model.safetensors`) to one of ours.

    The checkpoint is read with torch's restricted unpickler, which runs no code. Raises UserError if files are missing
    or hold more than this model has.
    """
    values = _json(source / "beeg_config.json")
    state = _state(source)
    table = state.pop("transformer.wpe.weight", None)
    added = values.get("d_pos_emb") is None and table is not None and bool(table.any())
    module = SparseTransformer(release_config(values, "added" if added else "none"))
    if module.transformer.wpe is not None and table is not None:
        state["transformer.wpe.weight"] = table
    if bool(state.pop("final_logits_bias", torch.zeros(())).any()):
        raise UserError(f"{source} has a bias on its logits, which this model does not have.")
    state = {name: x for name, x in state.items() if not name.endswith(".attn.bias")}  # a causal mask
    ours = module.state_dict()
    if state.keys() != ours.keys():
        extra, missing = sorted(state.keys() - ours.keys()), sorted(ours.keys() - state.keys())
        raise UserError(f"{source} does not fit: it has {extra[:3]} too many and lacks {missing[:3]}.")
    module.load_state_dict({name: x.to(ours[name].dtype) for name, x in state.items()})
    save(module, tokenizer, folder, {"converted from": source.name, "beeg_config": values})
    return module


def _json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); a released model has one.") from error
    return values


def _state(source: Path) -> dict[str, Tensor]:
    try:
        if (source / WEIGHTS).is_file():
            return dict(load_file(source / WEIGHTS))
        state = torch.load(source / "final_model.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many types
        raise UserError(f"no weights can be read in {source} ({str(error).splitlines()[0]}).") from error
    return {name.removeprefix("_orig_mod."): x for name, x in state.items()}
