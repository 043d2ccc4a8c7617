"""The activation store: the one door through which every activation is had."""

from workbench.activations.store import ActivationStore as ActivationStore
from workbench.activations.store import Estimate as Estimate
from workbench.activations.store import Stats as Stats
