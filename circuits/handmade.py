"""GPT-2 modules from weights that were made by hand or by a compiler.

The library builds modules from folders alone, so one is written, read and thrown away.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file
from torch import Tensor

from workbench import backend


def gpt2(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    vocab: Mapping[str, int],
    unknown: str,
    *,
    bos: str | None = None,
) -> tuple[Any, Any, str]:
    """Module, tokenizer and digest of all that made them.

    config   what differs from a GPT-2 with untied embeddings, ReLU and no dropout
    vocab    words between spaces and their ids; any other word is `unknown`
    bos      a word that the tokenizer puts before every text
    """
    whole = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": len(vocab),
        "activation_function": "relu", "tie_word_embeddings": False,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **config,
    }  # fmt: skip
    tokenizer: dict[str, Any] = {
        "version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": dict(vocab), "unk_token": unknown},
    }  # fmt: skip
    names = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if bos is not None:
        whole |= {"bos_token_id": vocab[bos], "eos_token_id": vocab[bos]}
        names |= {"bos_token": bos, "unk_token": unknown}
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"] = [
            {"id": vocab[word], "content": word, "special": True} | plain for word in (bos, unknown)
        ]
        start = {"SpecialToken": {"id": bos, "type_id": 0}}
        text = [{"Sequence": {"id": part, "type_id": 0}} for part in "AB"]
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing", "single": [start, text[0]], "pair": [start, *text],
            "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}},
        }  # fmt: skip
    tensors = {name: value.contiguous() for name, value in state.items()}
    digest = hashlib.sha256(json.dumps([whole, tokenizer]).encode() + save(tensors)).hexdigest()[:32]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for file, content in (("config", whole), ("tokenizer", tokenizer), ("tokenizer_config", names)):
            (folder / f"{file}.json").write_text(json.dumps(content))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        module, made = backend.load(folder, torch.float32)
    return module, made, digest
