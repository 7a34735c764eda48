"""What the recurrences' kernels on TPU carry from chunk to chunk in VMEM: its blocks, where it
comes from at the first chunk, and where it goes at the last.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.pallas_tpu.linear_plan import Array, Plan, f32


def by_block(x) -> Array:
    """An array [B, blocks, ...] of which a step has its block of heads."""
    none = (0,) * (x.ndim - 2)
    return Array(x, (None, None, *x.shape[2:]), lambda b, h, c: (b, h, *none))


def begin(at, name: str = "memory", given: str = "state") -> None:
    """At the first chunk: what is given, or nothing."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        ref = getattr(at, name)
        ref[...] = getattr(at, given)[...] if hasattr(at, given) else jnp.zeros(ref.shape, f32)


def finish(at, plan: Plan) -> None:
    """At the last chunk: what is left."""

    @pl.when(pl.program_id(2) == plan.grid[2] - 1)
    def _():
        at.left[...] = at.memory[...]
