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

import dataclasses
import functools
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.pallas_gpu.wgmma import (
    COLUMNS,
    LAYOUT,
    ROWS,
    add_matmul,
    constant,
    left,
    matmul,
    shared,
)

CHUNK = 64
"""Tokens of a chunk: the rows of a warpgroup's matrix product."""
LEAST = 1e-30
"""A normaliser below this is none."""
MEMORY = 232_448
"""Bytes of shared memory that a CTA can have."""
PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
"""Lane semantics take layouts as they are said; Mosaic's search for them, which Warpgroup semantics
start, did not come back from some of these kernels within minutes."""
COMPUTING, FEEDING = 232, 40
"""Registers of a thread of the one kind of warpgroup and the other; 504 in all."""
WORKERS = 2
"""Computing warpgroups of a CTA."""
WIDTH = 64  # columns of z that one of them takes
FILL = 8  # rows of the tile that n is summed with: the least that wgmma takes


@dataclasses.dataclass(frozen=True)
class Role:
    """What the kernel makes.

    out: what rows read; else only the state. within: from their own chunk too, not just from S.
    update: S changes from chunk to chunk. reverse: from the last chunk to the first; rows see what
    comes after them. gain: "rows" or "columns" of p, what `gain` and `shift` run along. divide:
    out is divided by its normaliser. lift: n is added. own: sums of out times a further array.
    raw: out is float32, and the normaliser is given but not divided by (in `favor` alone).
    """

    out: bool = True
    within: bool = True
    update: bool = True
    reverse: bool = False
    gain: str = "rows"
    divide: bool = False
    lift: bool = False
    own: bool = False
    raw: bool = False


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
    plan = _plan(role, width, x, y, heads, tuple(sorted(vectors)), **known)
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

    def outputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the results by name."""
        make, f32 = jax.ShapeDtypeStruct, jnp.float32
        row = (self.batch, self.heads, self.length)
        made = {}
        if self.role.out:
            made["out"] = make((self.batch, self.length, self.heads, self.width), jnp.bfloat16)
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
            own["S"] = ((self.depth, WIDTH), bfloat16)
            own["out"] = ((CHUNK, WIDTH), bfloat16)
        if "enter" in self.names:
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
        size = lambda shape, dtype: math.prod(shape) * jnp.dtype(dtype).itemsize  # noqa: E731
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
            make = shared if dtype == jnp.bfloat16 else plgpu.SMEM
            made[f"{name}_s"] = make((WORKERS, *shape), dtype)
        if self.role.within and interpret:
            made["spare_s"] = shared((WORKERS, CHUNK, CHUNK), jnp.bfloat16)
        made["me_s"] = plgpu.SMEM((WORKERS,), jnp.int32)
        made["numbers_s"] = plgpu.SMEM((WORKERS, CHUNK), jnp.int32)
        arrivals = sum(count for count, _, _ in self.loads.values())
        made["full"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=self.stages)
        made["empty"] = plgpu.Barrier(num_arrivals=WORKERS, num_barriers=self.stages)
        return made


def _plan(role: Role, width: int, x, y, heads: int, names, **known: bool) -> Plan:
    """As many stages as fit, up to four."""
    some = x if x is not None else y
    sizes = (*some.shape[:2], heads, some.shape[-1], width)
    for stages in (4, 3, 2):
        plan = Plan(role, *sizes, names=names, stages=stages, **known)
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
    high = fill.astype(jnp.bfloat16)
    low = (fill - high.astype(jnp.float32)).astype(jnp.bfloat16)
    none = jnp.zeros((*fill.shape[:3], FILL - 2, CHUNK), jnp.bfloat16)
    return jnp.concatenate([high[..., None, :], low[..., None, :], none], axis=3)


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


def _place(plan: Plan, index):
    """Example, head and first column that a computing warpgroup of this CTA is for.

    Where an odd head is left over, the last one is computed twice; see `_mine`.
    """
    b, h = lax.axis_index("batch"), lax.axis_index("head")
    if plan.tiles == 1:
        return b, h, index * WIDTH
    h = WORKERS * h + index
    return b, jnp.minimum(h, plan.heads - 1) if plan.heads % WORKERS else h, 0


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


def chunk_of(plan: Plan, step):
    """The chunk that a step is about."""
    return plan.chunks - 1 - step if plan.role.reverse else step


def feed(plan: Plan, r, interpret):
    """The memory warpgroup: fills the ring, stage after stage."""
    stages = plan.stages

    def group(ref, h):
        per = plan.heads // ref.shape[2]
        return h if per == 1 else lax.div(h, jnp.int32(per))

    def source(name, index, rows):
        b, h, column = _place(plan, index)
        ref = getattr(r, name)
        if name in ("x", "y"):
            return ref.at[b, rows, group(ref, h)]
        if name in ("z", "own"):
            return ref.at[b, rows, group(ref, h), pl.ds(column, WIDTH)]
        if name == "segments":
            return ref.at[b, rows]
        one = ref.shape[:3] == (1, 1, 1)
        return ref.at[(0, 0, 0) if one else (b, h, lax.div(rows.start, jnp.int32(CHUNK)))]

    def fill(step, _):
        slot = lax.rem(step, jnp.int32(stages))

        @pl.when(step >= stages)
        def _():
            plgpu.barrier_wait(r.empty.at[slot])

        rows = pl.ds(chunk_of(plan, step) * CHUNK, CHUNK)
        for name, (count, _, _) in plan.loads.items():
            for index in range(count):
                to = getattr(r, f"{name}_s").at[slot, index]
                plgpu.copy_gmem_to_smem(source(name, index, rows), to, r.full.at[slot])
        return ()

    def drain(step, _):  # jax 0.11.2's interpreter wants each barrier that completes waited for
        plgpu.barrier_wait(r.empty.at[lax.rem(step, jnp.int32(stages))])
        return ()

    lax.fori_loop(0, plan.chunks, fill, ())
    if interpret:
        lax.fori_loop(max(plan.chunks - stages, 0), plan.chunks, drain, ())


def by_row(vector, columns: int):
    """[rows, columns] with a number per row."""
    return lax.broadcast_in_dim(vector, (vector.shape[0], columns), [0])


def by_column(vector, rows: int):
    """[rows, columns] with a number per column."""
    return lax.broadcast_in_dim(vector, (rows, vector.shape[0]), [1])


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
    b, h, column = _place(plan, warpgroup)
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
    b, h, column = _place(plan, warpgroup)

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
