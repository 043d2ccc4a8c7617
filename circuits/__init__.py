"""Circuits: who computes what, and through which edges."""

from circuits import acdc as acdc
from circuits import attribution as attribution
from circuits import cdt as cdt
from circuits import compare as compare
from circuits import drawing as drawing
from circuits import edge_patching as edge_patching
from circuits import extract as extract
from circuits import features as features
from circuits import figures as figures
from circuits import ig_activations as ig_activations
from circuits import intervention as intervention
from circuits import judging as judging
from circuits import masks as masks
from circuits import node_patching as node_patching
from circuits import patching as patching
from circuits import path_patching as path_patching
from circuits import position_figures as position_figures
from circuits import position_patching as position_patching
from circuits import relp as relp
from circuits import reuse as reuse
from circuits import sparse as sparse
from circuits import subspaces as subspaces
