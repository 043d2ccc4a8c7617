"""Training of weight-sparse models: exact density, the schedule as published, and runs that go on bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from circuits.sparse import files, train
from circuits.sparse.data import train_tokenizer
from circuits.sparse.model import SparseConfig, SparseTransformer
from circuits.sparse.train import Optimiser, Recipe, Step, Training, bigram_logits, loss_of, matrices, nonzero, project
from tests.benchmarks.harness import fresh_process
from workbench import backend
from workbench.errors import UserError
from workbench.models import LanguageModel

MODEL = SparseConfig(vocab_size=300, n_layer=2, d_model=32, n_head=4, d_head=8, block_size=32, afrac=0.5)
RECIPE = Recipe(MODEL, density=0.25, embedding_density=0.5, per_neuron=2, tokens=16 * 4 * 32, batch=4, length=32)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer(300, real=0.0, size=100_000)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "COUNTED", 20_000)
    monkeypatch.setattr(train, "HELD_OUT", 8)


class Stopped(Exception):
    pass


def clock(stop_after: int | None = None, tick: float = 1.0) -> Any:
    """Every look at it is one tick later; after so many looks training is killed."""

    def ticks() -> Iterator[float]:
        now = 0.0
        while stop_after is None or now < stop_after * tick:
            yield now
            now += tick
        raise Stopped

    it = ticks()
    return lambda: next(it)


# ---- one step ----


def test_density_is_exact_after_every_step_and_neurons_keep_their_least(bpe: Tokenizer) -> None:
    training = Training(RECIPE, bpe)
    rows = training.stream.batches(4, 32)
    for i in range(16):
        loss_of(training.module, next(rows)).backward()
        step = training.optimiser.step(i / 16)
        for name, weight, neurons, embedding in matrices(training.module):
            share = step.embedding_density if embedding else step.density
            assert int(weight.count_nonzero()) == int(share * weight.numel()), (i, name)
            if neurons:
                each = (weight != 0).sum(1 if neurons == "rows" else 0)
                assert int(each.min()) >= 2, (i, name)
    counts = nonzero(training.module)
    blocks, embeddings = 2 * 12 * 32 * 32, 2 * 300 * 32
    assert counts == {"nonzero": blocks // 4 + embeddings // 2, "weights": blocks + embeddings}


def test_a_step_is_the_published_one(bpe: Tokenizer) -> None:
    """Normalised gradient, Adam, projection, decay: written out for the second step."""
    module = SparseTransformer(MODEL, torch.Generator().manual_seed(0))
    optimiser, mean, square = Optimiser(module, RECIPE), {}, {}
    names = dict(module.named_parameters())
    expected = {name: x.detach().clone() for name, x in names.items()}
    for i, done in enumerate((0.3, 0.4), start=1):
        rows = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(i))
        loss_of(module, rows).backward()
        grads = {name: x.grad.clone() for name, x in names.items() if x.grad is not None}
        rms = torch.cat([g.flatten() for g in grads.values()]).square().mean().sqrt()
        step = optimiser.step(done)
        for name, g in grads.items():
            g = g / (rms + 1e-5)
            mean[name] = 0.9 * mean.get(name, 0) + 0.1 * g
            square[name] = 0.95 * square.get(name, 0) + 0.05 * g**2
            update = mean[name] / (1 - 0.9**i) / ((square[name] / (1 - 0.95**i)).sqrt() + 0.1)
            expected[name] -= step.lr * update
        other = SparseTransformer(MODEL)
        other.load_state_dict(expected, strict=False)
        project(other, RECIPE, step)
        expected = {name: x.detach().clone() for name, x in other.named_parameters()}
        for name, _, _, _ in matrices(other):
            expected[name] *= 1 - 0.1 * step.lr
        for name, x in module.named_parameters():
            torch.testing.assert_close(x.detach(), expected[name], rtol=1e-4, atol=1e-6)


def test_schedule_at_its_corners() -> None:
    recipe = replace(RECIPE, density=1 / 16, embedding_density=1 / 4, lr=0.1)
    assert Step.at(recipe, 0.0) == Step(0.0, 1.0, 1.0)
    start = Step.at(recipe, 0.01)
    assert (start.density, start.embedding_density) == (1, 1) and start.lr == pytest.approx(0.1 / 4)  # sqrt(1 / 16)
    half = Step.at(recipe, 0.255)
    assert half.density == pytest.approx(17 / 32) and half.embedding_density == pytest.approx(5 / 8)
    annealed = Step.at(recipe, 0.505)
    assert annealed.density == 1 / 16 and annealed.lr == pytest.approx(0.1 / 2)
    assert Step.at(recipe, 1.0).lr == 0
    assert Step.at(recipe.dense(), 0.505).density == 1 and recipe.dense().model.afrac is None


# ---- a run ----


def state(training: Training) -> dict[str, torch.Tensor]:
    moments = [training.optimiser.adam.state[p] for p in training.optimiser.parameters]
    return dict(training.module.state_dict()) | {
        f"{i}.{name}": x for i, each in enumerate(moments) for name, x in each.items()
    }


@pytest.mark.parametrize("kills", [(9,), (5, 6, 4)])
def test_a_killed_run_goes_on_bit_for_bit(kills: tuple[int, ...], bpe: Tokenizer, tmp_path: Path) -> None:
    whole = Training(RECIPE, bpe)
    curve = whole.run(every=2.0, clock=clock()).curve
    for stop in kills:
        with pytest.raises(Stopped):
            Training(RECIPE, bpe, folder=tmp_path).run(every=2.0, clock=clock(stop))
    resumed = Training(RECIPE, bpe, folder=tmp_path)
    assert 0 < resumed.steps < 16
    again = resumed.run(every=2.0, clock=clock())
    assert resumed.steps == whole.steps == 16
    for name, x in state(whole).items():
        assert torch.equal(state(resumed)[name], x), name
    assert again.curve[-1]["held_out_loss"] == curve[-1]["held_out_loss"]
    ended = Training(RECIPE, bpe, folder=tmp_path).run(clock=clock())  # nothing is left to do
    assert ended.curve == again.curve and ended.about["weights"] == again.about["weights"]


def test_by_the_clock_training_ends_annealed_whatever_the_speed(bpe: Tokenizer) -> None:
    for tick in (0.5, 3.0):
        training = Training(replace(RECIPE, tokens=None, seconds=20.0), bpe)
        last = training.run(every=100.0, clock=clock(tick=tick)).curve[-1]
        assert last["density"] == 0.25 and last["step"] == pytest.approx(20 / tick, abs=1)


def test_half_precision_is_of_products_alone_and_trains_as_well(bpe: Tokenizer, tmp_path: Path) -> None:
    exact = Training(RECIPE, bpe)
    expected = exact.run(every=100.0, clock=clock()).curve[-1]
    half = Training(replace(RECIPE, precision="bfloat16"), bpe, folder=tmp_path)
    rows = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(0))
    error = abs(float(half.loss(rows).detach()) - float(loss_of(half.module, rows).detach()))
    assert 0 < error < 0.01 and half.loss(rows).dtype == torch.float32
    with pytest.raises(Stopped):
        half.run(every=2.0, clock=clock(9))
    resumed = Training(replace(RECIPE, precision="bfloat16"), bpe, folder=tmp_path)
    last = resumed.run(every=100.0, clock=clock()).curve[-1]
    assert last["held_out_loss"] == pytest.approx(expected["held_out_loss"], abs=0.01)
    assert {x.dtype for x in state(resumed).values()} == {torch.float32}
    for name, weight, _, embedding in matrices(resumed.module):
        assert int(weight.count_nonzero()) == int((0.5 if embedding else 0.25) * weight.numel()), name


def compiled() -> tuple[bool, float]:
    """Whether a model is compiled, and how far its weights are then from what they are without, after three steps."""
    train.COUNTED, train.HELD_OUT = 20_000, 8
    bpe = train_tokenizer(300, real=0.0, size=100_000)
    one, other = (Training(replace(RECIPE, compile=yes), bpe) for yes in (False, True))
    for training in (one, other):
        for i in range(3):
            training.loss(training._rows()).backward()
            training.optimiser.step(0.5 + i / 10)
            training.steps += 1
    both = zip(one.module.parameters(), other.module.parameters(), strict=True)
    return other.forward is not other.module, max(float((x - y).detach().abs().max()) for x, y in both)


@pytest.mark.slow  # a C++ compiler works for a while
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_model_trains_to_the_same_weights() -> None:
    """In a process without the tests' type checks, which cannot be compiled."""
    is_compiled, difference = fresh_process(compiled)
    assert is_compiled and difference < 1e-5


