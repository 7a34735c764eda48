"""Sizes of a call of the kernel of `favor`, and what it holds where."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.pallas_gpu import plan as plans
from kernels.pallas_gpu.plan import CHUNK, WIDTH, WORKERS
from kernels.pallas_gpu.wgmma import shared

RANK = WORKERS * WIDTH
"""Features of one kernel: with twice as many the state leaves too few registers for the rest."""


@dataclasses.dataclass(frozen=True)
class Plan(plans.Plan):
    """The sizes of one call.

    depth: channels of x and y; width: of z, own and the result. features: that are not 0, of RANK.
    """

    half: float
    features: int

    @property
    def gradient(self) -> bool:
        """Whether the result is a gradient of what features are made of."""
        return self.role.own

    @property
    def channels(self) -> int:
        """D, of what features are made of: 64 or 128. Values have 64."""
        return self.width if self.gradient else self.depth

    @property
    def tiles(self) -> int:
        """Heads of a CTA."""
        return 1

    @property
    def summed(self) -> str:
        """What n sums: of each warpgroup, its own features."""
        return "features"

    @property
    def shape(self) -> tuple[int, int]:
        """A warpgroup's part of S: features by values, turned for a gradient."""
        return WIDTH, WIDTH

    @property
    def entered(self) -> str:
        """S in bfloat16 has been read by then."""
        return "S"

    @property
    def loads(self) -> dict[str, tuple[int, tuple[int, ...], Any]]:
        """What a stage holds, by name: one of each, its shape and dtype."""
        loads = {name: (1, *what) for name, (_, *what) in super().loads.items()}
        of_z = 1, (CHUNK, self.width), jnp.bfloat16
        return {name: of_z if name in ("z", "own") else what for name, what in loads.items()}

    def outputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the results by name."""
        make, f32, row = jax.ShapeDtypeStruct, jnp.float32, (self.batch, self.heads, self.length)
        made = super().outputs()
        if self.role.own:
            made["own"] = make(row, f32)
        made.pop("S", None)
        if self.role.update and not self.gradient:
            made["S"] = make((self.batch, self.heads, RANK, WIDTH), f32)
        if "n" in made:
            made["n"] = make((self.batch, self.heads, RANK), f32)
        return made

    @property
    def own(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shared memory that is a warpgroup's own: shape and dtype by name."""
        role, bfloat16, f32 = self.role, jnp.bfloat16, jnp.float32
        own: dict[str, tuple[tuple[int, ...], Any]] = {
            "weight": ((2, WIDTH, self.channels), bfloat16)
        }
        if role.out or "enter" in self.names:
            own["S"] = (self.shape, bfloat16)
        if role.within or role.update:
            own["phi"] = ((CHUNK, WIDTH), bfloat16)
        if self.sums and role.out:
            own["n"] = ((WIDTH,), f32)
        return own

    @property
    def passed(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shared memory for what the second warpgroup passes on, and for what leaves."""
        matrix, vector, f32 = (CHUNK, WIDTH), (CHUNK,), jnp.float32
        if not self.role.out:
            return {}
        passed: dict[str, tuple[tuple[int, ...], Any]] = {"part": (matrix, f32)}
        if not self.role.raw:  # float32 leaves from where the part was
            passed["out"] = (matrix, jnp.bfloat16)
        return passed | {"sums": (vector, f32), "total": (vector, f32)}

    @property
    def bytes(self) -> int:
        """Shared memory of a CTA."""
        return super().bytes + sum(plans.size(*what) for what in self.passed.values())

    def scratch(self, interpret) -> dict[str, Any]:
        """Shared memory and barriers by name."""
        made = super().scratch(None)
        for name, (shape, dtype) in self.passed.items():
            made[f"{name}_s"] = (shared if len(shape) == 2 else plgpu.SMEM)(shape, dtype)
        if self.role.out:
            made["given"], made["taken"] = plgpu.Barrier(), plgpu.Barrier()
        if interpret:
            made["spare_s"] = shared((WORKERS, 2, CHUNK, CHUNK), jnp.bfloat16)
        made["ready"] = plgpu.Barrier(num_arrivals=WORKERS)
        return made
