"""The peers' and the limits' sides of the benchmarks, each used as its own users use it.

Every model here is a twin: its own module tree over the same weight tensors as ours, so that a peer may wrap and patch
what it likes while the weights in the caches stay the same. nnsight is not in the lock file: it is looked for in the
folder named by BENCH_PEERS (`requirements.txt` beside this file), at the end of the path, so that it brings nothing
else along.
"""

from __future__ import annotations

import copy
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHUNK = 64  # entries that a reader hands over at a time
VERSIONS = ("transformer-lens", "sae-lens", "nnsight", "datasets", "pyarrow")

if os.environ.get("BENCH_PEERS") and os.environ["BENCH_PEERS"] not in sys.path:
    sys.path.append(os.environ["BENCH_PEERS"])


def twin(module: Any, attention: str = "sdpa") -> Any:
    """A module tree of its own over the same weight tensors, with the library's own attention kernel."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    other = copy.deepcopy(module, shared)
    other.set_attn_implementation(attention)
    return other


def save(model: Any, folder: Path, *, weights: bool = True) -> Path:
    """Model and tokenizer as a Hugging Face folder, for peers that load models themselves."""
    if weights:
        twin(model._module).save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


# ---- plain Hugging Face: the limits of a forward pass ----


class _Reached(Exception):
    """Ends a forward pass."""


def hf_full(module: Any, tokens: Tensor, layer: int) -> Tensor:
    """What a user without any library does: the whole forward with logits, and one hook."""
    found: list[Tensor] = []
    handle = module.model.layers[layer].register_forward_hook(lambda _, __, out: found.append(out))
    with torch.no_grad():
        module(tokens, use_cache=False)
    handle.remove()
    return found[0]


def hf_stopped(module: Any, tokens: Tensor, layer: int) -> Tensor:
    """The least that gives the site: the base model, ended by one hook after the layer; nothing is copied."""
    found: list[Tensor] = []

    def hook(_: Any, __: Any, out: Tensor) -> None:
        found.append(out)
        raise _Reached

    handle = module.model.layers[layer].register_forward_hook(hook)
    try:
        with torch.no_grad():
            module.model(tokens, use_cache=False)
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise AssertionError("the layer was not reached")


def hf_base(module: Any, tokens: Tensor) -> None:
    """The base model without unembedding: the least that computes every layer; no hook, nothing is kept."""
    with torch.no_grad():
        module.model(tokens, use_cache=False)


# ---- TransformerLens ----


def bridge(model: Any, folder: Path) -> Any:
    """A TransformerBridge as `boot_transformers` makes it (eager attention, so that patterns can be hooked)."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    module = twin(model._module, "eager")
    module.config.architectures = [type(module).__name__]
    # The bridge loads the tokenizer once more by its name, which therefore has to be a folder.
    tokenizer = AutoTokenizer.from_pretrained(save(model, folder, weights=False))
    return TransformerBridge.boot_transformers(model.name, hf_model=module, tokenizer=tokenizer)


def hooked_transformer(model: Any) -> Any:
    """A HookedTransformer as `from_pretrained_no_processing` makes it, from our weights: it knows no SmolLM2 by name.
    Its weights are copies, in its own layout."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    c = model._module.config
    cfg = HookedTransformerConfig(
        n_layers=c.num_hidden_layers, d_model=c.hidden_size, d_head=c.head_dim, n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads, d_mlp=c.intermediate_size, n_ctx=256, d_vocab=c.vocab_size,
        act_fn="silu", gated_mlp=True, normalization_type="RMS", final_rms=True, eps=c.rms_norm_eps,
        positional_embedding_type="rotary", rotary_dim=c.head_dim, rotary_base=int(c.rope_parameters["rope_theta"]),
        rotary_adjacent_pairs=False, device="cpu", init_weights=False, original_architecture="LlamaForCausalLM",
    )  # fmt: skip
    hooked = HookedTransformer(cfg)
    plain = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    hooked.load_and_process_state_dict(convert_llama_weights(model._module, cfg), **dict.fromkeys(plain, False))
    return hooked


def lens_cache(lens: Any, tokens: Tensor, hooks: Sequence[str], **options: Any) -> list[Tensor]:
    """`run_with_cache` of a bridge or HookedTransformer, everything unless `names_filter` is given; stop_at_layer=n
    ends before block n."""
    with torch.no_grad():
        _, found = lens.run_with_cache(tokens, **options)
    return [found[hook] for hook in hooks]


# ---- nnsight ----


@cache
def nnsight_missing() -> str | None:
    """Why nnsight cannot take part, in a line; None when it can."""
    try:
        import nnsight  # noqa: F401
    except Exception as error:  # whatever an import next to another version may raise
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def nnsight_model(model: Any) -> Any:
    """The wrapper that its documentation recommends for a loaded causal language model."""
    from nnsight import TransformersModel

    return TransformersModel(twin(model._module), task="text-generation", tokenizer=model.tokenizer)


def nnsight_trace(sight: Any, tokens: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """A trace that saves the outputs of some layers and ends after the last with `tracer.stop()`."""
    import nnsight

    with torch.no_grad(), sight.trace(tokens) as tracer:
        found = nnsight.save([])
        for layer in layers:
            found.append(sight.model.layers[layer].output)
        tracer.stop()
    return list(found)


# ---- SAELens ----


def sae_lens_config(folder: Path, hook: str, n: int, pos: int, d: int, **more: Any) -> Any:
    """The cache runner's configuration, with its defaults but for one trap: the buffer is what one shard holds, and a
    run always fills it, wrapping round the data set, so it is made as large as the data set and no larger."""
    from sae_lens import CacheActivationsRunnerConfig

    defaults = {"model_name": "", "model_class_name": "AutoModelForCausalLM", "model_batch_size": 8}
    return CacheActivationsRunnerConfig(
        dataset_path="tokens", hook_name=hook, d_in=d, training_tokens=n * pos, context_size=pos, device="cpu",
        new_cached_activations_path=str(folder), buffer_size_gb=(4 * n * pos * d + 1) / 1e9, streaming=False,
        prepend_bos=False, **(defaults | more),
    )  # fmt: skip


def sae_lens_runner(cfg: Any, tokens: Tensor) -> Any:
    """A CacheActivationsRunner over tokenized sequences; it loads the model itself and stops at the hook's layer."""
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner

    return CacheActivationsRunner(cfg, override_dataset=Dataset.from_dict({"input_ids": tokens.tolist()}))


