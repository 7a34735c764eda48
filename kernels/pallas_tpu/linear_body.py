"""What the bodies of linear attention's kernels on TPU are made of; `at` holds their references."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.fused.passes import LEAST
from kernels.pallas_tpu.linear_plan import VECTORS, Plan, f32


def begin(at, plan: Plan, *, given: bool = True) -> None:
    """At the first chunk: the state that is given, or an empty one."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        given_one = given and hasattr(at, "state_sums")
        at.sums[...] = at.state_sums[...] if given_one else jnp.zeros(at.sums.shape, f32)
        at.norm[...] = at.state_norm[...] if given_one else jnp.zeros(at.norm.shape, f32)


def finish(at, plan: Plan) -> None:
    """At the last chunk: what is left."""

    @pl.when(pl.program_id(2) == plan.grid[2] - 1)
    def _():
        at.left_sums[...] = at.sums[...]
        at.left_norm[...] = at.norm[...]


def units(plan: Plan) -> list[tuple[int, int]]:
    """The heads of a step and its parts: (a, n). What they do not owe each other runs in turns."""
    return [(a, n) for n in range(plan.parts) for a in range(plan.packed)]


def rows(plan: Plan, n: int) -> slice:
    """Those of part n in a step's block."""
    return slice(n * plan.chunk, (n + 1) * plan.chunk)


def taken(plan: Plan, at, name: str, there, take):
    """Each unit's part of an operand; take: `lanes_of`, or `head_of` with other heads' lanes 0."""
    return {(a, n): take(plan, getattr(at, name)[rows(plan, n)], a) for a, n in there}


def passed(plan: Plan, at, keep, sums, norm=None):
    """S and z [1, R] that every unit begins with; what the last part leaves is the next step's.

    Of a part `keep` is left, and `sums` comes to it, by unit; without `norm`, z is left alone.
    """
    held = {}
    for a in range(plan.packed):
        state, total = at.sums[a], at.norm[a]
        for n in plan.order:
            held[a, n] = state, total
            state = keep[a, n] * state + sums[a, n]
            if norm is not None:
                total = keep[a, n] * total + norm[a, n]
        at.sums[a], at.norm[a] = state, total
    return held


class Vectors:
    """A unit's numbers per token as columns [C, 1] or lines [1, C]; 1 (r: 0) where none are.

    r, the gradient of the normaliser, is an operand of its own: a kernel made it.
    """

    def __init__(self, plan: Plan, at, a: int, n: int, quotient: bool):
        self.plan, self.at, self.a, self.n = plan, at, a, n
        self.quotient = quotient

    def line(self, name: str):
        """The numbers of that name, [1, C]."""
        if name == "r":
            return self.at.r[self.a, self.n] if self.quotient else 0.0
        if not (self.quotient if name == "inv_den" else self.plan.scaled):
            return 1.0
        i = VECTORS.index(name)
        return self.at.vectors[self.a, self.n, i : i + 1]

    def col(self, name: str):
        """The numbers of that name, [C, 1]."""
        x = self.line(name)
        return x if isinstance(x, float) else jnp.transpose(x)

    def keep(self):
        """The factor [1, 1] of the state over the chunk."""
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


def product(x, y, i: int, j: int):
    """The product of two matrices over dimension i of x and j of y, in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == f32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        x, y, (((i,), (j,)), ((), ())), precision=precision, preferred_element_type=f32
    )


def column_sums(x):
    """[1, N] of [M, N], float32."""
    return jnp.sum(x.astype(f32), axis=0, keepdims=True)


def whole_product(x, held, i: int, j: int):
    """`product` with float32 numbers beside bfloat16 ones, in two parts of which none is lost."""
    if x.dtype == f32:
        return product(x, held, i, j)
    high, low = in_two(held, x.dtype)
    return product(x, high, i, j) + product(x, low, i, j)


def in_two(x, dtype):
    """float32 x rounded to `dtype`, and the rest of it."""
    rounded = x.astype(dtype)
    return rounded, (x - rounded.astype(f32)).astype(dtype)


def row_sums(x):
    """[M, 1] of [M, N]."""
    return jnp.sum(x, axis=1, keepdims=True)


def dot(x, inside, factor, outside):
    """<x, inside + factor outside> [C, 1], outside being what x gets of a state.

    A decay's gradient is a difference of such sums of queries and of keys, in which all that does
    not pass the token cancels: both passes multiply by the same rounded numbers.
    """
    return row_sums(x.astype(f32) * inside + times(factor, x).astype(f32) * outside)


def places(chunk: int):
    """i and j at [i, j] of a chunk's pairs."""
    return (jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), axis) for axis in (0, 1))


