"""What backbones share: the input they are built for, pooling, and the classifier."""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from kernels.dispatch import Backend

Pool = Literal["mean", "cls"]


@dataclass(frozen=True, kw_only=True)
class Input:
    """What a backbone reads and tells apart.

    kind: "image", shape (H, W, C), or "tokens", shape (longest length,), ids below `vocab`, 0
    padding.
    """

    kind: Literal["image", "tokens"]
    shape: tuple[int, ...]
    classes: int
    vocab: int | None = None


@dataclass(frozen=True, kw_only=True)
class Build:
    """How a backbone computes: the attention expression, the backend, the compute dtype."""

    attention: str
    backend: Backend = "auto"
    dtype: Any = jnp.float32


class Backbone(nnx.Module):
    """Inputs [B, ...] -> logits [B, classes], whatever the attention inside."""

    @dataclass(frozen=True)
    class Config:
        """The backbone's own options."""

    def __init__(self, config: Any, source: Input, build: Build, *, rngs: nnx.Rngs):
        raise NotImplementedError

    def __call__(self, inputs: Array, *, rngs: nnx.Rngs | None = None) -> Float[Array, "B classes"]:
        """Logits in float32. `rngs` supplies dropout; without it nothing is dropped."""
        raise NotImplementedError


class Classifier(nnx.Module):
    """Pool the valid positions, or take the first, and score the classes in float32."""

    def __init__(self, width: int, classes: int, *, pool: Pool, rngs: nnx.Rngs):
        self.pool = pool
        self.linear = nnx.Linear(width, classes, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T E"], valid: Bool[Array, "B T"] | None
    ) -> Float[Array, "B classes"]:
        """A row without a valid position pools to 0."""
        x = x.astype(jnp.float32)
        if self.pool == "cls":
            return self.linear(x[:, 0])
        if valid is None:
            return self.linear(jnp.mean(x, axis=1))
        total = jnp.sum(jnp.where(valid[..., None], x, 0.0), axis=1)
        return self.linear(total / jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1))


def cls_token(width: int, rngs: nnx.Rngs) -> nnx.Param:
    """A learned first token [1, 1, E]."""
    return nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, 1, width)))


def prepend(token: nnx.Param, x: Float[Array, "B T E"]) -> Float[Array, "B T+1 E"]:
    """x with the token before it."""
    first = jnp.broadcast_to(token[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
    return jnp.concatenate([first, x], axis=1)
