"""What networks of several resolutions share: stem, stages, the last map pooled and classified."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient_attn.backbones.base import (
    NATIVE,
    Backbone,
    Build,
    Input,
    refuse_kind,
    refuse_size,
)
from efficient_attn.config import require


def refuse_attention(name: str, build: Build) -> None:
    """Raise UserError for an attention in a family that has none."""
    require(
        build.attention == NATIVE,
        f"{name} has convolutions alone, there is no attention for {build.attention!r} to replace; "
        f"leave attention={NATIVE!r}",
    )


def mean(x: Float[Array, "B h w E"]) -> Float[Array, "B E"]:
    """Over all places, float32."""
    return jnp.mean(x.astype(jnp.float32), axis=(1, 2))


class Pyramid(Backbone):
    """Images -> stem -> stages, each a map of its own resolution -> logits.

    A subclass makes `stem` and `stages`, modules (x, *, rngs) -> x on [B,H,W,C], and what comes
    after the last of them: by default the mean over its places and `classifier`.
    """

    stem: Any
    stages: nnx.List
    classifier: nnx.Linear

    def __init__(self, config: Any, source: Input):
        refuse_kind("vit", ("image",), source)
        self.config = config
        self.shape = source.shape

    def __call__(
        self, images: Float[Array, "B H W C"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B classes"]:
        """Logits, float32. `rngs` says that this is training.

        Raises:
            ValueError: images of another size than the model was built for.
        """
        last = self.features(images, rngs=rngs)[-1]
        with jax.named_scope("head"):
            return self.head(last, rngs=rngs)

    def features(
        self, images: Float[Array, "B H W C"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "B h w E"], ...]:
        """The last map of each resolution that the stages make, from the finest."""
        refuse_size(images, self.shape)
        with jax.named_scope("stem"):
            x = self.stem(images, rngs=rngs)
        maps = []
        for i, stage in enumerate(self.stages):
            with jax.named_scope(f"stage{i}"):
                x = stage(x, rngs=rngs)
            if maps and maps[-1].shape[1:3] == x.shape[1:3]:
                maps.pop()
            maps.append(x)
        return tuple(maps)

    def head(
        self, x: Float[Array, "B h w E"], *, rngs: nnx.Rngs | None
    ) -> Float[Array, "B classes"]:
        """Logits of the last map."""
        return self.classifier(mean(x))


class Distilled(Pyramid):
    """A pyramid with two classifiers, the second for what a teacher says (DeiT, arXiv 2012.12877).

    Logits are the mean of both classifiers', `heads` gives them apart. A subclass makes `scores`.
    """

    def head(
        self, x: Float[Array, "B h w E"], *, rngs: nnx.Rngs | None
    ) -> Float[Array, "B classes"]:
        """The mean of both classifiers' logits."""
        first, second = self.scores(x, rngs=rngs)
        return (first + second) / 2

    def heads(
        self, images: Float[Array, "B H W C"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "B classes"], Float[Array, "B classes"]]:
        """The logits of each classifier: that of the labels, then that of the teacher."""
        last = self.features(images, rngs=rngs)[-1]
        with jax.named_scope("head"):
            return self.scores(last, rngs=rngs)

    def scores(
        self, x: Float[Array, "B h w E"], *, rngs: nnx.Rngs | None
    ) -> tuple[Float[Array, "B classes"], Float[Array, "B classes"]]:
        """What each classifier makes of the last map, float32."""
        raise NotImplementedError
