"""Bases of latents, and what can be read off them."""

from saes import codes as codes
