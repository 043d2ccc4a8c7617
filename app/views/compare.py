"""Two runs side by side: what decides each, their numbers, their scores and their circuits. a is the baseline, and a
difference is b minus a. Addressed by ?a=<id>&b=<id>."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from app import widgets
from circuits import comparing_circuits, judging
from circuits.comparing_circuits import Agreement, Shared
from workbench import canvas, comparing, plots, runs
from workbench.comparing import Row
from workbench.errors import UserError
from workbench.runs import Run

SIDES = {"a": "a, the baseline", "b": "b"}
FIRST = 10  # parts that circuits of the first size shown have
ROWS = 11  # of a table before it scrolls
NUMBER = st.column_config.NumberColumn(format="%.4g")
NUMBERS = dict.fromkeys(("a", "b", "b − a", "low", "high"), NUMBER)


@st.cache_data(max_entries=2, show_spinner=False)
def labels(rows: list[dict[str, Any]]) -> dict[str, str]:
    """What each run is called in the lists; the end of its id tells those apart that differ in parameters."""
    found = {}
    for row in rows:
        prompts = [] if row["n"] is None else [f"n {row['n']}"]
        seed = runs.get_run(row["run"]).record["key"].get("seed")
        date = f"{row['created']:%-d %b %Y, %H:%M}"
        parts = [row["analysis"], row["model"], row["task"], *prompts, f"seed {seed}", date, row["run"][-6:]]
        found[row["run"]] = " · ".join(part for part in parts if part)
    return found


def follow(side: str) -> None:
    """Into the address, which alone decides what is shown: a link to this page may change it at any time."""
    st.query_params[side] = st.session_state[f"compare {side}"]


def swap() -> None:
    given = {side: st.query_params.get(side) for side in SIDES}
    for side, other in (("a", given["b"]), ("b", given["a"])):
        if other is None:
            st.query_params.pop(side, None)
        else:
            st.query_params[side] = other


def chosen(names: dict[str, str]) -> list[Run | None]:
    left, right = st.columns([8, 1], vertical_alignment="center")
    found: list[Run | None] = []
    for side, words in SIDES.items():
        given = st.query_params.get(side, "")
        st.session_state[f"compare {side}"] = given if given in names else None
        id = left.selectbox(
            words, list(names), index=None, key=f"compare {side}", format_func=lambda id: names[id],
            placeholder="choose a run", on_change=follow, args=(side,),
        )  # fmt: skip
        found.append(None if id is None else runs.get_run(id))
    right.button("Swap", key="compare swap", icon=":material/swap_vert:", on_click=swap, width="stretch")
    return found


def sentence(error: UserError) -> None:
    """What cannot be compared, in its place: the rest can be."""
    st.text(str(error)[:1].upper() + str(error)[1:])


def table(columns: dict[str, Sequence[Any]], height: int = ROWS) -> None:
    """Words and numbers; nothing in it is rendered as markup."""
    n = len(next(iter(columns.values())))
    st.dataframe(
        columns,
        hide_index=True,
        height=36 * (min(n, height) + 1) + 2,
        row_height=36,
        placeholder="",
        column_config=NUMBERS,
    )


def numbers(rows: Sequence[Row]) -> None:
    columns: dict[str, Sequence[Any]] = {
        "number": [row.name for row in rows], "a": [row.a for row in rows], "b": [row.b for row in rows],
        "b − a": [row.difference for row in rows],
    }  # fmt: skip
    why = {row.how for row in rows}
    if any(row.low is not None for row in rows) or len(why) > 1:
        ends = {"low": [row.low for row in rows], "high": [row.high for row in rows]}
        columns |= ends | {"95 % interval of the difference": [row.how for row in rows]}
        why = set()
    table(columns)
    for sentence in filter(None, why):
        st.caption(widgets.plain(f"{sentence[:1].upper()}{sentence[1:]}."))


# ---- what decides the results ----


def decides(a: Run, b: Run) -> None:
    st.subheader("What decides the result", anchor=False)
    for sentence in comparing.cautions(a, b):
        st.caption(widgets.plain(sentence))
    found = comparing.differences(a.record["key"], b.record["key"])
    if found.different:
        folded(found)
    else:
        st.markdown("Nothing differs.")
    if found.same:
        same = " · ".join(f"{name} {value}" for name, value in found.same.items())
        st.caption(f"same: {widgets.plain(same)}")
    around = comparing.differences(a.record["environment"], b.record["environment"])
    if around.different:
        with st.expander("What it may also depend on", icon=":material/history:"):
            folded(around)


def folded(found: comparing.Differences) -> None:
    columns = zip(*found.different, strict=True)
    cells = {title: list(map(widgets.plain, column)) for title, column in zip(("", "a", "b"), columns, strict=True)}
    st.table(cells, border="horizontal", hide_index=True)


# ---- numbers ----


def figures(a: Run, b: Run) -> None:
    st.subheader("Numbers", anchor=False)
    rows = comparing.task_figures(a, b)
    if rows:
        numbers(rows)
    else:
        st.caption("One of the two has no task, so there are no figures of one to compare.")
    found = comparing.headline(a, b)
    if found:
        numbers(found)
        st.caption(
            "Of the summaries. They hold no values per prompt, so that no interval of these differences can be had."
        )
    texts = comparing.definitions(a, b)
    for side, text in zip(SIDES if len(texts) > 1 else ["Both"], texts, strict=True):
        st.markdown(f"**{side}:** {widgets.plain(text or 'its summary does not say what its numbers are')}")


# ---- scores ----


def scores(a: Run, b: Run) -> list[Row]:
    st.subheader("Scores", anchor=False)
    found = comparing_circuits.agreement(a, b)
    correlations(found)
    n, k = len(found.names), size(len(found.names))
    left, right = st.columns([3, 2], gap="large")
    with left:
        widgets.chart(comparing_circuits.scatter(found, k), key="compare scatter")
        notes = [f"the {comparing_circuits.DRAWN:,} largest of {n:,} are drawn"] if n > comparing_circuits.DRAWN else []
        notes += [f"{found.lost:,} without a finite score in both are left out"] if found.lost else []
        for side, names in (("a", found.only_a), ("b", found.only_b)):
            notes += [f"{len(names):,} that {side} alone scores are left out"] if names else []
        if notes:
            st.caption(f"Of {found.level}, {'; '.join(notes)}.")
    with right:
        overlap(found.overlap(k), f"the {k:,} of largest absolute score")
    changes(found)
    return found.rows(k)


def size(n: int) -> int:
    """How many parts of largest score are held against each other; the slider needs more than one choice."""
    if n == 1:
        return 1
    steps, given = judging.ladder(n), st.query_params.get("k", "")
    first = min(steps, key=lambda step: abs(step - FIRST))
    at = int(given) if given.isdecimal() and int(given) in steps else first
    k = int(st.select_slider("k, how many of largest score", steps, at, key="compare k", format_func="{:,}".format))
    st.query_params["k"] = str(k)
    return k


def correlations(found: Agreement) -> None:
    words = "Edges stand for their nodes, so that signs are lost. " if found.absolute else ""
    for column, (label, value, about) in zip(
        st.columns(3),
        (
            ("Pearson r", found.pearson, f"{words}Of the scores."),
            ("Spearman ρ", found.spearman, f"{words}Of the scores' ranks."),
            ("Spearman ρ, absolute", found.ranks, "Of the ranks of absolute scores, as in compare and reuse."),
        ),
        strict=True,
    ):
        shown = "not defined" if value is None else canvas.number(value, 3, signed=False)
        column.metric(label, shown, help=f"{about} Over {len(found.names):,} {found.level} that both score.")


def overlap(found: Shared, words: str) -> None:
    """Both sets beside chance, and what is in one alone."""
    left, right = st.columns(2)
    either = len(found.both) + len(found.only_a) + len(found.only_b)
    about = f"Of {words}: {len(found.both):,} in both of {either:,} in either."
    left.metric(f"Jaccard, {found.level}", canvas.number(found.jaccard, 3, signed=False), help=about)
    right.metric(
        "by chance", canvas.number(found.expected, 3, signed=False),
        help=f"What random sets of these sizes have on average, of all {found.total:,} {found.level}. "
        f"As many are shared with probability {found.p:.2g}.",
    )  # fmt: skip
    st.caption(
        f"Drawn anew with as many of each kind (heads of a layer, edges into the queries of a layer), random sets have "
        f"{canvas.number(found.alike, 3, signed=False)}; as many are shared with probability {found.p_alike:.2g}."
    )
    apart = [(name, "a") for name in found.only_a] + [(name, "b") for name in found.only_b]
    if apart:
        table({f"{found.level} in one alone": [name for name, _ in apart], "in": [side for _, side in apart]}, 8)
    else:
        st.caption(f"No {found.level} are in one alone.")


def changes(found: Agreement) -> None:
    rows = found.changes()
    if not rows:
        st.caption(f"No differences are taken: {widgets.plain(found.why)}.")
        return
    columns: dict[str, Sequence[Any]] = {
        found.level: [row.name for row in rows], "a": [row.a for row in rows], "b": [row.b for row in rows],
        "b − a": [row.difference for row in rows],
    }  # fmt: skip
    if found.change is None:
        table(columns)
        st.caption(f"Without intervals: {widgets.plain(found.why)}.")
        return
    table(columns | {"low": [row.low for row in rows], "high": [row.high for row in rows]})
    outside = sum(not (row.low or 0.0) <= 0 <= (row.high or 0.0) for row in rows)
    st.caption(
        f"low and high: 95 % of the difference by a paired t over {widgets.plain(found.why)}, of each by itself. "
        f"{outside:,} of {len(rows):,} intervals leave out 0; where nothing differs one in twenty would."
    )


# ---- circuits ----


def circuits(a: Run, b: Run) -> list[Row]:
    st.subheader("Circuits", anchor=False)
    rows = []
    for column, found in zip(st.columns(2, gap="large"), comparing_circuits.overlaps(a, b), strict=True):
        with column:
            overlap(found, f"the {found.level} of both circuits")
        rows += found.rows("circuits")
    return rows


def drawn(a: Run, b: Run) -> None:
    st.subheader("Both figures", anchor=False)
    for column, side, run in zip(st.columns(2), SIDES, (a, b), strict=True):
        with column:
            st.page_link("views/run.py", label=f"{side}: {widgets.plain(run.id)}", query_params={"run": run.id})
            try:
                widgets.chart(plots.figure(run.result), key=f"compare figure {side}")
                st.caption(widgets.plain(plots.definition(run.result)))
            except UserError as error:
                sentence(error)


def show(a: Run, b: Run) -> None:
    decides(a, b)
    figures(a, b)
    rows = comparing.records(a, b)
    for part in (scores, circuits):
        try:
            rows += part(a, b)
        except UserError as error:
            sentence(error)
    drawn(a, b)
    st.subheader("Take it along", anchor=False)
    left, right = st.columns(2)
    for column, kind, text in (
        (left, "csv", comparing.to_csv(a, b, rows)),
        (right, "json", comparing.to_json(a, b, rows)),
    ):
        name = f"{a.id}--{b.id}.{kind}"
        column.download_button(
            f"Comparison as {kind.upper()}", text, name, key=f"compare {kind}", icon=":material/download:",
            on_click="ignore", width="stretch",
        )  # fmt: skip


st.title("Compare", anchor=False)
rows, _ = widgets.listing()
if len(rows) < 2:
    raise UserError(f"there are {len(rows)} runs, and two are needed; start one from its form, under Start.")
a, b = chosen(labels(rows))
if a is None or b is None:
    st.caption("Choose two runs. a is the baseline: differences are b minus a.")
else:
    try:
        show(a, b)
    except UserError:
        raise
    except widgets.BROKEN as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"one of {a.id} and {b.id} is damaged ({why}); open each to see which.") from error
