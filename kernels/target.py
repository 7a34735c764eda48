"""The chip that kernels are built for: the one at hand, or one that a test or a compiler names."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax

from kernels.divide import inside_shard_map

Chip = Literal["tpu", "hopper", "gpu", "cpu"]
NEEDED = (0, 11, 2)
"""The first jax whose Pallas the kernels are written in."""


class Target(NamedTuple):
    """chip: "hopper" is an NVIDIA GPU of compute capability 9.0, "gpu" any other GPU.
    interpret: how Pallas simulates the chip, None on the chip itself; e.g.
    `pltpu.InterpretParams()` or `plgpu.InterpretGPUParams()`.
    """

    chip: Chip
    interpret: Any = None


_named: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


def target() -> Target:
    """The target that `use` names, or else the chip of jax's first device."""
    return _named.get() or Target(_chip_at_hand())


@contextlib.contextmanager
def use(chip: Chip, interpret: Any = None) -> Iterator[None]:
    """Within it, ops are traced for `chip`; with `interpret`, its simulation runs on this machine.

    What jax.jit holds already is not traced again: make the jitted function inside.
    """
    token = _named.set(Target(chip, interpret))
    try:
        yield
    finally:
        _named.reset(token)


def cores() -> int:
    """How many kernels the target runs beside each other: SMs of a GPU, cores of a TPU's device."""
    chip, device = target().chip, jax.devices()[0]
    known = {"tpu": getattr(device, "num_cores", 1), "hopper": getattr(device, "core_count", 132)}
    return known.get(chip, 1)


def device_kind() -> str | None:
    """What jax calls the device at hand; None where the target is another one that was named."""
    return None if _named.get() else jax.devices()[0].device_kind


def refuse_kernels() -> str | None:
    """Why no Pallas kernel runs where an op is called; None where they do."""
    chip = target().chip
    if chip not in ("tpu", "hopper"):
        return f"there are kernels for TPUs and Hopper GPUs, not for this {chip}: use backend='xla'"
    if tuple(int(x) for x in jax.__version__.split(".")[:3]) < NEEDED:
        needed = ".".join(map(str, NEEDED))
        return f"the kernels need jax {needed}, this is {jax.__version__}: use backend='xla'"
    return None


def alone() -> bool:
    """Whether an op runs on one device, as far as can be told where it is called: the only one, one
    that a test or a compiler names, or each device by itself, inside `jax.shard_map`.
    """
    return _named.get() is not None or jax.device_count() == 1 or inside_shard_map()


@functools.cache
def _chip_at_hand() -> Chip:
    device = jax.devices()[0]
    if device.platform == "tpu":
        return "tpu"
    if device.platform in ("gpu", "cuda", "rocm"):
        return "hopper" if getattr(device, "compute_capability", "") == "9.0" else "gpu"
    return "cpu"
