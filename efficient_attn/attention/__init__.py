"""Attention mechanisms behind one contract: `build` makes any of them by its expression."""

import functools
import inspect
import typing
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, NamedTuple

import jax
from flax import nnx

from efficient_attn.attention.base import (
    CAPABILITIES,
    Buffer,
    Choice,
    Core,
    Cost,
    Mechanism,
    Mixer,
    Site,
    written,
)
from efficient_attn.attention.biased import Biased
from efficient_attn.attention.bidirectional import Bidirectional
from efficient_attn.attention.bigbird import BigBird
from efficient_attn.attention.cosformer import Cosformer
from efficient_attn.attention.diagnostics import Diagnostic, collapsed
from efficient_attn.attention.gated_delta import GatedDelta
from efficient_attn.attention.gla import Gla
from efficient_attn.attention.linear import Linear
from efficient_attn.attention.linformer import Linformer
from efficient_attn.attention.local import Local
from efficient_attn.attention.longformer import Longformer
from efficient_attn.attention.lsra import Lsra
from efficient_attn.attention.mamba2 import Mamba2
from efficient_attn.attention.multihead import (
    MultiHead,
    make_mixer,
    mixer_cost,
    refuse_sequences,
)
from efficient_attn.attention.nystrom import Nystrom
from efficient_attn.attention.performer import Performer
from efficient_attn.attention.pool import Pool
from efficient_attn.attention.reformer import Reformer
from efficient_attn.attention.relu_linear import ReluLinear
from efficient_attn.attention.retention import Retention
from efficient_attn.attention.separable import Separable
from efficient_attn.attention.sinkhorn import Sinkhorn
from efficient_attn.attention.softmax import Softmax
from efficient_attn.attention.sparse import Sparse
from efficient_attn.attention.spatial_reduction import SpatialReduction
from efficient_attn.attention.spec import parse, tile
from efficient_attn.attention.synthesizer import Synthesizer
from efficient_attn.attention.window import Window
from efficient_attn.config import describe as describe_type
from efficient_attn.errors import UserError, unknown

__all__ = [
    "CAPABILITIES",
    "MIXERS",
    "Buffer",
    "Choice",
    "Core",
    "Cost",
    "Diagnostic",
    "Mechanism",
    "Mixer",
    "MultiHead",
    "Option",
    "Row",
    "Site",
    "build",
    "collapsed",
    "cost",
    "describe",
    "diagnose",
    "options",
    "pattern",
    "refresh",
    "require_able",
]

MIXERS: dict[str, type[Mechanism]] = {
    "softmax": Softmax,
    "linformer": Linformer,
    "nystrom": Nystrom,
    "performer": Performer,
    "linear": Linear,
    "cosformer": Cosformer,
    "local": Local,
    "sparse": Sparse,
    "longformer": Longformer,
    "bigbird": BigBird,
    "reformer": Reformer,
    "sinkhorn": Sinkhorn,
    "synthesizer": Synthesizer,
    "lsra": Lsra,
    "retention": Retention,
    "gla": Gla,
    "mamba2": Mamba2,
    "gated_delta": GatedDelta,
    "bidirectional": Bidirectional,
    "pool": Pool,
    "window": Window,
    "spatial_reduction": SpatialReduction,
    "biased": Biased,
    "separable": Separable,
    "relu_linear": ReluLinear,
}
"""Every mechanism, by the name that `config.attention` gives it. A new one adds its line here."""


def pattern(text: str, depth: int) -> tuple[Choice, ...]:
    """The mechanism of each of `depth` layers; see `spec.parse` and `spec.tile` for errors."""
    return tile(parse(text, MIXERS), depth)


