"""A run for who has no workbench: its figure as a page that needs no server, as a drawing, a notebook, a program.

The page holds all it shows, plotly.js too, and a policy by which the browser asks nothing of any network and runs no
script but its own two. What comes from the run is text in it, never markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
import keyword
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from datetime import datetime
from functools import singledispatch
from html import escape, unescape
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from workbench import canvas, plots, registry, runs, tables
from workbench.errors import UserError
from workbench.runs import Run

INK, DARK_INK = "#1c2127", "#e6e9ec"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src $hashes; \
style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$id</title>
<style>
:root { color-scheme: light dark; --ink: $ink; --faint: #5c6670; --line: #dde2e7; --soft: #f4f6f8; --page: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: $dark; --faint: #9aa4ae; --line: #2c343d; --soft: #1a2027; --page: #101418 } }
body { margin: 2rem auto; max-width: 1100px; padding: 0 1.5rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.75rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
.faint { color: var(--faint); margin: .2rem 0 1.5rem } .tables { display: flex; flex-wrap: wrap; gap: 0 3rem }
.tables > section { min-width: 0; max-width: 100% } .scroll { overflow-x: auto }
.facts { columns: 22rem; column-gap: 3rem } .facts > section { break-inside: avoid; padding-bottom: 1.2rem }
h3 { font-size: .95rem; margin: 0 0 .3rem } footer { margin: 2.5rem 0 }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid var(--line);
  white-space: pre-wrap; overflow-wrap: anywhere }
th { color: var(--faint); font-weight: 500; overflow-wrap: normal }
pre { background: var(--soft); padding: .7rem 1rem; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere }
</style>
</head>
<body>
<h1>$title</h1>
<p class="faint">$caption</p>
<div id="figure" data-name="$id"></div>
<p><b>The number:</b> $definition.</p>
$tables
<h2>Run it again</h2>
<pre>$command</pre>
<h2>Where the number comes from</h2>
<div class="facts">$provenance</div>
<footer class="faint">Run $id, made into a page by mechinterp-workbench $version.</footer>
<script type="application/json" id="drawn">$drawn</script>
<script>$plotly</script>
<script>$boot</script>
</body>
</html>
""")
# With #svg in its address the page gives way to the source of its figure, which is the same each time: plotly.js draws
# names by lot, and here from a sequence.
_BOOT = f"""
const node = document.getElementById("figure"), text = document.getElementById("drawn").textContent;
const dark = matchMedia("(prefers-color-scheme: dark)");
function draw() {{
  const drawn = JSON.parse(dark.matches ? text.replaceAll("{INK}", "{DARK_INK}") : text);
  return Plotly.react(node, drawn.data, drawn.layout, {{
    displaylogo: false, responsive: true, modeBarButtons: [["toImage"]],
    toImageButtonOptions: {{format: "svg", filename: node.dataset.name}} }});
}}
const source = location.hash === "#svg";
let lot = 1;
if (source) Math.random = () => (lot = lot * 48271 % 2147483647) / 2147483647;
const shown = draw();
dark.addEventListener("change", draw);
if (source) shown
  .then(() => Plotly.toImage(node, {{format: "svg", width: 1000, height: node.clientHeight}}))
  .then(url => {{ document.body.textContent = decodeURIComponent(url.slice(url.indexOf(",") + 1)); }});
"""


def page(run: Run, drawn: Any = None) -> str:
    """A page that needs no server, and whose policy lets the browser ask nothing of a network.

    drawn  a circuit of the run, say; None: its result

    Raises UserError for a result that cannot be read, or has no figure.
    """
    key, record = run.record["key"], run.record
    about = registry.get_analysis(key["analysis"]).about  # the first to say if there is none
    result = run.result if drawn is None else drawn
    parts = [record["model_name"], *([key["task"], f"{key['n']} prompts"] if "task" in key else [])]
    parts += [f"seed {key['seed']}", f"{datetime.fromisoformat(record['created']):%-d %b %Y, %H:%M} UTC"]
    figure = canvas.written_in(plots.figure(result), INK)
    figure.update_layout(font_color=INK, modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#7d858f"})
    scripts = {"plotly": get_plotlyjs(), "boot": _BOOT}
    provenance = {
        "The task": record["task"], "What decides the result": key, "What it cost": record["cost"],
        "What it may also depend on": record["environment"],
    }  # fmt: skip
    return _PAGE.substitute(
        hashes=" ".join(f"'sha256-{_hash(text)}'" for text in scripts.values()),
        id=escape(run.id),
        ink=INK,
        dark=DARK_INK,
        title=escape(str(key["analysis"])),
        caption=escape(" · ".join(str(part) for part in parts if part)),
        definition=escape((plots.definition(result) or about).removesuffix(".")),
        tables=_side_by_side(_tables(result)),
        command=escape(record["command"]),
        provenance="".join(
            _table(title, None, list(tables.flat(values))) for title, values in provenance.items() if values
        ),
        version=escape(runs.environment()["versions"]["mechinterp-workbench"]),
        drawn=figure.to_json().replace("<", "\\u003c"),
        **scripts,
    )


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _tables(result: Any) -> list[plots.Table]:
    """What the result is read from: its own tables, and the strongest of the nodes it scores."""
    found = list(plots.tables(result))
    scores = plots.node_scores(result)
    for title, values in (("Heads", scores.heads()), ("MLPs", scores.mlps())) if scores else ():
        if rows := plots.ranking(scores, values, 10) if scores else []:
            columns = {"node": [row.node for row in rows], "score": canvas.numbers([row.score for row in rows])}
            if rows[0].error is not None:
                columns["s.e."] = canvas.numbers([row.error or 0.0 for row in rows], signed=False)
            found.append(plots.Table(title, columns))
    return found


def _side_by_side(tables: Sequence[plots.Table]) -> str:
    shown = [_table(t.title, list(t.columns), list(zip(*t.columns.values(), strict=True))) for t in tables]
    return f'<div class="tables">{"".join(shown)}</div>' if shown else ""


def _table(title: str, header: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> str:
    head = "" if header is None else f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in header)}</tr>"
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f'<section><h3>{escape(title)}</h3><div class="scroll"><table>{head}{body}</table></div></section>'


