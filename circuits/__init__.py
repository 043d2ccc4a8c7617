"""Circuits: who computes what, and through which edges."""

from circuits import figures as figures
from circuits import intervention as intervention
from circuits import patching as patching
from circuits import path_patching as path_patching
from circuits import reuse as reuse
from circuits import subspaces as subspaces
