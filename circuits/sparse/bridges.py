"""Bridges between a weight-sparse model and a dense one: maps that carry the residual stream of either into the other.

There is a bridge at every boundary between sublayers: before each attention (boundary 2 layer), before each MLP
(2 layer + 1), and after the last (2 n_layer). Its encoder, an affine map and AbsTopK, goes from the dense stream to the
sparse one; its decoder, an affine map, goes back. The dense model is given and stays as it is; the sparse model and the
bridges are trained together, so that the two compute alike at every boundary and not only at the end. Added to the
sparse model's own loss are, summed over boundaries (Gao et al. 2025, section 2.3 and appendix A.3):

    nmse          of each stream as the bridge gives it, against the stream itself, in both directions
    kl_to_sparse  KL(dense model || dense up to the boundary, encoder, sparse from there on), nats per token
    kl_to_dense   KL(dense model || sparse up to the boundary, decoder, dense from there on)

The normalised squared error is the squared error over the target's squared distance from its mean, each summed over the
tokens of a batch: 0 for the target, 1 for its mean, the same whatever the target's size. The gradient goes through both
sums. With the divisor as a constant, shrinking the sparse stream lowers the error: the sparse model's embeddings then
vanish before the encoders have learnt anything, as was seen.

The hybrid passes share what comes before the boundaries. Each is run and goes back to the boundary by itself, so that
the memory of one is needed at a time; the gradients that have gathered there then go through the sparse model at once.
With the hybrids of all boundaries a step costs 6 times one of the sparse model alone for 2 layers and 9 times for 4.
With those of one boundary, drawn anew at every step and scaled up for the others, it costs 3 times: in equal time every
term ends lower (2 layers of width 64, 80 seconds: kl 0.06 and 0.05 against 0.14 and 0.15), so that this is the default.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from circuits.sparse import files
from circuits.sparse.model import SparseTransformer
from circuits.sparse.topk import AbsTopK
from circuits.sparse.train import Part, Recipe, Step, Trained, Training, loss_of, ramp
from workbench import backend, pretrained, processes, runs, sites
from workbench.errors import UserError
from workbench.models import LanguageModel

Direction = Literal["to_sparse", "to_dense"]
DIRECTIONS: tuple[Direction, ...] = ("to_sparse", "to_dense")
MEASURED = 32  # held-out sequences on which the bridges are evaluated
AT_ONCE = 8  # of these
BESIDE, WEIGHTS, ABOUT = "bridges", "bridges.safetensors", "bridges.json"


# ---- maps ----


@dataclass(frozen=True)
class BridgeConfig:
    """afrac  share of the sparse model's channels that an encoder fills; None: all"""

    n_layer: int
    d_dense: int
    d_sparse: int
    afrac: float | None = 0.25

    def __post_init__(self) -> None:
        if self.afrac is not None and not 0 < self.afrac <= 1:
            raise UserError(f"afrac={self.afrac:g} must be above 0 and at most 1, the share of channels kept.")

    @property
    def boundaries(self) -> int:
        return 2 * self.n_layer + 1


class Bridges(nn.Module):
    """An encoder and a decoder for every boundary."""

    def __init__(self, config: BridgeConfig, generator: torch.Generator | None = None):
        """Random weights N(0, 0.02^2), biases 0."""
        super().__init__()
        self.config = config
        n, dense, sparse = config.boundaries, config.d_dense, config.d_sparse
        self.encoders = nn.ModuleList(nn.Linear(dense, sparse) for _ in range(n))
        self.decoders = nn.ModuleList(nn.Linear(sparse, dense) for _ in range(n))
        k = sparse if config.afrac is None else max(1, int(config.afrac * sparse))
        self.top = AbsTopK(k) if k < sparse else nn.Identity()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.02, generator=generator) if parameter.ndim == 2 else parameter.zero_()

    def encode(self, boundary: int, stream: Float[Tensor, "*any d_dense"]) -> Float[Tensor, "*any d_sparse"]:
        """The sparse model's residual stream, from the dense one's."""
        out: Tensor = self.top(self.encoders[boundary](stream))
        return out

    def decode(self, boundary: int, stream: Float[Tensor, "*any d_sparse"]) -> Float[Tensor, "*any d_dense"]:
        """The dense model's residual stream, from the sparse one's."""
        out: Tensor = self.decoders[boundary](stream)
        return out


