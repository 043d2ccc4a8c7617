"""Toys: the disguise changes nothing, the models do their task, and their circuit is what ablation says it is."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from circuits import toy_weights, toys, tracr_models
from circuits.edge_patching import exact
from circuits.patching import patching
from circuits.toys import Toy
from circuits.wiring import metric
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.interventions import resample, zero
from workbench.metrics import top1
from workbench.models import LanguageModel
from workbench.prompts import Batch
from workbench.scores import NodeScores, head, head_auc
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
    found = logits_of(model, tokens)
    torch.testing.assert_close(found[..., :-1], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[..., -1], expected.mean(-1), rtol=1e-4, atol=1e-4)  # any unknown word
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
    narrow = replace(plain, qkv=plain.qkv[..., :3], out=plain.out[:, :, :3])
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


def test_an_edge_patch_is_a_node_patch_where_a_node_has_one_reader(hidden: toy_weights.Weights) -> None:
    model = toy_weights.to_model(hidden, "random")
    toy = Toy("any", model, toys.Task("any", 1, "logit_diff", _any_prompt, ""), ())
    batch = toy.batch(8)
    last = "a1.h1"  # read by m1 and by the logits alone
    effects = toys.edge_effects(model, batch, ["m1->logits", f"{last}->logits", f"{last}->m1", "a0.h4->a1.h0<k>"])
    mean = {edge: float(effect.mean()) for edge, effect in effects.items()}
    assert mean["m1->logits"] == pytest.approx(ablated(toy, batch, []) - ablated(toy, batch, ["m1"]), abs=1e-4)
    assert abs(mean[f"{last}->logits"]) > 1e-3 < abs(mean[f"{last}->m1"])
    assert abs(mean["a0.h4->a1.h0<k>"]) < 1e-5  # noise: written where nothing real reads


def test_all_edges_of_one_destination_together_are_what_it_reads_on_the_corrupted_prompt(
    hidden: toy_weights.Weights,
) -> None:
    """To first order in the last layer, where the logits are linear in what they read: effects add up exactly."""
    model = toy_weights.to_model(hidden, "random")
    toy = Toy("any", model, toys.Task("any", 1, "logit_diff", _any_prompt, ""), ())
    batch = toy.batch(8)
    edges = [name for name in toy.graph.names if name.endswith("->logits")]
    total = sum(toys.edge_effects(model, batch, edges).values())
    clean, corrupted = (batch.score(logits_of(model, x)[:, -1]) for x in stacked(batch))
    # Position embeddings are the same in both, so every difference has an edge.
    torch.testing.assert_close(total, clean - corrupted, rtol=1e-3, atol=1e-3)


def _any_prompt(rng: random.Random) -> toys.Prompt:
    clean, corrupted = (" ".join(("bos", *rng.choices("abcdefg", k=6))) for _ in range(2))
    right, wrong = rng.sample("abcdefg", 2)
    return toys.Prompt(clean, corrupted, (f" {right}",), (f" {wrong}",))


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


@pytest.mark.parametrize("toy", TRAINED, indirect=True)
def test_the_model_does_the_task_and_the_corrupted_prompt_takes_it_away(toy: Toy) -> None:
    batch = toy.batch(48, seed=5)
    clean, corrupted = stacked(batch)
    assert float(top1(logits_of(toy.model, clean)[:, -1], batch.answers).mean()) >= 0.95
    assert float(batch.score(logits_of(toy.model, corrupted)[:, -1]).mean()) < 0.2 * ablated(toy, batch, [])


@pytest.mark.parametrize("toy", TRAINED, indirect=True)
def test_the_circuit_is_faithful_on_other_prompts_and_fails_without_any_of_its_nodes(toy: Toy) -> None:
    batch = toy.batch(48, seed=7)
    assert toys.faithfulness(toy.model, batch, toy.nodes) > 0.9
    for size in range(len(toy.nodes)):
        for subset in combinations(toy.nodes, size):
            assert toys.faithfulness(toy.model, batch, subset) < 0.9, subset


@pytest.mark.parametrize("toy", TRAINED, indirect=True)
def test_faithfulness_is_what_ablation_of_the_others_leaves(toy: Toy) -> None:
    batch = toy.batch(24, seed=9)
    everything, nothing = ablated(toy, batch, []), ablated(toy, batch, toy.graph.nodes)
    others = ablated(toy, batch, set(toy.graph.nodes) - set(toy.nodes[:1]))
    expected = (others - nothing) / (everything - nothing)
    assert toys.faithfulness(toy.model, batch, toy.nodes[:1]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("toy", TRAINED, indirect=True)
def test_exact_patching_finds_the_nodes_and_the_edges(toy: Toy, store: ActivationStore) -> None:
    batch = toy.batch(48, seed=3)
    scores = patching(toy.model, batch, store)
    assert node_auc(scores, toy.nodes) == 1
    value = dict(zip(scores.nodes, scores.scores.tolist(), strict=True))
    assert max(abs(value[node]) for node in value.keys() - set(toy.nodes)) < 1e-3
    among = [name for name, kept in zip(toy.graph.names, toy.graph.between(toy.nodes).tolist(), strict=True) if kept]
    noise = sorted(set(toy.graph.names) - set(among))[::9]
    effects = toys.edge_effects(toy.model, batch, [*among, *noise])
    share = {edge: abs(float(effect.mean())) / ablated(toy, batch, []) for edge, effect in effects.items()}
    assert min(share[edge] for edge in toy.edges) > 0.6 * toys.CARRIES
    assert max(share[edge] for edge in set(among) - set(toy.edges)) < 1.5 * toys.CARRIES
    assert max(share[edge] for edge in noise) < 1e-4


@pytest.mark.parametrize("toy", TRAINED, indirect=True)
def test_the_general_methods_agree_with_algebra_on_sums(toy: Toy, store: ActivationStore) -> None:
    """Without norms an edge is patched by adding to a query; the general methods know no such short way."""
    batch = toy.batch(12, seed=3)
    graph = toy.graph
    chosen = graph.between(toy.nodes)
    effects = toys.edge_effects(toy.model, batch, [graph.names[i] for i in chosen.nonzero()[:, 0].tolist()])
    found = exact(toy.model, batch, store, chosen)[:, chosen]
    torch.testing.assert_close(found, torch.stack(list(effects.values()), 1), rtol=1e-3, atol=1e-3)
    keep = graph.dense(graph.between(toy.nodes[1:]).float())[None]
    whole, nothing = graph.dense(torch.ones(len(graph)))[None], torch.zeros_like(keep)
    kept, everything, none = metric(toy.model, batch, store, torch.cat([keep, whole, nothing])).mean(1).tolist()
    by_hand = toys.faithfulness(toy.model, batch, toy.nodes[1:])
    assert (kept - none) / (everything - none) == pytest.approx(by_hand, abs=1e-3)


@pytest.mark.parametrize("toy", TRAINED, indirect=True)
def test_sizes_do_not_give_the_heads_away(toy: Toy) -> None:
    assert auc_of_sizes(toy) < 0.95


def auc_of_sizes(toy: Toy) -> float:
    """AUC of the mean norm of what a head writes at the last position."""
    layers = range(toy.model.config.n_layers)
    hooks = [block(layer, "attn.hook_result") for layer in layers]
    batch = toy.batch(32)
    bucket = batch.select(batch.buckets()[-1].tolist())
    found = toy.model.run(stacked(bucket)[0], capture=hooks)
    size = torch.cat([found[hook][:, -1].norm(dim=-1).mean(0) for hook in hooks])
    heads = tuple(head(layer, h) for layer in layers for h in range(toy.model.config.n_heads))
    return head_auc(NodeScores(heads, size, "norm of the head's output", ""), toy.nodes)


def test_what_cannot_be_measured_is_refused_with_a_sentence(ioi: Toy, make_tiny: Callable[..., LanguageModel]) -> None:
    batch = ioi.batch(4)
    with pytest.raises(UserError, match=r"no node of toy-ioi is called 'a3\.h9'"):
        toys.faithfulness(ioi.model, batch, ["a3.h9"])
    with pytest.raises(UserError, match="no edge of toy-ioi"):
        toys.edge_effects(ioi.model, batch, ["a0.h0->a0.h1<q>"])
    with pytest.raises(UserError, match="has norms"):
        toys.edge_effects(make_tiny("gpt2"), batch, [])
    shorter = replace(batch, clean=(batch.clean[0][1:], *batch.clean[1:]))
    with pytest.raises(UserError, match="several lengths"):
        toys.faithfulness(ioi.model, shorter, [])


# ---- induction ----


def test_the_first_head_looks_one_word_back_and_the_second_at_what_followed_last_time(induction: Toy) -> None:
    assert induction.nodes == ("a0.h0", "a1.h0")
    batch = induction.batch(48, seed=11)
    hooks = [block(layer, "attn.hook_pattern") for layer in range(2)]
    tokens, _ = stacked(batch)
    found = induction.model.run(tokens, capture=hooks)
    back = found[hooks[0]][:, 0, 1:9]  # the words of the shortest first copy
    assert (back.mean(0).argmax(-1) == torch.arange(8)).all()
    last = found[hooks[1]][:, 0, -1]
    followed = [int((row[:-1] == row[-1]).nonzero()[0]) + 1 for row in tokens]
    attention = last[torch.arange(len(batch)), followed]
    assert float(attention.mean()) > 0.7 and float(attention.min()) > 0.3


def test_the_second_head_reads_the_first_in_its_keys(induction: Toy) -> None:
    """K-composition: the key edge carries more than the others between the two, and the query edge next to nothing."""
    batch = induction.batch(48, seed=12)
    effects = toys.edge_effects(induction.model, batch, [f"a0.h0->a1.h0<{port}>" for port in "qkv"])
    q, k, v = (float(effect.mean()) for effect in effects.values())
    assert k > 0.3 * ablated(induction, batch, []) and k > 2 * abs(v) and k > 10 * abs(q)
    assert {"input->a0.h0<v>", "a0.h0->a1.h0<k>", "input->a1.h0<v>", "a1.h0->logits"} <= set(induction.edges)
    assert "a0.h0->logits" not in induction.edges


def test_each_head_alone_and_both_together_are_needed(induction: Toy) -> None:
    batch = induction.batch(48, seed=13)
    whole = ablated(induction, batch, [])
    for how, nodes in product(("resample", "zero"), (["a0.h0"], ["a1.h0"], ["a0.h0", "a1.h0"])):
        assert ablated(induction, batch, nodes, how=how) < 0.35 * whole, (how, nodes)


# ---- indirect object identification ----


def test_all_60_symbolic_prompts_are_right_and_need_both_heads(ioi: Toy) -> None:
    rows = [(a, b, s) for a, b in product("ABCDEF", repeat=2) if a != b for s in (a, b)]
    tokens = torch.stack([ioi.model.tokenize(" ".join(("bos", *row, "to"))) for row in rows])
    answers = [torch.tensor(ioi.model.token_ids(b if s == a else a)) for a, b, s in rows]
    assert len(rows) == 60
    assert float(top1(logits_of(ioi.model, tokens)[:, -1], answers).mean()) == 1
    for h in range(2):
        gone = {Site(block(0, "attn.hook_z"), head=h): zero()}
        assert float(top1(logits_of(ioi.model, tokens, edit=gone)[:, -1], answers).mean()) < 0.9


# ---- modular addition ----


def test_the_sum_is_right_for_all_pairs_and_was_learned_long_after_the_seen_ones(addition: Toy) -> None:
    p = toys.MODULUS
    pairs = list(product(range(p), repeat=2))
    tokens = torch.stack([addition.model.tokenize(f"{a} {b} =") for a, b in pairs])
    answers = [torch.tensor(addition.model.token_ids(str((a + b) % p))) for a, b in pairs]
    assert float(top1(logits_of(addition.model, tokens)[:, -1], answers).mean()) == 1
    memorised, generalised = addition.headline["memorised"], addition.headline["generalised"]
    assert memorised["accuracy_seen"] == 1 and memorised["accuracy_unseen"] < 0.3
    assert generalised["accuracy_unseen"] == 1 and generalised["step"] > 10 * memorised["step"]


def test_a_few_frequencies_of_the_embedding_are_what_the_sum_needs(addition: Toy) -> None:
    """Kept alone they give nearly every sum; without them hardly any is right."""
    p = toys.MODULUS
    keys = addition.headline["key_frequencies"]
    assert len(keys) <= 4 and addition.headline["share_of_embedding"] > 0.9
    model = addition.model
    pairs = list(product(range(p), repeat=2))
    tokens = torch.stack([model.tokenize(f"{a} {b} =") for a, b in pairs])
    answers = [torch.tensor(model.token_ids(str((a + b) % p))) for a, b in pairs]
    angle = 2 * torch.pi * torch.arange(p)[:, None] * torch.tensor(keys) / p
    waves = torch.cat([angle.cos(), angle.sin()], 1) * (2 / p) ** 0.5  # orthonormal
    table = model.run(torch.arange(p)[:, None], capture=["hook_embed"])["hook_embed"][:, 0]
    inside = waves @ waves.T @ (table - table.mean(0)) + table.mean(0)

    def right(embedded: Tensor) -> float:
        def edit(x: Tensor) -> Tensor:
            return torch.cat([embedded[tokens[:, :2]], x[:, 2:]], 1)

        return float(top1(logits_of(model, tokens, edit={"hook_embed": edit})[:, -1], answers).mean())

    assert right(table) == 1
    assert right(inside) > 0.9
    assert right(table - inside + table.mean(0)) < 0.2


def test_a_seed_that_was_not_trained_is_refused_with_the_way_to_train_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train_modular_addition\(3\)"):
        toys.modular_addition(3, folder=tmp_path)


def test_the_file_of_trained_weights_is_small() -> None:
    assert sum(path.stat().st_size for path in toys.DATA.iterdir()) < 300_000


@pytest.mark.slow
def test_training_again_generalises_too(tmp_path: Path) -> None:
    toys.train_modular_addition(1, tmp_path)
    headline = toys.modular_addition(1, folder=tmp_path).headline
    assert headline["memorised"]["accuracy_unseen"] < 0.5 < headline["generalised"]["accuracy_unseen"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_every_seed_gives_the_same_circuit(seed: int) -> None:
    found, ioi = toys.induction(seed), toys.symbolic_ioi(seed)
    assert found.nodes == ("a0.h0", "a1.h0") and "a0.h0->a1.h0<k>" in found.edges
    assert found.headline["accuracy"] > 0.97
    assert ioi.nodes == ("a0.h0", "a0.h1")


# ---- compiled programs ----


@pytest.fixture(scope="module")
def compiled() -> Callable[[str], Toy]:
    pytest.importorskip("tracr", reason="the compiler of the extra 'tracr' is not installed")
    return cache(tracr_models.compiled)


PROGRAMS = ("reverse", "hist", "frac_prevs", "shuffle_dyck")
CIRCUITS = {  # heads that the prompt decides, and heads that are the same for all prompts of one length
    "reverse": (("a3.h0",), ("a0.h0",)),
    "hist": (("a0.h0",), ()),
    "frac_prevs": (("a1.h0",), ()),
    "shuffle_dyck": (("a1.h0", "a1.h1", "a1.h2", "a1.h3", "a5.h0", "a6.h0"), ("a0.h0",)),
}


def test_an_unknown_program_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'shuffle_dyck'"):
        tracr_models.compiled("shuffle-dyck")


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_compiled_model_is_right_on_every_input_it_can_read(name: str, compiled: Callable[[str], Toy]) -> None:
    toy, program = compiled(name), tracr_models.programs()[name]
    for n in range(1, min(program.length, 6) + 1):
        rows = [row for row in product(program.vocab, repeat=n) if name != "frac_prevs" or 2 * row.count("x") != n]
        tokens = torch.stack([toy.model.tokenize(" ".join(("bos", *row))) for row in rows])
        answers = [torch.tensor(toy.model.token_ids(program.solve(row))) for row in rows]
        assert float(top1(logits_of(toy.model, tokens, logits="last")[:, -1], answers).mean()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_circuit_of_a_program_is_what_the_compiler_made(
    name: str, compiled: Callable[[str], Toy], store: ActivationStore
) -> None:
    toy = compiled(name)
    batch = toy.batch(48, seed=3)
    heads = tuple(tuple(node for node in nodes if node.startswith("a")) for nodes in (toy.nodes, toy.constant))
    assert heads == CIRCUITS[name]
    scores = patching(toy.model, batch, store)
    assert head_auc(scores, toy.nodes) >= 0.99
    assert node_auc(scores, toy.nodes) >= 0.99
    value = dict(zip(scores.nodes, scores.scores.tolist(), strict=True))
    assert min(value[node] for node in toy.nodes) > 1 > 100 * max(abs(value[x]) for x in value.keys() - set(toy.nodes))


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_constant_nodes_are_needed_and_noise_is_not(name: str, compiled: Callable[[str], Toy]) -> None:
    toy = compiled(name)
    batch = toy.batch(32, seed=4)
    real = {*toy.nodes, *toy.constant}
    tokens = [x for bucket in batch.buckets() for x in stacked(batch.select(bucket.tolist()))]
    for node in toy.graph.nodes:
        edit = {_site(node): zero()}
        changes = []
        for x in tokens:  # a length that reads as nothing is taken for the longest, so only shorter prompts tell
            edited = logits_of(toy.model, x, edit=edit, logits="last")
            changes.append(float((edited - logits_of(toy.model, x, logits="last")).abs().max()))
        if node in real:
            assert max(changes) > 0.5, node
        elif node.startswith("a"):
            assert max(changes) < 0.05, node


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_edge_of_a_program_carries_and_others_do_not(name: str, compiled: Callable[[str], Toy]) -> None:
    toy = compiled(name)
    batch = toy.batch(48, seed=5)
    batch = batch.select(batch.buckets()[-1].tolist())
    others = sorted(set(toy.graph.names) - set(toy.edges))[::7]
    effects = toys.edge_effects(toy.model, batch, [*toy.edges, *others])
    size = {edge: float(effect.abs().max()) for edge, effect in effects.items()}
    assert min(size[edge] for edge in toy.edges) > 1 > 20 * max(size[edge] for edge in others)


@pytest.mark.slow
def test_sizes_do_not_give_the_heads_of_a_program_away(compiled: Callable[[str], Toy]) -> None:
    assert auc_of_sizes(compiled("shuffle_dyck")) < 0.9
