"""The passes from chunk to chunk where every channel fades by itself, on Hopper.

In the pipeline of `kernels.pallas_gpu.pipeline`, for a head and 64 of z's columns, with p, reading
and leaving of `channel_pairs`, and `keep` what is left, by channel, over a chunk:

    values      out_i = sum_j p_ij z_j + x_i S      S <- diag(keep) S + sum_j y_j z_j^T
                x, y, z are reading, leaving, v; from the last chunk to the first, with p turned,
                leaving, reading, dout
    channels    out_i = x_i S, in float32           S <- S diag(keep) + sum_j y_j z_j^T
                dout, v, leaving; from the last chunk to the first v, dout, reading

Channels are subtracted from each other later, times what others are read with: S is read in two
bfloat16 parts there.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.pallas_gpu import plan as plans
from kernels.pallas_gpu.pipeline import Work, run
from kernels.pallas_gpu.plan import CHUNK, WIDTH, Role, plan_of
from kernels.pallas_gpu.stream import places, send
from kernels.pallas_gpu.wgmma import COLUMNS, ROWS, by_column, by_row, matmul


@dataclasses.dataclass(frozen=True)
class Plan(plans.Plan):
    """The sizes of one call."""

    @property
    def loads(self) -> dict[str, tuple[int, tuple[int, ...], Any]]:
        """What a stage holds, by name: how many, of which shape and dtype."""
        loads = super().loads | {"keep": (self.tiles, (self.depth,), jnp.float32)}
        if self.role.within:
            loads["pairs"] = (self.tiles, (CHUNK, CHUNK), jnp.bfloat16)
        return loads

    @property
    def out_dtype(self):
        """Of what rows get."""
        return jnp.float32 if self.role.raw else jnp.bfloat16

    def outputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the results by name."""
        made = super().outputs()
        return made | {"out": jax.ShapeDtypeStruct(made["out"].shape, self.out_dtype)}

    @property
    def own(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shared memory that is a warpgroup's own: shape and dtype by name."""
        return super().own | {"out": ((CHUNK, WIDTH), self.out_dtype)}


def values(x, y, z, *, pairs, keep, state, reverse: bool = False, interpret: Any):
    """out [B, T, H, E] and the last S [B, H, D, E]; see the module's formulas.

    x, y: bfloat16 [B, T, G, D]; z [B, T, H, E]; pairs: bfloat16 [B, G, N, C, C]; keep: float32
    [B, G, N, D]. D and E are both 64 or both 128, and G divides H. state: the first S, or None.
    """
    role = Role(reverse=reverse)
    return _run(role, {"x": x, "y": y, "z": z, "pairs": pairs, "keep": keep}, state, interpret)


def channels(x, y, z, *, keep, state, reverse: bool = False, interpret: Any):
    """out, float32 [B, T, H, E], and the last S [B, H, D, E]; see the module's formulas.

    x, y: bfloat16 [B, T, H, D]; z [B, T, G, E]; keep: float32 [B, G, N, E].
    """
    role = Role(within=False, reverse=reverse, precise=True, raw=True)
    return _run(role, {"x": x, "y": y, "z": z, "keep": keep}, state, interpret)


def _run(role: Role, arrays: dict[str, jax.Array], state, interpret):
    heads, width = max(a.shape[2] for a in (arrays["y"], arrays["z"])), arrays["z"].shape[3]
    plan = plan_of(
        role, width, arrays["x"], arrays["y"], heads, (), kind=Plan, segments=False,
        state=state is not None,
    )  # fmt: skip
    state = None if state is None else (state, None)
    made = run(Work(places, _read, _operands, fade=_fade), plan, arrays, {}, None, state, interpret)
    return made["out"], made["S"]


def _read(plan: Plan, r, at, interpret):
    x = r.x_s.at[at.slot, at.tile]
    operands = [(x, r.S_s.at[at.warpgroup])]
    if plan.role.precise:
        operands.append((x, r.low_s.at[at.warpgroup]))
    if plan.role.within:
        pairs = r.pairs_s.at[at.slot, at.tile]
        pairs = pairs.transpose((1, 0)) if plan.role.reverse else pairs
        operands.append((pairs, r.z_s.at[at.slot, at.warpgroup]))
    send(plan, r, at, {"out": matmul((CHUNK, WIDTH), *operands)})


def _operands(plan: Plan, r, at):
    return r.y_s.at[at.slot, at.tile], r.z_s.at[at.slot, at.warpgroup], None


def _fade(plan: Plan, r, at, S):
    keep = r.keep_s.at[at.slot, at.tile]
    if plan.role.within:
        return S * by_row(plgpu.load(keep, layout=ROWS), WIDTH)
    column = at.warpgroup * WIDTH if plan.tiles == 1 else 0
    keep = plgpu.load(keep.at[pl.ds(column, WIDTH)], layout=COLUMNS)
    return S * by_column(keep, plan.depth)
