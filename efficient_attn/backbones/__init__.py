"""Backbones: the same whatever the attention inside them."""

import fnmatch
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import jax.numpy as jnp
from flax import nnx

from efficient_attn.backbones.base import NATIVE, Backbone, Build, Input
from efficient_attn.backbones.causal_lm import CausalLM
from efficient_attn.backbones.dual_encoder import DualEncoder
from efficient_attn.backbones.encoder import Encoder
from efficient_attn.backbones.encoder_decoder import EncoderDecoder
from efficient_attn.backbones.generation import generate
from efficient_attn.backbones.images import VARIANTS, load, save
from efficient_attn.backbones.sampling import Sampling
from efficient_attn.backbones.vit import Vit
from efficient_attn.config import build, require
from efficient_attn.errors import unknown
from efficient_attn.layers.rngs import make_rngs
from kernels.dispatch import Backend

__all__ = [
    "BACKBONES",
    "VARIANTS",
    "Backbone",
    "CausalLM",
    "DualEncoder",
    "Encoder",
    "EncoderDecoder",
    "Input",
    "Sampling",
    "Vit",
    "configure",
    "create",
    "generate",
    "load",
    "names",
    "save",
]

BACKBONES: dict[str, type[Backbone]] = {
    "causal_lm": CausalLM,
    "dual_encoder": DualEncoder,
    "encoder": Encoder,
    "encoder_decoder": EncoderDecoder,
    "vit": Vit,
}
"""Every backbone, by the name that `config.model.name` gives it."""


def configure(name: str, options: Mapping[str, Any]) -> Any:
    """The `Config` of the backbone or the published network `name` with `options`.

    Raises:
        UserError: an unknown name or option, or a value out of range.
    """
    family, preset = _find(name)
    return build(family.Config, preset | dict(options), where=f"config.model ({name})")


def create(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    attention: str = NATIVE,
    source: Input | None = None,
    num_classes: int = 1000,
    image_size: int | None = None,
    backend: Backend = "auto",
    dtype: Any = jnp.float32,
    rngs: nnx.Rngs | None = None,
) -> Backbone:
    """The backbone, or the published network, `name` with `attention` in every block.

    A network of `names()` reads square images of three colours, of its published size unless
    `image_size` says otherwise, and tells `num_classes` of them apart; `source` says what else is
    read, and must for a backbone. `attention` is an expression, "native" the network's own.
    `options` are those of the `Config`. Without `rngs` its weights are drawn from seed 0.

    Raises:
        UserError: an unknown name or option, a value out of range, or an input or an attention
            that the backbone cannot take.
    """
    family, _ = _find(name)
    if source is None:
        require(name in VARIANTS, f"say what {name!r} reads: source=Input(...)")
        side = image_size or VARIANTS[name].image_size
        source = Input(kind="image", shape=(side, side, 3), classes=num_classes)
    how = Build(attention=attention, backend=backend, dtype=dtype)
    config = configure(name, options or {})
    return family(config, source, how, rngs=rngs or make_rngs(0))


def names(pattern: str = "*") -> list[str]:
    """The published networks whose names match, in alphabetical order: names("*vit*")."""
    return sorted(fnmatch.filter(VARIANTS, pattern))


def _find(name: str) -> tuple[type[Backbone], dict[str, Any]]:
    """The class and the options of a published network; of a backbone, without options."""
    if name in BACKBONES:
        return BACKBONES[name], {}
    if name not in VARIANTS:
        raise unknown("model", name, [*BACKBONES, *VARIANTS])
    preset = VARIANTS[name].config
    return VARIANTS[name].family, {f.name: getattr(preset, f.name) for f in fields(preset)}
