"""PVT v2 (arXiv 2106.13797, table 1): attention to a reduced map, convolutions in between."""

from dataclasses import dataclass, replace
from typing import Literal

from efficient_attn.backbones.base import Rule, block_names
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

ATTENTION = rf"{BLOCK}\.mixer\.attention"


class PvtV2(Staged):
    """Overlapping patches, and a norm after each stage.

    Feed-forward layers hold a convolution, which tells positions: there are no others.
    """

    names = (
        Rule(r"stem\.conv", "patch_embed.proj"),
        Rule(r"stem\.norm", "patch_embed.norm"),
        Rule(rf"{STAGE}\.conv", r"stages.\1.downsample.proj"),
        Rule(rf"{STAGE}\.norm", r"stages.\1.downsample.norm"),
        Rule(rf"{STAGE}\.stack\.norm", r"stages.\1.norm"),
        Rule(rf"{ATTENTION}\.query", rf"{THEIRS}.attn.q"),
        Rule(rf"{ATTENTION}\.key", rf"{THEIRS}.attn.kv", part=(0, 2)),
        Rule(rf"{ATTENTION}\.value", rf"{THEIRS}.attn.kv", part=(1, 2)),
        Rule(rf"{ATTENTION}\.out", rf"{THEIRS}.attn.proj"),
        Rule(rf"{BLOCK}\.mixer\.reduce", rf"{THEIRS}.attn.sr"),
        Rule(rf"{BLOCK}\.mixer\.norm", rf"{THEIRS}.attn.norm"),
        Rule(rf"{BLOCK}\.mlp\.conv", rf"{THEIRS}.mlp.dwconv"),
        *block_names(BLOCK, THEIRS),
        Rule("classifier", "head"),
    )

    @dataclass(frozen=True)
    class Config(Staged.Config):
        """mlp_conv: see `Shape`; "relu_depthwise" goes with linear SRA, as released."""

        mlp_conv: Literal["depthwise", "relu_depthwise"] = "depthwise"

    def enter(self, channels, width, *, dtype, rngs):
        """Windows of 7 at every fourth pixel."""
        return Patches(channels, width, 7, stride=4, around=3, dtype=dtype, rngs=rngs)

    def halve(self, width, out, *, dtype, rngs):
        """Windows of 3 at every second place."""
        return Patches(width, out, 3, stride=2, around=1, dtype=dtype, rngs=rngs)

    def blocks(self, stage: Stage) -> GridShape:
        """Pre-norm blocks."""
        return GridShape(
            depth=stage.depth, width=stage.width, heads=stage.heads, mlp_ratio=stage.mlp_ratio,
            mlp="gelu_exact", mlp_conv=self.config.mlp_conv,
            dropout=self.config.dropout, drop_path=self.config.drop_path,
        )  # fmt: skip


REDUCED = [f"spatial_reduction(ratio={ratio})" for ratio in (8, 4, 2, 1)]
"""Keys and values of all stages come from maps as small as the last one."""
LINEAR = ["spatial_reduction(reduction='pool')"] * 4
WIDTHS = (64, 128, 320, 512)


def _config(widths, depths, *, mlp_ratios=(8.0, 8.0, 4.0, 4.0), mixers=REDUCED) -> PvtV2.Config:
    return PvtV2.Config(tuple(map(Stage, depths, widths, (1, 2, 5, 8), mixers, mlp_ratios)))


CONFIGS = {
    "b0": _config((32, 64, 160, 256), (2, 2, 2, 2)),
    "b1": _config(WIDTHS, (2, 2, 2, 2)),
    "b2": _config(WIDTHS, (3, 4, 6, 3)),
    "b2_li": replace(_config(WIDTHS, (3, 4, 6, 3), mixers=LINEAR), mlp_conv="relu_depthwise"),
    "b3": _config(WIDTHS, (3, 4, 18, 3)),
    "b4": _config(WIDTHS, (3, 8, 27, 3)),
    "b5": _config(WIDTHS, (3, 6, 40, 3), mlp_ratios=(4.0, 4.0, 4.0, 4.0)),
}
VARIANTS = {f"pvt_v2_{name}": Variant(PvtV2, config) for name, config in CONFIGS.items()}