def build(
    choice: Choice | str,
    site: Site,
    *,
    needs: Iterable[str],
    rngs: nnx.Rngs,
    shared: dict[str, nnx.Module] | None = None,
) -> Mixer:
    """The mixer that `choice` names, for `site`, refused before tracing if it lacks what is needed.

    `needs` are names out of `CAPABILITIES`. `shared` collects modules that several layers use (see
    `Core`); the caller keeps it and passes it at every call.

    Raises:
        UserError: an unknown need, a need that the mechanism does not support, options that do not
        fit the site, a mixer of pictures where there is none.
    """
    if isinstance(choice, str):
        (choice,) = pattern(choice, 1)
    needs = frozenset(needs)
    for need in sorted(needs - set(CAPABILITIES)):
        raise unknown("capability", need, CAPABILITIES)
    refuse_sequences(choice, site)
    require_able(choice, needs, what="this model")
    return make_mixer(choice, site, rngs=rngs, shared={} if shared is None else shared)


def require_able(choice: Choice, needs: Iterable[str], *, what: str) -> None:
    """Raise UserError, with what would do, unless `choice` supports all that `what` needs."""
    needs, mechanism = frozenset(needs), choice.mechanism
    missing = needs - mechanism.capabilities(choice.config)
    if not missing:
        return
    able = [name for name, cls in MIXERS.items() if needs <= cls.capabilities(cls.Config())]
    lifted = mechanism.remedy and needs <= mechanism.supports
    remedies = [f"set {mechanism.remedy}"] if lifted else []
    remedies += [f"use one of: {', '.join(able)}"] if able else []
    raise UserError(
        f"{choice} does not support {', '.join(sorted(missing))}, which {what} needs; "
        + (" or ".join(remedies) or "no mechanism does yet")
    )


def cost(choice: Choice | str, site: Site, length: int) -> Cost:
    """Multiply-adds and decoding state of the whole mixer at `length` tokens."""
    if isinstance(choice, str):
        (choice,) = pattern(choice, 1)
    return mixer_cost(choice, site, length)


def refresh(model: nnx.Module, step: jax.Array) -> None:
    """Redraw, in place, every random projection whose turn it is at training step `step`."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Mechanism):
            module.refresh(step)


def diagnose(model: nnx.Module, inputs: jax.Array) -> dict[str, float]:
    """How far every estimated attention of `model` is from exact attention on `inputs`.

    Returns, for each performer at path P, "P/error", "P/uniform_error", "P/features" (see
    `diagnostics.estimate_quality`) and "P/collapsed" (0 or 1). Empty where nothing is estimated.
    """
    found = {}
    for path, (quality,) in _watch(*nnx.split(model), inputs).items():
        numbers = {name: float(value) for name, value in quality.items()}
        numbers["collapsed"] = float(collapsed(numbers))
        found |= {f"{path}/{name}": value for name, value in numbers.items()}
    return found


@functools.partial(jax.jit, static_argnums=0)
def _watch(graph, state, inputs):
    model = nnx.merge(graph, state)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Core):
            module.watched = True
    _, said = nnx.capture(model, Diagnostic)(inputs, rngs=None)
    return {"/".join(map(str, path[:-1])): var.get_value() for path, var in nnx.to_flat_state(said)}


class Option(NamedTuple):
    """One option of a mechanism: its name, its type in words, its default as written."""

    name: str
    kind: str
    default: str


class Row(NamedTuple):
    """One mechanism, as `describe` tells of it."""

    name: str
    summary: str
    paper: str
    supports: tuple[str, ...]
    options: tuple[Option, ...]
    notes: str


def describe() -> list[Row]:
    """Every mechanism: what it is, its paper, what it supports, its options and their meaning."""
    rows = []
    for name, cls in MIXERS.items():
        config = cls.Config()
        rows.append(
            Row(
                name,
                summary=(cls.__doc__ or "").strip().splitlines()[0],
                paper=cls.paper,
                supports=tuple(c for c in CAPABILITIES if c in cls.capabilities(config)),
                options=options(config),
                notes=inspect.cleandoc(cls.Config.__doc__ or ""),
            )
        )
    return rows


def options(config: Any) -> tuple[Option, ...]:
    """The options of a frozen dataclass, with its values for defaults."""
    hints = typing.get_type_hints(type(config))
    return tuple(
        Option(f.name, describe_type(hints[f.name]), written(getattr(config, f.name)))
        for f in fields(config)
    )
