"""Pruning to a circuit of channels: laws of masks and edges, and a circuit that was put there by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from circuits.sparse import prune as module
from circuits.sparse.channels import Channels
from circuits.sparse.model import SparseConfig, SparseTransformer
from circuits.sparse.prune import (
    HELD,
    SEARCH,
    Masked,
    Pairs,
    Question,
    Settings,
    attribution,
    bound,
    calibrated,
    fills,
    learn,
    loss,
    prune,
    rescaled,
    smallest,
)
from tests.test_sparse_model import random_model, rng
from workbench import registry, sites
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.prompts import Batch, sample, split
from workbench.tasks.python_code import TASKS, pair_loss, pair_sides

N = 8
QUICK = (Settings(k_coef=1e-4, lr=3e-2, steps=60),)


def sparse(model: LanguageModel, **options: Any) -> LanguageModel:
    """A random sparse model that reads with another's tokenizer."""
    made = random_model(**{"vocab_size": model.config.d_vocab, "afrac": 0.5, "sink": True, "block_size": 256} | options)
    return LanguageModel(made, model.tokenizer, name="random-sparse", fingerprint="random-sparse")


@pytest.fixture
def model(coder: LanguageModel) -> LanguageModel:
    return sparse(coder)


def pairs(model: LanguageModel, task: str = "single_double_quote", seed: int = 0) -> tuple[Batch, Pairs]:
    batch = sample(registry.get_task(task), model, N, seed)
    return batch, Pairs.of(batch)


def last_logits(model: LanguageModel, sequences: tuple[Tensor, ...]) -> Tensor:
    rows = []
    for tokens in sequences:
        logits = model.run(tokens[None]).logits
        assert logits is not None
        rows.append(logits[0, -1])
    return torch.stack(rows)


# ---- masks ----


@pytest.mark.parametrize("task", TASKS)
def test_a_mask_of_ones_is_the_model_and_its_loss_is_the_tasks(task: str, model: LanguageModel) -> None:
    """Also of prompts of different lengths, which are filled up and run together."""
    batch, some = pairs(model, task)
    channels = Channels(model)
    masked = Masked(channels, some, fills(channels, some, "zero"))
    expected = pair_loss(batch, last_logits(model, batch.clean), last_logits(model, batch.corrupted)).mean()
    assert masked.loss(torch.ones(len(channels))) == pytest.approx(float(expected), rel=1e-4)
    one, two, is_one = pair_sides(batch)
    for a, b, first, right in zip(one, two, is_one.tolist(), batch.answers, strict=True):
        assert torch.equal(a, right) if first else not len(b) or torch.equal(b, right)


def test_a_mask_of_zeros_is_the_model_with_every_channel_at_its_fill(model: LanguageModel) -> None:
    _, some = pairs(model)
    channels = Channels(model)
    stream = torch.randint(model.config.d_vocab, (4, 20), generator=rng())
    fill = fills(channels, some, "mean", stream)
    run = model.run(stream, capture=channels.hooks)
    for hook in channels.hooks:
        torch.testing.assert_close(fill[hook], run[hook].flatten(0, 1).mean(0), rtol=1e-4, atol=1e-5)
    edit = {hook: lambda x, hook=hook: fill[hook].expand_as(x) for hook in channels.hooks}  # type: ignore[misc]
    logits = model.run(some.tokens, edit=edit).logits  # type: ignore[arg-type]
    assert logits is not None
    found = Masked(channels, some, fill).odds(torch.zeros(len(channels)))
    torch.testing.assert_close(found, some.differences(logits[torch.arange(2 * N), some.last]), rtol=1e-4, atol=1e-4)


