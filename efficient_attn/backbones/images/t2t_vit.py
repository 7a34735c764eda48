"""T2T-ViT (arXiv 2101.11986, table 1): overlapping tokens, then a deep and narrow transformer."""

from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from efficient_attn.attention import Site
from efficient_attn.attention.base import Buffer
from efficient_attn.backbones.base import (
    Backbone,
    Build,
    Classifier,
    Input,
    Rule,
    block_names,
    cls_token,
    prepend,
    refuse_kind,
    refuse_size,
)
from efficient_attn.backbones.images.variants import Variant
from efficient_attn.blocks import Shape, Stack
from efficient_attn.blocks.tokens_to_token import TokenKind, TokensToToken
from efficient_attn.config import at_least, require
from efficient_attn.layers.positions import sinusoids
from kernels import Mask

COMMON = {"norm": "norm1", "mlp_norm": "norm2"}
TOKEN_NAMES: dict[str, dict[str, str]] = {
    "performer": COMMON
    | {"enter": "kqv", "leave": "proj", "mlp.expand": "mlp.0", "mlp.contract": "mlp.2"}
    | {"projection": "w"},
    "transformer": COMMON
    | {"enter": "attn.qkv", "leave": "attn.proj"}
    | {"mlp.expand": "mlp.fc1", "mlp.contract": "mlp.fc2"},
}


class T2TVit(Backbone):
    """Tokens to token, a class token, fixed positions, a stack of blocks, a linear classifier.

    An expression takes the place of the attention in the blocks; that of the tokens' module stays
    ("performer" or "transformer"), since its output is narrower than its input. Positions and
    random features are carried along and not trained; the paper's parameters count them in.
    Weights are those of yitu-opensource/T2T-ViT.
    """

    native = "softmax"
    names = (
        Rule("tokens.project", "tokens_to_token.project"),
        Rule("cls", "cls_token"),
        Rule("positions", "pos_embed", lead=1),
        *block_names(r"stack\.blocks\.(\d+)", r"blocks.\1"),
        Rule(r"stack\.norm", "norm"),
        Rule(r"classifier\.linear", "head"),
    )

    @dataclass(frozen=True)
    class Config(Shape):
        """The stack, and:
        tokens: the attention of the tokens' module: "performer", or "transformer" (T2T-ViT_t).
        token_width: its width.
        """

        tokens: TokenKind = "performer"
        token_width: int = 64

        def __post_init__(self):
            super().__post_init__()
            at_least(self, 2, "token_width")
            require(self.width % 2 == 0, f"width={self.width} must be even, for sines and cosines")

    def __init__(self, config: Config, source: Input, build: Build, *, rngs: nnx.Rngs):
        refuse_kind("vit", ("image",), source)
        height, width_px, channels = source.shape
        require(
            height % 16 == 0 and width_px % 16 == 0,
            f"tokens of 16 do not tile images of {height} x {width_px}; change data.image.size",
        )
        self.config, self.shape = config, source.shape
        self.grid = (height // 16, width_px // 16)
        self.tokens = TokensToToken(
            channels, config.token_width, config.width, kind=config.tokens, dtype=build.dtype,
            backend=build.backend, rngs=rngs,
        )  # fmt: skip
        places = self.grid[0] * self.grid[1] + 1
        self.cls = cls_token(config.width, rngs)
        self.positions = Buffer(_positions(places, config.width))
        self.dropout = nnx.Dropout(config.dropout)
        site = Site(
            width=config.width, heads=config.heads, seq=places, dtype=build.dtype,
            backend=build.backend, qkv_bias=False,
        )  # fmt: skip
        expression = build.expression(self.native)
        self.stack = Stack(expression, config, site, needs={"bidirectional"}, rngs=rngs)
        self.classifier = Classifier(config.width, source.classes, pool="cls", rngs=rngs)

    def rules(self):
        """The two kinds of tokens' modules differ in their names."""
        kind = TOKEN_NAMES[self.config.tokens].items()
        return self.names + tuple(
            Rule(rf"tokens\.blocks\.{i}\.{a}", f"tokens_to_token.attention{i + 1}.{b}")
            for i in (0, 1)
            for a, b in kind
        )

    def __call__(
        self, images: Float[Array, "B H W C"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B classes"]:
        """Logits, float32. Without `rngs` nothing is dropped.

        Raises:
            ValueError: images of another size than the model was built for.
        """
        x = self._encode(images, rngs)
        with jax.named_scope("head"):
            return self.classifier(x, None)

    def features(
        self, images: Float[Array, "B H W C"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "B h w E"]]:
        """The map of the tokens after the last block, at stride 16."""
        x = self._encode(images, rngs)[:, 1:]
        return (x.reshape(len(x), *self.grid, x.shape[-1]),)

    def _encode(self, images, rngs):
        refuse_size(images, self.shape)
        with jax.named_scope("stem"):
            x = self.tokens(images, rngs=rngs)
            x = prepend(self.cls, x.reshape(len(x), -1, x.shape[-1]))
            x = x + self.positions[...].astype(x.dtype)[None]
            x = self.dropout(x, deterministic=rngs is None, rngs=rngs)
        with jax.named_scope("stage0"):
            return self.stack(x, mask=Mask(), rngs=rngs)


def _positions(places: int, width: int) -> np.ndarray:
    """Sines at even channels, cosines at odd ones."""
    halves = sinusoids(np.arange(places), width).reshape(places, 2, -1)
    return halves.transpose(0, 2, 1).reshape(places, width)


def _variant(width: int, depth: int, ratio: float, *, tokens: TokenKind = "performer") -> Variant:
    config = T2TVit.Config(
        width=width, depth=depth, heads=width // 64, mlp_ratio=ratio, mlp="gelu_exact",
        norm_epsilon=1e-5, dropout=0.0, tokens=tokens,
    )  # fmt: skip
    return Variant(T2TVit, config)


SIZES = {14: (384, 14, 3.0), 19: (448, 19, 3.0), 24: (512, 24, 3.0)}
VARIANTS = {f"t2t_vit_{depth}": _variant(256, depth, 2.0) for depth in (7, 10, 12)}
VARIANTS |= {f"t2t_vit_{name}": _variant(*size) for name, size in SIZES.items()}
VARIANTS |= {
    f"t2t_vit_t_{name}": _variant(*size, tokens="transformer") for name, size in SIZES.items()
}
