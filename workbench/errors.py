"""Errors a user can act on: one sentence with what was wrong, the value, and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Raised at the border for bad input; the command line prints it as one line and exits with status 2."""


def unknown(kind: str, name: str, options: Iterable[str]) -> UserError:
    """An error for a name that does not exist, with the nearest one that does."""
    options = sorted(options)
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.4)
    some = ", ".join(options[:12]) + (f" and {len(options) - 12} more" if len(options) > 12 else "")
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {some or 'none'}."
    return UserError(f"no {kind} is called {name!r}; {hint}")
