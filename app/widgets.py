"""Parts that pages share. Text that comes from a run, a model or the address bar is never rendered as markup."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import streamlit as st
from plotly.graph_objects import Figure

from workbench import canvas, jobs, places, pretrained, runs, texts
from workbench.errors import UserError
from workbench.runs import Run

# What reading a record that was changed by hand may raise.
BROKEN = (
    KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration, RuntimeError, ArithmeticError,
)  # fmt: skip


def models(key: str, first: str | None, **more: Any) -> str:
    """Those of this machine; another can be typed."""
    names = [*pretrained.EMBEDDED, *pretrained.local()]
    at = names.index(first) if first in names else None
    help = "An embedded model, a name of the model hub, or the id of a run that trained one."
    return str(st.selectbox("model", names, index=at, key=key, accept_new_options=True, help=help, **more) or "")


def no_paths(given: Mapping[str, Any]) -> None:
    """Raises UserError for values that are paths, which are for the terminal, and for a model that is not chosen."""
    for name, value in given.items():
        if any(part.strip().startswith(texts.PATHS) for part in re.split("[:,]", str(value))):
            raise UserError(f"{name}={value!r} is a path, and the app opens none; start this one in a terminal.")
    if given.get("model") == "":
        raise UserError("no model is chosen; pick one, or type the id of a run that trained one.")


def refusal(sentence: str) -> None:
    """Say in one sentence what is wrong."""
    sentence = sentence[:1].upper() + sentence[1:]
    with st.container(border=True):
        st.text(sentence if len(sentence) <= 600 else sentence[:600] + "…")


def damaged(run: Run, error: Exception) -> UserError:
    why = f"{type(error).__name__}: {error}"
    return UserError(f"run {run.id} is damaged ({why}); delete {run.folder} and run it again.")


@contextmanager
def whole(run: Run | None) -> Iterator[None]:
    """Whatever reading a record that was changed by hand raises is a sentence about the run."""
    try:
        yield
    except UserError:
        raise
    except BROKEN as error:
        if run is None:
            raise
        raise damaged(run, error) from error


def listing() -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each readable run, newest first, and a sentence for each other one."""
    # A run never changes once it is there, so a folder's own time tells whether there are others.
    return _listing(tuple((str(root), root.stat().st_mtime_ns) for root in places.roots()))


@st.cache_data(max_entries=2, show_spinner=False)
def _listing(changed: tuple[tuple[str, int], ...]) -> tuple[list[dict[str, Any]], list[str]]:
    found, sentences = runs.all_runs()
    rows = []
    for run in found:
        try:
            rows.append(_row(run))
        except BROKEN as error:
            sentences.append(str(damaged(run, error)))
    return sorted(rows, key=lambda row: row["created"], reverse=True), sorted(sentences)


def _row(run: Run) -> dict[str, Any]:
    record = run.record
    return {
        "run": run.id,
        "analysis": str(record["key"]["analysis"]),
        "model": str(record["model_name"]),
        "task": str(record["key"].get("task", "")),
        "n": int(record["key"]["n"]) if "n" in record["key"] else None,
        "accuracy": 100 * float(record["task"]["accuracy"]) if "task" in record["key"] else None,
        "top heads": _top_heads(record["summary"]),
        "seconds": float(record["cost"]["seconds"]),
        "created": datetime.fromisoformat(record["created"]),
    }


def _top_heads(summary: Mapping[str, Any]) -> str:
    if "top_heads" in summary:
        names, scores = zip(*summary["top_heads"][:3], strict=True)
        return "   ".join(f"{name} {score}" for name, score in zip(names, canvas.numbers(scores), strict=True))
    return "   ".join(item["head"] for item in summary.values() if isinstance(item, dict) and "head" in item)


def plain(text: str) -> str:
    """Text that reads the same when it is rendered as Markdown.

    Escapes do not keep bare addresses from becoming links, nor :names: from becoming icons; a word joiner, which is
    not seen, does.
    """
    text = re.sub(r"(?<=[:@])(?=\S)|(?<=www)(?=\.)", "\u2060", text, flags=re.IGNORECASE)
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def literal(text: str) -> str:
    """Text as Markdown code, quotes and white space shown."""
    shown = json.dumps(text, ensure_ascii=False)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence} {shown} {fence}"


def verbatim(text: str) -> None:
    """A text as it is; white space at its ends, which Streamlit takes away, as signs."""
    inner = text.strip()
    before, _, after = text.partition(inner) if inner else ("", "", text)
    signs = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})
    st.code(before.translate(signs) + inner + after.translate(signs), language=None, wrap_lines=True)


def several(answers: Sequence[str]) -> str:
    """The first answers as Markdown code, and how many more there are."""
    more = f" and {len(answers) - 6} more" if len(answers) > 6 else ""
    return " ".join(literal(answer) for answer in answers[:6]) + more


def chart(figure: Figure, key: str, select: bool = False) -> str | None:
    """Draw a figure; with `select`, what a clicked point is called."""
    dark = st.context.theme.type == "dark"
    figure = canvas.written_in(figure, "#f2f4f6" if dark else "#1c2127")
    config = {"displaylogo": False, "modeBarButtons": [["toImage"]]}
    if not select:
        st.plotly_chart(figure, key=key, config=config)
        return None
    event = st.plotly_chart(figure, key=key, config=config, on_select="rerun", selection_mode="points")
    named = [point["customdata"] for point in event.selection.points if point.get("customdata")]
    return str(named[0] if isinstance(named[0], str) else named[0][0]) if named else None


def computed(analysis: str, on: Mapping[str, Any], why: str, label: str) -> Any:
    """The result of an analysis, or what has to be pressed to have it."""
    found = runs.find(analysis, **on)
    if found is not None:
        return found.result
    st.markdown(plain(why))
    words = ["run", analysis, *(f"--{name.replace('_', '-')}={value}" for name, value in on.items())]
    if str(on.get("model", "")).startswith(texts.PATHS):
        st.markdown("Its model is a folder, and the app opens none; start this in a terminal:")
        st.code(shlex.join(["wb", *words]), language="bash", wrap_lines=True)
    else:
        start(words, label)
    return None


def start(words: Sequence[str], label: str) -> None:
    """A button that starts a command as a job; while it runs, how far it is. The page is drawn again when it ends."""
    command, key = "wb " + " ".join(words), f"job of {' '.join(words)}"
    id = st.session_state.get(key)
    if id is None:
        if st.button(label, key=f"start {key}", type="primary", icon=":material/play_arrow:", help=plain(command)):
            st.session_state[key] = jobs.start(list(words)).id
            st.rerun()
        return

    active = jobs.get(id).state not in jobs.ENDED

    @st.fragment(run_every=1.0 if active else None)
    def live() -> None:
        job = jobs.get(id)
        if job.state == "done":
            del st.session_state[key]
        if job.state == "done" or (active and job.state in jobs.ENDED):
            st.rerun()  # the whole page, which is no longer polled then
        if job.why:
            refusal(job.why)
        for stage in job.stages:
            st.progress(stage.share or 0.0, plain(str(stage)))
        if not job.stages and job.state not in jobs.ENDED:
            st.progress(0.0, "starting")
        st.page_link("views/job.py", label="Its job", icon=":material/settings:", query_params={"job": id})

    live()
