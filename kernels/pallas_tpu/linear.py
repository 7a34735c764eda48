"""Linear attention on TPU: the kernels of `kernels.fused.linear`.

A step of the grid is a chunk of one block of heads; chunks run in order, while S and z stay in
VMEM. Heads lie side by side in the channels, [B, T, heads x D]: a block is 128 lanes or a multiple,
so that heads of 64 or 32 channels go together, two or four to a block. A head is taken out of its
block by setting the other lanes to 0, not by moving lanes: on a matrix unit 128 wide that costs
nothing. Its S has the rows and lanes of the whole block; lanes that are not its own are dropped.

Operands of matrix products have the inputs' dtype, sums are float32; float32 operands are
multiplied as such (six passes of bfloat16). Numbers per token come eight to a chunk (`VECTORS`).
"""

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.fused.passes import LEAST, Projection
from kernels.fused.ways import Ways

LANES = 128
CHUNKS = (512, 256, 128)
LARGEST = 512
"""The most features or channels of a head, and of the heads of a block together twice as many."""
BESIDE = (4, 2, 1)
"""Heads of 128 channels to a block where nothing is scaled; steps fill each other's waits."""
PACKED = 8
"""The most heads of a block."""
VECTORS = ("row", "col", "start", "end", "keep", "segment", "inv_den", "r")
"""The rows of the block [8, C] of a chunk's float32 numbers per token."""

f32 = jnp.float32


def refuse(q, k, v, *, rank: int | None = None) -> str | None:
    """Why these kernels do not take a case, and what to do; None where they do."""
    if v.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the TPU kernels take bfloat16 and float32, not {v.dtype}: cast q, k and v"
    heads = max(x.shape[2] for x in (q, k, v))
    widths = {q.shape[3], v.shape[3], rank or 0}
    packed = _packed(heads, q.shape[3], v.shape[3])
    if max(widths) > LARGEST:
        return f"the TPU kernels hold up to {LARGEST} channels or features: use backend='xla'"
    if packed > PACKED or packed * max(q.shape[3], v.shape[3]) > 2 * LARGEST:
        return (
            f"{heads} heads of {q.shape[3]} and {v.shape[3]} channels do not come in blocks of "
            f"{LANES} lanes: use a head_dim that divides {LANES}, or backend='xla'"
        )
    return None


