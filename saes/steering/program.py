"""A recipe as one file of Python that needs torch alone: `with steered(model.model.layers[13]): model.generate(...)`.

The file holds the vector that is added, strength and decay, and what was measured of it. It counts positions as
`saes.steering.steer` does, so that text made with it is the text made here.
"""

from __future__ import annotations

import base64
import re
import textwrap
from string import Template

from saes.pretrained import load
from saes.steering.language_steering import LanguageSteering
from workbench.errors import UserError
from workbench.standalone import program

_FILE = Template('''\
"""Steers $model from $source to $target: adds $length to what block $block writes, at every position but the first.

$told

    model = AutoModelForCausalLM.from_pretrained(...)  # $model, with transformers
    with steered(model.model.layers[$block]):  # of GPT-2 model.transformer.h[$block]
        model.generate(**tokenizer("I think that", return_tensors="pt"), do_sample=True, temperature=0.5)

Rows of one length, without padding, and with a cache: one pass over the prompt, and one for each new token.
"""

import base64
from contextlib import contextmanager

import torch

DECAY = $decay  # what is left of it from one new token to the next
VECTOR = torch.frombuffer(  # latent $latent of an SAE, times its strength there; float32
    bytearray(base64.b64decode("""
$vector
""")),
    dtype=torch.float32,
)


@contextmanager
def steered(block, strength=1.0):
    """Steer while inside; strength: of what was measured, 0 changes nothing."""
    place = prompt = 0  # of the next token; where the new ones begin

    def hook(module, inputs, output):
        nonlocal place, prompt
        x = output[0] if isinstance(output, tuple) else output
        if x.shape[1] > 1 or not place:
            place, prompt = 0, x.shape[1]
        places = torch.arange(place, place + x.shape[1], device=x.device)
        place += x.shape[1]
        factor = strength * DECAY ** (places - prompt + 1).clamp(min=0) * (places > 0)
        changed = x + factor[:, None].to(x.dtype) * VECTOR.to(x)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
''')


@program.register
def _(result: LanguageSteering) -> str:
    """Raises UserError for a recipe that does not add one vector to what a block writes."""
    recipe = result.recipe
    block = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", recipe.hook)
    if block is None or (recipe.kind, recipe.scope) != ("add", "all"):
        raise UserError(
            f"a recipe that steers by {recipe.kind} at {recipe.hook}, scope {recipe.scope}, is no file of its own; one "
            "that adds at all positions of what a block writes is."
        )
    vector = recipe.strength * recipe.unit * load(recipe.sae)[recipe.hook].direction(recipe.latent).float().cpu()
    found = result.table["latent"]
    measured = (("plain", found.plain, found.plain_interval), ("strict", found.strict, found.strict_interval))
    shares = [
        f"{name} success {float(share):.2f} (95 %: {float(bounds[0]):.2f} to {float(bounds[1]):.2f})"
        for name, share, bounds in measured
        if share is not None and bounds is not None
    ]
    return _FILE.substitute(
        model=_words(recipe.model), source=_words(recipe.source), target=_words(recipe.target), block=block[1],
        latent=int(recipe.latent), length=f"a vector of length {float(vector.norm()):.4g}", decay=float(recipe.decay),
        told=textwrap.fill(f"Measured: {', '.join(shares)}; {_words(result.definition)}.", 110),
        vector=textwrap.fill(base64.b64encode(vector.contiguous().numpy().tobytes()).decode(), 110),
    )  # fmt: skip


def _words(text: str) -> str:
    """Without what ends the string it stands in: a run that was imported may say anything."""
    return re.sub(r"[^\w .,;:%()/+-]", " ", str(text), flags=re.ASCII)
