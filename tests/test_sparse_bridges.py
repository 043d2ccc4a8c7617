"""Bridges between a sparse and a dense model: laws of hybrids, their loss and training, and of edits through them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from circuits.sparse import bridges as module
from circuits.sparse import files, train
from circuits.sparse.bridge_edits import (
    ChannelEffects,
    DoseResponse,
    Read,
    channel_effects,
    dose_response,
    edit,
)
from circuits.sparse.bridges import (
    MEASURED,
    BridgeConfig,
    Bridged,
    Bridges,
    BridgeTraining,
    Coupling,
    Streams,
    agreement,
    backward,
    beside,
    boundary_hook,
    kl,
    nmse,
    save,
    terms,
)
from circuits.sparse.data import TokenStream, train_tokenizer
from circuits.sparse.model import SparseTransformer
from circuits.sparse.prune import Pairs
from circuits.sparse.train import Training, loss_of, nonzero
from tests.test_sparse_model import TOKENS, random_model, rng
from tests.test_sparse_prune import by_hand, sparse
from tests.test_sparse_train import MODEL, RECIPE, Stopped, clock
from workbench import backend, metrics, plots, registry, results, runs
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.prompts import sample, split

N = 5  # boundaries of two layers


def language_model(made: SparseTransformer, tokenizer: Any = None, name: str = "random") -> LanguageModel:
    return LanguageModel(made, tokenizer, name=name, fingerprint=name)


def random_bridges(dense: int = 32, sparse: int = 32, afrac: float | None = None) -> Bridges:
    bridges = Bridges(BridgeConfig(2, dense, sparse, afrac), rng())
    for parameter in bridges.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=rng(5))
    return bridges


def identity(width: int = 32) -> Bridges:
    bridges = Bridges(BridgeConfig(2, width, width, afrac=None)).requires_grad_(False)
    for part in (*bridges.encoders, *bridges.decoders):
        nn.init.eye_(part.weight)
    return bridges


# ---- the model from a boundary on ----


@pytest.mark.parametrize(
    "options", [{"afrac": 0.5, "sink": True}, {"d_pos_emb": 6}, {"positions": "added", "enable_bigram_table": False}]
)
def test_from_every_boundary_the_rest_of_the_model_is_the_whole_model(options: dict[str, Any]) -> None:
    made = random_model(**options)
    streams, whole = made.transformer.streams(TOKENS), made(TOKENS).logits
    assert len(streams) == N
    for i, stream in enumerate(streams):
        torch.testing.assert_close(made.run_from(i, stream, TOKENS), whole, rtol=0, atol=0)
    hooks = [boundary_hook(i, 2) for i in range(N)]
    assert hooks[1] == "blocks.0.hook_resid_mid" and hooks[4] == "blocks.1.hook_resid_post"
    run = language_model(made).run(TOKENS, capture=hooks)
    for hook, stream in zip(hooks, streams, strict=True):
        torch.testing.assert_close(run[hook], stream, rtol=1e-5, atol=1e-5)


# ---- maps and losses ----


def test_an_encoder_fills_its_share_with_the_largest_and_a_decoder_is_affine() -> None:
    bridges, x = random_bridges(dense=16, afrac=0.25), torch.randn(3, 7, 16, generator=rng())
    for i in range(N):
        plain = x @ bridges.encoders[i].weight.T + bridges.encoders[i].bias  # type: ignore[operator,union-attr]
        found = bridges.encode(i, x)
        assert (found != 0).sum(-1).unique().tolist() == [8]
        torch.testing.assert_close(found[found != 0], plain[found != 0])
        assert bool(
            (plain.abs().masked_fill(found != 0, 0).amax(-1) <= plain.abs().masked_fill(found == 0, 9).amin(-1)).all()
        )
        y = torch.randn(2, 32, generator=rng(i))
        middle = bridges.decode(i, y.mean(0))
        torch.testing.assert_close(middle, bridges.decode(i, y).mean(0), rtol=1e-4, atol=1e-5)


def test_normalised_error_by_hand() -> None:
    target = torch.tensor([[1.0, 0], [3, 4]])  # mean [2, 2]: squared distances 1 + 4, twice
    assert float(nmse(target, target)) == 0
    assert float(nmse(target.mean(0).expand(2, 2), target)) == pytest.approx(1)
    assert float(nmse(torch.tensor([[1.0, 1], [3, 6]]), target)) == pytest.approx((1 + 4) / 10)
    assert float(nmse(target[None] * 7 + 3, target[None] * 7)) == pytest.approx(4 * 9 / 490)
    # It does not help the target to shrink: along its own direction there is no slope where all that is fitted is 0.
    free = torch.randn(6, 5, generator=rng(), requires_grad=True)
    centred = free.detach() - free.detach().mean(0)
    (slope,) = torch.autograd.grad(nmse(free.mean(0).detach().expand(6, 5), free), free)
    assert abs(float((slope * centred).sum())) < 1e-5


def test_divergence_is_the_workbenchs_mean_over_tokens() -> None:
    logits, reference = (torch.randn(2, 3, 11, generator=rng(i)) for i in range(2))
    expected = metrics.kl(logits.flatten(0, 1), reference.flatten(0, 1)).mean()
    assert float(kl(logits, reference.log_softmax(-1))) == pytest.approx(float(expected), rel=1e-5)


def test_identity_bridges_between_equal_models_change_nothing() -> None:
    """The hybrid of every boundary is the model, and every term is 0."""
    made = random_model(afrac=0.5)
    other = copy.deepcopy(made)
    streams = Streams.of(made, other, TOKENS)
    found = list(terms(made, other, identity(), streams, range(N)))
    assert [(term.direction, term.boundary) for term in found] == [
        (direction, i) for i in range(N) for direction in ("to_sparse", "to_dense")
    ]
    assert all(float(term.nmse) == 0 and abs(float(term.kl)) < 1e-6 for term in found if term.kl is not None)
    for values in agreement(made, other, identity(), TOKENS).values():
        torch.testing.assert_close(values, torch.zeros(N), rtol=0, atol=1e-6)


def two_models() -> tuple[SparseTransformer, SparseTransformer, Tensor]:
    """A sparse and a dense model of other width, and rows."""
    made = random_model(afrac=0.5).requires_grad_(True)
    dense = random_model(seed=1, d_model=16, n_head=2)
    return made, dense, torch.randint(40, (4, 12), generator=rng(3))


def gradients(*parts: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for part in parts for p in part.parameters() if p.grad is not None]
    for part in parts:
        part.zero_grad()
    return found


def test_the_loss_and_its_gradients_are_those_of_the_sum_written_out() -> None:
    """One graph, every hybrid from the tokens on, the published sum of terms with a coefficient each."""
    made, dense, rows = two_models()
    bridges = random_bridges(dense=16, afrac=0.5)
    c = Coupling(lm=0.7, nmse=0.3, kl_to_sparse=1.5, kl_to_dense=2.0)
    tokens = rows[:, :-1]
    target = dense(tokens).logits
    expected = c.lm * loss_of(made, rows)

    def divergence(logits: Tensor) -> Tensor:
        return metrics.kl(logits.flatten(0, 1), target.flatten(0, 1)).mean()

    def spread(x: Tensor) -> Tensor:
        return ((x - x.mean((0, 1))) ** 2).sum()

    for i in range(N):
        s, d = made.transformer.streams(tokens)[i], dense.transformer.streams(tokens)[i]
        f, g = bridges.encode(i, d), bridges.decode(i, s)
        expected = expected + c.nmse * (((f - s) ** 2).sum() / spread(s) + ((g - d) ** 2).sum() / spread(d))
        expected = expected + c.kl_to_sparse * divergence(made.run_from(i, f, tokens))
        expected = expected + c.kl_to_dense * divergence(dense.run_from(i, g, tokens))
    expected.backward()
    wanted = gradients(made, bridges)
    found = backward(made, dense, bridges, rows, c, range(N))
    assert float(found) == pytest.approx(float(expected.detach()), rel=1e-5)
    for one, other in zip(gradients(made, bridges), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in dense.parameters())


@pytest.mark.parametrize("k", [1, 2])
def test_sampled_boundaries_are_unbiased(k: int) -> None:
    """Loss and gradients, averaged over every draw there is."""
    made, dense, rows = two_models()
    bridges = random_bridges(dense=16, afrac=0.5)
    whole = backward(made, dense, bridges, rows, Coupling(), range(N))
    wanted = gradients(made, bridges)
    draws = list(combinations(range(N), k))
    losses = [backward(made, dense, bridges, rows, Coupling(), at) for at in draws]
    assert float(torch.stack(losses).mean()) == pytest.approx(float(whole), rel=1e-4)
    assert float(torch.stack(losses).std()) > 0.1  # each alone is another number
    for one, other in zip(gradients(made, bridges), wanted, strict=True):
        torch.testing.assert_close(one / len(draws), other, rtol=1e-3, atol=1e-4)


def test_every_draw_of_boundaries_is_equally_likely_and_known_by_its_step() -> None:
    c = Coupling(at_once=2)
    seen = Counter(tuple(c.drawn(N, 0, step)) for step in range(5000))
    assert set(seen) == set(combinations(range(N), 2))
    assert min(seen.values()) > 400 and max(seen.values()) < 600  # 500, with a standard deviation of 21
    assert c.drawn(N, 0, 17) == c.drawn(N, 0, 17) and Coupling(at_once=None).drawn(N, 0, 3) == list(range(N))
    assert [c.drawn(N, 0, i) for i in range(9)] != [c.drawn(N, 1, i) for i in range(9)]


# ---- training ----

DENSE = replace(MODEL, d_model=24, n_head=3, afrac=None, enable_bigram_table=False)  # so that there is much to learn


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer(300, real=0.0, size=100_000)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "COUNTED", 20_000)
    monkeypatch.setattr(train, "HELD_OUT", 8)


@pytest.fixture(scope="module")
def dense(bpe: Tokenizer) -> LanguageModel:
    """A dense model that has learnt something in a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "COUNTED", 20_000)
        patch.setattr(train, "HELD_OUT", 8)
        recipe = replace(RECIPE, model=DENSE, tokens=60 * 8 * 32, batch=8).dense()
        trained = Training(recipe, bpe).run()
    return language_model(trained.module, backend.wrapped(bpe), "dense")


