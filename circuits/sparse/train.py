"""Training of weight-sparse transformers, and of their dense twins by the same command.

After every step of Adam each matrix keeps its largest weights and loses the others (Gao et al. 2025, section 2.1 and
appendix A.2). What matters, and why:

    density     from 1 at 1 % of training linearly to its final value at 50 %: dense at first, so that a circuit forms
    rate        ramp for 1 %, then linearly to 0, times sqrt(final density / density), which is below 1 while dense
    gradient    divided by the RMS of the whole gradient, always: what a step can move does not depend on the loss
    epsilon     0.1 in Adam, so that weights whose gradients are small stay put instead of taking full steps
    decay       after the projection, of matrices alone
    minimum     of weights per neuron, so that none loses its last

Exempt from density are gains, biases, sinks, position channels and the bigram table. The table is fixed beforehand to
smoothed log counts of the stream: what two neighbouring tokens tell is not left to the circuits.

Progress is counted in tokens (the same weights on every machine of the kind, bit for bit, also after a kill), or by the
clock, so that training always ends annealed when its time is up.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from circuits.sparse.data import TokenStream
from circuits.sparse.model import SparseConfig, SparseTransformer
from circuits.sparse.topk import Neurons, drop_weights
from workbench import parts, processes, runs
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.progress import note, track

WARMUP, ANNEALED = 0.01, 0.5  # shares of training
DECAY = 0.1
COUNTED = 1 << 20  # tokens whose neighbours fill the bigram table
HELD_OUT = 256  # sequences on which training is evaluated
CHECKPOINT = "checkpoint.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def matrices(module: SparseTransformer) -> Iterator[tuple[str, Tensor, Neurons | None, bool]]:
    """What is made sparse: name, weight, where a block matrix has its neurons (inputs of a row, or outputs of a
    column), and whether it is an embedding."""
    for name, weight in module.named_parameters():
        if weight.ndim < 2 or name == "bigram_table":
            continue
        if name.endswith("wpe.weight") and module.config.d_pos_emb is not None:
            continue
        embedding = not name.startswith("transformer.h.")
        yield name, weight, None if embedding else "columns" if name.endswith("c_proj.weight") else "rows", embedding


class _Unset(TorchFunctionMode):
    """Parameters are not set: what has no memory has no values, and to set them all the same imports the compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.normal_ or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    density            share of each block matrix that is kept at the end; 1: a dense model, with AdamW as usual
    embedding_density  the same of the embeddings and the unembedding
    per_neuron         weights that each neuron and head channel keeps at least
    lr, eps            of Adam; None: 0.0256 and 0.1 for sparse models, 0.18 / width and 1e-8 for dense ones, for which
                       0.003 ends 0.3 nats higher at width 256 (1 M tokens)
    tokens, seconds    how long; one of the two
    batch, length      sequences in a step, and their tokens
    real               share of real source in the stream
    precision          of matrix products; weights, their projection and the moments are float32 always. bfloat16 pays
                       on GPUs, and on CPUs that have it from a width of about 512 on
    compile            the model by `torch.compile`, which pays on GPUs
    """

    model: SparseConfig
    density: float = 1 / 8
    embedding_density: float = 1 / 4
    per_neuron: int = 4
    lr: float | None = None
    eps: float | None = None
    tokens: int | None = None
    seconds: float | None = None
    batch: int = 8
    length: int = 128
    real: float = 0.0
    seed: int = 0
    precision: str = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("density", "embedding_density"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(
                    f"{name}={getattr(self, name):g} must be above 0 and at most 1, the share that is kept."
                )
        if (self.tokens is None) == (self.seconds is None):
            raise UserError("training lasts for a number of tokens or of seconds; give one of the two.")
        if self.precision not in ("float32", "bfloat16"):
            raise UserError(f"precision={self.precision!r} is not one of float32, bfloat16.")
        if min(self.tokens or 1, self.batch, self.length - 1) < 1 or (self.seconds or 1) <= 0:
            raise UserError("tokens, seconds and batch must be positive, and length at least 2.")
        if self.length > self.model.block_size:
            raise UserError(f"length={self.length} is more than the {self.model.block_size} tokens the model reads.")
        with torch.device("meta"), _Unset():
            shapes = SparseTransformer(self.model)
        for name, matrix, neurons, _ in matrices(shapes):
            least = self.per_neuron * (matrix.shape[0] if neurons == "rows" else matrix.shape[1])
            if self.sparse and neurons is not None and least > int(self.density * matrix.numel()):
                raise UserError(
                    f"density {self.density:g} leaves fewer than per_neuron={self.per_neuron} weights to each neuron "
                    f"of {name}; the most is {int(self.per_neuron * int(self.density * matrix.numel()) / least)}."
                )

    @property
    def sparse(self) -> bool:
        return self.density < 1 or self.embedding_density < 1

    def dense(self) -> Recipe:
        """The twin: the same data and shape, all weights and activations kept, its own optimiser."""
        return replace(
            self, density=1.0, embedding_density=1.0, lr=None, eps=None, model=replace(self.model, afrac=None)
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"model": self.model.to_json()}

    @classmethod
    def of(cls, model: LanguageModel) -> Recipe:
        """The recipe that a model was trained by. Raises UserError if it does not say."""
        written = getattr(model._module, "about", {}).get("recipe")
        if written is None:
            raise UserError(f"{model.name} does not say how it was trained; models of `wb run sparse-train` do.")
        return cls(**written | {"model": SparseConfig.from_json(written["model"])})


TINY = SparseConfig(vocab_size=512, n_layer=2, d_model=128, n_head=8, block_size=128, afrac=0.25,
                    afrac_loctypes=("attn_in", "attn_v", "attn_out", "mlp_in", "mlp_neuron", "mlp_out"))  # fmt: skip
PRESETS = {
    "tiny": Recipe(TINY, seconds=150.0),
    "small": Recipe(
        replace(TINY, vocab_size=1024, n_layer=3, d_model=256, n_head=16, block_size=256, d_mlp=0),
        density=1 / 32, embedding_density=1 / 8, seconds=1800.0, real=0.25,
    ),
    "gpu": Recipe(
        replace(TINY, vocab_size=2048, n_layer=6, d_model=512, n_head=32, block_size=256, d_mlp=0, sink=True),
        density=1 / 32, embedding_density=1 / 16, seconds=480.0, batch=256, length=256, real=0.5,
        precision="bfloat16", compile=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """Where training stands: lr and densities at a share of it that is done; annealed: densities are final at once."""

    lr: float
    density: float
    embedding_density: float

    @classmethod
    def at(cls, recipe: Recipe, done: float, annealed: bool = False) -> Step:
        anneal = 1.0 if annealed else min(1.0, max(0.0, (done - WARMUP) / (ANNEALED - WARMUP)))
        density, embedding = (1 + anneal * (end - 1) for end in (recipe.density, recipe.embedding_density))
        lr = recipe.lr if recipe.lr is not None else 0.0256 if recipe.sparse else 0.18 / recipe.model.d_model
        return cls(lr * ramp(done) * math.sqrt(recipe.density / density), density, embedding)


def ramp(done: float) -> float:
    """The share of the full rate at a share of training: up for the first 1 %, then linearly to 0."""
    return done / WARMUP if done < WARMUP else (1 - done) / (1 - WARMUP)


@torch.no_grad()
def project(module: SparseTransformer, recipe: Recipe, step: Step, factor: float = 1.0) -> None:
    """Set all but the largest weights of each matrix to 0: exactly as many as the density says are left; and multiply
    these by a factor."""
    given = []
    for _, weight, neurons, embedding in matrices(module):
        k = int((step.embedding_density if embedding else step.density) * weight.numel())
        if k < weight.numel():
            given.append((weight, k, recipe.per_neuron if neurons else 0, neurons or "rows"))
        else:
            weight.mul_(factor)
    drop_weights(given, factor)


def bigram_logits(tokens: Int[Tensor, " pos"], vocab: int, smoothing: float = 0.1) -> Float[Tensor, "vocab vocab"]:
    """Log probability of each next token by counts, to which `smoothing` tokens spread as single ones are added.

    Rounded to half precision, in which it is stored.
    """
    pairs = tokens[:-1] * vocab + tokens[1:]
    counts = torch.bincount(pairs, minlength=vocab * vocab).view(vocab, vocab).double()
    single = (tokens.bincount(minlength=vocab).double() + 1) / (len(tokens) + vocab)
    smoothed = (counts + smoothing * single) / (counts.sum(1, keepdim=True) + smoothing)
    return smoothed.log().half().float()


def loss_of(module: Callable[[Tensor], Any], rows: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Next-token cross-entropy in nats, mean over positions."""
    logits = module(rows[:, :-1]).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


