"""The device tier, kernels, and training of sparse models and SAEs, on a real GPU: run with `pytest -m gpu`."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from circuits.sparse import train
from circuits.sparse.data import train_tokenizer
from circuits.sparse.model import SparseConfig
from circuits.sparse.topk import AbsTopK, drop_weights, keep_weights
from circuits.sparse.train import Recipe, Step, Training, matrices
from saes import train as sae_train
from saes.objectives import Spec
from saes.train import Place, Units
from tests.benchmarks.harness import fresh_process
from workbench.activations import ActivationStore
from workbench.models import LanguageModel
from workbench.sites import block

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    from workbench import kernels
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


def test_what_is_kept_on_a_gpu_is_what_is_kept_on_a_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 1024, generator=generator) * torch.randn(256, 1, generator=generator).exp()
    for neurons in ("rows", "columns"):
        kept = keep_weights(weight, 20_000, 4, neurons)
        assert torch.equal(keep_weights(weight.cuda(), 20_000, 4, neurons).cpu(), kept)
        dropped = weight.cuda()
        drop_weights([(dropped, 20_000, 4, neurons)])
        assert torch.equal(dropped.cpu(), weight * kept)
    x, slopes = weight.clone().requires_grad_(), torch.randn(256, 1024, generator=generator)
    y = weight.cuda().requires_grad_()
    assert torch.equal(AbsTopK(256)(y).cpu(), AbsTopK(256)(x))
    (found,) = torch.autograd.grad(AbsTopK(256)(y), y, slopes.cuda())
    assert torch.equal(found.cpu(), torch.autograd.grad(AbsTopK(256)(x), x, slopes)[0])


def test_a_compiled_model_keeps_what_is_kept_on_a_cpu() -> None:
    """In a process without the tests' type checks, which cannot be compiled."""
    assert fresh_process(compiled_choices) == [True] * 8


def compiled_choices() -> list[bool]:
    few = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # many equal ones
    return [
        torch.equal(module(x.cuda()).cpu(), AbsTopK(k)(x))
        for x in (few, few.bfloat16())
        for k in (1, 256)
        for module in (AbsTopK(k), torch.compile(AbsTopK(k)))
    ]


@pytest.mark.parametrize(("precision", "compile"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_a_sparse_model_trains_on_a_gpu_as_on_a_cpu(precision: str, compile: bool) -> None:
    """In a process without the tests' type checks, which cannot be compiled."""
    losses, expected, exact = fresh_process(sparse_losses, precision, compile)
    assert exact and losses == pytest.approx(expected, rel=1e-3 if precision == "float32" else 2e-2)


def sparse_losses(precision: str, compile: bool) -> tuple[list[float], list[float], bool]:
    """Of some steps on a GPU, of the same in float32 on a CPU, and whether the GPU's weights are as sparse as asked."""
    model = SparseConfig(vocab_size=300, n_layer=2, d_model=64, n_head=4, block_size=64, afrac=0.25, sink=True)
    recipe = Recipe(model, density=0.25, embedding_density=0.5, tokens=16 * 8 * 64, batch=8, length=64)
    rows = torch.randint(300, (16, 8, 64), generator=torch.Generator().manual_seed(0))
    train.COUNTED, train.HELD_OUT = 20_000, 8
    bpe, losses = train_tokenizer(300, real=0.0, size=100_000), []
    for training in (
        Training(replace(recipe, precision=precision, compile=compile), bpe, device="cuda"),
        Training(recipe, bpe),
    ):
        losses.append([])
        for i in range(16):
            loss = training.loss(rows[i].to(training.module.device))
            loss.backward()
            training.optimiser.step(i / 16)
            losses[-1].append(float(loss.detach()))
        if len(losses) == 1:
            step = Step.at(recipe, 15 / 16)
            exact = all(
                int(w.count_nonzero()) == int((step.embedding_density if e else step.density) * w.numel())
                for _, w, _, e in matrices(training.module)
            )
    return losses[0], losses[1], exact


# ---- SAEs ----


def test_kernels_give_what_torch_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    for width, k in ((100, 7), (4096, 32), (6144, 64)):
        x = torch.randn(33, width, generator=generator).round(decimals=2).cuda()
        found = kernels.topk(x, k)
        assert torch.equal(x.gather(1, found).sort(-1, descending=True).values, x.topk(k).values)
        assert bool((found.diff(dim=-1) > 0).all())
    x, matrix = torch.randn(20, 600, generator=generator).cuda(), torch.randn(50, 600, generator=generator).cuda()
    rows, columns = torch.arange(20).cuda().repeat_interleave(50), torch.arange(50).cuda().repeat(20)
    torch.testing.assert_close(kernels.dots(x, matrix, rows, columns).view(20, 50), x @ matrix.T)


@pytest.mark.parametrize("dead_after", [1000, 2])
def test_an_sae_trains_on_a_gpu_as_on_a_cpu(dead_after: int) -> None:
    """Also where some latents are dead; and it goes on from what it was after 10 steps."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(64, 32, generator=generator)
    batches = [
        torch.rand(256, 64, generator=generator) * (torch.rand(256, 64, generator=generator) < 0.1) @ directions
        for _ in range(20)
    ]
    spec = Spec(latents=128, k=4, dead_after=dead_after, lr=3e-3, warm_up=4, decay=4)
    units = Units.of(batches[0])

    def training(device: str) -> sae_train.Training:
        return sae_train.Training(spec, Place("x"), 32, 32, steps=20, units=(units, units), device=device)

    def losses(one: sae_train.Training, some: list[torch.Tensor]) -> list[float]:
        return [float(one.step({"x": x}).loss.detach()) for x in some]

    here, there = training("cpu"), training("cuda")
    expected, found = losses(here, batches), losses(there, batches[:10])
    middle = {name: x.detach().clone().cpu() for name, x in there.state().items()}
    found += losses(there, batches[10:])
    assert there._replay is not None or dead_after == 2
    assert found == pytest.approx(expected, rel=1e-3)
    again = training("cuda")
    again.restore(middle, 10)
    assert losses(again, batches[10:]) == pytest.approx(found[10:], rel=1e-5)
    sae = again.sae({"x": batches[0]})
    torch.testing.assert_close(sae.to("cpu").W_dec, here.sae({"x": batches[0]}).W_dec, rtol=2e-2, atol=2e-2)
