"""What the kernels of linear attention are run for, and the memory that they need for it."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.pallas_gpu.wgmma import shared

CHUNK = 64
"""Tokens of a chunk: the rows of a warpgroup's matrix product."""
MEMORY = 232_448
"""Bytes of shared memory that a CTA can have."""
WORKERS = 2
"""Computing warpgroups of a CTA."""
WIDTH = 64  # columns of z that one of them takes
FILL = 8  # rows of the tile that n is summed with: the least that wgmma takes


@dataclasses.dataclass(frozen=True)
class Role:
    """What the kernel makes.

    out: what rows read; else only the state. within: from their own chunk too, not just from S.
    update: S changes from chunk to chunk. reverse: from the last chunk to the first; rows see what
    comes after them. strict: rows do not see themselves. gain: "rows" or "columns" of p, along
    which `gain` and `shift` run. divide: out is divided by its normaliser. lift: n is added. own:
    sums of out times a further array. precise: these are of the numbers that another pass, which
    has `read` and `enter` exchanged, multiplies, and of S to 16 bits; what both find of a pair of
    tokens is the same then, and a sum over all tokens has the error of few. raw: out is float32,
    and the normaliser is given but not divided by (`favor`, and `channel_passes`, which has none).
    """

    out: bool = True
    within: bool = True
    update: bool = True
    reverse: bool = False
    strict: bool = False
    gain: str = "rows"
    divide: bool = False
    lift: bool = False
    own: bool = False
    precise: bool = False
    raw: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of one call."""

    role: Role
    batch: int
    length: int
    heads: int
    depth: int
    width: int
    names: tuple[str, ...]
    stages: int
    segments: bool
    state: bool

    @property
    def splits(self) -> int:
        """Computing warpgroups that share a head."""
        return self.width // WIDTH

    @property
    def chunks(self) -> int:
        """N."""
        return self.length // CHUNK

    @property
    def tiles(self) -> int:
        """Heads of a CTA: of one, each computing warpgroup takes half of z's columns."""
        return 1 if self.splits == WORKERS else WORKERS

    @property
    def sums(self) -> bool:
        """Whether there is an n."""
        return self.role.divide or self.role.lift or not self.role.out

    @property
    def summed(self) -> str:
        """What n sums."""
        return "y" if self.role.divide or not self.role.out else "z"

    @property
    def n_width(self) -> int:
        """Numbers of n."""
        return self.depth if self.summed == "y" else self.width

    @property
    def n_rows(self) -> int:
        """Numbers of a warpgroup's n."""
        return self.depth if self.summed == "y" else WIDTH

    @property
    def shape(self) -> tuple[int, int]:
        """A warpgroup's part of S."""
        return self.depth, WIDTH

    @property
    def gradient(self) -> bool:
        """Whether `enter` is a's, not b's; see `kernels.pallas_gpu.pipeline`."""
        return False

    @property
    def entered(self) -> str | None:
        """The name of the shared memory that holds it times `enter`; None: it stays where it is.

        There nothing else may read it, as n does, and all warps must have met since a row did.
        """
        return "enter" if self.sums else None

    @property
    def loads(self) -> dict[str, tuple[int, tuple[int, ...], Any]]:
        """What a stage holds, by name: how many, of which shape and dtype."""
        role, bfloat16 = self.role, jnp.bfloat16
        loads = {}
        if role.out:
            loads["x"] = (self.tiles, (CHUNK, self.depth), bfloat16)
        if role.within or role.update:
            loads["y"] = (self.tiles, (CHUNK, self.depth), bfloat16)
            loads["z"] = (WORKERS, (CHUNK, WIDTH), bfloat16)
        if role.own:
            loads["own"] = (WORKERS, (CHUNK, WIDTH), bfloat16)
        if self.names:
            loads["vectors"] = (self.tiles, (len(self.names), CHUNK), jnp.float32)
        if self.sums and role.update:
            loads["fill"] = (self.tiles, (FILL, CHUNK), bfloat16)
        if self.segments:
            loads["segments"] = (self.tiles, (CHUNK,), jnp.int32)
        return loads

    @property
    def out_dtype(self):
        """Of what rows get."""
        return jnp.float32 if self.role.raw else jnp.bfloat16

    def outputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the results by name."""
        make, f32 = jax.ShapeDtypeStruct, jnp.float32
        row = (self.batch, self.heads, self.length)
        made = {}
        if self.role.out:
            made["out"] = make((self.batch, self.length, self.heads, self.width), self.out_dtype)
        if self.role.divide:
            made["den"] = make(row, f32)
        if self.role.own:
            made["own"] = make((self.splits, *row), f32)
        if self.role.update:
            made["S"] = make((self.batch, self.heads, self.depth, self.width), f32)
            if self.sums:
                made["n"] = make((self.batch, self.heads, self.n_width), f32)
        return made

    @property
    def own(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shared memory that is a warpgroup's own: shape and dtype by name."""
        role, bfloat16, f32 = self.role, jnp.bfloat16, jnp.float32
        own: dict[str, tuple[tuple[int, ...], Any]] = {}
        if role.out:
            own["S"] = (self.shape, bfloat16)
            own["out"] = ((CHUNK, WIDTH), self.out_dtype)
        if role.precise:
            own["low"] = (self.shape, bfloat16)
        if "enter" in self.names and self.entered is not None:
            own["enter"] = ((CHUNK, WIDTH), bfloat16)
        if self.sums and role.out:
            own["n"] = ((self.depth if role.divide else WIDTH,), f32)
        if role.divide:
            own["den"] = ((CHUNK,), f32)
        if role.own:
            own["sum"] = ((CHUNK,), f32)
        return own

    @property
    def bytes(self) -> int:
        """Shared memory of a CTA; 8 kB are for barriers, alignment and what Mosaic asks for."""
        ring = sum(count * size(*what) for count, *what in self.loads.values())
        return self.stages * ring + WORKERS * sum(size(*o) for o in self.own.values()) + 8192

    def scratch(self, interpret) -> dict[str, Any]:
        """Shared memory and barriers by name."""
        made: dict[str, Any] = {}
        wanted = {n: ((count, *shape), dtype) for n, (count, shape, dtype) in self.loads.items()}
        for name, (shape, dtype) in wanted.items():
            make = shared if dtype == jnp.bfloat16 else plgpu.SMEM
            made[f"{name}_s"] = make((self.stages, *shape), dtype)
        for name, (shape, dtype) in self.own.items():
            make = shared if len(shape) > 1 else plgpu.SMEM
            made[f"{name}_s"] = make((WORKERS, *shape), dtype)
        if self.role.within and interpret:
            made["spare_s"] = shared((WORKERS, CHUNK, CHUNK), jnp.bfloat16)
        made["me_s"] = plgpu.SMEM((WORKERS,), jnp.int32)
        made["numbers_s"] = plgpu.SMEM((WORKERS, CHUNK), jnp.int32)
        arrivals = sum(count for count, _, _ in self.loads.values())
        made["full"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=self.stages)
        made["empty"] = plgpu.Barrier(num_arrivals=WORKERS, num_barriers=self.stages)
        return made


