"""Modular addition: the waves by which a small network that has learned (a + b) mod p adds.

A network that is trained on a share of all pairs first knows those by heart, and long after answers the others too
(grokking). What it has learned by then is trigonometry: each neuron is a wave of one frequency k in each of its
weights, cos(2 pi k n / p + phi) for the number n, and the square multiplies waves, 2 cos x cos y = cos(x + y) +
cos(x - y). The network here is about the smallest that shows it:

    logits(a, b) = (E[a] A + E[b] B)^2 C        E: embedding, A and B: what neurons read of it, C: what they write

trained on all pairs of its share at once, cross-entropy, AdamW. Read are the weights of a neuron on the numbers, E A,
E B and C, by the discrete Fourier transform. A neuron that adds has

    one frequency in all three, and phases with phi_a + phi_b = phi_out

for then the product of the three waves holds cos(2 pi k (a + b - c) / p), largest where c = a + b, and what else it
holds cancels between neurons of different phases. So the logits are sums of these cosines over the key frequencies,
those of the neurons that write anything. How much of the logits' variance they explain is measured over all a, b, c,
less the mean over c, which moves no answer; were a wave weaker by |cos(pi k (a - b) / p)| (the pizza of Zhong et al.),
it would explain 8 / pi^2 = 0.81 of itself.

Whether the waves do it is asked of the weights: all but the key frequencies are taken out of them, or each neuron is
left with its own wave, or the key frequencies are taken out; beside it the same with as many others, drawn at random.
The network before training is read alike, and shows what a maximum over frequencies finds in noise. Without decay of
the weights a network stays with what it knows by heart; left with its neurons' own waves it answers most held-out
pairs even so: the waves are there before what hides them is gone.

Nanda et al. 2023, "Progress measures for grokking via mechanistic interpretability", arXiv 2301.05217: frequencies and
ablations, in a transformer. Gromov 2023, "Grokking modular arithmetic", arXiv 2301.02679: two layers with a square, and
weights that solve it: waves with phases as above. Morwani et al. 2024, arXiv 2311.07568: why one neuron is one
frequency, the largest margin. Zhong et al. 2023, "The clock and the pizza", arXiv 2306.17844: other ways to add.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Complex, Float, Int
from plotly.subplots import make_subplots
from torch import Tensor
from torch.nn import functional as F

from workbench import canvas
from workbench.errors import UserError
from workbench.plots import definition, figure
from workbench.progress import note, track
from workbench.registry import analysis

LIVE = 0.01  # a neuron counts if it writes this share of what the largest does
LEARNED = 0.99  # accuracy from which pairs count as known
POINTS = 100  # of the curve


@dataclass(frozen=True)
class Network:
    """What neurons read of the two numbers and write to the answers; a column is a neuron's."""

    a: Float[Tensor, "modulus neuron"]
    b: Float[Tensor, "modulus neuron"]
    out: Float[Tensor, "modulus neuron"]


@dataclass(frozen=True)
class Reading:
    """The weights of a network as waves.

    frequency      of each neuron: the strongest of its two input weights together, never the constant
    concentration  share of the squared norm at `frequency`; of the input weights, and of the output weights
    phases         at `frequency`, in radians: of a, b and the output
    size           of a neuron: squared norm of its input weights times norm of its output weights
    spectrum       share of the squared norm of all that live at each frequency, from the constant on; inputs, outputs

    Of output weights the mean is left out everywhere: it adds the same to all logits.
    """

    frequency: Int[Tensor, " neuron"]
    concentration: Float[Tensor, "2 neuron"]
    phases: Float[Tensor, "3 neuron"]
    size: Float[Tensor, " neuron"]
    spectrum: Float[Tensor, "2 frequency"]

    @property
    def live(self) -> Bool[Tensor, " neuron"]:
        return lives(self.size)

    @property
    def key(self) -> dict[int, int]:
        """The frequencies of the live neurons, and how many have each."""
        return dict(sorted(Counter(self.frequency[self.live].tolist()).items()))

    @property
    def phase_error(self) -> Float[Tensor, " live"]:
        """How far phi_a + phi_b is from phi_out, in radians: 0 to pi, and pi / 2 on average by chance."""
        a, b, out = self.phases[:, self.live]
        return wrapped(a + b - out).abs()

    def numbers(self) -> dict[str, float]:
        inputs, outputs = self.concentration[:, self.live].mean(1).tolist()
        found = {"concentration": inputs, "concentration_out": outputs, "phase_error": float(self.phase_error.mean())}
        return {name: round(value, 4) for name, value in found.items()}


