"""A named backend runs or says why not; `auto` takes the first of the table."""

import logging

import jax.numpy as jnp
import pytest

from kernels import dispatch, linear_attention, local_conv, softmax_attention

X = jnp.ones((1, 4, 2, 4))
OPS = {
    "softmax_attention": lambda backend: softmax_attention(X, X, X, backend=backend),
    "linear_attention": lambda backend: linear_attention(X, X, X, backend=backend),
    "local_conv": lambda backend: local_conv(
        jnp.ones((1, 4, 4)), jnp.ones((1, 1, 2, 3)), backend=backend
    ),
}


@pytest.mark.parametrize("backend", ["pallas", "cudnn"])
@pytest.mark.parametrize("name", OPS)
def test_a_backend_that_is_missing_is_named_with_those_that_are_there(name, backend):
    with pytest.raises(
        NotImplementedError, match=f"{name} has no backend '{backend}' yet.*auto, xla"
    ):
        OPS[name](backend)


@pytest.mark.parametrize("name", OPS)
def test_auto_is_the_first_of_the_table(name):
    assert (OPS[name]("auto") == OPS[name]("xla")).all()


def test_auto_says_once_what_it_took(caplog):
    dispatch._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "kernels.dispatch"):
        for _ in range(3):
            assert dispatch.choose("an op", "auto", {"pallas": min, "xla": max}) is min
    assert [r.message for r in caplog.records] == ["an op runs on backend pallas"]


def test_what_an_implementation_raises_propagates():
    def broken():
        raise RuntimeError("inside the kernel")

    run = dispatch.choose("an op", "auto", {"pallas": broken, "xla": max})
    with pytest.raises(RuntimeError, match="inside the kernel"):
        run()
