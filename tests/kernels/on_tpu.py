"""What the kernels of both gated recurrences hold to on a simulated TPU, beside their results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import Mask
from kernels.target import use
from tests import support
from tests.kernels import recurrent
from tests.kernels.simulated import SIMULATOR


def fused(op, interpret=True):
    """`op` by its kernels, outputs and state in one array."""
    return recurrent.fused(op, "tpu", interpret)


def loss(op, interpret=True):
    return lambda given: jnp.sum(jnp.sin(fused(op, interpret)(**given, mask=Mask(causal=True))))


def quick(function):
    return jax.jit(function, compiler_options=support.fast())


def same(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def no_race_and_nothing_unwritten(op, given):
    given = jax.tree.map(jnp.asarray, given)
    found, expected = (quick(jax.value_and_grad(loss(op, how)))(given) for how in (SIMULATOR, True))
    same(found, expected)


def vmap_and_checkpoint(op, given):
    given = jax.tree.map(jnp.asarray, given)

    def mapped(given):
        apart = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), given)
        return jnp.sum(jax.vmap(jax.checkpoint(loss(op)))(apart))

    found, expected = (quick(jax.value_and_grad(f))(given) for f in (mapped, loss(op)))
    same(found, expected)


def exported_kernels(op, given) -> int:
    """How many kernels forward and backward are, exported for a TPU with q, k, v in bfloat16."""
    given = {
        name: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if name in "qkv" else jnp.float32)
        for name, x in given.items()
    }
    made = jax.export.export(jax.jit(jax.value_and_grad(loss(op, None))), platforms=["tpu"])(given)
    return made.mlir_module().count("tpu_custom_call")


def refused(op, given, *, chip, dtype, reason):
    given = {name: jnp.asarray(x, dtype) for name, x in given.items()}
    with use(chip), pytest.raises(NotImplementedError, match=reason):
        op(**given, backend="pallas")
