"""Published circuits, as they were published: the lists of nodes that methods are scored against.

Papers disagree about the same circuit, and some lists carry transcription errors, so an AUC means nothing without the
list it was measured on. Every list here has a name and a version, and prints as one line: give that line with every
number. What is wrong with a list, or how it differs from the others, is in its note.

A published circuit is a convention of the field, not the truth: a set of heads can overlap with it and carry none of
the behaviour (Hanna et al. 2024, arXiv 2403.17806). For models whose circuit is certain see `circuits/toys.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from workbench.errors import unknown
from workbench.scores import head, mlp


@dataclass(frozen=True)
class Known:
    """One published list of nodes.

    nodes   names as in `circuits.graph.Graph`, in order of computation
    roles   what the source says each node does; every node has one role
    note    what is wrong with the list, or differs from others of the same task
    """

    name: str
    version: int
    model: str
    task: str
    nodes: tuple[str, ...]
    roles: Mapping[str, tuple[str, ...]]
    source: str
    note: str = ""

    @property
    def heads(self) -> tuple[str, ...]:
        """The attention heads alone: what papers compute a head AUC over."""
        return tuple(node for node in self.nodes if node.startswith("a"))

    def __str__(self) -> str:
        """The line to print with every number that was measured against this list."""
        mlps = len(self.nodes) - len(self.heads)
        size = f"{len(self.heads)} heads" + (f", {mlps} MLPs" if mlps else "")
        return f"{self.name} v{self.version} ({self.model}, {size}; {self.source})"


def published() -> dict[str, Known]:
    """Every published circuit by its name."""
    return dict(_PUBLISHED)


def get(name: str) -> Known:
    """A published circuit. Raises UserError for a name that does not exist."""
    if name not in _PUBLISHED:
        raise unknown("published circuit", name, _PUBLISHED)
    return _PUBLISHED[name]


def _heads(written: str) -> tuple[str, ...]:
    """`9.9 10.0`, as papers write heads, to `a9.h9`, `a10.h0`."""
    pairs = sorted(tuple(map(int, one.split("."))) for one in written.split())
    return tuple(head(layer, index) for layer, index in pairs)


def _mlps(layers: Iterable[int]) -> tuple[str, ...]:
    return tuple(mlp(layer) for layer in layers)


def _order(node: str) -> tuple[int, bool, int]:
    layer, _, index = node[1:].partition(".h")
    return (int(layer), node.startswith("m"), int(index or 0))


def _known(
    name: str,
    model: str,
    task: str,
    roles: Mapping[str, tuple[str, ...]],
    source: str,
    note: str = "",
    version: int = 1,
) -> Known:
    nodes = tuple(sorted({node for group in roles.values() for node in group}, key=_order))
    return Known(name, version, model, task, nodes, MappingProxyType(dict(roles)), source, note)


# ---- indirect object identification, GPT-2 small ----

_IOI = {
    "name mover": _heads("9.9 10.0 9.6"),
    "backup name mover": _heads("10.10 10.6 10.2 10.1 11.2 9.7 9.0 11.9"),
    "negative name mover": _heads("10.7 11.10"),
    "S-inhibition": _heads("7.3 7.9 8.6 8.10"),
    "induction": _heads("5.5 5.8 5.9 6.9"),
    "duplicate token": _heads("0.1 0.10 3.0"),
    "previous token": _heads("2.2 4.11"),
}

# ---- greater-than, GPT-2 small ----

_READ_YEAR, _SPIKE, _BOOST = "reads the year", "makes logits peak at the year", "raises the logits of greater years"
_GREATER_THAN = {
    _READ_YEAR: (*_heads("0.1 0.3 0.5"), *_mlps(range(4))),
    _SPIKE: _heads("5.5 6.1 6.9 7.10 8.11 9.1"),
    _BOOST: _mlps(range(8, 12)),
}

# ---- docstring, attn-only-4l ----

_DOCSTRING = {
    "argument mover": _heads("3.0 3.6"),
    "fuzzy previous token": _heads("2.0"),
    "fuzzy previous token and induction": _heads("1.4"),
    "duplicate token": _heads("0.5 1.2"),
}
_DOCSTRING_8 = {**_DOCSTRING, "further heads that help": _heads("0.2 0.4")}

_GPT2, _DOC_MODEL = "gpt2", "attn-only-4l"
_SAE_PAPER = "O'Neill & Bui 2024, arXiv 2405.12522, ground truth of the authors' repository"
_CDT = "Hsu et al. 2024, arXiv 2407.00886, CD-T's ground truth"
_ALL = (
    _known(
        "ioi", _GPT2, "ioi", _IOI,
        "Wang et al. 2022, arXiv 2211.00593, figure 2; heads as in Easy-Transformer's ioi_circuit_extraction.py",
        "The reference. 9.0 is in it, 11.3 and 11.0 are not.",
    ),
    _known(
        "ioi-sae-paper", _GPT2, "ioi", {**_IOI, "backup name mover": _heads("10.10 10.6 10.2 10.1 11.2 9.7 11.3 11.9")},
        _SAE_PAPER, "A transcription error of `ioi`: 11.3 stands in place of the backup name mover 9.0.",
    ),
    _known(
        "ioi-cdt", _GPT2, "ioi", {**_IOI, "negative name mover": _heads("10.7 11.0")},
        _CDT, "As printed: 11.0 stands in place of the negative name mover 11.10; 9.0 is right.",
    ),
    _known(
        "greater-than", _GPT2, "greater_than", _GREATER_THAN,
        "Hanna et al. 2023, arXiv 2305.00586, as in ACDC (Conmy et al. 2023, arXiv 2304.14997), acdc/greaterthan",
        "9 heads and 8 MLPs. The SAE paper's list is these 9 heads. It shares 6 heads with `greater-than-cdt`.",
    ),
    _known(
        "greater-than-cdt", _GPT2, "greater_than", {"in the circuit": _heads("5.1 5.5 6.1 6.9 7.10 8.8 8.11 9.1")},
        _CDT, "8 heads, no MLPs: 5.1 and 8.8 are not in `greater-than`, whose 0.1, 0.3 and 0.5 are missing here.",
    ),
    _known(
        "docstring", _DOC_MODEL, "docstring", _DOCSTRING,
        "Heimersheim & Janiak 2023, as the 37 edges of ACDC (Conmy et al. 2023, arXiv 2304.14997), acdc/docstring",
        "6 heads: those on the 37 edges of the manual graph.",
    ),
    _known(
        "docstring-heimersheim-janiak", _DOC_MODEL, "docstring", _DOCSTRING_8,
        'Heimersheim & Janiak 2023, "A circuit for Python docstrings in a 4-layer attention-only transformer"',
        "8 heads: those of `docstring`, and 0.2 and 0.4. CD-T uses this list.",
    ),
    _known(
        "docstring-augmented", _DOC_MODEL, "docstring", {**_DOCSTRING_8, "added by CD-T": _heads("1.0 0.1 2.3")},
        "Hsu et al. 2024, arXiv 2407.00886, augmented docstring circuit",
        "11 heads: CD-T's authors add three that their method finds, so it favours their method.",
    ),
    _known(
        "docstring-sae-paper", _DOC_MODEL, "docstring", {"in the circuit": _heads("0.5 1.0 1.4 2.0 3.0 3.6")},
        _SAE_PAPER, "A transcription error of `docstring`: 1.0 stands in place of 1.2.",
    ),
)  # fmt: skip
_PUBLISHED: Mapping[str, Known] = MappingProxyType({known.name: known for known in _ALL})
