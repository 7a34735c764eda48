"""The Hopper kernels of linear attention in the interpreter that looks for races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import Mask
from kernels import reference as references
from kernels.fused import linear as fused_linear
from kernels.pallas_gpu import linear
from kernels.pallas_gpu.plan import in_parts
from kernels.target import use
from tests.kernels.compare import agree, arrays, both, mask_of
from tests.kernels.hopper import INTERPRET, no_races  # noqa: F401
from tests.kernels.hopper_linear import a_state, check, check_two_sided, factors

slow = pytest.mark.slow
NONE = Mask()

DIMS = [64, pytest.param(128, marks=slow)]


def test_a_number_in_two_parts_has_sixteen_bits_whatever_a_compiler_takes_for_nothing():
    """XLA for a GPU takes away a rounding that is not said, and with it the second part."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal(256), jnp.float32)
    split = jax.jit(in_parts)
    assert "reduce_precision" in split.lower(x).as_text()
    off = np.abs(split(x).astype(jnp.float32).sum(0) - x)
    assert (off <= 2.0**-16 * np.abs(x)).all()


@pytest.mark.parametrize("dim", DIMS)
def test_plain(dim):
    check(dim, 128, normalise=False)


@pytest.mark.parametrize("dim", DIMS)
def test_all(dim):
    """Ways, segments, grouped heads and a state before, normalised."""
    ways = factors(2, 192, segments=True)
    check(dim, 192, ways=ways, state=a_state(2, dim), heads=(2, 1, 2))


@slow
@pytest.mark.parametrize("dim", [64, 128])
def test_normalised(dim):
    """No ways: features as they are, divided; an odd number of heads leaves one over."""
    check(dim, 128, heads=(3, 1, 3))


@slow
def test_many_chunks():
    """The ring goes round; a decay, which is not normalised."""
    check(64, 512, ways=factors(1, 512), normalise=False, heads=(1, 1, 1))


@slow
@pytest.mark.parametrize("dim", [64, 128])
def test_two_sided(dim):
    check_two_sided(dim)


@pytest.mark.parametrize(
    ("length", "mask", "key", "value"),
    [
        (40, "causal", 32, 96),
        (40, "segments", 32, 32),
        *(
            pytest.param(length, mask, 64, 64, marks=slow)
            for length in (7, 100)
            for mask in ("none", "segments", "all")
        ),
    ],
)
def test_odd_lengths_and_widths(length, mask, key, value):
    """Through the frontend, which fills chunks up: features given, with log scales."""
    shapes = {"q": (1, length, 2, key), "k": (1, length, 1, key), "v": (1, length, 2, value)}
    given = arrays(**shapes, log_scale=(1, length, 1))
    given |= {name: np.abs(given[name]) + 0.1 for name in ("q", "k")}
    mask = {
        name: a[:1] if isinstance(a, np.ndarray) else a for name, a in mask_of(mask, length).items()
    }

    def linear_of(q, k, v, *, log_scale, mask=NONE):
        how = {"features": None, "log_scale": log_scale, "mask": mask, "chunk": 128}
        with use("hopper", INTERPRET):
            assert fused_linear.refuse_linear(q, k, v, **how) is None
            return fused_linear.linear(q, k, v, **how)

    def exact(q, k, v, *, log_scale, mask=NONE):
        q, k = (jnp.repeat(x, 2 // x.shape[2], axis=2) for x in (q, k))
        scale = jnp.repeat(log_scale, 2, axis=2)
        return references.linear_attention(q, k, v, log_scale=scale, mask=mask)

    made = both(linear_of, exact, given, mask, dtype=jnp.bfloat16)
    agree(made, forward=5e-3, backward=1e-2)


@pytest.mark.parametrize(
    "dtype, dims, rank, word",
    [
        ("float32", (64, 64), None, "bfloat16"),
        ("float16", (64, 64), None, "bfloat16"),
        ("bfloat16", (192, 64), None, "192 and 64 channels"),
        ("bfloat16", (64, 256), None, "64 and 256 channels"),
        ("bfloat16", (64, 64), 1024, "1024 features"),
        ("bfloat16", (32, 64), 128, "32 and 64 channels"),
        ("bfloat16", (256, 256), 128, "256 and 256 channels"),
    ],
)
def test_refuses(dtype, dims, rank, word):
    q, v = (jax.ShapeDtypeStruct((1, 64, 2, d), dtype) for d in dims)
    said = linear.refuse(q, q, v, rank=rank)
    assert word in said and "backend='xla'" in said


@pytest.mark.parametrize(
    "dim, rank", [(24, None), (64, None), (128, None), (24, 128), (64, 20), (128, 256), (64, 266)]
)
def test_takes(dim, rank):
    x = jax.ShapeDtypeStruct((1, 64, 2, dim), jnp.bfloat16)
    assert linear.refuse(x, x, x, rank=rank) is None