def parts(training: BridgeTraining) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for prefix, part in training.parts.items():
        found |= {f"{prefix}{name}": x for name, x in part.module.state_dict().items()}
        for i, p in enumerate(part.parameters):
            found |= {f"{prefix}{i}.{name}": x for name, x in part.adam.state[p].items()}
    return found


def test_training_lowers_every_term_and_leaves_the_dense_model_alone(bpe: Tokenizer, dense: LanguageModel) -> None:
    shape = replace(MODEL, enable_bigram_table=False)
    recipe = replace(RECIPE, tokens=60 * 8 * 32, batch=8, density=0.5, model=shape)
    training = BridgeTraining(recipe, bpe, dense, Coupling(at_once=2))
    before = agreement(training.module, training.dense, training.bridges, training.held_out[:, :-1])
    loss = train.health(training.module, training.held_out)["loss"]
    trained = training.run()
    after = agreement(trained.module, trained.dense, trained.bridges, training.held_out[:, :-1])
    for name, values in after.items():
        assert float(values.mean()) < 0.9 * float(before[name].mean()), name
    last = trained.curve[-1]
    assert last["held_out_loss"] < loss - 1
    assert last["kl_to_dense"] == pytest.approx(float(after["kl_to_dense"].mean()))
    assert last["dense_loss"] == pytest.approx(float(loss_of(dense._module, training.held_out)), rel=1e-4)
    for name, x in dense._module.state_dict().items():
        assert torch.equal(trained.dense.state_dict()[name], x)
    counts = nonzero(trained.module)
    assert counts["nonzero"] == counts["weights"] // 2


