"""Toys: the disguise changes nothing, the models do their task, and their circuit is what ablation says it is."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import combinations, product

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from circuits import toy_weights, toys, tracr_models
from circuits.graph import INPUT, LOGITS, node_of
from circuits.patching import patching
from circuits.toys import Toy
from workbench import sites
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.interventions import resample, zero
from workbench.metrics import top1
from workbench.models import LanguageModel
from workbench.prompts import Batch
from workbench.scores import NodeScores, head, head_auc, mlp
from workbench.sites import Site, block

WORDS = ("bos", *"abcdefg")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens_like(model: LanguageModel, n: int = 8, seed: int = 1) -> Tensor:
    return torch.randint(model.config.d_vocab - 1, (n, model.config.n_ctx), generator=generator(seed))


def logits_of(model: LanguageModel, tokens: Tensor, **options: object) -> Tensor:
    logits = model.run(tokens, **options).logits  # type: ignore[arg-type]
    assert logits is not None
    return logits


def stacked(batch: Batch) -> tuple[Tensor, Tensor]:
    return torch.stack(batch.clean), torch.stack(batch.corrupted)


def node_auc(scores: NodeScores, truth: Iterable[str]) -> float:
    """ROC AUC over heads and MLPs by counting pairs, ties half."""
    values = {name: abs(score) for name, score in zip(scores.nodes, scores.scores.tolist(), strict=True)}
    inside = [values.pop(name) for name in truth]
    wins = [(a > b) + (a == b) / 2 for a in inside for b in values.values()]
    return sum(wins) / len(wins)


# ---- the disguise ----


@pytest.fixture(scope="module")
def plain() -> toy_weights.Weights:
    """Random, and one head idle."""
    w = toy_weights.Weights.random(WORDS, 9, 12, 2, 3, 5, generator())
    w.out[1, 2] = 0
    return w


@pytest.fixture(scope="module")
def hidden(plain: toy_weights.Weights) -> toy_weights.Weights:
    examples = torch.randint(len(WORDS), (16, 9), generator=generator(2))
    return toy_weights.disguise(plain, examples, generator(3), heads=3, neurons=7)


def test_a_disguise_changes_no_logit_and_the_library_computes_the_same(
    plain: toy_weights.Weights, hidden: toy_weights.Weights
) -> None:
    model = toy_weights.to_model(hidden, "random")
    tokens = tokens_like(model)
    expected = toy_weights.forward(plain, tokens)
    torch.testing.assert_close(toy_weights.forward(hidden, tokens), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(model, tokens)[..., :-1], expected, rtol=1e-4, atol=1e-4)
    model.self_check()


def test_noise_writes_as_much_as_the_rest_and_has_no_effect(hidden: toy_weights.Weights) -> None:
    model = toy_weights.to_model(hidden, "random")
    tokens = tokens_like(model, 32)
    real = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    noise = [pair for pair in product(range(2), range(6)) if pair not in real]
    hooks = [block(layer, "attn.hook_result") for layer in range(2)]
    found = model.run(tokens, capture=hooks)
    size = {
        (layer, h): float(found[hooks[layer]][:, :, h].norm(dim=-1).mean()) for layer, h in product(range(2), range(6))
    }
    mean = sum(size[pair] for pair in real) / len(real)
    assert all(0.3 < size[pair] / mean < 3 for pair in noise)
    edit = {Site(block(layer, "attn.hook_z"), head=h): zero() for layer, h in noise}
    torch.testing.assert_close(logits_of(model, tokens, edit=edit), found.logits, rtol=1e-4, atol=1e-4)
    gone = {Site(block(layer, "attn.hook_z"), head=h): zero() for layer, h in real[:1]}
    assert float((logits_of(model, tokens, edit=gone) - found.logits).abs().max()) > 1e-2


def test_every_hook_point_of_a_model_without_norms_or_mlps_can_be_read() -> None:
    w = toy_weights.Weights.random(WORDS, 9, 12, 2, 3, 0, generator())
    model = toy_weights.to_model(w, "attention-only")
    found = model.run(tokens_like(model), capture=model.hook_points)
    assert all(torch.isfinite(found[hook][found[hook] != -torch.inf]).all() for hook in model.hook_points)
    assert not found[block(1, "hook_mlp_out")].any()
    model.self_check()


def test_the_fingerprint_follows_the_weights(plain: toy_weights.Weights) -> None:
    same = toy_weights.to_model(plain, "toy").fingerprint
    assert toy_weights.to_model(plain.map(torch.clone), "toy").fingerprint == same
    assert toy_weights.to_model(plain.map(lambda x: x * 1.001), "toy").fingerprint != same


def test_making_a_model_leaves_the_global_generator_alone(plain: toy_weights.Weights) -> None:
    before = torch.get_rng_state()
    toy_weights.to_model(plain, "toy")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_shape_that_gpt2_cannot_have_is_refused(plain: toy_weights.Weights) -> None:
    narrow = toy_weights.replace(plain, qkv=plain.qkv[..., :3], out=plain.out[:, :, :3])
    with pytest.raises(UserError, match="disguise it first"):
        toy_weights.to_model(narrow, "toy")


# ---- measuring a circuit in a second way ----


def ablated(toy: Toy, batch: Batch, nodes: Iterable[str], *, how: str = "resample") -> float:
    """Mean metric of the clean run with some nodes resampled from the corrupted prompt, or zero, at all positions."""
    total = 0.0
    for bucket in batch.buckets():
        some = batch.select(bucket.tolist())
        clean, corrupted = stacked(some)
        places = [_site(node) for node in nodes]
        found = toy.model.run(corrupted, capture=places)
        edit = {site: zero() if how == "zero" else resample(found[site]) for site in places}
        total += float(some.score(logits_of(toy.model, clean, edit=edit)[:, -1]).sum())
    return total / len(batch)


def _site(node: str) -> Site:
    layer, _, h = node[1:].partition(".h")
    return Site(block(int(layer), "attn.hook_z"), head=int(h)) if h else Site(block(int(layer), "hook_mlp_out"))


def edge_effects(toy: Toy, batch: Batch, edges: Iterable[str]) -> dict[str, Tensor]:
    """Exact patching of single edges: the destination reads the source's corrupted output, and nothing else changes.

    Without norms a destination reads a sum, so the difference of one source is added to what it reads. [batch] each:
    metric of the clean run minus that of the patched run.
    """
    model, last = toy.model, block(toy.model.config.n_layers - 1, "hook_resid_post")
    effects: dict[str, list[Tensor]] = {}
    for bucket in batch.buckets():
        some = batch.select(bucket.tolist())
        tokens = stacked(some)
        layers = range(model.config.n_layers)
        hooks = ["hook_embed", *(block(i, name) for i in layers for name in ("attn.hook_result", "hook_mlp_out"))]
        clean, corrupted = (model.run(x, capture=hooks) for x in tokens)
        assert clean.logits is not None
        differ = {INPUT: corrupted["hook_embed"] - clean["hook_embed"]}
        for i in layers:
            results = corrupted[block(i, "attn.hook_result")] - clean[block(i, "attn.hook_result")]
            differ |= {head(i, h): results[:, :, h] for h in range(model.config.n_heads)}
            differ[mlp(i)] = corrupted[block(i, "hook_mlp_out")] - clean[block(i, "hook_mlp_out")]
        for edge in edges:
            source, end = edge.split("->")
            node, delta = node_of(end), differ[source]
            layer, _, h = node[1:].partition(".h")
            if node == LOGITS:
                site = Site(last)
            elif h:
                site = Site(block(int(layer), f"attn.hook_{end[-2]}"), head=int(h))
                delta = delta @ model.in_weights(int(layer))[0]["qkv".index(end[-2]), int(h)].T
            else:
                site = Site(block(int(layer), "hook_mlp_in"))
            patched = logits_of(model, tokens[0], edit={site: lambda x, by=delta: x + by})
            effect = some.score(clean.logits[:, -1]) - some.score(patched[:, -1])
            effects.setdefault(edge, []).append(effect)
    return {edge: torch.cat(parts) for edge, parts in effects.items()}


def test_patching_every_edge_out_of_the_input_and_the_nodes_that_is_read_gives_the_corrupted_run(
    hidden: toy_weights.Weights,
) -> None:
    """The second way itself: an edge patch is a node patch when the node has one reader."""
    model = toy_weights.to_model(hidden, "random")
    task = toys.Task("any", 1, "logit_diff", _any_prompt, "")
    toy = Toy("any", model, task, ())
    batch = toy.batch(8)
    last = head(1, 1)  # read by m1 and by the logits alone
    clean = ablated(toy, batch, [])
    effects = edge_effects(toy, batch, [f"{mlp(1)}->logits", f"{last}->logits", f"{last}->m1"])
    assert float(effects["m1->logits"].mean()) == pytest.approx(clean - ablated(toy, batch, ["m1"]), abs=1e-4)
    assert abs(float(effects[f"{last}->logits"].mean())) > 1e-3 < abs(float(effects[f"{last}->m1"].mean()))


def _any_prompt(rng: random.Random) -> toys.Prompt:
    words = rng.choices("abcdefg", k=6)
    other = rng.choices("abcdefg", k=6)
    right, wrong = rng.sample("abcdefg", 2)
    return toys.Prompt(f"bos {' '.join(words)}", f"bos {' '.join(other)}", (f" {right}",), (f" {wrong}",))


# ---- toys ----


@pytest.fixture(scope="module")
def induction() -> Toy:
    return toys.induction()


@pytest.fixture(scope="module")
def ioi() -> Toy:
    return toys.symbolic_ioi()


@pytest.fixture(scope="module")
def addition() -> Toy:
    return toys.modular_addition()


TRAINED = ("induction", "ioi", "addition")


@pytest.fixture
def toy(request: pytest.FixtureRequest) -> Toy:
    found: Toy = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("toy", TRAINED, indirect=True)
def test_batches_are_aligned_different_and_follow_the_seed(toy: Toy) -> None:
    batch = toy.batch(16, seed=1)
    assert len({prompt.clean for prompt in batch.prompts}) == 16
    for clean, corrupted in zip(batch.clean, batch.corrupted, strict=True):
        assert len(clean) == len(corrupted) and not torch.equal(clean, corrupted)
    assert toy.batch(16, seed=1).prompts == batch.prompts != toy.batch(16, seed=2).prompts
    with pytest.raises(UserError, match="Ask for fewer"):
        toy.batch(5000)


@pytest.mark.parametrize("toy", TRAINED, indirect=True)
def test_the_model_does_the_task_and_the_corrupted_prompt_takes_it_away(toy: Toy) -> None:
    batch = toy.batch(48, seed=5)
    clean, corrupted = stacked(batch)
    assert float(top1(logits_of(toy.model, clean)[:, -1], batch.answers).mean()) >= 0.95
    assert float(batch.score(logits_of(toy.model, corrupted)[:, -1]).mean()) < 0.2 * ablated(toy, batch, [])


@pytest.mark.parametrize("toy", TRAINED, indirect=True)
def test_the_circuit_is_faithful_on_other_prompts_and_loses_with_any_node_less(toy: Toy) -> None:
    batch = toy.batch(48, seed=7)
    assert toys.faithfulness(toy.model, batch, toy.nodes) > toys.FAITHFUL - 0.05
    for node in toy.nodes:
        assert toys.faithfulness(toy.model, batch, set(toy.nodes) - {node}) < toys.FAITHFUL - 0.05


@pytest.mark.parametrize("toy", TRAINED, indirect=True)
def test_faithfulness_is_what_ablation_of_the_others_leaves(toy: Toy) -> None:
    batch = toy.batch(24, seed=9)
    everything, nothing = ablated(toy, batch, []), ablated(toy, batch, toy.graph.nodes)
    others = ablated(toy, batch, set(toy.graph.nodes) - set(toy.nodes))
    expected = (others - nothing) / (everything - nothing)
    assert toys.faithfulness(toy.model, batch, toy.nodes) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("toy", TRAINED, indirect=True)
def test_exact_patching_finds_the_circuit(toy: Toy, store: ActivationStore) -> None:
    assert node_auc(patching(toy.model, toy.batch(48, seed=3), store), toy.nodes) == 1
