"""Exact patching against one full forward pass per node, and laws that hold for any model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from circuits.patching import patching
from tests.conftest import CONFIGS
from workbench import registry, scores
from workbench.activations import ActivationStore
from workbench.interventions import resample
from workbench.models import LanguageModel
from workbench.prompts import Batch, sample
from workbench.sites import Site, block


def draw(model: LanguageModel, task: str = "ioi", n: int = 6) -> Batch:
    return sample(registry.get_task(task), model, n, seed=0)


def naive(model: LanguageModel, base: torch.Tensor, source: torch.Tensor, node: str) -> torch.Tensor:
    """Logits at the last position of one whole forward pass with one node replaced."""
    layer = int(node[1:].split(".")[0])
    site = Site(block(layer, "hook_mlp_out"))
    if node.startswith("a"):
        site = Site(block(layer, "attn.hook_z"), head=int(node.split("h")[1]))
    value = model.run(source[None], capture=[site])[site]
    logits = model.run(base[None], edit={site: resample(value)}).logits
    assert logits is not None
    return logits[:, -1]


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_equals_one_forward_pass_per_node(
    kind: str, direction: str, make_tiny: Callable[..., LanguageModel], store: ActivationStore
) -> None:
    model = make_tiny(kind)
    batch = draw(model, n=4)
    found = patching(model, batch, store, direction=direction)  # type: ignore[arg-type]
    assert found.per_prompt is not None
    for i in range(len(batch)):
        one = batch.select([i])
        pair = (batch.clean[i], batch.corrupted[i])
        base, source = pair if direction == "noise" else pair[::-1]
        logits = model.run(base[None], logits="last").logits
        assert logits is not None
        before = one.score(logits[:, -1])
        for k, node in enumerate(found.nodes):
            change = before - one.score(naive(model, base, source, node))
            expected = change if direction == "noise" else -change
            assert float(found.per_prompt[k, i]) == pytest.approx(float(expected), abs=2e-5), node
    torch.testing.assert_close(found.per_prompt.mean(1), found.scores)


def test_patching_everything_gives_the_corrupted_run(tiny: LanguageModel) -> None:
    batch = draw(tiny, n=1)
    clean, corrupted = batch.clean[0][None], batch.corrupted[0][None]
    writes = [h for h in tiny.hook_points if h.endswith(("hook_embed", "attn.hook_z", "hook_mlp_out"))]
    source = tiny.run(corrupted, capture=writes)
    patched = tiny.run(clean, edit={hook: resample(source[hook]) for hook in writes})
    torch.testing.assert_close(patched.logits, source.logits)


def test_a_head_that_writes_nothing_scores_nothing(
    make_tiny: Callable[..., LanguageModel], store: ActivationStore
) -> None:
    model = make_tiny(seed=3)
    model.out_weight(1)[2].zero_()  # a view of the weight
    found = patching(model, draw(model), store)
    effects = found.heads()
    assert abs(effects["a1.h2"]) < 1e-6  # float rounding
    assert min(abs(v) for name, v in effects.items() if name != "a1.h2") > 1e-5


def test_prefix_and_batching_change_nothing(
    tiny: LanguageModel, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One patch and one prompt at a time gives the same scores as many together."""
    batch = draw(tiny, "greater_than")
    together = patching(tiny, batch, store)
    monkeypatch.setattr("circuits.patching.TOKENS_PER_PASS", 1)
    monkeypatch.setattr("circuits.patching.PROMPTS_AT_ONCE", 1)
    torch.testing.assert_close(patching(tiny, batch, store).scores, together.scores, rtol=1e-3, atol=1e-6)


def test_a_second_call_reads_the_store_and_recomputes_only_patched_runs(
    tiny: LanguageModel, store: ActivationStore
) -> None:
    batch = draw(tiny)
    patching(tiny, batch, store)
    before = store.stats().computed
    patching(tiny, batch, store, mlps=False)
    assert store.stats().computed == before


def test_mlps_can_be_left_out(tiny: LanguageModel, store: ActivationStore) -> None:
    found = patching(tiny, draw(tiny), store, mlps=False)
    assert found.nodes == tuple(scores.head(layer, h) for layer in range(3) for h in range(4))
