"""One run: what it found, what the number means, an example, and how to get it again. Addressed by ?run=<id>."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from app import widgets
from circuits import judging
from workbench import bundle, canvas, plots, registry, runs, tables
from workbench.errors import UserError
from workbench.lenses import AttentionResult, LensResult
from workbench.runs import Run
from workbench.scores import NodeScores, every_head

SHOWN_ELSEWHERE = {"top_heads", "definition", "unit", "n_nodes", "metric_by_layer", "top_heads_std"}


def show(run: Run, top: DeltaGenerator) -> None:
    result = run.result
    scores = plots.node_scores(result)
    heading(run, top)
    strip(run)
    widgets.chart(plots.figure(result), key="figure")
    definition(run)
    ways_on(run)
    for table in plots.tables(result):
        st.subheader(table.title, anchor=False)
        cells = {widgets.plain(name): list(map(widgets.plain, column)) for name, column in table.columns.items()}
        st.table(cells, border="horizontal", hide_index=True)
    if isinstance(result, LensResult):
        st.subheader("What the lens reads in the example", anchor=False)
        widgets.chart(plots.token_map(result), key="tokens")
    if isinstance(result, AttentionResult):
        pattern(run, result)
    left, right = st.columns([9, 11], gap="large") if scores else (st.container(), st.container())
    if scores:
        with left:
            nodes(scores)
    with right:
        if "task" in run.record["key"]:
            example(run)
        further(run)
    st.subheader("Run it again", anchor=False)
    st.code(run.record["command"], language="bash", wrap_lines=True)
    provenance(run)


def ways_on(run: Run) -> None:
    """Where else this run can be looked at."""
    has_circuit = judging.has_circuit(run.result) and "task" in run.record["key"]
    ways = [("circuit", "Open as a circuit", "hub", "run")] if has_circuit else []
    ways += [("compare", "Compare with another run", "compare_arrows", "a"), ("export", "Export", "archive", "run")]
    for column, (page, label, icon, name) in zip(st.columns(4), ways, strict=False):
        column.page_link(f"views/{page}.py", label=label, icon=f":material/{icon}:", query_params={name: run.id})
    if (origin := bundle.origin(run)) is not None:
        st.caption(widgets.plain(f"Imported {origin['imported']}; sha256 of its bundle {origin['sha256']}."))


def heading(run: Run, top: DeltaGenerator) -> None:
    key = run.record["key"]
    parts = [run.record["model_name"]] if run.record["model_name"] else []
    parts += [key["task"], f"{key['n']} prompts"] if "task" in key else []
    parts.append(f"seed {key['seed']}")
    defaults = {p.name: p.default for p in registry.get_analysis(key["analysis"]).parameters.values()}
    parts += [f"{name} {value}" for name, value in key["parameters"].items() if value != defaults.get(name)]
    parts.append(f"{datetime.fromisoformat(run.record['created']):%-d %b %Y, %H:%M} UTC")
    with top:
        st.title(widgets.plain(key["analysis"]), anchor=False)
        st.caption(" · ".join(widgets.plain(str(part)) for part in parts))


def strip(run: Run) -> None:
    task, cost = run.record["task"], run.record["cost"]
    figures = of_task(task) if "task" in run.record["key"] else []
    figures += [
        ("seconds", f"{cost['seconds']:.1f}", "When it was computed. Opening it again computes nothing."),
        ("forward passes", f"{cost['forward_passes']:,}", "When it was computed, on top of what was stored already."),
    ]
    for column, (label, value, about) in zip(st.columns([3, 3, 5, 5, 3, 3]), figures, strict=False):
        column.metric(label, value, help=about)


def of_task(task: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """How well the model does the task: label, value and explanation of each number."""
    prompts = f"over {task['n']} prompts"
    metric = widgets.plain(task["metric"])
    return [
        ("accuracy", f"{task['accuracy']:.0%}", f"Share of prompts whose {metric} is above 0, {prompts}."),
        ("top-1", f"{task['top1']:.0%}", f"Share of prompts whose right answer is the likeliest token, {prompts}."),
        *(
            (
                f"{metric}, {side}",
                f"{task[f'{side}_mean']:.2f} ± {task[f'{side}_std']:.2f}".replace("-", "−"),
                f"On the {side} prompts, nothing changed inside the model: mean and standard deviation {prompts}.",
            )
            for side in ("clean", "corrupted")
        ),
    ]


def definition(run: Run) -> None:
    text = plots.definition(run.result) or registry.get_analysis(run.record["key"]["analysis"]).about
    st.markdown(f"**The number:** {widgets.plain(text.removesuffix('.'))}.")


def nodes(scores: NodeScores) -> None:
    """Tables of the strongest heads and MLPs, side by side."""
    tables = [("Heads", plots.ranking(scores, scores.heads(), 10)), ("MLPs", plots.ranking(scores, scores.mlps(), 10))]
    tables = [(title, rows) for title, rows in tables if rows]
    for column, (title, rows) in zip(st.columns(len(tables)), tables, strict=True):
        with column:
            st.subheader(title, anchor=False)
            cells = {"node": [row.node for row in rows], "score": canvas.numbers([row.score for row in rows])}
            if rows[0].error is not None:
                cells["s.e."] = canvas.numbers([row.error or 0.0 for row in rows], signed=False)
            st.table(cells, border="horizontal", hide_index=True)


def example(run: Run) -> None:
    shown = run.record["task"]["example"]
    st.subheader("Example", anchor=False)
    for side in ("clean", "corrupted"):
        st.caption(f"{side} prompt")
        widgets.verbatim(shown[side])
    st.markdown(f"right: {widgets.several(shown['answers'])} &emsp; wrong: {widgets.several(shown['wrong'])}")


def further(run: Run) -> None:
    """Headline numbers that no other part of the page shows."""
    rest = {name: value for name, value in run.summary.items() if name not in SHOWN_ELSEWHERE}
    rest = {name: value for name, value in rest.items() if not isinstance(value, dict | list)}
    if rest:
        st.subheader("Further numbers", anchor=False)
        facts(rest)


def pattern(run: Run, result: AttentionResult) -> None:
    st.subheader("Where one head looks in the example", anchor=False)
    n_layers, n_heads = result.patterns.shape[:2]
    names = every_head(n_layers, n_heads)
    best = run.summary.get("induction", {}).get("head")
    at = names.index(best) if best in names else 0
    name = st.selectbox("head", names, index=at, key="head", width=160)
    widgets.chart(plots.pattern_figure(result, name), key="pattern")


def provenance(run: Run) -> None:
    record = run.record
    with st.expander("Where the number comes from", icon=":material/history:"):
        for column, (title, values) in zip(
            st.columns(3),
            [
                ("What decides the result", record["key"]),
                ("What it may also depend on", record["environment"]),
                ("What it cost", record["cost"]),
            ],
            strict=True,
        ):
            with column:
                st.caption(title)
                facts(values)
        st.caption("Kept in")
        st.code(str(run.folder), language=None, wrap_lines=True)


def facts(values: Mapping[str, Any]) -> None:
    """Names and values as a table, whatever is nested written out."""
    rows = [(widgets.plain(name), widgets.plain(text)) for name, text in tables.flat(values)]
    st.table(
        {"name": [name for name, _ in rows], "value": [text for _, text in rows]},
        border="horizontal",
        hide_index=True,
        hide_header=True,
    )


top = st.container(gap=None)
top.page_link("views/runs.py", label="All runs", icon=":material/arrow_back:")
chosen = st.query_params.get("run", "")
if not chosen:
    raise UserError("no run is chosen; pick one from the list of all runs.")
run = runs.get_run(chosen)
st.set_page_config(page_title=f"{run.id} · Workbench")
with widgets.whole(run):
    show(run, top)
