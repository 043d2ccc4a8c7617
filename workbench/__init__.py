"""Mechanistic-interpretability workbench: find out how a language model does something.

The names most people need; each is imported when it is first used, so that `wb --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.activations import ActivationStore as ActivationStore
    from workbench.errors import UserError as UserError
    from workbench.models import LanguageModel as LanguageModel
    from workbench.models import Resume as Resume
    from workbench.plots import figure as figure
    from workbench.prompts import Batch as Batch
    from workbench.prompts import Prompt as Prompt
    from workbench.prompts import sample as sample
    from workbench.registry import analysis as analysis
    from workbench.registry import get_task as get_task
    from workbench.registry import task as task
    from workbench.runs import run as run
    from workbench.scores import NodeScores as NodeScores
    from workbench.sites import Site as Site

_HOMES = {
    "workbench.activations": ("ActivationStore",),
    "workbench.errors": ("UserError",),
    "workbench.models": ("LanguageModel", "Resume"),
    "workbench.plots": ("figure",),
    "workbench.prompts": ("Batch", "Prompt", "sample"),
    "workbench.registry": ("analysis", "get_task", "task"),
    "workbench.runs": ("run",),
    "workbench.scores": ("NodeScores",),
    "workbench.sites": ("Site",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"workbench has no {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