def test_one_channel_is_one_coordinate_at_its_hook_point(model: LanguageModel) -> None:
    _, some = pairs(model)
    channels = Channels(model)
    for name, hook, at in (
        ("1.attn.k:13", "attn.hook_k", (1, 5)), ("0.mlp.post_act:40", "mlp.hook_post", (40,)),
        ("1.mlp.resid_delta:2", "hook_mlp_out", (2,)), ("0.attn.act_in:31", "attn.hook_in", (31,)),
    ):  # fmt: skip
        mask = torch.ones(len(channels))
        mask[channels.names.index(name)] = 0
        found = Masked(channels, some, fills(channels, some, "zero")).odds(mask)

        def cut(x: Tensor, at: tuple[int, ...] = at) -> Tensor:
            x = x.clone()
            x[(..., *at)] = 0
            return x

        logits = model.run(some.tokens, edit={sites.block(int(name[0]), hook): cut}).logits
        assert logits is not None
        expected = some.differences(logits[torch.arange(2 * N), some.last])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ablation", ["zero", "resample"])
@pytest.mark.parametrize("freeze", [False, True])
def test_some_of_the_pairs_are_those_rows_of_all(ablation: module.Ablated, freeze: bool, model: LanguageModel) -> None:
    """Also of prompts whose filling up at the end is cut off."""
    batch, some = pairs(model, "class_init")
    assert len({len(x) for x in batch.clean}) > 1
    channels = Channels(model)
    masked = Masked(channels, some, fills(channels, some, ablation), freeze)
    mask = (torch.rand(len(channels), generator=rng()) < 0.7).float()
    whole = masked.odds(mask)
    parts = masked.parts(3, rng())
    assert [len(part.pairs) for part in parts] == [3, 3, 2]
    assert min(part.pairs.tokens.shape[1] for part in parts) < some.tokens.shape[1]
    found = []
    for part in parts:
        rows = [(some.tokens[:, : row.shape[0]] == row).all(1).nonzero()[0, 0] for row in part.pairs.tokens]
        torch.testing.assert_close(part.odds(mask), whole[torch.stack(rows)], rtol=1e-4, atol=1e-4)
        found += [int(row) for row in rows]
    assert sorted(found) == list(range(2 * N))


def test_fills_of_the_task_leave_out_what_fills_prompts_up_and_resampling_takes_the_other_prompt(
    model: LanguageModel,
) -> None:
    batch, some = pairs(model)
    assert len({len(x) for x in batch.clean}) > 1
    channels, hook = Channels(model), sites.block(1, "mlp.hook_post")
    values = [model.run(x[None], capture=[hook])[hook][0] for x in (*batch.clean, *batch.corrupted)]
    torch.testing.assert_close(
        fills(channels, some, "task-mean")[hook], torch.cat(values).mean(0), rtol=1e-3, atol=1e-5
    )
    other = fills(channels, some, "resample")[hook]
    torch.testing.assert_close(other[0, : len(values[N])], values[N], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other[N + 2, : len(values[2])], values[2], rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="over the training stream"):
        fills(channels, some, "mean")


def test_a_gate_has_the_slope_of_a_sigmoid_and_the_value_of_a_step() -> None:
    tau = torch.tensor([-0.5, 0.0, 0.3], requires_grad=True)
    mask = module._Step.apply(tau, 0.5)  # type: ignore[no-untyped-call]
    assert mask.tolist() == [0, 1, 1]
    (slope,) = torch.autograd.grad((mask * torch.tensor([1.0, 2, 3])).sum(), tau)
    s = (tau.detach() / 0.5).sigmoid()
    torch.testing.assert_close(slope, torch.tensor([1.0, 2, 3]) * s * (1 - s) / 0.5)


def test_calibration_finds_a_scale_and_shift_that_were_put_there() -> None:
    generator = rng()
    towards_one = 2 * torch.randn(4000, generator=generator)
    right = torch.rand(4000, generator=generator) < (2 * towards_one - 1).sigmoid()  # true odds: 2 x - 1
    some = Pairs("t", torch.zeros(4000, 1, dtype=torch.long), torch.zeros(4000, dtype=torch.long), (), (), right)
    odds = torch.where(right, towards_one, -towards_one)
    scale, shift = calibrated(odds, some, steps=100)
    assert scale == pytest.approx(2, abs=0.15) and shift == pytest.approx(-1, abs=0.15)
    assert float(loss(rescaled(odds, some, (scale, shift)))) < float(loss(odds))