def chunk_length(length: int, *, rank: int, dim: int) -> int:
    """Tokens of a chunk: as many as there is room for where that fills up no more than less."""
    room = CHUNKS if max(rank, dim) <= LANES else CHUNKS[1:]
    return min(room, key=lambda c: (-(-length // c) * c, -c))


def log_scale(x, weight, half: float, *, interpret=None):
    """max_r <x, w_r> - half |x|^2 [B,H,T] of x [B,T,H,D], with no array of T x R written out."""
    plan = _plan((x,), Projection(weight, half, x, x), chunk_length(x.shape[1], rank=1, dim=1))

    def body(at):
        for a in range(plan.packed):
            logits, square = _logits(_head(plan, at.x[...], a), at.weight)
            at.top[a] = jnp.transpose(jnp.max(logits, axis=1, keepdims=True) - half * square)

    made = _call(
        body, plan, _tokens(plan, x=x) | _weights(plan, weight, x), {"top": _rows(plan)},
        interpret=interpret,
    )  # fmt: skip
    return _joined(made["top"])


def forward(q, k, v, ways, *, state, projection, normalise: bool, chunk: int, interpret=None):
    """See `kernels.fused.linear`."""
    plan = _plan((q, k, v), projection, chunk, ways)
    if ways is None and projection is None:
        plan = plan._replace(packed=max(plan.packed, _beside(plan.heads, (q, k, v))))

    def body(at):
        _begin(at, plan)
        outs = []
        for a in range(plan.packed):
            vectors, v = _Vectors(plan, at, a, False), _lanes(plan, at.v[...], a)
            q, k = (_features(plan, at, name, a) for name in "qk")
            weights = jnp.where(vectors.seen(), _dot(q, k, 1, 1) * vectors.within(), 0.0)
            num = _dot(weights.astype(v.dtype), v, 1, 0)
            num += vectors.col("start") * _dot(q, at.sums[a].astype(v.dtype), 1, 0)
            if normalise:
                read = jnp.sum(q.astype(f32) * at.norm[a], axis=1, keepdims=True)
                den = jnp.sum(weights, axis=1, keepdims=True) + vectors.col("start") * read
                at.den[a] = jnp.transpose(den)
                num *= _inverse(den)
            outs.append(num)
            entering = _times(vectors.col("end"), k)
            _absorb(at, a, vectors.keep(), entering, v, normalise)
        at.out[...] = _chosen(plan, outs).astype(at.out.dtype)
        _end(at, plan)

    ins = _tokens(plan, q=q, k=k, v=v) | _ways_in(plan, ways) | _given(plan, projection, q, "qk")
    outs: dict[str, Any] = {"out": _wide(plan, v.dtype, plan.dim)}
    if normalise:
        outs["den"] = _rows(plan)
    made = _call(
        body, plan, ins | _state_in(plan, state), outs | _state_out(plan),
        scratch=_state_scratch(plan), interpret=interpret,
    )  # fmt: skip
    out = made["out"].reshape(*q.shape[:2], plan.heads, plan.dim)
    return out, _joined(made["den"]) if normalise else None, _state_of(plan, made)


def backward(
    q, k, v, ways, *,
    dout, inv_den, r, state, dstate, projection, normalise: bool, chunk: int, interpret=None,
):  # fmt: skip
    """See `kernels.fused.linear`; q_dq is None where q is not read: normalised, no projection."""
    plan = _plan((q, k, v), projection, chunk, ways)
    vectors = _ways_in(plan, ways, inv_den, r) if normalise else _ways_in(plan, ways)
    given = vectors | _given(plan, projection, q, "qk")
    reads_q = projection is not None or not normalise

    def queries(at):
        _begin(at, plan)
        dq = []
        for a in range(plan.packed):
            vectors, v = _Vectors(plan, at, a, normalise), _lanes(plan, at.v[...], a)
            k, dout = _features(plan, at, "k", a), _head(plan, at.dout[...], a)
            within = _dot(dout, v, 1, 1) * vectors.col("inv_den") + vectors.col("r")
            within = jnp.where(vectors.seen(), within * vectors.within(), 0.0).astype(v.dtype)
            read = _dot(dout, at.sums[a].astype(v.dtype), 1, 1) * vectors.col("inv_den")
            if normalise:
                read += vectors.col("r") * at.norm[a]
            dphi = _dot(within, k, 1, 0) + vectors.col("start") * read
            if reads_q:
                phi = _features(plan, at, "q", a).astype(f32)
                dot = jnp.sum(phi * dphi, axis=1, keepdims=True)
                at.q_dq[a] = jnp.transpose(dot)
                dphi = _through(plan, at, _lanes(plan, at.q[...], a), phi, dphi, dot)
            dq.append(dphi)
            entering = _times(vectors.col("end"), k)
            _absorb(at, a, vectors.keep(), entering, v, normalise)
        at.dq[...] = _gathered(plan, dq).astype(at.dq.dtype)

    ins = _tokens(plan, k=k, v=v, dout=dout, **({"q": q} if reads_q else {}))
    outs: dict[str, Any] = {"dq": _wide(plan, q.dtype, q.shape[3])}
    if reads_q:
        outs["q_dq"] = _rows(plan)
    first = _call(
        queries, plan, ins | given | _state_in(plan, state), outs,
        scratch=_state_scratch(plan), interpret=interpret,
    )  # fmt: skip

    def keys(at):
        _begin(at, plan)
        dk, dv = [], []
        for a in range(plan.packed):
            vectors, v = _Vectors(plan, at, a, normalise), _lanes(plan, at.v[...], a)
            q, k = (_features(plan, at, name, a) for name in "qk")
            dout, inverse = _head(plan, at.dout[...], a), vectors.line("inv_den")
            seen, within = vectors.seen_back(), vectors.within_back()
            weights = jnp.where(seen, _dot(k, q, 1, 1) * within * inverse, 0.0)
            end, held = vectors.col("end"), at.sums[a].astype(v.dtype)
            dv.append(_dot(weights.astype(v.dtype), dout, 1, 0) + end * _dot(k, held, 1, 0))
            grads = (_dot(v, dout, 1, 1) * inverse + vectors.line("r")) * within
            grads = jnp.where(seen, grads, 0.0).astype(v.dtype)
            read = _dot(v, held, 1, 1)
            if normalise:
                read += at.norm[a]
            dphi = _dot(grads, q, 1, 0) + end * read
            phi = k.astype(f32)
            dot = jnp.sum(phi * dphi, axis=1, keepdims=True)
            at.k_dk[a] = jnp.transpose(dot)
            dk.append(_through(plan, at, _lanes(plan, at.k[...], a), phi, dphi, dot))
            keep, start = vectors.keep(), vectors.col("start")
            reading = _times(start * vectors.col("inv_den"), q)
            at.sums[a] = keep * at.sums[a] + _dot(reading, dout, 0, 0)
            if normalise:
                total = start * vectors.col("r") * q.astype(f32)
                at.norm[a] = keep * at.norm[a] + jnp.sum(total, axis=0, keepdims=True)
        at.dk[...] = _gathered(plan, dk).astype(at.dk.dtype)
        at.dv[...] = _added(plan, dv).astype(at.dv.dtype)
        _end(at, plan)

    back = plan._replace(backwards=True)
    ins = _tokens(plan, q=q, k=k, v=v, dout=dout) | _state_in(plan, dstate)
    outs = {
        "dk": _wide(plan, k.dtype, k.shape[3]), "dv": _wide(plan, v.dtype, plan.dim),
        "k_dk": _rows(plan),
    }  # fmt: skip
    second = _call(
        keys, back, ins | given, outs | _state_out(plan),
        scratch=_state_scratch(plan), interpret=interpret,
    )  # fmt: skip
    dq, dk, dv = (x.reshape(*q.shape[:2], plan.heads, -1) for x in
                  (first["dq"], second["dk"], second["dv"]))  # fmt: skip
    q_dq = _joined(first["q_dq"]) if reads_q else None
    return dq, dk, dv, q_dq, _joined(second["k_dk"]), _state_of(plan, second)


def sums(k, v, *, end, projection, chunk: int, interpret=None):
    """See `kernels.fused.linear`."""
    plan = _plan((k, v), projection, chunk)

    def body(at):
        _begin(at, plan)
        for a in range(plan.packed):
            entering = _times(_end_of(at, a), _features(plan, at, "k", a))
            _absorb(at, a, 1.0, entering, _lanes(plan, at.v[...], a), True)
        _end(at, plan)

    ins = _tokens(plan, k=k, v=v) | _lines(plan, end=end) | _given(plan, projection, k, "k")
    made = _call(
        body, plan, ins, _state_out(plan), scratch=_state_scratch(plan), interpret=interpret
    )
    return _state_of(plan, made)


def read(q, sums, norm, *, projection, normalise: bool, chunk: int, interpret=None):
    """See `kernels.fused.linear`."""
    values = jax.ShapeDtypeStruct((*q.shape[:2], sums.shape[1], sums.shape[3]), q.dtype)
    plan = _plan((q, values), projection, chunk)

    def body(at):
        outs = []
        for a in range(plan.packed):
            q = _features(plan, at, "q", a)
            num = _dot(q, at.state_sums[a].astype(q.dtype), 1, 0)
            if normalise:
                den = jnp.sum(q.astype(f32) * at.state_norm[a], axis=1, keepdims=True)
                at.den[a] = jnp.transpose(den)
                num *= _inverse(den)
            outs.append(num)
        at.out[...] = _chosen(plan, outs).astype(at.out.dtype)

    ins = _tokens(plan, q=q) | _given(plan, projection, q, "q") | _state_in(plan, (sums, norm))
    outs: dict[str, Any] = {"out": _wide(plan, q.dtype, plan.dim)}
    if normalise:
        outs["den"] = _rows(plan)
    made = _call(body, plan, ins, outs, interpret=interpret)
    out = made["out"].reshape(*q.shape[:2], plan.heads, plan.dim)
    return out, _joined(made["den"]) if normalise else None


def read_backward(q, sums, norm, *, dout, inv_den, r, projection, chunk: int, interpret=None):
    """See `kernels.fused.linear`."""
    plan = _plan((q, dout), projection, chunk)

    def body(at):
        _begin(at, plan, given=False)
        dq = []
        for a in range(plan.packed):
            q, dout = _features(plan, at, "q", a), _head(plan, at.dout[...], a)
            inverse, r = (jnp.transpose(at.lines[a, i : i + 1]) for i in (0, 1))
            read = _dot(dout, at.state_sums[a].astype(q.dtype), 1, 1)
            dphi, phi = read * inverse + r * at.state_norm[a], q.astype(f32)
            dot = jnp.sum(phi * dphi, axis=1, keepdims=True)
            dq.append(_through(plan, at, _lanes(plan, at.q[...], a), phi, dphi, dot))
            at.sums[a] += _dot(_times(inverse, q), dout, 0, 0)
            at.norm[a] += jnp.sum(r * phi, axis=0, keepdims=True)
        at.dq[...] = _gathered(plan, dq).astype(at.dq.dtype)
        _end(at, plan)

    ins = _tokens(plan, q=q, dout=dout) | _lines(plan, inv_den=inv_den, r=r)
    ins |= _given(plan, projection, q, "q") | _state_in(plan, (sums, norm))
    outs = {"dq": _wide(plan, q.dtype, q.shape[3])} | _state_out(plan)
    made = _call(body, plan, ins, outs, scratch=_state_scratch(plan), interpret=interpret)
    return made["dq"].reshape(*q.shape[:2], plan.heads, -1), _state_of(plan, made)


def sums_backward(k, v, dsums, dnorm, *, end, projection, chunk: int, interpret=None):
    """See `kernels.fused.linear`."""
    plan = _plan((k, v), projection, chunk)

    def body(at):
        dk, dv = [], []
        for a in range(plan.packed):
            k, v, end = _features(plan, at, "k", a), _lanes(plan, at.v[...], a), _end_of(at, a)
            held = at.state_sums[a].astype(v.dtype)
            dv.append(end * _dot(k, held, 1, 0))
            dphi, phi = end * (_dot(v, held, 1, 1) + at.state_norm[a]), k.astype(f32)
            dot = jnp.sum(phi * dphi, axis=1, keepdims=True)
            at.k_dk[a] = jnp.transpose(dot)
            dk.append(_through(plan, at, _lanes(plan, at.k[...], a), phi, dphi, dot))
        at.dk[...] = _gathered(plan, dk).astype(at.dk.dtype)
        at.dv[...] = _added(plan, dv).astype(at.dv.dtype)

    ins = _tokens(plan, k=k, v=v) | _lines(plan, end=end) | _given(plan, projection, k, "k")
    outs = {
        "dk": _wide(plan, k.dtype, k.shape[3]), "dv": _wide(plan, v.dtype, plan.dim),
        "k_dk": _rows(plan),
    }  # fmt: skip
    made = _call(body, plan, ins | _state_in(plan, (dsums, dnorm)), outs, interpret=interpret)
    dk, dv = (made[x].reshape(*k.shape[:2], plan.heads, -1) for x in ("dk", "dv"))
    return dk, dv, _joined(made["k_dk"])


class _Plan(NamedTuple):
    """Sizes and choices of a call, all static. packed: heads to a block; depth: D; dim: Dv."""

    batch: int
    heads: int
    length: int
    depth: int
    dim: int
    packed: int
    chunk: int
    rank: int | None
    half: float | None
    scaled: bool
    segmented: bool
    backwards: bool = False

    @property
    def shared(self) -> int:
        """Heads that have lanes in common, as a block of 128 has: all of a block's, or 1."""
        return 1 if self.depth % LANES == 0 and self.dim % LANES == 0 else self.packed

    @property
    def rows(self) -> int:
        """Of a head's S: features, or the channels of all heads that share its lanes."""
        return self.rank or self.shared * self.depth

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.heads // self.packed, self.length // self.chunk


def _packed(heads: int, *channels: int) -> int:
    """The fewest heads whose channels are whole lanes; all of them, which any block may have."""
    for n in range(1, heads):
        if heads % n == 0 and not any(n * c % LANES for c in channels):
            return n
    return heads


def _beside(heads: int, arrays) -> int:
    """Heads of a block that share no lanes, forward: more than one where all is known to fit."""
    like = (heads, LANES, jnp.bfloat16)
    if any((*x.shape[2:], x.dtype) != like for x in arrays):
        return 1
    return next(n for n in BESIDE if heads % n == 0)


def _plan(arrays, projection: Projection | None, chunk: int, ways: Ways | None = None) -> _Plan:
    first, last = arrays[0], arrays[-1]
    heads, depth, dim = max(x.shape[2] for x in arrays), first.shape[3], last.shape[3]
    assert first.shape[1] % chunk == 0, (first.shape, chunk)
    return _Plan(
        first.shape[0], heads, first.shape[1], depth, dim, _packed(heads, depth, dim), chunk,
        rank=None if projection is None else projection.weight.shape[0],
        half=None if projection is None else projection.half,
        scaled=ways is not None,
        segmented=ways is not None and ways.segments is not None,
    )  # fmt: skip


class _Array(NamedTuple):
    """An operand, or what a result will be, and its block: `at(b, h, c)` of the grid's place."""

    value: Any
    block: tuple[int | None, ...]
    at: Any

    def spec(self, plan: _Plan) -> pl.BlockSpec:
        last = plan.grid[2] - 1
        turn = (lambda c: last - c) if plan.backwards else (lambda c: c)
        return pl.BlockSpec(self.block, lambda b, h, c: self.at(b, h, turn(c)))


def _call(body, plan: _Plan, ins, outs, *, interpret, scratch=None):
    """Run `body(refs by name)` over the grid: results by name."""
    scratch = scratch or {}
    names = [*ins, *outs, *scratch]

    def kernel(*refs):
        body(SimpleNamespace(**dict(zip(names, refs, strict=True))))

    arrays = _alike([x.value for x in ins.values()])
    varies = jax.typeof(arrays[0]).manual_axis_type  # inside a shard_map
    results = pl.pallas_call(
        kernel,
        grid=plan.grid,
        in_specs=[x.spec(plan) for x in ins.values()],
        out_specs=[x.spec(plan) for x in outs.values()],
        out_shape=[x.value.update(manual_axis_type=varies) for x in outs.values()],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret or False,
    )(*arrays)
    return dict(zip(outs, results, strict=True))


def _alike(arrays):
    """Arrays that vary over the same axes of a mesh, inside a shard_map."""
    own = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    every = frozenset().union(*own)
    return [
        jax.lax.pcast(x, tuple(every - axes), to="varying") if every - axes else x
        for x, axes in zip(arrays, own, strict=True)
    ]


def _tokens(plan: _Plan, **arrays) -> dict[str, _Array]:
    """[B,T,G,D] arrays, their heads side by side; one of fewer heads is read, or repeated."""
    made = {}
    for name, x in arrays.items():
        if plan.packed > 1 and x.shape[2] != plan.heads:
            x = jnp.repeat(x, plan.heads // x.shape[2], axis=2)
        per = plan.heads // x.shape[2]
        block = (None, plan.chunk, plan.packed * x.shape[3])
        at = functools.partial(lambda b, h, c, per: (b, c, jax.lax.div(h, per)), per=np.int32(per))
        made[name] = _Array(x.reshape(*x.shape[:2], -1), block, at)
    return made


def _wide(plan: _Plan, dtype, channels: int) -> _Array:
    shape = jax.ShapeDtypeStruct((plan.batch, plan.length, plan.heads * channels), dtype)
    return _Array(shape, (None, plan.chunk, plan.packed * channels), lambda b, h, c: (b, c, h))


def _rows(plan: _Plan) -> _Array:
    shape = (plan.batch, plan.heads, plan.grid[2], 1, plan.chunk)
    return _line(plan, jax.ShapeDtypeStruct(shape, f32))


def _line(plan: _Plan, x) -> _Array:
    """Of numbers per token [B,H,N,n,C]."""
    block = (None, plan.packed, None, *x.shape[3:])
    return _Array(x, block, lambda b, h, c: (b, h, c, 0, 0))


def _lines(plan: _Plan, **arrays) -> dict[str, _Array]:
    """[B,H,T] arrays, those that are not None, as `lines` [B,H,N,n,C]."""
    given = [x for x in arrays.values() if x is not None]
    return {"lines": _line(plan, _stacked(plan, given))} if given else {}


def _stacked(plan: _Plan, arrays):
    x = jnp.stack([jnp.broadcast_to(x, (plan.batch, plan.heads, plan.length)) for x in arrays], 2)
    return rearrange(x, "b h e (n c) -> b h n e c", c=plan.chunk)


def _joined(x):
    return rearrange(x, "b h n 1 c -> b h (n c)")


def _ways_in(plan: _Plan, ways: Ways | None, inv_den=None, r=None) -> dict[str, _Array]:
    """`VECTORS` of every token; what a call does not need is 0."""
    if ways is None and inv_den is None:
        return {}
    made = dict.fromkeys(VECTORS, jnp.zeros((1, 1, 1), f32))
    if ways is not None:
        keep = jnp.repeat(ways.keep, plan.chunk, axis=2)
        made |= dict(zip(VECTORS, (*ways[:4], keep), strict=False))
        if ways.segments is not None:  # counted, so that float32 holds them
            changes = ways.segments[:, 1:] != ways.segments[:, :-1]
            count = jnp.cumsum(jnp.pad(changes, [(0, 0), (1, 0)]).astype(jnp.int32), axis=1)
            made["segment"] = count.astype(f32)[:, None]
    if inv_den is not None:
        made |= {"inv_den": inv_den, "r": r}
    return {"vectors": _line(plan, _stacked(plan, made.values()))}


def _given(plan: _Plan, projection: Projection | None, like, names: str) -> dict[str, _Array]:
    """The projection, and the shifts of what `names` says: q, k or both."""
    if projection is None:
        return {}
    made = _weights(plan, projection.weight, like)
    for name in names:
        shift = getattr(projection, f"shift_{name}")
        shift = jnp.repeat(shift, plan.heads // shift.shape[1], axis=1)
        made[f"shift_{name}"] = _line(plan, _stacked(plan, [shift]))
    return made


def _weights(plan: _Plan, weight, like) -> dict[str, _Array]:
    """The projection beside itself for every head of a block; in two parts where x is bfloat16.

    The parts' sum has 16 bits of mantissa: what a logit is off by, its feature is off by in parts.
    """
    weight = jnp.tile(weight.astype(f32), (1, plan.shared))
    if like.dtype == f32:
        parts = weight[None]
    else:
        high = jax.lax.reduce_precision(weight, exponent_bits=8, mantissa_bits=7)
        parts = jnp.stack([high, weight - high]).astype(like.dtype)
    return {"weight": _Array(parts, parts.shape, lambda b, h, c: (0, 0, 0))}


def _state_in(plan: _Plan, state) -> dict[str, _Array]:
    """S and z, each head's in the rows and lanes of its block."""
    if state is None:
        return {}
    state = [jnp.repeat(x, plan.heads // x.shape[1], axis=1) for x in state]
    sums, norm = (rearrange(x, "b (p n) ... -> b p n ...", n=plan.packed) for x in state)
    norm = norm[:, :, :, None]
    if plan.shared > 1:
        places = [_place(plan, a) for a in range(plan.packed)]
        sums = jnp.stack([jnp.pad(sums[:, :, a], [(0, 0), (0, 0), *_outside(plan, *p)])
                          for a, p in enumerate(places)], 2)  # fmt: skip
        norm = jnp.stack([jnp.pad(norm[:, :, a], [(0, 0), (0, 0), (0, 0), _outside(plan, *p)[0]])
                          for a, p in enumerate(places)], 2)  # fmt: skip
    return {"state_sums": _state(plan, sums), "state_norm": _state(plan, norm)}


def _place(plan: _Plan, a: int) -> tuple[slice, slice]:
    """The rows and lanes of S that are head a's own."""
    if plan.shared == 1:
        return slice(None), slice(None)
    rows = slice(None) if plan.rank else slice(a * plan.depth, (a + 1) * plan.depth)
    return rows, slice(a * plan.dim, (a + 1) * plan.dim)


def _outside(plan: _Plan, rows: slice, lanes: slice) -> list[tuple[int, int]]:
    width = plan.packed * plan.dim
    first = (0, 0) if plan.rank else (rows.start, plan.rows - rows.stop)
    return [first, (lanes.start, width - lanes.stop)]


def _state(plan: _Plan, x) -> _Array:
    return _Array(x, (None, None, *x.shape[2:]), lambda b, h, c: (b, h, 0, 0, 0))


def _state_out(plan: _Plan) -> dict[str, _Array]:
    batch, blocks = plan.grid[:2]
    shapes = {"left_sums": (plan.rows, plan.shared * plan.dim), "left_norm": (1, plan.rows)}
    return {
        name: _state(plan, jax.ShapeDtypeStruct((batch, blocks, plan.packed, *x), f32))
        for name, x in shapes.items()
    }


def _state_scratch(plan: _Plan) -> dict[str, Any]:
    return {
        "sums": pltpu.VMEM((plan.packed, plan.rows, plan.shared * plan.dim), f32),
        "norm": pltpu.VMEM((plan.packed, 1, plan.rows), f32),
    }


def _state_of(plan: _Plan, made):
    """(S [B,H,R,Dv], z [B,H,R]) out of what the last chunk wrote."""
    sums, norm = made["left_sums"], made["left_norm"]
    places = [_place(plan, a) for a in range(plan.packed)]
    sums = [sums[:, :, a, rows, lanes] for a, (rows, lanes) in enumerate(places)]
    norm = [norm[:, :, a, 0, rows] for a, (rows, _) in enumerate(places)]
    return tuple(rearrange(jnp.stack(x, 2), "b p n ... -> b (p n) ...") for x in (sums, norm))


def _begin(at, plan: _Plan, *, given: bool = True) -> None:
    """At the first chunk: the state that is given, or an empty one."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        given_one = given and hasattr(at, "state_sums")
        at.sums[...] = at.state_sums[...] if given_one else jnp.zeros(at.sums.shape, f32)
        at.norm[...] = at.state_norm[...] if given_one else jnp.zeros(at.norm.shape, f32)


def _end(at, plan: _Plan) -> None:
    """At the last chunk: what is left."""

    @pl.when(pl.program_id(2) == plan.grid[2] - 1)
    def _():
        at.left_sums[...] = at.sums[...]
        at.left_norm[...] = at.norm[...]


def _absorb(at, a: int, keep, entering, v, normalise: bool) -> None:
    at.sums[a] = keep * at.sums[a] + _dot(entering, v, 0, 0)
    if normalise:
        total = jnp.sum(entering.astype(f32), axis=0, keepdims=True)
        at.norm[a] = keep * at.norm[a] + total


class _Vectors:
    """A head's numbers per token as columns [C, 1] or lines [1, C]; 1 (r: 0) where none are."""

    def __init__(self, plan: _Plan, at, a: int, quotient: bool):
        self.plan, self.at, self.a = plan, at, a
        self.there = {"inv_den": quotient, "r": quotient}

    def line(self, name: str):
        if not self.there.get(name, self.plan.scaled):
            return 0.0 if name == "r" else 1.0
        i = VECTORS.index(name)
        return self.at.vectors[self.a, i : i + 1]

    def col(self, name: str):
        x = self.line(name)
        return x if isinstance(x, float) else jnp.transpose(x)

    def keep(self):
        x = self.line("keep")
        return x if isinstance(x, float) else x[:, :1]

    def within(self):
        """exp(col_j - row_i) at [i, j]; of use where `seen`."""
        return jnp.exp(self.line("col") - self.col("row")) if self.plan.scaled else 1.0

    def within_back(self):
        """exp(col_j - row_i) at [j, i]."""
        return jnp.exp(self.col("col") - self.line("row")) if self.plan.scaled else 1.0

    def seen(self):
        """[i, j]: query i reads key j."""
        return self._order(0)

    def seen_back(self):
        """[j, i]: query i reads key j."""
        return self._order(1)

    def _order(self, queries: int):
        shape = (self.plan.chunk, self.plan.chunk)
        i, j = (jax.lax.broadcasted_iota(jnp.int32, shape, x) for x in (queries, 1 - queries))
        if self.plan.segmented:
            return (i >= j) & (self.col("segment") == self.line("segment"))
        return i >= j


def _dot(x, y, i: int, j: int):
    """The product of two matrices over dimension i of x and j of y, in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == f32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        x, y, (((i,), (j,)), ((), ())), precision=precision, preferred_element_type=f32
    )


def _own(plan: _Plan, width: int, a: int):
    """Which lanes of a block are head a's."""
    lanes = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
    each = width // plan.packed
    return (lanes >= a * each) & (lanes < (a + 1) * each)


def _lanes(plan: _Plan, x, a: int):
    """The lanes of a block that hold head a, and the heads that share them."""
    if plan.shared > 1 or plan.packed == 1:
        return x
    width = x.shape[1] // plan.packed
    return x[:, a * width : (a + 1) * width]


def _head(plan: _Plan, x, a: int):
    """Head a of a block; other heads' lanes, where it shares them, are 0."""
    x = _lanes(plan, x, a)
    if plan.shared == 1:
        return x
    return jnp.where(_own(plan, x.shape[1], a), x.astype(f32), 0.0).astype(x.dtype)


def _chosen(plan: _Plan, parts):
    """A block out of what was made for each head, of which its own lanes are good."""
    if plan.shared == 1:
        return jnp.concatenate(parts, axis=1)
    out = parts[0]
    for a, x in enumerate(parts[1:], 1):
        out = jnp.where(_own(plan, x.shape[1], a), x, out)
    return out


def _added(plan: _Plan, parts):
    """A block out of what was made for each head and is 0 in others' lanes."""
    if plan.shared == 1:
        return jnp.concatenate(parts, axis=1)
    return functools.reduce(jnp.add, parts)


def _gathered(plan: _Plan, parts):
    """The gradient of a block of heads; features' is 0 in others' lanes already."""
    return _chosen(plan, parts) if plan.rank else _added(plan, parts)


def _times(factor, x):
    return x if isinstance(factor, float) else (factor * x.astype(f32)).astype(x.dtype)


def _end_of(at, a: int):
    return jnp.transpose(at.lines[a]) if hasattr(at, "lines") else 1.0


def _inverse(den):
    dead = jnp.abs(den) <= LEAST  # NaN is alive
    return jnp.where(dead, 0.0, 1.0 / jnp.where(dead, 1.0, den))


def _parts(weight):
    return (weight.at[i] for i in range(weight.shape[0]))


def _logits(x, weight):
    """<x, w_r> [C, R] and |x|^2 [C, 1]."""
    logits = functools.reduce(jnp.add, (_dot(x, part[...], 1, 1) for part in _parts(weight)))
    return logits, jnp.sum(jnp.square(x.astype(f32)), axis=1, keepdims=True)


def _features(plan: _Plan, at, name: str, a: int):
    """Head a's features of queries or keys, in their dtype."""
    x = _head(plan, getattr(at, name)[...], a)
    if plan.half is None:
        return x
    logits, square = _logits(x, at.weight)
    shift = jnp.transpose(getattr(at, f"shift_{name}")[a])
    return jnp.exp(logits - plan.half * square - shift).astype(x.dtype)


def _through(plan: _Plan, at, x, phi, dphi, dot):
    """The gradient of queries or keys x from that of their features; dot = <phi, dphi>."""
    if plan.half is None:
        return dphi
    dlogits = (dphi * phi).astype(x.dtype)
    dx = functools.reduce(jnp.add, (_dot(dlogits, x[...], 1, 0) for x in _parts(at.weight)))
    return dx - 2 * plan.half * dot * x.astype(f32)
