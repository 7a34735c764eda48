"""A transformer that reads one sequence and writes another (Vaswani et al. 2017, 1706.03762)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from efficient_attn.attention import Site
from efficient_attn.backbones.base import Backbone, Build, Input, refuse_kind
from efficient_attn.backbones.beam import Found, beam_search, spread
from efficient_attn.blocks import Cross, Shape, Stack
from efficient_attn.config import require
from efficient_attn.layers.embed import PositionEmbed, TokenEmbed, score
from kernels import Mask


class EncoderDecoder(Backbone):
    """Source tokens -> encoder -> memory; target tokens -> causal decoder with cross-attention.

    Each token enters as sqrt(E) times its row of the embedding, and its position (section 3.4).
    """

    @dataclass(frozen=True)
    class Config(Shape):
        """The two stacks, and:
        decoder_depth: blocks of the decoder; 0 is as many as the encoder has, `depth`.
        encoder_attention: expression for the encoder; "" is config.attention, which the decoder
        has in any case.
        cross_attention: expression for the look from the decoder's blocks at the source.
        positions: added ("sinusoidal", "learned"), in the self-attention ("rotary", "alibi"), or
        "none".
        tied: which embeddings are one matrix: "all" three, of source, target and output (section
        3.4); "output" and target (arXiv 1608.05859); or "none".
        """

        decoder_depth: int = 0
        encoder_attention: str = ""
        cross_attention: str = "softmax"
        positions: Literal["sinusoidal", "learned", "rotary", "alibi", "none"] = "sinusoidal"
        tied: Literal["all", "output", "none"] = "all"

        def __post_init__(self):
            super().__post_init__()
            require(
                self.decoder_depth >= 0,
                f"decoder_depth={self.decoder_depth} must not be negative; 0 is as deep as the "
                "encoder",
            )

    def __init__(self, config: Config, source: Input, build: Build, *, rngs: nnx.Rngs):
        refuse_kind("encoder_decoder", ("translation",), source)
        assert source.vocab is not None
        width, dtype = config.width, build.dtype
        self.config, self.lengths, self.dtype = config, source.shape, dtype
        turned: Any = config.positions if config.positions in ("rotary", "alibi") else "none"
        added: Any = config.positions if turned == "none" else "none"
        self.source_place, self.target_place = (
            PositionEmbed(length, width, kind=added, dtype=dtype, rngs=rngs)
            for length in source.shape
        )
        tables = {"all": ["source"], "output": ["source", "target"]}
        for name in tables.get(config.tied, ["source", "target", "output"]):
            embed = TokenEmbed(source.vocab, width, dtype=dtype, rngs=rngs)
            setattr(self, f"{name}_embed", embed)
        self.dropout = nnx.Dropout(config.dropout)
        read, write = (
            Site(
                width=width, heads=config.heads, seq=length, positions=turned, dtype=dtype,
                backend=build.backend,
            )
            for length in source.shape
        )  # fmt: skip
        reads, writes = self._needs()
        first, second = config.encoder_attention or build.attention, build.attention
        self.encoder = Stack(first, config, read, needs=reads, rngs=rngs)
        depth = config.decoder_depth or config.depth
        look = Cross(config.cross_attention, replace(read, positions="none"))
        self.decoder = Stack(
            second, replace(config, depth=depth), write, needs=writes, rngs=rngs, cross=look
        )

    def _needs(self) -> tuple[set[str], set[str]]:
        """What the encoder and the decoder need of their mechanisms; all, where it is the same."""
        reads, writes = {"padding", "bidirectional"}, {"causal", "decode"}
        if self.config.positions == "alibi":
            reads, writes = reads | {"alibi"}, writes | {"alibi"}
        both = reads | writes
        return (reads, writes) if self.config.encoder_attention else (both, both)

    def __call__(
        self, inputs: Mapping[str, Int[Array, "B _"]], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B T V"]:
        """Logits, float32, of the token that follows each of inputs["target"] [B, T].

        inputs["source"]: [B, S]; token 0 is padding. Without `rngs` nothing is dropped.

        Raises:
            ValueError: more tokens than the model was built for.
        """
        context, mask = self.encode(inputs["source"], rngs=rngs)
        x = self._embed("target", inputs["target"], rngs)
        x = self.decoder(x, mask=Mask(causal=True), rngs=rngs, context=context, context_mask=mask)
        return self._score(x)

    def encode(
        self, source: Int[Array, "B S"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "B S E"], Mask]:
        """The encoder's output, and who of it may be seen."""
        mask = Mask(keys=source != 0)
        return self.encoder(self._embed("source", source, rngs), mask=mask, rngs=rngs), mask

    def init_cross(self, source: Int[Array, "B S"]) -> tuple[Any, ...]:
        """The source as each of the decoder's blocks looks at it in `step`, made once."""
        context, mask = self.encode(source)
        return self.decoder.init_cross(context, mask=mask)

    def init_state(self, batch: int) -> tuple[Any, ...]:
        """What decoding carries from token to token, before the first."""
        return self.decoder.init_state(batch, self.dtype)

    def step(
        self,
        tokens: Int[Array, " B"],
        state: tuple[Any, ...],
        *,
        position: Int[Array, " B"],
        memory: tuple[Any, ...],
    ) -> tuple[Float[Array, "B V"], tuple[Any, ...]]:
        """Logits after the target token at `position` (from 0), equal to the forward pass's."""
        x = self._embed("target", tokens[:, None], None, positions=position[:, None])
        x, state = self.decoder.step(x, state, position=position, memory=memory)
        return self._score(x)[:, 0], state

    def translate(
        self,
        source: Int[Array, "B S"],
        *,
        start: int,
        end: int,
        beam: int = 4,
        alpha: float = 0.6,
        max_len: int | None = None,
    ) -> Found:
        """The `beam` best targets of each source by `beam_search`, without the start token.

        max_len: longest target with its end; by default, and at most, what the model was built for.

        Raises:
            UserError: start, end, beam, alpha or max_len out of range.
        """
        longest, vocab = self.lengths[1], self._table("source").embedding.shape[0]
        for name, token in (("start", start), ("end", end)):
            require(0 < token < vocab, f"{name}={token} is not a token id from 1 to {vocab - 1}")
        max_len = longest if max_len is None else max_len
        require(max_len <= longest, f"max_len={max_len} exceeds the {longest} of the model")
        # A row's beams look at the same source, so their order does not matter to the memory.
        memory = spread(self.init_cross(source), beam)

        def step(tokens, positions, state):
            return self.step(tokens, state, position=positions, memory=memory)

        return beam_search(
            step, self.init_state(len(source) * beam), batch=len(source), beam=beam,
            max_len=max_len, start=start, end=end, alpha=alpha,
            never=(0,) if start == end else (0, start),
        )  # fmt: skip

    def _embed(self, side: Literal["source", "target"], tokens, rngs, positions=None):
        longest = self.lengths[side == "target"]
        if tokens.shape[1] > longest:
            raise ValueError(
                f"{tokens.shape[1]} {side} tokens, but the model was built for {longest}"
            )
        place = getattr(self, f"{side}_place")
        x = self._table("source" if self.config.tied == "all" else side)(tokens)
        if place.kind != "none":
            x = x + place(jnp.arange(tokens.shape[1])[None] if positions is None else positions)
        return self.dropout(x, deterministic=rngs is None, rngs=rngs)

    def _score(self, x):
        name = {"all": "source", "output": "target", "none": "output"}[self.config.tied]
        return score(x, self._table(name).embedding[...])

    def _table(self, name: str) -> TokenEmbed:
        return getattr(self, f"{name}_embed")
