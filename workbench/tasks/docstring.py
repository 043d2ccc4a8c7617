'''Docstring: a method's docstring lists its parameters in the order of the signature, and one is missing.

    def port(self, tag, depth, load, size, file, scale):
        """oil column piece

        :param load: crime glass
        :param size: train water
        :param                            -> " file"

The parameters are self, two that the docstring skips, three that it lists (A, B, and the answer C), and one after
them. The corrupted prompt has unrelated names for the listed ones, other ones in the signature than in the docstring
(the paper's `random_random`), so that neither says where in the list we are or what comes next.

The wrong answer is the parameter after C. A model that merely names a parameter which is not documented yet cannot
tell the two apart; only following the order can. The earlier parameters would be told apart by less: A and B by
having been used. In the corrupted prompt C does not occur and the wrong answer does: the metric is negative there.

Heimersheim & Janiak 2023, "A circuit for Python docstrings in a 4-layer attention-only transformer". Word list our own.
'''

from __future__ import annotations

import random

from workbench.prompts import Prompt
from workbench.registry import task

# Each is one token for common tokenizers, so that prompts have one length.
WORDS = (
    "load", "size", "file", "path", "name", "key", "value", "data", "mode", "limit", "count", "index", "level", "type",
    "flag", "color", "image", "text", "line", "word", "page", "user", "group", "role", "token", "code", "state",
    "event", "time", "date", "year", "start", "end", "first", "last", "width", "height", "depth", "length", "weight",
    "scale", "rate", "speed", "angle", "point", "node", "edge", "tree", "graph", "table", "field", "record", "query",
    "model", "layer", "input", "source", "target", "parent", "child", "root", "list", "map", "queue", "cache",
    "memory", "block", "frame", "shape", "style", "font", "title", "label", "message", "error", "result", "score",
    "order", "price", "cost", "total", "range", "filter", "search", "match", "rule", "case", "batch", "sample", "seed",
    "mask", "shift", "stream", "port", "host", "server", "address", "domain", "link", "route", "object",
    "module", "package", "version", "tag", "patch", "build", "release", "option", "session", "request", "header",
    "body", "format", "content", "region", "zone", "area", "place", "city", "country",
)  # fmt: skip


@task("docstring", metric="logit_diff", version=1)
def docstring(rng: random.Random) -> Prompt:
    """Docstring: which parameter a Python docstring describes next, in the order of the signature."""
    words = iter(rng.sample(WORDS, 20))
    method, before, after = next(words), (next(words), next(words)), next(words)
    summary = " ".join(next(words) for _ in range(3))
    described = [f"{next(words)} {next(words)}" for _ in range(2)]
    a, b, c = (next(words) for _ in range(3))
    other = [next(words) for _ in range(5)]

    def write(signature: tuple[str, str, str], documented: tuple[str, str]) -> str:
        parameters = ", ".join(("self", *before, *signature, after))
        lines = [f":param {name}: {text}" for name, text in zip(documented, described, strict=True)]
        body = "\n        ".join((f'"""{summary}\n', *lines, ":param"))
        return f"    def {method}({parameters}):\n        {body}"

    corrupted = write((other[0], other[1], other[2]), (other[3], other[4]))
    return Prompt(write((a, b, c), (a, b)), corrupted, (f" {c}",), (f" {after}",))