@dataclass(frozen=True)
class ModularAddition:
    """
    curve      one value per evaluation, by name: step, loss and held_out_loss (nats), accuracy and held_out_accuracy
    network    when training was over
    trained    its reading; untrained: that of the network before the first step
    explained  share of the logits' variance that each frequency explains, from 1 on; trained, untrained
    accuracy   on the pairs held out: of the whole network, and with frequencies taken out of its weights (`ablated`)
    """

    modulus: int
    curve: dict[str, Float[Tensor, " evaluation"]]
    network: Network
    trained: Reading
    untrained: Reading
    explained: Float[Tensor, "2 frequency"]
    accuracy: dict[str, float]
    definition: str

    def reached(self, name: str) -> int | None:
        """The first step at which an accuracy of the curve counts as known."""
        at = (self.curve[name] >= LEARNED).nonzero()
        return int(self.curve["step"][at[0, 0]]) if len(at) else None

    def explained_by_key(self, which: int) -> float:
        key = (self.trained, self.untrained)[which].key
        return float(self.explained[which, [k - 1 for k in key]].sum())

    def summary(self) -> dict[str, Any]:
        return {
            "held_out_accuracy": round(self.accuracy["whole"], 4),
            "memorised_at": self.reached("accuracy"),
            "generalised_at": self.reached("held_out_accuracy"),
            "key_frequencies": {str(k): n for k, n in self.trained.key.items()},
            "live_neurons": int(self.trained.live.sum()),
            **self.trained.numbers(),
            "logits_explained": round(self.explained_by_key(0), 4),
            "accuracy_with_waves": {name: round(x, 4) for name, x in self.accuracy.items()},
            "untrained": self.untrained.numbers() | {"logits_explained": round(self.explained_by_key(1), 4)},
            "definition": self.definition,
        }


@analysis("modular-addition")
def modular_addition(
    seed: int,
    *,
    modulus: int = 59,
    share: float = 0.4,
    embedding: int = 24,
    neurons: int = 128,
    decay: float = 1.0,
    rate: float = 0.01,
    steps: int = 2000,
    controls: int = 20,
) -> ModularAddition:
    """Train a small network on (a + b) mod p and read its weights as waves: frequencies, phases, and what they do.

    modulus    p, an odd number
    share      of all pairs that is trained on; the rest is held out
    embedding  width of what a number becomes before neurons read it
    neurons    of the one hidden layer
    decay      of the weights (AdamW's); without it pairs are known by heart and no others
    rate       of learning
    steps      each on all the pairs of the share
    controls   draws of as many other frequencies as there are key ones
    """
    trained_on = round(share * modulus**2)
    if modulus < 5 or modulus % 2 == 0:
        raise UserError(f"modulus={modulus} is not an odd number of at least 5; take a prime such as 59.")
    if not 0 < trained_on < modulus**2:
        raise UserError(f"share={share} leaves no pairs to train on or none to hold out; it is between 0 and 1.")
    if min(embedding, neurons, steps, controls) < 1 or decay < 0 or rate <= 0:
        raise UserError("embedding, neurons, steps and controls are at least 1, rate above 0 and decay not below it.")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(modulus**2, generator=generator)
    held_out = order[trained_on:]
    before, after, curve = train(
        modulus, order[:trained_on], held_out, generator, embedding=embedding, neurons=neurons, decay=decay, rate=rate,
        steps=steps,
    )  # fmt: skip
    found = read(after)
    if not 0 < float(found.size.max()) < math.inf:
        raise UserError(f"training with rate={rate} and decay={decay} left no network to read; take smaller ones.")
    return ModularAddition(
        modulus, curve, after, found, read(before),
        torch.stack([explained(logits(network)) for network in (after, before)]),
        ablated(after, found, held_out, generator, controls),
        "a neuron is read as the wave cos(2 pi k n / p + phi) that holds most of the squared norm of its weights on "
        "the numbers n; accuracy is the share of pairs held out for which a + b gets the largest logit",
    )  # fmt: skip


