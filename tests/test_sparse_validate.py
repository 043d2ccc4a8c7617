"""Validation of circuits: laws on a circuit that was put there by hand, with saboteurs and twins beside it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from circuits.graph import Circuit
from circuits.sparse import ablations
from circuits.sparse.channels import SITES, Channels
from circuits.sparse.masked import accuracy, calibrated
from circuits.sparse.model import SparseTransformer
from circuits.sparse.prune import Pairs, Pruned, Question, Searched, Settings, prune
from circuits.sparse.train import matrices
from circuits.sparse.validate import (
    Validation,
    backup,
    geometric_mean,
    necessity,
    nonsense,
    random_weights,
    stability,
    subsets,
    sufficiency,
    validate,
)
from circuits.sparse.variants import shuffled
from tests.test_sparse_model import random_model, rng
from tests.test_sparse_prune import NO, TRUE, YES, A, B, by_hand, sparse
from workbench import registry
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.prompts import Batch, sample, split
from workbench.results import decode, encode

LN2 = math.log(2)
LEARN = Settings(k_coef=1e-4, lr=3e-2, steps=60)
TWIN = (
    "0.attn.act_in:2", "0.attn.v:10", "0.attn.resid_delta:5",
    "1.mlp.act_in:5", "1.mlp.post_act:22", "1.mlp.post_act:23", "1.mlp.resid_delta:4",
)  # fmt: skip


def module_of(model: LanguageModel) -> SparseTransformer:
    module: SparseTransformer = model._module
    return module


def asked(model: LanguageModel, some: Pairs) -> Question:
    return Question.of(model, some, some, ablation="zero")


def named(question: Question, names: tuple[str, ...]) -> Pruned:
    """The circuit of these channels, as if it had been found."""
    channels, find = question.find.channels, question.find
    kept = torch.tensor([name in names for name in channels.names])
    scale = calibrated(find.odds(kept.float()), find.pairs)
    circuit = Circuit(channels.graph, channels.between(kept), "by hand")
    alone, whole = question.judge.loss(kept.float(), scale), question.whole
    headline = {"target": 0.15, "ablation": "zero", "freeze_norms": False, "seed": 0}
    return Pruned(circuit, names, kept, scale, find.loss(kept.float(), scale), alone, whole, LEARN, headline)


def sabotaged() -> tuple[LanguageModel, Pairs]:
    """Two more neurons that fire with neuron 20, one against it and one for it: together they do nothing."""
    model, some = by_hand()
    mlp = module_of(model).transformer.h[1].mlp
    for neuron, factor in ((30, -4), (31, 4)):
        mlp.c_fc.weight[neuron], mlp.c_proj.weight[:, neuron] = mlp.c_fc.weight[20], 0
        mlp.c_proj.weight[7, neuron] = factor * mlp.c_proj.weight[7, 20]
    return model, some


def twinned() -> tuple[LanguageModel, Pairs]:
    """The circuit, and the same once more with other channels."""
    model, some = by_hand()
    module = module_of(model)
    stack = module.transformer
    stack.wte.weight[:, [2, 4, 5]] = 0
    stack.wte.weight[A, 2], stack.wte.weight[B, 2] = 1.0, -1.0
    for block in stack.h:
        for part in (block.attn.c_proj, block.mlp.c_proj):
            part.weight[[2, 4, 5]] = 0
        for part in (block.attn.c_attn, block.mlp.c_fc):
            part.weight[:, [2, 4, 5]] = 0
    stack.h[0].attn.c_attn.weight[32 + 10, 2] = 1.0
    stack.h[0].attn.c_proj.weight[5, 10] = 4.0
    stack.h[1].mlp.c_fc.weight[22, 5] = stack.h[1].mlp.c_proj.weight[4, 22] = 3.0
    stack.h[1].mlp.c_fc.weight[23, 5] = stack.h[1].mlp.c_proj.weight[4, 23] = -3.0
    module.lm_head.weight[YES, 4], module.lm_head.weight[NO, 4] = 0.4, -0.4
    return model, some


def only(question: Question, *names: str) -> torch.Tensor:
    return torch.tensor([name in names for name in question.find.channels.names])


# ---- ablations ----


def test_the_circuit_is_necessary_and_as_many_other_channels_are_not() -> None:
    question = asked(*by_hand())
    found = named(question, TRUE)
    result = necessity(question, found.kept)
    assert result.whole < 0.1 and result.without - result.whole > 0.5
    assert result.random.shape == result.matched.shape == (20,) and result.ablated == (7, 7, 7)
    for others in (result.random, result.matched):
        assert (others - result.whole).abs().max() < 0.01
        assert len(set(others.tolist())) > 10  # each draw is another
    assert result.without == question.judge.loss((~found.kept).float())
    with pytest.raises(UserError, match="draws=0"):
        necessity(question, found.kept, draws=0)


def test_matched_channels_are_as_many_of_each_site_as_there_are() -> None:
    """With all neurons but one in the circuit, the only thing to ablate there is the one that is left."""
    question = asked(*by_hand())
    channels = question.find.channels
    neurons = next(span for layer, site, span in channels.spans if (layer, site) == (1, "mlp.post_act"))
    kept = torch.zeros(len(channels), dtype=torch.bool)
    kept[neurons] = True
    kept[neurons.start + 20] = False
    result = necessity(question, kept, draws=3)
    assert result.ablated == (63, 63, 1)
    mask = torch.ones(len(channels))
    mask[neurons.start + 20] = 0
    assert result.matched.tolist() == pytest.approx([question.judge.loss(mask)] * 3)


def test_ablating_all_but_the_circuit_is_the_circuit_and_ablating_nothing_the_model() -> None:
    question = asked(*sabotaged())
    found = named(question, TRUE)
    alone = sufficiency(question, found)
    result = subsets(question, found, shares=(0.0, 1.0), draws=2, settings=replace(LEARN, steps=1))
    assert alone.loss == pytest.approx(found.held_out) and alone.whole == pytest.approx(question.whole)
    assert result.complete["scaled"] == result.complete["refitted"] == pytest.approx(alone.loss)
    assert result.plain[0].tolist() == pytest.approx([alone.whole] * 2)
    for name in ablations.CALIBRATIONS:
        assert getattr(result, name)[1].tolist() == pytest.approx([result.complete[name]] * 2)
    assert alone.accuracy == alone.whole_accuracy == 1


def test_a_circuit_is_judged_by_other_fills_and_with_norms_frozen_too() -> None:
    """Noise is all that the rest carries, so that no fill matters; but if all others carry the opposite answer, they
    are the circuit of the other prompt."""
    question = asked(*twinned())
    found = named(question, TRUE)
    elsewhere = sufficiency(question, found).elsewhere
    assert elsewhere.keys() == {"task-mean", "resample", "frozen norms"}
    assert elsewhere["task-mean"]["circuit"] == pytest.approx(found.held_out, abs=0.02)
    assert elsewhere["resample"]["circuit"] > 0.6  # the twin says the opposite, as loudly
    frozen = question.varied(freeze_norms=True)
    scale = calibrated(frozen.find.odds(found.kept.float()), frozen.find.pairs)
    expected = frozen.judge.loss(found.kept.float(), scale)
    assert elsewhere["frozen norms"]["circuit"] == pytest.approx(expected)
    assert "frozen norms" not in sufficiency(frozen, found).elsewhere
    stream = torch.randint(8, (4, 10), generator=rng())
    model, some = question.find.channels.model, question.find.pairs
    assert "mean" in sufficiency(Question.of(model, some, some, stream, ablation="zero"), found).elsewhere


def test_nothing_is_at_chance_but_for_norms_that_are_frozen() -> None:
    """One class makes the residual stream larger than the other, so that the last norm makes a constant of the stream
    smaller: its scale alone tells the classes apart."""
    model, some = by_hand()
    module = module_of(model)
    module.transformer.h[1].mlp.c_proj.weight[3, 20] = 30  # loud for A alone
    module.transformer.wte.weight[:, 7] = -1.0  # an answer that no channel carries, and that noise drowns
    question = asked(model, some)
    result = sufficiency(question, named(question, TRUE))
    assert result.nothing == pytest.approx(LN2, abs=1e-4)
    assert result.elsewhere["task-mean"]["nothing"] == pytest.approx(LN2, abs=1e-4)
    assert result.elsewhere["frozen norms"]["nothing"] < 0.6
    frozen = question.varied(freeze_norms=True)
    assert sufficiency(frozen, named(frozen, TRUE)).nothing == result.elsewhere["frozen norms"]["nothing"]


def test_saboteurs_that_cancel_are_found_by_subsets_and_by_the_adversary() -> None:
    question = asked(*sabotaged())
    found = named(question, TRUE)
    assert found.held_out < 0.15 and question.whole < 0.15  # neither all nor nothing ablated shows them
    result = subsets(question, found, shares=(0.5,), draws=12, settings=replace(ablations.ADVERSARY, steps=30))
    assert result.complete["refitted"] < 0.15
    assert result.refitted.max() == pytest.approx(LN2, abs=1e-3)
    hits = result.refitted > 0.5
    assert 0 < int(hits[0].sum()) < 12  # of an even half, a quarter has the one and not the other
    channels = question.find.channels
    against, towards = (channels.names.index(f"1.mlp.post_act:{neuron}") for neuron in (30, 31))
    assert result.adversary[towards] and not result.adversary[against] and not (result.adversary & found.kept).any()
    assert result.adversarial["refitted"] == pytest.approx(LN2, abs=1e-3)
    assert result.adversarial["plain"] > 1 and result.adversarial["accuracy"] == 0.5


def test_the_adversary_finds_nothing_where_nothing_else_matters() -> None:
    question = asked(*by_hand())
    settings = replace(ablations.ADVERSARY, steps=30)
    result = subsets(question, named(question, TRUE), shares=(0.5,), draws=1, settings=settings)
    assert result.adversarial["refitted"] < 0.1


def test_prompts_of_which_nothing_is_known_are_half_right() -> None:
    assert accuracy(torch.tensor([1.0, -2, 0, 3])) == 0.625


# ---- controls ----


def test_labels_that_mean_nothing_are_the_same_prompts_with_half_of_the_pairs_exchanged() -> None:
    _, some = by_hand()
    wrong = some.mislabelled(rng()).is_one ^ some.is_one
    assert wrong[:4].sum() == 2 and torch.equal(wrong[:4], wrong[4:])
    drawn = {tuple((some.mislabelled(rng(seed)).is_one ^ some.is_one)[:4].tolist()) for seed in range(20)}
    assert len(drawn) > 3
    assert torch.equal(some.mislabelled(rng()).tokens, some.tokens)


def test_no_circuit_answers_the_same_prompt_both_ways() -> None:
    """All pairs by hand are the same two prompts, so that with half of them exchanged no loss is below ln 2."""
    question = asked(*by_hand())
    control = nonsense(question, [LEARN])
    assert not control.reached and control.held_out is None and control.loss == pytest.approx(LN2, abs=1e-4)
    assert control.whole > 1  # the model is sure, and wrong in half of them
    easy = nonsense(replace(question, target=0.7), [LEARN])
    assert easy.reached and easy.nodes is not None and easy.held_out is not None and easy.held_out > LN2 - 1e-3


def test_shuffled_weights_are_the_same_in_other_places() -> None:
    model = LanguageModel(random_model(sink=True, learnable_bigram_table=True), None, name="m", fingerprint="m")
    module = module_of(model)
    for _, weight, _, _ in matrices(module):
        weight[weight.abs() < 0.1] = 0
    before = {name: x.clone() for name, x in module.state_dict().items()}
    after = module_of(shuffled(model, 1)).state_dict()
    moved = [name for name, _, _, _ in matrices(module)]
    assert {"transformer.wte.weight", "lm_head.weight"} < set(moved) and len(moved) == 2 + 4 * 2
    for name, x in before.items():
        assert torch.equal(module.state_dict()[name], x)  # the model itself stays
        assert torch.equal(after[name], x) == (name not in moved)
        assert torch.equal(after[name].flatten().sort().values, x.flatten().sort().values)
        assert int(after[name].count_nonzero()) == int(x.count_nonzero())
    assert torch.equal(module_of(shuffled(model, 1)).lm_head.weight, after["lm_head.weight"])
    assert not torch.equal(module_of(shuffled(model, 2)).lm_head.weight, after["lm_head.weight"])


def test_a_circuit_among_random_weights_is_one_of_the_shuffled_model_and_not_necessary_there() -> None:
    model, some = by_hand()
    question = replace(asked(model, some), target=LN2 + 1e-3)  # which nothing at all meets, scaled to nothing
    control = random_weights(question, [LEARN], draws=3)
    assert control.reached and control.kept is not None and control.necessity is not None
    other = asked(shuffled(model), some)
    assert control.whole == other.whole != question.whole
    assert control.necessity.without == other.judge.loss((~control.kept).float())
    assert len(control.necessity.random) == 3
    assert random_weights(replace(question, target=1e-9), [replace(LEARN, steps=2)]).necessity is None


def test_a_twin_of_the_circuit_is_found_when_the_circuit_is_held() -> None:
    question = asked(*twinned())
    found = replace(named(question, TRUE), settings=replace(LEARN, k_coef=1e-3))
    second = backup(question, found)
    assert second.reached and second.kept is not None and second.held_out is not None and second.held_out < 0.15
    assert torch.equal(second.kept, only(question, *TWIN)) and (second.nodes, second.edges) == (7, 6)
    assert necessity(question, found.kept, draws=1).without < 0.15  # nor is the first one necessary


def test_there_is_no_second_circuit_where_there_is_but_one() -> None:
    question = asked(*by_hand())
    settings = replace(LEARN, steps=5)
    found = replace(named(question, TRUE), settings=settings)
    alone = backup(question, found, [settings, replace(settings, lr=1e-2)])
    assert not alone.reached and alone.kept is None and alone.loss > 0.6


def test_all_seeds_find_a_circuit_that_is_the_only_one() -> None:
    question = asked(*by_hand())
    result = stability(question, named(question, TRUE))
    assert result.seeds == result.reached == (0, 1, 2)
    assert result.nodes == (7, 7, 7) and result.edges == (6, 6, 6)
    assert result.same_nodes == result.same_edges == 1
    with pytest.raises(UserError, match="seed 0 is the circuit's own"):
        stability(question, named(question, TRUE), seeds=(0, 1))


def test_overlap_is_shared_over_either_in_the_mean_over_pairs() -> None:
    """Of three circuits of nodes {1, 2}, {2, 3} and {2, 3}: 1/3, 1/3 and 1."""
    question = asked(*twinned())
    one, two, three, four = "0.attn.act_in:0", "0.attn.v:9", "0.attn.resid_delta:6", "0.mlp.act_in:1"
    first, second = (named(question, names) for names in ((one, two), (two, three)))
    found = {1: second, 2: second}

    class Canned(Question):
        def search(self, search, seed=0, without=None):  # type: ignore[no-untyped-def]
            assert list(search) == [LEARN] and without is None
            return Searched([], found.get(seed))

    canned = Canned(**{name: getattr(question, name) for name in question.__dataclass_fields__})
    result = stability(canned, first)
    assert result.same_nodes == pytest.approx((1 / 3 + 1 / 3 + 1) / 3)
    assert result.same_edges == pytest.approx(1 / 3)  # one edge each: 0 -> 9, and 9 -> 6 twice
    found[2] = named(question, (one, four))
    del found[1]
    result = stability(canned, first)
    assert result.seeds == (0, 1, 2) and result.reached == (0, 2) and result.edges == (1, 0)
    assert result.same_nodes == pytest.approx(1 / 3) and result.same_edges == 0
    edgeless = named(question, (one,))
    found[2] = named(question, (four,))
    assert stability(canned, edgeless).same_edges == 1 and stability(canned, edgeless).same_nodes == 0
    found.clear()
    assert stability(canned, first).same_nodes is None


# ---- the whole of it ----


def parts(model: LanguageModel, task: str = "with_as") -> list[Batch]:
    return [sample(split(registry.get_task(task), part), model, 3, seed=0) for part in ("train", "test")]  # type: ignore[arg-type]


@pytest.mark.parametrize("freeze_norms", [False, True])
def test_a_validation_is_the_parts_and_comes_back_from_a_file(coder: LanguageModel, freeze_norms: bool) -> None:
    model = sparse(coder)
    train, test = parts(model)
    stream = torch.randint(model.config.d_vocab, (4, 20), generator=rng())
    search = [replace(LEARN, steps=1)]
    found = prune(model, train, test, stream, target=LN2 + 1e-3, search=search, freeze_norms=freeze_norms)
    quick = partial(validate, search=search, adversary=replace(LEARN, steps=2), draws=1)
    result = quick(model, found, train, test, stream)
    question = Question.of(model, Pairs.of(train), Pairs.of(test), stream, target=LN2 + 1e-3, freeze_norms=freeze_norms)
    assert result.sufficiency.loss == pytest.approx(found.held_out)
    assert result.necessity.without == pytest.approx(question.judge.loss((~found.kept).float()))
    assert result.backup.kept is not None and not (result.backup.kept & found.kept).any()
    assert ("frozen norms" in result.sufficiency.elsewhere) != freeze_norms
    json_, arrays = encode(result)
    back = decode(Validation, json.loads(json.dumps(json_)), arrays)
    assert encode(back)[0] == json_ and back.summary() == json.loads(json.dumps(result.summary()))
    assert torch.equal(back.subsets.adversary, result.subsets.adversary) and back.backup.nodes == 1
    if not freeze_norms:  # a circuit that was stored gives the same
        again = decode(Pruned, *encode(found))
        assert encode(quick(model, again, train, test, stream))[0] == json_


def test_circuits_of_other_models_pairs_and_origins_are_refused(coder: LanguageModel) -> None:
    model = sparse(coder)
    train, test = parts(model)
    search = [replace(LEARN, steps=2)]
    found = prune(model, train, test, target=0.7, ablation="zero", search=search)
    with pytest.raises(UserError, match="does not say how it was found"):
        validate(model, replace(found, headline={}), train, test)
    wide = random_model(vocab_size=coder.config.d_vocab, d_mlp=64, block_size=256)
    with pytest.raises(UserError, match=r"with 704 channels, and wide has 576"):
        validate(LanguageModel(wide, coder.tokenizer, name="wide", fingerprint="w"), found, train, test)
    with pytest.raises(UserError, match=r"was 0.4000 when it was found, and is 0.69"):
        validate(model, replace(found, held_out=0.4), train, test)


def test_edges_are_averaged_by_their_logarithms() -> None:
    assert geometric_mean([2, 8]) == pytest.approx(4)
    assert geometric_mean([0, 9]) == pytest.approx(3)
    with pytest.raises(UserError, match="no circuits"):
        geometric_mean([])


def test_channels_are_counted_by_site() -> None:
    """What matching relies on: spans cover every channel once, in order."""
    channels = Channels(by_hand()[0])
    assert [span.start for _, _, span in channels.spans[1:]] == [span.stop for _, _, span in channels.spans[:-1]]
    assert channels.spans[-1][2].stop == len(channels) and len(channels.spans) == 2 * len(SITES)
