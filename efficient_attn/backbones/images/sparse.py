"""What vision transformers share that drop patches on their way: where, how many, by what."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from efficient_attn.attention import MultiHead
from efficient_attn.backbones.base import Build, Input
from efficient_attn.backbones.images import lv_vit, vision_transformer
from efficient_attn.backbones.images.variants import Variant
from efficient_attn.backbones.vit import Vit
from efficient_attn.blocks import Block
from efficient_attn.config import require


class SparseVit(Vit):
    """A vision transformer of which some layers keep a part of the patches, of a fixed size.

    why: for what a mixer needs queries and keys; "" where any will do.
    """

    why: ClassVar[str] = ""

    @dataclass(frozen=True)
    class Config(Vit.Config):
        """The vision transformer (its first tokens are always kept), and:
        keep_rate: share of the patches that each of `layers` keeps, in (0, 1].
        layers: where patches are dropped, counted from 1.
        """

        keep_rate: float = 0.7
        layers: tuple[int, ...] = (4, 7, 10)

        def __post_init__(self):
            super().__post_init__()
            require(
                0 < self.keep_rate <= 1,
                f"keep_rate must be in (0, 1], not {self.keep_rate}; 1 keeps every patch",
            )
            rising = sorted(set(self.layers)) == list(self.layers)
            require(
                rising and all(1 <= layer <= self.depth for layer in self.layers),
                f"layers={self.layers} must rise from 1 to depth={self.depth} at most",
            )
            require(
                self.pool != "mean",
                "pool='mean' has no class token, which stays when patches go; use pool='cls'",
            )
            require(
                self.norm == "pre" and self.residual == "add" and not self.remat,
                "a network that drops patches takes norm='pre', residual='add', remat=False",
            )

    config: Config

    def __init__(self, config: Config, source: Input, build: Build, *, rngs: nnx.Rngs):
        super().__init__(config, source, build, rngs=rngs)
        for block in self.stack.blocks:
            require(
                not self.why or isinstance(block.mixer, MultiHead),
                f"config.model.name: {self.why}, and the attention {build.attention!r} has no "
                "queries and keys of its own; use one that has, such as softmax or performer",
            )

    def features(self, images, *, rngs=None):
        """Refused: of the patches that are left there is no map.

        Raises:
            UserError: always.
        """
        require(False, "a network that drops patches has no map of features; use a vit")
        raise AssertionError


def attention_logits(
    mixer: MultiHead, q: Float[Array, "B T H D"], k: Float[Array, "B S G D"]
) -> Float[Array, "B H T S"]:
    """q k^T / sqrt(D) in float32, capped where the mixer caps its own."""
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    logits = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
    logits = logits * q.shape[-1] ** -0.5
    cap = getattr(mixer.core.config, "logit_cap", None)
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def best(scores: Float[Array, "B N"], count: int) -> Int[Array, "B K"]:
    """Where the `count` highest scores of each row are, in their own order."""
    return jnp.sort(jax.lax.top_k(scores, count)[1], axis=1)


def take(x: Array, at: Int[Array, "B K"]) -> Array:
    """x [B, N, ...] at these places of each row: [B, K, ...]."""
    return jnp.take_along_axis(x, at.reshape(at.shape + (1,) * (x.ndim - 2)), axis=1)


def run(block: Block, name: str, x: Float[Array, "B T E"], given: dict[str, Any]) -> Array:
    """x with what a branch of the block adds to it."""
    return x + block.branch(name, x, positions=None, **given)


def variants(
    family: type[SparseVit], names: dict[str, str], change: Callable[[str], dict[str, Any]]
) -> dict[str, Variant]:
    """{our name: the family's variant made of the plain network of that name, with some options
    changed}.
    """
    made, known = {}, vision_transformer.VARIANTS | lv_vit.VARIANTS
    for name, plain in names.items():
        base = known[plain]
        options = {f: getattr(base.config, f) for f in base.config.__dataclass_fields__}
        made[name] = replace(base, family=family, config=family.Config(**options | change(name)))
    return made
