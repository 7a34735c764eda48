"""Derivatives written by hand, inside `jax.shard_map` with weights that are the same everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from kernels import Mask, depthwise_conv, local_conv
from tests.kernels.compare import arrays

OPS = {
    "local_conv": (lambda x, w: local_conv(x, w, mask=Mask(causal=True)), (1, 1, 2, 3)),
    "depthwise_conv": (lambda x, w: depthwise_conv(x[:, :, None], w), (3, 3, 1, 4)),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("inside", [False, True])
def test_the_gradient_of_shared_weights_is_the_sum_over_devices(op, inside):
    function, shape = OPS[op]
    given = arrays(0, x=(8, 6, 4), w=shape).values()
    given = [jnp.asarray(value, jnp.float32) for value in given]
    loss = lambda x, w: jnp.sum(function(x, w) ** 2)  # noqa: E731
    expected = jax.grad(loss, (0, 1))(*given)
    over, whole = PartitionSpec("device"), PartitionSpec()
    total = lambda x, w: jax.lax.psum(loss(x, w), "device")  # noqa: E731
    mapped, outs = (jax.grad(total, (0, 1)), (over, whole)) if inside else (total, whole)
    mesh = Mesh(np.array(jax.devices()), ("device",))
    mapped = jax.shard_map(mapped, mesh=mesh, in_specs=(over, whole), out_specs=outs)
    found = (mapped if inside else jax.grad(mapped, (0, 1)))(*given)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
