"""`wb run sparse-train`: train a weight-sparse transformer, or its dense twin, on Python.

The model is left in the run's folder and loaded by the run's id, like any other. The one that a preset gives with
nothing changed is also known as `sparse-tiny`, `sparse-small` or `sparse-gpu`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.sparse import files, shipped
from circuits.sparse.data import train_tokenizer
from circuits.sparse.model import SparseConfig
from circuits.sparse.prune import Pairs
from circuits.sparse.train import PRESETS, Recipe, Trained, Training
from workbench import backend, places, pretrained, registry, runs
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.prompts import sample, split
from workbench.registry import analysis
from workbench.tasks.python_code import TASKS

SOLVED = 0.95  # accuracy on test prompts from which a task counts as solved
JUDGED_ON = 100  # pairs of each task

Preset = Literal["tiny", "small", "gpu"]


@dataclass(frozen=True)
class SparseTraining:
    """How training went, and what came of it.

    curve     one value per evaluation, by name: step, tokens, seconds, loss and held_out_loss (nats per token),
              dead_neurons (share), kurtosis (of the residual stream), density, lr
    accuracy  on the test prompts of each task: how often the right one of the two answers gets more
    weights   nonzero and all of the matrices that are made sparse
    about     recipe, data and machine
    """

    curve: dict[str, Float[Tensor, " evaluation"]]
    accuracy: dict[str, float]
    weights: dict[str, int]
    about: dict[str, Any]
    definition: str

    @property
    def solved(self) -> list[str]:
        return [name for name, share in self.accuracy.items() if share >= SOLVED]

    def summary(self) -> dict[str, Any]:
        return {
            "held_out_loss": round(float(self.curve["held_out_loss"][-1]), 4),
            "tokens": int(self.curve["tokens"][-1]),
            "nonzero": self.weights["nonzero"],
            "of_weights": self.weights["weights"],
            "dead_neurons": round(float(self.curve["dead_neurons"][-1]), 4),
            "kurtosis": round(float(self.curve["kurtosis"][-1]), 2),
            "tasks_solved": len(self.solved),
            "of_tasks": len(self.accuracy),
            "not_solved": {name: round(x, 3) for name, x in self.accuracy.items() if x < SOLVED},
            "definition": self.definition,
        }


@analysis("sparse-train")
def sparse_train(
    folder: Path,
    seed: int,
    device: str,
    *,
    preset: Preset = "tiny",
    density: float | None = None,
    embedding_density: float | None = None,
    afrac: float | None = None,
    layers: int | None = None,
    width: int | None = None,
    tokens: int | None = None,
    seconds: float | None = None,
    batch: int | None = None,
    real: float | None = None,
    lr: float | None = None,
) -> SparseTraining:
    """Train a weight-sparse transformer on Python, or with density 1 its dense twin; kept in half precision.

    preset             size, data and time
    density            share of the weights of each block matrix that is kept; 1: dense, with AdamW as usual
    embedding_density  the same of embedding and unembedding
    afrac              share of activations that AbsTopK keeps; 1: all
    layers             number of blocks
    width              of the residual stream; 16 per head, MLPs are four times as wide
    tokens             train on so many, the same weights every time
    seconds            train for so long, always annealed at the end
    batch              sequences in a step
    real               share of real Python source in the stream; the rest is generated
    lr                 largest learning rate
    """
    recipe = changed(
        PRESETS[preset], seed=seed, density=density, embedding_density=embedding_density, afrac=afrac, layers=layers,
        width=width, tokens=tokens, seconds=seconds, batch=batch, real=real, lr=lr,
    )  # fmt: skip
    tokenizer = train_tokenizer(recipe.model.vocab_size, real=recipe.real)
    # Beside what is kept: gone with the other parts once the run is saved.
    trained = Training(recipe, tokenizer, device=device, folder=folder.with_name("checkpoints")).run()
    files.round_to_half(trained.module)
    if not (folder / "model").exists():
        files.save(trained.module, backend.wrapped(trained.tokenizer), folder / "model", trained.about)
    model = LanguageModel.load(str(folder / "model"), device=device)
    return result_of(trained, accuracies(model))


def changed(recipe: Recipe, *, seed: int, **changes: Any) -> Recipe:
    """A preset with some things changed; None leaves them. Raises UserError for what cannot be trained."""
    given = {name: value for name, value in changes.items() if value is not None}
    layers, width, afrac = (given.pop(name, None) for name in ("layers", "width", "afrac"))
    model: SparseConfig = recipe.model
    if width is not None:
        if width < 1 or width % model.d_head:
            raise UserError(f"width={width} is no multiple of {model.d_head}, the width of a head.")
        model = replace(model, d_model=width, n_head=width // model.d_head, d_mlp=0)
    if layers is not None:
        model = replace(model, n_layer=layers)
    recipe = timed(recipe, given.pop("tokens", None), given.pop("seconds", None))
    dense = given.get("density") == 1
    if dense:
        recipe = recipe.dense()
        given.setdefault("embedding_density", 1.0)
        model = replace(model, afrac=None)
    if afrac is not None:
        model = replace(model, afrac=None if afrac == 1 else afrac)
    return replace(recipe, model=model, seed=seed, **given)


def timed(recipe: Recipe, tokens: int | None, seconds: float | None) -> Recipe:
    """A recipe that lasts for so many tokens or so many seconds; as it was if neither is given."""
    if tokens is not None and seconds is not None:
        raise UserError("training lasts for a number of tokens or of seconds; give one of the two.")
    return recipe if tokens is seconds is None else replace(recipe, tokens=tokens, seconds=seconds)


def accuracies(model: LanguageModel, names: tuple[str, ...] = TASKS, n: int = JUDGED_ON) -> dict[str, float]:
    """How often the right one of the two answers gets more, on n test pairs (2 n prompts) of each task."""
    found = {}
    for name in names:
        pairs = Pairs.of(sample(split(registry.get_task(name), "test"), model, n, 0))
        logits = model.run(pairs.tokens).logits
        assert logits is not None
        odds = pairs.differences(logits[torch.arange(len(logits)), pairs.last].float())
        found[name] = float((odds > 0).double().mean())
    return found


def result_of(trained: Trained, accuracy: dict[str, float]) -> SparseTraining:
    columns = trained.curve[-1].keys()
    return SparseTraining(
        {name: torch.tensor([float(row[name]) for row in trained.curve]) for name in columns},
        accuracy,
        trained.about["weights"],
        trained.about,
        f"held-out loss: next-token cross-entropy in nats on text that was kept from training; a task is solved where "
        f"the right one of two answers gets more on at least {SOLVED:.0%} of {2 * JUDGED_ON} held-out prompts",
    )


# ---- names ----


def _folder(preset: Preset) -> Path:
    found = runs.find("sparse-train", preset=preset)
    if found is None:
        raise UserError(f"sparse-{preset} is not trained yet; run `wb run sparse-train --preset {preset}`.")
    return found.files / "model"


def _about(preset: Preset) -> str:
    recipe = PRESETS[preset]
    size = f"{recipe.model.n_layer} layers x {recipe.model.d_model}"
    minutes = math.ceil((recipe.seconds or 0) / 60)
    return f"weight-sparse, {size}, Python; trained here by wb run sparse-train --preset {preset} ({minutes} min)"


def trained() -> dict[str, str]:
    """Every sparse model of this machine, and dense twins, with the run that trained it: those with names, and those
    that are called as their runs."""
    found = {name: entry["run"] for name, entry in shipped.names().items()}
    made = {preset: runs.find("sparse-train", preset=preset) for preset in get_args(Preset)}
    found |= {f"sparse-{preset}": run.id for preset, run in made.items() if run is not None}
    others = [id for id in places.names() if id.startswith(("sparse-train-", "sparse-bridge-"))]
    return found | {id: id for id in others if id not in found.values()}


for _preset in get_args(Preset):
    pretrained.register(
        f"sparse-{_preset}",
        pretrained.Local(lambda preset=_preset: _folder(preset), _about(_preset), "as the data"),  # type: ignore[misc]
    )
