"""Ops are traced for the chip at hand, or for the one that is named."""

import pytest

from kernels import target


def test_the_chip_at_hand_is_a_cpu_here():
    assert target.target() == target.Target("cpu", None)


def test_a_named_target_holds_inside_and_not_after():
    with target.use("hopper", interpret="a simulator"):
        assert target.target() == target.Target("hopper", "a simulator")
        with target.use("tpu"):
            assert target.target().chip == "tpu"
        assert target.target().chip == "hopper"
    assert target.target().chip == "cpu"


def test_an_error_inside_gives_the_target_back():
    with pytest.raises(RuntimeError), target.use("tpu"):
        raise RuntimeError
    assert target.target().chip == "cpu"


def test_kernels_need_a_chip_and_a_jax_that_has_their_pallas(monkeypatch):
    assert "not for this cpu" in target.refuse_kernels()
    for version, reason in (("0.11.1", "need jax 0.11.2, this is 0.11.1"), ("0.11.2", None)):
        monkeypatch.setattr(target.jax, "__version__", version)
        with target.use("tpu"):
            said = target.refuse_kernels()
        assert said is None if reason is None else reason in said
