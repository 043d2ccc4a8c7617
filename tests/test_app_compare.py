"""The page of two runs: what it shows of each pair, and that nothing in the address or in a run breaks it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from streamlit.testing.v1 import AppTest

from circuits.comparing_circuits import agreement, overlaps
from circuits.graph import Circuit, EdgeScores, transformer
from tests.test_app import HOSTILE, edit, folder, page, save, text
from tests.test_plots import lens_result, node_scores
from workbench import canvas, comparing, runs
from workbench.scores import NodeScores

GRAPH = transformer(3, 4)


def compare(a: str | None = None, b: str | None = None, **query: str) -> AppTest:
    given = {side: id for side, id in (("a", a), ("b", b)) if id is not None}
    return page("compare", **given, **query)


def plain(app: AppTest) -> str:
    return text(app).replace("\\", "").replace("\u2060", "")


def metrics(app: AppTest) -> dict[str, str]:
    return {metric.label: metric.value for metric in app.metric}


def tables(app: AppTest) -> list[set[str]]:
    return [set(map(str, table.value.columns)) for table in app.dataframe]


def scored(seed: int, n: int = 12, unit: str = "logit_diff") -> NodeScores:
    per_prompt = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))
    names = tuple(f"a{i // 4}.h{i % 4}" for i in range(n))
    return NodeScores(names, per_prompt.mean(1), f"method {seed}", unit, per_prompt)


def circuit(seed: int, layers: int = 3) -> Circuit:
    graph = transformer(layers, 4)
    kept = torch.rand(len(graph), generator=torch.Generator().manual_seed(seed)) < 0.1
    return Circuit(graph, kept, f"by hand {seed}")


def test_fewer_than_two_runs_are_a_sentence() -> None:
    save(node_scores())
    assert compare().text[0].value.startswith("There are 1 runs, and two are needed")


def test_runs_are_chosen_from_a_list_and_their_ids_are_in_the_address() -> None:
    one, other = save(scored(0)), save(scored(1), "attribution-patching")
    app = compare()
    assert "Choose two runs" in text(app) and not app.metric
    names = app.selectbox[0].options
    assert len(names) == 2 and all("tiny · ioi · n 5 · seed 0 · 27 Sep 2026" in name for name in names)
    app.selectbox("compare a").set_value(one).run()
    app.selectbox("compare b").set_value(other).run()
    assert app.query_params["a"] == one and app.query_params["b"] == other and app.metric
    app.button("compare swap").click().run()
    assert app.query_params["a"] == other and app.query_params["b"] == one
    assert [box.value for box in app.selectbox[:2]] == [other, one]


def test_the_address_decides_also_while_the_page_is_open() -> None:
    one, two, three = (save(scored(seed), seed=seed) for seed in range(3))
    app = compare(one, two)
    app.query_params["b"] = three
    app.run()
    assert app.selectbox("compare b").value == three


def test_what_decides_is_folded_where_it_is_the_same() -> None:
    app = compare(save(scored(0)), save(scored(1), "attribution-patching", seed=1))
    table = app.table[0].value
    assert list(table.iloc[:, 0]) == ["analysis", "seed"] and list(table["b"])[1] == "1"
    assert "same: analysis_version 1 · parameters direction noise · model f00d" in plain(app)
    same = compare(*[save(scored(0))] * 2)
    assert "Both are the same run." in plain(same) and "Nothing differs." in plain(same)


def test_scores_on_the_same_prompts_have_correlations_overlap_and_intervals() -> None:
    one, other = save(scored(0)), save(scored(1), "attribution-patching")
    app = compare(one, other)
    found = agreement(runs.get_run(one), runs.get_run(other))
    shown = metrics(app)
    assert shown["Pearson r"] == canvas.number(found.pearson or 0.0, 3, signed=False)
    assert shown["Jaccard, nodes"] == canvas.number(found.overlap(10).jaccard, 3, signed=False)
    assert shown["by chance"] == canvas.number(found.overlap(10).expected, 3, signed=False)
    changes = next(table.value for table in app.dataframe if "nodes" in table.value.columns)
    first = found.changes()[0]
    name, *numbers = changes.iloc[0]
    assert name == first.name and numbers == pytest.approx(list(first[1:]))
    assert "paired t over the same prompts" in plain(app)
    assert not any("95 % interval of the difference" in table.value.columns for table in app.dataframe)
    assert "No interval: the same prompts, and a record does not keep what each gave." in plain(app)
    app.select_slider[0].set_value(2).run()
    assert app.query_params["k"] == "2"
    assert metrics(app)["Jaccard, nodes"] == canvas.number(found.overlap(2).jaccard, 3, signed=False)


def test_scores_on_other_prompts_have_no_interval_and_figures_have() -> None:
    app = compare(save(scored(0)), save(scored(1), seed=1))
    assert "Without intervals: prompts of two seeds." in plain(app)
    figures = next(table.value for table in app.dataframe if "95 % interval of the difference" in table.value.columns)
    assert figures["low"].notna().all() and set(figures.iloc[:, -1].str.split(",").str[0]) == {"Newcombe", "Welch"}


def test_circuits_are_held_against_each_other_and_both_drawn() -> None:
    one, other = save(circuit(0), "extract"), save(circuit(1), "extract", seed=1)
    app = compare(one, other)
    nodes, edges = overlaps(runs.get_run(one), runs.get_run(other))
    shown = metrics(app)
    assert shown["Jaccard, edges"] == canvas.number(edges.jaccard, 3, signed=False)
    assert shown["Jaccard, nodes"] == canvas.number(nodes.jaccard, 3, signed=False)
    assert len(app.get("plotly_chart")) == 2
    apart = next(table.value for table in app.dataframe if "edges in one alone" in table.value.columns)
    assert list(apart.iloc[:, 0]) == [*edges.only_a, *edges.only_b]


def test_different_graphs_are_a_sentence_and_the_rest_is_shown() -> None:
    one, other = save(circuit(0), "extract"), save(circuit(0, 2), "extract", seed=1)
    app = compare(one, other)
    assert "different graphs" in text(app) and "scores no nodes or edges" in text(app)
    assert len(app.get("plotly_chart")) == 2 and len(app.get("download_button")) == 2
    app = compare(save(lens_result(), "logit-lens"), save(node_scores(), seed=3))
    assert "found no circuit" in text(app) and len(app.get("plotly_chart")) == 2


def test_edges_are_compared_with_nodes() -> None:
    scores = torch.randn(len(GRAPH), generator=torch.Generator().manual_seed(0))
    app = compare(save(EdgeScores(GRAPH, scores, "x", "logit_diff"), "eap"), save(node_scores()))
    assert "signs are lost" in app.metric[0].help and "one scores nodes and the other edges" in plain(app)


def test_the_comparison_is_downloaded_as_it_is_shown() -> None:
    one, other = save(scored(0)), save(scored(1), "attribution-patching")
    app = compare(one, other, k="2")
    assert [button.proto.label for button in app.get("download_button")] == ["Comparison as CSV", "Comparison as JSON"]
    a, b = runs.get_run(one), runs.get_run(other)
    rows = [*comparing.records(a, b), *agreement(a, b).rows(2)]
    assert json.loads(comparing.to_json(a, b, rows))["a"] == one


@pytest.mark.parametrize("query", [HOSTILE, "../../x", "x" * 10_000, "\x00", ""])
def test_an_address_changed_by_hand_is_taken_as_none(query: str) -> None:
    one, other = save(scored(0)), save(scored(1), seed=1)
    app = compare(query, other)
    assert app.selectbox("compare a").value is None and "Choose two runs" in text(app)
    app = compare(one, other, k=query)
    assert app.query_params["k"] == "10" and app.metric


def test_text_from_a_run_is_never_markup() -> None:
    spoilt = NodeScores((HOSTILE, "m0", "m1"), torch.tensor([3.0, 1, 0]), HOSTILE, HOSTILE, headline={HOSTILE: 1.0})
    task = json.loads((folder(save(scored(0))) / "record.json").read_text())["task"] | {"metric": HOSTILE}
    environment = {HOSTILE: HOSTILE, "versions": {HOSTILE: HOSTILE}}
    one = save(spoilt, seed=1, model_name=HOSTILE, task=task, environment=environment)
    for app in (compare(one, save(scored(0), seed=2)), compare(save(scored(0), seed=2), one), compare(one, one)):
        for element in (*app.markdown, *app.caption, *app.title):
            assert not getattr(element.proto, "allow_html", False)
            assert "<script>" not in element.value
        for table in app.table:
            assert not any("<script>" in str(cell) for cell in table.value.to_numpy().ravel())


@pytest.mark.parametrize(
    "changes", [{"environment": 3}, {"task": {"accuracy": 1.0}}, {"result": 3}, {"environment": {"versions": []}}]
)
def test_a_record_changed_by_hand_never_breaks_the_page(changes: dict[str, Any]) -> None:
    good, bad = save(scored(0)), save(scored(1), seed=1)
    edit(bad, **changes)
    for app in (compare(good, bad), compare(bad, good)):
        assert "damaged" in text(app)