def test_a_killed_run_goes_on_bit_for_bit(bpe: Tokenizer, dense: LanguageModel, tmp_path: Path) -> None:
    c = Coupling(at_once=2)

    def training(folder: Path | None = None) -> BridgeTraining:
        return BridgeTraining(RECIPE, bpe, dense, c, folder=folder)

    whole = training()
    curve = whole.run(every=4.0, clock=clock()).curve
    for stop in (6, 9):
        with pytest.raises(Stopped):
            training(tmp_path).run(every=4.0, clock=clock(stop))
    resumed = training(tmp_path)
    assert 0 < resumed.steps < 16
    again = resumed.run(every=4.0, clock=clock())
    assert resumed.steps == whole.steps == 16
    for name, x in parts(whole).items():
        assert torch.equal(parts(resumed)[name], x), name
    assert {k: x for k, x in again.curve[-1].items() if k != "seconds"} == {
        k: x for k, x in curve[-1].items() if k != "seconds"
    }
    other = language_model(dense._module, dense.tokenizer, "other")
    start = language_model(copy.deepcopy(whole.module), dense.tokenizer)
    for training_of_another in (
        partial(BridgeTraining, RECIPE, bpe, dense, Coupling(nmse=0.5)),
        partial(BridgeTraining, RECIPE, bpe, other, c),
        partial(BridgeTraining, RECIPE, bpe, dense, c, start=start),
    ):
        with pytest.raises(UserError, match="of another recipe"):
            training_of_another(folder=tmp_path)
    with pytest.raises(UserError, match="of another recipe"):
        Training(RECIPE, bpe, folder=tmp_path)


