"""Softmax attention on TPU: one pass over the keys, no logits in memory (arXiv 2205.14135).

A head's product is taken over the lanes of all heads beside it, those of the others set to zero: to
the matrix unit, 128 or more deep, that is the same work. Softmax is in base 2, the scale times
log2(e) in one factor of the logits. Where a block of queries sees one block of keys only, the
softmax is taken at once; where that block is all keys, one kernel makes all three gradients.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.fused_softmax import Tiles
from kernels.pallas_tpu import softmax_plan as plans
from kernels.pallas_tpu.softmax_plan import LANES, Plan, Sides, both, tiles

__all__ = ["backward", "forward", "refuse", "tiles"]

FLOOR = -1e30
"""The maximum of a row that has seen no key yet; no logit is below it."""
LOG2E = math.log2(math.e)
VMEM = 48 << 20


def refuse(q, k, v, *, causal, window, segments, keys, resident) -> str | None:
    """See `kernels.fused_softmax`."""
    del k, v, causal, window, segments, keys, resident
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the TPU kernels take bfloat16 or float32, not {q.dtype}"
    if q.shape[-1] > 256:
        return f"the TPU softmax kernels take a head dim up to 256, not {q.shape[-1]}"
    return None


def forward(q, k, v, *, segments, keys, tiles: Tiles, **options):
    """See `kernels.fused_softmax`."""
    plan = plans.plan(q, k, segments=segments, keys=keys, tiles=tiles, **options)
    heads, steps = plan.heads, plan.steps()
    given = plans.to_queries(heads, q), plans.to_keys(heads, k), plans.to_keys(heads, v)
    query, key, row, ids = _specs(plan, *_by_queries(plan))
    batch, blocks = q.shape[0], given[0].shape[2] // heads.query_lanes
    scratch = [] if steps == 1 else [_stats(plan), _stats(plan), _sums(plan)]
    out, lse = _call(
        _forward_once if steps == 1 else _forward_steps, plan,
        grid=(batch, blocks, plan.blocks[0], steps),
        in_specs=[query, key, key, *ids],
        out_specs=[query, row],
        outs=[(given[0].shape, v.dtype), ((batch, blocks, heads.count, q.shape[1]), jnp.float32)],
        scratch=[*scratch, *_column_of_numbers(plan)],
        operands=(*given, *plans.numbers(segments, keys, k)),
    )  # fmt: skip
    return plans.from_queries(heads, out, q), plans.from_rows(heads, lse, q)


def backward(q, k, v, out, lse, dout, dlse, *, segments, keys, tiles: Tiles, **options):
    """See `kernels.fused_softmax`."""
    plan = plans.plan(q, k, segments=segments, keys=keys, tiles=tiles, **options).smaller()
    heads = plan.heads
    rest = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    rows = jnp.where(jnp.isfinite(lse), lse, 0.0) * LOG2E, rest - dlse
    operands = (
        plans.to_queries(heads, q), plans.to_keys(heads, k), plans.to_keys(heads, v),
        plans.to_queries(heads, dout), *(plans.to_rows(heads, x) for x in rows),
        *plans.numbers(segments, keys, k),
    )  # fmt: skip
    if plan.blocks[1] == 1:
        dq, dk, dv = _backward_resident(plan, operands)
    else:
        (dq,), (dk, dv) = _backward_queries(plan, operands), _backward_keys(plan, operands)
    back = plans.from_keys(heads, dk, k), plans.from_keys(heads, dv, v)
    return plans.from_queries(heads, dq, q), *back


def _backward_queries(plan: Plan, operands):
    query, key, row, ids = _specs(plan, *_by_queries(plan))
    q, rows = operands[0], operands[4]
    return _call(
        _query_grads, plan,
        grid=(q.shape[0], rows.shape[1], plan.blocks[0], plan.steps()),
        in_specs=[query, key, key, query, row, row, *ids],
        out_specs=[query],
        outs=[(q.shape, q.dtype)],
        scratch=[_sums(plan), _stats(plan), _stats(plan), *_column_of_numbers(plan)],
        operands=operands,
    )  # fmt: skip


def _backward_keys(plan: Plan, operands):
    steps, parts = plan.steps(across=True), plan.heads.parts

    def query_at(h, j, s):
        first, last = plan.queries_of(j)
        return jnp.minimum(first + jax.lax.rem(s, steps), last), h * parts + jax.lax.div(s, steps)

    query, key, row, ids = _specs(plan, query_at, lambda h, j, s: (j, h))
    k, v = operands[1:3]
    return _call(
        functools.partial(_key_grads, steps=steps), plan,
        grid=(k.shape[0], k.shape[2] // plan.heads.key_lanes, plan.blocks[1], parts * steps),
        in_specs=[query, key, key, query, row, row, *ids],
        out_specs=[key, key],
        outs=[(k.shape, k.dtype), (v.shape, v.dtype)],
        scratch=[*_sums_of_keys(plan), *_column_of_numbers(plan, across=True)],
        operands=operands,
    )  # fmt: skip


def _backward_resident(plan: Plan, operands):
    blocks, parts = plan.blocks[0], plan.heads.parts

    def query_at(h, s):
        return jax.lax.rem(s, blocks), h * parts + jax.lax.div(s, blocks)

    query, key, row, ids = _specs(plan, query_at, lambda h, s: (0, h))
    q, k, v = operands[:3]
    return _call(
        _all_grads, plan,
        grid=(k.shape[0], k.shape[2] // plan.heads.key_lanes, parts * blocks),
        in_specs=[query, key, key, query, row, row, *ids],
        out_specs=[query, key, key],
        outs=[(q.shape, q.dtype), (k.shape, k.dtype), (v.shape, v.dtype)],
        scratch=[*_sums_of_keys(plan), *_column_of_numbers(plan, across=True)],
        operands=operands,
    )  # fmt: skip


def _call(kernel, plan: Plan, *, grid, in_specs, out_specs, outs, scratch, operands):
    varying = jax.typeof(operands[0]).manual_axis_type
    return pl.pallas_call(
        functools.partial(kernel, plan=plan),
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=[
            jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying) for shape, dtype in outs
        ],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * (len(grid) - 1) + ("arbitrary",),
            vmem_limit_bytes=VMEM,
        ),
        interpret=plan.interpret or False,
    )(*operands)


def _by_queries(plan: Plan):
    """Blocks at (h, i, step), of positions and of heads: of queries, and of keys."""

    def key_at(h, i, step):
        first, last = plan.keys_of(i)
        return jnp.minimum(first + step, last), jax.lax.div(h, plan.heads.parts)

    return lambda h, i, step: (i, h), key_at


def _specs(plan: Plan, query_at, key_at):
    """Specs of arrays like q, like k, of rows like log-sum-exp, and [of the numbers of both]."""
    (block_q, block_k), heads = plan.tiles, plan.heads

    def row_at(b, *at):
        block, head = query_at(*at)
        return b, head, 0, block

    mine = pl.BlockSpec((1, 1, block_q), lambda b, *at: (b, 0, query_at(*at)[0]))
    theirs = pl.BlockSpec((1, 1, block_k), lambda b, *at: (b, 0, key_at(*at)[0]))
    return (
        pl.BlockSpec((1, block_q, heads.query_lanes), lambda b, *at: (b, *query_at(*at))),
        pl.BlockSpec((1, block_k, heads.key_lanes), lambda b, *at: (b, *key_at(*at))),
        pl.BlockSpec((1, 1, heads.count, block_q), row_at),
        [*[mine] * plan.own, *[theirs] * plan.masked],
    )


def _stats(plan: Plan):
    """A number for each row of logits, the same in all lanes."""
    return pltpu.VMEM((plan.heads.count, plan.tiles.q, LANES), jnp.float32)


def _sums(plan: Plan):
    return pltpu.VMEM((plan.tiles.q, plan.heads.query_lanes), jnp.float32)


def _sums_of_keys(plan: Plan):
    return [pltpu.VMEM((plan.tiles.k, plan.heads.key_lanes), jnp.float32)] * 2


def _column_of_numbers(plan: Plan, across: bool = False):
    """Where the numbers of the rows of logits stand as a column, if they differ."""
    if not (plan.masked if across else plan.own):
        return []
    return [pltpu.VMEM((plan.tiles.k if across else plan.tiles.q, LANES), jnp.int32)]


# ------------------------------------------------------------------------------ inside a kernel


def _dot(a, b, over=(1, 0)):
    """float32 product of a and b over their axes `over`; float32 operands are not rounded."""
    exact = a.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, (((over[0],), (over[1],)), ((), ())),
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip


def _own(plan: Plan, x, place: int):
    """x [n, lanes] with zeros in the lanes of other heads."""
    width = plan.heads.width
    if plan.heads.pack == 1:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    mine = (lane >= place * width) & (lane < (place + 1) * width)
    return jnp.where(mine, x, jnp.zeros_like(x))


def _wide(x, lanes: int):
    """x [n,LANES], alike in all lanes, with that many."""
    return jnp.tile(x, (1, -(-lanes // LANES)))[:, :lanes]


def _spread(plan: Plan, columns):
    """[n, lanes] of the columns [n,LANES], one for each place, in the lanes of its head."""
    columns = [_wide(x, plan.heads.lanes) for x in columns]
    lane = jax.lax.broadcasted_iota(jnp.int32, columns[0].shape, 1)
    spread = columns[-1]
    for place in reversed(range(plan.heads.pack - 1)):
        spread = jnp.where(lane < (place + 1) * plan.heads.width, columns[place], spread)
    return spread


def _column(row):
    """The row [1,n] as a column, over all lanes: [n,LANES]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _add(parts):
    return sum(parts[1:], parts[0])


