"""Training SAEs on a stream of activations, several at once from one pass over the store.

Of several processes, as `torchrun` starts them (`workbench.processes`), each learns from its share of every batch:
`topk`, `jumprelu` and `standard` become what one process makes of them; `batchtopk` and `matryoshka` choose the largest
of each share.

Activations are trained on in units of their own, in which they lie around 0 and have the square root of their width as
mean length; the first rows give them, and the finished weights have them folded in. (What all activations of a model
have in common can be most of them. Whoever starts without it spends the first steps on learning it, with the few
latents that point there, and the others die.) Each coordinate is divided by the root of its standard deviation, so that
a coordinate that varies 50 times as much as others, as some of gemma-3-270m do, counts 7 times as much: the model reads
such coordinates with small weights, and an SAE that spends its latents on them explains more variance and less of what
the model does. Each training has parameters, moments,
counters and a place in the stream; all of these are in its checkpoint, so that one that is killed goes on bit for bit.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from saes import objectives
from saes.objectives import Chooser, Spec, Weights
from saes.sae import SAE
from workbench import gpu, parts, processes, progress
from workbench.errors import UserError

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Place:
    """Where an SAE reads, and for a transcoder where it writes."""

    hook: str
    hook_out: str | None = None

    @property
    def out(self) -> str:
        return self.hook_out or self.hook


@dataclass(frozen=True)
class Units:
    """What training does to activations before it looks at them: (x - centre) times scale."""

    centre: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]

    @classmethod
    def none(cls, d: int) -> Units:
        return cls(torch.zeros(d), torch.ones(d))

    @classmethod
    def of(cls, rows: Float[Tensor, "row d"], *, own: bool = True) -> Units:
        """own: around the geometric median of the rows, each coordinate by the root of its standard deviation;
        otherwise SAELens' `expected_average_only_in`, one factor for all."""
        rows, d = rows.float(), rows.shape[-1]
        centre = geometric_median(rows) if own else torch.zeros(d)
        spread = (rows - centre).square().mean(0).sqrt() if own else torch.ones(d)
        scale = spread.clamp(min=1e-3 * float(spread.mean())).rsqrt()
        return cls(centre, scale * math.sqrt(d) / ((rows - centre) * scale).norm(dim=-1).mean())

    def to(self, device: str | torch.device) -> Units:
        return Units(self.centre.to(device), self.scale.to(device))

    def __call__(self, x: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
        return (x - self.centre.to(x.device)) * self.scale.to(x.device)

    def back(self, x: Float[Tensor, "*row d"]) -> Float[Tensor, "*row d"]:
        return x / self.scale.to(x.device) + self.centre.to(x.device)


def geometric_median(rows: Float[Tensor, "row d"], rounds: int = 50) -> Float[Tensor, " d"]:
    """The point whose summed distance to all rows is least (Weiszfeld's iteration); a few huge rows do not move it."""
    centre = rows.mean(0)
    for _ in range(rounds):
        weight = 1 / (rows - centre).norm(dim=-1, keepdim=True).clamp(min=1e-6)
        centre = (weight * rows).sum(0) / weight.sum()
    return centre


class Training:
    """One SAE. `step` takes rows of activations at its place; `sae()` gives what has come of it."""

    def __init__(
        self, spec: Spec, place: Place, d_in: int, d_out: int, *, steps: int, seed: int = 0,
        units: tuple[Units, Units] | None = None, device: str | torch.device = "cpu",
    ):  # fmt: skip
        """steps: how many there will be, for the learning rate; units: of what is read and written, None: as
        they are.

        Raises UserError if the learning rate rises and falls for longer than there are steps.
        """
        processes.join(str(device))
        if spec.warm_up + spec.decay > steps:
            raise UserError(
                f"the learning rate rises for {spec.warm_up} and falls for {spec.decay} steps, and there are {steps}."
            )
        if place.hook_out is None and d_in != d_out:
            raise ValueError("an SAE writes as wide as it reads")
        if place.hook_out is not None and spec.subtract:
            raise UserError("a transcoder subtracts nothing from its input; give subtract=False.")
        self.spec, self.place, self.steps = spec, place, steps
        read, written = units or (Units.none(d_in), Units.none(d_out))
        self.units = read.to(device), written.to(device)
        start = Weights.start(spec, d_in, d_out, torch.Generator().manual_seed(seed))
        self.weights = Weights(**{name: _parameter(x, device) for name, x in start.tensors().items()})
        cuda = torch.device(device).type == "cuda"
        lr = torch.tensor(spec.lr, device=device) if cuda else spec.lr  # of a replayed step, a tensor
        self.adam = torch.optim.Adam(self.parameters, lr=lr, betas=spec.betas, fused=True, capturable=cuda)
        self._replay: _Replay | None = None
        self.chooser = Chooser()
        self.since_fired = torch.zeros(spec.latents, device=device)
        self.done, self._began = 0, 0

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.weights.tensors().values())

    @property
    def dead(self) -> Tensor:
        return self.since_fired > self.spec.dead_after

    def step(self, rows: Mapping[str, Float[Tensor, "row _"]]) -> objectives.Step:
        """Learn from some rows. On a GPU, what it gives is overwritten by the next step."""
        device = self.weights.b_dec.device
        x = self.units[0](_mine(rows[self.place.hook]).to(device, torch.float32))
        y = x
        if self.place.hook_out is not None:
            y = self.units[1](_mine(rows[self.place.out]).to(device, torch.float32))
        lr = self.spec.lr * rate(self.spec, self.done, self.steps)
        for group in self.adam.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        dead = self.dead if self.spec.largest and bool(self.dead.any()) else None
        if dead is None and self._can_be_replayed(x):
            self._replay = self._replay or _Replay(self, x, y)
            found = self._replay(x, y)
        else:
            found = self._learn(x, y, dead)
        self.done += 1
        return found

    def _can_be_replayed(self, x: Tensor) -> bool:
        """After some steps in the ordinary way, which make what a replay uses: kernels, moments, memory."""
        if not gpu.has_kernels(x) or self.spec.architecture != "topk" or processes.count() > 1:
            return False
        if self._replay is not None:
            return self._replay.x.shape == x.shape
        return self.chooser.space is not None and len(self.chooser.space) == len(x) and self.done - self._began >= 3

    def _learn(self, x: Tensor, y: Tensor, dead: Tensor | None) -> objectives.Step:
        price = min(1.0, self.done / self.spec.price_warm_up) if self.spec.price_warm_up else 1.0
        found = objectives.step(self.weights, x, y, self.spec, self.chooser, dead, price)
        found.loss.backward()
        processes.average([p.grad for p in self.parameters if p.grad is not None])
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.since_fired += 1
        self.since_fired.masked_fill_(processes.anywhere(found.fired), 0)
        return found

    @torch.no_grad()
    def sae(self, some: Mapping[str, Float[Tensor, "row _"]], **about: Any) -> SAE:
        """What has been learned, for activations as they are. Decoder rows have length 1 on average: in the units of
        training all have the same length, so that the latents with the largest values are those that were chosen there.

        some  rows at its place. batchtopk and matryoshka have no rule for one row: they become jumprelu, with one
              threshold for all, at which so many latents are active on these rows as were in training. (SAELens takes a
              running mean of training's smallest active values, which comes after what the weights have become.)
        """
        spec, w, norms = self.spec, self.weights, self.weights.norms
        read, written = self.units if self.place.hook_out is not None else (self.units[0],) * 2
        into, out = (units.scale.to(w.bias) for units in (read, written))
        known = {"hook_name": self.place.hook, **about}
        if self.place.hook_out is not None:
            known["hook_name_out"] = self.place.hook_out
        bias = w.bias
        if not spec.subtract:  # of an SAE, b_dec takes the centre away
            bias = bias - w.enc @ (read.centre.to(bias) * into)
        # In the units of training the latent is v and its decoder row has length `norms`.
        dec = w.dec / norms[:, None] / out
        size = dec.norm(dim=-1).mean()
        tensors = {
            "W_enc": (w.enc * (norms * size)[:, None] * into).T.contiguous(),
            "b_enc": bias * norms * size,
            "W_dec": dec / size,
            "b_dec": written.back(w.b_dec),
        }
        kind: Any = spec.architecture
        threshold = None if w.threshold is None else w.threshold * norms * size
        if spec.architecture in ("batchtopk", "matryoshka"):
            x = read(some[self.place.hook].to(w.bias.device, torch.float32))
            values = (
                objectives.scores(w, x, replace(spec, selection="float32"))
                .float()
                .relu()
                .flatten()
                .topk(int(spec.k * len(x)) + 1, sorted=True)
                .values
            )
            kind, threshold = "jumprelu", torch.full_like(w.bias, float(values[-2:].mean() * size))
        return SAE(
            kind, **{name: x.detach().clone() for name, x in tensors.items()},
            threshold=None if threshold is None else threshold.detach().clone(),
            k=int(spec.k) if kind == "topk" else None, subtract=spec.subtract,
            transcoder=self.place.hook_out is not None, about=known,
        )  # fmt: skip

    # ---- checkpoints ----

    def state(self) -> dict[str, Tensor]:
        state = {f"weight.{name}": x.detach() for name, x in self.weights.tensors().items()}
        for i, p in enumerate(self.parameters):
            state |= {f"moment.{i}.{name}": x for name, x in self.adam.state[p].items()}
        bound = torch.tensor(self.chooser.bound, dtype=torch.float64)
        return state | {"since_fired": self.since_fired, "bound": bound}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], done: int) -> None:
        for name, x in self.weights.tensors().items():
            x.copy_(state[f"weight.{name}"])
        for i, p in enumerate(self.parameters):
            prefix = f"moment.{i}."
            moments = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
            self.adam.state[p] = {name: x.to(p.device, copy=True) for name, x in moments.items()}
        self.since_fired.copy_(state["since_fired"])
        self.chooser.bound, self.done, self._began = float(state["bound"]), done, done
        self._replay = None


