"""`wb run train-sae`: train SAEs of a model on a text, several from one pass, and say how good they are.

They are left in the run's folder, one for each hook point, in SAELens' format: `sae:RUN` as a basis, or
`SAE.load(run.files / "blocks.12.hook_resid_post")`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saes.evaluate import Quality, plain_loss, quality
from saes.objectives import LARGEST, Architecture, Spec
from saes.sae import SAE
from saes.train import Place, Progress, Training, Units
from workbench import sites, texts
from workbench.activations import ActivationStore, capture
from workbench.errors import UserError, unknown
from workbench.models import LanguageModel
from workbench.registry import analysis

FIRST = 1  # positions of a sequence that are left out: there activations are many times larger, and know nothing
MEASURED = 2**14  # tokens on which scales are taken, and as many held-out ones for the quality, if there are
WINDOW = 2**17  # rows among which the stream shuffles


@dataclass(frozen=True)
class SaeTraining:
    """How training went, and what came of it; SAEs by hook point.

    curves   by name: step, loss and its parts (in the units of training), l0, dead (share of latents)
    quality  on held-out documents
    about    text, rows, specification, scale
    """

    curves: dict[str, dict[str, Float[Tensor, " point"]]]
    quality: dict[str, Quality]
    about: dict[str, Any]
    definition: str

    def summary(self) -> dict[str, Any]:
        return {
            **{name: found.summary() for name, found in self.quality.items()},
            "rows": self.about["rows"],
            "definition": self.definition,
        }


@analysis("train-sae", version=3, model="smollm2-135m")
def train_sae(
    model: LanguageModel,
    store: ActivationStore,
    seed: int,
    folder: Path,
    device: str,
    *,
    text: str = texts.HELP,
    hooks: str = "20",
    out: str = "",
    architecture: Architecture = "topk",
    latents: int = 4096,
    k: float = 32.0,
    price: float = 1.0,
    widths: str = "",
    tokens: int = 500_000,
    length: int = 128,
    batch: int = 1024,
    lr: float | None = None,
    bfloat16: bool = False,
    dtype: str = "float16",
) -> SaeTraining:
    """Train SAEs on the activations of a model on a text, one for each hook point, from one pass over the text.

    text          libreoffice-help, parallel, or a file or folder
    hooks         layers, whose residual stream after the block is read, or hook points; separated by commas
    out           for transcoders: the hook point that each writes, in the same order
    architecture  of all of them
    latents       how many each has
    k             active latents of a row (topk, batchtopk, matryoshka)
    price         of an active latent (jumprelu) or of activity (standard)
    widths        of the SAEs inside a matryoshka SAE, rising
    tokens        of the text to train on, each once
    length        of the sequences that the text is cut into
    batch         rows in a step
    lr            largest learning rate; none: 5e-4 times the root of 16384 / latents
    bfloat16      decide in half precision which latents are active; faster, and the values stay exact
    dtype         that the SAEs are kept in: float32, float16 or bfloat16
    """
    places = _places(model, hooks, out)
    whole = texts.load(text)
    rows = texts.sequences(whole.part(held_out=False), model, length, tokens, seed)
    read = list(dict.fromkeys(hook for place in places.values() for hook in (place.hook, place.out)))
    measured = min(MEASURED, max(2 * length, tokens // 8))
    start = store.get(model, rows[: math.ceil(measured / length)], read)
    first = {hook: torch.cat([x[FIRST:] for x in found]) for hook, found in start.items()}
    steps = sum(max(0, len(one) - FIRST) for one in rows) // batch
    if steps < 10:
        raise UserError(f"{tokens:,} tokens are {steps} steps of {batch:,} rows; give more tokens, or smaller batches.")
    spec = Spec(
        architecture, latents, k if k != int(k) else int(k), l1=price, l0=price, price_warm_up=steps // 5,
        widths=tuple(int(one) for one in widths.split(",") if one.strip()), subtract=not out,
        norm=1.0 if architecture in LARGEST else 0.1,  # at 1 the chosen explain half from the start, and few ever die
        selection="bfloat16" if bfloat16 else "float32", dead_after=max(20, min(1000, steps // 10)),
        lr=lr or 5e-4 * (2**14 / latents) ** 0.5, warm_up=min(200, steps // 20), decay=steps // 5,
    )  # fmt: skip
    units = {hook: Units.of(x) for hook, x in first.items()}
    trainings = {
        name: Training(
            spec, place, *(_width(model, hook) for hook in (place.hook, place.out)), steps=steps, seed=seed,
            units=(units[place.hook], units[place.out]), device=device,
        )
        for name, place in places.items()
    }  # fmt: skip
    about = {"text": text, "text_fingerprint": whole.fingerprint, "batch": batch, "length": length, "seed": seed}
    progress = Progress(trainings, folder.with_name("checkpoints"), about | {"model": model.fingerprint})
    with closing(
        store.stream(model, rows, read, rows=batch, window=WINDOW, seed=seed, start=progress.done, skip=FIRST)
    ) as stream:
        progress.run(stream)
    about |= {"rows": steps * batch, "model_name": model.name, "model_fingerprint": model.fingerprint}
    _save(progress, first, folder, dtype, about)
    held_out = texts.sequences(whole.part(held_out=True), model, length, measured, seed)
    return SaeTraining(
        {name: {key: torch.tensor(x) for key, x in curve.items()} for name, curve in progress.curves.items()},
        _quality(model, store, folder, list(trainings), held_out, device),
        about | {"spec": dataclasses.asdict(spec), "seconds": progress.seconds},
        f"on held-out documents of {text}, without the first position of each sequence of {length}; recovered: share "
        "of the loss that zeros would cost",
    )  # fmt: skip


def _save(
    progress: Progress, some: Mapping[str, Float[Tensor, "row d"]], folder: Path, dtype: str, about: Mapping[str, Any]
) -> None:
    """Each SAE in a folder of its own, as SAELens names what it knows of one."""
    for name, training in progress.trainings.items():
        if not (folder / name).exists():
            known = {"dataset_path": about["text"], "context_size": about["length"], **about}
            training.sae(some, **known).save(folder / name, dtype)


def _quality(
    model: LanguageModel,
    store: ActivationStore,
    folder: Path,
    names: Sequence[str],
    rows: Sequence[Int[Tensor, " pos"]],
    device: str,
) -> dict[str, Quality]:
    loss = plain_loss(model, rows)
    return {name: quality(model, store, SAE.load(folder / name, device), rows, loss=loss) for name in names}


def _places(model: LanguageModel, hooks: str, out: str) -> dict[str, Place]:
    """Raises UserError for what the model does not have."""
    names = [_hook(model, one) for one in hooks.split(",")]
    targets = [_hook(model, one) for one in out.split(",")] if out else [None] * len(names)
    if len(targets) != len(names):
        raise UserError(f"there are {len(names)} hook points to read and {len(targets)} to write; give as many.")
    return {name: Place(name, target) for name, target in zip(names, targets, strict=True)}


def _hook(model: LanguageModel, word: str) -> str:
    word = word.strip()
    name = sites.block(int(word), "hook_resid_post") if word.isdecimal() else word
    if name not in model.hook_points:
        raise unknown(f"hook point of {model.name}", name, model.hook_points)
    return name


def _width(model: LanguageModel, hook: str) -> int:
    return capture.shape_at(hook, model.config, 1)[-1]
