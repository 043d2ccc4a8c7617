"""Circuits: who computes what, and through which edges."""

from circuits import patching as patching