def test_the_bridges_optimiser_is_adam_with_decay_at_a_rate_of_its_own(bpe: Tokenizer, dense: LanguageModel) -> None:
    """The first step, written out: the sign of the gradient times the rate, after decay."""
    c = Coupling(lr=0.02, decay=0.5, at_once=None)
    training = BridgeTraining(RECIPE, bpe, dense, c)
    training.steps = 8  # half way
    before = copy.deepcopy(training.bridges.state_dict())
    rows = training.stream.read(0, 128).view(4, 32)
    backward(training.module, training.dense, training.bridges, rows, c, range(N))
    slopes = {name: p.grad.clone() for name, p in training.bridges.named_parameters() if p.grad is not None}
    training.bridges.zero_grad()
    training.optimiser.adam.zero_grad()
    training._update(rows)
    rate = 0.02 * (1 - 0.5) / (1 - train.WARMUP)
    for name, x in training.bridges.state_dict().items():
        large = slopes[name].abs() > 1e-4
        expected = before[name] * (1 - 0.5 * rate) - rate * slopes[name].sign()
        torch.testing.assert_close(x[large], expected[large], rtol=1e-3, atol=1e-5)


def test_from_a_given_sparse_model_density_is_final_at_once(bpe: Tokenizer, dense: LanguageModel) -> None:
    given = Training(RECIPE, bpe).run()
    start = language_model(given.module, backend.wrapped(bpe), "given")
    training = BridgeTraining(RECIPE, bpe, dense, start=start)
    for name, x in start._module.state_dict().items():
        assert torch.equal(training.module.state_dict()[name], x), name
    training.steps = 1
    training._update(training.stream.read(0, 128).view(4, 32))
    assert nonzero(training.module) == nonzero(given.module)
    again = BridgeTraining(RECIPE, bpe, dense)
    again.steps = 1
    again._update(training.stream.read(0, 128).view(4, 32))
    assert nonzero(again.module)["nonzero"] > 1.5 * nonzero(given.module)["nonzero"]  # from scratch it is not
    with pytest.raises(UserError, match="given is not the recipe's model"):
        BridgeTraining(replace(RECIPE, model=replace(MODEL, afrac=0.25)), bpe, dense, start=start)


