"""Which latents belong to a language: scores of all latents of an SAE, from parallel sentences.

With z a latent's value, t the target and en the source:

    difference      mean of z at the last token of a sentence in t, minus that in en (Chou et al. 2025)
    monolinguality  mean of z over all tokens but the first in t, minus the mean of that over all other languages
                    (Deng et al. 2025)
    effect          the same difference of sentence means in units of their spread: t against all others
    auroc           how often a sentence mean in t is above one in another language
    lape            minus the entropy of the latent's firing rates over languages, where t has the highest
                    (Tang et al. 2024 for neurons)
    langfir         monolinguality of latents that are active in most sentences of t and hardly on random tokens, else 0
                    (LangFIR 2026)
    diffmean        how much of DiffMean, the difference d of the mean activations of t and en, is the latent's: the
                    difference of its means, times w d / d d, where w is what a unit of it writes. Over all latents the
                    sum is the reconstruction's, 1 for a perfect one; both a latent of t and one of en that falls away
                    have a part

The first is the paper's. It reads one token, which is a full stop in most sentences: what tells a Chinese one from an
English one scores high and writes no Chinese. So `bare` is the same on sentences without their final punctuation, and
`vanished` is the share of the top latents whose difference is then less than half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saes.latents import one_of
from saes.pretrained import fit, load
from saes.sae import SAE
from saes.steering.languages import check
from saes.steering.parallel import OWN, sentences
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.registry import analysis

SCORES = ("difference", "monolinguality", "effect", "auroc", "lape", "langfir", "diffmean")
FINAL = " \u00a0\u202f.!?…。！？»”“\"’'」』)）》"
ACTIVE_IN, ACTIVE_ON_NOISE = 0.5, 0.1  # of langfir: share of sentences at least, of random sequences at most
RANDOM = 100  # sequences of random tokens


@dataclass(frozen=True)
class LanguageStats:
    """What an SAE makes of sentences.

    last, bare  mean of each latent at the last token, with final punctuation and without
    sentences   mean of each latent over the tokens of every sentence, but the first
    rate        share of these tokens at which it is active; fired: share of sentences in which it is anywhere
    noise       share of sequences of random tokens in which it is active anywhere
    mean        of what the SAE writes for: activations, the mean over sentences of means over tokens but the first
    dec         what a unit of each latent writes
    """

    hook: str
    languages: tuple[str, ...]
    last: Float[Tensor, "language latent"]
    bare: Float[Tensor, "language latent"]
    sentences: Float[Tensor, "language sentence latent"]
    rate: Float[Tensor, "language latent"]
    fired: Float[Tensor, "language latent"]
    noise: Float[Tensor, " latent"]
    mean: Float[Tensor, "language d"]
    dec: Float[Tensor, "latent d"]


def statistics(
    model: LanguageModel, store: ActivationStore, sae: SAE, parallel: dict[str, list[str]], seed: int = 0
) -> LanguageStats:
    """From one pass over the sentences of each language; activations come from the store."""
    columns: dict[str, list[Tensor]] = {name: [] for name in ("last", "bare", "sentences", "rate", "fired", "mean")}
    *sets, noise = _sets(model, parallel, seed)
    for whole, without in zip(sets[::2], sets[1::2], strict=True):
        z, bare = (_latents(model, store, sae, some) for some in (whole, without))
        columns["last"].append(torch.stack([one[-1] for one in z]).mean(0))
        columns["bare"].append(torch.stack([one[-1] for one in bare]).mean(0))
        columns["sentences"].append(torch.stack([one.mean(0) for one in z]))
        columns["rate"].append((torch.cat(z) > 0).float().mean(0))
        columns["fired"].append(torch.stack([(one > 0).any(0) for one in z]).float().mean(0))
        written = store.get(model, whole, [sae.hook_out])[sae.hook_out]
        columns["mean"].append(torch.stack([row[1:].float().mean(0) for row in written]).mean(0))
    found = _latents(model, store, sae, noise)
    return LanguageStats(
        sae.hook, tuple(parallel), **{name: torch.stack(rows) for name, rows in columns.items()},
        noise=torch.stack([(one > 0).any(0) for one in found]).float().mean(0), dec=sae.W_dec.cpu(),
    )  # fmt: skip


def prepare(
    model: LanguageModel, store: ActivationStore, hooks: Sequence[str], parallel: dict[str, list[str]], seed: int = 0
) -> None:
    """Put into the store what `statistics` of several SAEs will ask for one after the other: one pass for all."""
    for some in _sets(model, parallel, seed):
        store.get(model, some, hooks)


def _sets(model: LanguageModel, parallel: dict[str, list[str]], seed: int) -> list[list[Int[Tensor, " pos"]]]:
    """Tokens of each language's sentences, whole and without final punctuation; last, sequences of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    start = model.tokenize("")
    noise = [torch.cat([start, torch.randint(model.config.d_vocab, (20,), generator=generator)]) for _ in range(RANDOM)]
    sets = [
        [model.tokenize(text.rstrip(end)) for text in sentences]
        for sentences in parallel.values()
        for end in ("", FINAL)
    ]
    return [*sets, noise]


