"""A named backend runs or says why not; `auto` takes the first proven one that does not refuse."""

import logging

import jax
import jax.numpy as jnp
import pytest

from kernels import dispatch, divide, linear_attention, softmax_attention, target, window_attention
from kernels.dispatch import Path

X = jnp.ones((1, 4, 2, 4))
OPS = {
    "softmax_attention": lambda backend: softmax_attention(X, X, X, backend=backend),
    "linear_attention": lambda backend: linear_attention(X, X, X, backend=backend),
    "window_attention": lambda backend: (
        window_attention(X, X, X, left=1, right=0, backend=backend).out
    ),
}


def small_only(x, *, limit):
    return f"{x} is over {limit}; make it smaller" if x > limit else None


PATHS = {
    "pallas": Path(lambda x, limit: ("pallas", x), small_only),
    "xla": Path(lambda x, limit: ("xla", x)),
}


@pytest.mark.parametrize("backend", ["pallas", "cudnn"])
@pytest.mark.parametrize("name", OPS)
def test_a_backend_that_cannot_run_here_is_refused_by_the_name_of_the_op(name, backend):
    with pytest.raises(NotImplementedError, match=f"{name} (has no|with) backend '{backend}'"):
        OPS[name](backend)


@pytest.mark.parametrize("name", OPS)
def test_on_a_cpu_auto_is_xla(name):
    assert (OPS[name]("auto") == OPS[name]("xla")).all()


def test_a_path_that_is_missing_is_named_with_those_that_are_there():
    with pytest.raises(
        NotImplementedError, match="an op has no backend 'cudnn'.*auto, pallas, xla"
    ):
        dispatch.run("an op", "cudnn", PATHS, (1,), {"limit": 2})


def test_a_named_path_that_refuses_says_why():
    with pytest.raises(NotImplementedError, match="an op with backend 'pallas': 3 is over 2; make"):
        dispatch.run("an op", "pallas", PATHS, (3,), {"limit": 2})


def over_all_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return divide(mesh, "data")


@pytest.fixture
def proven(monkeypatch):
    monkeypatch.setitem(dispatch.PROVEN, ("cpu", "pallas"), frozenset({"an op"}))


def test_auto_takes_xla_where_nothing_else_is_proven():
    assert dispatch.run("an op", "auto", PATHS, (2,), {"limit": 2}) == ("xla", 2)


def test_auto_takes_the_first_proven_one_that_does_not_refuse(proven):
    assert dispatch.run("another op", "auto", PATHS, (2,), {"limit": 2}) == ("xla", 2)
    assert dispatch.run("an op", "auto", PATHS, (2,), {"limit": 2}) == ("pallas", 2)
    assert dispatch.run("an op", "auto", PATHS, (3,), {"limit": 2}) == ("xla", 3)


def test_auto_takes_a_kernel_where_the_table_says_that_it_is_proven_on_this_very_device(
    monkeypatch,
):
    kind = target.device_kind()
    monkeypatch.setattr(dispatch, "measured", lambda: {kind: {"an op": {}}, "other": {"op": {}}})
    assert dispatch.run("an op", "auto", PATHS, (2,), {"limit": 2}) == ("xla", 2)
    with over_all_devices():
        assert dispatch.run("an op", "auto", PATHS, (2,), {"limit": 2}) == ("pallas", 2)
        assert dispatch.run("an op", "auto", PATHS, (3,), {"limit": 2}) == ("xla", 3)
        assert dispatch.run("op", "auto", PATHS, (2,), {"limit": 2}) == ("xla", 2)
    with target.use("tpu"):
        assert dispatch.run("an op", "auto", PATHS, (2,), {"limit": 2}) == ("xla", 2)


def test_auto_passes_over_what_is_not_worth_it_and_a_name_does_not(proven):
    dear = PATHS["pallas"]._replace(worth=lambda x, limit: x > 1)
    paths = PATHS | {"pallas": dear}
    assert dispatch.run("an op", "auto", paths, (2,), {"limit": 2}) == ("pallas", 2)
    assert dispatch.run("an op", "auto", paths, (1,), {"limit": 2}) == ("xla", 1)
    assert dispatch.run("an op", "pallas", paths, (1,), {"limit": 2}) == ("pallas", 1)


def test_auto_says_once_what_it_took(caplog, proven):
    dispatch._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "kernels.dispatch"):
        for x in (1, 2, 3):
            dispatch.run("an op", "auto", PATHS, (x,), {"limit": 2})
    said = [f"an op runs on backend {name}" for name in ("pallas", "xla")]
    assert [r.message for r in caplog.records] == said


def test_a_kernel_named_among_several_devices_says_once_that_jax_does_not_divide_it(caplog):
    dispatch._warn_once.cache_clear()
    with over_all_devices():
        dispatch.run("an op", "pallas", PATHS, (1,), {"limit": 2})
    assert not caplog.records
    for _ in range(2):
        assert dispatch.run("an op", "pallas", PATHS, (1,), {"limit": 2}) == ("pallas", 1)
    (record,) = caplog.records
    assert "among the 8 devices here" in record.message and "kernels.divide" in record.message


def test_what_a_path_raises_propagates(proven):
    def broken():
        raise RuntimeError("inside the kernel")

    with pytest.raises(RuntimeError, match="inside the kernel"):
        dispatch.run("an op", "auto", {"pallas": Path(broken), "xla": Path(max)}, (), {})
