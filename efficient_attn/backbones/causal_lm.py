"""A decoder-only language model: each token from those before it."""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from efficient_attn.attention import Site
from efficient_attn.backbones.base import Backbone, Build, Input, refuse_kind, refuse_without
from efficient_attn.blocks import Shape, Stack
from efficient_attn.config import require
from efficient_attn.layers.embed import PositionEmbed, TokenEmbed, score
from kernels import Mask


class CausalLM(Backbone):
    """Embedding, positions, a stack of causal blocks, a score for every token at every position.

    Token 0 is padding: no position sees it, and generation never gives it.
    """

    @dataclass(frozen=True)
    class Config(Shape):
        """The stack, and:
        positions: turned into queries and keys ("rotary"), a fall of the logits with the distance
        ("alibi"), added ("learned", "sinusoidal") or "none".
        embeddings: "tied" scores against the table of the embedding (arXiv 1608.05859), "untied"
        against a table of its own.
        logit_cap: c in l -> c tanh(l / c) of the scores (Gemma 2, arXiv 2408.00118), or None.
        """

        norm_type: Literal["layernorm", "rmsnorm"] = "rmsnorm"
        positions: Literal["rotary", "alibi", "learned", "sinusoidal", "none"] = "rotary"
        embeddings: Literal["tied", "untied"] = "tied"
        logit_cap: float | None = None

        def __post_init__(self):
            super().__post_init__()
            require(
                self.logit_cap is None or self.logit_cap > 0,
                f"logit_cap={self.logit_cap} must be positive; None turns it off",
            )

    def __init__(self, config: Config, source: Input, build: Build, *, rngs: nnx.Rngs):
        refuse_kind("causal_lm", ("text",), source)
        assert source.vocab is not None
        (length,), width, dtype = source.shape, config.width, build.dtype
        self.config, self.length, self.dtype = config, length, dtype
        self.source, self.build = source, build
        self.attention = build.attention
        positions = config.positions
        added = positions if positions in ("learned", "sinusoidal") else "none"
        self.embed = TokenEmbed(source.vocab, width, dtype=dtype, rngs=rngs)
        self.place = PositionEmbed(length, width, kind=added, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout)
        site = Site(
            width=width, heads=config.heads, seq=length,
            positions=positions if positions in ("rotary", "alibi") else "none",
            dtype=dtype, backend=build.backend,
        )  # fmt: skip
        needs = {"padding", "causal"} | ({"alibi"} if positions == "alibi" else set())
        self.stack = Stack(build.attention, config, site, needs=needs, rngs=rngs)
        if config.embeddings == "untied":
            self.unembed = TokenEmbed(source.vocab, width, dtype=dtype, rngs=rngs)

    def __call__(
        self, inputs: Int[Array, "B T"] | dict[str, Any], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B T V"]:
        """Logits, float32, of the token after each. Without `rngs` nothing is dropped.

        inputs: tokens, or {"tokens", "segments", "positions"}, each int32 [B,T], of documents
            packed into rows: a position sees its own segment alone.

        Raises:
            ValueError: more tokens than the model was built for.
            UserError: packed documents, and a mechanism that cannot keep them apart.
        """
        packed = inputs if isinstance(inputs, dict) else {"tokens": inputs}
        tokens, segments = packed["tokens"], packed.get("segments")
        if tokens.shape[1] > self.length:
            raise ValueError(f"{tokens.shape[1]} tokens, but the model was built for {self.length}")
        if segments is not None:
            what = "a row of packed documents"
            refuse_without("segments", self.attention, self.config.depth, what=what)
        places = packed.get("positions")
        x = self._embed(tokens, jnp.arange(tokens.shape[1])[None] if places is None else places)
        x = self.dropout(x, deterministic=rngs is None, rngs=rngs)
        mask = Mask(causal=True, keys=tokens != 0, segments=segments)
        return self._score(self.stack(x, mask=mask, positions=places, rngs=rngs))

    def init_state(self, batch: int, dtype: Any = None) -> tuple[Any, ...]:
        """What generation carries, before the first token; `dtype` is the model's by default.

        Raises:
            UserError: a mechanism that does not decode.
        """
        refuse_without("decode", self.attention, self.config.depth, what="generation")
        return self.stack.init_state(batch, self.dtype if dtype is None else dtype)

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], state: tuple[Any, ...]
    ) -> tuple[Float[Array, "B V"], tuple[Any, ...]]:
        """Read prompts, padded on the right and of `lengths` >= 1 tokens, none of them 0.

        Returns the logits of the token after each prompt, and the state there.
        """
        positions = jnp.arange(tokens.shape[1])[None]
        x, state = self.stack.prefill(
            self._embed(tokens, positions), state, keys=positions < lengths[:, None]
        )
        last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)
        return self._score(last)[:, 0], state

    def step(
        self, tokens: Int[Array, " B"], state: tuple[Any, ...], *, position: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], tuple[Any, ...]]:
        """One token of each row at `position` (from 0): the logits of the next, and the state."""
        x = self._embed(tokens[:, None], position[:, None])
        x, state = self.stack.step(x, state, position=position)
        return self._score(x)[:, 0], state

    def _embed(self, tokens, positions):
        x = self.embed(tokens)
        return x if self.place.kind == "none" else x + self.place(positions)

    def _score(self, x):
        head = self.embed if self.config.embeddings == "tied" else self.unembed
        logits, cap = score(x, head.embedding[...]), self.config.logit_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)
