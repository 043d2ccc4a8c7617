"""Overlap against counting and sampling, and the intervention against a whole pass with the pattern rewritten."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest
import torch
from scipy.stats import hypergeom

from circuits.graph import Circuit, transformer
from circuits.intervention import alike, attention_intervention, behind_the_queries, force
from circuits.patching import patching
from circuits.path_patching import layer_of, path_patching
from circuits.reuse import backwards, overlap, reuse, shared_by_chance
from circuits.subspaces import keys_by_class
from tests.conftest import CONFIGS
from workbench import plots, registry
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.prompts import Batch, sample
from workbench.scores import NodeScores, head
from workbench.sites import block

HEADS = tuple(head(layer, h) for layer in range(3) for h in range(4))


def draw(model: LanguageModel, task: str = "ioi", n: int = 6, seed: int = 0) -> Batch:
    return sample(registry.get_task(task), model, n, seed=seed)


def scored(values: dict[str, float], per_prompt: torch.Tensor | None = None) -> NodeScores:
    rows = torch.tensor([values.get(name, 0.0) for name in HEADS])
    return NodeScores(HEADS, rows, "by hand", "logit_diff", per_prompt)


# ---- overlap ----


def test_overlap_by_hand() -> None:
    a = scored({"a0.h0": 3, "a0.h1": -2, "a2.h3": 1, "a1.h0": 0.1})
    b = scored({"a0.h1": 5, "a2.h3": 4, "a1.h2": 3})
    found = overlap({"a": a, "b": b}, share=0.25)  # 3 of 12 heads
    assert found.circuit(0) == ["a0.h0", "a0.h1", "a2.h3"] and found.circuit(1) == ["a0.h1", "a1.h2", "a2.h3"]
    assert (found.shared, found.union, found.ratio) == (2, 4, 0.5)
    torch.testing.assert_close(found.jaccard, torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    # Random heads: at least 2 of 3 among 12. Same layers: in layer 0 two and one of four, in layer 2 one and one.
    random_heads, same_layers = found.nulls["random heads"], found.nulls["same layers"]
    assert random_heads.p == pytest.approx((3 * 9 + 1) / 220)
    assert random_heads.expected == pytest.approx(3 * 3 / 12)
    assert same_layers.p == pytest.approx(1 / 2 * 1 / 4)
    assert same_layers.expected == pytest.approx(1 / 2 + 1 / 4)
    assert found.interval is None and found.halves == {}


def test_the_chance_of_sharing_is_what_permuting_scores_within_layers_gives() -> None:
    """Scores are permuted within layers and the largest taken anew, many times."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 5, 8, generator=generator) * torch.tensor([0.1, 0.5, 1.0, 1.0, 2.0])[:, None]
    names = tuple(head(layer, h) for layer in range(5) for h in range(8))
    found = overlap({str(i): NodeScores(names, x.flatten(), "", "") for i, x in enumerate(scores)}, share=0.25)
    ratios, counts = [], []
    for _ in range(4000):
        drawn = []
        for one in scores:
            order = torch.rand(5, 8, generator=generator).argsort(-1)
            drawn.append(set(one.gather(-1, order).flatten().topk(10).indices.tolist()))
        ratios.append(len(drawn[0] & drawn[1]) / len(drawn[0] | drawn[1]))
        counts.append(len(drawn[0] & drawn[1]))
    null = found.nulls["same layers"]
    assert null.mean == pytest.approx(sum(ratios) / 4000, abs=0.01)
    assert null.expected == pytest.approx(sum(counts) / 4000, abs=0.1)
    assert null.p == pytest.approx(sum(count >= found.shared for count in counts) / 4000, abs=0.03)
    low, high = torch.tensor(ratios).quantile(torch.tensor([0.025, 0.975])).tolist()
    assert (null.low, null.high) == pytest.approx((low, high), abs=0.08)


