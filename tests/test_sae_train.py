"""SAE training against SAELens, which runs beside it on the same rows: losses step by step, files both ways."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE as LensSAE
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    SAETrainer,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from torch import Tensor

from saes.active import Active
from saes.objectives import Spec
from saes.sae import SAE
from saes.train import Place, Progress, Training, Units, geometric_median
from workbench.activations.streams import Stream
from workbench.errors import UserError

D, LATENTS, ROWS, STEPS = 24, 96, 64, 60
HOOK = "blocks.3.hook_resid_post"


def rows(n: int = STEPS, seed: int = 0) -> list[Tensor]:
    """Activations with something to learn: sparse combinations of a few directions, and a mean."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(40, D, generator=generator)
    mean = torch.randn(D, generator=generator)
    out = []
    for _ in range(n):
        amounts = torch.rand(ROWS, 40, generator=generator) * (torch.rand(ROWS, 40, generator=generator) < 0.1)
        out.append(amounts @ directions + mean + 0.05 * torch.randn(ROWS, D, generator=generator))
    return out


CASES: dict[str, tuple[type[Any], dict[str, Any], dict[str, Any]]] = {
    "topk": (TopKTrainingSAEConfig, {"k": 5}, {"k": 5}),
    "topk, b_dec not subtracted": (
        TopKTrainingSAEConfig, {"k": 5, "apply_b_dec_to_input": False}, {"k": 5, "subtract": False},
    ),
    "batchtopk": (BatchTopKTrainingSAEConfig, {"k": 4.5}, {"architecture": "batchtopk", "k": 4.5}),
    "matryoshka": (
        MatryoshkaBatchTopKTrainingSAEConfig, {"k": 5, "matryoshka_widths": [12, 40, LATENTS]},
        {"architecture": "matryoshka", "k": 5, "widths": (12, 40)},
    ),
    "jumprelu": (
        JumpReLUTrainingSAEConfig, {"l0_coefficient": 0.3, "l0_warm_up_steps": 20},
        {"architecture": "jumprelu", "l0": 0.3, "price_warm_up": 20},
    ),
    "standard": (
        StandardTrainingSAEConfig, {"l1_coefficient": 0.5, "l1_warm_up_steps": 10},
        {"architecture": "standard", "l1": 0.5, "price_warm_up": 10},
    ),
}  # fmt: skip
# SAELens' names of our losses.
LOSSES = {"error": "mse_loss", "aux": "auxiliary_reconstruction_loss", "l0": "l0_loss", "l1": "l1_loss"}


def pair(case: str, *, dead_after: int = 8, warm_up: int = 5, decay: int = 20) -> tuple[Any, Training]:
    """SAELens' trainer and ours, from the same weights."""
    config, theirs, ours = CASES[case]
    torch.manual_seed(0)
    cfg = config(d_in=D, d_sae=LATENTS, **theirs)
    sae = get_sae_training_class(cfg.architecture())[0](cfg)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=STEPS * ROWS, train_batch_size_samples=ROWS, lr=4e-3, lr_end=4e-4,
            lr_warm_up_steps=warm_up, lr_decay_steps=decay, dead_feature_window=dead_after,
        ),
        sae, iter(()),
    )  # fmt: skip
    spec = Spec(latents=LATENTS, lr=4e-3, warm_up=warm_up, decay=decay, dead_after=dead_after, **ours)
    training = Training(spec, Place(HOOK), D, D, steps=STEPS)
    with torch.no_grad():
        training.weights.enc.copy_(sae.W_enc.T)
        training.weights.dec.copy_(sae.W_dec)
    return trainer, training


def their_step(trainer: Any, x: Tensor) -> dict[str, float]:
    out = trainer.step(x)
    trainer.n_training_steps += 1
    return {name: float(value.detach()) for name, value in out.losses.items()}


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_saelens_step_by_step(case: str) -> None:
    """With dead latents, of which there are some after eight steps, and with the learning rate rising and falling."""
    trainer, training = pair(case)
    most = {"aux": 0.0}
    for x in rows():
        expected = their_step(trainer, x)
        found = training.step({HOOK: x})
        assert len(expected) == len(found.losses)
        for name, value in found.losses.items():
            theirs = expected[LOSSES.get(name, name.replace("error_", "inner_mse_loss_"))]
            assert float(value) == pytest.approx(theirs, rel=2e-4, abs=1e-6), (training.done, name)
            most[name] = max(most.get(name, 0.0), theirs)
    if training.spec.largest:
        assert most["aux"] > 0
    assert torch.allclose(training.weights.dec, trainer.sae.W_dec, atol=2e-4)
    assert torch.equal(training.dead, trainer.dead_neurons)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scaled", [False, True])
