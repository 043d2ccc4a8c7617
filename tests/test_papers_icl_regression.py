"""In-context regression against values worked out by hand, sampling, and gradient descent done by autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from papers import icl_regression as icl
from papers.icl_regression import InContextRegression, Layer, Setting, icl_regression
from workbench import plots
from workbench.errors import UserError

SMALL: dict[str, Any] = {"dimensions": 4, "examples": 10, "steps": 1000, "batch": 256, "prompts": 4000}


@pytest.fixture(scope="module")
def trained() -> InContextRegression:
    return icl_regression(0, **SMALL)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=rng(seed))


def tilted(d: int = 3, n: int = 4, noise: float = 0.7) -> Setting:
    """A covariance with no axis along the coordinates."""
    root = normal(d, d, seed=5)
    return Setting(root @ root.T / d + 0.2 * torch.eye(d), n, noise)


def random_layer(d: int = 3, seed: int = 1) -> Layer:
    return Layer(0.4 * normal(d + 1, d, seed=seed), 0.7 * normal(d + 1, seed=seed + 1))


def sampled(setting: Setting, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts drawn in another way than the analysis draws them: prompt by prompt, by the covariance's eigenvectors."""
    values, vectors = torch.linalg.eigh(setting.covariance)
    d, generator = len(values), rng(seed)
    tokens = torch.zeros(n, setting.examples + 1, d + 1, dtype=torch.float64)
    w = torch.randn(n, d, dtype=torch.float64, generator=generator)
    for i in range(setting.examples + 1):
        x = (torch.randn(n, d, dtype=torch.float64, generator=generator) * values.sqrt()) @ vectors.T
        tokens[:, i, :d] = x
        if i < setting.examples:
            tokens[:, i, d] = (x * w).sum(1) + setting.noise * torch.randn(n, dtype=torch.float64, generator=generator)
    return tokens, (x * w).sum(1)


def flipped(tokens: Tensor) -> Tensor:
    """The same prompts with y negated, as if w were."""
    return torch.cat([tokens[..., :-1], -tokens[..., -1:]], -1)


def within(values: Tensor, expected: float, errors: float = 4) -> bool:
    return bool((values.mean() - expected).abs() < errors * values.std() / math.sqrt(len(values)))


# ---- the closed form ----


def test_one_dimension_and_one_example_by_hand() -> None:
    """(w x_q - u x_q x^2 w)^2 is on average 1 - 2 u + 3 u^2, as E x^4 = 3: least 2/3 at u = 1/3. Noise adds u^2."""
    one = torch.ones(1, 1, dtype=torch.float64)
    setting = Setting(one, 1, 0.0)
    assert float(icl.gamma(setting)) == pytest.approx(3)
    assert float(icl.closed_form(setting).step) == pytest.approx(1 / 3)
    for u in (0.0, 0.2, 1 / 3, 1.0):
        assert icl.population_loss(u * one, setting) == pytest.approx(1 - 2 * u + 3 * u**2)
        assert icl.population_loss(u * one, Setting(one, 1, 1.0)) == pytest.approx(1 - 2 * u + 4 * u**2)
    assert icl.population_loss(icl.closed_form(setting).step, setting) == pytest.approx(2 / 3)
    assert float(icl.closed_form(Setting(one, 1, 1.0)).step) == pytest.approx(1 / 4)


def test_the_published_eigenvalues() -> None:
    """Ahn et al. 2023, theorem 1: 1 / ((n + 1) / n lambda_i + sum of lambda / n), on the covariance's eigenvectors;
    and the loss at the minimum is tr L - tr(L^2 Gamma^-1)."""
    setting = tilted(4, 7, 0.0)
    values, vectors = torch.linalg.eigh(setting.covariance)
    published = 1 / (8 / 7 * values + values.sum() / 7)
    step = icl.closed_form(setting).step
    assert torch.allclose(vectors.T @ step @ vectors, published.diag(), atol=1e-12)
    least = float((values - values**2 * published).sum())
    assert icl.population_loss(step, setting) == pytest.approx(least)