def drawn(figure: Any) -> str:
    """A figure as SVG, drawn as `svg` does."""
    scripts = f"<script>{get_plotlyjs()}</script><script>{_BOOT}</script>"
    text = figure.to_json().replace("<", "\\u003c")
    return svg(
        f'<!DOCTYPE html><meta charset="utf-8"><body><div id="figure" data-name="figure"></div>'
        f'<script type="application/json" id="drawn">{text}</script>{scripts}'
    )


def svg(text: str) -> str:
    """The figure of a page, as a Chromium or Chrome of this machine draws it. Raises UserError if there is none."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UserError("no Chromium or Chrome was found to draw it; the page's camera button saves it.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.html"
        path.write_bytes(text.encode("utf-8", "replace"))
        command = [browser, "--headless", "--disable-gpu", f"--user-data-dir={folder}/profile", "--no-first-run"]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []  # which it refuses to have as root
        command += ["--window-size=1100,900", "--virtual-time-budget=20000", "--dump-dom", f"{path.as_uri()}#svg"]
        try:
            done = subprocess.run(command, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"{browser} did not draw it ({error}).") from error
    found = re.search(r"<body>\s*(&lt;svg.*&lt;/svg&gt;)\s*</body>", done.stdout.decode("utf-8", "replace"), re.S)
    if found is None:
        raise UserError(f"{browser} did not draw it; the page's camera button saves it.")
    return unescape(found[1])


# ---- a program ----


@singledispatch
def program(result: object, run: Run) -> str:
    """What a run found as one file of Python, which needs no workbench. Raises UserError for what does nothing."""
    raise UserError(f"a {type(result).__name__} is no program; the recipe of a language-steering run is.")


# ---- the notebook ----


def notebook(run: Run) -> str:
    """Opens the bundle it lies in, unpacked; draws and prints the result; asks for the run again.

    Raises UserError for a record that no call can be made of.
    """
    key, record = run.record["key"], run.record
    given = {"model": record["model_name"]} if record["model_name"] else {}
    given |= {name: key[name] for name in ("task", "n") if name in key}
    given |= {"seed": key["seed"], "device": record["environment"].get("device", "cpu")}
    given |= {"dtype": str(key["numerics"]).partition("-")[0]}
    defaults = registry.get_analysis(key["analysis"]).parameters
    # Those at their defaults are left out, as in the command: one may have the name of an argument of the call.
    given |= {name: value for name, value in key["parameters"].items() if value != defaults[name].default}
    for name in given:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise UserError(f"{name!r} is no name of a parameter, so that run {run.id} cannot be asked for again.")
    # What the record says is quoted: a text of its own choice would otherwise be run as a program.
    call = [f"    {key['analysis']!r},", *(f"    {name}={value!r}," for name, value in given.items())]
    cells = [
        ("markdown", ["# A run of the workbench", "", "Unpack the bundle and open this notebook where it lies."]),
        ("code", ["import workbench as wb", "from workbench import bundle, plots", "from workbench.tables import table",
                  "", 'run = bundle.read(".")  # checked, and put among the runs of this machine', "run.summary"]),
        ("code", ["wb.figure(run.result)"]),
        ("code", ["print(plots.definition(run.result))", "for one in plots.tables(run.result):",
                  '    print(f"\\n{one.title}\\n")', "    rows = list(zip(*one.columns.values(), strict=True))",
                  "    print(table(list(one.columns), rows))"]),
        ("markdown", ["Run it again. It is found and not computed, since its key is that of the run above; it is "
                      "computed where that was not imported. In a terminal it is the command that is printed."]),
        ("code", ["print(run.record['command'])", "again = wb.run(", *call, ")",
                  "print(again.id == run.id, again.hit)"]),
    ]  # fmt: skip
    made: list[dict[str, Any]] = [
        {"cell_type": kind, "id": f"c{i}", "metadata": {}, "source": [f"{line}\n" for line in lines[:-1]] + lines[-1:]}
        | ({"execution_count": None, "outputs": []} if kind == "code" else {})
        for i, (kind, lines) in enumerate(cells)
    ]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return json.dumps({"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}, indent=1)
