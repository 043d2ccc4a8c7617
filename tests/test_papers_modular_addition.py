"""Modular addition against networks whose waves were put there by hand, and transforms written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from papers import modular_addition as modular
from papers.modular_addition import ModularAddition, Network, modular_addition
from workbench import plots
from workbench.errors import UserError

SMALL: dict[str, Any] = {"modulus": 37, "share": 0.5, "embedding": 16, "neurons": 64, "steps": 1000, "controls": 5}


@pytest.fixture(scope="module")
def trained() -> ModularAddition:
    return modular_addition(0, **SMALL)


@pytest.fixture(scope="module")
def by_heart() -> ModularAddition:
    """The same without weight decay."""
    return modular_addition(0, **SMALL | {"decay": 0.0, "steps": 500})


def wave(p: int, k: Tensor, phase: Tensor) -> Tensor:
    """[modulus, neuron] cosines, in double precision."""
    return torch.cos(2 * math.pi * torch.arange(p, dtype=torch.float64)[:, None] * k / p + phase)


def gromov(p: int, k: Tensor, a: Tensor, b: Tensor) -> Network:
    """Gromov 2023: waves of one frequency whose phases add up."""
    return Network(wave(p, k, a), wave(p, k, b), wave(p, k, a + b))


def grid(p: int, frequencies: list[int]) -> Network:
    """For each frequency all 16 pairs of four phases: whatever depends on one of them alone cancels."""
    quarter = torch.arange(4, dtype=torch.float64) * math.pi / 2
    k, a, b = torch.cartesian_prod(torch.tensor(frequencies, dtype=torch.float64), quarter, quarter).T
    return gromov(p, k, a, b)


def correct(network: Network) -> float:
    """Share of all pairs, one at a time."""
    p = len(network.a)
    found = 0
    for a in range(p):
        for b in range(p):
            hidden = (network.a[a] + network.b[b]) ** 2
            found += int((network.out @ hidden).argmax()) == (a + b) % p
    return found / p**2


def noise(p: int, neurons: int, seed: int = 0) -> Network:
    parts = torch.randn(3, p, neurons, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Network(*parts)


# ---- the transform ----


def test_waves_put_there_by_hand_are_read_exactly() -> None:
    """Gromov's solution with random frequencies, phases and sizes: all read back, and it adds without a mistake."""
    p, generator = 23, torch.Generator().manual_seed(0)
    k = torch.randint(1, p // 2 + 1, (600,), generator=generator)
    a, b = (torch.rand(2, 600, dtype=torch.float64, generator=generator) * 2 - 1) * math.pi
    network = gromov(p, k, a, b)
    found = modular.read(network)
    assert torch.equal(found.frequency, k)
    for read, put in zip(found.phases, (a, b, a + b), strict=True):
        assert torch.allclose(torch.polar(torch.ones_like(put), read), torch.polar(torch.ones_like(put), put))
    assert float(found.phase_error.max()) < 1e-9
    assert torch.allclose(found.concentration, torch.ones(2, 600, dtype=torch.float64))
    assert found.key == {int(f): int((k == f).sum()) for f in k.unique()}
    assert correct(network) == 1


def test_a_phase_that_is_off_is_read_as_that_much() -> None:
    """Across the cut at pi as well."""
    p, k = 23, torch.full((4,), 3)
    a = torch.tensor([0.1, 3.0, -3.0, 1.0], dtype=torch.float64)
    b = torch.tensor([0.2, 0.1, -0.1, 2.0], dtype=torch.float64)
    off = torch.tensor([0.0, 0.5, -0.4, math.pi], dtype=torch.float64)
    found = modular.read(Network(wave(p, k, a), wave(p, k, b), wave(p, k, a + b + off)))
    assert torch.allclose(found.phase_error, off.abs())


def test_the_transform_is_least_squares_on_cosines_and_sines() -> None:
    p = 13
    weights = torch.randn(p, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angle = 2 * math.pi * torch.arange(p, dtype=torch.float64)[:, None] * torch.arange(p // 2 + 1) / p
    basis = torch.cat([angle.cos(), angle.sin()[:, 1:]], 1)  # [p, p]
    solved = torch.linalg.solve(basis, weights)
    cos, sin = solved[: p // 2 + 1], torch.cat([torch.zeros(1, 5, dtype=torch.float64), solved[p // 2 + 1 :]])
    found = modular.waves(weights)
    assert torch.allclose(found.real, cos) and torch.allclose(found.imag, -sin)
    each = torch.stack([(angle[:, k : k + 1].cos() * cos[k] + angle[:, k : k + 1].sin() * sin[k]) for k in range(7)])
    assert torch.allclose(modular.power(weights), each.square().sum(1))
    assert torch.allclose(modular.power(weights).sum(0), weights.square().sum(0))  # Parseval


def test_shares_are_of_the_whole_and_constants_of_the_output_are_nothing() -> None:
    network = noise(19, 7)
    found = modular.read(network)
    assert torch.allclose(found.spectrum.sum(1), torch.ones(2, dtype=torch.float64))
    shifted = modular.read(Network(network.a, network.b, network.out + 5))
    assert torch.allclose(found.concentration, shifted.concentration) and float(shifted.spectrum[1, 0]) < 1e-20
    shares = modular.power(network.a)[1:] + modular.power(network.b)[1:]
    norm = network.a.square().sum(0) + network.b.square().sum(0)
    assert torch.allclose(found.concentration[0], shares.max(0).values / norm)


def test_neurons_that_write_nothing_are_not_counted() -> None:
    network = gromov(23, torch.tensor([2, 5, 7]), *torch.zeros(2, 3, dtype=torch.float64))
    size = torch.tensor([1.0, 0.011, 0.009], dtype=torch.float64)
    found = modular.read(Network(network.a, network.b, network.out * size))
    assert found.key == {2: 1, 5: 1} and len(found.phase_error) == 2
    assert float(found.spectrum[:, 7].max()) < 1e-20


# ---- logits ----


def test_what_the_neurons_leave_over_cancels() -> None:
    """By hand: 16 neurons of a frequency give 8 cos(k (a + b - c)), and all frequencies 4 (p - 1) or -4."""
    p = 11
    found = modular.logits(grid(p, [1, 2, 3, 4, 5]))
    n = torch.arange(p)
    right = (n[:, None, None] + n[:, None] - n) % p == 0
    assert torch.allclose(found, torch.where(right, 4.0 * (p - 1), -4.0).double())
    assert torch.allclose(modular.explained(found), torch.full((5,), 0.2, dtype=torch.float64))


def test_logits_are_those_of_one_pair_at_a_time() -> None:
    network = noise(7, 3)
    for a, b in ((0, 0), (2, 6), (6, 2)):
        one = sum((network.a[a, j] + network.b[b, j]) ** 2 * network.out[:, j] for j in range(3))
        assert torch.allclose(modular.logits(network)[a, b], torch.as_tensor(one))


def test_what_is_explained_is_the_r2_of_a_regression() -> None:
    """Written out over all p^3 logits; a function of a and b alone changes nothing."""
    p, generator = 7, torch.Generator().manual_seed(1)
    logits = torch.randn(p, p, p, dtype=torch.float64, generator=generator)
    a, b, c = torch.cartesian_prod(*[torch.arange(p, dtype=torch.float64)] * 3).T
    y = (logits - logits.mean(-1, keepdim=True)).flatten()
    for k, share in enumerate(modular.explained(logits), 1):
        x = torch.cos(2 * math.pi * k * (a + b - c) / p)
        assert float(share) == pytest.approx(float((x @ y) ** 2 / (x @ x) / (y @ y)))
    moved = logits + torch.randn(p, p, 1, dtype=torch.float64, generator=generator)
    assert torch.allclose(modular.explained(moved), modular.explained(logits))


def test_a_pizza_is_explained_to_eight_over_pi_squared() -> None:
    """Zhong et al. 2023: |cos(pi k (a - b) / p)| times the wave; mean |cos| is 2 / pi, mean cos^2 a half."""
    p, k = 101, 3
    n = torch.arange(p, dtype=torch.float64)
    weaker = torch.cos(math.pi * k * (n[:, None] - n) / p).abs()
    logits = weaker[..., None] * torch.cos(2 * math.pi * k * (n[:, None, None] + n[:, None] - n) / p)
    found = modular.explained(logits)
    assert float(found[k - 1]) == pytest.approx(8 / math.pi**2, abs=1e-3)
    assert float(found.sum()) == pytest.approx(float(found[k - 1]))


# ---- what is taken out ----


def test_what_is_kept_and_what_is_taken_out_add_up() -> None:
    network = noise(19, 6)
    kept = torch.rand(10, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    inside, outside = modular.projected(network, kept), modular.projected(network, ~kept)
    for name in ("a", "b", "out"):
        assert torch.allclose(getattr(inside, name) + getattr(outside, name), getattr(network, name))
        assert torch.equal(modular.power(getattr(inside, name)) > 1e-20, kept)
    own = modular.read(network).frequency
    alone = modular.read(modular.projected(network, torch.arange(10)[:, None] == own))
    assert torch.equal(alone.frequency, own) and torch.allclose(alone.concentration, torch.ones(2, 6).double())


def test_ablations_of_a_network_whose_frequencies_are_known() -> None:
    """Three frequencies with noise in the others: they are the answer, as many others are not."""
    p = 23
    clean, rest = grid(p, [2, 5, 7]), noise(p, 48)
    network = Network(*(getattr(clean, name) + 0.1 * getattr(rest, name) for name in ("a", "b", "out")))
    found = modular.read(network)
    assert list(found.key) == [2, 5, 7]
    accuracy = modular.ablated(network, found, torch.arange(p**2), torch.Generator().manual_seed(0), 10)
    assert accuracy["whole"] == correct(network) == 1
    assert accuracy["key"] == accuracy["own"] == accuracy["without_other"] == 1
    assert accuracy["without_key"] < 0.15 and accuracy["other"] < 0.15


def test_without_enough_other_frequencies_there_is_no_control() -> None:
    network = grid(11, [1, 2, 3])
    accuracy = modular.ablated(network, modular.read(network), torch.arange(121), torch.Generator().manual_seed(0), 3)
    assert set(accuracy) == {"whole", "own", "key", "without_key"} and accuracy["key"] == 1


def test_only_held_out_pairs_are_judged() -> None:
    """A network that says 0 is right where a + b is 0: pairs are numbered a p + b."""
    p = 7
    zero = torch.zeros(p, 2, dtype=torch.float64)
    constant = Network(zero + 1, zero, torch.nn.functional.one_hot(torch.zeros(2, dtype=torch.long), p).T.double())
    pairs = torch.tensor([0, 1 * p + 6, 2 * p + 4, 6 * p + 2])
    found = modular.ablated(constant, modular.read(constant), pairs, torch.Generator(), 1)
    assert found["whole"] == 0.5


# ---- what is learned ----


def test_a_trained_network_generalises_late_and_adds_by_waves(trained: ModularAddition) -> None:
    found = trained.summary()
    assert found["held_out_accuracy"] >= 0.99
    assert found["memorised_at"] * 3 < found["generalised_at"]  # grokking
    assert len(found["key_frequencies"]) <= 6
    assert found["concentration"] > 0.9 and found["phase_error"] < 0.15 and found["logits_explained"] > 0.95
    assert found["concentration_out"] > 0.8  # at the frequency of the inputs
    done = found["accuracy_with_waves"]
    assert done["key"] > 0.98 and done["own"] > 0.98 and done["without_other"] > 0.98
    assert done["without_key"] < 0.1 and done["other"] < 0.1
    assert len(plots.figure(trained).data) > 10


def test_an_untrained_network_is_noise(trained: ModularAddition) -> None:
    """Phases as by chance, pi / 2 off on average; frequencies little more than the largest of noise."""
    found = trained.untrained
    errors = found.phase_error.double()
    assert float(errors.mean()) == pytest.approx(math.pi / 2, abs=3 * math.pi / math.sqrt(12 * len(errors)))
    by_chance = modular.read(noise(37, 4000)).concentration.mean(1)
    assert float(found.concentration[0].mean()) < 1.5 * float(by_chance[0])
    assert float(found.concentration[1].mean()) < 2 * float(by_chance[1])
    assert trained.explained_by_key(1) < 0.01


def test_without_decay_pairs_are_known_by_heart(by_heart: ModularAddition) -> None:
    """And the curve is of the pairs it says: together they are all pairs."""
    found = by_heart.summary()
    assert found["memorised_at"] is not None and found["generalised_at"] is None
    assert found["held_out_accuracy"] < 0.1 and found["concentration"] < 0.5 and found["logits_explained"] < 0.2
    seen, n = round(0.5 * 37**2), 37**2
    parts = [float(by_heart.curve[name][-1]) for name in ("accuracy", "held_out_accuracy")]
    together = (parts[0] * seen + parts[1] * (n - seen)) / n
    assert together == pytest.approx(correct(by_heart.network), abs=1e-6)
    assert by_heart.accuracy["whole"] == pytest.approx(parts[1], abs=1e-6)
    assert by_heart.accuracy["own"] > 0.4  # the waves are there already


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_the_defaults_generalise_from_any_seed(seed: int) -> None:
    found = modular_addition(seed).summary()
    assert found["held_out_accuracy"] >= 0.99 and found["phase_error"] < 0.2 and found["concentration"] > 0.95
    assert found["accuracy_with_waves"]["key"] >= 0.99 and found["accuracy_with_waves"]["without_key"] < 0.05


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"modulus": 10}, "modulus=10 is not an odd number"),
        ({"modulus": 3}, "modulus=3"),
        ({"share": 1.0}, r"share=1\.0"),
        ({"share": 0.0}, r"share=0\.0"),
        ({"steps": 0}, "at least 1"),
        ({"rate": 0.0}, "above 0"),
        ({"rate": 1e30, "steps": 5, "neurons": 8}, r"rate=1e\+30 and decay=1\.0 left no network"),
    ],
)
def test_what_cannot_be_trained_is_a_sentence(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        modular_addition(0, **given)
