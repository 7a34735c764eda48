"""The sequential passes of the gated delta rule on Hopper, in the pipeline of `pipeline`.

For a head and 64 of its values' columns, with inverse = (I + A)^-1 of `kernels.pallas_gpu.inverse`,
and S in bfloat16 where products read it:

    forward    change = inverse beta (v - read k S)           out_i = sum_j p_ij change_j + read q S
               S     <- keep S + k^T (enter change)
    backward   dchange_j = sum_i p_ji dout_i + read k S       dread = -beta inverse^T dchange
               S     <- keep S + q^T (enter dout) + k^T (enter dread)

p is what `pipeline.weights` makes of <q_i, k_j>. change is what every token really writes, dread
the gradient of what is held under its key by then, S backward that of the state, from the last
chunk to the first. A forward pass that only wants change gives it for out. Products with the
inverse are made to 16 bits.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.pallas_gpu import plan as plans
from kernels.pallas_gpu.pipeline import Work, vector_of
from kernels.pallas_gpu.plan import CHUNK, WIDTH
from kernels.pallas_gpu.stream import made_of, places, send
from kernels.pallas_gpu.wgmma import LAYOUT, ROWS, by_row, in_two, matmul, matmul_in_two

MATRIX = CHUNK, WIDTH


@dataclasses.dataclass(frozen=True)
class Plan(plans.Plan):
    """The sizes of one call. x, y, z are q, k, v; backward k, q, dout."""

    @property
    def loads(self) -> dict[str, tuple[int, tuple[int, ...], Any]]:
        """What a stage holds, by name: how many, of which shape and dtype."""
        loads = super().loads | {"inverse": (self.tiles, (2, CHUNK, CHUNK), jnp.bfloat16)}
        if not self.role.within:  # nothing is read with q
            del loads["x"]
        return loads

    @property
    def own(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shared memory that is a warpgroup's own: shape and dtype by name."""
        return super().own | {"high": (MATRIX, jnp.bfloat16)}


def _solve(plan: Plan, r, at):
    """Puts change in the place of v."""
    vector = functools.partial(vector_of, plan, r, at, layout=ROWS)
    k, S = r.y_s.at[at.slot, at.tile], r.S_s.at[at.warpgroup]
    held = matmul(MATRIX, (k, S)) * by_row(vector("read"), WIDTH)
    z = r.z_s.at[at.slot, at.warpgroup]
    v = plgpu.load(z, layout=LAYOUT).astype(jnp.float32)
    parts = r.high_s.at[at.warpgroup], z
    in_two(parts, (v - held) * by_row(vector("beta"), WIDTH))
    inverse = r.inverse_s.at[at.slot, at.tile]
    change = matmul_in_two((inverse.at[0], inverse.at[1]), parts)
    plgpu.commit_smem()  # all four warps have read the parts
    z[...] = change.astype(jnp.bfloat16)
    plgpu.commit_smem()


def _forward(plan: Plan, r, at, interpret):
    z = r.z_s.at[at.slot, at.warpgroup]
    if plan.role.within:
        send(plan, r, at, made_of(plan, r, at, z, interpret))
    else:
        send(plan, r, at, {"out": plgpu.load(z, layout=LAYOUT)})


def _backward(plan: Plan, r, at, interpret):
    """Leaves what dread is to the state in `high_s`."""
    dchange = made_of(plan, r, at, r.z_s.at[at.slot, at.warpgroup], interpret)["out"]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    high, out = r.high_s.at[at.warpgroup], r.out_s.at[at.warpgroup]
    in_two((high, out), dchange)
    inverse = r.inverse_s.at[at.slot, at.tile]
    back = tuple(inverse.at[part].transpose((1, 0)) for part in range(2))
    dread = matmul_in_two(back, (high, out)) * by_row(-vector_of(plan, r, at, "beta", ROWS), WIDTH)
    plgpu.commit_smem()  # all four warps have read the parts
    high[...] = (dread * by_row(vector_of(plan, r, at, "enter", ROWS), WIDTH)).astype(jnp.bfloat16)
    send(plan, r, at, {"out": dread})


def _operands(plan: Plan, r, at):
    return r.y_s.at[at.slot, at.tile], r.z_s.at[at.slot, at.warpgroup], None


def _more(plan: Plan, r, at):
    return r.x_s.at[at.slot, at.tile], r.high_s.at[at.warpgroup]


FORWARD = Work(places, _forward, _operands, _solve)
BACKWARD = Work(places, _backward, _operands, more=_more)