def test_checkpoints_of_other_runs_and_damaged_ones_are_sentences(bpe: Tokenizer, tmp_path: Path) -> None:
    Training(RECIPE, bpe, folder=tmp_path).run(clock=clock())
    with pytest.raises(UserError, match="of another recipe"):
        Training(replace(RECIPE, seed=1), bpe, folder=tmp_path)
    path = tmp_path / train.CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cannot be read .* delete it"):
        Training(RECIPE, bpe, folder=tmp_path)


def test_a_trained_model_beats_its_bigram_table_and_is_saved_small(bpe: Tokenizer, tmp_path: Path) -> None:
    recipe = replace(RECIPE, tokens=120 * 16 * 32, batch=16, model=replace(MODEL, afrac=None))
    training = Training(recipe, bpe)
    before = train.health(training.module, training.held_out)
    trained = training.run()
    last = trained.curve[-1]
    assert last["held_out_loss"] < before["loss"] - 0.02
    assert before["loss"] == pytest.approx(
        float(-training.module.bigram_table[training.held_out[:, :-1]].gather(  # type: ignore[index]
            -1, training.held_out[:, 1:, None]).mean()), abs=0.05)  # fmt: skip
    assert 0 <= last["dead_neurons"] <= 1 and last["kurtosis"] > 1
    files.save(trained.module, backend.wrapped(bpe), tmp_path / "model", trained.about)
    model = LanguageModel.load(str(tmp_path / "model"))
    assert torch.equal(model.tokenize("for x in y:"), torch.tensor(bpe.encode("for x in y:").ids))
    logits = model.run(training.held_out[:, :-1]).logits
    assert logits is not None
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), training.held_out[:, 1:].flatten())
    assert float(loss) == pytest.approx(last["held_out_loss"], abs=1e-4)


