"""SAEs by name, and a check of one on real activations.

    a name of `shipped()`      one that comes with the package
    the name of a group        all of it: gemma-3-270m are the wide ones of that model, gemma-3-270m-narrow the others
    train-sae-7009520071fe     those of a run, or one of them: train-sae-7009520071fe/blocks.12.hook_resid_post
    ./folder                   files in SAELens' format
    saelens:gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical
                               anything that SAELens lists: release and id; fetched from the model hub

An SAE that was trained on other activations than those it gets still returns numbers: of another layer, on scaled or
centred ones, or those of a model that was quantised. So every analysis looks at what it makes of some text first
(`fit`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saes.evaluate import by_length, check_fit
from saes.sae import CONFIG, SAE, from_saelens
from workbench import places, texts
from workbench.activations import ActivationStore
from workbench.bases import basis
from workbench.errors import UserError, unknown
from workbench.models import LanguageModel
from workbench.sites import Basis

DATA = Path(__file__).parent / "data"
PREFIX = "saelens:"
CHECKED = 1024  # tokens
WORST = 0.9  # share of variance unexplained above which an SAE is not of these activations


@dataclass(frozen=True)
class Shipped:
    """An SAE that comes with the package; those of a group are of different layers, and can be named together."""

    run: str
    hook: str
    model: str
    group: str
    about: str


@cache
def shipped() -> dict[str, Shipped]:
    """The SAEs that come with the package, by name."""
    return {name: Shipped(**entry) for name, entry in json.loads((DATA / "saes.json").read_text()).items()}


def _register() -> None:
    places.ship(DATA / "runs")
    groups: dict[str, list[str]] = {}
    for name, one in shipped().items():
        places.alias(name, f"{one.run}/{one.hook}")
        groups.setdefault(one.group, []).append(f"{one.run}/{one.hook}")
    for group, specs in groups.items():
        places.alias(group, *specs)


_register()


def load(spec: str) -> dict[str, SAE]:
    """SAEs by hook point. Raises UserError for names and files that there are not."""
    if not spec:
        raise UserError("no SAE is named; give the id of a run of train-sae, or a folder.")
    if spec.startswith(PREFIX):
        sae = _from_saelens(spec.removeprefix(PREFIX))
        return {sae.hook: sae}
    found: dict[str, SAE] = {}
    for one in (places.behind(spec) or spec).split(","):
        found |= _load(one)
    return found


def _load(spec: str) -> dict[str, SAE]:
    if spec.startswith((".", "/", "~")):
        folder, which = Path(spec).expanduser(), ""
    else:
        run, _, which = spec.partition("/")
        found = places.folder_of(run)
        if found is None:
            some = (one for one in places.names() if one.startswith("train-sae"))
            raise unknown("SAE", spec, [*shipped(), *dict.fromkeys(one.group for one in shipped().values()), *some])
        folder = found / "files"
    if (folder / CONFIG).is_file():
        sae = SAE.load(folder)
        return {sae.hook: sae}
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if not inside:
        raise UserError(f"{folder} holds no SAE: no {CONFIG} in it or in a folder below.")
    if which:
        if which not in [one.name for one in inside]:
            raise unknown(f"SAE of {spec.partition('/')[0]}", which, [one.name for one in inside])
        inside = [folder / which]
    return {sae.hook: sae for sae in map(SAE.load, inside)}


def fit(model: LanguageModel, store: ActivationStore | None, sae: SAE, text: str = "parallel") -> dict[str, float]:
    """What an SAE makes of this model's activations on some text: l0, fvu, mean length of the activations. Without a
    store they are computed.

    Raises UserError, in a sentence, if it is of another hook point, another width, or other activations.
    """
    hook = sae.hook
    check_fit(model, sae, hook)
    some = texts.sequences(texts.load(text), model, 32, CHECKED)
    x, y = (torch.cat([row[1:] for row in found]) for found in _both(model, store, sae, some))
    with torch.no_grad():
        latents = sae.encode(x)
        fvu = float((sae.decode(latents) - y).square().sum() / (y - y.mean(0)).square().sum())
    l0 = float((latents != 0).sum(-1).float().mean())
    size = float(x.norm(dim=-1).mean())
    if not fvu < WORST or l0 == 0:
        of = sae.about.get("model_name")
        raise UserError(
            f"on {hook} of {model.name} the SAE leaves {fvu:.0%} of the variance unexplained with {l0:.1f} latents "
            f"active (activations are {size:.3g} long): it was trained on others"
            + (f", those of {of}" if of and of != model.name else "")
            + "; load the model and hook point that it is of."
        )
    return {"l0": l0, "fvu": fvu, "length": size}


def _both(
    model: LanguageModel, store: ActivationStore | None, sae: SAE, some: list[Int[Tensor, " pos"]]
) -> tuple[list[Tensor], list[Tensor]]:
    out = sae.hook_out
    hooks = list(dict.fromkeys([sae.hook, out]))
    if store is not None:
        found = store.get(model, some, hooks)
        return found[sae.hook], found[out]
    runs = [model.run(rows, capture=hooks, logits="none") for rows in by_length(some, CHECKED)]
    x, y = ([row for run in runs for row in run[hook]] for hook in (sae.hook, out))
    return x, y


@cache
def _from_saelens(name: str) -> SAE:
    from sae_lens import SAE as LensSAE  # seconds to import

    release, _, id = name.partition("/")
    try:
        lens = LensSAE.from_pretrained(release, id)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"SAELens cannot load {name} ({error}); name a release and an id of its list.") from error
    config: dict[str, Any] = lens.cfg.to_dict()
    return from_saelens(config, {key: x.detach() for key, x in lens.state_dict().items()}, name)


@basis("sae")
def sae_basis(model: LanguageModel, argument: str) -> dict[str, Basis]:
    """SAEs by name: `sae:train-sae-...`, `sae:./folder`. Transcoders are no basis: they write elsewhere."""
    if not argument:
        raise UserError("sae needs a name, such as sae:./folder or sae:train-sae-7009520071fe.")
    found: dict[str, Basis] = {}
    for hook, sae in load(argument).items():
        if sae.transcoder:
            raise UserError(f"{argument} is a transcoder, which reads at {hook} and writes elsewhere; give an SAE.")
        fit(model, None, sae)
        found[hook] = replace(sae.to(model.device, model.dtype))
    return found
