"""Bases of latents, and what can be read off them."""

from saes import code_effects as code_effects
from saes import codes as codes
