"""The blocks of a stack by their formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import Mask
from tests import support
from tests.backbones.test_contract import model

MASK = Mask()


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_block_normalises_before_the_branch_or_after_the_sum(norm):
    stack = model("encoder", "softmax", norm=norm).stack
    x = 3.0 + jnp.asarray(support.draw((2, 5, 16), seed=0))
    y = x
    for block in stack.blocks:
        for name, number in (("mixer_norm", 0), ("mlp_norm", 1)):
            normalise = getattr(block, name)
            given = normalise(y) if norm == "pre" else y
            if number == 0:
                branch = block.mixer(given, mask=MASK, shared={})
            else:
                branch = block.mlp(given, rngs=None)
            y = y + branch if norm == "pre" else normalise(y + branch)
    expected = stack.norm(y) if norm == "pre" else y
    np.testing.assert_allclose(stack(x, mask=MASK, rngs=None), expected, rtol=1e-5, atol=1e-5)
