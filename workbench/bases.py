"""Bases by name: `neurons`, `rotation`, and whatever a package adds with `@basis("sae")`.

A basis gives the tensor at a hook point as latents that one can read, score and ablate. A name may have an argument
after a colon, which is the loader's business: `rotation:7`, `sae:./folder`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench import sites
from workbench.errors import UserError, unknown
from workbench.models import LanguageModel
from workbench.sites import Basis

Loader = Callable[[LanguageModel, str], Mapping[str, Basis]]
_loaders: dict[str, Loader] = {}


def basis(name: str) -> Callable[[Loader], Loader]:
    """Register a loader: (model, argument) -> {hook point: basis}."""

    def register(loader: Loader) -> Loader:
        _loaders[name] = loader
        return loader

    return register


def load(model: LanguageModel, spec: str) -> dict[str, Basis]:
    """The bases that a specification names, by hook point. Raises UserError for an unknown one."""
    name, _, argument = spec.partition(":")
    if name not in _loaders:
        raise unknown("basis", name, _loaders)
    return dict(_loaders[name](model, argument))


@dataclass(frozen=True)
class Rotation:
    """Coordinates along the columns of an orthogonal matrix; the identity gives neurons."""

    columns: Float[Tensor, "width latent"] | None
    n_latents: int

    def encode(self, x: Float[Tensor, "*any width"]) -> Float[Tensor, "*any latent"]:
        return x if self.columns is None else x @ self.columns

    def decode(self, latents: Float[Tensor, "*any latent"]) -> Float[Tensor, "*any width"]:
        return latents if self.columns is None else latents @ self.columns.T


@basis("neurons")
def neurons(model: LanguageModel, argument: str) -> dict[str, Basis]:
    """The neurons of every MLP, after the activation function: they are their own latents, without error."""
    if argument:
        raise UserError(f"neurons takes no argument, not {argument!r}.")
    width = model.config.d_mlp
    return {sites.block(layer, "mlp.hook_post"): Rotation(None, width) for layer in range(model.config.n_layers)}


@basis("rotation")
def rotation(model: LanguageModel, argument: str) -> dict[str, Basis]:
    """A random orthogonal basis of what every MLP writes: the control that a dictionary has to beat."""
    if not argument.isdigit():
        raise UserError(f"rotation needs a seed, such as rotation:0, not {argument!r}.")
    generator = torch.Generator().manual_seed(int(argument))
    width = model.config.d_model
    found: dict[str, Basis] = {}
    for layer in range(model.config.n_layers):
        columns = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
        found[sites.block(layer, "hook_mlp_out")] = Rotation(columns.to(model.device, model.dtype), width)
    return found
