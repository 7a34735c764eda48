"""Which implementation of an op runs: a named one, or it raises; `auto`, the first that can."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

Backend = Literal["auto", "xla", "pallas", "cudnn"]
log = logging.getLogger(__name__)


def choose(op: str, backend: Backend, implementations: Mapping[str, Callable[..., Any]]):
    """The implementation of `op` that `backend` names, out of an ordered table.

    Raises:
        NotImplementedError: `op` has no implementation of that name.
    """
    if backend == "auto":
        backend = next(iter(implementations))  # type: ignore[assignment]
        _say_once(op, backend)
    if backend not in implementations:
        raise NotImplementedError(
            f"{op} has no backend {backend!r} yet; it has: auto, {', '.join(implementations)}"
        )
    return implementations[backend]


@functools.cache
def _say_once(op: str, backend: str) -> None:
    log.info("%s runs on backend %s", op, backend)
