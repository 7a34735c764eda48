"""What backbones share: the input they are built for, pooling, and the classifier."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from efficient_attn import attention
from efficient_attn.errors import UserError
from kernels.dispatch import Backend

Pool = Literal["mean", "cls"]
Kind = Literal["image", "tokens", "pair", "text", "masked", "translation"]

READERS: dict[str, tuple[str, str]] = {
    "image": ("images", "vit"),
    "tokens": ("tokens", "encoder"),
    "masked": ("masked tokens", "encoder"),
    "pair": ("pairs of texts", "dual_encoder"),
    "text": ("text to continue", "causal_lm"),
    "translation": ("translations", "encoder_decoder"),
}
"""Every kind of input in words, and the backbone that reads it."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """What a backbone reads and tells apart; ids are below `vocab`, 0 is padding.

    kind: what the inputs are, with `shape` in brackets; `data.Info` has each in full.
        "image" (H, W, C), "tokens" and "pair" (longest length,): `classes` of an example;
        "text", "masked" (longest length,), "translation" (S, T): `classes` tokens at each position.
    """

    kind: Kind
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
    """Inputs [B, ...] -> logits [*label.shape, classes], whatever the attention inside."""

    @dataclass(frozen=True)
    class Config:
        """The backbone's own options."""

    def __init__(self, config: Any, source: Input, build: Build, *, rngs: nnx.Rngs):
        raise NotImplementedError

    def __call__(self, inputs: Any, *, rngs: nnx.Rngs | None = None) -> Float[Array, "... classes"]:
        """Logits in float32. `rngs` supplies dropout; without it nothing is dropped."""
        raise NotImplementedError


def refuse_kind(name: str, kinds: Iterable[str], source: Input) -> None:
    """Raise UserError for an input that the backbone `name` does not read."""
    if source.kind in kinds:
        return
    nouns = " or ".join(READERS[kind][0] for kind in kinds)
    noun, other = READERS[source.kind]
    hint = ", or data.image.layout='pixels'" if source.kind == "image" and "tokens" in kinds else ""
    raise UserError(
        f"model.name={name!r} reads {nouns}, not {noun}; use model.name={other!r}{hint}"
    )


def refuse_without(capability: str, expression: str, depth: int, *, what: str) -> None:
    """Raise UserError where a layer's mechanism lacks what only `what` needs of it."""
    for choice in attention.pattern(expression, depth):
        attention.require_able(choice, {capability}, what=what)


def pooled(
    x: Float[Array, "B T E"], valid: Bool[Array, "B T"] | None, *, pool: Pool
) -> Float[Array, "B E"]:
    """The first position, or the mean of the valid ones, float32; 0 for a row without any."""
    x = x.astype(jnp.float32)
    if pool == "cls":
        return x[:, 0]
    if valid is None:
        return jnp.mean(x, axis=1)
    total = jnp.sum(jnp.where(valid[..., None], x, 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1)


class Classifier(nnx.Module):
    """Pool the valid positions, or take the first, and score the classes in float32."""

    def __init__(self, width: int, classes: int, *, pool: Pool, rngs: nnx.Rngs):
        self.pool: Pool = pool
        self.linear = nnx.Linear(width, classes, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T E"], valid: Bool[Array, "B T"] | None
    ) -> Float[Array, "B classes"]:
        """A row without a valid position pools to 0."""
        return self.linear(pooled(x, valid, pool=self.pool))


def cls_token(width: int, rngs: nnx.Rngs) -> nnx.Param:
    """A learned first token [1, 1, E]."""
    return nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, 1, width)))


def prepend(token: nnx.Param, x: Float[Array, "B T E"]) -> Float[Array, "B T+1 E"]:
    """x with the token before it."""
    first = jnp.broadcast_to(token[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
    return jnp.concatenate([first, x], axis=1)