def _latents(
    model: LanguageModel, store: ActivationStore, sae: SAE, sequences: Sequence[Tensor]
) -> list[Float[Tensor, "pos latent"]]:
    """Without the first position of each."""
    rows = [row[1:] for row in store.get(model, sequences, [sae.hook])[sae.hook]]
    with torch.no_grad():
        z = sae.encode(torch.cat(rows).to(sae.W_enc.device)).cpu()
    return list(z.split([len(row) for row in rows]))


def scores(stats: LanguageStats, target: str, source: str = "en") -> dict[str, Float[Tensor, " latent"]]:
    """Each of SCORES, the larger the more of the target language. Raises UserError for languages there are not."""
    for language in (target, source):
        if check(language) not in stats.languages:
            raise UserError(f"there are no sentences in {language}; give some.")
    if target == source:
        raise UserError(f"the target and the source are both {target}; steer towards another language.")
    t, s = stats.languages.index(target), stats.languages.index(source)
    rest = [i for i in range(len(stats.languages)) if i != t]
    own, others = stats.sentences[t], stats.sentences[rest].flatten(0, 1)
    means = stats.sentences.mean(1)
    spread = ((own.var(0) + others.var(0)) / 2).sqrt()
    mono = means[t] - means[rest].mean(0)
    share = stats.rate / stats.rate.sum(0).clamp(min=1e-12)
    entropy = -(share * share.clamp(min=1e-12).log()).sum(0)
    between = stats.mean[t] - stats.mean[s]
    apart = (stats.fired[t] >= ACTIVE_IN) & (stats.noise <= ACTIVE_ON_NOISE)
    return {
        "difference": stats.last[t] - stats.last[s],
        "monolinguality": mono,
        "effect": torch.where(spread > 0, (own.mean(0) - others.mean(0)) / spread.clamp(min=1e-12), 0.0),
        "auroc": auroc(own, others),
        # Of a latent that is active on one token in a hundred at least; the others are few draws.
        "lape": torch.where((stats.rate.argmax(0) == t) & (stats.rate[t] > 0.01), -entropy, -torch.inf),
        "langfir": torch.where(apart, mono, 0.0),
        "diffmean": (means[t] - means[s]) * (stats.dec @ between) / between.square().sum().clamp(min=1e-12),
    }


def owned(stats: LanguageStats, language: str) -> Bool[Tensor, " latent"]:
    """Those that are larger in this language than in any other, mean over sentences."""
    means = stats.sentences.mean(1)
    return (means.argmax(0) == stats.languages.index(language)) & (means.amax(0) > 0)


def by_own_latents(stats: LanguageStats, target: str, source: str) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """The difference of the languages' mean activations in two: what latents that are either's own write, by the
    difference of their means, and the rest."""
    t, s = stats.languages.index(target), stats.languages.index(source)
    own, means = owned(stats, target) | owned(stats, source), stats.sentences.mean(1)
    written = (means[t] - means[s])[own] @ stats.dec[own]
    return written, stats.mean[t] - stats.mean[s] - written


