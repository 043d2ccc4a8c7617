"""A recipe as one file of Python that needs torch alone: `with steered(model.model.layers[13]): model.generate(...)`.

The file holds the vector that is added, strength and decay, and what was measured of it. It counts positions as
`saes.steering.steer` does, so that text made with it is the text made here.
"""

from __future__ import annotations

import base64
import re
import textwrap
from pathlib import Path
from string import Template

from saes.steering.language_steering import LanguageSteering, searched
from workbench.errors import UserError
from workbench.runs import Run
from workbench.standalone import program

TEMPLATE = Path(__file__).parents[1] / "data" / "steer.txt"


@program.register
def _(result: LanguageSteering, run: Run) -> str:
    """Raises UserError for a recipe that does not add one vector to what a block writes, and where its SAE is another
    by now than the one it was found in."""
    recipe = result.recipe
    block = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", recipe.hook)
    if block is None or (recipe.kind, recipe.scope) != ("add", "all"):
        raise UserError(
            f"a recipe that steers by {recipe.kind} at {recipe.hook}, scope {recipe.scope}, is no file of its own; one "
            "that adds at all positions of what a block writes is."
        )
    vector = recipe.strength * recipe.unit * searched(recipe, run).direction(recipe.latent).float().cpu()
    found = result.table["latent"]
    measured = (("plain", found.plain, found.plain_interval), ("strict", found.strict, found.strict_interval))
    shares = [
        f"{name} success {float(share):.2f} (95 %: {float(bounds[0]):.2f} to {float(bounds[1]):.2f})"
        for name, share, bounds in measured
        if share is not None and bounds is not None
    ]
    return Template(TEMPLATE.read_text()).substitute(
        model=_words(recipe.model), source=_words(recipe.source), target=_words(recipe.target), block=block[1],
        latent=int(recipe.latent), length=f"a vector of length {float(vector.norm()):.4g}", decay=float(recipe.decay),
        told=textwrap.fill(f"Measured: {', '.join(shares)}; {_words(result.definition)}.", 110),
        vector=textwrap.fill(base64.b64encode(vector.contiguous().numpy().tobytes()).decode(), 110),
    )  # fmt: skip


def _words(text: str) -> str:
    """Without what ends the string it stands in: a run that was imported may say anything."""
    return re.sub(r"[^\w .,;:%()/+-]", " ", str(text), flags=re.ASCII)