def _seen(plan: Plan, i, j, edge: bool, ids, column, sides: Sides, *, across: bool = False):
    """Which logits of a piece count, [queries, keys] or, `across`, the transpose; None for all.

    ids: the numbers, as references. column: those of the rows.
    """
    shape = (sides.keys, sides.queries) if across else (sides.queries, sides.keys)
    seen = None
    if edge:
        ahead = plan.ahead(i, j, sides._replace(queries=1, keys=1))[0]
        ahead += jax.lax.broadcasted_iota(jnp.int32, shape, int(across))
        ahead -= jax.lax.broadcasted_iota(jnp.int32, shape, 1 - int(across))
        seen = plan.within(ahead, ahead)
    if plan.masked:
        rows = _wide(column[0][...], shape[1]) if column else 0
        if across:
            columns = ids[0][0, :, sides.query : sides.query + sides.queries] if plan.own else 0
        else:
            columns = ids[-1][0, :, sides.key : sides.key + sides.keys]
        seen = both(seen, jnp.broadcast_to(rows == columns, shape))
    return seen


def _pieces(plan: Plan, i, j, run, body, *, across: bool = False) -> None:
    """body(edge, sides) of each piece of the blocks i and j if `run`, `edge` where a mask is due.

    What the window hides altogether is left out.
    """
    parts = plan.pieces(across=across)

    def all_of(edge: bool):
        for sides in parts:
            if edge and len(parts) > 1:
                pl.when(plan.some(i, j, sides))(functools.partial(body, True, sides))
            else:
                body(edge, sides)

    if not plan.windowed:
        all_of(False)
        return
    whole = plan.whole(i, j)
    pl.when(run & whole)(lambda: all_of(False))
    pl.when(run & jnp.logical_not(whole))(lambda: all_of(True))