class Optimiser:
    """Adam with what a sparse model needs: normalised gradients before, projection and decay after.

    Among several processes the gradients of each are of its own rows, and a step is made by their mean.
    """

    def __init__(self, module: SparseTransformer, recipe: Recipe):
        self.module, self.recipe = module, recipe
        self.annealed = False  # whether the module is sparse from the start
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        eps = recipe.eps if recipe.eps is not None else 0.1 if recipe.sparse else 1e-8
        fused = self.parameters[0].device.type in ("cpu", "cuda")
        self.adam = torch.optim.Adam(self.parameters, lr=1.0, betas=(0.9, 0.95), eps=eps, fused=fused)

    def step(self, done: float) -> Step:
        """One update from the gradients that are there; `done` is the share of training behind."""
        step = Step.at(self.recipe, done, self.annealed)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        processes.average(gradients)
        size = sum(g.numel() for g in gradients)
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        if self.recipe.sparse:
            torch._foreach_div_(gradients, norm / math.sqrt(size) + 1e-5)
        else:
            torch._foreach_mul_(gradients, (1 / (norm + 1e-6)).clamp(max=1.0))  # clipped to 1, as usual
        for group in self.adam.param_groups:
            group["lr"] = step.lr
        self.adam.step()
        self.adam.zero_grad()
        project(self.module, self.recipe, step, 1 - DECAY * step.lr)
        return step


