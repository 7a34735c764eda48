"""Vision transformers (arXiv 2010.11929), DeiT's with a distillation token (2012.12877), LV-ViT's
with classifiers for patches behind a stem of convolutions (2104.10858)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from efficient_attn.attention import Site
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
from efficient_attn.blocks import Chain, Shape, Stack
from efficient_attn.config import require
from efficient_attn.layers.conv2d import ConvNorm
from efficient_attn.layers.positions import sinusoids_2d
from kernels import Mask


class Vit(Backbone):
    """Patches, positions, a stack of blocks, pooling, a linear classifier; images of any size.

    With pool="distilled" a second token learns from a teacher by a classifier of its own (DeiT,
    section 4); logits are the mean of both classifiers', `heads` gives them apart.

    With pool="dense" a second classifier scores each patch, and logits are the class token's and
    half of the highest that any patch gives to each class (LV-ViT as released); `token_logits`
    gives them apart.
    """

    native = "softmax"
    needs: ClassVar[frozenset[str]] = frozenset({"bidirectional"})
    names = (
        Rule("cls", "cls_token"),
        Rule("distilled", "dist_token"),
        Rule("positions", "pos_embed", lead=1),
        *block_names(r"stack\.blocks\.(\d+)", r"blocks.\1"),
        Rule(r"stack\.norm", "norm"),
        Rule(r"classifier\.linear", "head"),
        Rule(r"student\.linear", "head_dist"),
        Rule("dense", "aux_head"),
        *(
            Rule(rf"stem\.layers\.{i}\.{ours}", f"patch_embed.{theirs}{i + 1}")
            for i in range(3)
            for ours, theirs in (("conv", "conv"), (r"norm\.norm", "bn"))
        ),
    )

    @dataclass(frozen=True)
    class Config(Shape):
        """The stack, and:
        patch: side of a square patch in pixels; it tiles the image.
        stem: channels of the three convolutions before the patches, the first of which halves the
            sides (see `conv_stem`); 0 has none.
        pool: "mean" over the patches; "cls", a learned first token; "distilled", two of them;
            "dense", the first token and every patch.
        positions: "learned", or "sincos", fixed in two dimensions.
        placed: whether the first tokens have learned positions too, as in the papers' networks.
        qkv_bias: whether queries, keys and values have biases.
        """

        patch: int = 16
        stem: int = 0
        pool: Literal["mean", "cls", "distilled", "dense"] = "mean"
        positions: Literal["learned", "sincos"] = "learned"
        placed: bool = False
        qkv_bias: bool = True

        def __post_init__(self):
            super().__post_init__()
            require(self.patch > 0, f"patch={self.patch} must be positive")
            require(self.stem >= 0, f"stem={self.stem} is negative; 0 has no convolutions")
            require(
                not self.stem or self.patch % 2 == 0,
                f"patch={self.patch} must be even behind a stem, which halves the sides",
            )
            require(
                self.positions != "sincos" or self.width % 4 == 0,
                f"positions='sincos' needs a width that 4 divides, not {self.width}",
            )
            require(
                not self.placed or self.positions == "learned",
                "placed=True is for positions='learned'; sinusoids have no place before the first",
            )

        @property
        def first(self) -> int:
            """How many tokens stand before the patches."""
            return {"mean": 0, "cls": 1, "dense": 1, "distilled": 2}[self.pool]

    def __init__(self, config: Config, source: Input, build: Build, *, rngs: nnx.Rngs):
        refuse_kind("vit", ("image",), source)
        height, width_px, channels = source.shape
        patch, width, first = config.patch, config.width, config.first
        require(
            height % patch == 0 and width_px % patch == 0,
            f"patches of {patch} do not tile images of {height} x {width_px}; "
            "change model.patch or data.image.size",
        )
        rows, columns = self.grid = height // patch, width_px // patch
        self.config = config
        self.shape = source.shape
        if config.stem:
            self.stem = conv_stem(channels, config.stem, dtype=build.dtype, rngs=rngs)
            patch, channels = patch // 2, config.stem
        self.embed = nnx.Linear(patch**2 * channels, width, dtype=build.dtype, rngs=rngs)
        if first:
            self.cls = cls_token(width, rngs)
        if config.pool == "distilled":
            self.distilled = cls_token(width, rngs)
        if config.positions == "learned":
            init = nnx.initializers.normal(0.02)
            places = rows * columns + first * config.placed
            self.positions = nnx.Param(init(rngs.params(), (places, width)))
        self.dropout = nnx.Dropout(config.dropout)
        site = Site(
            width=width, heads=config.heads, seq=rows * columns + first, dtype=build.dtype,
            backend=build.backend, grid=None if first else self.grid, qkv_bias=config.qkv_bias,
        )  # fmt: skip
        expression = build.expression(self.native)
        self.stack = Stack(expression, config, site, needs=self.needs, rngs=rngs)
        pool = "cls" if first else "mean"
        self.classifier = Classifier(width, source.classes, pool=pool, rngs=rngs)
        if config.pool == "distilled":
            self.student = Classifier(width, source.classes, pool=pool, rngs=rngs)
        if config.pool == "dense":
            self.dense = nnx.Linear(width, source.classes, rngs=rngs)

    def rules(self):
        """Patches are squares of the image, or of the stem's channels."""
        return (Rule("embed", "patch_embed.proj", channels=self.config.stem or 3), *self.names)

    def __call__(
        self, images: Float[Array, "B H W C"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B classes"]:
        """Logits, float32. Without `rngs` nothing is dropped.

        Raises:
            ValueError: images of another size than the model was built for.
        """
        heads = self.heads(images, rngs=rngs)
        return sum(heads[1:], heads[0]) / len(heads)

    def heads(
        self, images: Float[Array, "B H W C"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "B classes"], ...]:
        """The logits of each classifier: the class token's, then the distillation token's."""
        if self.config.pool == "dense":
            whole, patches = self.token_logits(images, rngs=rngs)
            return (whole + 0.5 * jnp.max(patches, axis=1),)
        x = self._encode(images, rngs)
        with jax.named_scope("head"):
            if self.config.pool != "distilled":
                return (self.classifier(x, None),)
            return self.classifier(x, None), self.student(x[:, 1:], None)

    def token_logits(
        self, images: Float[Array, "B H W C"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "B classes"], Float[Array, "B N classes"]]:
        """With pool="dense": the class token's logits, and those of each patch, row by row."""
        x = self._encode(images, rngs)
        with jax.named_scope("head"):
            patches = x[:, self.config.first :].astype(jnp.float32)
            return self.classifier(x, None), self.dense(patches)

    def features(
        self, images: Float[Array, "B H W C"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "B h w E"]]:
        """The map of the patches after the last block, at stride `patch`."""
        x = self._encode(images, rngs)[:, self.config.first :]
        return (x.reshape(len(x), *self.grid, x.shape[-1]),)

    def _encode(self, images, rngs):
        refuse_size(images, self.shape)
        p = self.config.patch
        with jax.named_scope("stem"):
            if self.config.stem:
                p, images = p // 2, self.stem(images, rngs=rngs)
            patches = rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)
            x = self._place(self.embed(patches))
            x = self.dropout(x, deterministic=rngs is None, rngs=rngs)
        with jax.named_scope("stage0"):
            return self.mix(x, rngs=rngs)

    def mix(self, x: Float[Array, "B T E"], *, rngs: nnx.Rngs | None) -> Float[Array, "B S E"]:
        """The tokens after the last block; the first of them stay the first."""
        return self.stack(x, mask=Mask(), rngs=rngs)

    def _place(self, x):
        """x with its positions, and the first tokens before it."""
        positions = self._positions().astype(x.dtype)[None]
        if not self.config.placed:
            x = x + positions
        if self.config.pool == "distilled":
            x = prepend(self.distilled, x)
        if self.config.first:
            x = prepend(self.cls, x)
        return x + positions if self.config.placed else x

    def _positions(self):
        if self.config.positions == "learned":
            return self.positions[...]
        rows, columns = (side // self.config.patch for side in self.shape[:2])
        return jnp.asarray(sinusoids_2d(rows, columns, self.config.width))


def conv_stem(channels: int, width: int, *, dtype: Any, rngs: nnx.Rngs) -> Chain:
    """[B,H,W,`channels`] -> [B,H/2,W/2,`width`]: convolutions of 7, 3 and 3 pixels with batch norm
    and relu, the first at every second pixel (LV-ViT, arXiv 2104.10858, as released).
    """
    given = {"activation": "relu", "dtype": dtype, "rngs": rngs}
    return Chain(
        ConvNorm(channels, width, 7, stride=2, **given),
        *(ConvNorm(width, width, 3, **given) for _ in range(2)),
    )