def test_chance_of_two_sets_is_hypergeometric_and_of_three_is_what_sampling_gives() -> None:
    members = torch.zeros(3, 30, dtype=torch.bool)
    for row, size in zip(members, (7, 11, 20), strict=True):
        row[:size] = True
    one_group = torch.zeros(30, dtype=torch.long)
    torch.testing.assert_close(
        shared_by_chance(members[:2], one_group), torch.from_numpy(hypergeom.pmf(range(8), 30, 7, 11))
    )
    rng = random.Random(0)
    counts = torch.zeros(8)
    for _ in range(20_000):
        counts[len(set.intersection(*(set(rng.sample(range(30), k)) for k in (7, 11, 20))))] += 1
    chance = shared_by_chance(members, one_group)
    assert float(chance.sum()) == pytest.approx(1)
    torch.testing.assert_close(chance.float(), counts / 20_000, rtol=0, atol=0.015)


def test_several_stages_are_counted_stage_by_stage() -> None:
    """The paper's ratio: a head shared in one stage and not in the other counts once in each."""
    first, second = scored({"a0.h0": 1}), scored({"a1.h1": 1})
    found = overlap({"a": [first, second], "b": [first, scored({"a0.h0": 1})]}, share=0.01)
    assert (found.shared, found.union) == (1, 3)
    assert float(found.jaccard[0, 1]) == 0.5  # {a0.h0, a1.h1} and {a0.h0}
    assert found.nulls["same layers"].expected == pytest.approx(1 / 4)


def test_circuits_bring_their_own_heads() -> None:
    graph = transformer(3, 4)
    kept = torch.tensor([name in ("input->a0.h1<q>", "a0.h1->a2.h0<v>", "a2.h0->logits") for name in graph.names])
    circuit = Circuit(graph, kept, "three edges")
    found = overlap({"circuit": circuit, "scores": scored({"a2.h0": 1})}, share=1 / 12)
    assert found.circuit(0) == ["a0.h1", "a2.h0"] and (found.shared, found.union) == (1, 2)
    assert found.agreement is None
    assert plots.figure(found).data and json_is_plain(found.summary())


def json_is_plain(summary: dict[str, object]) -> bool:
    return bool(json.dumps(summary, allow_nan=False))


def test_halves_tell_a_stable_circuit_from_an_unstable_one() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(12, 40, generator=generator)
    stable = noise * 0.1 + torch.arange(12.0)[:, None]
    both = {"a": scored({}, stable), "b": scored({}, stable.flip(0))}
    both = {name: NodeScores(HEADS, x.per_prompt.mean(1), "", "", x.per_prompt) for name, x in both.items()}  # type: ignore[union-attr]
    found = overlap(both, share=0.25)
    assert found.halves["within a"] == found.halves["within b"] == 1
    assert found.halves["across"] == 0 and found.interval == [0, 0]
    unstable = NodeScores(HEADS, noise.mean(1), "", "", noise)
    assert overlap({"a": unstable, "b": unstable}, share=0.25).halves["within a"] < 0.7


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"a": scored({})}, "1 circuit has nothing to overlap with"),
        ({"a": scored({"a0.h0": 1}), "b": scored({})}, "the circuit of b has no heads"),
        ({"a": scored({}), "b": NodeScores(("a0.h0",), torch.ones(1), "", "")}, "b has not the same heads as a"),
        ({"a": [scored({})], "b": [scored({}), scored({})]}, "a has 1 stages and b has 2"),
        ({name: NodeScores(("m0",), torch.ones(1), "", "") for name in "ab"}, "no heads at all"),
    ],
)
def test_circuits_that_cannot_be_compared_are_a_sentence(found: dict[str, NodeScores], message: str) -> None:
    with pytest.raises(UserError, match=message):
        overlap(found)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_a_share_that_is_none_is_a_sentence(share: float) -> None:
    with pytest.raises(UserError, match=f"share={share}"):
        overlap({"a": scored({}), "b": scored({})}, share=share)


