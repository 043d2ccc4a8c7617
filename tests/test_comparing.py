"""Comparisons against scipy, sampling and counting: what differs, intervals, overlaps and what chance would give."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from typing import Any

import plotly.graph_objects as go
import pytest
import torch
from scipy import stats

from circuits import comparing_circuits
from circuits.comparing_circuits import agreement, alike_by_chance, by_chance, kinds, overlaps, shared
from circuits.graph import Circuit, EdgeScores, transformer
from circuits.reuse import shared_by_chance
from saes.steering import languages
from tests.test_app import HOSTILE, save
from tests.test_plots import lens_result, node_scores
from workbench import comparing, runs
from workbench.comparing import ABSENT, Row
from workbench.errors import UserError
from workbench.runs import Run
from workbench.scores import NodeScores, rank_agreement

GRAPH = transformer(3, 4)


NUMBERS = itertools.count()


def run(
    result: Any, analysis: str = "patching", seed: int = 0, record: dict[str, Any] | None = None, **key: Any
) -> Run:
    """A run in a folder of its own, with some of its key or record changed."""
    found = runs.get_run(save(result, analysis, seed=next(NUMBERS)))
    changed = {**found.record, **(record or {}), "key": {**found.record["key"], "seed": seed, **key}}
    return Run(found.id, found.folder, changed, True, 0.0, 0)


def scored(values: torch.Tensor, per_prompt: torch.Tensor | None = None, unit: str = "logit_diff") -> NodeScores:
    names = tuple(f"a{i // 4}.h{i % 4}" for i in range(len(values)))
    return NodeScores(names, values, "by hand", unit, per_prompt)


def edge_scores(seed: int) -> EdgeScores:
    generator = torch.Generator().manual_seed(seed)
    return EdgeScores(GRAPH, torch.randn(len(GRAPH), generator=generator), "by hand", "logit_diff")


# ---- what differs ----


def test_differences_are_by_path_and_absent_is_not_none() -> None:
    a = {"seed": 0, "parameters": {"steps": 5, "hook": None}, "list": [1], "flag": True}
    b = {"seed": 1, "parameters": {"steps": 5, "rule": "left"}, "list": [1], "flag": 1}
    found = comparing.differences(a, b)
    assert found.same == {"parameters steps": "5", "list": "[1]"}
    assert found.different == [
        ("seed", "0", "1"), ("parameters hook", "null", ABSENT), ("flag", "true", "1"),
        ("parameters rule", ABSENT, "left"),
    ]  # fmt: skip


def test_cautions_name_code_numerics_and_weights() -> None:
    one = run(node_scores())
    assert comparing.cautions(one, one) == ["Both are the same run."]
    assert comparing.cautions(one, run(node_scores(), seed=1)) == []
    other = run(
        node_scores(), seed=2, record={"environment": {"versions": {"torch": "2.0"}}, "model_name": "else"},
        analysis_version=2, numerics="bfloat16-sdpa-cuda", model="beef",
    )  # fmt: skip
    code, numerics, versions, weights = comparing.cautions(one, other)
    assert "versions 1 and 2" in code and "bfloat16" in numerics and "torch 2.13.0 and 2.0" in versions
    assert "tiny and else" in weights


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({}, "all"), ({"seed": 1}, "none"), ({"task": "induction"}, "none"), ({"task_version": 2}, "unknown"),
        ({"n": 4}, "some"), ({"model": "other"}, "unknown"),
    ],
)  # fmt: skip
def test_prompts_are_the_same_where_task_seed_and_tokenizer_decide_so(changes: dict[str, Any], shared: str) -> None:
    assert comparing.prompts(run(node_scores()), run(node_scores(), **changes)).shared == shared


def test_another_model_has_the_same_prompts_if_none_was_drawn_again() -> None:
    task = run(node_scores()).record["task"] | {"drawn": 5}
    one = run(node_scores(), record={"task": task})
    assert comparing.prompts(one, run(node_scores(), record={"task": task}, model="other")).shared == "all"


# ---- numbers ----


def test_every_number_of_a_summary_has_a_path() -> None:
    summary = {
        "f": 0.5, "n": 3, "yes": True, "none": None, "word": "x", "ends": [0.1, 0.2], "top": [["a0.h1", 2.0]],
        "table": {"eap": {"auc": math.nan}}, "curve": [[1, 0.5], [2, 0.75]], "writers": [["a1.h0", 1.0, 0.25]],
    }  # fmt: skip
    found = comparing.numbers(summary)
    assert math.isnan(found.pop("table eap auc"))
    assert found == {
        "f": 0.5, "n": 3.0, "ends[0]": 0.1, "ends[1]": 0.2, "top a0.h1": 2.0, "curve[0][0]": 1.0, "curve[0][1]": 0.5,
        "curve[1][0]": 2.0, "curve[1][1]": 0.75, "writers a1.h0[0]": 1.0, "writers a1.h0[1]": 0.25,
    }  # fmt: skip


def test_differences_are_from_the_baseline_and_only_of_what_both_have() -> None:
    one, other = (run(scored(torch.tensor([x, 1.0]))) for x in (2.0, 5.0))
    one.record["summary"]["alone"] = 7
    rows = {row.name: row for row in comparing.headline(one, other)}
    assert rows["top_heads a0.h0"] == Row("headline", "top_heads a0.h0", 2.0, 5.0, 3.0)
    assert rows["alone"] == Row("headline", "alone", 7.0, None)
    assert list(rows)[-1] == "alone"


# ---- intervals ----


def test_paired_intervals_are_scipys() -> None:
    x, y = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = comparing.paired(x, y)
    for i in range(3):
        expected = stats.ttest_rel(y[i], x[i]).confidence_interval(0.95)
        assert (float(found.low[i]), float(found.high[i])) == pytest.approx((expected.low, expected.high))
    assert bool(comparing.paired(x[:, :1], y[:, :1]).low.isnan().all())


def test_welch_intervals_are_scipys() -> None:
    x, y = torch.randn(12, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 9, 7)
    x, y = x.double(), y.double()
    given = [(float(z.mean()), float(z.std(correction=0)), len(z)) for z in (x, y)]
    expected = stats.ttest_ind(y, x, equal_var=False).confidence_interval(0.95)
    assert comparing.welch(*given[0], *given[1]) == pytest.approx((expected.low, expected.high))
    assert comparing.welch(1.0, 0.0, 1, 2.0, 1.0, 9) == (None, None)
    assert comparing.welch(1.0, 0.0, 5, 3.0, 0.0, 9) == (2.0, 2.0)


def test_newcombe_is_the_papers_example() -> None:
    """Newcombe 1998, table II, example (a): 56/70 - 48/80, method 10: 0.0524 to 0.3339."""
    assert comparing.newcombe(48 / 80, 80, 56 / 70, 70) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    for hits, n in ((0, 5), (3, 5), (5, 5), (17, 40)):
        assert comparing.wilson(hits / n, n) == pytest.approx(languages.wilson(hits, n), abs=1e-4)


def test_paired_intervals_hold_the_truth_nineteen_times_in_twenty() -> None:
    x, y = torch.randn(2, 4000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = comparing.paired(x, x + y + 0.3)
    inside = ((found.low <= 0.3) & (found.high >= 0.3)).double().mean()
    assert float(inside) == pytest.approx(0.95, abs=0.012)


def test_figures_of_a_task_have_intervals_on_independent_prompts_alone() -> None:
    one, again, other = run(node_scores()), run(node_scores()), run(node_scores(), seed=1)
    for row in comparing.task_figures(one, again):
        assert row.low is row.high is None and "no interval: the same prompts" in row.how and row.difference == 0
    rows = {row.name: row for row in comparing.task_figures(one, other)}
    assert (rows["accuracy"].low, rows["accuracy"].high) == comparing.newcombe(0.8, 5, 0.8, 5)
    assert (rows["logit_diff, clean"].low, rows["logit_diff, clean"].high) == comparing.welch(
        3.25, 0.5, 5, 3.25, 0.5, 5
    )
    task = one.record["task"] | {"metric": "prob_diff"}
    rows = {row.name: row for row in comparing.task_figures(one, run(node_scores(), seed=1, record={"task": task}))}
    assert rows["metric, clean"].difference is None and "different metrics" in rows["metric, clean"].how


# ---- chance ----


@pytest.mark.parametrize(("total", "a", "b"), [(20, 5, 8), (12, 12, 3), (9, 1, 1), (30, 0, 4)])
def test_the_expected_jaccard_index_is_that_of_random_sets(total: int, a: int, b: int) -> None:
    generator = torch.Generator().manual_seed(0)
    names = [f"a0.h{i}" for i in range(total)]
    one, other = torch.zeros(2, total, dtype=torch.bool)
    one[:a] = other[:b] = True
    found = shared("nodes", names, one, other, kinds(names))
    draws = torch.rand(2, 20_000, total, generator=generator).argsort(-1)
    left, right = draws[0] < a, draws[1] < b
    both, either = (left & right).sum(1), (left | right).sum(1)
    index = torch.where(either > 0, both / either.clamp(min=1), 0.0)
    assert found.expected == pytest.approx(float(index.double().mean()), abs=0.004)
    assert found.p == pytest.approx(float((both >= min(a, b)).double().mean()), abs=0.01)
    assert found.alike == pytest.approx(found.expected)  # all are of one kind
    assert found.jaccard == (min(a, b) / max(a, b) if max(a, b) else 0)


def test_chance_within_kinds_is_that_of_reuse() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.rand(2, len(GRAPH), generator=generator) < 0.2
    groups = kinds(GRAPH.names)
    torch.testing.assert_close(
        alike_by_chance(one, other, groups)[:40], shared_by_chance(torch.stack([one, other]), groups)[:40]
    )
    everything = torch.zeros_like(groups)
    counts = by_chance(len(GRAPH), int(one.sum()), int(other.sum()))
    torch.testing.assert_close(alike_by_chance(one, other, everything), counts)
    assert float(counts.sum()) == pytest.approx(1)


def test_kinds_are_layers_ports_and_sites() -> None:
    names = ["a0.h1", "a0.h3", "a1.h1", "m0", "m1", "0.attn.q:3", "0.attn.q:4", "0.mlp.post_act:3"]
    assert kinds(names).tolist() == [0, 0, 1, 2, 2, 3, 3, 4]
    edges = ["input->a0.h1<q>", "m0->a0.h3<q>", "input->a0.h1<k>", "input->m0", "input->m1", "0.attn.v:1->0.attn.q:3"]
    assert kinds(edges).tolist() == [0, 0, 1, 2, 3, 4]


# ---- scores ----


def test_correlations_are_scipys_and_rank_agreement_is_the_workbenchs() -> None:
    one, other = (node_scores(prompts=None), scored(torch.randn(12, generator=torch.Generator().manual_seed(1))))
    found = agreement(run(one), run(other))
    x, y = (torch.tensor([scores.heads()[name] for name in found.names]).double() for scores in (one, other))
    assert found.names == other.nodes and found.only_a == ("m0", "m1", "m2") and found.only_b == ()
    assert found.pearson == pytest.approx(stats.pearsonr(x, y).statistic)
    assert found.spearman == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.ranks == pytest.approx(rank_agreement(one, other))
    assert found.change is None and "no scores per prompt" in found.why


def test_scores_that_are_no_numbers_are_left_out_and_counted() -> None:
    values = torch.tensor([1.0, math.nan, math.inf, 2.0, 3.0])
    found = agreement(run(scored(values)), run(scored(torch.tensor([2.0, 1.0, 1.0, 4.0, 6.0]))))
    assert found.lost == 2 and len(found.names) == 3 and found.pearson == pytest.approx(1)
    with pytest.raises(UserError, match="none has a finite score"):
        agreement(run(scored(values * math.nan)), run(scored(values)))
    flat = agreement(run(scored(torch.ones(4))), run(scored(torch.arange(4.0))))
    assert flat.pearson is flat.spearman is None


def test_changes_over_prompts_are_paired_where_prompts_are_the_same() -> None:
    x, y = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    one, other = scored(x.mean(1), x), scored(y.mean(1), y)
    found = agreement(run(one), run(other, "attribution-patching"))
    first = found.changes()[0]
    i = other.nodes.index(first.name)
    expected = stats.ttest_rel(y[i].double(), x[i].double()).confidence_interval(0.95)
    assert (first.low, first.high) == pytest.approx((expected.low, expected.high))
    assert abs(first.difference) == pytest.approx(float((y - x).mean(1).abs().max()))
    apart = agreement(run(one), run(other, seed=1))
    assert apart.change is None and apart.why == "prompts of two seeds" and apart.changes()[0].low is None
    part = agreement(run(one), run(scored(y.mean(1), y[:, :3]), "code-effects"))
    assert part.change is None and "some of its prompts" in part.why
    units = agreement(run(one), run(scored(y.mean(1), y, "probability")))
    assert units.changes() == [] and "different units" in units.why


def test_the_top_overlap_by_hand() -> None:
    found = agreement(
        run(scored(torch.tensor([5.0, -4, 3, 0, 0, 0]))), run(scored(torch.tensor([-5.0, 0, 2, 4, 0, 0])))
    )
    top = found.overlap(3)
    assert (top.both, top.only_a, top.only_b) == (("a0.h0", "a0.h2"), ("a0.h1",), ("a0.h3",))
    assert top.jaccard == 0.5 and top.total == 6
    # 3 of 6 twice: C(3, i) C(3, 3 - i) / 20 share i.
    assert top.expected == pytest.approx((9 * 1 / 5 + 9 * 2 / 4 + 1 * 3 / 3) / 20)
    assert top.p == pytest.approx(10 / 20)
    assert found.overlap(6).both == top.both  # what scores nothing is in no top


def test_edges_stand_for_nodes_where_one_run_scores_nodes() -> None:
    edges = edge_scores(0)
    found = agreement(run(node_scores()), run(edges, "eap"))
    assert found.absolute and found.level == "nodes" and bool((found.a >= 0).all()) and found.change is None
    assert dict(zip(found.names, found.b.tolist(), strict=True)) == pytest.approx(
        dict(zip(edges.nodes().nodes, edges.nodes().scores.tolist(), strict=True))
    )


def test_what_does_not_correspond_is_a_sentence() -> None:
    with pytest.raises(UserError, match="scores no nodes or edges"):
        agreement(run(node_scores()), run(lens_result(), "logit-lens"))
    other = run(node_scores(n_layers=2), record={"model_name": "else"}, model="beef")
    with pytest.raises(UserError, match="tiny and else are different graphs, of 15 and 10 parts"):
        agreement(run(node_scores()), other)
    same_shape = agreement(run(node_scores()), run(node_scores(), model="beef"))
    assert len(same_shape.names) == 15


def test_the_scatter_has_every_part_once_and_no_markup() -> None:
    spoilt = NodeScores((HOSTILE, "m0", "m1"), torch.tensor([3.0, 1, 0]), "", HOSTILE)
    found = agreement(run(spoilt), run(spoilt))
    fig: go.Figure = comparing_circuits.scatter(found, 1)
    points = {
        text: (x, y) for trace in fig.data[1:] for text, x, y in zip(trace.hovertext, trace.x, trace.y, strict=True)
    }
    assert sorted(points.values()) == [(0, 0), (1, 1), (3, 3)] and "<script>" not in fig.to_json()
    both = next(trace for trace in fig.data if trace.name == "top 1 of both")
    assert tuple(both.x) == (3,)


# ---- circuits ----


def circuit(kept: torch.Tensor, layers: int = 3) -> Circuit:
    return Circuit(transformer(layers, 4), kept, "by hand")


def test_circuits_overlap_by_counting() -> None:
    one, other = torch.rand(2, len(GRAPH), generator=torch.Generator().manual_seed(0)) < 0.05
    a, b = circuit(one), circuit(other)
    nodes, edges = overlaps(run(a, "extract"), run(b, "extract", seed=1))
    for found, left, right in ((nodes, set(a.nodes), set(b.nodes)), (edges, set(a.edges), set(b.edges))):
        assert set(found.both) == left & right and set(found.only_a) == left - right
        assert set(found.only_b) == right - left
        assert found.jaccard == pytest.approx(len(left & right) / len(left | right))
    assert (nodes.total, edges.total) == (15, len(GRAPH))


def test_circuits_of_different_graphs_and_runs_without_are_sentences() -> None:
    every = circuit(torch.ones(len(GRAPH), dtype=torch.bool))
    small = circuit(torch.ones(len(transformer(2, 4)), dtype=torch.bool), 2)
    with pytest.raises(UserError, match="different graphs"):
        overlaps(run(every, "extract"), run(small, "extract", seed=1))
    with pytest.raises(UserError, match="found no circuit"):
        overlaps(run(every, "extract"), run(node_scores()))


# ---- files ----


def test_a_comparison_is_read_back_from_both_files() -> None:
    one, other = run(node_scores()), run(node_scores(), seed=1)
    found = agreement(one, other)
    rows = [*comparing.records(one, other), *found.rows(5), Row("x", HOSTILE, math.nan, "=cmd()")]
    read = json.loads(comparing.to_json(one, other, rows))
    assert (read["a"], read["b"]) == (one.id, other.id) and len(read["rows"]) == len(rows)
    assert read["rows"][-1] == Row("x", HOSTILE, None, "=cmd()")._asdict()
    lines = list(csv.reader(io.StringIO(comparing.to_csv(one, other, rows))))
    assert tuple(lines[0]) == Row._fields and len(lines) == len(rows) + 2
    assert lines[-1][1] == HOSTILE and lines[-1][3] == "'=cmd()"
    seeds = [line[2:4] for line in lines if line[:2] == ["decides", "seed"]]
    assert seeds == [["0", "1"]]
