"""Laws of attention entropy: known distributions, the row that reaches the bound, and models made to attend so."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scipy.stats import entropy as entropy_of
from torch import Tensor

from papers import attention_entropy as module
from papers.attention_entropy import attention_entropy, centre, entropy, least_entropy, quarters
from tests.conftest import CONFIGS
from workbench import plots, registry
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.prompts import Batch, sample
from workbench.sites import block


def draw(model: LanguageModel, n: int = 4) -> Batch:
    return sample(registry.get_task("ioi"), model, n, seed=0)


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_entropies_by_hand() -> None:
    rows = torch.tensor([[1.0, 0, 0, 0], [0.25] * 4, [0.5, 0.25, 0.25, 0], [0.5, 0.5, 0, 0]])
    expected = torch.tensor([0.0, math.log(4), 1.5 * math.log(2), math.log(2)])
    torch.testing.assert_close(entropy(rows), expected)
    torch.testing.assert_close(entropy(rows[:, [2, 0, 3, 1]]), expected)


def test_centred_rows_have_no_mean_and_nothing_where_nothing_is_seen() -> None:
    rows = torch.tensor([[5.0, -math.inf, -math.inf], [1.0, 3.0, -math.inf], [1.0, 2.0, 6.0]])
    assert centre(rows).tolist() == [[0, 0, 0], [-1, 1, 0], [-2, -1, 3]]
    torch.testing.assert_close(centre(rows + 7), centre(rows))


def test_the_bound_is_the_theorem_as_it_is_printed() -> None:
    for t in (2, 3, 17, 500):
        for sigma in (0.0, 0.3, 2.0, 9.0):
            beta = math.exp(-sigma * math.sqrt(t / (t - 1)))
            printed = math.log(1 + (t - 1) * beta) + sigma * math.sqrt(t * (t - 1)) * beta / (1 + (t - 1) * beta)
            assert float(least_entropy(double([sigma]), torch.tensor([t]))) == pytest.approx(printed, rel=1e-12)
    assert float(least_entropy(double([0.0]), torch.tensor([5]))) == pytest.approx(math.log(5))  # all alike
    falling = least_entropy(torch.linspace(0, 40, 400, dtype=torch.float64), torch.tensor(12))
    assert bool((falling.diff() < 0).all())


def test_one_high_logit_reaches_the_bound() -> None:
    for t in (2, 3, 8, 40):
        for high in (0.0, 0.5, 3.0, 12.0):
            row = double([high, *[0.0] * (t - 1)])
            sigma = centre(row).norm()
            assert float(entropy(row.softmax(-1))) == pytest.approx(
                float(least_entropy(sigma, torch.tensor(t))), abs=1e-12
            )


@pytest.mark.parametrize("t", [2, 3, 9])
@pytest.mark.parametrize("sigma", [0.3, 2.5, 6.0])
def test_no_logits_of_that_norm_have_less_entropy(t: int, sigma: float) -> None:
    """Neither random ones nor those that steepest descent on the sphere ends at; and the best of these reach it."""
    generator = torch.Generator().manual_seed(0)
    bound = float(least_entropy(double([sigma]), torch.tensor([t])))
    u = centre(torch.randn(400, t, generator=generator, dtype=torch.float64))
    u = sigma * u / u.norm(dim=-1, keepdim=True)
    assert float(entropy(u.softmax(-1)).min()) >= bound - 1e-12
    for _ in range(400):
        u = u.detach().requires_grad_()
        entropy(u.softmax(-1)).sum().backward()
        assert u.grad is not None
        step = centre(u.grad)
        u = centre(u.detach() - 0.3 * sigma * step / step.norm(dim=-1, keepdim=True).clamp_min(1e-9))
        u = sigma * u / u.norm(dim=-1, keepdim=True)
    found = entropy(u.softmax(-1))
    assert bound - 1e-12 <= float(found.min()) <= bound + 0.01


def test_quarters_are_of_the_largest_head() -> None:
    grid = torch.tensor([[0.0, 0.4, 0.499], [0.5, 1.2, 2.0], [1.0, 1.5, 1.9]])
    torch.testing.assert_close(quarters(grid), torch.tensor([3, 1, 2, 3]) / 9)
    assert quarters(torch.ones(2, 2)).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_entropies_are_those_of_the_models_patterns(
    kind: str, make_tiny: Callable[..., LanguageModel], store: ActivationStore
) -> None:
    """Row by row with scipy, the sink's share as one more outcome; the bounds in their order, and none is broken."""
    model = make_tiny(kind)
    batch = draw(model, 2)
    found = attention_entropy(model, batch, store, low=0.85, high=0.95)
    sink = kind == "weight_sparse"
    hooks = [block(layer, "attn.hook_pattern") for layer in range(3)]
    runs = [model.run(tokens[None], capture=hooks) for tokens in batch.clean]
    for layer in range(3):
        for head in range(4):
            nats, shares = [], []
            for run in runs:
                for query, row in enumerate(run[hooks[layer]][0, head]):
                    seen = row[: query + 1][row[: query + 1] > 0].double()
                    whole = [*seen.tolist(), 1 - float(seen.sum())] if sink else seen.tolist()
                    if len(whole) > 1:
                        nats.append(float(entropy_of(whole)))
                        shares.append(nats[-1] / math.log(len(whole)))
            for grid, values in ((found.entropy, nats), (found.normalised, shares)):
                assert float(grid[layer, head]) == pytest.approx(sum(values) / len(values), abs=1e-5)
            for grid, hits in ((found.picking, [x < 0.85 for x in shares]), (found.flat, [x > 0.95 for x in shares])):
                assert float(grid[layer, head]) == pytest.approx(sum(hits) / len(hits))
    assert found.violations == 0 and found.checks == 2 * 12 * sum(len(t) - (not sink) for t in batch.clean)
    assert bool((found.spectral <= found.least + 1e-6).all()) and bool((found.least <= found.entropy + 1e-6).all())
    assert float(found.least.min()) > 0


