"""Sizes of a call of the kernel of `favor`, and what it holds where."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.pallas_gpu import plan as plans
from kernels.pallas_gpu.plan import CHUNK, WIDTH, WORKERS
from kernels.pallas_gpu.wgmma import (
    shared,
)

RANK = 128
"""Features of one kernel."""
APART = WIDTH + 8  # float32 from row to row where no tiling keeps rows off each other's banks


@dataclasses.dataclass(frozen=True)
class Plan(plans.Plan):
    """The sizes of one call."""

    rank: int
    half: float

    @property
    def part(self) -> int:
        """Features of a warpgroup."""
        return self.rank // WORKERS

    @property
    def pieces(self) -> list:
        """Slices of these that are made at a time: registers are few."""
        return [pl.ds(first, WIDTH) for first in range(0, self.part, WIDTH)]

    @property
    def tiles(self) -> int:
        """Heads of a CTA."""
        return 1

    @property
    def gradient(self) -> bool:
        """Whether the result is a gradient of what features are made of."""
        return self.role.own

    @property
    def featured(self) -> str:
        """Which operand's features enter the state."""
        return "z" if self.gradient else "y"

    @property
    def shape(self) -> tuple[int, int]:
        """A warpgroup's part of S."""
        return (WIDTH, self.part) if self.gradient else (self.part, WIDTH)

    @property
    def loads(self) -> dict[str, tuple[int, tuple[int, ...], Any]]:
        """What a stage holds, by name: one of each, its shape and dtype."""
        loads = {name: (1, *what) for name, (_, *what) in super().loads.items()}
        return loads

    def outputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the results by name."""
        make, f32 = jax.ShapeDtypeStruct, jnp.float32
        made = super().outputs()
        if "own" in made:
            made["own"] = make(made["own"].shape[1:], f32)
        if self.role.raw and self.role.out:
            made["out"] = make(made["out"].shape, self.out_dtype)
        made.pop("S", None)
        if self.role.update and not self.gradient:
            made["S"] = make((self.batch, self.heads, self.rank, WIDTH), f32)
        if "n" in made:
            made["n"] = make((self.batch, self.heads, self.rank), f32)
        return made

    @property
    def own(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shared memory that is a warpgroup's own: shape and dtype by name."""
        role, bfloat16, f32 = self.role, jnp.bfloat16, jnp.float32
        own: dict[str, tuple[tuple[int, ...], Any]] = {"weight": ((self.part, WIDTH), bfloat16)}
        if role.out:
            own["S"] = (self.shape, bfloat16)
        if role.within or role.update:
            own["phi"] = ((CHUNK, self.part), bfloat16)
        if "enter" in self.names and role.update:
            own["enter"] = ((CHUNK, WIDTH), bfloat16)
        if self.sums and role.out:
            own["n"] = ((self.part,), f32)
        return own

    @property
    def out_dtype(self):
        """Of what rows get."""
        return jnp.float32 if self.role.raw else jnp.bfloat16

    @property
    def bytes(self) -> int:
        """Shared memory of a CTA, with what the two warpgroups pass on."""
        return super().bytes + CHUNK * (APART * 4 + WIDTH * 4 + 4 * 4)

    def scratch(self, interpret) -> dict[str, Any]:
        """Shared memory and barriers by name."""
        made = super().scratch(None)
        if self.role.out:
            made["part_s"] = plgpu.SMEM((CHUNK, APART), jnp.float32)
            made["sums_s"] = plgpu.SMEM((CHUNK,), jnp.float32)
            made["out_s"] = shared((CHUNK, WIDTH), self.out_dtype)
            made["total_s"] = plgpu.SMEM((CHUNK,), jnp.float32)
            made["given"], made["taken"] = plgpu.Barrier(), plgpu.Barrier()
        if interpret:
            many = len(self.pieces) + 1
            made["spare_s"] = shared((WORKERS, many, CHUNK, CHUNK), jnp.bfloat16)
        made["ready"] = plgpu.Barrier(num_arrivals=WORKERS)
        return made
