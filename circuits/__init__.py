"""Circuits: who computes what, and through which edges."""

from circuits import attribution as attribution
from circuits import patching as patching