def test_calibration_makes_no_certainty_of_a_trifle_and_no_answer_of_its_opposite() -> None:
    some = Pairs("t", torch.zeros(4, 1).long(), torch.zeros(4).long(), (), (), torch.tensor([True, False, True, False]))
    trifle = torch.tensor([0.011, -0.009, 0.012, -0.008])  # class 1 gets a little more than class 2, both towards 1
    scale, shift = calibrated(trifle, some)
    assert scale == 10 and float(loss(rescaled(trifle, some, (scale, shift)))) > 0.6
    assert calibrated(torch.tensor([-3.0, -3, -3, -3]), some)[0] == 0


# ---- a circuit by hand ----

ASKED, A, B, YES, NO = 3, 1, 2, 5, 4


def by_hand(noise: float = 0.05) -> tuple[LanguageModel, Pairs]:
    """Token A or B, then ASKED: head 1 carries which it was (channel 0 of the stream, its value channel 9) to channel
    6, two neurons make an answer of it in channel 7. All other weights are noise that reaches neither."""
    config = SparseConfig(
        vocab_size=8, n_layer=2, d_model=16, n_head=2, d_head=8, block_size=16, activation_type="relu",
        enable_bigram_table=False,
    )  # fmt: skip
    m = SparseTransformer(config, rng()).requires_grad_(False)
    for name, x in m.named_parameters():
        if x.ndim == 2:
            x.copy_(noise * torch.randn(x.shape, generator=rng(len(name))))
    t = m.transformer
    t.wte.weight[:, [0, 6, 7]] = 0
    t.wte.weight[A, 0], t.wte.weight[B, 0] = 1.0, -1.0
    t.wte.weight[:, 1] = 3.0  # so that the norm is about the same everywhere
    for block in t.h:
        for part in (block.attn.c_proj, block.mlp.c_proj):
            part.weight[[0, 6, 7]] = 0
        block.attn.c_attn.weight[:32] *= 0  # nobody looks at anything in particular
        block.attn.c_attn.weight[:, [0, 6, 7]] = 0
        block.mlp.c_fc.weight[:, [0, 6, 7]] = 0
    t.h[0].attn.c_attn.weight[32 + 9, 0] = 1.0  # value 9 reads channel 0
    t.h[0].attn.c_proj.weight[6, 9] = 4.0
    t.h[1].mlp.c_fc.weight[20, 6] = t.h[1].mlp.c_proj.weight[7, 20] = 3.0
    t.h[1].mlp.c_fc.weight[21, 6] = t.h[1].mlp.c_proj.weight[7, 21] = -3.0
    m.lm_head.weight.zero_()
    m.lm_head.weight[YES, 7], m.lm_head.weight[NO, 7] = 0.4, -0.4
    model = LanguageModel(m, None, name="by hand", fingerprint="by hand")
    tokens = torch.tensor([[A, ASKED], [B, ASKED]]).repeat_interleave(4, 0)
    one, two = (torch.tensor([YES]),) * 8, (torch.tensor([NO]),) * 8
    some = Pairs("by hand", tokens, torch.ones(8, dtype=torch.long), one, two, torch.tensor([True] * 4 + [False] * 4))
    return model, some


TRUE = (
    "0.attn.act_in:0", "0.attn.v:9", "0.attn.resid_delta:6",
    "1.mlp.act_in:6", "1.mlp.post_act:20", "1.mlp.post_act:21", "1.mlp.resid_delta:7",
)  # fmt: skip


def test_edges_are_counted_as_by_hand() -> None:
    model, _ = by_hand(noise=0.0)
    channels = Channels(model)
    assert len(channels) == 2 * (7 * 16 + 64)
    assert channels.graph.names == (
        "0.attn.act_in:0->0.attn.v:9", "0.attn.v:9->0.attn.resid_delta:6",
        "1.mlp.act_in:6->1.mlp.post_act:20", "1.mlp.act_in:6->1.mlp.post_act:21",
        "1.mlp.post_act:20->1.mlp.resid_delta:7", "1.mlp.post_act:21->1.mlp.resid_delta:7",
    )  # fmt: skip
    assert channels.weights.tolist() == [1, 4, 3, -3, 3, -3]
    kept = torch.tensor([name in TRUE for name in channels.names])
    assert int(channels.between(kept).sum()) == 6
    kept[channels.names.index("0.attn.v:9")] = False
    assert int(channels.between(kept).sum()) == 4