def test_saelens_opens_our_files_and_finds_the_same(case: str, scaled: bool, tmp_path: Path) -> None:
    data = rows()
    _, training = pair(case)
    if scaled:
        training.units = (Units.of(data[0], own=False),) * 2
    for x in data:
        training.step({HOOK: x})
    ours = training.sae({HOOK: torch.cat(data[-5:])}, model_name="toy")
    ours.save(tmp_path / "sae")
    theirs = LensSAE.load_from_disk(tmp_path / "sae")
    assert theirs.cfg.metadata.hook_name == HOOK
    again = SAE.load(tmp_path / "sae")
    x = data[-1]
    latents = ours.encode(x)
    assert torch.equal(latents, again.encode(x)) and again.about == ours.about | again.about
    assert torch.allclose(theirs.encode(x), latents, atol=1e-5)
    assert torch.allclose(theirs.decode(theirs.encode(x)), ours.decode(latents), atol=1e-5)
    if training.spec.largest:  # as sparse as asked, and it has learned something
        assert (latents != 0).sum(-1).float().mean() == pytest.approx(training.spec.k, rel=0.25)
        fvu = (ours.decode(latents) - x).square().sum() / (x - x.mean(0)).square().sum()
        assert fvu < 0.7


@pytest.mark.parametrize("case", [name for name in CASES if "not subtracted" not in name])
def test_we_open_saelens_files_and_find_the_same(case: str, tmp_path: Path) -> None:
    trainer, _ = pair(case)
    data = rows()
    for x in data:
        their_step(trainer, x)
    trainer.sae.save_inference_model(tmp_path)
    theirs, ours = LensSAE.load_from_disk(tmp_path), SAE.load(tmp_path)
    for x in data[:3]:
        assert torch.allclose(theirs.encode(x), ours.encode(x), atol=1e-5)
        assert torch.allclose(theirs(x), ours.decode(ours.encode(x)), atol=1e-5)


def test_norms_that_saelens_left_in_the_weights_are_folded(tmp_path: Path) -> None:
    """The checkpoint of a TopK training has them still: other units of the latents, the same output."""
    trainer, _ = pair("topk")
    for x in (data := rows()):
        their_step(trainer, x)
    trainer.sae.save_model(tmp_path)
    ours = SAE.load(tmp_path)
    theirs = trainer.sae.encode(data[0])
    assert torch.allclose(ours.encode(data[0]), theirs, atol=1e-5)
    assert torch.allclose(ours.decode(ours.encode(data[0])), trainer.sae(data[0]), atol=1e-5)
    assert torch.allclose(ours.norms, torch.ones(LATENTS))


# ---- without SAELens ----


def stream_of(data: list[Tensor], start: int = 0, hooks: tuple[str, ...] = (HOOK,)) -> Stream:
    """Rows as the store hands them out."""
    x = torch.cat(data)
    held = {hook: x * (i + 1) for i, hook in enumerate(hooks)}

    def load(members: Any) -> dict[str, Tensor]:
        return {hook: torch.cat([y[i * ROWS : (i + 1) * ROWS] for i in members]) for hook, y in held.items()}

    return Stream(load, [ROWS] * len(data), hooks, rows=ROWS, window=ROWS * 4, start=start)


def training(architecture: Any = "topk", steps: int = STEPS, out: str | None = None, **options: Any) -> Training:
    widths = (12, 40) if architecture == "matryoshka" else ()
    given = {"k": 5, "lr": 4e-3, "dead_after": 8, "widths": widths, **options}
    spec = Spec(architecture, latents=LATENTS, **given)
    return Training(spec, Place(HOOK, out), D, D, steps=steps)


