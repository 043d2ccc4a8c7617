"""What latents respond to and what they write: examples, histograms, densities, tokens, neighbours.

Everything about all latents of an SAE comes from one pass over a text. Of each latent are kept the sequences in which
it is largest, and rows drawn at random from all on which it is active, by whose quantiles examples of every strength
are shown: the largest alone make a latent look more of a piece than it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saes.pretrained import fit, load
from saes.sae import SAE
from workbench import norms, texts
from workbench.activations import ActivationStore
from workbench.errors import UserError, unknown
from workbench.models import LanguageModel
from workbench.registry import analysis

BINS = 40  # of the histograms: equal steps of the logarithm
RANGE = 1e4  # from the largest value down to so much less
AT_ONCE = 2**25  # latents of rows


@dataclass(frozen=True)
class Example:
    """A piece of text around one position, and the latent's value at each of its tokens."""

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    position: int

    @property
    def value(self) -> float:
        return self.values[self.position]


@dataclass(frozen=True)
class Latent:
    """One latent.

    density    share of positions at which it is active
    mean       of its values where it is active; largest: of all
    histogram  counts of its values; edges: of the bins, one more
    top        sequences in which it is largest
    buckets    examples of each quintile of its active values, smallest first
    promoted, suppressed  tokens whose logits a unit of it raises and lowers most, by the final norm's weight and the
               unembedding alone, with the mean over the vocabulary subtracted
    neighbours other latents by cosine of the decoder rows
    """

    latent: int
    density: float
    mean: float
    largest: float
    histogram: tuple[int, ...]
    edges: tuple[float, ...]
    top: tuple[Example, ...]
    buckets: tuple[tuple[Example, ...], ...]
    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]
    neighbours: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Latents:
    """Some latents of an SAE at a hook point, and the density of all of them.

    pages  of each on Neuronpedia, where it has the SAE
    """

    hook: str
    latents: tuple[Latent, ...]
    density: Float[Tensor, " latent"]
    definition: str
    pages: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        return {
            "hook": self.hook,
            "latents": [
                {
                    "latent": one.latent,
                    "density": round(one.density, 6),
                    "promoted": [token for token, _ in one.promoted[:5]],
                    "top": "".join(one.top[0].tokens) if one.top else "",
                    **({"page": self.pages[i]} if self.pages else {}),
                }
                for i, one in enumerate(self.latents)
            ],
            "dead": round(float((self.density == 0).double().mean()), 4),
            "definition": self.definition,
        }


@analysis("latents", model="smollm2-135m")
def latents(
    model: LanguageModel,
    store: ActivationStore,
    seed: int,
    *,
    sae: str = "smollm2-135m",
    hook: str = "",
    which: str = "",
    text: str = texts.HELP,
    tokens: int = 50_000,
    length: int = 64,
    examples: int = 10,
) -> Latents:
    """What latents of an SAE respond to in a text, and what they write.

    sae       a name, a run or a folder
    hook      which of its SAEs, if there are several
    which     latents by number, separated by commas; none: ten active ones, drawn at random
    text      libreoffice-help, parallel, or a file or folder
    tokens    of the text
    length    of the sequences that it is cut into
    examples  sequences in which each is largest; a third as many for each quintile
    """
    chosen = one_of(load(sae), hook, sae)
    fit(model, store, chosen)
    sequences = texts.sequences(texts.load(text), model, length, tokens, seed)
    seen = Seen.of(chosen, examples, seed)
    for part, x in rows(model, store, chosen, sequences):
        seen.add(part, x)
    density = seen.active / seen.rows
    if which:
        words = [word.strip() for word in which.split(",")]
        if not all(word.isdecimal() for word in words):
            raise UserError(f"which={which!r} names no latents; give numbers, such as 12,345.")
        wanted = [int(word) for word in words]
        for one in wanted:
            chosen.direction(one)
    else:
        alive = density.nonzero()[:, 0]
        wanted = alive[torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))[:10]].tolist()
    if not wanted:
        raise UserError(f"no latent of {sae} is active on {text}; is it of this model and hook point?")
    show = Show(model, store, chosen, sequences)
    found = tuple(seen.latent(one, show) for one in wanted)
    return Latents(
        chosen.hook, found, density.cpu(),
        f"{len(sequences)} sequences of {length} tokens of {text}, without their first position",
        tuple(page for one in wanted if (page := chosen.neuronpedia(one))),
    )  # fmt: skip


