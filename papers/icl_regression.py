"""In-context regression: the weights of one layer of attention that has learned to regress, beside the best there are.

A prompt is n examples (x_i, y_i) and a query (x_q, 0), with x ~ N(0, L), a weight vector w ~ N(0, I) of its own, and
y_i = w . x_i plus noise of variance s^2; what is wanted is w . x_q. One layer of attention without softmax, trained on
prompts that are drawn anew each step, answers

    f = sum over tokens z of (ov . z) (z QK x_q) / n        z = (x, y); the query is one of the tokens

QK says which tokens the query looks at, ov what of them is written. How good such a layer can be is known. A change of
sign of w turns y around, so f has an odd part and an even one, and only the odd one, x_q U m, can follow the answer:

    m = sum of y_i x_i / n        U = ov_y QK_xx^T + QK_yx ov_x^T
    loss = tr L - 2 tr(L U L) + tr(L U M U^T) + mean square of the even part
    M = E m m^T = (1 + 1/n) L^2 + (tr L + s^2) / n L = Gamma L        by Isserlis' theorem

which is least where U M = L and nothing is even: U = Gamma^-1, and loss tr L - tr(L^2 Gamma^-1), with

    Gamma = (1 + 1/n) L + (tr L + s^2) / n I

So the best layer looks with QK_xx = Gamma^-1, writes y, and has zeros elsewhere: that is one step of gradient descent
from w = 0 on the squared error of the examples, halved and averaged, preconditioned by Gamma^-1. QK times c and ov over
c are the same layer; here both are scaled so that ov_y = 1. With one dimension QK_yx ov_x could do it as well.
Directions in which x hardly varies hardly move the loss and are learned last: where the covariance is far from round,
the weights can be further from the closed form than the answers are.

A layer with softmax is trained for comparison; the closed form is not the best of those, and no scale is free, so its
weights are shown as they are and have no distance. Better than all of them is the mean of w given the examples
(ridge regression; without noise, least squares of least norm): the Bayes predictor.

von Oswald et al. 2023, "Transformers learn in-context by gradient descent", arXiv 2212.07677. Zhang, Frei & Bartlett
2023, "Trained transformers learn linear models in-context", arXiv 2306.09927, theorem 4.1: the minimum, as above for
s = 0. Ahn et al. 2023, "Transformers learn to implement preconditioned gradient descent for in-context learning", arXiv
2306.00297, theorem 1: the same. Mahankali et al. 2023, arXiv 2307.03576: with noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from workbench import canvas
from workbench.errors import UserError
from workbench.plots import definition, figure
from workbench.progress import note, track
from workbench.registry import analysis

Attention = Literal["linear", "softmax"]
SCALES = (0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0)  # of x, on which a layer was not trained but at 1
POINTS = 100  # of the curve
DRAWN = 300  # predictions in the figure


@dataclass(frozen=True)
class Layer:
    """What the query looks at and what of it is written; entries are x_1 to x_d and y.

    qk  [entry of the token, entry of the query]; without a column for the query's y, which is always 0
    """

    qk: Float[Tensor, "entry d"]
    ov: Float[Tensor, " entry"]

    @property
    def step(self) -> Float[Tensor, "d d"]:
        """U: what the odd part of the answer makes of the sum of y x."""
        return self.ov[-1] * self.qk[:-1].T + self.qk[-1, :, None] * self.ov[:-1]

    @property
    def outside(self) -> tuple[float, float]:
        """Share of the squared norm of `qk`, and of `ov`, where the closed form is zero for any covariance."""
        parts = (self.qk[-1], self.qk), (self.ov[:-1], self.ov)
        qk, ov = (float(part.square().sum() / whole.square().sum()) for part, whole in parts)
        return qk, ov


@dataclass(frozen=True)
class InContextRegression:
    """
    curve       one value per evaluation, by name: step, and loss of the prompts of that step
    layer       after training; scaled so that ov_y = 1 if it is linear
    closed      the best linear layer, which has loss `optimum`
    loss        of the layer, by name the mean over fresh prompts and its standard error; excess is what the layer loses
                more than the closed form on the same prompts, as a share of the optimum
    others      loss of the Bayes predictor on these prompts, and of always answering 0 (exact)
    r2          how much of the variance of the step's, and of the Bayes predictor's, answers the layer's explain
    answers     to some of the prompts: of the layer, of the step
    by_length   loss with as many examples as `lengths` says: of the layer, of the step (exact), of Bayes
    by_scale    loss over that of answering 0 with x larger by `SCALES`: of the layer, of the step (exact)
    """

    attention: Attention
    curve: dict[str, Float[Tensor, " evaluation"]]
    layer: Layer
    closed: Layer
    optimum: float
    loss: dict[str, float]
    others: dict[str, float]
    r2: dict[str, float]
    answers: Float[Tensor, "2 prompt"]
    lengths: tuple[int, ...]
    by_length: Float[Tensor, "3 length"]
    by_scale: Float[Tensor, "2 scale"]
    definition: str

    @property
    def distance(self) -> float | None:
        """From QK_xx to Gamma^-1, by the norm of the latter; None with softmax."""
        found, best = self.layer.qk[:-1], self.closed.qk[:-1]
        return float((found - best).norm() / best.norm()) if self.attention == "linear" else None

    @property
    def cosine(self) -> float:
        """Between QK_xx, times the sign of ov_y, and Gamma^-1: 1 where they differ in scale alone."""
        found, best = self.layer.qk[:-1] * self.layer.ov[-1].sign(), self.closed.qk[:-1]
        return float((found * best).sum() / found.norm() / best.norm())

    def summary(self) -> dict[str, Any]:
        qk, ov = self.layer.outside
        return {
            "regression_loss": round(self.loss["mean"], 4),
            "regression_loss_error": round(self.loss["error"], 4),
            "optimum_loss": round(self.optimum, 4),
            "excess_loss": round(self.loss["excess"], 5),
            "excess_loss_error": round(self.loss["excess_error"], 5),
            "bayes_loss": round(self.others["bayes"], 4),
            "zero_loss": round(self.others["zero"], 4),
            "distance_to_closed_form": None if self.distance is None else round(self.distance, 4),
            "cosine_to_closed_form": round(self.cosine, 5),
            "outside_qk": round(qk, 5),
            "outside_ov": round(ov, 5),
            "r2_of_step": round(self.r2["step"], 4),
            "r2_of_bayes": round(self.r2["bayes"], 4),
            "definition": self.definition,
        }


@analysis("icl-regression")
def icl_regression(
    seed: int,
    *,
    dimensions: int = 5,
    examples: int = 20,
    condition: float = 10.0,
    noise: float = 0.0,
    attention: Attention = "linear",
    steps: int = 2000,
    batch: int = 512,
    rate: float = 0.02,
    prompts: int = 20_000,
) -> InContextRegression:
    """Train a layer of attention to regress in its context, and hold its QK and OV to the closed form.

    dimensions  of x, at least 2
    examples    in a prompt
    condition   eigenvalues of the covariance of x go from 1 down to 1 / condition, geometrically; 1: all alike
    noise       standard deviation of what is added to each y
    attention   linear, or with softmax over the examples and the query
    steps       of Adam
    batch       prompts drawn for each step
    rate        of learning; falls to 0 over the steps
    prompts     fresh ones on which the layer is judged
    """
    if dimensions < 2 or condition < 1 or noise < 0 or rate <= 0:
        raise UserError(
            f"dimensions={dimensions}, condition={condition}, noise={noise}, rate={rate}: dimensions is at least 2, "
            "condition at least 1, noise not below 0 and rate above it."
        )
    if min(examples, steps, batch) < 1 or prompts < 10:
        raise UserError("examples, steps and batch are at least 1, and prompts at least 10.")
    generator = torch.Generator().manual_seed(seed)
    powers = torch.arange(dimensions, dtype=torch.float64) / (dimensions - 1)
    setting = Setting((condition**-powers).diag(), examples, noise)
    layer, curve = train(setting, attention, generator, steps=steps, batch=batch, rate=rate)
    if not (layer.qk.isfinite().all() and layer.ov.isfinite().all()):
        raise UserError(f"training did not converge with rate={rate}; take a smaller one.")
    closed = closed_form(setting)
    optimum, zero = population_loss(closed.step, setting), float(setting.covariance.trace())
    tokens, right = draw(setting, prompts, generator)
    answers, step, best = predict(layer, tokens, attention), gradient_step(closed.step, tokens), bayes(tokens, noise)
    errors = (answers - right).square()
    more = (errors - (step - right).square()) / optimum
    lengths = tuple(sorted({round((4 * examples) ** (i / 12)) for i in range(13)} | {examples}))
    return InContextRegression(
        attention=attention,
        curve=curve,
        layer=layer,
        closed=closed,
        optimum=optimum,
        loss=dict(zip(("mean", "error"), mean(errors), strict=True))
        | dict(zip(("excess", "excess_error"), mean(more), strict=True)),
        others={"bayes": mean((best - right).square())[0], "zero": zero},
        r2={"step": r2(step, answers), "bayes": r2(best, answers)},
        answers=torch.stack([answers, step])[:, :DRAWN],
        lengths=lengths,
        by_length=over_lengths(layer, closed, attention, setting, lengths, max(10, prompts // 5), generator),
        by_scale=over_scales(layer, closed, attention, setting, prompts, generator),
        definition="loss is the squared error of the answer to the query, mean over prompts; the step is one of "
        "gradient descent from w = 0, with the closed form's preconditioner",
    )


class Setting(NamedTuple):
    """What prompts are drawn from; the noise is a standard deviation."""

    covariance: Float[Tensor, "d d"]
    examples: int
    noise: float


def train(
    setting: Setting, attention: Attention, generator: torch.Generator, *, steps: int, batch: int, rate: float
) -> tuple[Layer, dict[str, Tensor]]:
    d = len(setting.covariance)
    qk, ov = (0.1 * torch.randn(*shape, generator=generator) for shape in ((d + 1, d), (d + 1,)))
    layer = Layer(qk.requires_grad_(), ov.requires_grad_())
    optimizer = torch.optim.Adam([layer.qk, layer.ov], lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, steps)
    single = setting._replace(covariance=setting.covariance.float())
    curve = []
    for step in track(range(steps), "icl-regression"):
        tokens, right = draw(single, batch, generator)
        loss = (predict(layer, tokens, attention) - right).square().mean()
        if step % max(1, steps // POINTS) == 0 or step == steps - 1:
            curve.append({"step": float(step), "loss": float(loss.detach())})
            note("icl-regression", **curve[-1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    qk, ov = layer.qk.detach().double(), layer.ov.detach().double()
    scale = ov[-1] if attention == "linear" else 1.0
    return Layer(qk * scale, ov / scale), {name: torch.tensor([row[name] for row in curve]) for name in curve[0]}


# ---- the mathematics ----


def draw(
    setting: Setting, prompts: int, generator: torch.Generator
) -> tuple[Float[Tensor, "prompt token entry"], Float[Tensor, " prompt"]]:
    """Prompts, the query last, and what is wanted."""
    covariance, examples, noise = setting

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=covariance.dtype)

    d = len(covariance)
    x, w = normal(prompts, examples + 1, d) @ torch.linalg.cholesky(covariance).T, normal(prompts, d, 1)
    y = x @ w
    shown = y + noise * normal(*y.shape)
    shown[:, -1] = 0
    return torch.cat([x, shown], -1), y[:, -1, 0]


def predict(
    layer: Layer, tokens: Float[Tensor, "prompt token entry"], attention: Attention
) -> Float[Tensor, " prompt"]:
    scores = torch.einsum("pte,ed,pd->pt", tokens, layer.qk, tokens[:, -1, :-1])
    weights = scores.softmax(-1) if attention == "softmax" else scores / (tokens.shape[1] - 1)
    answers: Tensor = (weights * (tokens @ layer.ov)).sum(-1)
    return answers


def gamma(setting: Setting) -> Float[Tensor, "d d"]:
    covariance, n, noise = setting
    identity = torch.eye(len(covariance), dtype=covariance.dtype)
    return (1 + 1 / n) * covariance + (covariance.trace() + noise**2) / n * identity


def closed_form(setting: Setting) -> Layer:
    inverse = torch.linalg.inv(gamma(setting))
    zeros = torch.zeros_like(inverse[:1])
    return Layer(torch.cat([inverse, zeros]), torch.cat([zeros[0], torch.ones_like(zeros[0, :1])]))


def population_loss(step: Float[Tensor, "d d"], setting: Setting) -> float:
    """Expected squared error of x_q U m, exactly."""
    covariance = setting.covariance
    second = gamma(setting) @ covariance
    found = covariance - 2 * covariance @ step @ covariance + covariance @ step @ second @ step.T
    return float(found.trace())


def gradient_step(step: Float[Tensor, "d d"], tokens: Float[Tensor, "prompt token entry"]) -> Float[Tensor, " prompt"]:
    """What w . x_q is after one step from w = 0: w is the preconditioner times the mean of y x."""
    x, y = tokens[:, :-1, :-1], tokens[:, :-1, -1:]
    w = (y * x).mean(1) @ step.T
    return (w * tokens[:, -1, :-1]).sum(-1)


def bayes(tokens: Float[Tensor, "prompt token entry"], noise: float) -> Float[Tensor, " prompt"]:
    """The mean of w . x_q given the examples."""
    x, y = tokens[:, :-1, :-1], tokens[:, :-1, -1:]
    gram = x.mT @ x + noise**2 * torch.eye(x.shape[-1], dtype=x.dtype)
    # Fewer examples than dimensions: the rank is theirs, and what rounding leaves of the rest is no direction.
    w: Tensor = torch.linalg.pinv(gram, hermitian=True, rtol=1e-10) @ (x.mT @ y)
    return (w[..., 0] * tokens[:, -1, :-1]).sum(-1)


def r2(of: Float[Tensor, " prompt"], by: Float[Tensor, " prompt"]) -> float:
    """Share of the variance of `of` that `by` is, as it stands; negative where it is worse than the mean."""
    return 1 - float((of - by).square().mean() / of.var(correction=0))


def mean(values: Float[Tensor, " prompt"]) -> tuple[float, float]:
    """And its standard error."""
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def over_lengths(
    layer: Layer, closed: Layer, attention: Attention, setting: Setting, lengths: Sequence[int], prompts: int,
    generator: torch.Generator,
) -> Float[Tensor, "3 length"]:  # fmt: skip
    """Of the same prompts the first examples, before the same query."""
    tokens, right = draw(setting._replace(examples=max(lengths)), prompts, generator)
    columns = []
    for n in lengths:
        some = torch.cat([tokens[:, :n], tokens[:, -1:]], 1)
        found = (predict(layer, some, attention), bayes(some, setting.noise))
        of_layer, of_bayes = (mean((answers - right).square())[0] for answers in found)
        columns.append([of_layer, population_loss(closed.step, setting._replace(examples=n)), of_bayes])
    return torch.tensor(columns).T


def over_scales(
    layer: Layer, closed: Layer, attention: Attention, setting: Setting, prompts: int, generator: torch.Generator
) -> Float[Tensor, "2 scale"]:
    columns = []
    for scale in SCALES:
        other = setting._replace(covariance=setting.covariance * scale**2)
        tokens, right = draw(other, prompts, generator)
        of_layer = mean((predict(layer, tokens, attention) - right).square())[0]
        columns.append([of_layer, population_loss(closed.step, other)])
        columns[-1] = [loss / float(other.covariance.trace()) for loss in columns[-1]]
    return torch.tensor(columns).T


# ---- figure ----

GREY = "rgba(128,128,128,0.8)"
LINES = {
    "layer": ("trained", canvas.POSITIVE.format(0.9), "solid"),
    "step": ("one step of gradient descent, exact", canvas.NEGATIVE.format(0.9), "solid"),
    "bayes": ("Bayes", GREY, "solid"),
    "zero": ("answer 0", GREY, "dot"),
}


@figure.register
def regression_figure(result: InContextRegression) -> go.Figure:
    """The two layers; training; loss by number of examples and by scale of x; the layer's answers and the step's."""
    titles = (
        "trained: QK, and OV", "closed form: QK, and OV", "loss in training", "loss by number of examples",
        "loss by scale of x", "answers to fresh prompts",
    )  # fmt: skip
    fig = make_subplots(rows=2, cols=3, subplot_titles=titles, vertical_spacing=0.22, horizontal_spacing=0.09)
    _weights(fig, result.layer, result.closed)
    zero, scales = result.others["zero"], list(SCALES)
    steps, lengths = result.curve["step"].tolist(), [float(n) for n in result.lengths]
    for row, col, x, y in ((1, 3, steps, zero), (2, 1, lengths, zero), (2, 2, scales, 1.0)):
        _line(fig, row, col, "zero", [x[0], x[-1]], torch.tensor([y, y]), showlegend=row == 1)
    _line(fig, 1, 3, "layer", steps, result.curve["loss"])
    _line(fig, 1, 3, "step", [steps[0], steps[-1]], torch.full((2,), result.optimum))
    _line(fig, 2, 1, "step", lengths, result.by_length[1], showlegend=True)
    # Without noise Bayes makes no error from d examples on: its line leaves the panel.
    _line(fig, 2, 1, "bayes", lengths, result.by_length[2].clamp_min(1e-9 * zero), showlegend=True)
    _line(fig, 2, 1, "layer", lengths, result.by_length[0], mode="markers", showlegend=True)
    _line(fig, 2, 2, "step", scales, result.by_scale[1])
    _line(fig, 2, 2, "layer", scales, result.by_scale[0], mode="markers")
    ends = torch.stack([result.answers.min(), result.answers.max()])
    _line(fig, 2, 3, "layer", result.answers[1].tolist(), result.answers[0], mode="markers")
    _line(fig, 2, 3, "step", ends.tolist(), ends)
    ticks = {"type": "log", "tickvals": [x * 10.0**k for k in range(-4, 5) for x in (1, 3)]}
    fig.update_xaxes(title_text="step", nticks=4, row=1, col=3)
    fig.update_yaxes(title_text="loss", range=[0, 1.3 * zero], nticks=4, row=1, col=3)
    fig.update_xaxes(title_text="examples", **ticks, row=2, col=1)
    low, high = float(result.by_length[:2].min()) / 4, float(result.by_length[:2].max()) * 1.5
    fig.update_yaxes(title_text="loss", range=[math.log10(low), math.log10(high)], **ticks, row=2, col=1)
    fig.update_xaxes(title_text="x times", type="log", tickvals=scales[::2], row=2, col=2)
    fig.update_yaxes(title_text="loss over that of answer 0", **ticks, row=2, col=2)
    fig.update_xaxes(title_text="one step of gradient descent", nticks=5, row=2, col=3)
    fig.update_yaxes(title_text="layer", nticks=5, row=2, col=3)
    fig.update_xaxes(title_standoff=4).update_yaxes(title_standoff=4)
    fig.update_annotations(font_size=13, yshift=4)
    fig.update_layout(legend={"orientation": "h", "y": -0.13, "x": 0, "yanchor": "top"})
    return canvas.finish(fig, 480, top=34, bottom=84)


def _line(fig: go.Figure, row: int, col: int, name: str, x: Sequence[float], y: Tensor, **more: Any) -> None:
    label, colour, dash = LINES[name]
    trace = go.Scatter(
        x=x, y=canvas.cells(y), name=label, legendgroup=label, marker={"size": 5, "color": colour},
        line={"color": colour, "width": 2, "dash": dash}, hovertemplate=f"%{{x:.4g}}: %{{y:.3g}}<extra>{label}</extra>",
        **{"mode": "lines", "showlegend": False} | more,
    )  # fmt: skip
    fig.add_trace(trace, row=row, col=col)


def _weights(fig: go.Figure, *layers: Layer) -> None:
    """QK, a gap, and OV, on one scale."""
    d = layers[0].qk.shape[1]
    names = [*(f"x<sub>{i}</sub>" for i in range(1, d + 1)), "y"]
    limit = max(float(part.abs().max()) for layer in layers for part in (layer.qk, layer.ov))
    for col, layer in enumerate(layers, 1):
        grid = torch.cat([layer.qk, torch.full((d + 1, 1), torch.nan), layer.ov[:, None]], 1)
        across = [*names[:-1], "", "OV"]
        hover = [
            [
                f"{name} of the token, {at} of the query: {canvas.number(x, 4)}"
                for at, x in zip(across, row, strict=True)
            ]
            for name, row in zip(names, grid.tolist(), strict=True)
        ]
        text = [
            ["" if math.isnan(x) else canvas.number(x, 2, signed=False) if abs(x) >= 0.005 else "0" for x in row]
            for row in grid.tolist()
        ]
        written = {"text": text, "texttemplate": "%{text}", "textfont": canvas.WRITTEN} if d <= 6 else {}
        fig.add_trace(canvas.heatmap(grid, hover, coloraxis="coloraxis", hoverongaps=False, **written), row=1, col=col)
        fig.update_xaxes(tickvals=list(range(d + 2)), ticktext=across, title_text="of the query", row=1, col=col)
        fig.update_yaxes(tickvals=list(range(d + 1)), ticktext=names, autorange="reversed", row=1, col=col)
    fig.update_yaxes(title_text="of the token", row=1, col=1)
    fig.update_layout(coloraxis={"colorscale": canvas.DIVERGING, "cmin": -limit, "cmax": limit, "showscale": False})


@definition.register
def _(result: InContextRegression) -> str:
    return result.definition
