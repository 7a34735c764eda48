"""What backbones share: the input they are built for, pooling, and the classifier."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from efficient_attn import attention
from efficient_attn.errors import UserError
from kernels.dispatch import Backend

NATIVE = "native"
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
    """How a backbone computes: the attention expression, the backend, the compute dtype.

    attention: "native" is the backbone's own, where it has one.
    """

    attention: str
    backend: Backend = "auto"
    dtype: Any = jnp.float32

    def expression(self, native: str) -> str:
        """The attention expression for a place where the backbone's own is `native`."""
        return native if self.attention == NATIVE else self.attention


class Rule(NamedTuple):
    """Where a module's weights are found in a PyTorch network's: names as data.

    ours: a regular expression that a module's path matches in whole, or that of a lone parameter
    ("stack.blocks.(\\d+).mixer.query"). theirs: the module there, with the groups of `ours`
    ("blocks.\\1.attn.qkv"). part: (i, n) where ours is the i-th of n equal parts, along the
    output. channels: of the input of their convolution, where ours is a linear layer on its
    flattened square windows; 0 where both are of one kind; -1 for windows of 1 x 1, whatever their
    channels. lead: how many axes of length 1 their array begins with beyond ours.
    """

    ours: str
    theirs: str
    part: tuple[int, int] = (0, 1)
    channels: int = 0
    lead: int = 0


def block_names(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The rules of a transformer block, `ours` being its path and `theirs` timm's name of it."""
    branches = {"mixer_norm": "norm1", "mixer.out": "attn.proj", "mlp_norm": "norm2"}
    branches |= {"mlp.expand": "mlp.fc1", "mlp.contract": "mlp.fc2"}
    branches |= {"scales.mixer": "ls1.gamma", "scales.mlp": "ls2.gamma"}
    projections = ("query", "key", "value")
    return (
        *(
            Rule(f"{ours}\\.{re.escape(here)}", f"{theirs}.{there}")
            for here, there in branches.items()
        ),
        *(
            Rule(f"{ours}\\.mixer\\.{name}", f"{theirs}.attn.qkv", part=(i, 3))
            for i, name in enumerate(projections)
        ),
    )


class Objective(nnx.Intermediate):
    """A loss of each example [B], already weighted, that a model sows (`Module.sow`) in training.

    It is added to what the model is trained for, whatever that is.
    """


class Backbone(nnx.Module):
    """Inputs [B, ...] -> logits [*label.shape, classes], whatever the attention inside.

    native: what attention="native" stands for; empty where each stage has its own, or none has.
    names: how its weights are called elsewhere (see `weights`).
    """

    native: ClassVar[str] = ""
    names: ClassVar[tuple["Rule", ...]] = ()

    @dataclass(frozen=True)
    class Config:
        """The backbone's own options."""

    def __init__(self, config: Any, source: Input, build: Build, *, rngs: nnx.Rngs):
        raise NotImplementedError

    def __call__(self, inputs: Any, *, rngs: nnx.Rngs | None = None) -> Float[Array, "... classes"]:
        """Logits in float32. `rngs` supplies dropout; without it nothing is dropped."""
        raise NotImplementedError

    def rules(self) -> tuple["Rule", ...]:
        """`names`, and what depends on the model's depth besides."""
        return self.names

    def heads(
        self, inputs: Any, *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "... classes"], ...]:
        """The logits of each classifier, of which a call gives the mean.

        Where there are two, the second learns from a teacher, if there is one.
        """
        return (self(inputs, rngs=rngs),)


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


def refuse_size(images: Array, shape: tuple[int, ...]) -> None:
    """Raise ValueError for images of another size than the model was built for."""
    if images.shape[1:] != shape:
        raise ValueError(f"images of {images.shape[1:]}, but the model was built for {shape}")


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
