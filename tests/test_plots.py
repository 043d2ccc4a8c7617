"""Laws on figures: what is drawn is what was computed, on a scale on which 0 is 0."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import pytest
import torch

from workbench import canvas, plots
from workbench.errors import UserError
from workbench.lenses import AttentionResult, LensResult
from workbench.scores import NodeScores, head, mlp


def node_scores(n_layers: int = 3, n_heads: int = 4, prompts: int | None = 5, mlps: bool = True) -> NodeScores:
    nodes = [head(layer, h) for layer in range(n_layers) for h in range(n_heads)]
    nodes += [mlp(layer) for layer in range(n_layers)] if mlps else []
    per_prompt = torch.randn(len(nodes), prompts or 5, generator=torch.Generator().manual_seed(0))
    kept = per_prompt if prompts else None
    return NodeScores(tuple(nodes), per_prompt.mean(1), "loss of the metric", "logit_diff", kept)


def lens_result(n_layers: int = 3, tokens: tuple[str, ...] = ("When", " Mary", "\n")) -> LensResult:
    depth = n_layers + 1
    return LensResult(
        metric=torch.linspace(-1, 2, depth),
        metric_std=torch.full((depth,), 0.25),
        top1=torch.linspace(0, 1, depth),
        unit="logit_diff",
        tokens=list(tokens),
        top_tokens=[[f" {layer}{i}" for i in range(len(tokens))] for layer in range(depth)],
        top_probs=torch.rand(depth, len(tokens), generator=torch.Generator().manual_seed(0)),
    )


def attention_result(n_layers: int = 3, n_heads: int = 4) -> AttentionResult:
    torch_rng = torch.Generator().manual_seed(0)
    classes = {
        name: torch.rand(n_layers, n_heads, generator=torch_rng)
        for name in ("previous", "first", "duplicate", "induction")
    }
    patterns = torch.rand(n_layers, n_heads, 3, 3, generator=torch_rng).tril()
    return AttentionResult(classes, ["When", " Mary", " went"], patterns / patterns.sum(-1, keepdim=True))


def traces(fig: go.Figure, kind: str) -> list[Any]:
    return [trace for trace in fig.data if trace.type == kind]


def tensor(z: Any) -> torch.Tensor:
    return torch.tensor([[torch.nan if value is None else value for value in row] for row in z])


# ---- scores of nodes ----


def test_the_map_shows_the_grid_and_the_bars_the_mlps() -> None:
    scores = node_scores()
    fig = plots.figure(scores)
    (heat,), (bars,) = traces(fig, "heatmap"), traces(fig, "bar")
    assert torch.equal(tensor(heat.z), scores.grid().T)
    assert dict(zip(map(mlp, bars.x), bars.y, strict=True)) == scores.mlps()


def test_every_cell_says_which_head_it_is_and_its_score() -> None:
    scores = node_scores(prompts=None)
    (heat,) = traces(plots.figure(scores), "heatmap")
    for name, score in scores.heads().items():
        layer, h = map(int, name[1:].split(".h"))
        assert heat.hovertext[h][layer] == f"{name} {score:+.3f}".replace("-", "−")


def test_hover_gives_the_standard_error_over_prompts() -> None:
    scores = NodeScores(("a0.h0",), torch.tensor([2.0]), "", "", torch.tensor([[1.0, 2.0, 3.0]]))
    (heat,) = traces(plots.figure(scores), "heatmap")
    assert heat.hovertext[0][0] == "a0.h0 +2.000 ± 0.577"  # 1 / sqrt(3)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_zero_is_in_the_middle_of_the_colours(scale: float) -> None:
    scores = node_scores()
    shifted = NodeScores(scores.nodes, (scores.scores + 3) * scale, "", "")
    (heat,) = traces(plots.figure(shifted), "heatmap")
    assert heat.zmin == -heat.zmax
    assert heat.zmax == pytest.approx(float(shifted.grid().abs().max()))
    assert heat.colorscale[len(heat.colorscale) // 2][0] == 0.5


def test_the_strongest_heads_have_their_sign_written_on_them() -> None:
    scores = node_scores()
    notes = {(note.x, note.y): note.text for note in plots.figure(scores).layout.annotations}
    assert len(notes) == plots.NAMED
    for name, score in scores.top(plots.NAMED):
        layer, h = map(int, name[1:].split(".h"))
        assert notes[layer, h][0] == ("+" if score > 0 else "−")


def test_models_of_many_layers_have_the_bare_sign() -> None:
    notes = plots.figure(node_scores(n_layers=48, n_heads=25)).layout.annotations
    assert {note.text for note in notes} == {"+", "−"}


def test_bars_below_zero_have_the_colour_of_the_negative() -> None:
    (bars,) = traces(plots.figure(node_scores()), "bar")
    for y, colour in zip(bars.y, bars.marker.color, strict=True):
        assert colour == (canvas.POSITIVE if y >= 0 else canvas.NEGATIVE).format(0.85)


def test_the_unit_is_on_the_colour_bar() -> None:
    (heat,) = traces(plots.figure(node_scores()), "heatmap")
    assert heat.colorbar.title.text == "logit_diff"


def test_missing_heads_and_infinite_scores_leave_their_cells_empty() -> None:
    scores = NodeScores(("a0.h0", "a1.h1", "a2.h0"), torch.tensor([0.5, -1.0, torch.inf]), "", "")
    fig = plots.figure(scores)
    (heat,) = traces(fig, "heatmap")
    assert [list(row) for row in heat.z] == [[0.5, None, None], [None, -1.0, None]]
    assert heat.zmax == 1
    assert heat.hovertext[1][0] == "a0.h1 no score"
    json.loads(fig.to_json(), parse_constant=pytest.fail)  # NaN is not JSON


@pytest.mark.parametrize("values", [[0.0, 0.0], [float("nan")] * 2])
def test_scores_without_any_size_are_drawn(values: list[float]) -> None:
    (heat,) = traces(plots.figure(NodeScores(("a0.h0", "a0.h1"), torch.tensor(values), "", "")), "heatmap")
    assert (heat.zmin, heat.zmax) == (-1, 1)


def test_mlps_alone_are_drawn_and_nothing_at_all_is_refused() -> None:
    fig = plots.figure(NodeScores(("m0", "m1"), torch.tensor([1.0, -1.0]), "", ""))
    assert [trace.type for trace in fig.data] == ["bar"]
    with pytest.raises(UserError, match="nothing to draw"):
        plots.figure(NodeScores(("embed",), torch.tensor([1.0]), "", ""))


# ---- the other results ----


def test_the_lens_line_is_the_metric_and_its_band_one_standard_deviation() -> None:
    result = lens_result()
    by_name = {trace.name: trace for trace in plots.figure(result).data}
    middle = torch.tensor(by_name["logit_diff"].y)
    assert torch.equal(middle, result.metric)
    assert torch.allclose(torch.tensor(by_name["mean + std"].y) - middle, result.metric_std)
    assert torch.allclose(middle - torch.tensor(by_name["mean - std"].y), result.metric_std)
    assert by_name["logit_diff"].x[0] == -1  # the embedding, before block 0
    assert by_name["logit_diff"].hovertext[0] == "embedding: −1.000 ± 0.250"


def test_the_token_map_has_a_cell_for_each_layer_and_position() -> None:
    result = lens_result()
    (heat,) = traces(plots.token_map(result), "heatmap")
    assert torch.equal(tensor(heat.z), result.top_probs)
    assert heat.text[2][1] == "21"
    assert heat.hovertext[2][1].startswith("Mary → 21 ")
    assert list(plots.token_map(result).layout.xaxis.ticktext) == ["When", "Mary", "↵"]


def test_tokens_are_never_markup() -> None:
    result = lens_result(tokens=("<b>x</b>", "<a href='javascript:alert(1)'>y</a>", "&lt;"))
    fig = plots.token_map(result)
    assert "<b>" not in fig.to_json().replace("\\u003c", "<")
    assert fig.layout.xaxis.ticktext[2] == "&amp;lt;"


def test_attention_has_one_map_per_class_on_one_scale() -> None:
    result = attention_result()
    fig = plots.figure(result)
    for trace, (name, grid) in zip(traces(fig, "heatmap"), result.classes.items(), strict=True):
        assert trace.name == name
        assert torch.equal(tensor(trace.z), grid.T)
        assert trace.hovertext[3][2] == f"a2.h3 {float(grid[2, 3]):.3f}"
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (0, 1)


def test_a_class_without_positions_says_so() -> None:
    result = attention_result()
    result.classes["duplicate"].fill_(torch.nan)
    titles = [note.text for note in plots.figure(result).layout.annotations]
    assert "earlier copy of the token: no such position in these prompts" in titles


def test_a_pattern_shows_queries_down_and_no_future() -> None:
    result = attention_result()
    (heat,) = traces(plots.pattern_figure(result, "a1.h2"), "heatmap")
    shown = tensor(heat.z)
    assert shown.triu(1).isnan().sum() == 3
    assert torch.equal(shown.nan_to_num(), result.patterns[1, 2])


# ---- all of them ----


def all_figures() -> dict[str, Callable[[], go.Figure]]:
    return {
        "scores": lambda: plots.figure(node_scores()),
        "lens": lambda: plots.figure(lens_result()),
        "tokens": lambda: plots.token_map(lens_result()),
        "attention": lambda: plots.figure(attention_result()),
        "pattern": lambda: plots.pattern_figure(attention_result(), "a0.h0"),
    }


@pytest.mark.parametrize("name", all_figures())
def test_no_figure_has_a_background(name: str) -> None:
    layout = all_figures()[name]().layout
    assert layout.paper_bgcolor is None and layout.plot_bgcolor is None
    assert layout.template.layout.paper_bgcolor == layout.template.layout.plot_bgcolor == "rgba(0,0,0,0)"


def test_text_in_cells_takes_the_colour_of_the_page() -> None:
    fig = canvas.written_in(plots.figure(node_scores()), "#123456")
    assert {note.font.color for note in fig.layout.annotations} == {"#123456"}
    assert {note.font.size for note in fig.layout.annotations} == {canvas.WRITTEN["size"]}


def test_a_result_that_carries_scores_is_drawn_as_its_scores() -> None:
    @dataclass(frozen=True)
    class Codes:
        scores: NodeScores

    inner = node_scores()
    assert plots.figure(Codes(inner)) == plots.figure(inner)
    assert plots.definition(Codes(inner)) == "loss of the metric"


def test_an_unknown_result_is_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match="a dict has no figure"):
        plots.figure({})


def test_ranking_is_by_size_with_the_error_beside_it() -> None:
    scores = node_scores()
    rows = plots.ranking(scores, scores.heads(), 5)
    assert [(row.node, row.score) for row in rows] == scores.top(5)
    assert scores.per_prompt is not None
    first = scores.per_prompt[scores.nodes.index(rows[0].node)]
    assert rows[0].error == pytest.approx(float(first.std() / 5**0.5))
    assert all(row.error is None for row in plots.ranking(node_scores(prompts=None), scores.heads(), 5))


@pytest.mark.parametrize(
    ("values", "written"),
    [
        ([2.094, -0.0512], ["+2.09", "−0.05"]),
        ([0.0312], ["+0.0312"]),
        ([1234.5], ["+1234"]),
        ([0.0, float("nan")], ["+0", "–"]),
        ([], []),
    ],
)
def test_a_column_of_numbers_has_common_decimals(values: list[float], written: list[str]) -> None:
    assert canvas.numbers(values) == written
