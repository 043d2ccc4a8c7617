"""Ways to steer, tried on validation prompts: how much of the next token they move, and what texts they write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saes.evaluate import by_length
from saes.steering import baselines
from saes.steering.evaluate import Unsteered, Verdict, Written, judge, write
from saes.steering.steer import Plan, Steered, Steering
from workbench import parts, sites
from workbench.backend import Resume
from workbench.models import LanguageModel
from workbench.progress import track

LENGTHS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # of latents, in lengths of the mean difference; baselines: 0.5 to 2
DECAYS = (1.0, 0.9)  # of strength, from one new token to the next
FINER = (0.85, 1.0, 1.2)  # around the best: times its strength, each with FINER_DECAYS
FINER_DECAYS = (1.0, 0.95, 0.9)
AT_ONCE = 1024  # tokens
MOST = 0.9  # of the mass that a latent can have


@dataclass(frozen=True)
class Cell:
    """One way to steer, on validation prompts."""

    method: str
    hook: str
    latent: int | None
    strength: float
    mass: float
    verdict: Verdict | None = None
    decay: float = 1.0

    def is_of(self, one: Steering) -> bool:
        return (self.hook, self.latent, self.strength) == (one.hook, one.latent, one.strength)


def rank(cell: Cell) -> tuple[float, float]:
    """By strict success and score together, which pull apart: the strongest write the language and lose the meaning.
    What wrote nothing comes last."""
    if cell.verdict is None:
        return (-1.0, cell.mass)
    return ((cell.verdict.strict or 0.0) + (cell.verdict.score or 0.0), cell.mass)


@dataclass(frozen=True)
class Cells:
    """What was tried: the mass of every way to steer, in their order, or texts of some, with each decay."""

    cells: tuple[Cell, ...]

    def best(self, tried: Sequence[Steering]) -> Steering:
        cell = max(self.cells, key=rank)
        return replace(next(one for one in tried if cell.is_of(one)), decay=cell.decay)

    def around(self, tried: Sequence[Steering], n: int) -> list[Steering]:
        """Other strengths and decays for the n best of those with texts, each of another layer or latent."""
        written = sorted((cell for cell in self.cells if cell.verdict is not None), key=rank, reverse=True)
        best: dict[tuple[str, int | None], Cell] = {}
        for cell in written:
            best.setdefault((cell.hook, cell.latent), cell)
        known = {(cell.hook, cell.latent, cell.strength, cell.decay) for cell in written}
        ways = [
            replace(one, strength=cell.strength * factor, decay=decay)
            for cell in list(best.values())[:n]
            for one in [next(one for one in tried if cell.is_of(one))]
            for factor in FINER
            for decay in FINER_DECAYS
        ]
        return [one for one in ways if (one.hook, one.latent, one.strength, one.decay) not in known]

    def most(self, tried: Sequence[Steering], n: int) -> list[Steering]:
        """Of each hook point the n latents with most mass, each at the strength at which it has it."""
        found: dict[str, dict[int | None, Steering]] = {one.hook: {} for one in tried}
        for i in sorted(range(len(tried)), key=lambda i: -self.cells[i].mass):
            some = found[tried[i].hook]
            if len(some) < n:
                some.setdefault(tried[i].latent, tried[i])
        return [one for some in found.values() for one in some.values()]


@dataclass(frozen=True)
class Writing:
    """Texts on some prompts, always by the same chance."""

    model: LanguageModel
    given: Sequence[str]
    steps: int
    temperature: float
    seed: int
    encoder: str = "e5"

    def write(self, plans: Sequence[Plan]) -> list[Written]:
        return write(self.model, self.given, plans, self.steps, temperature=self.temperature, seed=self.seed)

    def unsteered(self) -> Unsteered:
        return Unsteered.of(
            self.model, self.given, self.steps, temperature=self.temperature, seed=self.seed, encoder=self.encoder
        )

    def report(
        self, plans: Mapping[str, Plan], target: str
    ) -> tuple[dict[str, Verdict], dict[str, tuple[tuple[str, str], ...]]]:
        """Verdicts and examples by method, with prompting and nothing at all beside."""
        beside = self.unsteered()
        told = replace(self, given=baselines.instructed(self.given, target)).write([None])[0]
        texts = dict(zip(plans, self.write(list(plans.values())), strict=True))
        texts |= {"prompting": replace(told, prompts=tuple(self.given)), "none": beside.again}
        return (
            {name: judge(one, target, beside, self.model) for name, one in texts.items()},
            {name: tuple(zip(one.prompts[:5], one.texts[:5], strict=True)) for name, one in texts.items()},
        )


@dataclass(frozen=True)
class Sweep:
    """Ways to steer on validation prompts: the mass of all, texts of the most promising."""

    writing: Writing
    target: str
    ids: Int[Tensor, " token"]
    beside: Unsteered

    def choose(self, method: str, tried: Sequence[Steering], written: int, around: int) -> tuple[Cells, Steering]:
        """What was tried, so many written with, and then those around some of the best; and the best of all."""
        first = parts.once(method, Cells, lambda: self.run(method, tried, written))
        ways = first.around(tried, around)
        finer = parts.once(f"{method}, finer", Cells, lambda: self.texts(method, ways))
        cells = Cells(first.cells + finer.cells)
        return cells, cells.best([*tried, *ways])

    def texts(self, method: str, ways: Sequence[Steering]) -> Cells:
        """With texts of each."""
        both = zip(ways, self.masses(ways), self.writing.write(ways), strict=True)
        return Cells(
            tuple(
                Cell(method, one.hook, one.latent, one.strength, mass, judge(text, self.target, self.beside), one.decay)
                for one, mass, text in both
            )
        )

    def run(self, method: str, tried: Sequence[Steering], written: int) -> Cells:
        """written: how many are written with. Of each layer and latent first the least strength that has most of what
        mass it can have, then those around it; layers and latents in turn, so that none takes all the places, the best
        latent of every layer before any other."""
        masses = self.masses(tried)
        groups: dict[tuple[str, int | None], list[int]] = {}
        for i, one in enumerate(tried):
            groups.setdefault((one.hook, one.latent), []).append(i)
        orders = []
        ranked = sorted(groups, key=lambda group: -max(masses[i] for i in groups[group]))
        first = {hook: (hook, latent) for hook, latent in reversed(ranked)}  # the best of each layer
        for group in (groups[one] for one in sorted(ranked, key=lambda one: one != first[one[0]])):
            most = max(masses[i] for i in group)
            enough = next(place for place, i in enumerate(group) if masses[i] >= MOST * most)
            orders.append([group[place] for place in sorted(range(len(group)), key=lambda p: abs(p - enough))])
        turns = [order[turn] for turn in range(len(LENGTHS)) for order in orders if turn < len(order)]
        chosen = turns[:written]
        ways = [(i, decay) for i in chosen for decay in DECAYS]
        texts = self.writing.write([replace(tried[i], decay=decay) for i, decay in ways])
        seen = {way: judge(text, self.target, self.beside) for way, text in zip(ways, texts, strict=True)}
        return Cells(
            tuple(
                Cell(method, one.hook, one.latent, one.strength, mass, seen.get((i, decay)), decay)
                for i, (one, mass) in enumerate(zip(tried, masses, strict=True))
                for decay in (DECAYS if i in chosen else (1.0,))
            )
        )

    def look(self, method: str, tried: Sequence[Steering]) -> Cells:
        """The masses alone."""
        masses = self.masses(tried)
        return Cells(
            tuple(Cell(method, one.hook, one.latent, one.strength, x) for one, x in zip(tried, masses, strict=True))
        )

    def masses(self, tried: Sequence[Steering]) -> list[float]:
        """Of each way to steer the probability of the next token on tokens of the target language, mean over prompts.
        Prompts of one length and ways at one hook point run together, from that point on."""
        model, totals = self.writing.model, torch.zeros(len(tried))
        sequences = [model.tokenize(text) for text in self.writing.given]
        for rows in track(by_length(sequences, AT_ONCE), "first tokens"):
            for hook in dict.fromkeys(one.hook for one in tried):
                plain = model.run(rows, capture=[hook], logits="none")[hook]
                mine = torch.tensor([i for i, one in enumerate(tried) if one.hook == hook])
                for some in mine.split(max(1, AT_ONCE // rows.numel())):
                    edit = Steered.of([tried[int(i)] for i in some for _ in rows], rows.shape[1])
                    logits = self._from(hook, rows.repeat(len(some), 1), edit, plain)
                    totals[some] += self._share(logits[:, -1]).view(len(some), len(rows)).sum(1).cpu()
        return (totals / len(sequences)).tolist()

    def _from(
        self, hook: str, rows: Int[Tensor, "row pos"], edit: Steered, plain: Float[Tensor, "prompt pos d"]
    ) -> Float[Tensor, "row one vocab"]:
        """Logits after the last token; plain: what the hook point has unsteered, on each prompt once."""
        model, (layer, name) = self.writing.model, sites.split(hook)
        if name == "hook_resid_post" and layer is not None and layer + 1 < model.config.n_layers:
            start = Resume(layer + 1, edit(plain.repeat(len(rows) // len(plain), 1, 1)))
            logits = model.run(rows, start=start, logits="last").logits
        else:
            logits = model.run(rows, edit={hook: edit}, logits="last").logits
        assert logits is not None
        return logits

    def _share(self, logits: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
        return logits.float().softmax(-1)[:, self.ids.to(logits.device)].sum(-1)
