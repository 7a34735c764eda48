"""What the kernels of softmax attention on TPU do with a block of queries and one of keys.

A head's product is taken over the lanes of all heads beside it, those of the others set to zero: to
the matrix unit, 128 or more deep, that is the same work. Softmax is in base 2, the scale times
log2(e) in one factor of the logits.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.pallas_tpu.chip import LANES
from kernels.pallas_tpu.softmax_plan import Plan, Sides, both

FLOOR = -1e30
"""The maximum of a row that has seen no key yet; no logit is below it."""
LOG2E = math.log2(math.e)


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
        queries, keys = pl.ds(sides.query, sides.queries), pl.ds(sides.key, sides.keys)
        rows = _wide(column[0][keys if across else queries], shape[1]) if column else 0
        columns = (ids[0][0, :, queries] if plan.own else 0) if across else ids[-1][0, :, keys]
        seen = both(seen, jnp.broadcast_to(rows == columns, shape))
    return seen


def _pieces(plan: Plan, i, j, run, body, *, across: bool = False) -> None:
    """body(edge, sides, (i, j)) of each piece of the blocks i and j if `run`; `edge`: with a mask.

    What the window hides altogether is left out.
    """
    parts = plan.pieces(across=across)

    def whole():
        for sides in parts:
            body(False, sides, (i, j))

    def edge():
        for sides in parts:
            seen = plan.some(i, j, sides)
            pl.when(seen)(functools.partial(body, True, sides, (i, j)))

    def corners(distance: int, pieces):
        for sides, clear in pieces:
            body(not clear, sides, (distance, 0))

    if not plan.windowed:
        whole()
        return
    pl.when(run & plan.whole(i, j))(whole)
    if plan.tiles.q != plan.tiles.k:
        pl.when(run & jnp.logical_not(plan.whole(i, j)))(edge)
        return
    for distance, pieces in plan.distances():
        pl.when(run & (i - j == distance))(functools.partial(corners, distance, pieces))


def _logits(plan: Plan, a, b, seen):
    logits = _dot(a, b, (1, 1)) * (plan.scale * LOG2E)
    return logits if seen is None else jnp.where(seen, logits, -jnp.inf)


def _finish(lse_ref, index: int, queries, top, total):
    """Writes log-sum-exp; returns what to divide by. top, total [n,LANES]."""
    some = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, top / LOG2E + jnp.log(some), -jnp.inf)
    lse_ref[0, 0, index : index + 1, queries] = lse.T[:1]
    return some


def forward_once(*refs, plan: Plan):
    """All keys that there are to see at once: one softmax, nothing rescaled."""
    count = 3 + plan.masked + plan.own
    (q_ref, k_ref, v_ref, *ids), (out_ref, lse_ref, *column) = refs[:count], refs[count:]
    i = pl.program_id(2)
    j = jnp.minimum(*plan.keys_of(i))
    if plan.own:
        column[0][...] = _column(ids[0][0])
    for sides in plan.pieces(across=True, most=plan.sizes.rows):
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


def forward_steps(*refs, plan: Plan):
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

    def absorb(edge: bool, sides: Sides, at):
        rows, keys = pl.ds(sides.query, sides.queries), pl.ds(sides.key, sides.keys)
        seen, fades, parts = _seen(plan, *at, edge, ids, column, sides), [], []
        for head in plan.heads.members:
            q = _own(plan, q_ref[0, rows, head.q], head.place)
            logits = _logits(plan, q, k_ref[0, keys, head.k], seen)
            top = top_ref[head.index, rows]
            new = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
            weights = jnp.exp2(logits - _wide(new, sides.keys))
            fades.append(jnp.exp2(top - new))
            top_ref[head.index, rows] = new
            total = fades[-1] * total_ref[head.index, rows] + _by_lane(weights)
            total_ref[head.index, rows] = total
            v = _own(plan, v_ref[0, keys, head.k], head.place)
            parts.append(_dot(weights.astype(v.dtype), v))
            if head.last:
                sums = _spread(plan, fades) * sum_ref[rows, head.q] + _add(parts)
                sum_ref[rows, head.q] = sums
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


def _rests(plan: Plan, dout_ref, out_ref, dlse_ref, rest_ref) -> None:
    """Writes <dout_t, out_t> - dlse_t of all heads of a block, as rows."""
    for head in plan.heads.members:
        if head.place == 0:
            dout, out = (x[0, :, head.q].astype(jnp.float32) for x in (dout_ref, out_ref))
            turned = (dout * out).T
        at, width = pl.ds(head.index, 1), plan.heads.width
        own = turned[head.place * width : (head.place + 1) * width]
        rest_ref[0, 0, at, :] = jnp.sum(own, axis=0, keepdims=True) - dlse_ref[0, 0, at, :]


def query_grads(*refs, plan: Plan):
    """dq = scale sum_s p_ts (<dout_t, v_s> - rest_t) k_s over the blocks of keys; rest."""
    count = 7 + plan.masked + plan.own
    q_ref, k_ref, v_ref, dout_ref, lse_ref, out_ref, dlse_ref, *ids = refs[:count]
    dq_ref, rest_ref, sum_ref, lse_column, rest_column, *column = refs[count:]
    i, step = pl.program_id(2), pl.program_id(3)
    first, last = plan.keys_of(i)
    j = first + step

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        _rests(plan, dout_ref, out_ref, dlse_ref, rest_ref)
        for index in range(plan.heads.count):
            lse_column[index] = _column(lse_ref[0, 0, index : index + 1, :])
            rest_column[index] = _column(rest_ref[0, 0, index : index + 1, :])
        if plan.own:
            column[0][...] = _column(ids[0][0])

    def absorb(edge: bool, sides: Sides, at):
        rows, keys = pl.ds(sides.query, sides.queries), pl.ds(sides.key, sides.keys)
        seen, parts = _seen(plan, *at, edge, ids, column, sides), []
        for head in plan.heads.members:
            k, v = k_ref[0, keys, head.k], v_ref[0, keys, head.k]
            logits = _logits(plan, _own(plan, q_ref[0, rows, head.q], head.place), k, seen)
            weights = jnp.exp2(logits - _wide(lse_column[head.index, rows], sides.keys))
            dweights = _dot(_own(plan, dout_ref[0, rows, head.q], head.place), v, (1, 1))
            dlogits = weights * (dweights - _wide(rest_column[head.index, rows], sides.keys))
            parts.append(_dot(dlogits.astype(k.dtype), _own(plan, k, head.place)))
            if head.last:
                sum_ref[rows, head.q] += _add(parts)
                parts = []

    _pieces(plan, i, j, j <= last, absorb)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        dq_ref[0] = (sum_ref[...] * plan.scale).astype(dq_ref.dtype)


def key_grads(*refs, plan: Plan, steps: int):
    """dk and dv over the blocks of queries, and over those of the heads of a group."""
    count = 6 + plan.masked + plan.own
    given, (dk_ref, dv_ref, *scratch) = refs[:count], refs[count:]
    j, step = pl.program_id(2), pl.program_id(3)
    first, last = plan.queries_of(j)
    i = first + jax.lax.rem(step, steps)
    pl.when(step == 0)(lambda: _clear(plan, given, scratch))

    def absorb(edge: bool, sides: Sides, at):
        for _ in _transposed(plan, *at, edge, sides, given, scratch):
            pass

    _pieces(plan, i, j, i <= last, absorb, across=True)
    last_step = step == pl.num_programs(3) - 1
    pl.when(last_step)(lambda: _write(plan, scratch, dk_ref, dv_ref))


def all_grads(*refs, plan: Plan):
    """All three, the keys being one block."""
    count = 7 + plan.masked + plan.own
    (*given, out_ref, dlse_ref), ids = refs[:7], refs[7:count]
    dq_ref, dk_ref, dv_ref, rest_ref, *scratch = refs[count:]
    _rests(plan, given[3], out_ref, dlse_ref, rest_ref)
    given = (*given, rest_ref, *ids)
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
    queries, keys = pl.ds(sides.query, sides.queries), pl.ds(sides.key, sides.keys)
    for head in plan.heads.members:
        k, v = (_own(plan, ref[0, keys, head.k], head.place) for ref in (k_ref, v_ref))
        q, dout = q_ref[0, queries, head.q], dout_ref[0, queries, head.q]
        weights = jnp.exp2(_logits(plan, k, q, seen) - lse_ref[0, 0, pl.ds(head.index, 1), queries])
        dv_sum[keys, head.k] += _dot(weights.astype(v.dtype), _own(plan, dout, head.place))
        dweights = _dot(v, dout, (1, 1))
        dlogits = weights * (dweights - rest_ref[0, 0, pl.ds(head.index, 1), queries])
        dlogits = dlogits.astype(q.dtype)
        dk_sum[keys, head.k] += _dot(dlogits, _own(plan, q, head.place))
        yield head, dlogits