def test_the_loss_is_what_sampling_gives() -> None:
    """Of any linear layer: the odd part by the formula, and the mean square of the even part beside it."""
    setting = tilted()
    tokens, right = sampled(setting, 200_000)
    layer = random_layer()
    answers, other = (icl.predict(layer, some, "linear") for some in (tokens, flipped(tokens)))
    odd, even = (answers - other) / 2, (answers + other) / 2
    expected = icl.population_loss(layer.step, setting)
    assert within((odd - right).square(), expected)
    assert not within((odd - right).square(), 1.05 * expected)
    assert within((answers - right).square() - even.square(), expected)
    assert float(even.square().mean()) > 0.1 * expected
    best = icl.closed_form(setting)
    errors = (icl.predict(best, tokens, "linear") - right).square()
    assert within(errors, icl.population_loss(best.step, setting))


def test_the_odd_part_is_the_step() -> None:
    """Exactly, of a layer with no zeros; and the factor that QK and OV share moves nothing."""
    tokens, _ = sampled(tilted(), 50)
    layer = random_layer()
    odd = (icl.predict(layer, tokens, "linear") - icl.predict(layer, flipped(tokens), "linear")) / 2
    assert torch.allclose(odd, icl.gradient_step(layer.step, tokens), atol=1e-12)
    scaled = Layer(layer.qk * -3, layer.ov / -3)
    assert torch.allclose(icl.predict(scaled, tokens, "linear"), icl.predict(layer, tokens, "linear"))
    assert torch.allclose(scaled.step, layer.step) and scaled.outside == pytest.approx(layer.outside)


def gradient(layer: Layer, setting: Setting, batches: int = 200) -> Tensor:
    """The largest entry of the mean gradient of all weights, in standard errors."""
    weights = Layer(layer.qk.clone().requires_grad_(), layer.ov.clone().requires_grad_())
    found = []
    for seed in range(batches):
        tokens, right = sampled(setting, 1000, seed)
        loss = (icl.predict(weights, tokens, "linear") - right).square().mean()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [weights.qk, weights.ov])]))
    each = torch.stack(found)
    return (each.mean(0) / each.std(0) * math.sqrt(batches)).abs().max()


def test_the_closed_form_is_stationary_in_all_weights() -> None:
    setting = tilted()
    best = icl.closed_form(setting)
    assert float(gradient(best, setting)) < 4
    other = Layer(torch.cat([torch.linalg.inv(setting.covariance), best.qk[-1:]]), best.ov)
    assert float(gradient(other, setting)) > 20


def test_the_closed_form_is_a_minimum_in_every_direction() -> None:
    """The loss is quadratic in the step: equal on both sides of its minimum, and larger."""
    setting = tilted()
    best = icl.closed_form(setting).step
    least = icl.population_loss(best, setting)
    for seed in range(20):
        change = normal(3, 3, seed=seed)
        sides = [icl.population_loss(best + sign * change, setting) for sign in (1, -1)]
        assert sides[0] == pytest.approx(sides[1]) and sides[0] > least + 1e-3


# ---- gradient descent, Bayes ----


def test_the_closed_form_is_one_step_of_gradient_descent() -> None:
    """By autograd, to machine precision."""
    setting = tilted()
    tokens, _ = sampled(setting, 20)
    best = icl.closed_form(setting)
    preconditioner = torch.linalg.inv(icl.gamma(setting))
    for prompt, answer, step in zip(
        tokens, icl.predict(best, tokens, "linear"), icl.gradient_step(best.step, tokens), strict=True
    ):
        w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        loss = 0.5 * (prompt[:-1, -1] - prompt[:-1, :-1] @ w).square().mean()
        after = w - preconditioner @ torch.autograd.grad(loss, w)[0]
        assert float(answer.detach()) == pytest.approx(float(after.detach() @ prompt[-1, :-1]), abs=1e-12)
        assert float(step) == pytest.approx(float(answer), abs=1e-12)


