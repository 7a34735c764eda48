"""The kernel of linear attention on Hopper: one pass over memory, the state on chip.

Chunk by chunk it holds, for a head and 64 of the columns of z,

    p_ij  = (<x_i, y_j> gain + shift) exp(row_i + column_j)      over the j that i sees in its chunk
    out_i = sum_j p_ij z_j + read_i x_i S + lift_i n
    S     <- keep S + sum_j enter_j y_j z_j^T                    [D, 64] in float32 registers

and a vector n: where out_i is divided by sum_j p_ij + read_i <x_i, n>, the sum of fill_j y_j, else
of fill_j z_j. Products take bfloat16 and give float32.

A CTA is two computing warpgroups and one that feeds them by TMA through a ring of stages: `full`
barriers say that a stage has come, `empty` ones that both computing warpgroups are done with it.
With 128 columns the two work on the halves of one head and share x and y, with 64 on two heads.

n is summed by the tensor cores too, as products with a tile of eight rows that XLA lays out: two
hold fill in two bfloat16 parts (16 bits of it), the others nothing. (A reduction over the rows of
registers would go through shared memory that Mosaic gives to both warpgroups at once.)
"""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.fused.passes import LEAST
from kernels.pallas_gpu.feed import chunk_of, feed, place_of
from kernels.pallas_gpu.plan import (
    CHUNK,
    FILL,
    WIDTH,
    WORKERS,
    Plan,
    Role,
    halves,
    pack,
    plan_of,
)
from kernels.pallas_gpu.wgmma import (
    COLUMNS,
    LAYOUT,
    ROWS,
    add_matmul,
    by_column,
    by_row,
    constant,
    left,
    matmul,
)

PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
"""Lane semantics take layouts as they are said; Mosaic's search for them, which Warpgroup semantics
start, did not come back from some of these kernels within minutes."""
COMPUTING, FEEDING = 232, 40
"""Registers of a thread of the one kind of warpgroup and the other; 504 in all."""


