"""What is measured in a process of its own: peak memory, and the cost curve. Run through `harness.fresh_process`."""

from __future__ import annotations

import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import harness, ours, peers
from workbench import sites
from workbench.activations import ActivationStore
from workbench.models import LanguageModel

MODEL, LAYER, SEED = "smollm2-135m", 14, 0
SITE = sites.block(LAYER, "hook_resid_post")
BATCH = 100  # entries of one write or lookup of the curve, as one forward pass gives


def tokens_of(model: LanguageModel, batch: int, pos: int, seed: int = SEED) -> torch.Tensor:
    return torch.randint(model.config.d_vocab, (batch, pos), generator=torch.Generator().manual_seed(seed))


def memory(what: str, n: int, pos: int, home: str, folder: str) -> float:
    """Peak growth of resident memory in MB of one request on `n` sequences, after a small one of the same kind: what
    is paid once (weights read in, libraries' own buffers) is no part of it."""
    os.environ["WORKBENCH_HOME"] = home
    torch.set_num_threads(harness.THREADS)
    model = LanguageModel.load(MODEL)
    act = _request(what, model, Path(folder))
    act(tokens_of(model, 2, 16, seed=SEED + 1))
    tokens = tokens_of(model, n, pos)
    with harness.peak_growth() as found:
        act(tokens)
    return found["mb"]


def _request(what: str, model: LanguageModel, folder: Path) -> Callable[[torch.Tensor], Any]:
    """The call whose memory is measured; it returns what its user would hold."""
    if what == "fill":
        store = ActivationStore(folder, memory_bytes=0)
        return lambda tokens: store.fill(model, list(tokens), [sites.block(0, "hook_resid_post")])
    if what == "our capture":
        return lambda tokens: model.run(tokens, capture=[SITE], logits="none")
    if what == "hf full forward":
        plain = peers.twin(model._module)
        return lambda tokens: peers.hf_full(plain, tokens, LAYER)
    if what == "hf stopped":
        plain = peers.twin(model._module)
        return lambda tokens: peers.hf_stopped(plain, tokens, LAYER)
    lens = peers.bridge(model, folder)
    options = {"bridge everything": {}, "bridge one site": {"names_filter": [SITE]}}[what]
    return torch.no_grad()(lambda tokens: lens.run_with_cache(tokens, **options))


def curve(side: str, folder: str, sizes: Sequence[int]) -> dict[str, Any]:
    """Microseconds per entry of inserting and looking up, and memory, as a tier grows through `sizes`.

    insert  mean over the entries since the last size (so that checkpoints and merges count), and the median write of
            the last 1,000 entries
    lookup  median of ten requests for `BATCH` entries each, drawn from all
    """
    insert, lookup = {
        "ours": (ours.curve_insert, ours.curve_lookup),
        "bare sqlite": (
            lambda root, start, count: peers.bare_insert(root, start, count, ours.small_entry),
            lambda root, sample: peers.bare_lookup(root, sample, ours.small_entry),
        ),
    }[side]
    rng = random.Random(SEED)
    root = Path(folder) / "curve"
    opening = range(10**9, 10**9 + BATCH)  # making files and tables is no part of the curve
    insert(root, opening.start, BATCH)
    lookup(root, opening)
    rows: list[dict[str, Any]] = []
    held = 0
    before = harness.memory_mb()
    for size in sizes:
        seconds = []
        for start in range(held, size, BATCH):
            began = time.perf_counter()
            insert(root, start, BATCH)
            seconds.append(time.perf_counter() - began)
        looked = []
        for _ in range(10):
            sample = rng.sample(range(size), BATCH)
            began = time.perf_counter()
            found = lookup(root, sample)
            looked.append(time.perf_counter() - began)
            assert {key: bytes(data) for key, data in found.items()} == dict(map(ours.small_entry, sample))
        rows.append(
            {
                "entries": size,
                "insert_us": 1e6 * sum(seconds) / (size - held),
                "insert_us_last": 1e6 * statistics.median(seconds[-10:]) / BATCH,
                "lookup_us": 1e6 * statistics.median(looked) / BATCH,
                "memory_mb": round(harness.memory_mb() - before, 1),
            }
        )
        held = size
    shutil.rmtree(folder, ignore_errors=True)
    return {"side": side, "sizes": rows}