def _logits(plan: Plan, a, b, seen):
    logits = _dot(a, b, (1, 1)) * (plan.scale * LOG2E)
    return logits if seen is None else jnp.where(seen, logits, -jnp.inf)


def _finish(lse_ref, index: int, queries, top, total):
    """Writes log-sum-exp; returns what to divide by. top, total [n,LANES]."""
    some = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, top / LOG2E + jnp.log(some), -jnp.inf)
    lse_ref[0, 0, index : index + 1, queries] = lse.T[:1]
    return some


def _forward_once(*refs, plan: Plan):
    """All keys that there are to see at once: one softmax, nothing rescaled."""
    count = 3 + plan.masked + plan.own
    (q_ref, k_ref, v_ref, *ids), (out_ref, lse_ref, *column) = refs[:count], refs[count:]
    i = pl.program_id(2)
    j = jnp.minimum(*plan.keys_of(i))
    if plan.own:
        column[0][...] = _column(ids[0][0])
    for sides in [plan.all] if plan.own else plan.pieces(across=True, most=plans.ROWS):
        queries, parts = pl.ds(sides.query, sides.queries), []
        seen = _seen(plan, i, j, plan.windowed, ids, column, sides)
        for head in plan.heads.members:
            q = _own(plan, q_ref[0, queries, head.q], head.place)
            logits = _logits(plan, q, k_ref[0, :, head.k], seen)
            top = jnp.maximum(jnp.max(logits, axis=1, keepdims=True), FLOOR)
            weights = jnp.exp2(logits - top)
            total = jnp.sum(weights, axis=1, keepdims=True)
            sums = _dot(weights.astype(v_ref.dtype), _own(plan, v_ref[0, :, head.k], head.place))
            top, total = (jnp.broadcast_to(x, (sides.queries, LANES)) for x in (top, total))
            some = _finish(lse_ref, head.index, queries, top, total)
            parts.append(sums / _wide(some, plan.heads.lanes))
            if head.last:
                out_ref[0, queries, head.q] = _add(parts).astype(out_ref.dtype)
                parts = []


