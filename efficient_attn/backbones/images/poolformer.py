"""PoolFormer (arXiv 2111.11418, table 1): transformers that average instead of attending."""

from dataclasses import dataclass

from flax import nnx

from efficient_attn.backbones.base import Rule
from efficient_attn.backbones.images.pyramid import mean
from efficient_attn.backbones.images.staged import (
    BLOCK,
    STAGE,
    THEIRS,
    Stage,
    Staged,
)
from efficient_attn.backbones.images.variants import Variant
from efficient_attn.blocks import GridShape
from efficient_attn.blocks.patches import Patches
from efficient_attn.layers.norm import make_norm

HEAD = 32
"""Channels of a head of whatever takes the place of pooling."""


class PoolFormer(Staged):
    """Norms over all places and channels together, factors for the channels of each branch."""

    names = (
        Rule(r"stem\.conv", "stem.conv"),
        Rule(rf"{STAGE}\.conv", r"stages.\1.downsample.conv"),
        Rule(rf"{BLOCK}\.mixer_norm", rf"{THEIRS}.norm1"),
        Rule(rf"{BLOCK}\.mlp_norm", rf"{THEIRS}.norm2"),
        Rule(rf"{BLOCK}\.mlp\.expand", rf"{THEIRS}.mlp.fc1", channels=-1),
        Rule(rf"{BLOCK}\.mlp\.contract", rf"{THEIRS}.mlp.fc2", channels=-1),
        Rule(rf"{BLOCK}\.scales\.mixer", rf"{THEIRS}.layer_scale1.scale"),
        Rule(rf"{BLOCK}\.scales\.mlp", rf"{THEIRS}.layer_scale2.scale"),
        Rule("norm", "head.norm"),
        Rule("classifier", "head.fc"),
    )

    @dataclass(frozen=True)
    class Config(Staged.Config):
        """layer_scale: what the factors of each branch's channels begin with."""

        layer_scale: float = 1e-5

    def __init__(self, config: Config, source, build, *, rngs: nnx.Rngs):
        super().__init__(config, source, build, rngs=rngs)
        last = config.stages[-1].width
        self.norm = make_norm("layernorm", last, epsilon=1e-6, dtype=build.dtype, rngs=rngs)

    def enter(self, channels, width, *, dtype, rngs):
        """Windows of 7 at every fourth pixel."""
        how = {"stride": 4, "around": 2, "norm": "none"}
        return Patches(channels, width, 7, **how, dtype=dtype, rngs=rngs)

    def halve(self, width, out, *, dtype, rngs):
        """Windows of 3 at every second place."""
        how = {"stride": 2, "around": 1, "norm": "none"}
        return Patches(width, out, 3, **how, dtype=dtype, rngs=rngs)

    def blocks(self, stage: Stage) -> GridShape:
        """Pre-norm blocks."""
        return GridShape(
            depth=stage.depth, width=stage.width, heads=stage.heads, mlp_ratio=stage.mlp_ratio,
            mlp="gelu_exact", norm_type="groupnorm", norm_epsilon=1e-5, final_norm=False,
            layer_scale=self.config.layer_scale, dropout=self.config.dropout,
            drop_path=self.config.drop_path,
        )  # fmt: skip

    def head(self, x, *, rngs):
        """The mean, then the norm."""
        return self.classifier(self.norm(mean(x)))


def _variant(widths: tuple[int, ...], blocks: int) -> Variant:
    """`blocks` in all, half of them in the third of four stages."""
    depths = (blocks // 6, blocks // 6, blocks // 2, blocks // 6)
    stages = (
        Stage(depth, width, width // HEAD, "pool")
        for depth, width in zip(depths, widths, strict=True)
    )
    scale = 1e-5 if blocks <= 24 else 1e-6
    return Variant(PoolFormer, PoolFormer.Config(tuple(stages), layer_scale=scale))


SMALL, MEDIUM = (64, 128, 320, 512), (96, 192, 384, 768)
VARIANTS = {f"poolformer_s{blocks}": _variant(SMALL, blocks) for blocks in (12, 24, 36)}
VARIANTS |= {f"poolformer_m{blocks}": _variant(MEDIUM, blocks) for blocks in (36, 48)}