def nonzero(module: SparseTransformer) -> dict[str, int]:
    """Nonzero and all weights of the matrices that are made sparse."""
    counts = [(int(weight.count_nonzero()), weight.numel()) for _, weight, _, _ in matrices(module)]
    return {"nonzero": sum(n for n, _ in counts), "weights": sum(n for _, n in counts)}


def health(module: SparseTransformer, rows: Int[Tensor, "batch pos"]) -> dict[str, float]:
    """Loss on some rows, the share of MLP neurons that never fire on them, and the kurtosis of the residual stream
    (mean over layers and positions; 3 for a Gaussian)."""
    model = LanguageModel(copy.deepcopy(module), None, name="in training", fingerprint="in training")
    posts = [hook for hook in model.hook_points if hook.endswith("mlp.hook_post")]
    stream = [hook for hook in model.hook_points if hook.endswith("hook_resid_post")]
    found = model.run(rows, capture=[*posts, *stream])
    assert found.logits is not None
    loss = F.cross_entropy(found.logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten().to(model.device))
    dead = [(found[hook] == 0).flatten(0, 1).all(0).float().mean() for hook in posts]
    centred = [found[hook] - found[hook].mean(-1, keepdim=True) for hook in stream]
    kurtosis = [((z**4).mean(-1) / (z**2).mean(-1) ** 2).mean() for z in centred]
    return {
        "loss": float(loss),
        "dead_neurons": float(torch.stack(dead).mean()),
        "kurtosis": float(torch.stack(kurtosis).mean()),
    }


# ---- a run ----


@dataclass(frozen=True)
class Trained:
    """A model, its tokenizer, and how training went: one row per evaluation."""

    module: SparseTransformer
    tokenizer: Any
    curve: list[dict[str, int | float]]
    about: dict[str, Any]


class Part(NamedTuple):
    """A module that is trained: its checkpoint holds its weights, and the moments of these parameters."""

    module: nn.Module
    parameters: list[nn.Parameter]
    adam: torch.optim.Adam