class _Replay:
    """A step without dead latents as one launch. It has some 150 kernels, which a GPU computes in half the time in
    which a CPU asks for them. What it reads and writes stays where it is in memory."""

    def __init__(self, training: Training, x: Tensor, y: Tensor):
        self.x = x.clone()
        self.y = self.x if y is x else y.clone()
        self.space = training.chooser.space
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            found = training._learn(self.x, self.y, None)
        losses = {name: loss.detach() for name, loss in found.losses.items()}
        self.found = objectives.Step(losses, found.fired, found.l0)

    def __call__(self, x: Tensor, y: Tensor) -> objectives.Step:
        self.x.copy_(x)
        if self.y is not self.x:
            self.y.copy_(y)
        self.graph.replay()
        return self.found


def _mine(rows: Float[Tensor, "row d"]) -> Float[Tensor, "part d"]:
    """This process's share of a batch."""
    share = len(rows) // processes.count()
    return rows if processes.count() == 1 else rows[processes.number() * share :][:share]


def _parameter(x: Tensor, device: str | torch.device) -> Tensor:
    return x.to(device).contiguous().requires_grad_()


def rate(spec: Spec, done: int, steps: int) -> float:
    """The learning rate of the next step, as a share of the largest: up, constant, down to 0, all linear."""
    if done < spec.warm_up:
        low = 1 / spec.warm_up
        return low + (1 - low) * done / max(1, spec.warm_up - 1)
    left = steps - done
    return left / spec.decay if left < spec.decay else 1.0


