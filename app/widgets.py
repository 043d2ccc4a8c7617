"""Parts that pages share. Text that comes from a run, a model or the address bar is never rendered as markup."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import streamlit as st

from workbench import runs, settings
from workbench.errors import UserError
from workbench.runs import Run

# What reading a record that was changed by hand may raise.
BROKEN = (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration, RuntimeError)


def refusal(sentence: str) -> None:
    """Say in one sentence what is wrong."""
    with st.container(border=True, key="refusal"):
        st.markdown(":material/error: **This cannot be shown.**")
        st.text(sentence if len(sentence) <= 600 else sentence[:600] + "…")


def damaged(run: Run, error: Exception) -> UserError:
    return UserError(
        f"run {run.id} is damaged ({type(error).__name__}: {error}); delete {run.folder} and run it again."
    )


def listing() -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each readable run, newest first, and a sentence for each other one."""
    root = settings.home() / "runs"
    # A run never changes once it is there, so the folder's own time tells whether there are others.
    return _listing(str(root), root.stat().st_mtime_ns) if root.is_dir() else ([], [])


@st.cache_data(max_entries=2, show_spinner=False)
def _listing(root: str, changed: int) -> tuple[list[dict[str, Any]], list[str]]:
    rows, sentences = [], []
    for folder in (settings.home() / "runs").glob("[!.]*"):
        try:
            run = runs.get_run(folder.name)
            try:
                rows.append(_row(run))
            except BROKEN as error:
                raise damaged(run, error) from error
        except UserError as error:
            sentences.append(str(error))
    return sorted(rows, key=lambda row: row["created"], reverse=True), sorted(sentences)


def _row(run: Run) -> dict[str, Any]:
    record = run.record
    return {
        "run": run.id,
        "analysis": str(record["key"]["analysis"]),
        "model": str(record["model_name"]),
        "task": str(record["key"]["task"]),
        "n": int(record["key"]["n"]),
        "accuracy": float(record["task"]["accuracy"]),
        "top heads": _top_heads(record["summary"]),
        "seconds": float(record["cost"]["seconds"]),
        "created": datetime.fromisoformat(record["created"]),
    }


def _top_heads(summary: Mapping[str, Any]) -> str:
    if "top_heads" in summary:
        return "   ".join(f"{name} {number(score)}" for name, score in summary["top_heads"][:3])
    named = [f"{name} {item['head']}" for name, item in summary.items() if isinstance(item, dict) and "head" in item]
    return "   ".join(named)


def plain(text: str) -> str:
    """Text that reads the same when it is rendered as Markdown."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def literal(text: str) -> str:
    """Text as Markdown code, quotes and white space shown."""
    shown = json.dumps(text, ensure_ascii=False)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence} {shown} {fence}"


def number(value: float, *, signed: bool = True) -> str:
    """Three significant digits, and a true minus."""
    if not math.isfinite(value):
        return "–"
    digits = 2 if abs(value) >= 1 or not value else min(6, 2 - math.floor(math.log10(abs(value))))
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")
