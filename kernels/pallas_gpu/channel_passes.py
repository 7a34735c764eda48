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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.fused import split
from kernels.pallas_gpu import plan as plans
from kernels.pallas_gpu.pipeline import Work, run
from kernels.pallas_gpu.plan import CHUNK, WIDTH, Role, plan_of
from kernels.pallas_gpu.stream import places, send
from kernels.pallas_gpu.wgmma import COLUMNS, ROWS, by_column, by_row, matmul


@dataclasses.dataclass(frozen=True)
class Plan(plans.Plan):
    """The sizes of one call. rows: those of S fade by themselves, else its columns."""

    rows: bool

    @property
    def sums(self) -> bool:
        """Whether there is an n."""
        return False

    @property
    def loads(self) -> dict[str, tuple[int, tuple[int, ...], Any]]:
        """What a stage holds, by name: how many, of which shape and dtype."""
        loads = super().loads | {"keep": (self.tiles, (self.depth,), jnp.float32)}
        if self.role.within:
            loads["pairs"] = (self.tiles, (CHUNK, CHUNK), jnp.bfloat16)
        return loads


class Pieces(NamedTuple):
    """How many pieces of the sequence run beside each other, and the S [B P, H, D, E] of each."""

    count: int
    first: jax.Array | None

    @property
    def turned(self) -> "Pieces":
        """For values that ask for channels."""
        first = self.first
        return self._replace(first=None if first is None else jnp.swapaxes(first, -1, -2))


def pieces(y, z, *, keep, state, reverse: bool = False, interpret: Any) -> Pieces:
    """As many as let heads fill a chip; what each begins with follows from what others' keys add.

    y: bfloat16 [B, T, G, D]; z [B, T, H, E]; keep: float32 [B, G, N, D]; state: S [B, H, D, E] at
    the beginning, or None. See `kernels.fused.split`.
    """
    heads = z.shape[2]
    count = split.pieces(z.shape[0], heads, z.shape[3], z.shape[1], CHUNK)
    if count == 1:
        return Pieces(1, state)
    role, arrays = Role(out=False, within=False, reverse=reverse), {"y": y, "z": z, "keep": keep}
    own = _run(role, arrays, Pieces(count, None), interpret=interpret, rows=True)["S"]
    keep = _cut(count, "keep", jnp.repeat(keep, heads // keep.shape[1], axis=1))
    first = None if state is None else (state,)
    return Pieces(count, *split.passed_on(count, keep, (own,), first, reverse))


def values(x, y, z, *, pairs, keep, begin: Pieces, reverse: bool = False, interpret: Any):
    """out [B, T, H, E] and the last S [B, H, D, E]; see the module's formulas.

    x, y: bfloat16 [B, T, G, D]; z [B, T, H, E]; pairs: bfloat16 [B, G, N, C, C]; keep: float32
    [B, G, N, D]. D and E are both 64 or both 128, and G divides H. begin: `pieces` of y and z.
    """
    arrays = {"x": x, "y": y, "z": z, "pairs": pairs, "keep": keep}
    made = _run(Role(reverse=reverse), arrays, begin, interpret=interpret, rows=True)
    last = rearrange(made["S"], "(b p) ... -> b p ...", p=begin.count)[:, 0 if reverse else -1]
    return split.whole(begin.count, made["out"]), last


def channels(x, y, z, *, keep, begin: Pieces, reverse: bool = False, interpret: Any):
    """out, float32 [B, T, H, E]; see the module's formulas.

    x, y: bfloat16 [B, T, H, D]; z [B, T, G, E]; keep: float32 [B, G, N, E]. begin: `pieces` of z
    and y, turned.
    """
    role = Role(within=False, reverse=reverse, precise=True, raw=True)
    arrays = {"x": x, "y": y, "z": z, "keep": keep}
    made = _run(role, arrays, begin, interpret=interpret, rows=False)
    return split.whole(begin.count, made["out"])


def _run(role: Role, arrays: dict[str, jax.Array], begin: Pieces, *, interpret, rows: bool):
    """The kernel's results by name, of pieces."""
    heads = max(arrays[name].shape[2] for name in ("y", "z"))
    arrays = {name: _cut(begin.count, name, a) for name, a in arrays.items()}
    plan = plan_of(
        role, arrays["z"].shape[3], arrays.get("x"), arrays["y"], heads, (), kind=Plan,
        segments=False, state=begin.first is not None, rows=rows,
    )  # fmt: skip
    work = Work(places, _read, _operands, fade=_fade)
    state = None if begin.first is None else (begin.first, None)
    return run(work, plan, arrays, {}, None, state, interpret)


def _cut(count: int, name: str, a):
    """[B, T, ...], or of chunks [B, H, N, ...], as pieces [B P, ...]."""
    if name in ("pairs", "keep"):
        return rearrange(a, "b h (p n) ... -> (b p) h n ...", p=count)
    return split.tokens(count, a)


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
    if plan.rows:
        return S * by_row(plgpu.load(keep, layout=ROWS), WIDTH)
    column = at.warpgroup * WIDTH if plan.tiles == 1 else 0
    keep = plgpu.load(keep.at[pl.ds(column, WIDTH)], layout=COLUMNS)
    return S * by_column(keep, plan.depth)