def train(
    modulus: int, seen: Int[Tensor, " pair"], held_out: Int[Tensor, " other"], generator: torch.Generator, *,
    embedding: int, neurons: int, decay: float, rate: float, steps: int,
) -> tuple[Network, Network, dict[str, Tensor]]:  # fmt: skip
    """The network before and after, and the curve. Pairs are numbered a * modulus + b."""

    def normal(*shape: int, size: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * size).requires_grad_()

    embed = normal(modulus, embedding, size=embedding**-0.5)
    read_a, read_b = (normal(embedding, neurons, size=embedding**-0.5) for _ in range(2))
    out = normal(neurons, modulus, size=neurons**-0.5)
    optimizer = torch.optim.AdamW([embed, read_a, read_b, out], lr=rate, weight_decay=decay, betas=(0.9, 0.98))

    def network() -> Network:
        return Network((embed @ read_a).detach(), (embed @ read_b).detach(), out.detach().T.clone())

    def judged(pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and accuracy."""
        a, b = pairs // modulus, pairs % modulus
        # F.embedding and not indexing, whose gradient is summed in no fixed order where there are several threads.
        found = (F.embedding(a, embed @ read_a) + F.embedding(b, embed @ read_b)).square() @ out
        right = (a + b) % modulus
        return F.cross_entropy(found, right), (found.argmax(1) == right).float().mean()

    before, curve = network(), []
    for step in track(range(steps + 1), "modular addition"):
        loss, accuracy = judged(seen)
        if step % max(1, steps // POINTS) == 0 or step == steps:
            with torch.no_grad():
                others = dict(zip(("held_out_loss", "held_out_accuracy"), map(float, judged(held_out)), strict=True))
            curve.append({"step": step, "loss": float(loss.detach()), "accuracy": float(accuracy)} | others)
            note("modular-addition", **curve[-1])
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return before, network(), {name: torch.tensor([float(row[name]) for row in curve]) for name in curve[0]}


# ---- the mathematics ----


def logits(network: Network) -> Float[Tensor, "modulus modulus modulus"]:
    """Of every a, b and answer c."""
    found: Tensor = (network.a[:, None] + network.b[None]).square() @ network.out.T
    return found


def waves(weights: Float[Tensor, "modulus neuron"]) -> Complex[Tensor, "frequency neuron"]:
    """z with weights[n] = sum over k of |z_k| cos(2 pi k n / p + arg z_k); p is odd."""
    found: Tensor = torch.fft.rfft(weights.double(), dim=0) * 2 / len(weights)
    found[0] /= 2
    return found


def power(weights: Float[Tensor, "modulus neuron"]) -> Float[Tensor, "frequency neuron"]:
    """The squared norm of the weights, by frequency."""
    found = waves(weights).abs().square() * len(weights) / 2
    found[0] *= 2
    return found


def read(network: Network) -> Reading:
    # What a neuron writes to all answers alike moves none.
    inputs, outputs = power(network.a) + power(network.b), power(network.out - network.out.mean(0))
    frequency = 1 + inputs[1:].argmax(0)
    at = frequency, torch.arange(len(frequency))
    size = inputs.sum(0) * outputs.sum(0).sqrt()
    of_live = torch.stack([part[:, lives(size)].sum(1) for part in (inputs, outputs)])
    return Reading(
        frequency=frequency,
        concentration=torch.stack([part[at] / part.sum(0).clamp_min(1e-300) for part in (inputs, outputs)]),
        phases=torch.stack([waves(part)[at].angle() for part in (network.a, network.b, network.out)]),
        size=size,
        spectrum=of_live / of_live.sum(1, keepdim=True),
    )


def lives(size: Float[Tensor, " neuron"]) -> Bool[Tensor, " neuron"]:
    return size >= LIVE * size.max()


def wrapped(angle: Float[Tensor, " neuron"]) -> Float[Tensor, " neuron"]:
    """Between -pi and pi."""
    return (angle + math.pi).remainder(2 * math.pi) - math.pi


def explained(logits: Float[Tensor, "modulus modulus modulus"]) -> Float[Tensor, " frequency"]:
    """Share of the variance that the best multiple of cos(2 pi k (a + b - c) / p) explains, for k from 1 on."""
    p = len(logits)
    centred = logits.double() - logits.double().mean(-1, keepdim=True)
    n = torch.arange(p)
    off = (n[:, None, None] + n[:, None] - n) % p  # a + b - c
    mean = torch.zeros(p, dtype=torch.float64).index_add_(0, off.flatten(), centred.flatten()) / p**2
    cosines = torch.cos(2 * math.pi / p * (n[1 : p // 2 + 1, None] * n).double())
    # Cosines of different frequencies are orthogonal, and the mean square of each is 1/2.
    return (cosines @ mean * 2 / p).square() / 2 / centred.square().mean()


def projected(network: Network, kept: Bool[Tensor, "frequency neuron"]) -> Network:
    """The network with only the kept frequencies in all its weights."""
    p = len(network.a)
    parts = (torch.fft.irfft(torch.fft.rfft(x, dim=0) * kept, n=p, dim=0) for x in (network.a, network.b, network.out))
    return Network(*parts)


def ablated(
    network: Network, found: Reading, held_out: Int[Tensor, " pair"], generator: torch.Generator, controls: int
) -> dict[str, float]:
    """Accuracy on the pairs held out.

    whole, own                nothing taken out; each neuron left with its own frequency in its weights
    key, without_key          all neurons left with the key frequencies; with all but these
    other, without_other      the same with as many others, mean of the draws; left out where there are not as many
    """
    p, frequencies = len(network.a), torch.arange(len(network.a) // 2 + 1)
    a, b = held_out // p, held_out % p

    def accuracy(kept: Tensor) -> float:
        left = projected(network, kept.expand(-1, network.a.shape[1]))
        return float((logits(left)[a, b].argmax(-1) == (a + b) % p).double().mean())

    def these(chosen: Tensor) -> Tensor:
        return torch.isin(frequencies, chosen)[:, None]

    key = torch.tensor(list(found.key))
    others = frequencies[1:][~torch.isin(frequencies[1:], key)]
    accuracies = {
        "whole": accuracy(torch.ones(len(frequencies), 1, dtype=torch.bool)),
        "own": accuracy(frequencies[:, None] == found.frequency),
        "key": accuracy(these(key)),
        "without_key": accuracy(~these(key)),
    }
    if len(others) < len(key):
        return accuracies
    draws = [these(others[torch.randperm(len(others), generator=generator)[: len(key)]]) for _ in range(controls)]
    accuracies["other"] = sum(map(accuracy, draws)) / controls
    accuracies["without_other"] = sum(accuracy(~kept) for kept in draws) / controls
    return accuracies


# ---- figure ----

BLUE, ORANGE, GREY = canvas.POSITIVE.format(0.85), canvas.NEGATIVE.format(0.85), "rgba(128,128,128,0.75)"
BARS = {
    "whole": ("whole network", BLUE),
    "own": ("each neuron its own wave", BLUE),
    "key": ("key frequencies alone", BLUE),
    "without_other": ("without as many others", BLUE),
    "without_key": ("without the key ones", ORANGE),
    "other": ("as many others alone", ORANGE),
}


@figure.register
def modular_figure(result: ModularAddition) -> go.Figure:
    """Training; what frequencies the weights hold; the largest neuron; the law of the phases; what the waves do."""
    titles = (
        "accuracy", "loss", "weights by frequency", "the neuron that writes most", "phases of neurons",
        "accuracy on held-out pairs",
    )  # fmt: skip
    fig = make_subplots(rows=2, cols=3, subplot_titles=titles, vertical_spacing=0.22, horizontal_spacing=0.09)
    for draw in (_training, _spectrum, _neuron, _phases, _ablations):
        draw(fig, result)
    fig.update_xaxes(title_standoff=4).update_yaxes(title_standoff=4)
    fig.update_annotations(font_size=13, yshift=4)
    fig.update_layout(legend={"orientation": "h", "y": -0.13, "x": 0, "yanchor": "top"})
    return canvas.finish(fig, 460, top=34, bottom=84)


def _scatter(
    fig: go.Figure, row: int, col: int, x: Tensor, y: Tensor, name: str, colour: str, size: int = 2, **more: Any
) -> None:
    """A line, or with another mode dots; `size` is the width of the one and the diameter of the other."""
    looks: dict[str, Any] = {"line": {"color": colour, "width": size}, "marker": {"color": colour, "size": size}}
    looks |= {"mode": "lines", "showlegend": False, "hovertemplate": f"%{{x}}: %{{y:.3g}}<extra>{name}</extra>"}
    trace = go.Scatter(x=x.tolist(), y=canvas.cells(y), name=name, legendgroup=name, **looks | more)
    fig.add_trace(trace, row=row, col=col)


def _training(fig: go.Figure, result: ModularAddition) -> None:
    steps = result.curve["step"]
    for col, what in ((1, "accuracy"), (2, "loss")):
        _scatter(fig, 1, col, steps, result.curve[what], "trained on", GREY, showlegend=col == 1)
        _scatter(fig, 1, col, steps, result.curve[f"held_out_{what}"], "held out", BLUE, showlegend=col == 1)
        fig.update_xaxes(title_text="step", nticks=4, row=1, col=col)
    fig.update_yaxes(range=[-0.03, 1.03], tickformat=".0%", nticks=3, row=1, col=1)
    fig.update_yaxes(type="log", dtick=2, exponentformat="power", tickfont_size=10, title_text="nats", row=1, col=2)


def _spectrum(fig: go.Figure, result: ModularAddition) -> None:
    for reading, name, colour in ((result.trained, "trained", BLUE), (result.untrained, "untrained", GREY)):
        share, key = reading.spectrum.mean(0), reading.key
        hover = [f"frequency {k}: {x:.1%} of the squared norm, {key.get(k, 0)} neurons" for k, x in enumerate(share)]
        looks = {"marker_color": colour, "marker_line_width": 0, "name": name, "legendgroup": name}
        bar = go.Bar(y=share.tolist(), hovertext=hover, hovertemplate="%{hovertext}<extra></extra>", **looks)
        fig.add_trace(bar, row=1, col=3)
    key = result.trained.key
    heights = result.trained.spectrum.mean(0)[list(key)]
    named: dict[str, Any] = {"text": [str(k) for k in key], "textposition": "top center", "textfont_size": 10}
    _scatter(fig, 1, 3, torch.tensor(list(key)), heights, "trained", BLUE, mode="text", hoverinfo="skip", **named)
    fig.update_xaxes(title_text="frequency", nticks=6, row=1, col=3)
    fig.update_yaxes(tickformat=".0%", nticks=4, range=[0, 1.15 * float(heights.max())], row=1, col=3)


def _neuron(fig: go.Figure, result: ModularAddition) -> None:
    """Its weights as dots, and the waves read from them, over k n mod p: there a wave is a single period."""
    j, p = int(result.trained.size.argmax()), result.modulus
    k = int(result.trained.frequency[j])
    order = (k * torch.arange(p) % p).argsort()
    names = [f"number {n}" for n in order.tolist()]
    network = result.network
    parts = (network.a, "a", BLUE), (network.b, "b", ORANGE), (network.out - network.out.mean(0), "output", GREY)
    for weights, name, colour in parts:
        column = weights[:, j : j + 1]
        wave, size = waves(column)[k, 0], column.norm() / math.sqrt(p)
        x, fitted = k * order % p, wave.abs() * torch.cos(2 * math.pi * k / p * order + wave.angle())
        label = f"weights: {name}"
        hover: dict[str, Any] = {"hovertext": names, "hovertemplate": "%{hovertext}: %{y:.2f}"}
        _scatter(fig, 2, 1, x, column[order, 0] / size, label, colour, 4, mode="markers", showlegend=True, **hover)
        _scatter(fig, 2, 1, x, fitted / size, label, colour, 1, hoverinfo="skip")
    fig.update_xaxes(title_text=f"{k} × number mod {p}", nticks=5, row=2, col=1)
    fig.update_yaxes(title_text="weight over its RMS", nticks=4, row=2, col=1)


def _phases(fig: go.Figure, result: ModularAddition) -> None:
    for reading, name, colour, size in ((result.untrained, "untrained", GREY, 3), (result.trained, "trained", BLUE, 5)):
        a, b, out = reading.phases[:, reading.live]
        hover = [f"frequency {k}" for k in reading.frequency[reading.live].tolist()]
        shown: dict[str, Any] = {"hovertext": hover, "hovertemplate": "%{hovertext}: %{x:.2f}, %{y:.2f}"}
        _scatter(fig, 2, 2, wrapped(a + b), out, name, colour, size, mode="markers", **shown)
    ends = torch.tensor([-math.pi, math.pi])
    _scatter(fig, 2, 2, ends, ends, "law", canvas.FAINT, 1, hoverinfo="skip")
    ticks = {"tickvals": [-math.pi, 0, math.pi], "ticktext": ["−π", "0", "π"], "range": [-3.4, 3.4]}
    fig.update_xaxes(title_text="φ of a + φ of b", **ticks, row=2, col=2)
    fig.update_yaxes(title_text="φ of output", **ticks, row=2, col=2)


def _ablations(fig: go.Figure, result: ModularAddition) -> None:
    names = [name for name in reversed(BARS) if name in result.accuracy]
    labels, colours = zip(*(BARS[name] for name in names), strict=True)
    shares = [result.accuracy[name] for name in names]
    bars = go.Bar(
        x=shares, y=labels, orientation="h", marker_color=colours, marker_line_width=0, showlegend=False,
        text=[f"{x:.0%}" for x in shares], textposition="auto", hoverinfo="skip",
    )  # fmt: skip
    fig.add_trace(bars, row=2, col=3)
    # Narrower than its column: the names of the bars stand before it.
    fig.update_xaxes(range=[0, 1], tickformat=".0%", nticks=3, domain=[0.84, 1], row=2, col=3)
    fig.update_yaxes(tickfont_size=10, row=2, col=3)


@definition.register
def _(result: ModularAddition) -> str:
    return result.definition