class Training:
    """A run of training that can be stopped after any step and goes on bit for bit from its checkpoint.

    Also by several processes at once, as `torchrun` starts them: see `workbench.processes`.
    What trains more than a model, or by another loss, is a subclass: `_prepare`, `_update` and `_measure` are its own.
    """

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, *, device: str = "cpu", folder: Path | None = None):
        """folder  where checkpoints are kept and looked for; None: nowhere

        Raises UserError if the tokenizer has more tokens than the model, a checkpoint is of another run, or the batch
        cannot be shared out evenly among processes.
        """
        processes.join(device)
        processes.share(recipe.batch)
        size = tokenizer.get_vocab_size()
        if size > recipe.model.vocab_size:
            raise UserError(f"the tokenizer has {size} tokens, more than vocab_size={recipe.model.vocab_size}.")
        self.recipe, self.folder = recipe, folder
        self.stream = TokenStream(tokenizer, seed=recipe.seed, real=recipe.real)
        held_out = TokenStream(tokenizer, seed=recipe.seed, real=recipe.real, held_out=True)
        self.held_out = held_out.read(0, HELD_OUT * recipe.length).view(HELD_OUT, -1).to(device)
        self.module = SparseTransformer(recipe.model, torch.Generator().manual_seed(recipe.seed))
        if self.module.bigram_table is not None:
            table = bigram_logits(self.stream.read(0, COUNTED), recipe.model.vocab_size)
            self.module.bigram_table.data.copy_(table)
        self.module.to(device)
        self.forward: Callable[[Tensor], Any] = torch.compile(self.module) if recipe.compile else self.module
        self.optimiser = Optimiser(self.module, recipe)
        self.parts = {"": Part(self.module, self.optimiser.parameters, self.optimiser.adam)}  # by prefix in checkpoints
        self.steps, self.seconds = 0, 0.0
        self.curve: list[dict[str, int | float]] = []
        self.identity = {"recipe": recipe.to_json(), "stream": self.stream.fingerprint} | self._prepare()
        if folder is not None and (folder / CHECKPOINT).is_file():
            self._resume(folder / CHECKPOINT)

    @property
    def done(self) -> float:
        """The share of training that is behind."""
        if self.recipe.tokens is None:
            assert self.recipe.seconds is not None
            return min(1.0, self.seconds / self.recipe.seconds)
        return min(1.0, self.steps * self.recipe.batch * self.recipe.length / self.recipe.tokens)

    def run(self, *, every: float = 60.0, clock: Callable[[], float] = time.perf_counter) -> Trained:
        """Train to the end; evaluate, and write a checkpoint, every so many seconds. At once if it is done already."""
        started, before = clock(), self.seconds
        evaluated = before
        module = self.module.train()
        silent = processes.number() > 0
        with track(total=1.0, initial=self.done, desc="sparse-train", silent=silent) as bar:
            while self.done < 1:
                loss, step = self._update(self._rows().to(module.device))
                self.steps += 1
                self.seconds = processes.first(before + clock() - started)
                bar.update(self.done - bar.n)
                if self.seconds - evaluated >= every or self.done >= 1:
                    evaluated = self.seconds
                    self._evaluate(loss, step)
                    if processes.number() == 0:
                        self._checkpoint()
        return Trained(module, self.stream.tokenizer, self.curve, self.about())

    def _prepare(self) -> dict[str, Any]:
        """Add parts, before a checkpoint is read; returns what tells one run from another."""
        return {}

    def _update(self, rows: Int[Tensor, "batch pos"]) -> tuple[Float[Tensor, ""], Step]:
        """One step on some rows: its loss, and where training stood."""
        loss = self.loss(rows)
        loss.backward()
        return loss.detach(), self.optimiser.step(self.done)

    def _measure(self) -> dict[str, float]:
        """What an evaluation finds on rows that are held out."""
        return health(self.module, self.held_out)

    def loss(self, rows: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
        """Of some rows, computed as the recipe says."""
        half = self.recipe.precision == "bfloat16"
        with torch.autocast(self.module.device.type, torch.bfloat16, enabled=half):
            return loss_of(self.forward, rows)

    def about(self) -> dict[str, Any]:
        """How the model was made: recipe, data, machine, what was reached."""
        last = self.curve[-1]
        return self.identity | {"reached": last, "weights": nonzero(self.module), "environment": runs.environment()}

    def _rows(self) -> Int[Tensor, "batch pos"]:
        """This process's rows of the next batch, which is the same for any number of processes."""
        length, share = self.recipe.length, processes.share(self.recipe.batch)
        start = self.steps * self.recipe.batch + processes.number() * share
        return self.stream.read(start * length, share * length).view(share, length)

    def _evaluate(self, loss: Tensor, step: Step) -> None:
        processes.same(self.optimiser.parameters)
        processes.average([loss])
        found = self._measure() if processes.number() == 0 else {}
        found = {f"held_out_{name}" if name == "loss" else name: x for name, x in processes.first(found).items()}
        tokens = self.steps * self.recipe.batch * self.recipe.length
        row = {"step": self.steps, "tokens": tokens, "seconds": round(self.seconds, 1), "loss": float(loss), **found}
        self.curve.append(row | {"density": step.density, "lr": step.lr})
        note("sparse-train", **self.curve[-1])

    def _checkpoint(self) -> None:
        """Weights and moments; written aside and renamed, so that a kill leaves the last one whole."""
        if self.folder is None:
            return
        state: dict[str, Tensor] = {}
        for prefix, part in self.parts.items():
            state |= {f"{prefix}weight.{name}": x for name, x in part.module.state_dict().items()}
            for i, p in enumerate(part.parameters):
                state |= {f"{prefix}moment.{i}.{name}": part.adam.state[p][name] for name in MOMENTS}
        about = {"identity": self.identity, "steps": self.steps, "seconds": self.seconds, "curve": self.curve}
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f".{CHECKPOINT}"
        packed = {name: x.detach().cpu().contiguous() for name, x in state.items()}
        save_file(packed, aside, {"about": json.dumps(about)})
        os.replace(aside, self.folder / CHECKPOINT)
        parts.mark()

    def _resume(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["about"])
            state = load_file(path)
        except (OSError, SafetensorError, LookupError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); delete it to begin anew.") from error
        if about["identity"] != json.loads(json.dumps(self.identity)):
            raise UserError(
                f"{path} is of another recipe, tokenizer or library; give another folder, or delete it to begin anew."
            )
        with torch.no_grad():
            for prefix, part in self.parts.items():
                for name, x in part.module.state_dict().items():
                    x.copy_(state[f"{prefix}weight.{name}"])
                for i, p in enumerate(part.parameters):
                    moments = {name: state[f"{prefix}moment.{i}.{name}"] for name in MOMENTS}
                    part.adam.state[p] = {name: x.to(p.device) for name, x in moments.items()}
        self.steps, self.seconds, self.curve = about["steps"], about["seconds"], about["curve"]
