"""Linear attention's kernels on Hopper beside the contract of `kernels.fused.linear`.

The reference goes chunk by chunk over all pairs, in float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels.fused.passes import Projection
from kernels.fused.ways import Ways
from kernels.pallas_gpu import linear
from tests import support
from tests.kernels.hopper import INTERPRET

CHUNK, BATCH = linear.CHUNK, 1


def factors(heads: int, length: int, *, segments: bool = False, seed: int = 0) -> Ways:
    """Every factor drawn on its own: the contract holds for any."""
    random = np.random.default_rng(seed)
    row = random.uniform(0, 1, (BATCH, heads, length))
    col, start, end = (random.uniform(-1, 0, (BATCH, heads, length)) + s for s in (0, 1, 1))
    keep = random.uniform(0, 1, (BATCH, heads, length // CHUNK))
    col[..., length // 3], end[..., length // 3] = -np.inf, 0.0
    ids = np.sort(random.integers(0, 4, (BATCH, length))).astype(np.int32)
    made = (jnp.asarray(a, jnp.float32) for a in (row, col, start, end, keep))
    return Ways(*made, jnp.asarray(ids) if segments else None)


def repeated(x, heads: int):
    return jnp.repeat(x, heads // x.shape[2], axis=2)


def by_head(x, heads: int):
    return jnp.repeat(x, heads // x.shape[1], axis=1)


def reference(q, k, v, S, z, *shifts, ways, normalise, projection=None):
    """out, den and the state: float64 sums over all pairs of a chunk."""
    heads = max(x.shape[2] for x in (q, k, v))
    q, k, v = (repeated(x, heads) for x in (q, k, v))
    if projection is not None:
        q, k = (features(x, projection, shift) for x, shift in zip((q, k), shifts, strict=True))
    length, outs, dens = q.shape[1], [], []
    for n in range(length // CHUNK):
        at = slice(n * CHUNK, (n + 1) * CHUNK)
        w = jnp.einsum("bihd,bjhd->bhij", q[:, at], k[:, at])
        seen = jnp.tril(jnp.ones((1, 1, CHUNK, CHUNK), bool))
        start = end = jnp.ones((*z.shape[:2], CHUNK))
        keep = jnp.ones(z.shape[:2])
        if ways is not None:
            start, end, keep = ways.start[..., at], ways.end[..., at], ways.keep[..., n]
            w = w * jnp.exp(ways.col[..., None, at] - ways.row[..., at, None])
            if ways.segments is not None:
                ids = ways.segments[:, at]
                seen = seen & (ids[:, :, None] == ids[:, None, :])[:, None]
        w = jnp.where(seen, w, 0.0)
        num = jnp.einsum("bhij,bjhd->bihd", w, v[:, at])
        num += jnp.einsum("bhi,bihr,bhrd->bihd", start, q[:, at], S)
        den = w.sum(-1) + start * jnp.einsum("bihr,bhr->bhi", q[:, at], z)
        outs.append(num / jnp.moveaxis(den, 1, 2)[..., None] if normalise else num)
        dens.append(den)
        S = keep[..., None, None] * S + jnp.einsum("bhj,bjhr,bjhd->bhrd", end, k[:, at], v[:, at])
        z = keep[..., None] * z + jnp.einsum("bhj,bjhr->bhr", end, k[:, at])
    return jnp.concatenate(outs, 1), jnp.concatenate(dens, 2), S, z


def features(x, projection, shift):
    """FAVOR+'s, in float64."""
    logits = jnp.einsum("bthd,rd->bthr", x, jnp.asarray(projection.weight, jnp.float64))
    offset = projection.half * jnp.sum(x * x, axis=-1) + jnp.moveaxis(shift, 1, 2)
    return jnp.exp(logits - offset[..., None])


def projection_of(q, k, rank: int) -> Projection:
    dim = q.shape[-1]
    weight = np.random.default_rng(3).standard_normal((rank, dim)) * dim**-0.25
    weight, half = jnp.asarray(weight, jnp.float32), 0.5 * dim**-0.5
    return Projection(
        weight, half, *(linear.log_scale(x, weight, half, interpret=INTERPRET) for x in (q, k))
    )


def draw(dim: int, length: int, heads=(2, 2, 2), *, positive: bool, seed: int = 0):
    """q, k, v in bfloat16; features are positive where a normaliser divides."""
    random = np.random.default_rng(seed)
    made = [random.standard_normal((BATCH, length, h, dim)) for h in heads]
    if positive:
        made[:2] = (np.abs(x) + 0.1 for x in made[:2])
    return [jnp.asarray(x, jnp.bfloat16) for x in made]


def a_state(heads: int, dim: int, rank: int | None = None, seed: int = 5):
    random = np.random.default_rng(seed)
    S = random.standard_normal((BATCH, heads, rank or dim, dim))
    z = 3 * np.abs(random.standard_normal(S.shape[:3])) + 1
    return jnp.asarray(3 * S, jnp.float32), jnp.asarray(z, jnp.float32)


def wide(*arrays):
    return [jnp.asarray(np.asarray(a.astype(jnp.float32)), jnp.float64) for a in arrays]


def near(made, expected, tolerance: float) -> None:
    made = np.asarray(made.astype(jnp.float32), np.float64)
    assert made.shape == expected.shape and np.isfinite(made).all()
    assert support.relative(made, np.asarray(expected)) < tolerance


def near_product(made, x, gradient, tolerance: float) -> None:
    """made = <x, gradient> by row; beside the sizes of both, for it may vanish."""
    x = np.float64(repeated(x, gradient.shape[2]).astype(jnp.float32))
    off = np.asarray(made) - np.einsum("bthd,bthd->bht", x, gradient)
    size = np.linalg.norm(x, axis=-1) * np.linalg.norm(gradient, axis=-1)
    assert np.linalg.norm(off) < tolerance * np.linalg.norm(size)


