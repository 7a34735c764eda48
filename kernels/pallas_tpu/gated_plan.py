"""Sizes, blocks and states of the kernels on TPU whose states are the blocks on a diagonal."""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels.fused.ways import Ways
from kernels.pallas_tpu.carried import by_block
from kernels.pallas_tpu.linear_plan import Array, Plan, f32, make_plan

LARGEST = 256
"""The most channels of a head, or of heads that share lanes."""
CHUNK = 128
"""Tokens of a chunk; a sequence of up to half as many has chunks of that half."""
BESIDE = 2
"""Heads of a block that share no lanes: steps of one fill waits of the other."""


def chunk_length(length: int) -> int:
    """Tokens of a chunk."""
    return CHUNK if length > CHUNK // 2 else CHUNK // 2


def plan_of(arrays, chunk: int, ways: Ways | None = None) -> Plan:
    """The plan of a call on [B,T,G,D] arrays; heads that share no lanes go `BESIDE` each other."""
    plan = make_plan(arrays, None, chunk, ways)
    return plan if plan.shared > 1 else plan._replace(packed=math.gcd(plan.heads, BESIDE))


def units(plan: Plan) -> int:
    """Of a block: heads, or groups of heads that share lanes."""
    return plan.packed // plan.shared


def heads_of(plan: Plan, unit: int):
    """The heads of a unit."""
    return range(plan.packed) if plan.shared > 1 else (unit,)


def blocks_of(plan: Plan) -> tuple[int, int]:
    """Blocks of heads, and units of each."""
    return plan.grid[1], units(plan)


def state_in(plan: Plan, state) -> dict[str, Array]:
    """[B, H, R, Dv] states as [B, blocks, units, Dv, R] of whole lanes."""
    if state is None:
        return {}
    n = plan.shared
    state = state.reshape(plan.batch, *blocks_of(plan), n, plan.depth, plan.dim)
    own = jnp.eye(n, dtype=bool)[:, None, :, None]
    placed = jnp.where(own, jnp.swapaxes(state, 4, 5)[..., None, :], 0.0)
    return {"state": by_block(placed.reshape(*state.shape[:3], *_shape(plan)))}


def state_out(plan: Plan) -> dict[str, Array]:
    """The states that the last chunk leaves."""
    shape = (plan.batch, *blocks_of(plan), *_shape(plan))
    return {"left": by_block(jax.ShapeDtypeStruct(shape, f32))}


def scratch(plan: Plan):
    """The states between chunks."""
    return {"memory": pltpu.VMEM((units(plan), *_shape(plan)), f32)}


def _shape(plan: Plan) -> tuple[int, int]:
    return plan.shared * plan.dim, plan.shared * plan.depth


def state_of(plan: Plan, left):
    """[B, H, R, Dv] out of what `state_out` has."""
    n = plan.shared
    left = left.reshape(*left.shape[:3], n, plan.dim, n, plan.depth)
    own = jnp.moveaxis(jnp.diagonal(left, axis1=3, axis2=5), -1, 3)  # [..., head, Dv, R]
    return jnp.swapaxes(own.reshape(plan.batch, plan.heads, plan.dim, plan.depth), 2, 3)
