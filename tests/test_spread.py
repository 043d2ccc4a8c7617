"""A model whose weights mostly lie in files against the same one in memory: every number is the same."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
import torch
from torch import Tensor

from circuits.graph import Graph
from workbench import registry, runs, sites
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.interventions import zero
from workbench.models import LanguageModel
from workbench.prompts import sample
from workbench.sites import Site
from workbench.spread import weights

LITTLE = {"cpu": 500_000}  # bytes: the embedding of 3,000 tokens and a block of the tiny model


@pytest.fixture
def both(tiny_folder: str) -> tuple[LanguageModel, LanguageModel]:
    spread = LanguageModel.load(tiny_folder, device="auto", memory=LITTLE)
    return LanguageModel.load(tiny_folder), spread


def test_most_weights_lie_in_files(both: tuple[LanguageModel, LanguageModel]) -> None:
    whole, spread = both
    places = spread._module.hf_device_map
    assert set(places.values()) == {"cpu", "disk"}
    last = spread._module.model.layers[2].self_attn.o_proj.weight
    assert last.device.type == "meta" and spread.device.type == "cpu"
    assert (spread.fingerprint, spread.numerics) == (whole.fingerprint, whole.numerics)


def test_passes_captures_and_edits_are_the_same(both: tuple[LanguageModel, LanguageModel]) -> None:
    whole, spread = both
    tokens = torch.stack([whole.tokenize("When Mary and John went to the store")] * 2)
    hooks = [hook for hook in whole.hook_points if "attn.hook_scores" not in hook]
    one, other = (model.run(tokens, capture=hooks) for model in both)
    assert torch.equal(one.logits, other.logits)  # type: ignore[arg-type]
    assert all(torch.equal(one[hook], other[hook]) for hook in hooks)
    edit = {Site(sites.block(1, "attn.hook_z"), head=2): zero()}
    edited = [model.run(tokens, edit=edit).logits for model in both]
    assert torch.equal(*edited) and not torch.equal(edited[0], one.logits)  # type: ignore[arg-type]
    assert spread._module.model.layers[2].self_attn.o_proj.weight.device.type == "meta"  # and away again


def test_weights_that_analyses_read_are_those_of_the_files(both: tuple[LanguageModel, LanguageModel]) -> None:
    whole, spread = both
    for layer in range(3):
        assert torch.equal(whole.out_weight(layer), spread.out_weight(layer))
        assert all(torch.equal(*pair) for pair in zip(whole.in_weights(layer), spread.in_weights(layer), strict=True))
        for ours, theirs in zip(whole.mlp_weights(layer)[:3], spread.mlp_weights(layer)[:3], strict=True):
            assert ours is not None and theirs is not None and torch.equal(ours.weight, theirs.weight)
    assert torch.equal(whole.unembed_weight, spread.unembed_weight)
    part = spread._module.model.layers[2].mlp.down_proj
    weight, bias = weights(part)
    assert bias is None and bool(weight.isfinite().all()) and part.weight.device.type == "meta"


@pytest.mark.parametrize("name", ["direct-logit-attribution", "patching", "attribution-patching", "eap"])
def test_analyses_give_the_same(name: str, both: tuple[LanguageModel, LanguageModel], tmp_path: Path) -> None:
    batches = [sample(registry.get_task("ioi"), model, 4, 0) for model in both]
    found = [
        registry.get_analysis(name).fn(model, batch, ActivationStore(tmp_path / str(i)))
        for i, (model, batch) in enumerate(zip(both, batches, strict=True))
    ]
    assert torch.equal(found[0].scores, found[1].scores)
    assert Graph.of(both[0].config).same_as(Graph.of(both[1].config))


def test_a_run_says_that_it_is_of_the_same_model(tiny_folder: str, both: tuple[LanguageModel, LanguageModel]) -> None:
    """What fits on one device is not spread; where weights lie is no part of a run's name."""
    few = {"model": tiny_folder, "task": "ioi", "n": 4}
    first = runs.run("logit-lens", device="auto", **few)
    assert "--device" not in first.record["command"] and first.record["environment"]["device"] == "cpu"
    assert runs.run("logit-lens", **few).id == first.id
    _, spread = both
    assert runs.run("logit-lens", **(few | {"model": spread})).id == first.id
    one = runs.run("attention-patterns", **(few | {"model": spread}))
    assert "--device auto" in one.record["command"] and one.record["environment"]["device"] == "auto"


@pytest.mark.parametrize("what", ["weights", "unembedding"])
def test_weights_wait_for_a_pass_that_has_them(what: str, both: tuple[LanguageModel, LanguageModel]) -> None:
    """A part has its weights only while it computes: who reads them in the middle of a pass would take them away."""
    whole, spread = both
    tokens, resid = torch.tensor([[1, 2, 3]]), torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    read: dict[str, Callable[[LanguageModel], Tensor]] = {
        "weights": lambda model: model.out_weight(2), "unembedding": lambda model: model.unembed(resid),
    }  # fmt: skip
    inside, go_on = Event(), Event()

    def held(x: Tensor) -> Tensor:
        inside.set()
        assert go_on.wait(20)
        return x

    with ThreadPoolExecutor(2) as pool:
        passing = pool.submit(spread.run, tokens, edit={"blocks.1.hook_mlp_out": held})
        assert inside.wait(20)
        reading = pool.submit(read[what], spread)
        try:
            with pytest.raises(TimeoutError):
                reading.result(timeout=0.3)
        finally:
            go_on.set()
        torch.testing.assert_close(reading.result(20), read[what](whole), rtol=1e-5, atol=1e-5)
        assert torch.equal(passing.result(20).logits, whole.run(tokens).logits)  # type: ignore[arg-type]


def test_what_cannot_be_shared_out_is_a_sentence(tiny_folder: str) -> None:
    with pytest.raises(UserError, match="memory is shared out with device='auto' alone"):
        LanguageModel.load(tiny_folder, memory={"cpu": "1GB"})
    with pytest.raises(UserError, match="not spread over devices; name one device"):
        LanguageModel.load("pycode-small", device="auto")