def sae_lens_store(cfg: Any, rows: int | None = None) -> Any:
    """The ActivationsStore that reads a cache. `from_cache_activations` yields batches of `model_batch_size` rows, so
    for training-sized batches (`rows`) the class is called as `from_config` calls it."""
    from sae_lens.training.activations_store import ActivationsStore

    store = ActivationsStore.from_cache_activations(None, cfg)  # type: ignore[arg-type]  # no model is run
    if rows is not None:
        store.train_batch_size_tokens = rows
        store.n_batches_in_buffer = 64  # sequences' worth of rows in its shuffle buffer
    return store


def arrow_write(folder: Path, arrays: np.ndarray) -> None:
    """The runner's own steps after the forward pass: a Dataset of Array2D rows made from tensors, saved as a shard,
    and the shards moved together."""
    from datasets import Array2D, Features, Value
    from datasets import Sequence as Column
    from sae_lens import CacheActivationsRunner

    n, pos, d = arrays.shape
    cfg = sae_lens_config(folder, "site", n, pos, d)
    features = Features(
        {"site": Array2D(shape=(pos, d), dtype="float32"), "token_ids": Column(Value("int32"), length=pos)}
    )
    runner = SimpleNamespace(cfg=cfg, context_size=pos, features=features)
    acts = torch.from_numpy(arrays).flatten(0, 1)
    tokens = torch.zeros(n * pos, dtype=torch.int64)
    shards = folder / ".tmp_shards"
    shards.mkdir(parents=True)
    shard = CacheActivationsRunner._create_shard(runner, (acts, tokens))  # type: ignore[arg-type]
    shard.save_to_disk(str(shards / "shard_00000"), num_shards=1)
    CacheActivationsRunner._consolidate_shards(shards, folder, copy_files=False)


def arrow_read(folder: Path, shape: tuple[int, int, int]) -> Iterator[Tensor]:
    """One epoch, in order, through ActivationsStore."""
    n, pos, d = shape
    store = sae_lens_store(sae_lens_config(folder, "site", n, pos, d, model_batch_size=CHUNK))
    for _ in range(n // CHUNK):
        yield store.get_raw_llm_batch()[0].view(CHUNK, pos, d)


def arrow_rows(folder: Path, shape: tuple[int, int, int], order: Sequence[int]) -> Iterator[Tensor]:
    """Entries in a given order: slices of a data set with an index over it, which is what its default, a shuffled
    cache (`dataset.shuffle`), reads."""
    n, pos, d = shape
    store = sae_lens_store(sae_lens_config(folder, "site", n, pos, d, model_batch_size=CHUNK))
    dataset = store.cached_activation_dataset.select(order)
    for start in range(0, len(order), CHUNK):
        yield dataset[start : start + CHUNK]["site"]


# ---- limits of disk and memory ----


def raw_write(path: Path, arrays: np.ndarray, *, pieces: bool = False, sync: bool = False) -> None:
    """The bytes into a new file: in one go, or entry by entry; to the page cache, or to the disk."""
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    for part in arrays if pieces else [arrays]:
        view = memoryview(part).cast("B")
        while view:
            view = view[os.write(file, view) :]
    if sync:
        os.fsync(file)
    os.close(file)


def raw_read(path: Path, into: np.ndarray) -> np.ndarray:
    """The whole file into memory that is there already."""
    with path.open("rb", buffering=0) as file:
        view = memoryview(into).cast("B")
        while count := file.readinto(view):
            view = view[count:]
    return into


def raw_rows(path: Path, entry: tuple[int, int], order: Sequence[int]) -> Iterator[np.ndarray]:
    """Entries at known offsets in a given order, each chunk in new memory."""
    nbytes = 4 * entry[0] * entry[1]
    file = os.open(path, os.O_RDONLY)
    for start in range(0, len(order), CHUNK):
        some = order[start : start + CHUNK]
        chunk = np.empty((len(some), *entry), np.float32)
        for row, i in zip(chunk, some, strict=True):
            os.preadv(file, [memoryview(row).cast("B")], i * nbytes)
        yield chunk
    os.close(file)


@cache
def _index(root: Path) -> sqlite3.Connection:
    root.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(root / "bare.sqlite")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute("CREATE TABLE IF NOT EXISTS entries (key BLOB PRIMARY KEY, data BLOB) WITHOUT ROWID")
    return db


def bare_insert(root: Path, start: int, count: int, entry: Callable[[int], tuple[bytes, bytes]]) -> None:
    """The least that keeps a key and a small row: one table, one transaction."""
    with _index(root) as db:
        db.executemany("INSERT INTO entries VALUES (?, ?)", map(entry, range(start, start + count)))


def bare_lookup(root: Path, sample: Sequence[int], entry: Callable[[int], tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """The rows of some keys, in one query."""
    keys = [entry(i)[0] for i in sample]
    marks = ",".join("?" * len(keys))
    return dict(_index(root).execute(f"SELECT key, data FROM entries WHERE key IN ({marks})", keys))
