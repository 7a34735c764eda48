"""The Hopper kernels that make FAVOR+'s features, in the interpreter that looks for races.

The projection is float32, and so the reference's: that the kernels hold it in two parts is seen.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.pallas_gpu import linear
from tests import support
from tests.kernels.hopper import INTERPRET, no_races  # noqa: F401
from tests.kernels.hopper_linear import (
    CHUNK,
    a_state,
    check,
    check_two_sided,
    draw,
    factors,
    near,
    projection_of,
)

slow = pytest.mark.slow


@pytest.mark.parametrize(
    "dim, rank",
    [
        (64, 128),
        (24, 70),
        *(pytest.param(*sizes, marks=slow) for sizes in [(64, 256), (64, 266), (64, 512)]),
        *(pytest.param(*sizes, marks=slow) for sizes in [(32, 128), (128, 128), (128, 256)]),
        pytest.param(96, 621, marks=slow),
    ],
)
def test_favor(dim, rank):
    """Features made inside: ways, segments, grouped heads and a state before."""
    ways = factors(2, 128, segments=True)
    check(dim, 128, ways=ways, state=a_state(2, dim, rank), heads=(2, 1, 2), rank=rank)


@slow
@pytest.mark.parametrize("dim", [64, 128])
def test_many_chunks(dim):
    """The ring and what one warpgroup hands the other go round; grouped values, no ways."""
    check(dim, 320, heads=(2, 2, 1), rank=128)


@slow
@pytest.mark.parametrize("dim, rank", [(64, 128), (32, 128), (96, 20), (128, 128), (64, 512)])
def test_two_sided(dim, rank):
    check_two_sided(dim, rank)


@slow
def test_two_sided_of_grouped_values():
    check_two_sided(128, 256, heads=(2, 2, 1))


@pytest.mark.parametrize("dim, rank", [(64, 128), (32, 512), (96, 266)])
def test_log_scale(dim, rank):
    x = draw(dim, 192, positive=False)[0]
    weight = jnp.asarray(np.random.default_rng(3).standard_normal((rank, dim)), jnp.bfloat16)
    made = linear.log_scale(x, weight.astype(jnp.float32), 0.25, interpret=INTERPRET)
    x, weight = (np.float64(a.astype(jnp.float32)) for a in (x, weight))
    expected = np.einsum("bthd,rd->bhtr", x, weight).max(-1)
    near(made, expected - 0.25 * np.einsum("bthd,bthd->bht", x, x), 1e-5)


@slow
def test_the_projection_is_not_rounded():
    """What features of a bfloat16 projection are off by, 6e-3 of the output, is not there."""
    q, k, v = draw(64, 128, positive=False)
    projection = projection_of(q, k, 128)
    how = {"projection": projection, "chunk": CHUNK, "interpret": INTERPRET}
    made = linear.read(q, *linear.sums(k, v, end=None, **how), normalise=True, **how)[0]
    q, k, v, w, *shifts = (
        np.float64(a.astype(jnp.float32)) for a in (q, k, v, *projection[:1], *projection[2:])
    )
    features = [
        np.exp(
            np.einsum("bthd,rd->bthr", x, w)
            - (projection.half * (x * x).sum(-1) + np.moveaxis(shift, 1, 2))[..., None]
        )
        for x, shift in zip((q, k), shifts, strict=True)
    ]
    weights = np.einsum("bihr,bjhr->bhij", *features)
    expected = np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v)
    made = np.float64(made.astype(jnp.float32))
    assert support.relative(made, expected) < 4e-3