def test_models_that_no_bridge_joins_are_sentences(bpe: Tokenizer, dense: LanguageModel, coder: LanguageModel) -> None:
    with pytest.raises(UserError, match="has 3 layers and the dense one 2"):
        BridgeTraining(replace(RECIPE, model=replace(MODEL, n_layer=3)), bpe, dense)
    with pytest.raises(UserError, match="different tokenizers"):
        BridgeTraining(RECIPE, train_tokenizer(290, real=0.0, size=100_000), dense)
    with pytest.raises(UserError, match=r"coder is no model of circuits.sparse"):
        BridgeTraining(RECIPE, bpe, coder)
    with pytest.raises(UserError, match="length=64 is more than the 32 tokens the dense model reads"):
        BridgeTraining(replace(RECIPE, length=64, model=replace(MODEL, block_size=64)), bpe, dense)
    with pytest.raises(UserError, match=r"2 layers of width 32 .* have 2 of width 24 and 32"):
        made = language_model(SparseTransformer(MODEL), backend.wrapped(bpe))
        Bridged(made, dense, identity())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nmse": -1.0}, "must not be negative"),
        ({"at_once": 0}, "at_once=0 boundaries"),
        ({"afrac": 1.5}, "afrac=1.5 must be above 0"),
    ],
)
def test_impossible_couplings_are_sentences(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Coupling(**given)


# ---- files ----


def test_a_saved_pair_comes_back_bit_for_bit_and_not_with_another_model(
    bpe: Tokenizer, dense: LanguageModel, tmp_path: Path
) -> None:
    trained = BridgeTraining(replace(RECIPE, tokens=4 * 128), bpe, dense).run()
    save(trained, tmp_path / "pair")
    found = beside(LanguageModel.load(str(tmp_path / "pair")))
    for made, model in ((trained.module, found.sparse), (trained.dense, found.dense)):
        for name, x in made.state_dict().items():
            assert torch.equal(model._module.state_dict()[name], x), name
    for name, x in trained.bridges.state_dict().items():
        assert torch.equal(found.bridges.state_dict()[name], x), name
    assert found.bridges.config == trained.bridges.config
    assert found.sparse.tokenizer.get_vocab() == bpe.get_vocab()
    with pytest.raises(UserError, match="give another name"):
        save(trained, tmp_path / "pair")
    files.save(trained.module, backend.wrapped(bpe), tmp_path / "other")
    for model in (LanguageModel.load(str(tmp_path / "other")), found.dense):
        with pytest.raises(UserError, match=f"{model.name} has no bridges beside it"):
            beside(model)
    config = tmp_path / "pair" / "bridges" / "dense" / "config.json"
    config.write_text(config.read_text() + "\n")  # the same model, but not the same bytes
    with pytest.raises(UserError, match=r"dense model of .* is not the one that these bridges were trained with"):
        beside(LanguageModel.load(str(tmp_path / "pair")))


def test_damaged_bridges_are_sentences(bpe: Tokenizer, dense: LanguageModel, tmp_path: Path) -> None:
    trained = BridgeTraining(replace(RECIPE, tokens=128), bpe, dense).run()
    save(trained, tmp_path / "pair")
    about, weights = (tmp_path / "pair" / "bridges" / name for name in (module.ABOUT, module.WEIGHTS))
    text, whole = about.read_text(), weights.read_bytes()
    for change, left in (
        ('"d_dense": 16', whole), ('"depth": 3', whole), ("{", whole), (None, whole[:100]),
    ):  # fmt: skip
        about.write_text(text.replace('"d_dense": 24', change) if change else text)
        weights.write_bytes(left)
        with pytest.raises(UserError, match=r"bridges in .* cannot be read"):
            beside(LanguageModel.load(str(tmp_path / "pair")))
    about.write_text(text)
    weights.write_bytes(whole)
    (tmp_path / "pair" / "bridges" / "dense").rename(tmp_path / "away")
    with pytest.raises(UserError, match="has no dense model, and none that is known here has the fingerprint"):
        beside(LanguageModel.load(str(tmp_path / "pair")))


# ---- runs ----


def test_a_bridged_model_is_loaded_by_the_runs_id_with_its_bridges(
    sparse_coder: LanguageModel, bridged_coder: LanguageModel
) -> None:
    run = runs.run("sparse-bridge", model=sparse_coder, dense=bridged_coder.name, tokens=2048, at_once=5)
    found = beside(LanguageModel.load(run.id))
    held_out = TokenStream(sparse_coder.tokenizer.backend_tokenizer, real=0.0, held_out=True)
    tokens = held_out.read(0, train.HELD_OUT * 128).view(train.HELD_OUT, 128)[:MEASURED, :-1]
    again = agreement(found.sparse._module, found.dense._module, found.bridges, tokens)
    for name, values in run.result.agreement.items():
        torch.testing.assert_close(values, again[name], rtol=1e-4, atol=1e-5)
        assert run.summary[name] == pytest.approx(float(again[name].mean()), rel=1e-3, abs=1e-3)
    assert found.dense.name == f"{run.id}/dense" and found.sparse.fingerprint != sparse_coder.fingerprint
    assert torch.equal(found.dense._module.lm_head.weight, sparse_coder._module.lm_head.weight)
    counts = nonzero(found.sparse._module)
    assert run.summary["nonzero"] == counts["nonzero"] == counts["weights"] // 4
    response = runs.run("bridge-dose", model=run.id, task="with_as", n=3, controls=2).result
    pairs = [Pairs.of(sample(split(registry.get_task("with_as"), p), found.sparse, 3, 0)) for p in ("train", "test")]
    [(node, _)] = channel_effects(found.sparse, pairs[0]).top(1)
    assert response.node == node and len(response.controls) == 2
    direct = dose_response(found, pairs[1], node, controls=2)
    torch.testing.assert_close(direct.probability, response.probability, rtol=1e-4, atol=1e-6)


def test_where_training_of_bridges_begins(sparse_coder: LanguageModel, bridged_coder: LanguageModel) -> None:
    given, random = (
        runs.run("sparse-bridge", model=sparse_coder, dense=bridged_coder.name, tokens=1024, start=start).summary
        for start in ("given", "random")
    )
    assert given["nonzero"] == given["of_weights"] // 4
    assert given["held_out_loss"] != random["held_out_loss"]
    with pytest.raises(UserError, match="tokens or of seconds"):
        runs.run("sparse-bridge", model=sparse_coder, dense=bridged_coder.name, tokens=1024, seconds=1.0)


def test_a_model_that_does_not_say_how_it_was_trained_is_refused(quotes: tuple[Bridged, Pairs]) -> None:
    with pytest.raises(UserError, match="does not say how it was trained"):
        runs.run("sparse-bridge", model=quotes[0].sparse, dense="./none", tokens=1024)
    with pytest.raises(UserError, match="has no bridges beside it; `wb run sparse-bridge --model"):
        runs.run("bridge-dose", model=quotes[0].sparse, task="with_as", n=2)


# ---- edits ----


def exchanged(index: int, other: Tensor) -> Callable[[Tensor], Tensor]:
    def fn(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., index] = other[..., index]
        return x

    return fn


OTHER = torch.randint(40, (3, 12), generator=rng(8))
NODES = ("0.attn.act_in:3", "0.mlp.act_in:7", "1.attn.act_in:31", "1.mlp.act_in:0")


@pytest.mark.parametrize("node", NODES)
def test_at_strength_1_the_norm_reads_the_counterfactual_channel_if_its_scale_stays(node: str) -> None:
    """Equal models and identity bridges: divided by how much the norm's scale changed, what the sublayer reads is as
    before but for the one channel, which is as on the counterfactual; nothing else of the stream changes."""
    model = language_model(random_model())
    same = Bridged(model, model, identity())
    read, index = Read(node.split(":")[0], model), int(node.split(":")[1])
    both = [read.hook, read.stream]
    before, there = model.run(TOKENS, capture=both), model.run(OTHER, capture=both)
    after = model.run(TOKENS, capture=both, edit=edit(same, node, TOKENS, OTHER))
    size = {
        name: run[read.stream].square().mean(-1, keepdim=True).sqrt() for name, run in (("b", before), ("a", after))
    }
    expected = exchanged(index, there[read.hook])(before[read.hook])
    torch.testing.assert_close(after[read.hook] * size["a"] / size["b"], expected, rtol=1e-3, atol=1e-4)
    assert float((expected - before[read.hook]).abs().max()) > 0.1
    changed = after[read.stream] != before[read.stream]
    changed[..., index] = False
    assert not changed.any()


def test_what_is_added_is_the_difference_by_the_decoders_row_and_grows_with_the_strength() -> None:
    made, dense = random_model(afrac=0.25), language_model(random_model(seed=1, d_model=16, n_head=2), name="dense")
    made.transformer.h[1].ln_2.weight[4] = 0  # a channel that the MLP cannot read
    model = language_model(made)
    bridged = Bridged(model, dense, random_bridges(dense=16))
    hook = "blocks.1.hook_resid_mid"
    plain = dense.run(TOKENS, capture=[hook])
    run = {
        name: model.run(x, capture=[hook, "blocks.1.mlp.hook_in"]) for name, x in (("here", TOKENS), ("there", OTHER))
    }
    for index in (4, 9):
        node = f"1.mlp.act_in:{index}"
        unedited = dense.run(TOKENS, edit=edit(bridged, node, TOKENS, OTHER, 0.0)).logits
        assert unedited is not None and torch.equal(unedited, plain.logits)  # bit for bit
        for strength in (0.5, 2.0):
            change = edit(bridged, node, TOKENS, OTHER, strength)
            found = dense.run(TOKENS, capture=[hook], edit=change)[hook] - plain[hook]
            x = run["here"]["blocks.1.mlp.hook_in"][..., index], run["there"]["blocks.1.mlp.hook_in"][..., index]
            rms = run["here"][hook].square().mean(-1).sqrt()
            gain = made.transformer.h[1].ln_2.weight[index].detach()
            amount = (x[1] - x[0]) * rms / gain if index == 9 else torch.zeros(3, 12)
            row = bridged.bridges.decoders[3].weight[:, index].detach()  # type: ignore[index,union-attr]
            expected = strength * amount[..., None] * row
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert float(expected.abs().max()) > 0.1


@pytest.mark.parametrize("node", ["0.attn.act_in:0", "1.mlp.act_in:6"])
def test_where_the_norm_does_not_change_strength_1_is_exact_patching(node: str) -> None:
    """A channel of opposite signs on the two prompts, which nothing else reads: equal models, identity bridges."""
    model, some = by_hand(noise=0.0)
    found = dose_response(Bridged(model, model, identity(16)), some, node, strengths=(0.0, 1.0), controls=3)
    assert found.sparse[1] - found.sparse[0] > 0.4
    assert float(found.mean[0]) == pytest.approx(found.sparse[0], abs=1e-6)
    assert float(found.mean[1]) == pytest.approx(found.sparse[1], abs=1e-5)
    index = int(node.split(":")[1])
    read = Read(node.split(":")[0], model)
    other = some.partner(model.run(some.tokens, capture=[read.hook])[read.hook])
    patched = model.run(some.tokens, edit={read.hook: exchanged(index, other)}).logits
    moved = model.run(
        some.tokens, edit=edit(Bridged(model, model, identity(16)), node, some.tokens, some.partner(some.tokens))
    ).logits
    torch.testing.assert_close(moved, patched, rtol=0, atol=1e-5)


def test_places_and_channels_that_do_not_exist_are_sentences() -> None:
    model, some = by_hand()
    bridged = Bridged(model, model, identity(16))
    for node, message in (
        ("0.attn.q:1", "'0.attn.q' is nothing that a sublayer .* 0.attn.act_in to 1.mlp.act_in"),
        ("2.mlp.act_in:1", "'2.mlp.act_in' is nothing"),
        ("1.mlp.act_in:16", "has 1.mlp.act_in:0 to 1.mlp.act_in:15"),
        ("1.mlp.act_in", "is no channel"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            dose_response(bridged, some, node)


# ---- which channel, and how much it takes ----


@pytest.fixture(scope="module")
def quotes(coder: LanguageModel) -> tuple[Bridged, Pairs]:
    """Two random models that read code, and pairs of different lengths."""
    one = sparse(coder)
    made = random_model(seed=4, vocab_size=one.config.d_vocab, block_size=256, d_model=16, n_head=2)
    dense = LanguageModel(made, one.tokenizer, name="random-dense", fingerprint="random-dense")
    batch = sample(registry.get_task("single_double_quote"), one, 4, 0)
    return Bridged(one, dense, random_bridges(dense=16)), Pairs.of(batch)


def alone(model: LanguageModel, pairs: Pairs, i: int, edits: Any = None) -> Tensor:
    """Logits at the end of one prompt, run by itself."""
    n = int(pairs.last[i]) + 1
    logits = model.run(pairs.tokens[i : i + 1, :n], edit=edits).logits
    assert logits is not None
    return logits[0, -1]


def test_effects_are_those_of_patching_one_prompt_at_a_time(quotes: tuple[Bridged, Pairs]) -> None:
    model, pairs = quotes[0].sparse, quotes[1]
    found = channel_effects(model, pairs, ["1.mlp.act_in", "0.attn.act_in"])
    assert len(found.nodes) == 64 and found.nodes[40] == "0.attn.act_in:8"
    n, hook = len(pairs), "blocks.1.mlp.hook_in"
    for index in (0, 13):
        rises = []
        for i in range(2 * n):
            j, length = (i + n) % (2 * n), int(pairs.last[i]) + 1
            other = model.run(pairs.tokens[j : j + 1, :length], capture=[hook])[hook]
            logits = torch.stack([alone(model, pairs, i), alone(model, pairs, i, {hook: exchanged(index, other)})])
            wrong, right = (pairs.one[i], pairs.two[i])[:: 1 if not pairs.is_one[i] else -1]
            odds = logits[:, wrong].logsumexp(-1) - logits[:, right].logsumexp(-1)
            rises.append(odds[1] - odds[0])
        assert float(found.scores[index]) == pytest.approx(float(torch.stack(rises).mean()), abs=1e-4)
    best = found.top(1)[0]
    assert best[1] == float(found.scores.max()) and found.nodes[int(found.scores.argmax())] == best[0]


def test_only_channels_that_carry_the_answer_have_an_effect() -> None:
    model, some = by_hand(noise=0.0)
    found = channel_effects(model, some)
    assert len(found.nodes) == 4 * 16
    effects = {name: score for name, score in zip(found.nodes, found.scores.tolist(), strict=True) if abs(score) > 1e-6}
    assert set(effects) == {"0.attn.act_in:0", "1.mlp.act_in:6"} and min(effects.values()) > 1


def test_a_dose_response_is_what_editing_one_prompt_at_a_time_gives(quotes: tuple[Bridged, Pairs]) -> None:
    bridged, pairs = quotes
    found = dose_response(bridged, pairs, "1.attn.act_in:5", strengths=(0.0, 0.7), controls=4)
    n = len(pairs)
    assert found.probability.shape == (2, 2 * n) and len(found.controls) == 4 and found.control.shape == (4, 2)
    assert found.strongest in (found.node, *found.controls) and found.node not in found.controls
    added, stream, hook = 0.0, 0.0, "blocks.1.hook_resid_pre"
    for i in range(2 * n):
        j, length = (i + n) % (2 * n), int(pairs.last[i]) + 1
        here, there = pairs.tokens[i : i + 1, :length], pairs.tokens[j : j + 1, :length]
        answer = pairs.two[i] if pairs.is_one[i] else pairs.one[i]
        assert bool(found.towards_one[i]) is not bool(pairs.is_one[i])
        for row, strength in enumerate(found.strengths):
            p = alone(bridged.dense, pairs, i, edit(bridged, found.node, here, there, strength)).softmax(-1)
            assert float(found.probability[row, i]) == pytest.approx(float(p[answer].sum()), rel=1e-3)
        assert float(found.goal[i]) == pytest.approx(
            float(alone(bridged.dense, pairs, j).softmax(-1)[answer].sum()), rel=1e-3
        )
        plain, moved = (
            bridged.dense.run(here, capture=[hook], edit=edits)[hook]
            for edits in (None, edit(bridged, found.node, here, there, 1.0))
        )
        added, stream = added + float((moved - plain).square().sum()), stream + float(plain.square().sum())
    assert float(found.sizes[0]) == pytest.approx((added / stream) ** 0.5, rel=1e-3)
    one = dose_response(bridged, pairs, found.controls[0], strengths=(0.0, 0.7), controls=0)
    torch.testing.assert_close(one.mean, found.control[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(one.sizes[0], found.sizes[1])
    scale = float(found.sizes[0] / found.sizes[1])  # at equal size, a control is itself at another strength
    again = dose_response(bridged, pairs, found.controls[0], strengths=(0.0, 0.7 * scale), controls=0)
    torch.testing.assert_close(again.mean, found.matched[0], rtol=1e-4, atol=1e-7)
    assert scale != pytest.approx(1, abs=0.01)
    assert bool(one.band().isnan().all()) and one.summary()["n_controls"] == 0
    low, high = found.band(0.0, 1.0)
    assert torch.equal(low, found.control.amin(0)) and torch.equal(high, found.control.amax(0))
    assert torch.equal(found.band(0.0, 1.0, matched=True)[1], found.matched.amax(0))
    drawn = {trace.name: trace for trace in plots.figure(found).data}
    assert list(drawn[found.node].y) == pytest.approx(found.mean.tolist(), abs=1e-4)
    assert list(drawn["other channels"].y) == pytest.approx(found.band()[1].tolist(), abs=1e-4)
    assert plots.figure(one).data and found.node in plots.definition(found)


def test_the_channel_that_decides_is_the_strongest_of_all_and_controls_do_nothing() -> None:
    model, some = by_hand()
    bridged = Bridged(model, model, identity(16))
    found = dose_response(bridged, some, "1.mlp.act_in:6", strengths=(0.0, 0.5, 1.0, 2.0), controls=20)
    assert found.strongest == found.node and 5 < len(found.controls) <= 15
    assert float(found.mean[2] - found.mean[0]) > 0.4 and float(found.control.amax() - found.control.amin()) < 0.05
    one = dose_response(bridged, some, found.controls[0], controls=15)
    assert one.strongest == "1.mlp.act_in:6"  # also where another was picked


def test_an_answer_that_is_anything_else_counts_all_other_tokens(quotes: tuple[Bridged, Pairs]) -> None:
    bridged, _ = quotes
    pairs = Pairs.of(sample(registry.get_task("else_elif"), bridged.dense, 4, 0))
    assert not any(len(ids) for ids in pairs.two)
    found = dose_response(bridged, pairs, "0.mlp.act_in:1", strengths=(0.0,), controls=0)
    for i in range(8):
        p = float(alone(bridged.dense, pairs, i).softmax(-1)[pairs.one[i]].sum())
        assert float(found.probability[0, i]) == pytest.approx(1 - p if pairs.is_one[i] else p, rel=1e-3)


def test_results_are_kept_as_they_are(quotes: tuple[Bridged, Pairs]) -> None:
    bridged, pairs = quotes
    effects = channel_effects(bridged.sparse, pairs, ["0.attn.act_in"])
    response = dose_response(bridged, pairs, "0.attn.act_in:1", strengths=(0.0, 1.0), controls=2)
    for kind, result in ((ChannelEffects, effects), (DoseResponse, response)):
        again = results.decode(kind, *results.encode(result))
        assert again.summary() == result.summary() and type(again) is kind
    again = results.decode(DoseResponse, *results.encode(response))
    assert torch.equal(again.probability, response.probability) and again.strengths == response.strengths