def check(
    dim,
    length,
    *,
    ways=None,
    normalise=True,
    state=None,
    heads=(2, 2, 2),
    rank=None,
    gradients=True,
):
    """Forward and backward of one case against the reference and its derivatives."""
    H = max(heads)
    q, k, v = draw(dim, length, heads, positive=normalise and rank is None)
    projection = None if rank is None else projection_of(q, k, rank)
    how = {"projection": projection, "normalise": normalise, "chunk": CHUNK, "interpret": INTERPRET}
    out, den, last = jax.jit(lambda *a: linear.forward(*a, ways, state=state, **how))(q, k, v)
    rng = np.random.default_rng(7)
    dout = jnp.asarray(rng.standard_normal((BATCH, length, H, dim)), jnp.bfloat16)
    dstate = [jnp.float32(rng.standard_normal(a.shape)) for a in last]
    dstate[1] *= normalise  # there is no z to have a gradient where nothing is divided
    with jax.enable_x64(True):
        S, z = (jnp.zeros_like(a) for a in a_state(H, dim, rank)) if state is None else state
        heads_of = [repeated(x, H) for x in (q, k, v)]
        given = wide(
            *heads_of, S, z, *(() if rank is None else (by_head(a, H) for a in projection[2:]))
        )
        exact = None if ways is None else Ways(*wide(*ways[:5]), ways.segments)
        plan = {"ways": exact, "normalise": normalise, "projection": projection}
        expected, back = jax.vjp(jax.jit(functools.partial(reference, **plan)), *given)
        grads = back((*wide(dout), jnp.zeros_like(expected[1]), *wide(*dstate)))
        expected, grads = jax.tree.map(np.asarray, (expected, grads))
    near(out, expected[0], 5e-3)
    near(last[0], expected[2], 5e-3)
    if normalise:
        near(den, expected[1], 5e-3)
        near(last[1], expected[3], 1e-4 if rank is None else 5e-3)
    if not gradients:
        return
    inv_den = jnp.float32(1 / expected[1]) if normalise else jnp.ones(expected[1].shape)
    both = np.einsum("bthd,bthd->bht", np.float64(dout.astype(jnp.float32)), expected[0])
    r = jnp.float32(-both * inv_den) if normalise else jnp.zeros_like(inv_den)
    how |= {"dout": dout, "inv_den": inv_den, "r": r, "state": state, "dstate": tuple(dstate)}
    dq, dk, dv, q_dq, k_dk, (dS, dz), left = jax.jit(lambda *a: linear.backward(*a, ways, **how))(
        q, k, v
    )
    for made, gradient in zip((dq, dk, dv, dS), grads, strict=False):
        near(made, gradient, 1e-2)
    if rank is None:
        near(left, expected[2], 5e-3)
    if normalise:
        near(dz, grads[4], 1e-2)
    if rank is not None:  # what a factor of the features gets: shifts are taken out of them
        near(-k_dk, grads[6], 1e-2)
        assert np.abs(q_dq).max() < 1e-2 * np.abs(k_dk).max() or not normalise
    elif ways is not None:
        near_product(q_dq, q, grads[0], 1e-2)
        near_product(k_dk, k, grads[1], 1e-2)


def check_two_sided(dim, rank=None, heads=(2, 1, 2)):
    """Sums, what reads them, and the gradients of both."""
    q, k, v = draw(dim, 128, heads, positive=rank is None)
    H = 2
    projection = None if rank is None else projection_of(q, k, rank)
    how = {"projection": projection, "chunk": CHUNK, "interpret": INTERPRET}
    end = factors(H, 128).end

    def function(q, k, v, *shifts):
        if rank is not None:
            q, k = (features(x, projection, s) for x, s in zip((q, k), shifts, strict=True))
        S = jnp.einsum("bhj,bjhr,bjhd->bhrd", end, k, v)
        z = jnp.einsum("bhj,bjhr->bhr", end, k)
        num, den = jnp.einsum("bthr,bhrd->bthd", q, S), jnp.einsum("bthr,bhr->bht", q, z)
        return num / jnp.moveaxis(den, 1, 2)[..., None], den, S, z

    dout = np.random.default_rng(7).standard_normal((BATCH, 128, H, dim))
    dout = jnp.asarray(dout, jnp.bfloat16)
    with jax.enable_x64(True):
        given = wide(*(repeated(x, H) for x in (q, k, v)))
        given += wide(*(() if rank is None else (by_head(a, H) for a in projection[2:])))
        expected, back = jax.vjp(jax.jit(function), *given)
        grads = back((*wide(dout), *(jnp.zeros_like(a) for a in expected[1:])))
        expected, grads = jax.tree.map(np.asarray, (expected, grads))
    S, z = linear.sums(k, v, end=end, **how)
    out, den = linear.read(q, S, z, normalise=True, **how)
    for made, exact in zip((out, den, S, z), expected, strict=True):
        near(made, exact, 5e-3)
    inv_den = 1 / den
    r = -jnp.einsum("bthd,bthd->bht", dout.astype(jnp.float32), jnp.float32(expected[0])) * inv_den
    dq, (dS, dz) = linear.read_backward(q, S, z, dout=dout, inv_den=inv_den, r=r, **how)
    dk, dv, k_dk = linear.sums_backward(k, v, dS, dz, end=end, **how)
    for made, exact in zip((dq, dk, dv), grads, strict=False):
        near(made, exact, 1e-2)
    if rank is None:
        near_product(k_dk, k, grads[1], 1e-2)
    else:
        near(-k_dk, grads[4], 1e-2)