def test_health_counts_neurons_that_never_fire(bpe: Tokenizer) -> None:
    training = Training(RECIPE, bpe)
    with torch.no_grad():
        for block in training.module.transformer.h:
            block.mlp.c_fc.bias[:32] = -100.0  # a quarter: GELU gives exactly 0 there
    found = train.health(training.module, training.held_out)
    assert found["dead_neurons"] == pytest.approx(0.25, abs=0.02)
    assert all(p.requires_grad for name, p in training.module.named_parameters())  # still in training


def test_bigram_table_by_hand() -> None:
    table = bigram_logits(torch.tensor([0, 1, 0, 2, 0, 1]), 3, smoothing=1.0)
    single = torch.tensor([4, 3, 2]) / 9
    expected = torch.tensor([[0.0, 2, 1], [1, 0, 0], [1, 0, 0]]) + single
    torch.testing.assert_close(table, (expected / torch.tensor([4.0, 2, 2])[:, None]).log(), rtol=1e-3, atol=1e-3)
    assert torch.equal(table, table.half().float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0.0}, "density=0 must be above 0"),
        ({"tokens": None}, "give one of the two"),
        ({"seconds": 5.0}, "give one of the two"),
        ({"precision": "float16"}, "is not one of float32, bfloat16"),
        ({"length": 64}, "more than the 32 tokens"),
        ({"density": 1 / 32}, "leaves fewer than per_neuron=2 weights to each neuron of .*; the most is 1"),
    ],
)
def test_impossible_recipes_are_sentences(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(RECIPE, **change)


def test_a_tokenizer_too_large_is_a_sentence(bpe: Tokenizer) -> None:
    with pytest.raises(UserError, match="more than vocab_size=280"):
        Training(replace(RECIPE, model=replace(MODEL, vocab_size=280)), bpe)