@pytest.mark.parametrize(("n", "noise"), [(2, 0.0), (6, 0.0), (2, 0.5), (6, 0.5)])
def test_bayes_is_ridge_regression_and_least_squares_of_least_norm(n: int, noise: float) -> None:
    """The posterior mean by the other formula, X^T (X X^T + s^2 I)^-1 y; and it is better than the layer."""
    setting = Setting(tilted().covariance, n, noise)
    tokens, right = sampled(setting, 2000)
    found = icl.bayes(tokens, noise)
    for prompt, answer in list(zip(tokens, found, strict=True))[:20]:
        x, y = prompt[:-1, :-1], prompt[:-1, -1]
        if noise:
            w = x.T @ torch.linalg.solve(x @ x.T + noise**2 * torch.eye(n), y)
        else:
            w = torch.linalg.lstsq(x, y[:, None], driver="gelsd").solution[:, 0]
        assert float(answer) == pytest.approx(float(w @ prompt[-1, :-1]), abs=1e-6)
    best = icl.predict(icl.closed_form(setting), tokens, "linear")
    assert (found - right).square().mean() < (best - right).square().mean()


def test_with_fewer_examples_than_dimensions_bayes_misses_the_rest() -> None:
    """Of d directions alike, n are known: the loss is d - n, and 0 from n = d on."""
    for n, expected in ((1, 4), (3, 2)):
        tokens, right = sampled(Setting(torch.eye(5, dtype=torch.float64), n, 0.0), 20_000)
        assert within((icl.bayes(tokens, 0.0) - right).square(), expected)
    tokens, right = sampled(Setting(torch.eye(5, dtype=torch.float64), 8, 0.0), 200)
    assert torch.allclose(icl.bayes(tokens, 0.0), right, atol=1e-6)


# ---- prompts and layers ----


def test_prompts_are_what_they_are_said_to_be() -> None:
    setting = tilted(3, 6, 0.0)
    tokens, right = icl.draw(setting, 20_000, rng())
    assert torch.equal(tokens[:, -1, -1], torch.zeros(20_000, dtype=torch.float64))
    products = tokens[:, :, :-1, None] * tokens[:, :, None, :-1]
    for i in range(3):
        for j in range(3):
            assert within(products[:, 2, i, j], float(setting.covariance[i, j]))
            assert within(products[:, -1, i, j], float(setting.covariance[i, j]))
    w = torch.linalg.lstsq(tokens[:50, :-1, :-1], tokens[:50, :-1, -1:]).solution[..., 0]
    assert torch.allclose((w * tokens[:50, -1, :-1]).sum(1), right[:50])
    assert within(right.square(), float(setting.covariance.trace()))
    noisy, _ = icl.draw(setting._replace(noise=0.7), 20_000, rng())
    assert within((noisy[:, 0, -1] - tokens[:, 0, -1]).square(), 0.49)


@pytest.mark.parametrize("attention", ["linear", "softmax"])
def test_answers_are_attention_written_out_and_know_no_order(attention: Any) -> None:
    tokens, _ = sampled(tilted(), 8)
    layer = random_layer()
    found = icl.predict(layer, tokens, attention)
    for prompt, answer in zip(tokens, found, strict=True):
        scores = [float(z @ layer.qk @ prompt[-1, :-1]) for z in prompt]
        total = sum(math.exp(s) for s in scores)
        weights = [math.exp(s) / total if attention == "softmax" else s / (len(prompt) - 1) for s in scores]
        written = sum(a * float(z @ layer.ov) for a, z in zip(weights, prompt, strict=True))
        assert float(answer) == pytest.approx(written)
    order = torch.cat([torch.tensor([2, 0, 3, 1]), torch.tensor([4])])
    assert torch.allclose(icl.predict(layer, tokens[:, order], attention), found, atol=1e-12)
    moved = icl.predict(layer, tokens.roll(1, 1), attention)  # another query
    assert not torch.allclose(moved, found, atol=1e-3)