def test_a_price_that_holds_the_loss_rises_and_falls_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputed from the losses that were met; gates begin in order of attribution."""
    model, some = by_hand()
    channels = Channels(model)
    masked = Masked(channels, some, fills(channels, some, "zero"))
    met, prices, begun = [], [], []
    monkeypatch.setattr(module, "loss", lambda odds: met.append(loss(odds)) or met[-1])

    def spied(start: Tensor, objective: Callable[[Tensor], Tensor], settings: Settings) -> Tensor:
        begun.append(start)
        for mask in (torch.ones(len(start)), torch.zeros(len(start)), torch.ones(len(start)), torch.ones(len(start))):
            mask.requires_grad_()
            total = objective(mask)
            ones = max(1.0, float(mask.detach().sum()))
            prices.append(float((total - met[-1]).detach()) / ones)
        return start

    monkeypatch.setattr(module, "descend", spied)
    learn(masked, HELD, target=0.3)
    expected, price = [], HELD.k_coef
    for value in met:
        expected.append(price)
        price *= math.exp(0.1 * max(-1.0, 1 - float(value.detach()) / 0.2))
    assert prices[0] == pytest.approx(expected[0], rel=1e-3) and prices[1] == 0
    assert prices[2:] == pytest.approx(expected[2:], rel=1e-3)
    assert expected[1] > expected[0] and expected[2] < min(expected[1], expected[3])
    few = attribution(masked.part(torch.arange(min(16, len(some)))))
    assert torch.equal(begun[0].argsort(), few.argsort(stable=True))
    assert float(begun[0].min()) == pytest.approx(0.02) and float(begun[0].max()) < 0.62


@pytest.mark.parametrize("settings", [Settings(k_coef=1e-4, lr=3e-2, steps=100), replace(HELD, steps=100)])
@pytest.mark.parametrize("ablation", ["zero", "task-mean"])
def test_the_circuit_that_was_put_there_is_found_and_nothing_else(ablation: module.Ablated, settings: Settings) -> None:
    model, some = by_hand()
    channels = Channels(model)
    masked = Masked(channels, some, fills(channels, some, ablation))
    whole = masked.loss(torch.ones(len(channels)))
    assert whole < 0.1
    least = smallest(masked, learn(masked, settings), 0.15)
    kept, scale, reached = least.kept, least.scale, least.loss
    found = {name for name, is_kept in zip(channels.names, kept.tolist(), strict=True) if is_kept}
    assert found == set(TRUE) and reached <= 0.15
    assert masked.loss(kept.float(), scale) == pytest.approx(reached, rel=1e-4)
    without = masked.loss(1 - kept.float())
    assert without > 0.6  # necessary: nothing is left without it
    by_gradient = smallest(masked, attribution(masked), 0.15).kept
    assert int(by_gradient.sum()) >= len(TRUE)


def test_bisection_stops_where_one_channel_fewer_fails() -> None:
    model, some = by_hand()
    channels = Channels(model)
    masked = Masked(channels, some, fills(channels, some, "zero"))
    rank = torch.tensor([10.0 - TRUE.index(name) if name in TRUE else -1.0 for name in channels.names])
    kept = smallest(masked, rank, 0.3).kept
    assert int(kept.sum()) == 7  # the last in line is needed too
    either = [masked.loss(x, calibrated(masked.odds(x), some)) for x in (kept.float(), torch.ones(len(rank)))]
    assert smallest(masked, rank, 1e-9).loss == pytest.approx(min(either))  # never met: the better of the two


def test_channels_that_the_gates_leave_on_are_tried_where_the_whole_model_fails() -> None:
    """A neuron answers the opposite of the circuit, and louder: pruning can make what the model does not do."""
    model, some = by_hand()
    mlp = model._module.transformer.h[1].mlp
    mlp.c_fc.weight[30], mlp.c_proj.weight[:, 30] = mlp.c_fc.weight[20], -5 * mlp.c_proj.weight[:, 20]
    channels = Channels(model)
    masked = Masked(channels, some, fills(channels, some, "zero"))
    rank = torch.tensor([1.0 if name in TRUE else -1.0 for name in channels.names])
    assert masked.loss(torch.ones(len(rank))) > 1
    found = smallest(masked, rank, 0.15)
    assert torch.equal(found.kept, rank > 0) and found.loss == found.bound < 0.15


def test_a_circuit_can_be_asked_to_meet_its_target_by_standard_errors() -> None:
    """Of the mean over pairs: the two prompts of one are not two draws."""
    odds = torch.tensor([3.0, -1.0, 0.5, 2.0, 0.2, -0.3])  # three pairs, clean ones first
    each = torch.tensor([[3.0, 2.0], [-1.0, 0.2], [0.5, -0.3]]).neg().exp().log1p().mean(1)
    error = float(((each - each.mean()) ** 2).sum() / 2 / 3) ** 0.5
    assert float(bound(odds, 2.0)) == pytest.approx(float(each.mean()) + 2 * error, rel=1e-5)
    assert float(bound(odds, 0.0)) == pytest.approx(float(loss(odds)))

    model, some = by_hand()
    some.tokens[0, 0] = some.tokens[4, 0] = ASKED  # one pair cannot be told
    channels = Channels(model)
    masked = Masked(channels, some, fills(channels, some, "zero"))
    rank = torch.tensor([1.0 if name in TRUE else -1.0 for name in channels.names])
    surely = smallest(masked, rank, 0.0, sure=2.0)
    assert surely.loss < surely.bound
    target = (surely.loss + surely.bound) / 2
    plain = smallest(masked, rank, target)
    assert plain.loss == plain.bound <= target < smallest(masked, rank, target, sure=2.0).bound
    assert smallest(masked, rank, surely.bound, sure=2.0).bound <= surely.bound
    question = Question.of(model, some, some, ablation="zero", target=target, sure=2.0)
    assert question.varied(target=0.3).sure == 2.0
    with pytest.raises(UserError, match="by 2 standard errors: at best"):
        question.circuit(QUICK)
    for wrong, few in ((-1.0, some), (math.inf, some), (1.0, some.part(torch.tensor([0])))):
        with pytest.raises(UserError, match="give standard errors of 0 or more, and two pairs"):
            Question.of(model, few, some, ablation="zero", sure=wrong)


def test_channels_that_are_held_at_their_fill_are_in_no_circuit() -> None:
    model, some = by_hand()
    channels = Channels(model)
    masked = Masked(channels, some, fills(channels, some, "zero"))
    without = torch.tensor([name == TRUE[1] for name in channels.names])
    rank = learn(masked, Settings(k_coef=0.0, lr=3e-2, steps=10), without=without)
    assert (rank == -math.inf).tolist() == without.tolist()
    assert not bool((smallest(masked, rank, 1e-9).kept & without).any())
    question = Question.of(model, some, some, ablation="zero")
    assert question.search(QUICK, without=without).best is None
    with pytest.raises(UserError, match="no settings to prune with"):
        question.search([])
    with pytest.raises(UserError, match="all 352 channels are held"):
        question.search(QUICK, without=torch.ones(len(channels), dtype=torch.bool))


# ---- frozen norms ----


@pytest.mark.parametrize("task", ["with_as", "final_kwarg"])
def test_frozen_norms_change_nothing_where_nothing_is_masked(task: str, coder: LanguageModel) -> None:
    """With all activations: where two are about as large, rounding tells which of them AbsTopK keeps."""
    model = sparse(coder, afrac=1.0)
    _, some = pairs(model, task)
    channels = Channels(model)
    fill, ones = fills(channels, some, "zero"), torch.ones(len(channels))
    frozen, free = Masked(channels, some, fill, freeze_norms=True), Masked(channels, some, fill)
    torch.testing.assert_close(frozen.odds(ones), free.odds(ones), rtol=1e-4, atol=1e-4)
    ones[:20] = 0
    assert (frozen.odds(ones) - free.odds(ones)).abs().max() > 1e-3


def test_norms_of_a_masked_run_divide_by_what_they_divide_by_in_the_clean_one(coder: LanguageModel) -> None:
    """By the definition of RMSNorm, at the norm before an MLP and at the last one."""
    made = random_model(vocab_size=coder.config.d_vocab, block_size=256)  # without AbsTopK: norms are read as they are
    model = LanguageModel(made, coder.tokenizer, name="random", fingerprint="random")
    for name, gain in made.named_parameters():
        if "ln_" in name:
            gain.copy_(1 + 0.5 * torch.randn(gain.shape, generator=rng()))
    _, some = pairs(model)
    channels, stack = Channels(model), made.transformer
    masked = Masked(channels, some, fills(channels, some, "zero"), freeze_norms=True)
    mid, read, last = "blocks.1.hook_resid_mid", "blocks.1.mlp.hook_in", "blocks.1.hook_resid_post"
    clean = model.run(some.tokens, capture=[mid, last])
    mask = torch.ones(len(channels))
    mask[[channels.names.index(name) for name in ("0.attn.resid_delta:3", "0.mlp.post_act:40", "1.attn.v:5")]] = 0
    run = masked.model.run(some.tokens, edit=channels.edits(mask, masked.fill), capture=[mid, read, last])

    def normed(x: Tensor, at: Tensor, norm: Any) -> Tensor:
        eps: float = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
        out: Tensor = x * (at.square().mean(-1, keepdim=True) + eps).rsqrt() * norm.weight
        return out

    assert (run[mid] - clean[mid]).abs().max() > 0.01
    torch.testing.assert_close(run[read], normed(run[mid], clean[mid], stack.h[1].ln_2), rtol=1e-3, atol=1e-4)
    expected = normed(run[last], clean[last], stack.ln_f) @ made.lm_head.weight.T + made.bigram_table[some.tokens]
    assert run.logits is not None
    torch.testing.assert_close(run.logits, expected, rtol=1e-3, atol=1e-3)
    assert model._module is made and isinstance(stack.ln_f, torch.nn.RMSNorm)  # the model itself stays as it was


# ---- the whole of it ----


def test_a_circuit_of_a_task_is_found_on_one_part_and_judged_on_the_other(model: LanguageModel) -> None:
    """A random model knows nothing, so that chance is all a circuit is asked for: one channel, scaled to nothing."""
    task = registry.get_task("with_as")
    train, test = (sample(split(task, part), model, N, seed=0) for part in ("train", "test"))  # type: ignore[arg-type]
    stream = torch.randint(model.config.d_vocab, (4, 20), generator=rng())
    quick = [replace(one, steps=3) for one in SEARCH[:2]]
    found = prune(model, train, test, stream, target=math.log(2) + 1e-3, search=quick)
    assert len(found.nodes) == 1 and len(found.circuit) == 0 and found.loss <= math.log(2) + 1e-3
    assert found.summary()["definition"].endswith("nonzero weights between them") and len(found.headline["tried"]) == 2
    held = found.kept
    other = prune(model, train, test, stream, target=math.log(2) + 1e-3, search=quick, without=held, freeze_norms=True)
    assert len(other.nodes) == 1 and other.nodes != found.nodes and other.headline["freeze_norms"]
    assert "norms frozen, 1 channels held at their fill" in other.circuit.definition
    with pytest.raises(UserError, match=r"no circuit of random-sparse meets 0.01 nats on with_as-train: at best"):
        prune(model, train, test, stream, target=0.01, search=quick)
    with pytest.raises(UserError, match="are in both parts"):
        prune(model, train, train, stream)


def test_models_without_channels_are_refused(coder: LanguageModel) -> None:
    with pytest.raises(UserError, match=r"is no model of circuits.sparse"):
        Channels(coder)
