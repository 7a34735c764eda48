"""Linear attention on Hopper: the contract of `kernels.fused.linear` as runs of `stream`.

With x, y, z as in `kernels.pallas_gpu.stream`, and g_i = dout_i inv_den_i left to its vectors:

    forward   q, k, v            divided by its normaliser
    dq        dout, v, k         S transposed, made again
    dv        k, q, dout         from the last chunk to the first, R in place of S
    dk        v, dout, q         likewise, R transposed

Each makes its own pass over memory and writes nothing but what it is run for.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels.pallas_gpu.favor import favor
from kernels.pallas_gpu.fit import WIDTHS, refuse_dtype
from kernels.pallas_gpu.log_scale import half_square, log_scale
from kernels.pallas_gpu.plan import CHUNK, Role
from kernels.pallas_gpu.stream import stream

SHIFTS_QUERIES = True
MOST_FEATURES = 640
"""That the kernels make: `log_scale` holds the projection of 128 channels on chip."""

__all__ = [
    "CHUNK",
    "backward",
    "chunk_length",
    "forward",
    "log_scale",
    "read",
    "read_backward",
    "refuse",
    "sums",
    "sums_backward",
]


def refuse(q, k, v, *, rank: int | None = None) -> str | None:
    """Why these kernels do not take a case, and what to do; None where they do.

    q, k, v: arrays, or their shapes and dtypes. rank: features of a fused projection, if any.
    """
    if reason := refuse_dtype(q=q, k=k, v=v):
        return reason
    if rank is not None and rank > MOST_FEATURES:
        return (
            f"there are {rank} features; the Hopper kernels make up to {MOST_FEATURES}: "
            "use backend='xla'"
        )
    widths = k.shape[-1], v.shape[-1]
    if max(widths) > WIDTHS[-1]:
        return (
            f"k and v have {widths[0]} and {widths[1]} channels a head; the Hopper kernels take up "
            f"to {WIDTHS[-1]}: use backend='xla'"
        )
    if rank is not None and widths[0] != widths[1]:
        return (
            f"k and v have {widths[0]} and {widths[1]} channels a head; the Hopper kernels make "
            "features for values of as many channels as keys: use backend='xla'"
        )
    return None


def chunk_length(length: int, *, rank: int, dim: int) -> int:
    """Tokens of a chunk."""
    del length, rank, dim
    return CHUNK


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, ways: Any, *,
    state: tuple[jax.Array, jax.Array] | None, projection: Any, normalise: bool, chunk: int,
    interpret: Any,
):  # fmt: skip
    """out [B, T, H, Dv], den [B, H, T] (None unless `normalise`), (S, z) after the last token.

    Arguments and formulas are those of `kernels.fused.linear`.
    """
    assert chunk == CHUNK
    heads = _heads(q, k, v)
    factors, enter = {}, None
    if ways is not None:
        enter = ways.end
        factors = {"row": -ways.row, "column": ways.col, "read": ways.start, "keep": ways.keep}
    run = _run(projection, heads, x=("q", q), y=("k", k))
    made = run(
        Role(divide=normalise), q, k, v, heads=heads, vectors=factors | {"enter": enter},
        fill=enter, segments=_segments(ways), state=state, interpret=interpret,
    )  # fmt: skip
    return made.out, made.den, (made.S, _or_zeros(made.n, made.S))


def backward(
    q: jax.Array, k: jax.Array, v: jax.Array, ways: Any, *,
    dout: jax.Array, inv_den: jax.Array, r: jax.Array,
    state: tuple[jax.Array, jax.Array] | None, dstate: tuple[jax.Array, jax.Array] | None,
    projection: Any, normalise: bool, chunk: int, interpret: Any,
):  # fmt: skip
    """dq, dk [B, T, H, D], dv [B, T, H, Dv], q_dq, k_dk [B, H, T], (dS, dz), S.

    With a projection dq and dk are of what features are made of, q_dq and k_dk of the features, and
    S, which decays ask for, is None. q_dq and k_dk, which nobody needs then, are None where `ways`
    and `projection` are.
    """
    assert chunk == CHUNK
    gain, shift = (inv_den, r) if normalise else (None, None)
    start = end = row = column = keep = None
    if ways is not None:
        start, end, row, column, keep = ways.start, ways.end, -ways.row, ways.col, ways.keep
    heads = _heads(q, k, v)
    shared = {
        "heads": heads, "segments": _segments(ways), "interpret": interpret,
    }  # fmt: skip
    both = {"keep": keep, "gain": gain}

    own = ways is not None or projection is not None
    precise = ways is not None and not normalise  # decays; else nobody sums over tokens
    role = Role(lift=normalise, own=own, precise=precise)
    factors = both | {"row": row, "column": column, "shift": shift, "enter": end}
    factors |= {"read": _product(start, gain), "lift": _product(start, shift)}
    query = _run(projection, heads, z=("k", k), own=("q", q))(
        role, dout, v, k, q if role.own else None, vectors=factors, fill=end,
        state=_turned(state), **shared,
    )  # fmt: skip

    later = both | {"row": column, "column": row, "read": end, "enter": _product(start, gain)}
    role = Role(reverse=True, gain="columns")
    run = _run(projection, heads, x=("k", k), y=("q", q))
    value = run(role, k, q, dout, vectors=later, state=dstate, **shared)

    role = Role(reverse=True, gain="columns", lift=normalise, own=own, precise=precise)
    key = _run(projection, heads, z=("q", q), own=("k", k))(
        role, v, dout, q, k if role.own else None, vectors=later | {"shift": shift, "lift": end},
        fill=_product(start, shift), state=_turned(dstate), **shared,
    )  # fmt: skip
    before = (value.S, _or_zeros(key.n, value.S))
    last = jnp.swapaxes(query.S, 2, 3) if projection is None else None
    return query.out, key.out, value.out, query.own, key.own, before, last


def sums(
    k: jax.Array, v: jax.Array, *, end: jax.Array | None, fill: jax.Array | None = None,
    projection: Any, chunk: int, interpret: Any,
):  # fmt: skip
    """S = sum_j end_j k_j v_j^T [B, G, R, Dv], z = sum_j fill_j k_j [B, G, R]; fill None: end."""
    assert chunk == CHUNK
    heads = _heads(k, v)
    made = _run(projection, heads, y=("k", k))(
        Role(out=False, within=False), None, k, v, heads=heads, vectors={"enter": end},
        fill=end if fill is None else fill, interpret=interpret,
    )  # fmt: skip
    return made.S, made.n


def read(
    q: jax.Array, S: jax.Array, z: jax.Array, *, projection: Any, normalise: bool, chunk: int,
    interpret: Any,
):  # fmt: skip
    """out_i = q_i S, over den_i = <q_i, z> if `normalise`: [B, T, H, Dv] and [B, H, T] or None."""
    assert chunk == CHUNK
    heads, state = _spread(q, S, z)
    role = Role(within=False, update=False, divide=normalise)
    run = _run(projection, heads, x=("q", q))
    made = run(role, q, None, None, heads=heads, state=state, interpret=interpret)
    return made.out, made.den


def read_backward(
    q: jax.Array, S: jax.Array, z: jax.Array, *, dout: jax.Array, inv_den: jax.Array, r: jax.Array,
    projection: Any, chunk: int, interpret: Any,
):  # fmt: skip
    """dq [B, T, H, R] = g S^T + r z^T, and (dS, dz) = (sum q g^T, sum r q) of each of H heads."""
    assert chunk == CHUNK
    heads, state = _spread(q, S, z)
    role = Role(within=False, update=False, lift=True, own=projection is not None)
    query = _run(projection, heads, own=("q", q))(
        role, dout, None, None, q if role.own else None, heads=heads,
        vectors={"read": inv_den, "lift": r}, state=_turned(state), interpret=interpret,
    )  # fmt: skip
    made = _run(projection, heads, y=("q", q))(
        Role(out=False, within=False), None, q, dout, heads=heads, vectors={"enter": inv_den},
        fill=r, interpret=interpret,
    )  # fmt: skip
    return query.out, (made.S, made.n)


def sums_backward(
    k: jax.Array, v: jax.Array, dS: jax.Array, dz: jax.Array, *, end: jax.Array | None,
    projection: Any, chunk: int, interpret: Any,
):  # fmt: skip
    """dk = end (v dS^T + dz), dv = end (k dS), k_dk = <k, dk>.

    k_dk is None where `end` and `projection` are.
    """
    assert chunk == CHUNK
    heads = _heads(k, v)
    shared = {"heads": heads, "interpret": interpret}
    own = end is not None or projection is not None
    role = Role(within=False, update=False, lift=True, own=own)
    key = _run(projection, heads, own=("k", k))(
        role, v, None, None, k if own else None, vectors={"read": end, "lift": end},
        state=_turned((dS, dz)), **shared,
    )  # fmt: skip
    role = Role(within=False, update=False)
    run = _run(projection, heads, x=("k", k))
    value = run(role, k, None, None, vectors={"read": end}, state=(dS, dz), **shared)
    return key.out, value.out, key.own


def _run(projection: Any, heads: int, **of: tuple[str, jax.Array]):
    """`stream`, or `favor` with the features of the operands `of`: of q's or k's ("q", "k")."""
    if projection is None:
        return stream
    shifts, offsets = {"q": projection.shift_q, "k": projection.shift_k}, {}
    for operand, (name, a) in of.items():
        offset = shifts[name] + half_square(a, projection.half)
        offsets[operand] = jnp.repeat(offset, heads // offset.shape[1], axis=1)
    how = {"weight": projection.weight, "half": projection.half, "offsets": offsets}
    return functools.partial(favor, **how)


def _heads(*arrays: jax.Array) -> int:
    return max(a.shape[2] for a in arrays)


def _segments(ways: Any) -> jax.Array | None:
    return None if ways is None else ways.segments


def _product(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    """a b, where None is one."""
    if a is None or b is None:
        return a if b is None else b
    return a * b


def _turned(state):
    """(S transposed, z)."""
    return None if state is None else (jnp.swapaxes(state[0], -1, -2), state[1])


def _spread(q: jax.Array, *state: jax.Array):
    """How many heads q or the state has, and the state of each."""
    heads = max(q.shape[2], state[0].shape[1])
    return heads, tuple(jnp.repeat(a, heads // a.shape[1], axis=1) for a in state)


def _or_zeros(n: jax.Array | None, S: jax.Array) -> jax.Array:
    return jnp.zeros_like(S[..., 0]) if n is None else n