def auroc(own: Float[Tensor, "n latent"], others: Float[Tensor, "m latent"]) -> Float[Tensor, " latent"]:
    """Chance that one of our values is above one of theirs, ties counting half: by ranks (Mann and Whitney 1947)."""
    both = torch.cat([own, others])
    order = both.sort(0)
    rank = torch.empty_like(both)
    place = torch.arange(1, len(both) + 1, dtype=both.dtype)[:, None].expand_as(both)
    # Equal values share the mean of their places.
    new = torch.cat([torch.ones_like(order.values[:1], dtype=torch.bool), order.values[1:] != order.values[:-1]])
    first = torch.where(new, place, 0).cummax(0).values
    last = torch.where(torch.cat([new[1:], torch.ones_like(new[:1])]), place, len(both) + 1)
    last = last.flip(0).cummin(0).values.flip(0)
    rank.scatter_(0, order.indices, (first + last) / 2)
    n, m = len(own), len(others)
    return (rank[:n].sum(0) - n * (n + 1) / 2) / (n * m)


def vanished(stats: LanguageStats, target: str, source: str = "en", k: int = 10) -> float:
    """Share of the k latents of largest difference whose difference is less than half without final punctuation."""
    t, s = stats.languages.index(target), stats.languages.index(source)
    with_it, without = stats.last[t] - stats.last[s], stats.bare[t] - stats.bare[s]
    top = with_it.abs().topk(min(k, len(with_it))).indices
    return float((without[top] / with_it[top] < 0.5).float().mean())


@dataclass(frozen=True)
class LanguageLatents:
    """Scores of all latents for each target language, and how far they agree.

    scores    [score, latent] by language, in the order of `names`
    vanished  by language, see there
    overlap   share of the top latents of every score that are also of the paper's, by language and score
    """

    hook: str
    names: tuple[str, ...]
    scores: dict[str, Float[Tensor, "score latent"]]
    vanished: dict[str, float]
    overlap: dict[str, dict[str, float]]
    definition: str

    def top(self, language: str, score: str, k: int = 3) -> list[tuple[int, float]]:
        """The best latents of a language by a score."""
        return best(self.scores[language][self.names.index(score)], score, k)

    def summary(self) -> dict[str, Any]:
        return {
            "hook": self.hook,
            "top": {
                language: {name: [[i, round(x, 4)] for i, x in self.top(language, name)] for name in self.names}
                for language in self.scores
            },
            "vanished_without_punctuation": {name: round(share, 3) for name, share in self.vanished.items()},
            "overlap_with_difference": self.overlap,
            "definition": self.definition,
        }


@analysis("language-latents", version=2, model="gemma-3-270m")
def language_latents(
    model: LanguageModel,
    store: ActivationStore,
    seed: int,
    *,
    sae: str = "gemma-3-270m",
    hook: str = "",
    targets: str = "fr,es,de,it,pt,ja,zh,ru",
    source: str = "en",
    text: str = OWN,
    k: int = 10,
) -> LanguageLatents:
    """Latents of an SAE that belong to a language, by seven scores, from parallel sentences.

    sae      a name, a run or a folder
    hook     which of its SAEs, if there are several
    targets  languages, separated by commas
    source   the language that is steered away from
    text     parallel: 210 sentences in nine languages; or a file or folder, see `saes.steering.parallel`
    k        top latents that are compared
    """
    chosen = one_of(load(sae), hook, sae)
    fit(model, store, chosen)
    stats = statistics(model, store, chosen, sentences(text), seed)
    names = [check(one.strip()) for one in targets.split(",")]
    found = {name: scores(stats, name, source) for name in names}
    tops = {
        name: {score: {latent for latent, _ in best(one[score], score, k)} for score in SCORES}
        for name, one in found.items()
    }
    return LanguageLatents(
        chosen.hook, SCORES, {name: torch.stack([one[score] for score in SCORES]) for name, one in found.items()},
        {name: vanished(stats, name, source, k) for name in names},
        {
            name: {score: len(some & top["difference"]) / k for score, some in top.items()}
            for name, top in tops.items()
        },
        f"{stats.sentences.shape[1]} parallel sentences in {len(stats.languages)} languages, without the first token "
        f"of each; overlap and vanished of the top {k}",
    )  # fmt: skip


def best(row: Float[Tensor, " latent"], score: str, k: int) -> list[tuple[int, float]]:
    """The k best latents by a score; by size of the difference, whatever its sign."""
    order = (row.abs() if score == "difference" else row).topk(min(k, len(row))).indices.tolist()
    return [(latent, float(row[latent])) for latent in order]
