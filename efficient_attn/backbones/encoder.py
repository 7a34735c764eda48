"""A transformer encoder that classifies sequences of tokens, or tells the hidden ones."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from efficient_attn.attention import Site
from efficient_attn.backbones.base import (
    Backbone,
    Build,
    Classifier,
    Input,
    Pool,
    cls_token,
    prepend,
    refuse_kind,
)
from efficient_attn.blocks import Shape, Stack
from efficient_attn.config import require
from efficient_attn.layers.embed import PositionEmbed, TokenEmbed, score
from efficient_attn.layers.norm import NormType, make_norm
from kernels import Mask


class Reader(Backbone):
    """Embedding, positions and a stack of blocks; what is told of it is up to a backbone."""

    @dataclass(frozen=True)
    class Config(Shape):
        """The stack, and:
        pool: "mean" over the tokens that are not padding, or "cls", a learned first token.
        positions: added ("learned", "sinusoidal"), in the attention ("rotary", "alibi"), or "none".
        """

        pool: Pool = "mean"
        positions: Literal["learned", "sinusoidal", "rotary", "alibi", "none"] = "learned"

    def __init__(self, config: Config, source: Input, build: Build, *, rngs: nnx.Rngs):
        assert source.vocab is not None
        width, (length,) = config.width, source.shape
        self.config = config
        self.length = length
        if source.kind == "masked":
            self.embed = TokenEmbed(source.vocab, width, dtype=build.dtype, rngs=rngs)
        else:
            init = nnx.initializers.normal(1.0)
            self.embed = nnx.Embed(
                source.vocab, width, embedding_init=init, dtype=build.dtype, rngs=rngs
            )
        total = length + (config.pool == "cls")
        if config.pool == "cls":
            self.cls = cls_token(width, rngs)
        turned: Any = config.positions if config.positions in ("rotary", "alibi") else "none"
        added: Any = config.positions if turned == "none" else "none"
        self.place = PositionEmbed(total, width, kind=added, dtype=build.dtype, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout)
        site = Site(
            width=width, heads=config.heads, seq=total, positions=turned, dtype=build.dtype,
            backend=build.backend,
        )  # fmt: skip
        needs = {"padding", "bidirectional"} | ({"alibi"} if turned == "alibi" else set())
        self.stack = Stack(build.attention, config, site, needs=needs, rngs=rngs)

    def read(
        self, tokens: Int[Array, "B T"], *, rngs: nnx.Rngs | None
    ) -> tuple[Float[Array, "B L E"], Bool[Array, "B L"]]:
        """Vectors, and where they stand for a token; with pool="cls" L is T + 1, else T.

        Raises:
            ValueError: more tokens than the model was built for.
        """
        if tokens.shape[1] > self.length:
            raise ValueError(
                f"{tokens.shape[1]} tokens, but the encoder was built for {self.length}"
            )
        x, valid = self.embed(tokens), tokens != 0
        if self.config.pool == "cls":
            x = prepend(self.cls, x)
            valid = jnp.pad(valid, [(0, 0), (1, 0)], constant_values=True)
        x = x + self.place(jnp.arange(x.shape[1])[None])
        x = self.dropout(x, deterministic=rngs is None, rngs=rngs)
        return self.stack(x, mask=Mask(keys=valid), rngs=rngs), valid


class Encoder(Reader):
    """What was read is pooled and classified; or, where tokens are masked, every token is scored
    at every position (`MaskedHead`)."""

    def __init__(self, config: Reader.Config, source: Input, build: Build, *, rngs: nnx.Rngs):
        refuse_kind("encoder", ("tokens", "masked"), source)
        self.masked = source.kind == "masked"
        require(
            not self.masked or config.pool == "mean",
            f"pool={config.pool!r} is for classification, but here tokens are masked; leave it out",
        )
        super().__init__(config, source, build, rngs=rngs)
        if self.masked:
            assert source.vocab is not None
            self.head = MaskedHead(
                config.width, source.vocab,
                norm_type=config.norm_type, dtype=build.dtype, rngs=rngs,
            )  # fmt: skip
        else:
            self.classifier = Classifier(config.width, source.classes, pool=config.pool, rngs=rngs)

    def __call__(
        self, tokens: Int[Array, "B T"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B classes"] | Float[Array, "B T V"]:
        """Logits, float32; token 0 is padding. Without `rngs` nothing is dropped.

        Raises:
            ValueError: more tokens than the model was built for.
        """
        x, valid = self.read(tokens, rngs=rngs)
        if self.masked:
            return self.head(x, self.embed.embedding[...])
        return self.classifier(x, valid)


class MaskedHead(nnx.Module):
    """norm(gelu(x W + b)) scored against the embedding's table, plus a bias per token.

    BERT's head (arXiv 1810.04805, section 3.1, as released).
    """

    def __init__(self, width: int, vocab: int, *, norm_type: NormType, dtype, rngs: nnx.Rngs):
        self.transform = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.norm = make_norm(norm_type, width, dtype=dtype, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(vocab))

    def __call__(
        self, x: Float[Array, "B T E"], table: Float[Array, "V E"]
    ) -> Float[Array, "B T V"]:
        """Logits in float32."""
        y = self.norm(jax.nn.gelu(self.transform(x)))
        return score(y, table) + self.bias[...][None, None]