def one_of(found: dict[str, SAE], hook: str, name: str) -> SAE:
    """The SAE of a hook point. Raises UserError if there is none, or if there are several and none is named."""
    if not hook and len(found) == 1:
        return next(iter(found.values()))
    if not hook:
        raise UserError(f"{name} has {len(found)} SAEs; name one by its hook point: {', '.join(found)}.")
    if hook not in found:
        raise unknown(f"hook point of {name}", hook, found)
    return found[hook]


def rows(
    model: LanguageModel, store: ActivationStore, sae: SAE, sequences: Sequence[Int[Tensor, " pos"]]
) -> Iterator[tuple[range, Float[Tensor, "sequence pos latent"]]]:
    """Latents of some sequences of one length at a time, without the first position of each."""
    at_once = max(1, AT_ONCE // (len(sequences[0]) * sae.n_latents))
    for start in range(0, len(sequences), at_once):
        part = range(start, min(start + at_once, len(sequences)))
        x = torch.stack(store.get(model, [sequences[i] for i in part], [sae.hook])[sae.hook])[:, 1:]
        with torch.no_grad():
            yield part, sae.encode(x.to(sae.W_enc.device))


@dataclass
class Seen:
    """What a pass keeps of every latent: counts, sums, the largest and some drawn at random, with their places.

    top, drawn  values; top_at, drawn_at: sequence * pos + position; keys: random numbers, the largest of which are kept
    """

    active: Float[Tensor, " latent"]
    total: Float[Tensor, " latent"]
    counts: Float[Tensor, "latent bin"]
    top: Float[Tensor, "n latent"]
    top_at: Int[Tensor, "n latent"]
    keys: Float[Tensor, "m latent"]
    drawn: Float[Tensor, "m latent"]
    drawn_at: Int[Tensor, "m latent"]
    generator: torch.Generator
    ceiling: float = 0.0
    rows: int = 0
    pos: int = 0

    @classmethod
    def of(cls, sae: SAE, examples: int, seed: int) -> Seen:
        n, device, m = sae.n_latents, sae.W_enc.device, 5 * math.ceil(examples / 3) * 4
        zeros = torch.zeros(n, device=device)
        return cls(
            zeros, zeros.clone(), torch.zeros(n, BINS, device=device),
            torch.zeros(examples, n, device=device), torch.zeros(examples, n, dtype=torch.long, device=device),
            torch.zeros(m, n, device=device), torch.zeros(m, n, device=device),
            torch.zeros(m, n, dtype=torch.long, device=device), torch.Generator(device).manual_seed(seed),
        )  # fmt: skip

    def add(self, part: range, x: Float[Tensor, "sequence pos latent"]) -> None:
        sequences, pos = x.shape[:2]
        self.pos, self.rows = pos, self.rows + sequences * pos
        if self.ceiling == 0.0:
            self.ceiling = 4 * float(x.max())  # values above it count in the last bin
        first = part.start * pos
        flat = x.flatten(0, 1)
        on = flat > 0
        self.active += on.sum(0)
        self.total += flat.sum(0)
        self.counts += self._binned(flat, on)
        # Of each sequence the largest, so that examples are of different ones.
        best, at = x.max(1)
        offset = first + torch.arange(sequences, device=x.device)[:, None] * pos
        self.top, self.top_at = _merge(self.top, self.top_at, best, at + offset)
        keys = torch.rand(flat.shape, generator=self.generator, device=x.device) * on
        k = min(len(self.keys), len(keys))
        keys, at = keys.topk(k, dim=0)
        values = flat.gather(0, at)
        both = torch.cat([self.keys, keys]), torch.cat([self.drawn, values]), torch.cat([self.drawn_at, at + first])
        self.keys, order = both[0].topk(len(self.keys), dim=0)
        self.drawn, self.drawn_at = both[1].gather(0, order), both[2].gather(0, order)

    def _binned(self, flat: Float[Tensor, "row latent"], on: Tensor) -> Float[Tensor, "latent bin"]:
        row, latent = on.nonzero(as_tuple=True)
        share = (flat[row, latent] / self.ceiling).clamp(1 / RANGE, 1).log() / math.log(RANGE) + 1
        bins = (share * BINS).long().clamp(max=BINS - 1)
        counts = torch.bincount(latent * BINS + bins, minlength=flat.shape[1] * BINS)
        return counts.view(-1, BINS).to(self.counts.dtype)

    def edges(self) -> tuple[float, ...]:
        return tuple(self.ceiling * RANGE ** (i / BINS - 1) for i in range(BINS + 1))

    def latent(self, latent: int, show: Show) -> Latent:
        """Everything about one."""
        kept = self.drawn[:, latent]
        order = kept.argsort()[int((kept == 0).sum()) :]
        per = max(1, len(self.keys) // 20)
        active = int(self.active[latent])
        places = self.top_at[:, latent][self.top[:, latent] > 0].tolist()
        buckets = [self.drawn_at[group[:per], latent].tolist() for group in order.tensor_split(5)]
        return Latent(
            latent, active / self.rows, float(self.total[latent]) / max(1, active), float(self.top[:, latent].max()),
            tuple(int(count) for count in self.counts[latent].tolist()), self.edges(),
            tuple(show.example(latent, *divmod(place, self.pos)) for place in places),
            tuple(tuple(show.example(latent, *divmod(place, self.pos)) for place in some) for some in buckets),
            *show.tokens(latent, 10), show.neighbours(latent, 10),
        )  # fmt: skip


def _merge(values: Tensor, places: Tensor, more: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of both, as many as there were, with their places."""
    kept, order = torch.cat([values, more]).topk(len(values), dim=0)
    return kept, torch.cat([places, at]).gather(0, order)


@dataclass
class Show:
    """Text and weights around latents, for people to read."""

    model: LanguageModel
    store: ActivationStore
    sae: SAE
    sequences: Sequence[Int[Tensor, " pos"]]

    def example(self, latent: int, sequence: int, position: int) -> Example:
        """A sequence, without its first position, as the latent sees it."""
        ids = self.sequences[sequence]
        x = self.store.get(self.model, [ids], [self.sae.hook])[self.sae.hook][0][1:]
        with torch.no_grad():
            values = self.sae.encode(x.to(self.sae.W_enc.device))[:, latent].tolist()
        return Example(tuple(pieces(self.model, ids[1:].tolist())), tuple(values), position)

    @cached_property
    def _unembed(self) -> Float[Tensor, "d_model vocab"]:
        """With the final norm's weight, and without what it adds to all tokens alike."""
        weight = self.model.unembed_weight.float()
        gain = norms.measure(self.model.final_norm, weight[:, 0]).gain
        out: Tensor = gain[:, None] * (weight - weight.mean(1, keepdim=True))
        return out

    def tokens(self, latent: int, k: int) -> tuple[tuple[tuple[str, float], ...], tuple[tuple[str, float], ...]]:
        """Tokens whose logits a unit of it raises most and lowers most. None where it does not write to the residual
        stream."""
        direction = self.sae.direction(latent).to(self.model.device)
        if len(direction) != self.model.config.d_model:
            return (), ()
        effect = direction @ self._unembed
        both = (effect.topk(k), effect.topk(k, largest=False))
        up, down = (
            tuple(zip(self.model.token_strings(found.indices.tolist()), found.values.tolist(), strict=True))
            for found in both
        )
        return up, down

    def neighbours(self, latent: int, k: int) -> tuple[tuple[int, float], ...]:
        """Other latents by cosine of the decoder rows."""
        directions = self.sae.W_dec / self.sae.norms[:, None]
        cosine = directions @ directions[latent]
        cosine[latent] = -math.inf
        best = cosine.topk(min(k, len(cosine) - 1))
        return tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def pieces(model: LanguageModel, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text: of a sign that takes several tokens, the last has it and the others are empty.
    Together they are the text."""
    found, start = [], 0
    for i in range(len(ids)):
        text = str(model.tokenizer.decode(list(ids[start : i + 1])))
        if text.endswith("\ufffd") and i - start < 3 and i + 1 < len(ids):  # UTF-8 has at most 4 bytes for a sign
            text = ""
        else:
            start = i + 1
        found.append(text)
    return found