# ---- several at once ----


Curve = dict[str, list[float]]


class Progress:
    """Several trainings on one stream, with their curves; kept in a folder, and taken up there."""

    def __init__(self, trainings: Mapping[str, Training], folder: Path | None, identity: Mapping[str, Any]):
        """identity  what decides the outcome beside the specifications: model, text, sizes of the stream

        Raises UserError if the folder holds a checkpoint of something else.
        """
        self.trainings, self.folder = dict(trainings), folder
        specs = {name: [asdict(one.spec), asdict(one.place), one.steps] for name, one in self.trainings.items()}
        self.identity = json.loads(json.dumps({**identity, "trainings": specs}))
        self.curves: dict[str, Curve] = {name: {} for name in self.trainings}
        self.seconds = 0.0
        if folder is not None and (folder / CHECKPOINT).is_file():
            self._resume(folder / CHECKPOINT)

    @property
    def done(self) -> int:
        return next(iter(self.trainings.values())).done

    def run(
        self,
        stream: Iterator[Mapping[str, Tensor]],
        *,
        every: float = 60.0,
        points: int = 100,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Train to the end on a stream that begins where this left off; a checkpoint every so many seconds, and so many
        points on each curve."""
        steps = next(iter(self.trainings.values())).steps
        started, before, kept = clock(), self.seconds, self.seconds
        note = max(1, steps // points)
        silent = processes.number() > 0
        with progress.track(total=steps, initial=self.done, desc="train-sae", silent=silent) as bar:
            while self.done < steps:
                rows = next(stream)
                for name, one in self.trainings.items():
                    found = one.step(rows)
                    if one.done % note == 0 or one.done == steps:
                        self._note(name, one, found)
                bar.update()
                self.seconds = processes.first(before + clock() - started)
                if self.seconds - kept >= every and self.done < steps:
                    kept = self.seconds
                    self.checkpoint()
        self.checkpoint()

    def _note(self, name: str, one: Training, found: objectives.Step) -> None:
        parts_of_loss = {key: x.detach().clone() for key, x in found.losses.items()}
        processes.average([*parts_of_loss.values(), found.l0])
        losses = {key: float(x) for key, x in parts_of_loss.items()}
        row = {"step": float(one.done), "loss": sum(losses.values()), "l0": float(found.l0)}
        row |= {"dead": float(one.dead.float().mean()), **losses}
        for key, value in row.items():
            self.curves[name].setdefault(key, []).append(value)
        progress.note(name, **row)

    def checkpoint(self) -> None:
        for one in self.trainings.values():
            processes.same(one.parameters)
        if self.folder is None or processes.number() > 0:
            return
        state = {f"{name}/{key}": x for name, one in self.trainings.items() for key, x in one.state().items()}
        about = {"identity": self.identity, "done": self.done, "seconds": self.seconds, "curves": self.curves}
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f".{CHECKPOINT}"
        save_file({key: x.detach().cpu().contiguous() for key, x in state.items()}, aside, {"about": json.dumps(about)})
        os.replace(aside, self.folder / CHECKPOINT)
        parts.mark()

    def _resume(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["about"])
            state = load_file(path)
        except (OSError, SafetensorError, LookupError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); delete it to begin anew.") from error
        if about["identity"] != self.identity:
            raise UserError(f"{path} is of another training; give another folder, or delete it to begin anew.")
        for name, one in self.trainings.items():
            prefix = f"{name}/"
            one.restore({k.removeprefix(prefix): x for k, x in state.items() if k.startswith(prefix)}, about["done"])
        self.seconds, self.curves = about["seconds"], about["curves"]
