"""Sparse autoencoders: an activation as a sum of few latents' decoder rows, and the files that hold them.

    latents = f((x - b_dec) W_enc + b_enc)        x ~ latents W_dec + b_dec

with f by kind: `standard` ReLU; `topk` ReLU of the k largest; `jumprelu` zero up to a threshold of each latent. A
transcoder reads at one hook point and writes at another, and subtracts nothing.

Files are SAELens' (`cfg.json`, `sae_weights.safetensors`): either opens the other's. What SAELens has no class for (a
TopK transcoder) is still written in that layout, and SAELens refuses it by name. Files trained with the norms of the
decoder rows taken into account (`rescale_acts_by_decoder_norm`) are read with those norms folded into the encoder:
the same latents, in other units, and the same output.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from workbench import jupyter, runs, tables
from workbench.errors import UserError, unknown

Kind = Literal["standard", "topk", "jumprelu"]
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Our kinds by SAELens' names; True: a transcoder. Training architectures are saved by SAELens as `jumprelu`.
NAMES: dict[str, tuple[Kind, bool]] = {
    "standard": ("standard", False),
    "topk": ("topk", False),
    "jumprelu": ("jumprelu", False),
    "transcoder": ("standard", True),
    "topk_transcoder": ("topk", True),
    "jumprelu_transcoder": ("jumprelu", True),
}
NEURONPEDIA = "https://www.neuronpedia.org/"
_SHAPES = {"W_enc": ("d_in", "d_sae"), "b_enc": ("d_sae",), "W_dec": ("d_sae", "d_out"), "b_dec": ("d_out",)}


@dataclass(frozen=True, eq=False)
class SAE:
    """An SAE, a `Basis`; not changed once made.

    W_enc      [d_in, latent], W_dec: [latent, d_out]
    threshold  of each latent, for jumprelu
    k          how many latents are kept, for topk
    subtract   whether b_dec is subtracted from the input
    transcoder whether it writes at another hook point than it reads at
    about      what is known of it: `hook_name`, `hook_name_out`, `model_name`, how it was trained
    """

    kind: Kind
    W_enc: Float[Tensor, "d_in latent"]
    b_enc: Float[Tensor, " latent"]
    W_dec: Float[Tensor, "latent d_out"]
    b_dec: Float[Tensor, " d_out"]
    threshold: Float[Tensor, " latent"] | None = None
    k: int | None = None
    subtract: bool = True
    transcoder: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise unknown("kind of SAE", self.kind, get_args(Kind))
        if (self.threshold is None) == (self.kind == "jumprelu") or (self.k is None) == (self.kind == "topk"):
            raise ValueError("jumprelu has a threshold, topk has k, and no other kind has either")
        if self.subtract and self.transcoder:
            raise ValueError("a transcoder has no b_dec that could be subtracted from its input")

    @property
    def n_latents(self) -> int:
        return len(self.b_enc)

    @property
    def hook(self) -> str:
        """The hook point it reads at. Raises UserError if it does not say."""
        name = self.about.get("hook_name")
        if not isinstance(name, str):
            raise UserError("the SAE does not say at which hook point it reads; give the hook point.")
        return name

    @property
    def hook_out(self) -> str:
        """The hook point it writes at: a transcoder's own, else the one it reads at."""
        return str(self.about["hook_name_out"]) if self.transcoder else self.hook

    def neuronpedia(self, latent: int) -> str | None:
        """The address of a latent's page, where SAELens' list says that Neuronpedia has one (`neuronpedia_id`)."""
        self.direction(latent)
        id = str(self.about.get("neuronpedia_id"))
        return f"{NEURONPEDIA}{id}/{latent}" if re.fullmatch(r"[\w.-]+/[\w.-]+", id, re.A) else None

    def _ipython_display_(self) -> None:
        """Draws itself where a cell of a notebook ends with it."""
        told = {"reads at": self.about.get("hook_name"), "of": self.about.get("model_name")}
        told |= {"d_in": len(self.W_enc), "latents": self.n_latents, "active": self.k}
        facts = tables.flat({name: value for name, value in told.items() if value is not None})
        jupyter.show(f"SAE · {self.architecture}", facts, lambda: self)

    # ---- maps ----

    def pre(self, x: Float[Tensor, "*any d_in"]) -> Float[Tensor, "*any latent"]:
        """Before the activation function."""
        x = x.to(self.W_enc.dtype)
        return (x - self.b_dec if self.subtract else x) @ self.W_enc + self.b_enc

    def encode(self, x: Float[Tensor, "*any d_in"]) -> Float[Tensor, "*any latent"]:
        return self.activated(self.pre(x))

    def activated(self, pre: Float[Tensor, "*any latent"]) -> Float[Tensor, "*any latent"]:
        """Latents, of what comes before the activation function."""
        if self.kind == "topk":
            assert self.k is not None
            values, latents = pre.topk(self.k, dim=-1)
            return torch.zeros_like(pre).scatter(-1, latents, values.relu())
        return pre.relu() if self.threshold is None else pre.relu() * (pre > self.threshold)

    def decode(self, latents: Float[Tensor, "*any latent"]) -> Float[Tensor, "*any d_out"]:
        return latents @ self.W_dec + self.b_dec

    def direction(self, latent: int) -> Float[Tensor, " d_out"]:
        """What one unit of a latent writes. Raises UserError if there is no such latent."""
        if not 0 <= latent < self.n_latents:
            raise UserError(f"there is no latent {latent}; the SAE has {self.n_latents}, 0 to {self.n_latents - 1}.")
        return self.W_dec[latent]

    @cached_property
    def norms(self) -> Float[Tensor, " latent"]:
        """Of the decoder rows."""
        return self.W_dec.square().sum(-1).sqrt()

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> SAE:
        moved = {name: x.to(device=device, dtype=dtype) for name, x in self.tensors().items()}
        return replace(self, **moved)  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
        return {name: x for name in names if (x := getattr(self, name)) is not None}

    # ---- files ----

    @property
    def architecture(self) -> str:
        """SAELens' name of it."""
        return next(name for name, what in NAMES.items() if what == (self.kind, self.transcoder))

    def save(self, folder: Path, dtype: str = "float32") -> None:
        """Write the files, aside, and rename: what exists is whole. A folder that exists is left as it is.

        dtype  of the matrices; biases, which may be as large as activations and take no room, stay float32

        Raises UserError if it cannot be written.
        """
        d_in, d_out = self.W_enc.shape[0], self.W_dec.shape[1]
        config = {
            "architecture": self.architecture,
            "d_in": d_in,
            "d_sae": self.n_latents,
            "dtype": dtype,
            "device": "cpu",
            "apply_b_dec_to_input": self.subtract,
            "normalize_activations": "none",
            "reshape_activations": "none",
            # Files without a version are taken for old ones, which held other settings.
            "metadata": {"sae_lens_version": "6.54.12", "sae_lens_training_version": None, **self.about},
            **({"k": self.k, "rescale_acts_by_decoder_norm": False} if self.kind == "topk" else {}),
            **({"d_out": d_out} if self.transcoder else {}),
        }
        with runs.whole(folder) as aside:
            tensors = {
                name: x.detach().to("cpu", DTYPES[dtype] if x.ndim > 1 else torch.float32).contiguous()
                for name, x in self.tensors().items()
            }
            save_file(tensors, aside / WEIGHTS)
            (aside / CONFIG).write_text(json.dumps(config, indent=1))

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> SAE:
        """Read the files, in float32. Raises UserError for files that are missing, damaged or of another kind."""
        try:
            config = json.loads((folder / CONFIG).read_text())
            tensors = load_file(folder / WEIGHTS, device=str(device))
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{folder} holds no SAE that can be read ({error}); it needs {CONFIG} and {WEIGHTS}, as SAELens writes."
            ) from error
        return from_saelens(config, tensors, str(folder))


