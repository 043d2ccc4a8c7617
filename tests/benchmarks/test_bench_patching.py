"""Exact patching of all 270 heads of smollm2-135m against one full forward pass per head and batch.

Prediction, written before the first measurement: patching layer L recomputes 30 - L of 30 blocks (15.5 on average,
x1.94), leaves out an unembedding worth 8 blocks (x1.26), and the shared prefix; together x2.6 to x3.2 for IOI.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from circuits.patching import _Patches
from tests.benchmarks.harness import record
from workbench import registry, sites
from workbench.activations import ActivationStore
from workbench.models import LanguageModel
from workbench.prompts import sample
from workbench.sites import Site

N = 16


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ioi", "greater_than"])
def test_patching_against_one_forward_pass_per_head(task: str, smollm: LanguageModel, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    batch = sample(registry.get_task(task), smollm, N, seed=0)
    store = ActivationStore(tmp_path / "store")
    ours = naive = setup = 0.0
    worst = 0.0
    for bucket in batch.buckets():
        i = bucket.tolist()
        some = batch.select(i)
        started = time.perf_counter()
        runs = _Patches(smollm, store, some.clean, some.corrupted, mlps=False)
        setup += time.perf_counter() - started
        clean, corrupted = torch.stack(some.clean), torch.stack(some.corrupted)
        for layer in range(smollm.config.n_layers):  # interleaved by layer
            started = time.perf_counter()
            _, fast = runs.layer(layer)
            ours += time.perf_counter() - started
            hook = sites.block(layer, "attn.hook_z")
            z = torch.stack(store.get(smollm, list(corrupted), [hook])[hook])
            started = time.perf_counter()
            slow = []
            for head in range(smollm.config.n_heads):
                edit = {Site(hook, head=head): lambda x, z=z, head=head: z[:, :, head]}
                logits = smollm.run(clean, edit=edit).logits
                assert logits is not None
                slow.append(logits[:, -1])
            naive += time.perf_counter() - started
            difference = [some.score(a) - some.score(b) for a, b in zip(fast, slow, strict=True)]
            worst = max(worst, float(torch.stack(difference).abs().max()))
    figures = {
        "model": "smollm2-135m",
        "task": task,
        "prompts": N,
        "buckets": [len(bucket) for bucket in batch.buckets()],
        "tokens": [len(batch.clean[int(bucket[0])]) for bucket in batch.buckets()],
        "heads": smollm.config.n_layers * smollm.config.n_heads,
        "seconds": {"ours": round(ours + setup, 2), "of which capture": round(setup, 2), "naive": round(naive, 2)},
        "ratio": round(naive / (ours + setup), 2),
        "largest_difference": worst,
    }
    record(f"patching-{task}", figures)
    assert worst < 1e-3