def _forward_steps(*refs, plan: Plan):
    """One block of keys: the sums so far, over a new maximum."""
    count = 3 + plan.masked + plan.own
    (q_ref, k_ref, v_ref, *ids), (out_ref, lse_ref, *scratch) = refs[:count], refs[count:]
    top_ref, total_ref, sum_ref, *column = scratch
    i, step = pl.program_id(2), pl.program_id(3)
    first, last = plan.keys_of(i)
    j = first + step

    @pl.when(step == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, FLOOR)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        if plan.own:
            column[0][...] = _column(ids[0][0])

    def absorb(edge: bool, sides: Sides):
        keys, fades, parts = pl.ds(sides.key, sides.keys), [], []
        seen = _seen(plan, i, j, edge, ids, column, sides)
        for head in plan.heads.members:
            q = _own(plan, q_ref[0, :, head.q], head.place)
            logits = _logits(plan, q, k_ref[0, keys, head.k], seen)
            top = top_ref[head.index]
            new = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
            weights = jnp.exp2(logits - _wide(new, sides.keys))
            fades.append(jnp.exp2(top - new))
            top_ref[head.index] = new
            total_ref[head.index] = fades[-1] * total_ref[head.index] + _by_lane(weights)
            v = _own(plan, v_ref[0, keys, head.k], head.place)
            parts.append(_dot(weights.astype(v.dtype), v))
            if head.last:
                sum_ref[:, head.q] = _spread(plan, fades) * sum_ref[:, head.q] + _add(parts)
                fades, parts = [], []

    _pieces(plan, i, j, j <= last, absorb)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        totals, queries = [], pl.ds(0, plan.tiles.q)
        for head in plan.heads.members:
            total = jnp.sum(total_ref[head.index], axis=1, keepdims=True)
            total = jnp.broadcast_to(total, (plan.tiles.q, LANES))
            totals.append(_finish(lse_ref, head.index, queries, top_ref[head.index], total))
            if head.last:
                out = sum_ref[:, head.q] / _spread(plan, totals)
                out_ref[0, :, head.q] = out.astype(out_ref.dtype)
                totals = []


def _by_lane(weights):
    """Sums of weights [n,m] that still are to be summed over LANES lanes."""
    if weights.shape[1] % LANES:
        total = jnp.sum(weights, axis=1, keepdims=True)
        lane = jax.lax.broadcasted_iota(jnp.int32, (weights.shape[0], LANES), 1)
        return jnp.where(lane == 0, total, 0.0)
    return _add([weights[:, at : at + LANES] for at in range(0, weights.shape[1], LANES)])


def _query_grads(*refs, plan: Plan):
    """dq = scale sum_s p_ts (<dout_t, v_s> - rest_t) k_s over the blocks of keys."""
    count = 6 + plan.masked + plan.own
    q_ref, k_ref, v_ref, dout_ref, lse_ref, rest_ref, *ids = refs[:count]
    dq_ref, sum_ref, lse_column, rest_column, *column = refs[count:]
    i, step = pl.program_id(2), pl.program_id(3)
    first, last = plan.keys_of(i)
    j = first + step

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        for index in range(plan.heads.count):
            lse_column[index] = _column(lse_ref[0, 0, index : index + 1, :])
            rest_column[index] = _column(rest_ref[0, 0, index : index + 1, :])
        if plan.own:
            column[0][...] = _column(ids[0][0])

    def absorb(edge: bool, sides: Sides):
        keys, parts = pl.ds(sides.key, sides.keys), []
        seen = _seen(plan, i, j, edge, ids, column, sides)
        for head in plan.heads.members:
            k, v = k_ref[0, keys, head.k], v_ref[0, keys, head.k]
            logits = _logits(plan, _own(plan, q_ref[0, :, head.q], head.place), k, seen)
            weights = jnp.exp2(logits - _wide(lse_column[head.index], sides.keys))
            dweights = _dot(_own(plan, dout_ref[0, :, head.q], head.place), v, (1, 1))
            dlogits = weights * (dweights - _wide(rest_column[head.index], sides.keys))
            parts.append(_dot(dlogits.astype(k.dtype), _own(plan, k, head.place)))
            if head.last:
                sum_ref[:, head.q] += _add(parts)
                parts = []

    _pieces(plan, i, j, j <= last, absorb)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        dq_ref[0] = (sum_ref[...] * plan.scale).astype(dq_ref.dtype)