class Killed(Exception):
    pass


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka", "jumprelu", "standard"])
def test_a_killed_training_goes_on_bit_for_bit(architecture: Any, tmp_path: Path) -> None:
    """Two at once, of other sizes, killed after steps that differ."""

    def progress(folder: Path | None) -> Progress:
        pair = {"one": training(architecture), "two": training("topk")}
        return Progress(pair, folder, {"text": "toy"})

    data = rows()
    whole = progress(None)
    whole.run(stream_of(data))
    for end in (7, 31, STEPS):
        part = progress(tmp_path)
        stream = stream_of(data, part.done)
        ticks = iter(range(10_000))
        if end < STEPS:
            with pytest.raises(Killed):
                part.run(_dies(stream, end - part.done), every=0.0, clock=lambda ticks=ticks: float(next(ticks)))
        else:
            part.run(stream, every=0.0)
    assert part.curves == whole.curves and part.done == STEPS
    for name, one in whole.trainings.items():
        state = part.trainings[name].state()
        assert state.keys() == one.state().keys()
        assert all(torch.equal(x, state[key]) for key, x in one.state().items())
    with pytest.raises(UserError, match="is of another training"):
        Progress({"one": training(architecture, lr=1e-3)}, tmp_path, {"text": "toy"})
    (tmp_path / "checkpoint.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="delete it to begin anew"):
        progress(tmp_path)


def _dies(stream: Stream, after: int) -> Any:
    def some() -> Iterator[dict[str, Tensor]]:
        for _ in range(after):
            yield next(stream)
        raise Killed

    return some()


def test_a_transcoder_writes_what_another_hook_point_has(tmp_path: Path) -> None:
    """The output is twice the input, and it finds that; its file is SAELens' where that has a class."""
    out = "blocks.3.hook_mlp_out"
    data = [x + 3.0 for x in rows(300)]  # around somewhere else
    for kind, architecture in (
        ("topk", "topk_transcoder"),
        ("standard", "transcoder"),
        ("jumprelu", "jumprelu_transcoder"),
    ):
        one = training(kind, 300, out, subtract=False, l1=0.02, l0=0.01, k=10, threshold=0.01)
        one.units = Units.of(data[0]), Units.of(2 * data[0])
        stream = stream_of(data, hooks=(HOOK, out))
        for batch in stream:
            one.step(batch)
        sae = one.sae({HOOK: data[-1]})
        assert sae.architecture == architecture and sae.about["hook_name_out"] == out
        recon = sae.decode(sae.encode(data[-1]))
        error = (recon - 2 * data[-1]).square().sum() / (2 * (data[-1] - data[-1].mean(0))).square().sum()
        assert error < 0.4, kind
        sae.save(tmp_path / kind)
        assert torch.equal(SAE.load(tmp_path / kind).decode(sae.encode(data[-1])), recon)
        if kind != "topk":
            theirs = LensSAE.load_from_disk(tmp_path / kind)
            assert torch.allclose(theirs(data[-1]), recon, atol=1e-5)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka"])
def test_selection_in_half_precision_changes_only_who_is_chosen(architecture: Any) -> None:
    """Values stay exact: where the same latents are chosen, the losses are the same bits' worth."""
    exact, half = (training(architecture, selection=precision) for precision in ("float32", "bfloat16"))
    for x in rows(40):
        one, two = (t.step({HOOK: x}) for t in (exact, half))
        assert float(two.loss) == pytest.approx(float(one.loss), rel=0.1)
    assert float(one.loss) != float(two.loss)
    x = rows(1)[0]
    active = Active.fixed(torch.arange(LATENTS).expand(len(x), -1), LATENTS)
    dots = active.dots(x, exact.weights.enc)
    assert torch.allclose(dots.view(len(x), -1), x @ exact.weights.enc.T, atol=1e-4)


def test_dead_latents_come_back() -> None:
    """With the error of dead latents in the loss more of them live than without it, of as many that were dead."""
    left = {}
    for aux in (0.0, 1.0):
        one = training(aux=aux, steps=200)
        with torch.no_grad():
            one.weights.bias[::2] = -0.4  # half of them begin dead
        for x in rows(200):
            one.step({HOOK: x})
        left[aux] = int(one.dead[::2].sum())
    assert left[0.0] > LATENTS // 3 and left[1.0] < 0.7 * left[0.0]


def test_units_are_folded_into_the_weights() -> None:
    """Training on activations a hundred times as large, somewhere else, gives the same latents in a hundred times the
    units."""
    data = rows()
    saes = []
    for factor in (1.0, 100.0):
        one = training("topk")
        one.units = (Units.of(data[0] * factor + 5.0),) * 2
        for x in data:
            one.step({HOOK: x * factor + 5.0})
        saes.append(one.sae({HOOK: data[0] * factor + 5.0}))
    small, large = saes
    latents = small.encode(data[0] + 5.0)
    assert torch.allclose(large.encode(data[0] * 100 + 5.0) / 100, latents, atol=1e-4)
    recon = small.decode(latents)
    assert torch.allclose((large.decode(latents * 100) - 5.0) / 100, recon - 5.0, atol=1e-4)
    for own in (False, True):
        found = Units.of(data[0] + 5.0, own=own)(data[0] + 5.0)
        assert float(found.norm(dim=-1).mean()) == pytest.approx(D**0.5, rel=1e-5)


@pytest.mark.parametrize("out", ["", "blocks.3.hook_mlp_out"])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "standard", "jumprelu"])
def test_the_sae_is_what_was_trained_where_coordinates_differ_in_size(architecture: Any, out: str) -> None:
    """The same latents chosen and the same reconstruction as in the units of training, worked out there by hand."""
    uneven = torch.logspace(-1, 1, D)
    data = [x * uneven + 3 for x in rows()]
    one = training(architecture, STEPS, out or None, subtract=not out, l1=0.01, l0=0.01, threshold=0.1)
    units, written = Units.of(data[0]), Units.of(data[0].flip(-1) * 30)
    one.units = (units, written if out else units)
    for x in data:
        one.step({HOOK: x, out: x.flip(-1) * 30})
    scaled = units(data[0])
    assert float(scaled.std(0).max() / scaled.std(0).min()) == pytest.approx(10, rel=0.2)  # the root of 100
    sae, w = one.sae({HOOK: data[0]}), one.weights
    pre = ((scaled if out else scaled - w.b_dec) @ w.enc.T + w.bias) * w.norms
    chosen = pre.relu() if w.threshold is None else pre * (pre > w.threshold * w.norms)
    if architecture in ("topk", "batchtopk"):
        n = one.spec.k if architecture == "topk" else one.spec.k * len(scaled)
        flat = chosen if architecture == "topk" else chosen.flatten()[None]
        chosen = torch.zeros_like(flat).scatter(-1, (top := flat.topk(int(n))).indices, top.values).view_as(chosen)
    latents = sae.encode(data[0])
    assert float(((latents > 0) == (chosen > 0)).float().mean()) > 0.9999
    expected = one.units[1].back((chosen / w.norms) @ w.dec + w.b_dec)
    assert torch.allclose(sae.decode(latents), expected, atol=1e-3 * float(expected.abs().max()))
    assert float(sae.norms.mean()) == pytest.approx(1, rel=1e-5)


