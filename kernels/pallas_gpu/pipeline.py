"""The pipeline of linear attention's kernels on Hopper: one pass over memory, the state on chip.

A CTA is two computing warpgroups and one that feeds them by TMA through a ring of stages: `full`
barriers say that a stage has come, `empty` ones that both computing warpgroups are done with it.
Chunk after chunk, a computing warpgroup makes what the chunk's rows read, then changes its part of
the state, with vectors `keep`, `enter` and `fill` and operands a, b, c that the kernel names:

    S <- keep S + a^T b                                      [rows, 64] in float32 registers
    n <- keep n + c^T fill                                   b, or a, times `enter`

n is summed by the tensor cores too, as products with a tile of eight rows that XLA lays out: two
hold fill in two bfloat16 parts (16 bits of it), the others nothing. (A reduction over the rows of
registers would go through shared memory that Mosaic gives to both warpgroups at once.)
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.pallas_gpu.feed import feed, mine
from kernels.pallas_gpu.launch import launch
from kernels.pallas_gpu.plan import CHUNK, FILL, WIDTH, WORKERS, Plan, halves, pack
from kernels.pallas_gpu.wgmma import (
    COLUMNS,
    LAYOUT,
    ROWS,
    add_matmul,
    by_column,
    by_row,
    constant,
)

PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
"""Lane semantics take layouts as they are said; Mosaic's search for them, which Warpgroup semantics
start, did not come back from some of these kernels within minutes."""
COMPUTING, FEEDING = 232, 40
"""Registers of a thread of the one kind of warpgroup and the other; 504 in all."""


class Work(NamedTuple):
    """What a kernel does in the pipeline; r has its references, by name.

    places(plan, index): where S and n of a computing warpgroup begin and end in HBM, as indices.
    read(plan, r, at, interpret): makes what the rows of a chunk read, and sends it off.
    operands(plan, r, at) -> a, b, c of the update, in shared memory. begin(plan, r, at): before
    either. fetch(plan, r): what the feeding warpgroup copies before all chunks; `ready` says when
    it has come. more(plan, r, at) -> a, b of a further product, which S gets as it is.
    fade(plan, r, at, S) -> what is left of S over the chunk, in place of `keep` S.

    at: the chunk's number among those that come, its slot in the ring and tile in the slot, and the
    warpgroup, which is `index` where the compiler may know it.
    """

    places: Callable
    read: Callable
    operands: Callable
    begin: Callable | None = None
    fetch: Callable | None = None
    more: Callable | None = None
    fade: Callable | None = None


def run(
    work: Work,
    plan: Plan,
    arrays: dict[str, jax.Array | None],
    vectors: dict[str, jax.Array],
    fill: jax.Array | None,
    state: tuple[jax.Array, jax.Array | None] | None,
    interpret: Any,
) -> dict[str, jax.Array]:
    """A kernel's results by name. `arrays` are what its plan loads or its work fetches."""
    inputs = arrays | {"vectors": pack(vectors, plan)}
    inputs["fill"] = halves(fill, plan) if "fill" in plan.loads else None
    inputs["numbers"] = jnp.arange(CHUNK, dtype=jnp.int32)
    inputs["S0"], inputs["n0"] = state if state is not None else (None, None)
    inputs = {name: a for name, a in inputs.items() if a is not None}
    outputs = plan.outputs()
    made = launch(
        functools.partial(_body, work, plan, (*inputs, *(f"{o}_g" for o in outputs)), interpret),
        *inputs.values(),
        out_type=tuple(outputs.values()),
        grid=(-(-plan.heads // plan.tiles), plan.batch),
        grid_names=("head", "batch"),
        num_threads=WORKERS + 1,
        thread_name="warpgroup",
        scratch_types=plan.scratch(interpret),
        compiler_params=PARAMS,
        interpret=interpret,
    )
    return dict(zip(outputs, made, strict=True))


def _body(work: Work, plan: Plan, names, interpret, *refs, **scratch):
    """What each of the three warpgroups does."""
    r = SimpleNamespace(**dict(zip(names, refs, strict=True)), **scratch)
    warpgroup = lax.axis_index("warpgroup")

    for index in range(WORKERS):  # two copies of the code: addresses with fewer registers

        @pl.when(warpgroup == index)
        def _(index=index):
            plgpu.set_max_registers(COMPUTING, action="increase")
            _compute(work, plan, r, index, interpret)

    @pl.when(warpgroup == WORKERS)
    def _():
        plgpu.set_max_registers(FEEDING, action="decrease")
        if work.fetch is not None:
            work.fetch(plan, r)
        feed(plan, r, interpret)


def _compute(work: Work, plan: Plan, r, index: int, interpret):
    """A computing warpgroup, chunk after chunk.

    In the loop it reads its own index from shared memory; see `_introduce`.
    """
    role, (S_at, n_at) = plan.role, work.places(plan, index)

    def step(count, carry):
        S, n = carry
        slot = lax.rem(count, jnp.int32(plan.stages))
        plgpu.barrier_wait(r.full.at[slot])
        me = r.me_s[index]
        at = SimpleNamespace(count=count, slot=slot, warpgroup=me, index=index)
        at.tile = me if plan.tiles > 1 else 0
        if work.begin is not None:
            work.begin(plan, r, at)
        if work.fade is not None:
            S = work.fade(plan, r, at, S)
        if role.out:
            work.read(plan, r, at, interpret)
        if role.update:
            more = () if work.more is None else (work.more(plan, r, at),)
            S, n = _update(plan, r, at, S, n, work.operands(plan, r, at), more, interpret)
        plgpu.barrier_arrive(r.empty.at[slot])
        if role.update:
            _publish(plan, r, S, n, me)
        return S, n

    S = constant(0.0, plan.shape)
    n = constant(0.0, (plan.n_rows, FILL)) if plan.sums else ()
    if plan.state:
        # a sum: inside shard_map what is loaded is for jax of another type than what is computed
        S += plgpu.load(r.S0.at[S_at], layout=LAYOUT, optimized=False)
    if plan.state and plan.sums:
        n0 = plgpu.load(r.n0.at[n_at], layout=ROWS, optimized=False)
        n = by_row(n0 * (1 / FILL), FILL)
    _introduce(r, index)
    _publish(plan, r, S, n, index)
    if work.fetch is not None:
        plgpu.barrier_wait(r.ready)
    S, n = lax.fori_loop(0, plan.chunks, step, (S, n))

    if role.out:
        plgpu.wait_smem_to_gmem(0)
    made = plan.outputs()
    if "S" in made:

        @when(mine(plan, index))
        def _():
            r.S_g.at[S_at][...] = S

    if "n" in made:

        @when(mine(plan, index, shared=plan.summed == "y"))
        def _():
            r.n_g.at[n_at][...] = n.sum(axis=1)


def _introduce(r, index: int):
    """Puts what a loop needs of numbers that never change where it has to read them each time.

    These are the warpgroup's own index and those of a chunk's rows. Were they known, the compiler
    would hold in registers, of which there are too few, the descriptor of every operand and what
    the mask compares.
    """
    r.me_s[index] = jnp.int32(index)
    r.numbers_s.at[index][...] = plgpu.load(r.numbers, layout=ROWS, optimized=False)


def _publish(plan: Plan, r, S, n, warpgroup):
    """S in bfloat16, and n, where products and rows read them."""
    if plan.role.out:
        high = S.astype(jnp.bfloat16)
        r.S_s.at[warpgroup][...] = high
    if plan.role.precise:
        r.low_s.at[warpgroup][...] = (S - high.astype(jnp.float32)).astype(jnp.bfloat16)
    if plan.role.out and plan.sums:
        r.n_s.at[warpgroup][...] = n.sum(axis=1)
    plgpu.commit_smem()


def _update(plan: Plan, r, at, S, n, operands, more, interpret):
    """S and n after a chunk."""
    a, b, c = operands
    enter = vector_of(plan, r, at, "enter", ROWS)
    if "keep" in plan.names:
        keep = r.vectors_s[at.slot, at.tile, plan.names.index("keep"), 0]
        S, n = S * keep, n * keep if plan.sums else n
    if plan.sums:
        fill = r.fill_s.at[at.slot, at.tile]
        n = add_matmul(n, (c.transpose((1, 0)), fill.transpose((1, 0))), interpret=interpret)
    if enter is not None:
        entered = a if plan.gradient else b
        entering = plgpu.load(entered, layout=LAYOUT).astype(jnp.float32)
        if plan.entered is not None:
            entered = getattr(r, f"{plan.entered}_s").at[at.warpgroup]
        entered[...] = (entering * by_row(enter, WIDTH)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        a, b = (entered, b) if plan.gradient else (a, entered)
    pairs = ((a.transpose((1, 0)), b) for a, b in ((a, b), *more))
    return add_matmul(S, *pairs, interpret=interpret), n


def when(condition):
    """`pl.when`, with nothing to ask where the answer is known."""
    if isinstance(condition, bool):
        return lambda f: f() if condition else None
    return pl.when(condition)


def vector_of(plan: Plan, r, at, name: str, layout):
    """One of the vectors of a chunk, or None where it is one."""
    if name not in plan.names:
        return None
    return plgpu.load(r.vectors_s.at[at.slot, at.tile, plan.names.index(name)], layout=layout)


def weights(plan: Plan, r, at, p):
    """p of a chunk, of the products <x_i, y_j>; 0 where a row does not see a column.

    (p gain + shift) exp(row_i + column_j), `gain` and `shift` along rows or columns as the role is.
    """
    vector = functools.partial(vector_of, plan, r, at)
    along, spread = (ROWS, by_row) if plan.role.gain == "rows" else (COLUMNS, by_column)
    if "gain" in plan.names:
        p *= spread(vector("gain", along), CHUNK)
    if "shift" in plan.names:
        p += spread(vector("shift", along), CHUNK)
    numbers = r.numbers_s.at[at.warpgroup]
    i = by_row(plgpu.load(numbers, layout=ROWS), CHUNK)
    j = by_column(plgpu.load(numbers, layout=COLUMNS), CHUNK)
    if plan.role.reverse:
        i, j = j, i
    seen = i > j if plan.role.strict else i >= j
    if plan.segments:
        ids = r.segments_s.at[at.slot, at.tile]
        ids = (plgpu.load(ids, layout=ROWS), plgpu.load(ids, layout=COLUMNS))
        seen &= by_row(ids[0], CHUNK) == by_column(ids[1], CHUNK)
    if "row" not in plan.names:
        return jnp.where(seen, p, 0.0)
    exponent = by_row(vector("row", ROWS), CHUNK) + by_column(vector("column", COLUMNS), CHUNK)
    return p * jnp.exp(jnp.where(seen, exponent, -jnp.inf))
