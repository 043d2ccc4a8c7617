"""Models and circuits that come with the package, as the very runs that made them: `circuits/data/runs`.

`circuits/data/models.json` gives the models their names. A run of theirs that is asked for again, with its circuits,
figures and provenance, is found and not computed.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from workbench import places, pretrained

DATA = Path(__file__).parents[1] / "data"
LICENCE = "that of the workbench"


def _folder(run: str) -> Path:
    return DATA / "runs" / run / "files" / "model"


def names() -> dict[str, dict[str, str]]:
    """The run that made each model, and a line about it, by the model's name."""
    found: dict[str, dict[str, str]] = json.loads((DATA / "models.json").read_text())
    return found


places.ship(DATA / "runs")
for _name, _entry in names().items():
    pretrained.register(_name, pretrained.Local(partial(_folder, _entry["run"]), _entry["about"], LICENCE))