def size(shape: tuple[int, ...], dtype) -> int:
    """Bytes of an array."""
    return math.prod(shape) * jnp.dtype(dtype).itemsize


def plan_of(role: Role, width: int, x, y, heads: int, names, *, kind=Plan, **known: bool) -> Plan:
    """As many stages as fit, up to four."""
    some = x if x is not None else y
    sizes = (*some.shape[:2], heads, some.shape[-1], width)
    for stages in (4, 3, 2):
        plan = kind(role, *sizes, names=names, stages=stages, **known)
        if plan.bytes <= MEMORY:
            return plan
    raise AssertionError(f"no two stages of {plan} fit")


def pack(vectors: dict[str, jax.Array], plan: Plan) -> jax.Array | None:
    """[B, H, N, V, C], in the order of the plan's names; `keep` fills its row."""
    if not vectors:
        return None
    whole = (plan.batch, plan.heads, plan.chunks, CHUNK)
    split = lambda name, a: (  # noqa: E731
        jnp.broadcast_to(a[..., None], whole) if name == "keep" else a.reshape(whole)
    )
    return jnp.stack([split(n, vectors[n].astype(jnp.float32)) for n in plan.names], axis=3)


def halves(fill: jax.Array | None, plan: Plan) -> jax.Array:
    """The tile [B, H, N, 8, C] that n is summed with; [1, 1, 1, 8, C] where fill is one."""
    if fill is None:
        fill = jnp.ones((1, 1, 1, CHUNK), jnp.float32)
    else:
        fill = fill.reshape(plan.batch, plan.heads, plan.chunks, CHUNK)
    none = jnp.zeros((*fill.shape[:3], FILL - 2, CHUNK), jnp.bfloat16)
    return jnp.concatenate([in_parts(fill, axis=3), none], axis=3)


def in_parts(x: jax.Array, *, axis: int = 0) -> jax.Array:
    """float32 x as bfloat16 to 16 bits, along a new axis: x rounded, and what is left.

    Outside of kernels: XLA for a GPU takes float32 -> bfloat16 -> float32 for nothing, and what is
    left would be 0, unless rounding is said.
    """
    high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return jnp.stack([high, x - high], axis=axis).astype(jnp.bfloat16)
