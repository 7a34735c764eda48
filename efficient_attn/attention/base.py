"""The contract of every attention mechanism: a core inside `MultiHead`, or a mixer of its own."""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from efficient_attn.attention.steps import scan_steps
from efficient_attn.config import require
from efficient_attn.layers.positions import alibi_slopes
from kernels import Mask
from kernels.dispatch import Backend

CAPABILITIES = (
    "padding", "causal", "bidirectional", "cross", "segments", "decode", "alibi", "grid",
)  # fmt: skip


class Buffer(nnx.Variable):
    """State that is carried, saved and restored with a model, but never trained."""


def redraw(
    drawn: Buffer, draw: Callable[[jax.Array], jax.Array], *, step: jax.Array, every: int
) -> None:
    """Fill `drawn` with draw(step // every) where `step` is a multiple of `every`; 0 is never."""
    if every:
        drawn[...] = jax.lax.cond(
            step % every == 0, lambda: draw(step // every), lambda: drawn[...]
        )


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where a mixer stands: what it must know of the backbone around it.

    seq: the longest sequence of keys it will see. layer: its index in the stack, from 0. positions:
    what self-attention itself knows of them: queries and keys are turned ("rotary"), or logits
    fall with the distance ("alibi"). grid: (rows, columns) where the sequence is a picture of
    `seq` = rows x columns, row by row, and nothing else. qkv_bias: whether the projections to
    queries, keys and values have one.
    """

    width: int
    heads: int
    seq: int
    layer: int = 0
    positions: Literal["none", "rotary", "alibi"] = "none"
    dtype: Any = jnp.float32
    backend: Backend = "auto"
    grid: tuple[int, int] | None = None
    qkv_bias: bool = True

    def __post_init__(self):
        require(
            self.heads > 0 and self.width % self.heads == 0,
            f"heads={self.heads} does not divide width={self.width}; choose a divisor of the width",
        )

    @property
    def head_dim(self) -> int:
        """Width of one head, D."""
        return self.width // self.heads

    @property
    def sides(self) -> tuple[int, int]:
        """`grid`, for a mixer of pictures: `make_mixer` has seen to it that there is one."""
        assert self.grid is not None
        return self.grid


class Cost(NamedTuple):
    """What one forward pass of one example takes.

    multiply_adds: in matrix products and convolutions, at length T. state_bytes: what decoding
    holds after T tokens, float32, or None where the mechanism does not decode.
    """

    multiply_adds: int
    state_bytes: int | None


class Mechanism(nnx.Module):
    """What cores and mixers have in common: options, capabilities and cost, stated as data.

    `remedy` is the option that brings all of `supports`, where another value takes some of it away.
    `on_grids` says that it works on pictures alone (`Site.grid`).
    """

    @dataclass(frozen=True)
    class Config:
        """The mechanism's own numbers, and no others."""

    paper: ClassVar[str]
    supports: ClassVar[frozenset[str]] = frozenset()
    remedy: ClassVar[str] = ""
    on_grids: ClassVar[bool] = False

    @classmethod
    def capabilities(cls, config: Any) -> frozenset[str]:
        """What the mechanism supports with these options; by default all of `supports`."""
        return cls.supports

    @classmethod
    def cost(cls, config: Any, site: Site, length: int) -> Cost:
        """Cost at `length` tokens of self-attention, projections of `MultiHead` not included."""
        raise NotImplementedError

    def refresh(self, step: jax.Array) -> None:
        """Change, in place, what changes with the training step alone: by default nothing."""


class Core(Mechanism):
    """(q [B,T,H,D], k [B,S,G,D], v [B,S,G,D], mask) -> [B,T,H,D]; `MultiHead` makes it a mixer.

    A subclass takes `(config, site, *, rngs, shared)`. One that estimates softmax attention sows a
    `Diagnostic` of its estimate while `watched` is set. Modules that several layers use go into the
    dict `shared` at construction, under a key of the mechanism's own; the backbone keeps that dict
    and hands it back at every call.
    """

    def __init__(self, config: Any, site: Site, *, rngs: nnx.Rngs, shared: dict[str, nnx.Module]):
        self.config = config
        self.site = site
        self.watched = False
        require(
            site.heads % self.kv_heads == 0,
            f"{type(self).__name__.lower()}: kv_heads={self.kv_heads} does not divide "
            f"heads={site.heads}",
        )

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads, G; see `kv_heads`."""
        return kv_heads(self.config, self.site)

    def slopes(self, heads: slice = slice(None)) -> Float[Array, " H"] | None:
        """ALiBi's slopes of these query heads, all by default; None where the site has no ALiBi."""
        return alibi_slopes(self.site.heads)[heads] if self.site.positions == "alibi" else None

    def __call__(
        self,
        q: Float[Array, "B T H D"],
        k: Float[Array, "B S G D"],
        v: Float[Array, "B S G D"],
        *,
        mask: Mask,
        shared: Mapping[str, nnx.Module],
    ) -> Float[Array, "B T H D"]:
        """Mix the values; 0 for a query that sees no key."""
        raise NotImplementedError

    def init_state(self, batch: int, dtype: Any) -> Any:
        """What decoding carries from token to token, before the first."""
        raise NotImplementedError

    def step(
        self,
        q: Float[Array, "B 1 H D"],
        k: Float[Array, "B 1 G D"],
        v: Float[Array, "B 1 G D"],
        state: Any,
        *,
        position: Int[Array, " B"],
    ) -> tuple[Float[Array, "B 1 H D"], Any]:
        """One token at `position` (from 0) of causal self-attention, and the next state."""
        raise NotImplementedError

    def prefill(
        self,
        q: Float[Array, "B T H D"],
        k: Float[Array, "B T G D"],
        v: Float[Array, "B T G D"],
        state: Any,
        *,
        keys: Bool[Array, "B T"],
    ) -> tuple[Float[Array, "B T H D"], Any]:
        """The tokens from position 0 on at once, and the state after the last that `keys` shows.

        `keys` is True on a beginning of each row. By default token by token; a core that can do it
        in parallel overrides this.
        """
        return scan_steps(self.step, (q, k, v), state, keys=keys)

    def init_cross(
        self,
        k: Float[Array, "B S G D"],
        v: Float[Array, "B S G D"],
        *,
        mask: Mask,
        shared: Mapping[str, nnx.Module],
    ) -> Any:
        """What `cross` needs of a context that many queries will look at in turn.

        By default all of it; a core that can do with less overrides both. Every leaf has B rows.
        """
        return k, v, mask

    def cross(
        self, q: Float[Array, "B T H D"], memory: Any, *, shared: Mapping[str, nnx.Module]
    ) -> Float[Array, "B T H D"]:
        """The core called with the keys, values and mask that `init_cross` made `memory` of."""
        k, v, mask = memory
        return self(q, k, v, mask=mask, shared=shared)


def kv_heads(config: Any, site: Site) -> int:
    """G of a core's options, or as many as query heads where they have none."""
    return getattr(config, "kv_heads", None) or site.heads


class Mixer(Mechanism):
    """(x [B,T,E], context [B,S,E] | None, mask, positions, rngs) -> [B,T,E].

    A subclass takes `(config, site, *, rngs, shared)`, as a core does.
    """

    def __call__(
        self,
        x: Float[Array, "B T E"],
        context: Float[Array, "B S E"] | None = None,
        *,
        mask: Mask,
        positions: Int[Array, "#B T"] | None = None,
        rngs: nnx.Rngs | None = None,
        shared: Mapping[str, nnx.Module],
    ) -> Float[Array, "B T E"]:
        """Mix along the sequence.

        `positions`, 0 to T-1 by default, are where the tokens stand for rotary positions. `rngs`
        supplies dropout; without it nothing is dropped.
        """
        raise NotImplementedError

    def init_state(self, batch: int, dtype: Any) -> Any:
        """What decoding carries from token to token, before the first."""
        raise NotImplementedError

    def step(
        self,
        x: Float[Array, "B 1 E"],
        state: Any,
        *,
        position: Int[Array, " B"],
    ) -> tuple[Float[Array, "B 1 E"], Any]:
        """One token at `position` (from 0), equal to that row of the causal forward pass."""
        raise NotImplementedError

    def prefill(
        self, x: Float[Array, "B T E"], state: Any, *, keys: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T E"], Any]:
        """The tokens from position 0 on at once, and the state after the last that `keys` shows.

        `keys` is True on a beginning of each row. By default token by token; a mixer that can do it
        in parallel overrides this.
        """
        return scan_steps(self.step, (x,), state, keys=keys)

    def init_cross(
        self, context: Float[Array, "B S E"], *, mask: Mask, shared: Mapping[str, nnx.Module]
    ) -> Any:
        """What `cross` needs of a context that many queries will look at in turn; B rows a leaf."""
        raise NotImplementedError

    def cross(
        self, x: Float[Array, "B T E"], memory: Any, *, shared: Mapping[str, nnx.Module]
    ) -> Float[Array, "B T E"]:
        """The mixer called with the context and the mask that `init_cross` made `memory` of."""
        raise NotImplementedError


@dataclass(frozen=True)
class Choice:
    """A mechanism and its options, as an expression names them; `str` gives the expression back."""

    noun: ClassVar[str] = "a mechanism"
    name: str
    mechanism: type[Mechanism]
    config: Any

    def __str__(self) -> str:
        options = []
        for field in fields(self.config):
            value = getattr(self.config, field.name)
            default = field.default if field.default_factory is MISSING else field.default_factory()
            if value != default:
                options.append(f"{field.name}={written(value)}")
        return f"{self.name}({', '.join(options)})" if options else self.name


def written(value: Any) -> str:
    """The value of an option as an expression has it."""
    return str(value) if isinstance(value, Choice) else repr(value)


def refuse_mask(name: str, mask: Mask, capabilities: frozenset[str]) -> None:
    """Raise ValueError for a mask that a mechanism would otherwise ignore."""
    missing = mask.needs - capabilities
    if missing:
        raise ValueError(f"{name} cannot honour a mask with {', '.join(sorted(missing))}")
    if not mask.causal and not capabilities & {"bidirectional", "cross"}:
        raise ValueError(f"{name} sees the past alone and cannot honour a mask that is not causal")


def refuse_context(name: str, context: Any) -> None:
    """Raise ValueError for a context given to a mechanism without cross-attention."""
    if context is not None:
        raise ValueError(
            f"{name} has no cross-attention; use softmax there, or another that supports 'cross'"
        )


def on_map(x: Float[Array, "B T ..."], site: Site) -> Float[Array, "B R C ..."]:
    """x as the rows and columns of the site's picture.

    Raises:
        ValueError: another number of places than the mixer was built for.
    """
    rows, columns = site.sides
    if x.shape[1] != rows * columns:
        raise ValueError(f"{x.shape[1]} places, but the mixer was built for {rows} x {columns}")
    return x.reshape(x.shape[0], rows, columns, *x.shape[2:])


def nearly_square(length: int) -> tuple[int, int]:
    """(rows, columns) of a picture of `length` places, as near to a square as there is one."""
    rows = max(n for n in range(1, math.isqrt(length) + 1) if length % n == 0)
    return rows, length // rows
