"""What a notebook shows of a run, a circuit or an SAE that a cell ends with: a few facts, what its number is, and its
figure. IPython alone calls this, by `_ipython_display_`, so it is no requirement of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape

from workbench import plots
from workbench.errors import UserError

_STYLE = "text-align:left;vertical-align:top;padding:.15rem 1.2rem .15rem 0;white-space:pre-wrap"


def show(title: str, facts: Iterable[tuple[str, str]], drawn: Callable[[], object]) -> None:
    """Facts as a table, and below it the figure of what `drawn` gives; a sentence where it gives none. Text is never
    markup."""
    from IPython.display import HTML, display

    rows = "".join(
        f'<tr><td style="{_STYLE};opacity:.7">{escape(name)}</td><td style="{_STYLE}">{escape(value)}</td></tr>'
        for name, value in facts
    )
    try:
        shown = drawn()
        figure, said = plots.figure(shown), plots.definition(shown)
    except UserError as error:
        figure, said = None, str(error)
    display(HTML(f"<b>{escape(title)}</b><table>{rows}</table><p>{escape(said)}</p>"))
    if figure is not None:
        display(figure)