# ---- the analysis ----


def test_reuse_is_the_overlap_of_the_methods_scores(tiny: LanguageModel, store: ActivationStore) -> None:
    batch, other = draw(tiny), draw(tiny, "docstring")
    found = reuse(tiny, batch, store, other="docstring", share=0.3)
    expected = {"ioi": patching(tiny, batch, store), "docstring": patching(tiny, other, store)}
    for i, name in enumerate(expected):
        best = {node for node, _ in expected[name].top(4)}
        assert set(found.circuit(i)) == best
    assert found.names == ["ioi", "docstring"] and found.interval is not None


def test_reuse_takes_any_method_with_scores_of_heads(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny)
    direct = reuse(tiny, batch, store, method="direct-logit-attribution", share=0.2)
    assert direct.members.sum() == 4
    staged = reuse(tiny, batch, store, method="path-patching", stages=2, share=0.2)
    assert staged.members.shape == (2, 2, 12)
    same_task = reuse(tiny, batch, store, other="ioi", other_seed=1)
    assert same_task.names == ["ioi", "ioi, seed 1"]
    for given, message in [
        ({"method": "logit-lens"}, "scores no nodes or edges"),
        ({"method": "reuse"}, "scores no nodes or edges"),
        ({"method": "patchin"}, "did you mean 'patching'"),
        ({"other": "iio"}, "did you mean 'ioi'"),
        ({"other": "ioi"}, "compared with the same prompts"),
        ({"stages": 2}, "only path-patching has stages"),
        ({"method": "path-patching", "stages": 5}, "only path-patching has stages, 1 to 4"),
    ]:
        with pytest.raises(UserError, match=message):
            reuse(tiny, batch, store, **given)  # type: ignore[arg-type]


def test_stages_go_back_through_the_queries_of_what_was_found(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny)
    direct, behind = backwards(tiny, batch, store, stages=2, share=0.2)
    movers = [name for name, _ in direct.top(12) if layer_of(name)][:2]
    receiver = ",".join(f"{name}<q>" for name in movers)
    expected = path_patching(tiny, batch, store, receiver=receiver, mlps=False, position="last").heads()
    for name, score in behind.heads().items():
        assert score == pytest.approx(expected.get(name, 0.0), abs=1e-6)


# ---- the intervention ----


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_forced_heads_attend_where_they_are_told(
    kind: str, make_tiny: Callable[..., LanguageModel], store: ActivationStore
) -> None:
    model = make_tiny(kind)
    batch = draw(model, "colored_objects", n=3)
    wrong = [found["candidate"] for found in keys_by_class(model, batch)]
    outcome = force(model, batch, store, ["a1.h2", "a1.h0", "a2.h1"], wrong, 0.75)
    for i, tokens in enumerate(batch.clean):
        assert int(wrong[i].sum()) == 2  # the two distractors of the question, none of the example

        def rewrite(heads: list[int], i: int = i) -> Callable[[torch.Tensor], torch.Tensor]:
            def fn(pattern: torch.Tensor) -> torch.Tensor:
                pattern = pattern.clone()
                for h in heads:
                    pattern[:, h, -1] *= 0.25
                    pattern[:, h, -1, wrong[i]] += 0.75 / 2
                return pattern

            return fn

        edit = {block(1, "attn.hook_pattern"): rewrite([2, 0]), block(2, "attn.hook_pattern"): rewrite([1])}
        logits = model.run(tokens[None], edit=edit).logits
        assert logits is not None
        assert float(outcome.metric[i]) == pytest.approx(float(batch.select([i]).score(logits[:, -1])), abs=2e-5)
        assert bool(outcome.top1[i]) == bool((logits[0, -1].argmax() == batch.answers[i]).any())