def from_saelens(config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> SAE:
    """An SAE from SAELens' configuration and weights. Raises UserError, naming it, for what is not represented here."""
    architecture = config.get("architecture")
    if architecture not in NAMES:
        raise UserError(f"{name} is of the kind {architecture!r}; those that are read are {', '.join(NAMES)}.")
    kind, transcoder = NAMES[architecture]
    for option, plain in (("normalize_activations", "none"), ("reshape_activations", "none")):
        # `expected_average_only_in` is a factor that SAELens folds into the weights before it saves them.
        if config.get(option, plain) not in (plain, None, "expected_average_only_in"):
            raise UserError(f"{name} has {option}={config[option]!r}, which is not read; only {plain!r} is.")
    found = {key: x.float() for key, x in tensors.items()}
    sizes = {"d_in": config.get("d_in"), "d_sae": config.get("d_sae")}
    sizes["d_out"] = config.get("d_out") if transcoder else sizes["d_in"]
    shapes = _SHAPES | ({"threshold": ("d_sae",)} if kind == "jumprelu" else {})
    for key, axes in shapes.items():
        shape = tuple(sizes[axis] for axis in axes)
        if key not in found:
            raise UserError(f"{name} has no {key}; it is damaged, or of another kind than {architecture}.")
        if tuple(found[key].shape) != shape:
            raise UserError(
                f"{name}: {key} has the shape {tuple(found[key].shape)}, and its configuration says {shape}."
            )
        if not bool(found[key].isfinite().all()):
            raise UserError(f"{name}: {key} holds values that are no numbers; the training that made it has failed.")
    if kind == "topk" and config.get("rescale_acts_by_decoder_norm"):
        norms = found["W_dec"].norm(dim=-1)
        found |= {"W_enc": found["W_enc"] * norms, "b_enc": found["b_enc"] * norms}
        found["W_dec"] = found["W_dec"] / norms[:, None]
    about = dict(config.get("metadata") or {})
    for key in ("hook_name", "model_name"):  # where files of before version 6 have them
        about.setdefault(key, config.get(key))
    return SAE(
        kind, **{key: found[key] for key in shapes}, k=int(config["k"]) if kind == "topk" else None,
        subtract=bool(config.get("apply_b_dec_to_input", True)) and not transcoder, transcoder=transcoder, about=about,
    )  # fmt: skip
