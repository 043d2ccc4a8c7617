"""The activation store: the one door through which every activation is had."""

from workbench.activations.inventory import Estimate as Estimate
from workbench.activations.inventory import Manifest as Manifest
from workbench.activations.inventory import Series as Series
from workbench.activations.inventory import Stats as Stats
from workbench.activations.store import ActivationStore as ActivationStore
from workbench.activations.store import shared as shared
from workbench.activations.streams import Stream as Stream
