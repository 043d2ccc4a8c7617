"""`wb run sparse-bridge`: train a sparse model together with bridges to a dense one. `wb run bridge-dose`: edit the
dense model through one channel of the sparse one, at several strengths.

The trained sparse model is loaded by the run's id, with its bridges and the dense model beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.sparse import bridges, files
from circuits.sparse.bridge_edits import DoseResponse, channel_effects, dose_response
from circuits.sparse.bridges import BridgeTraining, Coupling, TrainedBridges, agreement, beside
from circuits.sparse.prune import Pairs
from circuits.sparse.train import Recipe
from circuits.sparse.training_run import timed
from workbench.models import LanguageModel
from workbench.prompts import Batch, sample, split
from workbench.registry import analysis

SECONDS = 600.0


@dataclass(frozen=True)
class BridgeResult:
    """How a sparse model and its bridges were trained, and how well the two models agree in the end.

    curve      one value per evaluation, by name: tokens, seconds, held_out_loss of the sparse model and dense_loss, and
               means over boundaries of nmse and kl (nats per token) in both directions
    agreement  the means' parts, for every boundary, of the models and bridges as they are kept, in half precision
    """

    curve: dict[str, Float[Tensor, " evaluation"]]
    agreement: dict[str, Float[Tensor, " boundary"]]
    dense: str
    about: dict[str, Any]
    definition: str

    def summary(self) -> dict[str, Any]:
        return {
            **{name: round(float(self.curve[name][-1]), 4) for name in ("held_out_loss", "dense_loss")},
            **{name: round(float(values.mean()), 4) for name, values in self.agreement.items()},
            "tokens": int(self.curve["tokens"][-1]),
            "nonzero": self.about["weights"]["nonzero"],
            "of_weights": self.about["weights"]["weights"],
            "dense": self.dense,
            "definition": self.definition,
        }


@analysis("sparse-bridge", model="pycode-small")
def sparse_bridge(
    model: LanguageModel,
    seed: int,
    device: str,
    folder: Path,
    *,
    dense: str = "pycode-small-dense",
    start: Literal["given", "random"] = "given",
    tokens: int | None = None,
    seconds: float | None = None,
    at_once: int = 1,
) -> BridgeResult:
    """Train a sparse model and its bridges to a dense model, which stays as it is.

    dense    the dense model, of as many layers and with the same tokenizer
    start    from the given model's weights, its density final at once; or from random ones, by its recipe
    tokens   train on so many, the same weights every time
    seconds  train for so long, always annealed at the end; 600 where neither is given
    at_once  boundaries whose hybrids are run in a step
    """
    if tokens is None and seconds is None:
        seconds = SECONDS
    recipe = timed(replace(Recipe.of(model), seed=seed, precision="float32", compile=False), tokens, seconds)
    to = LanguageModel.load(dense, device=device)
    training = BridgeTraining(
        recipe, model.tokenizer.backend_tokenizer, to, Coupling(at_once=at_once),
        start=model if start == "given" else None, device=device, folder=folder.with_name("checkpoints"),
    )  # fmt: skip
    trained = training.run()
    for module in (trained.module, trained.bridges):
        files.round_to_half(module)
    if not (folder / "model").exists():
        bridges.save(trained, folder / "model")
    return _result(trained, training.held_out[: bridges.MEASURED, :-1], dense)


def _result(trained: TrainedBridges, held_out: Tensor, dense: str) -> BridgeResult:
    names = ("tokens", "seconds", "held_out_loss", "dense_loss")
    found = agreement(trained.module, trained.dense, trained.bridges, held_out)
    return BridgeResult(
        {name: torch.tensor([float(row[name]) for row in trained.curve]) for name in (*names, *found)},
        found, dense, trained.about,
        "on held-out text; nmse: squared error of a residual stream carried over a bridge over the squared distance "
        "from its mean; kl: nats per token from the dense model to the one that goes on from there; means over bridges",
    )  # fmt: skip


@analysis("bridge-dose", n=32, model="pycode-bridged", task="while_return_true")
def bridge_dose(model: LanguageModel, batch: Batch, seed: int, *, node: str = "", controls: int = 20) -> DoseResponse:
    """Move one channel of a sparse model towards the other prompt of each pair, and carry that into the dense model.

    node      such as 1.mlp.act_in:27; none: the one whose exchange moves the sparse model most, on train prompts
    controls  how many other channels of the same place do the same
    """
    bridged = beside(model)
    train, test = (Pairs.of(sample(split(batch.task, part), model, len(batch), seed)) for part in ("train", "test"))
    chosen = node or channel_effects(model, train).top(1)[0][0]
    return dose_response(bridged, test, chosen, controls=controls, seed=seed)
