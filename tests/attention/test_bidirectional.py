"""Both directions: mirrored numbers mirror the output; what has no direction is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import attention
from efficient_attn.errors import UserError
from kernels import Mask
from tests import support


def test_a_mirrored_sequence_through_exchanged_mixers_comes_out_mirrored():
    """Rotary positions run backwards with it: distances keep their sign in each direction."""
    text = "bidirectional(mixer=retention)"
    made = attention.build(text, support.site(), needs=["bidirectional"], rngs=nnx.Rngs(0))
    x = jnp.asarray(support.draw((2, 20, 32), seed=0))
    out = made(x, mask=Mask(), shared={})
    made.forwards, made.backwards = made.backwards, made.forwards
    mirrored = made(jnp.flip(x, 1), mask=Mask(), positions=jnp.arange(20)[None, ::-1], shared={})
    np.testing.assert_allclose(jnp.flip(mirrored, 1), out, rtol=1e-4, atol=1e-5)


def test_what_is_not_causal_is_refused():
    with pytest.raises(UserError, match="linformer is not causal, there is no direction"):
        attention.build("bidirectional(mixer=linformer)", support.site(), needs=[], rngs=nnx.Rngs())


def test_padding_stays_behind_what_it_is_behind():
    """For a mixer that knows absolute places: padded, a row gives what it gives cut."""
    text = "bidirectional(mixer=local(window=10, pattern='blocked'))"
    made = attention.build(text, support.site(), needs=["padding"], rngs=nnx.Rngs(0))
    x = jnp.asarray(support.draw((2, 20, 32), seed=0))
    keys = (jnp.arange(20)[None] < jnp.asarray([[13], [20]])).at[:, 5].set(False)
    padded = made(x, mask=Mask(keys=keys), shared={})
    cut = made(x[:1, :13], mask=Mask(keys=keys[:1, :13]), shared={})
    np.testing.assert_allclose(padded[:1, :13], cut, rtol=1e-5, atol=1e-5)
