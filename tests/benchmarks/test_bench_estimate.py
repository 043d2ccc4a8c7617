"""What `estimate` says of a request beside what the request takes, on smollm2-135m with two threads.

Predicted: seconds within a factor of two, memory within a factor of two once the weights have been read in.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from tests.benchmarks import harness
from tests.benchmarks.jobs import tokens_of
from workbench import sites
from workbench.activations import ActivationStore
from workbench.models import LanguageModel

REQUESTS = [  # sequences, tokens, hook points
    (32, 16, [sites.block(layer, "attn.hook_z") for layer in range(30)]),
    (8, 128, [sites.block(14, "hook_resid_post")]),
    (16, 128, [sites.block(layer, "hook_resid_post") for layer in range(30)]),
    (64, 128, [sites.block(20, "hook_resid_post")]),
]


@pytest.mark.slow
def test_estimates_against_what_requests_take(smollm: LanguageModel, tmp_path: Path) -> None:
    torch.set_num_threads(harness.THREADS)
    smollm.run(tokens_of(smollm, 2, 16))  # reads the weights in
    store = ActivationStore(tmp_path / "s")
    rows = []
    for number, (n, pos, hooks) in enumerate(REQUESTS):
        tokens = tokens_of(smollm, n, pos, seed=number)
        cost = store.estimate(smollm, tokens, hooks)
        with harness.peak_growth() as grown:
            started = time.perf_counter()
            found = store.get(smollm, tokens, hooks)
            seconds = time.perf_counter() - started
        stored = sum(4 * row.numel() for rows in found.values() for row in rows)
        assert cost.missing_bytes == stored  # bytes are exact
        rows.append(
            {
                "sequences": n,
                "tokens": pos,
                "sites": len(hooks),
                "seconds": {"estimate": round(cost.seconds, 2), "real": round(seconds, 2)},
                "megabytes": {"estimate": round(cost.peak_bytes / 1e6), "real": grown["mb"]},
            }
        )
        del found
    harness.record("store-estimate", {"model": smollm.name, "requests": rows})
