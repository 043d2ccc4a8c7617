"""The names in generated programs: few, so that each is one token of a vocabulary of 512."""

from __future__ import annotations

# f, r, b and u are string prefixes too, and l and o look like digits.
LETTERS = tuple("acdhmpqtvwxyz")
INDICES = ("i", "j", "k", "n")
WORDS = (
    "name", "size", "value", "count", "total", "data", "item", "node", "line", "index", "result", "color", "key",
    "text",
)  # fmt: skip
ATTRIBUTES = WORDS[:8]  # of classes: copying one is the hardest to learn, so there are few
NAMES = (*LETTERS, *WORDS)
CALLED = ("get", "find", "read", "run", "make")
# A file is read from one of these and written to the other.
FILES = (("input_file", "output_file"), ("input_name", "output_name"), ("input_text", "output_text"))
