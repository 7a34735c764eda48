"""Pyramids of transformer stages, each behind a step to a coarser map: what families share."""

from dataclasses import dataclass
from typing import Any

from flax import nnx

from efficient_attn.attention import Site
from efficient_attn.backbones.base import Build, Input
from efficient_attn.backbones.images.pyramid import Pyramid
from efficient_attn.blocks import Chain, GridShape, GridStack
from efficient_attn.config import require

STAGE = r"stages\.(\d+)\.layers\.\d"
BLOCK, THEIRS = rf"{STAGE}\.stack\.blocks\.(\d+)", r"stages.\1.blocks.\2"
"""The paths of a stage and of its blocks, and timm's name of a block."""


@dataclass(frozen=True)
class Stage:
    """`depth` blocks of `width` and `heads`.

    mixer: the expression of the native attention. mlp_ratio: see `Shape`.
    """

    depth: int
    width: int
    heads: int
    mixer: str
    mlp_ratio: float = 4.0


class Staged(Pyramid):
    """The stem, then stages: a step to half the sides and other channels, and a `GridStack`.

    A subclass says what the steps are (`enter`, `halve`: modules with `sides`, the map that they
    make of a map) and what the blocks (`blocks`).
    """

    @dataclass(frozen=True)
    class Config:
        """stages: the table. dropout, drop_path: see `Shape`, along all stages."""

        stages: tuple[Stage, ...]
        dropout: float = 0.0
        drop_path: float = 0.0

        def __post_init__(self):
            require(len(self.stages) > 0, "stages=() leaves nothing to build; give one or more")

    def __init__(self, config: Config, source: Input, build: Build, *, rngs: nnx.Rngs):
        super().__init__(config, source)
        width, before, stages = config.stages[0].width, 0, []
        total = sum(stage.depth for stage in config.stages)
        self.stem = self.enter(source.shape[-1], width, dtype=build.dtype, rngs=rngs)
        grid = self.stem.sides(source.shape[:2])
        for i, stage in enumerate(config.stages):
            layers = []
            if i:
                step = self.halve(width, stage.width, dtype=build.dtype, rngs=rngs)
                layers, grid = [step], step.sides(grid)
            require(
                min(grid) > 0, f"images of {source.shape[:2]} are too small; choose larger ones"
            )
            site = Site(
                width=stage.width, heads=stage.heads, seq=grid[0] * grid[1], grid=grid,
                dtype=build.dtype, backend=build.backend,
            )  # fmt: skip
            self.check(stage, site, build)
            expression, part = build.expression(stage.mixer), (before, total)
            stack = GridStack(expression, self.blocks(stage), site, rngs=rngs, part=part)
            stages.append(Chain(*layers, stack))
            width, before = stage.width, before + stage.depth
        self.stages = nnx.List(stages)
        self.classifier = nnx.Linear(width, source.classes, rngs=rngs)

    def enter(self, channels: int, width: int, *, dtype: Any, rngs: nnx.Rngs) -> Any:
        """The stem."""
        raise NotImplementedError

    def halve(self, width: int, out: int, *, dtype: Any, rngs: nnx.Rngs) -> Any:
        """The step between two stages."""
        raise NotImplementedError

    def blocks(self, stage: Stage) -> GridShape:
        """The blocks of a stage."""
        raise NotImplementedError

    def check(self, stage: Stage, site: Site, build: Build) -> None:
        """Raise UserError where the stage cannot have this map; by default nothing."""
