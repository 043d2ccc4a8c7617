"""The device tier, on a real GPU: run with `pytest -m gpu`."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from workbench.activations import ActivationStore
from workbench.models import LanguageModel
from workbench.sites import block

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HOOKS = [block(1, "attn.hook_z"), block(2, "hook_resid_post")]


@pytest.fixture
def on_gpu(tiny: LanguageModel) -> LanguageModel:
    module = copy.deepcopy(tiny._module).cuda()
    return LanguageModel(module, tiny.tokenizer, name=tiny.name, fingerprint=tiny.fingerprint)


def rows(n: int = 12, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(500, (5 + i % 4,), generator=generator) for i in range(n)]


def test_a_device_hit_returns_the_stored_bytes_and_runs_nothing(on_gpu: LanguageModel, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path / "s")
    host = store.get(on_gpu, rows(), HOOKS)
    passes = on_gpu.forward_passes
    first = store.get(on_gpu, rows(), HOOKS, device="cuda")
    again = store.get(on_gpu, rows(), HOOKS, device="cuda")
    assert on_gpu.forward_passes == passes and store.stats().device_hits == 24
    for hook in HOOKS:
        for a, b, c in zip(host[hook], first[hook], again[hook], strict=True):
            assert b.is_cuda and torch.equal(a, b.cpu()) and torch.equal(b, c)
            b.zero_()  # the caller's own
    third = store.get(on_gpu, rows(), HOOKS, device="cuda")
    assert all(torch.equal(a, b.cpu()) for hook in HOOKS for a, b in zip(host[hook], third[hook], strict=True))


def test_values_from_a_gpu_agree_with_the_cpu_and_are_keyed_apart(
    on_gpu: LanguageModel, tiny: LanguageModel, tmp_path: Path
) -> None:
    store = ActivationStore(tmp_path / "s")
    a, b = store.get(tiny, rows(), HOOKS), store.get(on_gpu, rows(), HOOKS)
    assert store.stats().computed == 48
    for hook in HOOKS:
        for x, y in zip(a[hook], b[hook], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


def test_the_device_tier_keeps_its_budget(on_gpu: LanguageModel, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path / "s", device_bytes=4000)
    store.get(on_gpu, rows(20), HOOKS, device="cuda")
    assert 0 < store.stats().device_bytes <= 4000


def test_many_batches_in_flight_stay_apart(on_gpu: LanguageModel, tmp_path: Path) -> None:
    """Copies run beside the next pass: no row may see another batch's values."""
    store = ActivationStore(tmp_path / "s", memory_bytes=0)
    some = [torch.randint(500, (5 + i % 40,)) for i in range(200)]
    found = store.get(on_gpu, some, HOOKS)
    for i in range(0, 200, 17):
        alone = on_gpu.run(some[i][None], capture=HOOKS, logits="none")
        for hook in HOOKS:
            torch.testing.assert_close(found[hook][i], alone[hook][0].cpu(), rtol=1e-4, atol=1e-4)
