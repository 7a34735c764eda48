"""One mesh axis over the local devices: how batches and state are laid out on it."""

from typing import Any, Literal

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import kernels
from efficient_attn.errors import UserError

AXIS = "data"


def make_mesh(devices: int | None = None) -> Mesh:
    """A mesh of one axis over the first `devices` local devices, all by default."""
    local = jax.local_devices()[:devices]
    return jax.make_mesh((len(local),), (AXIS,), axis_types=(AxisType.Auto,), devices=local)


def over_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, P(AXIS))


def of_kernels(mesh: Mesh) -> Any:
    """A context, or a decorator of what jax.jit takes: kernels are divided as batches are."""
    return kernels.divide(mesh, AXIS)


def of_state(state: Any, *, mesh: Mesh, mode: Literal["data", "fsdp"]) -> Any:
    """The sharding of each leaf of a training state.

    "data" keeps everything whole on every device. "fsdp" splits the leaves below "params", "opt"
    and "ema" along their longest axis that the devices divide; one rule by shape for all three,
    so that a parameter lies where its moments lie. A leaf without such an axis stays whole.
    """

    def spec(path, leaf):
        split = mode == "fsdp" and path[0].key in ("params", "opt", "ema")
        axes = [i for i, n in enumerate(leaf.shape) if n and n % mesh.size == 0]
        if not split or not axes:
            return NamedSharding(mesh, P())
        axis = max(axes, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, P(*[AXIS if i == axis else None for i in range(leaf.ndim)]))

    return jax.tree_util.tree_map_with_path(spec, state)


def check_batch(batch_size: int, *, mesh: Mesh, accumulate: int, where: str) -> None:
    """Refuse a batch that micro-batches and devices do not divide.

    Raises:
        UserError: with the next smaller and larger sizes that would do.
    """
    parts = mesh.size * accumulate
    if batch_size % parts:
        low = batch_size // parts * parts
        fit = f"{low} or {low + parts}" if low else f"{parts}"
        raise UserError(
            f"{where} {batch_size} cannot be split evenly over {mesh.size} devices x {accumulate} "
            f"micro-batches; use {fit}"
        )
