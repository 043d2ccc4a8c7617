"""Circuits: who computes what, and through which edges."""

from circuits import acdc as acdc
from circuits import attribution as attribution
from circuits import edge_patching as edge_patching
from circuits import features as features
from circuits import ig_activations as ig_activations
from circuits import masks as masks
from circuits import patching as patching
from circuits import relp as relp