def test_at_strength_0_nothing_changes(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny, "colored_objects")
    found = attention_intervention(tiny, batch, store, heads="a1.h2, a2.h0", strength=0.0, controls=2)
    torch.testing.assert_close(found.after.metric, found.before.metric, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.mirrored.metric, found.before.metric, rtol=1e-4, atol=1e-5)
    assert found.after.mistakes(found.before) == 0 and found.p == 1
    wrong = [some["candidate"] for some in keys_by_class(tiny, batch)]
    nearly = force(tiny, batch, store, ["a1.h2"], wrong, 1e-6)
    torch.testing.assert_close(nearly.metric, found.before.metric, rtol=1e-3, atol=1e-4)


def test_the_heads_are_those_behind_the_other_tasks_movers(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny, "colored_objects")
    found = attention_intervention(tiny, batch, store, other="induction", k=2, controls=3)
    other = draw(tiny, "induction")
    assert tuple(found.heads) == behind_the_queries(tiny, other, store, 2)
    assert len(found.controls) == 3 and found.forced == len(batch)
    right = [some["answer"] for some in keys_by_class(tiny, batch)]
    assert torch.equal(found.mirrored.metric, force(tiny, batch, store, found.heads, right, 1.0).metric)
    assert found.p in [(1 + k) / 4 for k in range(4)]
    assert found.summary()["new_mistakes"] == found.after.mistakes(found.before)


def test_random_heads_are_as_many_in_each_layer_and_others() -> None:
    heads = ["a0.h1", "a2.h0", "a2.h3", "a1.h0", "a1.h1", "a1.h2"]
    for seed in range(20):
        drawn = alike(heads, 4, random.Random(seed))
        assert sorted(map(layer_of, drawn)) == sorted(map(layer_of, heads))
        assert len(set(drawn)) == len(heads)
        assert not {"a0.h1", "a2.h0", "a2.h3"} & set(drawn)  # layer 1 has too few others
    assert len({alike(heads[:3], 4, random.Random(seed)) for seed in range(20)}) > 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strength": 2.0}, "strength=2.0"),
        ({"controls": -1}, "controls=-1"),
        ({"k": 0}, "k=0 heads"),
        ({"heads": "a8.h0"}, "no head of this model"),
        ({"other": "oi"}, "no task is called"),
    ],
)
def test_interventions_that_cannot_be_are_a_sentence(
    given: dict[str, object], message: str, tiny: LanguageModel, store: ActivationStore
) -> None:
    with pytest.raises(UserError, match=message):
        attention_intervention(tiny, draw(tiny), store, **given)  # type: ignore[arg-type]


# ---- a real model ----


@pytest.mark.slow
def test_ioi_and_colored_objects_of_a_real_model(
    smollm: LanguageModel, store: ActivationStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """SmolLM2-135M: the tasks share more heads than random ones would, also with the layers given; but fewer than two
    halves of one task's prompts share."""
    batch = draw(smollm, n=16)
    found = reuse(smollm, batch, store, method="path-patching", stages=2, share=0.05)
    with capsys.disabled():
        print(f"\n{found.summary()}")  # noqa: T201
    assert found.nulls["random heads"].p < 1e-6 and found.nulls["same layers"].p < 0.01
    assert found.halves["across"] < min(found.halves["within ioi"], found.halves["within colored_objects"])


@pytest.mark.slow
def test_heads_that_suppress_repair_a_real_model_and_spoil_it_when_mirrored(
    smollm: LanguageModel, store: ActivationStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """SmolLM2-135M: a24.h4 lowers IOI's answer, to which it attends; on Colored Objects it lowers what it is shown."""
    found = attention_intervention(smollm, draw(smollm, "colored_objects", n=32), store, heads="a24.h4", controls=8)
    with capsys.disabled():
        print(f"\n{found.summary()}")  # noqa: T201
    assert found.after.accuracy > found.before.accuracy + 0.2 and found.mirrored.accuracy < 0.2
    others = [control.accuracy for control in found.controls]
    assert found.after.accuracy > sum(others) / len(others) + 0.2