def _key_grads(*refs, plan: Plan, steps: int):
    """dk and dv over the blocks of queries, and over those of the heads of a group."""
    count = 6 + plan.masked + plan.own
    given, (dk_ref, dv_ref, *scratch) = refs[:count], refs[count:]
    j, step = pl.program_id(2), pl.program_id(3)
    first, last = plan.queries_of(j)
    i = first + jax.lax.rem(step, steps)
    pl.when(step == 0)(lambda: _clear(plan, given, scratch))

    def absorb(edge: bool, sides: Sides):
        for _ in _transposed(plan, i, j, edge, sides, given, scratch):
            pass

    _pieces(plan, i, j, i <= last, absorb, across=True)
    last_step = step == pl.num_programs(3) - 1
    pl.when(last_step)(lambda: _write(plan, scratch, dk_ref, dv_ref))


def _all_grads(*refs, plan: Plan):
    """All three, the keys being one block."""
    count = 6 + plan.masked + plan.own
    given, (dq_ref, dk_ref, dv_ref, *scratch) = refs[:count], refs[count:]
    k_ref, step = given[1], pl.program_id(2)
    i = jax.lax.rem(step, plan.blocks[0])
    pl.when(step == 0)(lambda: _clear(plan, given, scratch))
    for sides in plan.pieces(across=True):
        parts, queries = [], pl.ds(sides.query, sides.queries)
        for head, dlogits in _transposed(plan, i, 0, plan.windowed, sides, given, scratch):
            parts.append(_dot(dlogits, _own(plan, k_ref[0, :, head.k], head.place), (0, 0)))
            if head.last:
                dq_ref[0, queries, head.q] = (_add(parts) * plan.scale).astype(dq_ref.dtype)
                parts = []
    last_step = step == pl.num_programs(2) - 1
    pl.when(last_step)(lambda: _write(plan, scratch, dk_ref, dv_ref))


def _clear(plan: Plan, given, scratch) -> None:
    for total in scratch[:2]:
        total[...] = jnp.zeros_like(total)
    if plan.masked:
        scratch[2][...] = _column(given[-1][0])


def _write(plan: Plan, scratch, dk_ref, dv_ref) -> None:
    dk_ref[0] = (scratch[0][...] * plan.scale).astype(dk_ref.dtype)
    dv_ref[0] = scratch[1][...].astype(dv_ref.dtype)


def _transposed(plan: Plan, i, j, edge: bool, sides: Sides, given, scratch):
    """Adds to dk and dv what a piece gives; yields each head and the gradient of its logits.

    Logits are [keys, queries] here: log-sum-exp and the rest are rows as they are stored.
    """
    q_ref, k_ref, v_ref, dout_ref, lse_ref, rest_ref, *ids = given
    dk_sum, dv_sum, *column = scratch
    seen = _seen(plan, i, j, edge, ids, column, sides, across=True)
    queries = pl.ds(sides.query, sides.queries)
    for head in plan.heads.members:
        k, v = (_own(plan, ref[0, :, head.k], head.place) for ref in (k_ref, v_ref))
        q, dout = q_ref[0, queries, head.q], dout_ref[0, queries, head.q]
        weights = jnp.exp2(_logits(plan, k, q, seen) - lse_ref[0, 0, pl.ds(head.index, 1), queries])
        dv_sum[:, head.k] += _dot(weights.astype(v.dtype), _own(plan, dout, head.place))
        dweights = _dot(v, dout, (1, 1))
        dlogits = weights * (dweights - rest_ref[0, 0, pl.ds(head.index, 1), queries])
        dlogits = dlogits.astype(q.dtype)
        dk_sum[:, head.k] += _dot(dlogits, _own(plan, q, head.place))
        yield head, dlogits
