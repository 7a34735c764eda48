"""Sizes that results do not depend on but speed does: those found for a chip, or a kernel's rule.

tuned.json has, by chip and kernel, the sizes that `python -m kernels.tune` has found, how, and with
which jax. What it does not have follows the rule in the kernel's plan, and so does an entry that
was only "designed": it is there to be read.
"""

import contextlib
import contextvars
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

TABLE = Path(__file__).parent / "tuned.json"
KINDS = {
    "v5e": ("TPU v5 lite", "TPU v5e"),
    "v6e": ("TPU v6 lite", "TPU v6e"),
    "tpu7x": ("TPU7x",),
    "h200": ("NVIDIA H200",),
}
"""What jax calls the chips of the table: its device_kind, or how that begins."""
Trial = Mapping[str, Mapping[str, int]]
"""Sizes by kernel, those that are not the rule's."""
Sizes = TypeVar("Sizes", bound=tuple)


class _Named(NamedTuple):
    chip: str | None
    trial: Trial


_named: contextvars.ContextVar[_Named | None] = contextvars.ContextVar("tuned", default=None)


@contextlib.contextmanager
def use(chip: str | None, trial: Trial | None = None) -> Iterator[None]:
    """Within it, kernels are traced with the table's sizes for `chip`, or those of `trial` alone.

    What jax.jit holds already is not traced again: `jax.clear_caches`, or a process of its own.
    """
    token = _named.set(_Named(chip if trial is None else None, trial or {}))
    try:
        yield
    finally:
        _named.reset(token)


def sizes(kernel: str, rule: Sizes) -> Sizes:
    """`rule`, a NamedTuple, with what the table, or a trial, has for the kernel in its place."""
    named = _named.get() or _Named(chip(), {})
    found = named.trial.get(kernel)
    if found is None and named.chip is not None:
        entry = table().get(named.chip, {}).get(kernel, {})
        found = entry["sizes"] if entry.get("how") in ("estimated", "measured") else None
    return rule._replace(**found) if found else rule  # type: ignore[attr-defined]


@functools.cache
def chip() -> str | None:
    """The table's name of jax's first device; None where the table does not know it."""
    kind = jax.devices()[0].device_kind
    return next((name for name, kinds in KINDS.items() if kind.startswith(kinds)), None)


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """Chip -> kernel -> entry."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}
