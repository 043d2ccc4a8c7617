"""Figures of languages: latents, steering, heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from saes.steering.evaluate import Verdict
from saes.steering.heads import LanguageHeads
from saes.steering.hybrid import OWN, TURNED, LanguageHybrid
from saes.steering.language_steering import LanguageSteering
from saes.steering.languages import LANGUAGES
from saes.steering.layers import LanguageLayers
from saes.steering.search import LanguageLatents
from workbench import canvas, sites
from workbench.plots import Table, definition, figure, tables
from workbench.scores import head

GREY = "rgba(128,128,128,{})"
SHADES = (canvas.POSITIVE, canvas.NEGATIVE, GREY, "rgba(70,150,90,{})")
SYMBOLS = ("circle", "diamond", "square", "cross", "x")


@figure.register
def language_figure(result: LanguageLatents) -> go.Figure:
    """Every latent by the paper's score and by AUROC, for each language; the paper's three best are named."""
    names = list(result.scores)
    columns = min(4, len(names))
    lines = math.ceil(len(names) / columns)
    fig = make_subplots(
        rows=lines, cols=columns, subplot_titles=[escape(LANGUAGES[name]) for name in names], shared_xaxes=True,
        horizontal_spacing=0.05, vertical_spacing=0.3 / lines,
    )  # fmt: skip
    x, y = result.names.index("auroc"), result.names.index("difference")
    for i, name in enumerate(names):
        table, place = result.scores[name], {"row": i // columns + 1, "col": i % columns + 1}
        # Most latents tell nothing: a cloud in the middle, of which a part is enough to see.
        shown = (table[y].abs() + (table[x] - 0.5).abs()).topk(min(600, table.shape[1])).indices
        best = [latent for latent, _ in result.top(name, "difference")]
        for some, colour, mode in (
            (shown, canvas.POSITIVE.format(0.35), "markers"),
            (best, canvas.NEGATIVE.format(1), "markers+text"),
        ):
            chosen = torch.as_tensor(some)
            fig.add_trace(
                go.Scatter(
                    x=canvas.cells(table[x, chosen]), y=canvas.cells(table[y, chosen]), mode=mode, showlegend=False,
                    marker={"size": 5 if mode == "markers" else 7, "color": colour}, text=[str(int(j)) for j in chosen],
                    textposition="middle left", textfont_size=10, customdata=chosen.tolist(),
                    hovertemplate="latent %{customdata}: difference %{y:.3g}, AUROC %{x:.3f}<extra></extra>",
                ), **place,
            )  # fmt: skip
    fig.update_xaxes(range=[-0.03, 1.03])
    for column in range(1, columns + 1):
        fig.update_xaxes(title_text="AUROC", row=lines, col=column)
    fig.update_yaxes(title_text="difference", col=1)
    return canvas.finish(fig, 90 + 190 * lines, top=40)


@definition.register
def _(result: LanguageLatents) -> str:
    return result.definition


@figure.register
def steering_figure(result: LanguageSteering) -> go.Figure:
    """Shares of test texts by method, with 95 % intervals, and what was tried on validation prompts; below the best of
    every layer, and what taking the latent away costs each language."""
    lines = len(result.table)
    height = 140 + 34 * lines + 260
    fig = make_subplots(
        rows=2, cols=2, column_widths=[0.55, 0.45], horizontal_spacing=0.16, vertical_spacing=110 / height,
        row_heights=[34 * lines, 260],
        subplot_titles=["test prompts", "validation prompts", "best of each layer, validation", "without the latent"],
    )  # fmt: skip
    _shares(fig, result.table)
    _tried(fig, result)
    _layers(fig, result)
    _effects(fig, result)
    fig.update_xaxes(title_standoff=6)
    fig.update_layout(legend={"orientation": "h", "y": 1 + 26 / height, "yanchor": "bottom", "x": 0})
    return canvas.finish(fig, height, top=70)


def _shares(fig: go.Figure, table: Mapping[str, Verdict]) -> None:
    names = sorted(table, key=lambda name: (table[name].strict or 0, table[name].plain))
    for key, colour in (("plain", canvas.NEGATIVE), ("strict", canvas.POSITIVE)):
        values = [getattr(table[name], key) or 0.0 for name in names]
        bounds = [getattr(table[name], f"{key}_interval") or (0.0, 0.0) for name in names]
        fig.add_trace(
            go.Bar(
                x=values, y=[escape(name) for name in names], orientation="h", name=f"{key} success",
                marker={"color": colour.format(0.85), "line_width": 0}, hovertemplate="%{y}: %{x:.3f}<extra></extra>",
                error_x={
                    "type": "data", "symmetric": False, "thickness": 1, "width": 3, "color": GREY.format(0.9),
                    "array": [high - x for x, (_, high) in zip(values, bounds, strict=True)],
                    "arrayminus": [x - low for x, (low, _) in zip(values, bounds, strict=True)],
                },
            ), row=1, col=1,
        )  # fmt: skip
    fig.update_xaxes(title_text="share of texts", range=[0, 1.03], row=1, col=1)
    fig.update_yaxes(automargin=True, row=1, col=1)


def _tried(fig: go.Figure, result: LanguageSteering) -> None:
    for i, method in enumerate(result.layers):
        some = [cell for cell in result.cells if cell.method == method and cell.verdict is not None]
        fig.add_trace(
            go.Scatter(
                x=[cell.verdict.repetition for cell in some if cell.verdict],
                y=[cell.verdict.plain for cell in some if cell.verdict],
                mode="markers", name=escape(method), legendgroup=method,
                marker={"size": 8, "symbol": SYMBOLS[i % len(SYMBOLS)], "color": SHADES[i % len(SHADES)].format(0.8)},
                text=[
                    f"{escape(cell.hook)}{'' if cell.latent is None else f' latent {cell.latent}'} × {cell.strength:g}"
                    f"{'' if cell.decay == 1 else f', decays by {cell.decay:g}'}"
                    for cell in some
                ],
                hovertemplate="%{text}: success %{y:.2f}, repeated %{x:.2f}<extra></extra>",
            ), row=1, col=2,
        )  # fmt: skip
    fig.update_xaxes(title_text="repeated pairs of tokens", range=[-0.02, 1.02], row=1, col=2)
    fig.update_yaxes(title_text="plain success", range=[-0.03, 1.03], row=1, col=2)


def _layers(fig: go.Figure, result: LanguageSteering) -> None:
    for i, (method, some) in enumerate(result.layers.items()):
        by_layer = sorted(((sites.depth(hook)[0], cell) for hook, cell in some.items()), key=lambda one: one[0])
        fig.add_trace(
            go.Scatter(
                x=[layer for layer, _ in by_layer], y=[cell.verdict.strict for _, cell in by_layer if cell.verdict],
                mode="lines+markers", showlegend=False, legendgroup=method,
                marker={"size": 7, "symbol": SYMBOLS[i % len(SYMBOLS)]},
                line={"color": SHADES[i % len(SHADES)].format(0.9), "width": 2},
                hovertemplate="layer %{x}: %{y:.2f}<extra>" + escape(method) + "</extra>",
            ), row=2, col=1,
        )  # fmt: skip
    fig.update_xaxes(title_text="layer", dtick=1, row=2, col=1)
    fig.update_yaxes(title_text="strict success", range=[-0.03, 1.03], row=2, col=1)


def _effects(fig: go.Figure, result: LanguageSteering) -> None:
    change = {language: bits.ablated - bits.plain for language, bits in result.effects.items()}
    target = result.recipe.target
    fig.add_trace(
        go.Bar(
            x=list(change.values()), y=[LANGUAGES[language] for language in change], orientation="h", showlegend=False,
            marker={
                "color": [(canvas.POSITIVE if one == target else GREY).format(0.85) for one in change],
                "line_width": 0,
            }, hovertemplate="%{y}: %{x:+.4f} bits per byte<extra></extra>",
        ), row=2, col=2,
    )  # fmt: skip
    fig.update_xaxes(title_text="change in bits per byte", row=2, col=2)
    fig.update_yaxes(autorange="reversed", automargin=True, row=2, col=2)


@definition.register
def _(result: LanguageSteering) -> str:
    return result.definition


@tables.register
def steering_tables(result: LanguageSteering) -> list[Table]:
    """Verdicts by method, best first, and what some of them wrote on the same prompts."""
    return _tables(result.table, result.examples, ("none", "latent", "DiffMean", "prompting"))


@figure.register
def hybrid_figure(result: LanguageHybrid) -> go.Figure:
    """Shares of test texts by method, with 95 % intervals, and what was tried on validation prompts: strict success
    over how strongly the latent holds, a line for each push on the prompt, and over the strength of own latents; dotted
    and dashed: less from token to token."""
    height = 140 + 34 * len(result.table)
    fig = make_subplots(
        rows=1, cols=3, column_widths=[0.44, 0.28, 0.28], horizontal_spacing=0.09,
        subplot_titles=["test prompts", "turned and held, validation", "own latents, validation"],
    )  # fmt: skip
    _shares(fig, result.table)
    turns = list(dict.fromkeys(way.turn for way in result.tried))
    for turn, decay in dict.fromkeys((way.turn, way.decay) for way in result.tried):
        some = [way for way in result.tried if (way.turn, way.decay) == (turn, decay)]
        fig.add_trace(
            go.Scatter(
                x=[way.hold for way in some], y=[way.verdict.strict for way in some],
                name=f"turned × {turn:g}", legendgroup=f"turn {turn:g}", showlegend=decay == some[0].decay == 1,
                hovertemplate=f"turned × {turn:g}, held × %{{x}}, decay {decay:g}: %{{y:.2f}}<extra></extra>",
                **_line(turns.index(turn), decay),
            ), row=1, col=2,
        )  # fmt: skip
    told = sorted((cell for cell in result.cells if cell.verdict), key=lambda cell: (-cell.decay, cell.strength))
    for decay in dict.fromkeys(cell.decay for cell in told):
        ways = [cell for cell in told if cell.decay == decay]
        fig.add_trace(
            go.Scatter(
                x=[cell.strength for cell in ways], y=[cell.verdict.strict for cell in ways if cell.verdict],
                showlegend=False, name=f"decay {decay:g}", **_line(0, decay),
                hovertemplate=f"× %{{x:.2f}}, decay {decay:g}: %{{y:.2f}}<extra></extra>",
            ), row=1, col=3,
        )  # fmt: skip
    fig.update_xaxes(title_text="× the latent's strength", row=1, col=2)
    fig.update_xaxes(title_text="× the mean difference", row=1, col=3)
    fig.update_yaxes(title_text="strict success", range=[-0.03, 1.03], row=1, col=2)
    fig.update_yaxes(range=[-0.03, 1.03], row=1, col=3)
    fig.update_xaxes(title_standoff=6)
    fig.update_layout(legend={"orientation": "h", "y": 1 + 26 / height, "yanchor": "bottom", "x": 0})
    return canvas.finish(fig, height, top=70)


def _line(i: int, decay: float) -> dict[str, Any]:
    dash = None if decay == 1 else "dot" if decay <= 0.9 else "dash"
    return {
        "mode": "lines+markers", "marker": {"size": 7, "symbol": SYMBOLS[i % len(SYMBOLS)]},
        "line": {"color": SHADES[i % len(SHADES)].format(0.9), "width": 2, "dash": dash},
    }  # fmt: skip


@definition.register
def _(result: LanguageHybrid) -> str:
    return result.definition


@tables.register
def hybrid_tables(result: LanguageHybrid) -> list[Table]:
    """Verdicts by method, best first, and what hybrids, latent and difference of means wrote on the same prompts."""
    return _tables(result.table, result.examples, (TURNED, OWN, "latent", "DiffMean"))


def _tables(
    table: Mapping[str, Verdict], examples: Mapping[str, tuple[tuple[str, str], ...]], methods: Sequence[str]
) -> list[Table]:
    """methods: whose texts are shown."""
    ranked = sorted(table.items(), key=lambda item: -(item[1].strict or 0.0))
    columns: dict[str, list[str]] = {"method": [name for name, _ in ranked]}
    for key, title in (
        ("plain", "plain success"), ("strict", "strict success"), ("fidelity", "fidelity"), ("score", "score"),
        ("repetition", "repeated"), ("bits", "bits per byte"),
    ):  # fmt: skip
        bounds = [getattr(one, f"{key}_interval", None) for _, one in ranked]
        columns[title] = [
            _number(getattr(one, key)) + (f" ({low:.2f} to {high:.2f})" if (low, high) != (0, 0) else "")
            for (_, one), (low, high) in zip(ranked, (bound or (0, 0) for bound in bounds), strict=True)
        ]
    texts = {name: [text for _, text in examples[name]] for name in methods if name in examples}
    prompts = [prompt for prompt, _ in next(iter(examples.values()), ())]
    named = {"none": "unsteered"}
    return [
        Table("Test prompts", columns),
        Table("Texts", {"prompt": prompts, **{named.get(name, name): some for name, some in texts.items()}}),
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


@figure.register
def language_layers_figure(result: LanguageLayers) -> go.Figure:
    """Shares of test texts over the layer that is steered, with 95 %; dotted: a random direction of the same length."""
    fig = go.Figure()
    for key, colour in (("plain", canvas.NEGATIVE), ("strict", canvas.POSITIVE)):
        for random in (False, True):
            some = [one.random if random else one.verdict for one in result.layers]
            values = [getattr(one, key) or 0.0 for one in some]
            bounds = [getattr(one, f"{key}_interval") or (0.0, 0.0) for one in some]
            line = {"color": colour.format(0.5 if random else 0.9), "width": 2, "dash": "dot" if random else None}
            error = {
                "type": "data", "symmetric": False, "thickness": 1, "width": 3,
                "array": [high - x for x, (_, high) in zip(values, bounds, strict=True)],
                "arrayminus": [x - low for x, (low, _) in zip(values, bounds, strict=True)],
            }  # fmt: skip
            fig.add_trace(
                go.Scatter(
                    x=list(range(len(values))), y=values, mode="lines+markers", marker={"size": 7},
                    name=f"{key}, random direction" if random else f"{key} success",
                    line=line, error_y=None if random else error, hovertemplate="layer %{x}: %{y:.2f}",
                )
            )  # fmt: skip
    fig.update_xaxes(title_text="layer", dtick=canvas.step(len(result.layers), 20))
    fig.update_yaxes(title_text="share of test texts", range=[-0.03, 1.03])
    fig.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    return canvas.finish(fig, 320, top=50)


@definition.register
def _(result: LanguageLayers) -> str:
    return result.definition


@figure.register
def heads_figure(result: LanguageHeads) -> go.Figure:
    """What each head writes of the latent, and what each later one carries; * where fewer than one other latent in
    twenty has as much of the layer from the same head."""
    first, later = len(result.writers), len(result.readers)
    fig = make_subplots(
        rows=1, cols=2, column_widths=[first, max(1, later)], horizontal_spacing=0.16,
        subplot_titles=["writes", "carries when steered"],
    )  # fmt: skip
    for column, table, start in ((1, result.writers, 0), (2, result.readers, first)):
        if not len(table):
            continue
        hover = [
            [f"{head(start + layer, h)} {x:.3g}" for layer, x in enumerate(row)]
            for h, row in enumerate(table.T.tolist())
        ]
        limit = float(table.abs().max()) or 1.0
        bar = canvas.colorbar("contrast" if column == 1 else "probability") | {"x": 0.46 if column == 1 else 1.01}
        fig.add_trace(
            canvas.heatmap(
                table.T, hover, x=list(range(start, start + len(table))), colorscale=canvas.DIVERGING, zmin=-limit,
                zmax=limit, colorbar=bar,
            ), row=1, col=column,
        )  # fmt: skip
    for layer, h in (result.beaten < 0.05).nonzero().tolist():
        fig.add_annotation(x=layer, y=h, text="*", showarrow=False, font=canvas.WRITTEN, row=1, col=1)
    fig.update_xaxes(title_text="layer", dtick=canvas.step(first, 20))
    fig.update_yaxes(title_text="head", autorange="reversed", dtick=canvas.step(result.writers.shape[1], 16))
    return canvas.finish(fig, max(120, 26 * result.writers.shape[1]), top=34)


@definition.register
def _(result: LanguageHeads) -> str:
    return result.definition