def test_r2_by_hand() -> None:
    of = torch.tensor([-1.0, 1.0, -2.0, 2.0])
    assert icl.r2(of, of / 2) == pytest.approx(0.75)
    assert icl.r2(of, 3 * of) == pytest.approx(-3)
    assert icl.r2(of + 1, of) == pytest.approx(1 - 1 / 2.5)


# ---- what is learned ----


def test_a_trained_layer_finds_the_closed_form(trained: InContextRegression) -> None:
    """At condition 10, where a multiple of the identity is far from it."""
    found = trained.summary()
    assert found["distance_to_closed_form"] < 0.1 and found["cosine_to_closed_form"] > 0.995
    assert found["outside_qk"] < 0.01 and found["outside_ov"] < 0.01
    best = trained.closed.qk[:-1]
    alike = torch.eye(4, dtype=torch.float64) * best.trace() / 4
    assert float((best - alike).norm() / best.norm()) > 0.3
    setting = Setting((10.0 ** -(torch.arange(4, dtype=torch.float64) / 3)).diag(), 10, 0.0)
    assert torch.equal(trained.closed.qk, icl.closed_form(setting).qk)
    assert trained.optimum == pytest.approx(icl.population_loss(trained.closed.step, setting))
    assert icl.population_loss(trained.layer.step, setting) < 1.02 * trained.optimum
    assert abs(found["excess_loss"]) < 0.02 and found["r2_of_step"] > 0.995 > 0.9 > found["r2_of_bayes"]
    assert found["regression_loss"] == pytest.approx(trained.optimum, abs=4 * found["regression_loss_error"])
    assert float(trained.layer.ov[-1]) == 1 and len(plots.figure(trained).data) > 10


def test_the_layer_fails_as_the_step_does(trained: InContextRegression) -> None:
    """Other lengths and larger x: what is sampled of the layer is what is computed of the step."""
    i = trained.lengths.index(10)
    assert float(trained.by_length[1, i]) == pytest.approx(trained.optimum)
    assert float(trained.by_scale[1, icl.SCALES.index(1.0)] * trained.others["zero"]) == pytest.approx(trained.optimum)
    assert torch.allclose(trained.by_scale[0], trained.by_scale[1], rtol=0.15)
    assert torch.allclose(trained.by_length[0], trained.by_length[1], rtol=0.25)
    assert float(trained.by_scale[0, -1]) > 1 > float(trained.by_scale[0, 0])
    assert trained.lengths[0] == 1 and trained.lengths[-1] == 40


def test_a_layer_that_has_not_learned_is_not_the_step() -> None:
    found = icl_regression(0, **SMALL | {"steps": 1}).summary()
    assert found["distance_to_closed_form"] > 0.5 and found["r2_of_step"] < 0.5
    assert found["excess_loss"] > 0.3


def test_softmax_is_another_layer() -> None:
    result = icl_regression(0, **SMALL | {"attention": "softmax", "steps": 500})
    found = result.summary()
    assert found["distance_to_closed_form"] is None
    assert found["optimum_loss"] * 1.2 < found["regression_loss"] < found["zero_loss"]
    assert float(result.by_scale[0, -1]) < float(result.by_scale[1, -1]) / 2  # what it writes is bounded by the y
    assert len(plots.figure(result).data) > 10


@pytest.mark.slow
@pytest.mark.parametrize("condition", [1.0, 10.0])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_defaults_find_the_closed_form(condition: float, noise: float) -> None:
    found = icl_regression(1, condition=condition, noise=noise).summary()
    assert found["distance_to_closed_form"] < 0.03 and found["r2_of_step"] > 0.999
    assert abs(found["excess_loss"]) < 0.01


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dimensions": 1}, "dimensions=1"),
        ({"condition": 0.5}, r"condition=0\.5"),
        ({"noise": -1.0}, r"noise=-1\.0"),
        ({"rate": 0.0}, r"rate=0\.0"),
        ({"examples": 0}, "examples, steps and batch"),
        ({"rate": 1e30, "steps": 20, "batch": 8}, r"did not converge with rate=1e\+30"),
    ],
)
def test_what_cannot_be_trained_is_a_sentence(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        icl_regression(0, **given)
