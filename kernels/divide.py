"""Several devices: jax does not know how to divide a kernel among them, so here it is told."""

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec


class Division(NamedTuple):
    """The devices, and the axes of their mesh over which the batch is split."""

    mesh: Mesh
    batch: tuple[str, ...]

    @property
    def parts(self) -> int:
        """Into how many the batch is split."""
        return math.prod(self.mesh.shape[axis] for axis in self.batch)


_named: contextvars.ContextVar[Division | None] = contextvars.ContextVar("division", default=None)


@contextlib.contextmanager
def divide(mesh: Mesh, batch: str | tuple[str, ...]) -> Iterator[None]:
    """Within it, each device of `mesh` runs a kernel on its part of the batch.

    batch: the axes of the mesh that split it. A batch that they do not divide is computed whole on
    every device, and so are heads; a mesh of one device says that no other one is used. Like
    `kernels.target.use` it is read when an op is traced; as a decorator, inside `jax.jit`, it holds
    for the whole function. What is not a kernel is jax's to divide, as ever. Inside `jax.shard_map`
    it says nothing.

    Raises:
        ValueError: the mesh has no such axis.
    """
    axes = (batch,) if isinstance(batch, str) else tuple(batch)
    if unknown := set(axes) - set(mesh.axis_names):
        known = ", ".join(map(str, mesh.axis_names))
        raise ValueError(f"the mesh has no axis {unknown.pop()!r}; it has: {known}")
    token = _named.set(Division(mesh, axes))
    try:
        yield
    finally:
        _named.reset(token)


def by_batch(run, *split, whole=None):
    """run(*split), or run(*split, whole), each device with its rows of all arrays of `split`.

    All arrays of the result have the batch in front, too; each device has the whole of `whole`.
    """

    def call(split, whole):
        return run(*split) if whole is None else run(*split, whole)

    division = _named.get()
    if division is None or division.mesh.size == 1 or inside_shard_map():
        return call(split, whole)
    even = len(jax.tree.leaves(split)[0]) % division.parts == 0
    rows = PartitionSpec(division.batch) if even else PartitionSpec()
    # Pallas' simulators do not know how values vary over a mesh, hence no check of that
    return jax.shard_map(
        call, mesh=division.mesh, in_specs=(rows, PartitionSpec()), out_specs=rows, check_vma=False
    )(split, whole)  # fmt: skip


def divided() -> bool:
    """Whether `divide` says how."""
    return _named.get() is not None


def inside_shard_map() -> bool:
    """Whether what is called here runs on each device by itself."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)
