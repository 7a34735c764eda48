"""Which implementation of an op runs: a named one, or it raises; `auto`, the first proven one.

proven.json has, by device, the ops whose kernels `python -m kernels.bench --prove` has found right
there, and faster than XLA in every measured case.
"""

import functools
import json
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax

from kernels.divide import divided
from kernels.target import Chip, alone, device_kind, target

Backend = Literal["auto", "xla", "pallas", "cudnn", "tiled"]
PROVEN: dict[tuple[Chip, str], frozenset[str]] = {
    ("cpu", "tiled"): frozenset(
        {"softmax_attention", "linformer_attention", "linear_attention", "favor_attention"}
    )
}
"""What `auto` may take beside XLA on any such chip; on a device of `TABLE` its kernels too."""
TABLE = pathlib.Path(__file__).parent / "proven.json"
log = logging.getLogger(__name__)


class Path(NamedTuple):
    """An implementation. `refuse` gets the same arguments and says why not, in a sentence, or None;
    without it everything is taken. `worth`, too: whether `auto` gains by what it could take.
    """

    run: Callable[..., Any]
    refuse: Callable[..., str | None] | None = None
    worth: Callable[..., bool] | None = None


def run(
    op: str, backend: Backend, paths: Mapping[str, Path], arguments: tuple, options: dict[str, Any]
):
    """`op` on arguments and named options, by the path that `backend` names.

    `paths` is in order of preference; its last, "xla", takes everything.

    "auto" is the first that is `PROVEN` here, or "xla", does not refuse and is worth it. What the
    path itself raises propagates: no other one is tried. jax does not divide kernels: with several
    devices "auto" takes one inside `kernels.divide` and `jax.shard_map`, and a name says so once.

    Raises:
        NotImplementedError: `op` has no path of that name, or the path refuses these arguments.
    """
    if backend == "auto":
        backend = next(  # type: ignore[assignment]
            name
            for name, path in paths.items()
            if (name == "xla" or _proven(op, name))
            and not _reason(path, arguments, options)
            and (path.worth is None or path.worth(*arguments, **options))
        )
        _say_once(op, backend)
    elif backend not in paths:
        raise NotImplementedError(
            f"{op} has no backend {backend!r}; it has: auto, {', '.join(paths)}"
        )
    elif reason := _reason(paths[backend], arguments, options):
        raise NotImplementedError(f"{op} with backend {backend!r}: {reason}")
    if backend == "pallas" and not _placed():
        _warn_once(op, jax.device_count())
    return paths[backend].run(*arguments, **options)


def _proven(op: str, backend: str) -> bool:
    if op in PROVEN.get((target().chip, backend), ()):
        return True
    return backend == "pallas" and op in measured().get(device_kind(), ()) and _placed()


def _placed() -> bool:
    """Whether it is known which device runs what of a kernel."""
    return alone() or divided()


@functools.cache
def measured() -> dict[str | None, dict[str, Any]]:
    """Device -> op -> how it was found; of the ops whose kernels are proven."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def _reason(path: Path, arguments: tuple, options: dict[str, Any]) -> str | None:
    return path.refuse(*arguments, **options) if path.refuse else None


@functools.cache
def _say_once(op: str, backend: str) -> None:
    log.info("%s runs on backend %s", op, backend)


@functools.cache
def _warn_once(op: str, devices: int) -> None:
    log.warning(
        "%s runs in a kernel, which jax does not divide among the %d devices here: where a program "
        "runs on several, say how by kernels.divide(mesh, axis) or call it in jax.shard_map",
        op, devices,
    )  # fmt: skip