def boundary_hook(boundary: int, n_layer: int) -> str:
    """The hook point of the residual stream at a boundary."""
    if boundary == 2 * n_layer:
        return sites.block(n_layer - 1, "hook_resid_post")
    return sites.block(boundary // 2, "hook_resid_mid" if boundary % 2 else "hook_resid_pre")


@dataclass(frozen=True)
class Bridged:
    """A sparse model, a dense one, and the bridges between them.

    Raises UserError if they do not fit: other layers, widths, or tokens.
    """

    sparse: LanguageModel
    dense: LanguageModel
    bridges: Bridges

    def __post_init__(self) -> None:
        _check(_module(self.sparse), _module(self.dense), self.sparse.tokenizer, self.dense.tokenizer)
        found = (self.sparse.config.n_layers, self.dense.config.d_model, self.sparse.config.d_model)
        c = self.bridges.config
        if (c.n_layer, c.d_dense, c.d_sparse) != found:
            raise UserError(
                f"the bridges are for {c.n_layer} layers of width {c.d_dense} (dense) and {c.d_sparse} (sparse), but "
                f"the models have {found[0]} of width {found[1]} and {found[2]}; load all three from one folder."
            )


def _module(model: LanguageModel) -> SparseTransformer:
    if not isinstance(model._module, SparseTransformer):
        raise UserError(
            f"{model.name} is no model of circuits.sparse; bridges go between two of these: train the dense one by "
            "`Recipe.dense()`."
        )
    return model._module


def _check(sparse: SparseTransformer, dense: SparseTransformer, *tokenizers: Any) -> None:
    one, other = sparse.config, dense.config
    if one.n_layer != other.n_layer:
        raise UserError(
            f"the sparse model has {one.n_layer} layers and the dense one {other.n_layer}; bridges join models with "
            "equally many."
        )
    vocabularies = [None if tokenizer is None else tokenizer.get_vocab() for tokenizer in tokenizers]
    if one.vocab_size != other.vocab_size or vocabularies[0] != vocabularies[1]:
        raise UserError(
            "the two models have different tokenizers, so that their predictions cannot be compared; train both with "
            "one tokenizer."
        )


# ---- losses ----


def nmse(x: Float[Tensor, "*any width"], target: Float[Tensor, "*any width"]) -> Float[Tensor, ""]:
    """Squared error over the target's squared distance from its mean over all but the last axis; 1 for the mean."""
    centred = target - target.flatten(0, -2).mean(0)
    return (x - target).square().sum() / centred.square().sum().clamp(min=torch.finfo(x.dtype).tiny)


def kl(logits: Float[Tensor, "batch pos vocab"], target: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, ""]:
    """KL divergence from log probabilities `target` to a prediction, in nats per token."""
    return F.kl_div(logits.log_softmax(-1), target, reduction="sum", log_target=True) / target[..., 0].numel()


class Streams(NamedTuple):
    """Both models on the same tokens: their residual streams at every boundary, and what the dense one predicts."""

    tokens: Int[Tensor, "batch pos"]
    sparse: list[Tensor]
    dense: list[Tensor]
    target: Float[Tensor, "batch pos vocab"]

    @classmethod
    def of(cls, sparse: SparseTransformer, dense: SparseTransformer, tokens: Int[Tensor, "batch pos"]) -> Streams:
        with torch.no_grad():
            given = dense.transformer.streams(tokens)
            target = dense.run_from(len(given) - 1, given[-1], tokens).log_softmax(-1)
        return cls(tokens, sparse.transformer.streams(tokens), given, target)


class Term(NamedTuple):
    """What one direction of one bridge adds to the loss; kl is None where the hybrid was not run."""

    direction: Direction
    boundary: int
    nmse: Float[Tensor, ""]
    kl: Float[Tensor, ""] | None


def terms(
    sparse: SparseTransformer, dense: SparseTransformer, bridges: Bridges, streams: Streams, at: Sequence[int]
) -> Iterator[Term]:
    """The terms of every bridge, one after the other, with the hybrids of the boundaries `at`."""
    for i in range(bridges.config.boundaries):
        for direction in DIRECTIONS:
            into = direction == "to_sparse"
            there, stream = (sparse, streams.sparse[i]) if into else (dense, streams.dense[i])
            carried = bridges.encode(i, streams.dense[i]) if into else bridges.decode(i, streams.sparse[i])
            error = nmse(carried, stream)
            hybrid = kl(there.run_from(i, carried, streams.tokens), streams.target) if i in at else None
            yield Term(direction, i, error, hybrid)


@torch.no_grad()
def agreement(
    sparse: SparseTransformer, dense: SparseTransformer, bridges: Bridges, tokens: Int[Tensor, "batch pos"]
) -> dict[str, Float[Tensor, " boundary"]]:
    """How well the two models agree through each bridge: nmse and kl in both directions, means over parts of the
    tokens that are run at once."""
    n = bridges.config.boundaries
    found = {f"{kind}_{direction}": torch.zeros(n) for kind in ("nmse", "kl") for direction in DIRECTIONS}
    for part in tokens.split(AT_ONCE):
        for term in terms(sparse, dense, bridges, Streams.of(sparse, dense, part), range(n)):
            assert term.kl is not None
            for kind, value in (("nmse", term.nmse), ("kl", term.kl)):
                found[f"{kind}_{term.direction}"][term.boundary] += value.cpu() * len(part) / len(tokens)
    return found


# ---- training ----


@dataclass(frozen=True)
class Coupling:
    """How a sparse model is held to a dense one.

    lm, nmse, kl_to_sparse, kl_to_dense   coefficients of the terms; not published, 1 as in later work by others
    afrac      of the encoders; lr, decay: of the bridges' own AdamW
    at_once    boundaries whose hybrids are run in a step, for cost; None: all
    """

    lm: float = 1.0
    nmse: float = 1.0
    kl_to_sparse: float = 1.0
    kl_to_dense: float = 1.0
    afrac: float | None = 0.25
    lr: float = 3e-3
    decay: float = 1e-3
    at_once: int | None = 1

    def __post_init__(self) -> None:
        BridgeConfig(1, 1, 1, self.afrac)  # refuses what is no share
        if min(self.lm, self.nmse, self.kl_to_sparse, self.kl_to_dense) < 0:
            raise UserError("coefficients of the loss must not be negative; 0 leaves a term out.")
        if self.at_once is not None and self.at_once < 1:
            raise UserError(f"at_once={self.at_once} boundaries in a step cannot be run; give at least 1, or None.")

    def drawn(self, boundaries: int, seed: int, step: int) -> list[int]:
        """The boundaries of a step, each as likely as any other; the same whenever it is asked."""
        k = boundaries if self.at_once is None else min(self.at_once, boundaries)
        return sorted(random.Random(f"boundaries/{seed}/{step}").sample(range(boundaries), k))


def backward(
    sparse: SparseTransformer,
    dense: SparseTransformer,
    bridges: Bridges,
    rows: Int[Tensor, "batch pos"],
    coupling: Coupling,
    at: Sequence[int],
) -> Float[Tensor, ""]:
    """Add the gradients of the whole loss to the sparse model's and the bridges' parameters; returns the loss.

    at  the boundaries whose hybrids are run, scaled up so that the mean over all draws is the loss with all of them
    """
    streams = Streams.of(sparse, dense, rows[:, :-1])
    # Gradients gather at copies of the streams, and go through the sparse model once.
    copies = [x.detach().requires_grad_() for x in streams.sparse]
    scale = bridges.config.boundaries / max(1, len(at))
    logits = sparse.run_from(len(copies) - 1, streams.sparse[-1], streams.tokens)
    own = coupling.lm * F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    total = own.detach()
    for term in terms(sparse, dense, bridges, streams._replace(sparse=copies), at):
        value = coupling.nmse * term.nmse
        if term.kl is not None:
            value = value + scale * getattr(coupling, f"kl_{term.direction}") * term.kl
        value.backward()
        total = total + value.detach()
    torch.autograd.backward([own, *streams.sparse], [None, *(x.grad for x in copies)])
    return total


@dataclass(frozen=True)
class TrainedBridges(Trained):
    """The sparse model (`module`), the dense one it was held to, and the bridges between them."""

    dense: SparseTransformer
    bridges: Bridges


class BridgeTraining(Training):
    """Training of a sparse model together with its bridges to a dense one."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: Tokenizer,
        dense: LanguageModel,
        coupling: Coupling = Coupling(),
        *,
        start: LanguageModel | None = None,
        device: str = "cpu",
        folder: Path | None = None,
    ):
        """start  a sparse model of this recipe to begin with, its density final from the first step; None: random

        Raises UserError as `Training`, and if the two models have other layers or tokens, or `start` another shape.
        """
        self.given, self.coupling, self.start = dense, coupling, start
        super().__init__(recipe, tokenizer, device=device, folder=folder)

    def _prepare(self) -> dict[str, Any]:
        recipe, device = self.recipe, self.module.device
        if processes.count() > 1:  # its errors are normalised over the batch, which would have to be one
            raise UserError(f"bridges are trained by one process, not {processes.count()}; start it without torchrun.")
        if recipe.precision != "float32" or recipe.compile:
            raise UserError(
                "bridges are trained in float32 and not compiled; change the recipe's precision or compile."
            )
        self.dense = copy.deepcopy(_module(self.given)).to(device)
        self.dense.set_attn_implementation("sdpa")  # the workbench's own is for hooks
        _check(self.module, self.dense, self.stream.tokenizer, self.given.tokenizer)
        if recipe.length > self.dense.config.block_size:
            raise UserError(
                f"length={recipe.length} is more than the {self.dense.config.block_size} tokens the dense model reads."
            )
        if self.start is not None:
            _check(self.module, _module(self.start), self.stream.tokenizer, self.start.tokenizer)
            if self.start._module.config != recipe.model:
                raise UserError(f"{self.start.name} is not the recipe's model; give its `config` to the recipe.")
            self.module.load_state_dict(self.start._module.state_dict())
            self.optimiser.annealed = True
        width = self.dense.config.d_model, recipe.model.d_model
        shape = BridgeConfig(recipe.model.n_layer, *width, self.coupling.afrac)
        self.bridges = Bridges(shape, torch.Generator().manual_seed(recipe.seed)).to(device)
        parameters = list(self.bridges.parameters())
        fused = device.type in ("cpu", "cuda")
        adam = torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, 0.95), weight_decay=self.coupling.decay, fused=fused)
        self.parts["bridges."] = Part(self.bridges, parameters, adam)
        start = None if self.start is None else self.start.fingerprint
        return {"coupling": asdict(self.coupling), "dense": self.given.fingerprint, "start": start}

    def _update(self, rows: Int[Tensor, "batch pos"]) -> tuple[Float[Tensor, ""], Step]:
        at = self.coupling.drawn(self.bridges.config.boundaries, self.recipe.seed, self.steps)
        loss = backward(self.module, self.dense, self.bridges, rows, self.coupling, at)
        adam = self.parts["bridges."].adam
        for group in adam.param_groups:
            group["lr"] = self.coupling.lr * ramp(self.done)
        adam.step()
        adam.zero_grad()
        return loss, self.optimiser.step(self.done)

    def _measure(self) -> dict[str, float]:
        found = agreement(self.module, self.dense, self.bridges, self.held_out[:MEASURED, :-1])
        with torch.no_grad():
            dense = float(loss_of(self.dense, self.held_out))
        means = {name: float(x.mean()) for name, x in found.items()}
        return super()._measure() | means | {"dense_loss": dense}

    def run(self, *, every: float = 60.0, clock: Callable[[], float] = time.perf_counter) -> TrainedBridges:
        """As `Training.run`; `loss` in the curve is the whole loss of a step, and the means of every term over
        boundaries, on held-out rows, stand beside it."""
        found = super().run(every=every, clock=clock)
        return TrainedBridges(found.module, found.tokenizer, found.curve, found.about, self.dense, self.bridges)


# ---- files ----


def save(trained: TrainedBridges, folder: Path) -> None:
    """Write the sparse model as `files.save` does, with the dense one and the bridges in a folder `bridges` beside its
    weights; aside and then renamed. A folder of this name must not exist."""
    if folder.exists():
        raise UserError(f"{folder} exists; give another name, so that no model is overwritten.")
    tokenizer = backend.wrapped(trained.tokenizer)
    with runs.whole(folder) as aside:
        files.write(trained.module, tokenizer, aside, trained.about)
        files.save(trained.dense, tokenizer, aside / BESIDE / "dense")
        paths = {"sparse": aside.resolve(), "dense": aside.resolve() / BESIDE / "dense"}
        save_file(files.pack(trained.bridges.state_dict()), aside / BESIDE / WEIGHTS)
        fingerprints = {name: pretrained.fingerprint(str(path)) for name, path in paths.items()}
        about = {"config": asdict(trained.bridges.config), **fingerprints}
        (aside / BESIDE / ABOUT).write_text(json.dumps(about, indent=1))


def _dense(folder: Path, fingerprint: str, sparse: LanguageModel) -> LanguageModel:
    """The copy beside the bridges; where they came without one, the model with a name that has this fingerprint."""
    if (folder / "dense").is_dir():
        dense = LanguageModel.load(str((folder / "dense").resolve()), device=str(sparse.device))
        dense.name = f"{sparse.name}/dense"
        return dense
    for name, local in pretrained.local().items():
        found = None
        with suppress(UserError):  # of one that is not made here yet
            found = pretrained.fingerprint(str(local.folder()))
        if found == fingerprint:
            return LanguageModel.load(name, device=str(sparse.device))
    raise UserError(f"{folder} has no dense model, and none that is known here has the fingerprint {fingerprint[:12]}.")


def beside(sparse: LanguageModel) -> Bridged:
    """The bridges that `save` wrote beside a sparse model, and the dense model they lead to.

    Raises UserError if there are none, or a part is missing, damaged, or not of the others.
    """
    home: Path | None = _module(sparse).folder
    if home is None or not (home / BESIDE).is_dir():
        raise UserError(
            f"{sparse.name} has no bridges beside it; `wb run sparse-bridge --model {sparse.name} --dense MODEL` makes "
            "a model that has."
        )
    folder = home / BESIDE
    try:
        about = json.loads((folder / ABOUT).read_text())
        bridges = Bridges(BridgeConfig(**about["config"]))
        bridges.load_state_dict(files.unpack(load_file(folder / WEIGHTS), bridges.state_dict()))
        recorded = {"sparse": about["sparse"], "dense": about["dense"]}
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"the bridges in {folder} cannot be read ({reason}).") from error
    dense = _dense(folder, recorded["dense"], sparse)
    for model, (name, fingerprint) in zip((sparse, dense), recorded.items(), strict=True):
        if model.fingerprint != fingerprint:
            raise UserError(
                f"the {name} model of {folder} is not the one that these bridges were trained with (fingerprint "
                f"{model.fingerprint[:12]}, not {str(fingerprint)[:12]}); put that one back."
            )
    return Bridged(sparse, dense, bridges.to(sparse.device).requires_grad_(False))