def test_the_geometric_median_is_where_the_distances_are_least_and_outliers_do_not_move_it() -> None:
    x = rows(1)[0]
    centre = geometric_median(x)

    def distance(point: Tensor) -> float:
        return float((x - point).norm(dim=-1).mean())

    for seed in range(20):
        away = 0.05 * torch.randn(D, generator=torch.Generator().manual_seed(seed))
        assert distance(centre) < distance(centre + away)
    assert distance(centre) <= distance(x.mean(0))
    spoiled = x.clone()
    spoiled[0] = 1e5
    assert float((geometric_median(spoiled) - centre).norm()) < 0.1 * float((spoiled.mean(0) - centre).norm())


def test_latents_live_though_all_activations_have_much_in_common() -> None:
    """Rows that lie far from 0: without a centre most latents die."""
    far = 40 * torch.nn.functional.normalize(torch.randn(D, generator=torch.Generator().manual_seed(3)), dim=-1)
    left = {}
    for own in (False, True):
        one = training(steps=150, aux=0.0, dead_after=50)
        one.units = (Units.of(rows(1)[0] + far, own=own),) * 2
        for x in rows(150):
            one.step({HOOK: x + far})
        left[own] = int(one.dead.sum())
    assert left[True] < LATENTS // 3 and left[False] > 0.9 * LATENTS


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": 0}, "k=0 of 96 latents"),
        ({"k": 97}, "give 1 to 96"),
        ({"k": 2.5}, "use batchtopk"),
        ({"widths": (4,)}, "inside a matryoshka"),
        ({"architecture": "matryoshka"}, "inside a matryoshka"),
        ({"architecture": "matryoshka", "widths": (40, 12)}, "rising"),
        ({"architecture": "standard", "selection": "bfloat16"}, "standard has none"),
    ],
)
def test_impossible_specifications_are_sentences(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Spec(**{"latents": LATENTS, "k": 5, **given})


def test_impossible_trainings_are_sentences() -> None:
    with pytest.raises(UserError, match="rises for 50 and falls for 20 steps, and there are 60"):
        training(warm_up=50, decay=20)
    with pytest.raises(UserError, match="subtract=False"):
        training(out="blocks.3.hook_mlp_out")