def _own(plan: Plan, width: int, a: int):
    """Which lanes of a block are head a's."""
    lanes = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
    each = width // plan.packed
    return (lanes >= a * each) & (lanes < (a + 1) * each)


def lanes_of(plan: Plan, x, a: int):
    """The lanes of a block that hold head a, and the heads that share them."""
    if plan.shared > 1 or plan.packed == 1:
        return x
    width = x.shape[1] // plan.packed
    return x[:, a * width : (a + 1) * width]


def head_of(plan: Plan, x, a: int):
    """Head a of a block; other heads' lanes, where it shares them, are 0."""
    x = lanes_of(plan, x, a)
    if plan.shared == 1:
        return x
    return jnp.where(_own(plan, x.shape[1], a), x.astype(f32), 0.0).astype(x.dtype)


def chosen(plan: Plan, parts):
    """A block out of what was made for each head, of which its own lanes are good."""
    if plan.shared == 1:
        return jnp.concatenate(parts, axis=1)
    out = parts[0]
    for a, x in enumerate(parts[1:], 1):
        out = jnp.where(_own(plan, x.shape[1], a), x, out)
    return out


def added(plan: Plan, parts):
    """A block out of what was made for each head and is 0 in others' lanes."""
    if plan.shared == 1:
        return jnp.concatenate(parts, axis=1)
    return functools.reduce(jnp.add, parts)


def gathered(plan: Plan, parts):
    """The gradient of a block of heads; features' is 0 in others' lanes already."""
    return chosen(plan, parts) if plan.rank else added(plan, parts)


def times(factor, x):
    """factor x, rounded to x's dtype."""
    return x if isinstance(factor, float) else (factor * x.astype(f32)).astype(x.dtype)


def factors_of(at, a: int, i: int = 0):
    """The i-th, or the last, of the tokens' factors in `lines` [C, 1]; 1 where none are given.

    Of a step of one part.
    """
    if not hasattr(at, "lines"):
        return 1.0
    i = min(i, at.lines.shape[2] - 1)
    return jnp.transpose(at.lines[a, 0, i : i + 1])


def inverse_of(den):
    """1 / den, 0 where there is no normaliser."""
    dead = jnp.abs(den) <= LEAST  # NaN is alive
    return jnp.where(dead, 0.0, 1.0 / jnp.where(dead, 1.0, den))


def logits_of(x, weight):
    """<x, w_r> [C, R], of all parts of w in one product."""
    parts = weight.shape[1] // x.shape[1]
    return product(jnp.concatenate([x] * parts, axis=1), weight[...], 1, 1)


def features(plan: Plan, at, name: str, a: int):
    """Head a's features of queries or keys in a step of one part."""
    return staged_features(plan, at, name, [(a, 0)])[a, 0]


def staged_features(plan: Plan, at, name: str, there):
    """Each unit's features of queries or keys, in their dtype; a projection's over the largest."""
    x = taken(plan, at, name, there, head_of)
    if plan.half is None:
        return x
    logits = {u: logits_of(x[u], at.weight) for u in there}
    top = {u: jnp.max(logits[u], axis=1, keepdims=True) for u in there}
    return {u: jnp.exp(logits[u] - top[u]).astype(x[u].dtype) for u in there}


def through_quotient(phi, dnum, norm, inverse):
    """phi in float32, its gradient, and that of the normaliser [C, 1]: r = -<dout, out> / den.

    out = <phi, S> / <phi, norm> does not change with the length of phi [C, R]; so, whatever is
    rounded, its gradient dnum / den + r norm must have nothing along phi, which says what r is. One
    made of the rounded `out` is off in one and the same direction for all keys, as their sum is.
    dnum: the gradient that the numerator gives, times den.
    """
    phi = phi.astype(f32)
    r = -jnp.sum(phi * dnum, axis=1, keepdims=True) * inverse * inverse  # no overflow
    return phi, dnum * inverse + r * norm, r


def through(plan: Plan, at, x, phi, dphi, dot):
    """The gradient of queries or keys x from that of their features; dot = <phi, dphi>, None: 0."""
    if plan.half is None:
        return dphi
    dlogits = (dphi * phi).astype(x.dtype)
    dx = product(dlogits, at.weight[...], 1, 0)
    dx = functools.reduce(jnp.add, jnp.split(dx, dx.shape[1] // x.shape[1], axis=1))
    return dx if dot is None else dx - 2 * plan.half * dot * x.astype(f32)
