"""What a single latent must be compared with, each as a way to steer at one hook point (LAPE: at all MLPs).

Their unit is the length of the mean difference between the languages, so that strength 1 of each is as long as that.

    DiffMean        mean of the residual stream over tokens in the target language, minus that in the source
    PCA             first principal component of sentence means in both, towards the target
    probe           normal of a logistic regression of the two languages on sentence means
    LAPE            neurons that are active in one language above all (Tang et al. 2024), moved by their mean difference
    three latents   those of largest monolinguality together, in the proportion of their own differences
    prompting       no steering: an instruction in the target language before the prompt
    random direction, random latent, wrong language   controls, as long as what the single latent adds
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from saes.evaluate import by_length
from saes.sae import SAE
from saes.steering.search import LanguageStats, scores
from saes.steering.steer import Plan, Steering
from workbench import sites
from workbench.activations import ActivationStore
from workbench.models import LanguageModel

INSTRUCTIONS = {
    "en": "The following text is in English.",
    "fr": "Le texte suivant est en français.",
    "es": "El siguiente texto está en español.",
    "de": "Der folgende Text ist auf Deutsch.",
    "it": "Il testo seguente è in italiano.",
    "pt": "O texto a seguir está em português.",
    "ja": "以下の文章は日本語です。",
    "zh": "以下文字是中文。",
    "ru": "Следующий текст написан на русском языке.",
}
TOKENS = 4096  # at once
SPECIFIC, OFTEN = 0.01, 0.95  # of LAPE: share of all neurons that is chosen; quantile of firing rates they must reach


def sentence_means(
    model: LanguageModel, store: ActivationStore, hook: str, sentences: Sequence[str]
) -> tuple[Float[Tensor, "sentence d"], Float[Tensor, " d"]]:
    """Of the tokens of each sentence but the first, and over all tokens."""
    rows = [row[1:] for row in store.get(model, [model.tokenize(text) for text in sentences], [hook])[hook]]
    return torch.stack([row.mean(0) for row in rows]), torch.cat(rows).mean(0)


def directions(
    model: LanguageModel, store: ActivationStore, hook: str, target: Sequence[str], source: Sequence[str]
) -> dict[str, Steering]:
    """DiffMean, PCA and probe at a hook point, with strength 1."""
    from sklearn.linear_model import LogisticRegression  # here: it is half a second that few need

    (ours, mean), (theirs, other) = (sentence_means(model, store, hook, some) for some in (target, source))
    difference = mean - other
    unit = float(difference.norm())
    both = torch.cat([ours, theirs])
    centred = both - both.mean(0)
    first = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    first = first * torch.sign(first @ difference)
    labels = [1] * len(ours) + [0] * len(theirs)
    scale = centred.std(0).clamp(min=1e-6)
    fitted = LogisticRegression(max_iter=1000, C=0.1).fit((centred / scale).numpy(), labels)
    normal = torch.tensor(fitted.coef_[0], dtype=torch.float32) / scale
    found = {"DiffMean": difference / unit, "PCA": first, "probe": normal / normal.norm()}
    return {name: Steering(hook, 1.0, direction=vector, unit=unit) for name, vector in found.items()}


def mean_difference(
    model: LanguageModel, store: ActivationStore, hook: str, target: Sequence[str], source: Sequence[str]
) -> Float[Tensor, " d"]:
    """Of the residual stream over all tokens but the first of each sentence."""
    (_, ours), (_, theirs) = (sentence_means(model, store, hook, some) for some in (target, source))
    return ours - theirs


def several(sae: SAE, stats: LanguageStats, target: str, source: str, length: float, n: int = 3) -> Steering:
    """The latents of largest monolinguality together, in the proportion of the differences of their means; strength 1
    is as long as given."""
    top = scores(stats, target, source)["monolinguality"].topk(min(n, sae.n_latents)).indices
    means = stats.sentences.mean(1)
    difference = means[stats.languages.index(target)] - means[stats.languages.index(source)]
    whole = difference[top] @ sae.W_dec[top]
    return Steering(stats.hook, 1.0, direction=whole / whole.norm(), unit=length)


def lape(model: LanguageModel, parallel: dict[str, list[str]], target: str, source: str) -> tuple[Steering, ...]:
    """Neurons of all MLPs by entropy of their firing rates over languages; those of the target are moved by their mean
    difference between target and source."""
    hooks = [sites.block(layer, "mlp.hook_post") for layer in range(model.config.n_layers)]
    rates, means = [], []
    for sentences in parallel.values():
        count, fired, total = 0, torch.zeros(()), torch.zeros(())
        for rows in by_length([model.tokenize(text) for text in sentences], TOKENS):
            run = model.run(rows, capture=hooks, logits="none")  # gigabytes of all sentences: not for the store
            x = torch.stack([run[hook][:, 1:].flatten(0, 1) for hook in hooks])
            count, fired, total = count + x.shape[1], fired + (x > 0).float().sum(1), total + x.sum(1)
        rates.append(fired / count)
        means.append(total / count)
    firing, level = torch.stack(rates), torch.stack(means)  # [language, layer, neuron]
    t, s = (list(parallel).index(language) for language in (target, source))
    share = firing / firing.sum(0).clamp(min=1e-12)
    entropy = -(share * share.clamp(min=1e-12).log()).sum(0)
    often = torch.quantile(firing.flatten()[:: max(1, firing.numel() // 2**20)], OFTEN)
    entropy = torch.where(firing.amax(0) >= often, entropy, torch.inf)
    least = entropy.flatten().kthvalue(max(1, int(SPECIFIC * entropy.numel()))).values
    moved = (level[t] - level[s]) * ((entropy <= least) & entropy.isfinite() & (firing.argmax(0) == t))
    return tuple(Steering(hook, 1.0, direction=row) for hook, row in zip(hooks, moved, strict=True) if bool(row.any()))


def controls(best: Steering, stats: LanguageStats, wrong: Steering | None, seed: int = 0) -> dict[str, Plan]:
    """As long as what the single latent adds: a random direction, a random latent that is active as often in all
    languages together, and the latent of another language."""
    assert best.sae is not None and best.latent is not None
    sae: SAE = best.sae
    length = abs(best.strength * best.unit) * float(best.vector.norm())
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(len(best.vector), generator=generator)
    rate = stats.rate.mean(0)
    apart = (rate.clamp(min=1e-6).log() - rate[best.latent].clamp(min=1e-6).log()).abs()
    apart[best.latent] = torch.inf
    alike = apart.topk(min(20, len(apart)), largest=False).indices
    latent = int(alike[int(torch.randint(len(alike), (1,), generator=generator))])
    found: dict[str, Plan] = {
        "random direction": Steering(
            best.hook, 1.0, direction=random / random.norm(), unit=length, scope=best.scope, decay=best.decay
        ),
        "random latent": Steering(
            best.hook,
            1.0,
            direction=sae.direction(latent) / sae.norms[latent],
            unit=length,
            scope=best.scope,
            decay=best.decay,
        ),
    }
    if wrong is not None:
        found["wrong language"] = Steering(
            wrong.hook,
            1.0,
            direction=wrong.vector / wrong.vector.norm(),
            scope=best.scope,
            decay=best.decay,
            unit=math.copysign(length, wrong.unit),  # towards its own language
        )
    return found


def instructed(prompts: Sequence[str], target: str) -> list[str]:
    """Prompts with an instruction before them, in the target language."""
    return [f"{INSTRUCTIONS[target]}\n{prompt}" for prompt in prompts]