def stream(
    role: Role,
    x: jax.Array | None,
    y: jax.Array | None,
    z: jax.Array | None,
    own: jax.Array | None = None,
    *,
    heads: int,
    vectors: dict[str, jax.Array | None] | None = None,
    fill: jax.Array | None = None,
    segments: jax.Array | None = None,
    state: tuple[jax.Array, jax.Array] | None = None,
    interpret: Any,
) -> SimpleNamespace:
    """Runs the kernel; see the module's formula.

    x, y: bfloat16 [B, T, G, D]; z, own: [B, T, G, E], each with its own number of heads, which
    divides `heads`; None what the role does not need. vectors: float32 [B, H, T] by name (`keep`:
    [B, H, N]); one that is missing is 1 (`shift`: 0; `row` and `column`: 0, both). fill: [B, H, T];
    None is 1. segments: int32 [B, T]. state: (S [B, H, D, E], n) before the first chunk, else 0.

    Returns: out [B, T, H, E]; den and own [B, H, T]; S and n; None what the role does not make.
    """
    vectors = {name: a for name, a in (vectors or {}).items() if a is not None}
    known = {"segments": segments is not None, "state": state is not None}
    width = (z if z is not None else state[0]).shape[-1]
    plan = plan_of(role, width, x, y, heads, tuple(sorted(vectors)), **known)
    inputs = {"x": x, "y": y, "z": z, "own": own, "vectors": pack(vectors, plan)}
    inputs["fill"] = halves(fill, plan) if "fill" in plan.loads else None
    inputs["segments"] = segments
    inputs["numbers"] = jnp.arange(CHUNK, dtype=jnp.int32)
    inputs["S0"], inputs["n0"] = state if state is not None else (None, None)
    inputs = {name: a for name, a in inputs.items() if a is not None}
    outputs = plan.outputs()
    body = functools.partial(_body, plan, tuple(inputs), tuple(outputs), interpret)
    made = plgpu.kernel(
        body,
        out_type=tuple(outputs.values()),
        grid=(-(-plan.heads // plan.tiles), plan.batch),
        grid_names=("head", "batch"),
        num_threads=WORKERS + 1,
        thread_name="warpgroup",
        scratch_types=plan.scratch(interpret),
        compiler_params=PARAMS,
        **({"interpret": interpret} if interpret else {}),
    )(*inputs.values())
    made = dict(zip(outputs, made, strict=True))
    if "own" in made:
        made["own"] = jnp.sum(made["own"], axis=0)
    return SimpleNamespace(**{name: made.get(name) for name in ("out", "den", "own", "S", "n")})


def _body(plan: Plan, inputs, outputs, interpret, *refs, **scratch):
    """What each of the three warpgroups does."""
    r = SimpleNamespace(**dict(zip((*inputs, *(f"{o}_g" for o in outputs)), refs, strict=True)))
    r.__dict__.update(scratch)
    warpgroup = lax.axis_index("warpgroup")

    for index in range(WORKERS):  # two copies of the code: addresses with fewer registers

        @pl.when(warpgroup == index)
        def _(index=index):
            plgpu.set_max_registers(COMPUTING, action="increase")
            _compute(plan, r, index, interpret)

    @pl.when(warpgroup == WORKERS)
    def _():
        plgpu.set_max_registers(FEEDING, action="decrease")
        feed(plan, r, interpret)


def _mine(plan: Plan, index):
    """Whether a computing warpgroup is the one that writes its results: a bool, or traced."""
    if plan.tiles == 1 or plan.heads % WORKERS == 0:
        return True
    return WORKERS * lax.axis_index("head") + index < plan.heads


def _first(plan: Plan, index):
    """Whether it writes what both halves of a head have; likewise."""
    return index == 0 if plan.tiles == 1 else _mine(plan, index)


def _when(condition):
    """`pl.when`, with nothing to ask where the answer is known."""
    if isinstance(condition, bool):
        return lambda f: f() if condition else None
    return pl.when(condition)


def introduce(r, warpgroup):
    """Puts what a loop needs of numbers that never change where it has to read them each time.

    These are the warpgroup's own index and those of a chunk's rows. Were they known, the compiler
    would hold in registers, of which there are too few, the descriptor of every operand and what
    the mask compares.
    """
    r.me_s[warpgroup] = jnp.int32(warpgroup)
    r.numbers_s.at[warpgroup][...] = plgpu.load(r.numbers, layout=ROWS, optimized=False)


def _compute(plan: Plan, r, warpgroup, interpret):
    """A computing warpgroup: one head and 64 columns of z, chunk after chunk.

    In the loop it reads its own index from shared memory; see `introduce`.
    """
    role = plan.role
    b, h, column = place_of(plan, warpgroup)
    columns = pl.ds(column, WIDTH)
    n_at = (b, h) if plan.summed == "y" else (b, h, columns)

    def publish(S, n, warpgroup):
        """S in bfloat16, and n, where products and rows read them."""
        if role.out:
            r.S_s.at[warpgroup][...] = S.astype(jnp.bfloat16)
        if role.out and plan.sums:
            r.n_s.at[warpgroup][...] = n.sum(axis=1)
        plgpu.commit_smem()

    def step(count, carry):
        S, n = carry
        slot, rows = lax.rem(count, jnp.int32(plan.stages)), chunk_of(plan, count) * CHUNK
        plgpu.barrier_wait(r.full.at[slot])
        me = r.me_s[warpgroup]
        at = SimpleNamespace(slot=slot, tile=me if plan.tiles > 1 else 0, warpgroup=me)
        if role.out:
            made = _read(plan, r, at, interpret)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was last made has left
            for name, a in made.items():
                getattr(r, f"{name}_s").at[me][...] = a
            plgpu.commit_smem()
            _store(plan, r, warpgroup, pl.ds(rows, CHUNK))
        if role.update:
            S, n = _update(plan, r, at, S, n, interpret)
        plgpu.barrier_arrive(r.empty.at[slot])
        if role.update:
            publish(S, n, me)
        return S, n

    n_rows = plan.depth if plan.summed == "y" else WIDTH
    if plan.state:
        S = plgpu.load(r.S0.at[b, h, :, columns], layout=LAYOUT, optimized=False)
    else:
        S = constant(0.0, (plan.depth, WIDTH))
    n = constant(0.0, (n_rows, FILL)) if plan.sums else ()
    if plan.state and plan.sums:
        n0 = plgpu.load(r.n0.at[n_at], layout=ROWS, optimized=False)
        n = by_row(n0 * (1 / FILL), FILL)
    introduce(r, warpgroup)
    publish(S, n, warpgroup)
    S, n = lax.fori_loop(0, plan.chunks, step, (S, n))

    if role.out:
        plgpu.wait_smem_to_gmem(0)
    if role.update:

        @_when(_mine(plan, warpgroup))
        def _():
            r.S_g.at[b, h, :, columns][...] = S
            if plan.sums and plan.summed == "z":
                r.n_g.at[n_at][...] = n.sum(axis=1)

        if plan.sums and plan.summed == "y":

            @_when(_first(plan, warpgroup))
            def _():
                r.n_g.at[n_at][...] = n.sum(axis=1)


def _read(plan: Plan, r, at, interpret) -> dict[str, jax.Array]:
    """What the rows of a chunk read, by the name of the output."""
    role, x = plan.role, r.x_s.at[at.slot, at.tile]
    vector = functools.partial(vector_of, plan, r, at)
    read, made, inner = vector("read", ROWS), {}, []
    den = _den(plan, r, at) if role.divide else None
    if role.within:
        y = r.y_s.at[at.slot, at.tile]
        p = weights(plan, r, at, matmul((CHUNK, CHUNK), (x, y.transpose((1, 0)))))
        den = den + p.sum(axis=1) if role.divide else None
        spare_s = r.spare_s.at[at.warpgroup] if interpret else None
        inner = [(left(p.astype(jnp.bfloat16), spare_s), r.z_s.at[at.slot, at.warpgroup])]
    past = (x, r.S_s.at[at.warpgroup])
    if read is None:
        out = matmul((CHUNK, WIDTH), past, *inner)
    else:
        out = matmul((CHUNK, WIDTH), past) * by_row(read, WIDTH)
        out = add_matmul(out, *inner, interpret=interpret) if inner else out
    if role.lift:
        n = by_column(plgpu.load(r.n_s.at[at.warpgroup], layout=COLUMNS), CHUNK)
        lift = vector("lift", ROWS)
        out += n if lift is None else n * by_row(lift, WIDTH)
    if role.divide:
        dead = jnp.abs(den) <= LEAST  # NaN is alive
        out *= by_row(jnp.where(dead, 0.0, 1 / jnp.where(dead, 1.0, den)), WIDTH)
        made["den"] = den
    if role.own:
        own = plgpu.load(r.own_s.at[at.slot, at.warpgroup], layout=LAYOUT)
        made["sum"] = (out * own.astype(jnp.float32)).sum(axis=1)
    return made | {"out": out.astype(jnp.bfloat16)}


def _den(plan: Plan, r, at):
    """What rows read of n, 64 columns at a time: registers are few."""

    def add(index, den):
        columns = pl.ds(index * WIDTH, WIDTH)
        x = plgpu.load(r.x_s.at[at.slot, at.tile, :, columns], layout=LAYOUT).astype(jnp.float32)
        n = plgpu.load(r.n_s.at[at.warpgroup, columns], layout=COLUMNS)
        return den + (x * by_column(n, CHUNK)).sum(axis=1)

    read = vector_of(plan, r, at, "read", ROWS)
    den = lax.fori_loop(0, plan.depth // WIDTH, add, constant(0.0, (CHUNK,), ROWS))
    return den if read is None else den * read


def weights(plan: Plan, r, at, p):
    """p of a chunk, of the products <x_i, y_j>; 0 where a row does not see a column."""
    vector = functools.partial(vector_of, plan, r, at)
    along, spread = (ROWS, by_row) if plan.role.gain == "rows" else (COLUMNS, by_column)
    if "gain" in plan.names:
        p *= spread(vector("gain", along), CHUNK)
    if "shift" in plan.names:
        p += spread(vector("shift", along), CHUNK)
    numbers = r.numbers_s.at[at.warpgroup]
    i = by_row(plgpu.load(numbers, layout=ROWS), CHUNK)
    j = by_column(plgpu.load(numbers, layout=COLUMNS), CHUNK)
    seen = i <= j if plan.role.reverse else i >= j
    if plan.segments:
        ids = r.segments_s.at[at.slot, at.tile]
        ids = (plgpu.load(ids, layout=ROWS), plgpu.load(ids, layout=COLUMNS))
        seen &= by_row(ids[0], CHUNK) == by_column(ids[1], CHUNK)
    if "row" not in plan.names:
        return jnp.where(seen, p, 0.0)
    exponent = by_row(vector("row", ROWS), CHUNK) + by_column(vector("column", COLUMNS), CHUNK)
    return p * jnp.exp(jnp.where(seen, exponent, -jnp.inf))


def _update(plan: Plan, r, at, S, n, interpret):
    """S and n after a chunk."""
    y, z = r.y_s.at[at.slot, at.tile], r.z_s.at[at.slot, at.warpgroup]
    summed = y if plan.summed == "y" else z
    enter = vector_of(plan, r, at, "enter", ROWS)
    if "keep" in plan.names:
        keep = r.vectors_s[at.slot, at.tile, plan.names.index("keep"), 0]
        S, n = S * keep, n * keep if plan.sums else n
    if plan.sums:
        fill = r.fill_s.at[at.slot, at.tile]
        pairs = (summed.transpose((1, 0)), fill.transpose((1, 0)))
        n = add_matmul(n, pairs, interpret=interpret)
    if enter is not None:
        entering = plgpu.load(z, layout=LAYOUT).astype(jnp.float32) * by_row(enter, WIDTH)
        z = r.enter_s.at[at.warpgroup]
        z[...] = entering.astype(jnp.bfloat16)
        plgpu.commit_smem()
    return add_matmul(S, (y.transpose((1, 0)), z), interpret=interpret), n


def vector_of(plan: Plan, r, at, name: str, layout):
    """One of the vectors of a chunk, or None where it is one."""
    if name not in plan.names:
        return None
    return plgpu.load(r.vectors_s.at[at.slot, at.tile, plan.names.index(name)], layout=layout)


def _store(plan: Plan, r, warpgroup, rows):
    """Sends what `_compute` has put into shared memory."""
    b, h, column = place_of(plan, warpgroup)

    @_when(_mine(plan, warpgroup))
    def _():
        to = r.out_g.at[b, rows, h, pl.ds(column, WIDTH)]
        plgpu.copy_smem_to_gmem(r.out_s.at[warpgroup], to)
        if plan.role.own:
            to = r.own_g.at[warpgroup if plan.tiles == 1 else 0, b, h, rows]
            plgpu.copy_smem_to_gmem(r.sum_s.at[warpgroup], to)

    if plan.role.divide:

        @_when(_first(plan, warpgroup))
        def _():
            plgpu.copy_smem_to_gmem(r.den_s.at[warpgroup], r.den_g.at[b, h, rows])