def test_the_spectral_norm_is_that_of_the_heads_logits(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny, 2)
    found = attention_entropy(tiny, batch, store)
    for layer in range(3):
        expected = torch.zeros(4)
        for tokens in batch.clean:
            q, k = (block(layer, f"attn.hook_rot_{name}") for name in "qk")
            run = tiny.run(tokens[None], capture=[q, k])
            n = len(tokens)
            for head in range(4):
                logits = run[q][0, :, head] @ run[k][0, :, head // 2].T / tiny.config.d_head**0.5
                rows = [torch.cat([row[: i + 1] - row[: i + 1].mean(), row.new_zeros(n - i - 1)]) for i, row in
                        enumerate(logits)]  # fmt: skip
                expected[head] += torch.linalg.svdvals(torch.stack(rows))[0] / 2
        torch.testing.assert_close(found.sigma[layer], expected, rtol=1e-4, atol=1e-5)


def test_heads_that_are_made_to_pick_one_key_or_none_are_named(
    make_tiny: Callable[..., LanguageModel], store: ActivationStore
) -> None:
    """Queries of 0 attend to all alike; very long ones to the best key alone."""
    model = make_tiny("llama", seed=5)
    layers = model._module.model.layers
    layers[0].self_attn.q_proj.weight.data[8:16] = 0  # head 1
    layers[1].self_attn.q_proj.weight.data[24:] *= 1e5  # head 3
    found = attention_entropy(model, draw(model), store)
    assert float(found.normalised[0, 1]) == pytest.approx(1) and float(found.flat[0, 1]) == 1
    assert float(found.normalised[1, 3]) < 0.01 and float(found.picking[1, 3]) > 0.98
    assert "a0.h1" in found.uniform() and found.collapsed() == ["a1.h3"]
    assert float(found.entropy[0, 1]) == float(found.entropy.max())
    assert found.summary()["collapsed_heads"] == 1 and found.violations == 0
    assert float(found.spectral[1, 3]) == pytest.approx(0, abs=1e-6)  # so large a norm allows anything
    assert float(found.sigma[0, 1]) < 1e-6 and float(found.least[0, 1]) == pytest.approx(float(found.entropy[0, 1]))


def test_broken_bounds_are_counted(
    tiny: LanguageModel, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def most(sigma: Tensor, n: Tensor) -> Tensor:
        return n.double().log() + 0.01

    monkeypatch.setattr(module, "least_entropy", most)
    found = attention_entropy(tiny, draw(tiny), store)
    assert found.violations == found.checks > 0


def test_what_makes_no_sense_is_refused(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny, 2)
    for given in ({"low": 0.9, "high": 0.1}, {"high": 1.5}, {"most": 0.0}, {"low": -0.1}):
        with pytest.raises(UserError, match="low below high"):
            attention_entropy(tiny, batch, store, **given)
    with pytest.raises(UserError, match="one token"):
        attention_entropy(tiny, replace(batch, clean=tuple(tokens[:1] for tokens in batch.clean)), store)


def test_the_figure_has_layers_across_and_every_head_above_the_line(
    tiny: LanguageModel, store: ActivationStore
) -> None:
    found = attention_entropy(tiny, draw(tiny), store)
    grid, dots, bars = plots.figure(found).data
    assert torch.equal(torch.tensor(grid.z).T, found.normalised) and sum(bars.y) == pytest.approx(1)
    assert all(y >= x for x, y in zip(dots.x, dots.y, strict=True))
    place = list(dots.text).index("a2.h1")
    assert dots.y[place] == pytest.approx(float(found.entropy[2, 1]))


@pytest.mark.slow
def test_no_bound_is_broken_in_a_real_model(smollm: LanguageModel, store: ActivationStore) -> None:
    found = attention_entropy(smollm, draw(smollm, 16), store)
    assert found.checks >= 100_000 and found.violations == 0
    assert {"a18.h7", "a18.h8"} <= set(found.collapsed()) and found.uniform() == []
