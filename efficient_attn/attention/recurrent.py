"""What the recurrent mechanisms share: how a mixer stands around a state that fades."""

import math
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from efficient_attn.attention.base import Mixer, Site, refuse_context, refuse_mask
from efficient_attn.config import require
from efficient_attn.layers.conv import ShortConv
from kernels import Mask, decode_step, gated_linear_attention

CHUNK = 64


class RecurrentState(NamedTuple):
    """memory: S, float32. inputs: the last P = K - 1 of the short convolution, if there is one."""

    memory: Float[Array, "B H R Dv"]
    inputs: Float[Array, "B P W"] | None


class Recurrent(Mixer):
    """Project, convolve, run the recurrence, norm, gate, project.

    A subclass says what enters the convolution, what of it the op is given, and how the output
    leaves. Its own norm and gates come with it. A token that the mask hides is zero to the
    convolution and skipped by the recurrence: it writes nothing and lets nothing fade. Rotary
    positions are not added, whatever the site says: a recurrence knows the order of its tokens.
    """

    label: ClassVar[str]
    supports = frozenset({"padding", "causal", "segments", "decode"})
    op = staticmethod(gated_linear_attention)

    def __init__(self, config: Any, site: Site, *, conv: ShortConv | None):
        self.config = config
        self.site = site
        self.conv = conv

    def enter(self, x: Float[Array, "B T E"]) -> tuple[Float[Array, "B T W"], Any]:
        """What passes through the short convolution, and what passes by it."""
        raise NotImplementedError

    def given(self, streams: Float[Array, "B T W"], aside: Any, positions: Any) -> dict[str, Array]:
        """The op's arguments out of the convolved streams."""
        raise NotImplementedError

    def leave(
        self,
        out: Float[Array, "B T H Dv"],
        streams: Float[Array, "B T W"],
        aside: Any,
        keys: Bool[Array, "B T"] | None,
    ) -> Float[Array, "B T E"]:
        """Norm, gate and output projection; `keys` is the mask's."""
        raise NotImplementedError

    def shape(self) -> tuple[int, int, int]:
        """(heads, key width, value width) of the state."""
        raise NotImplementedError

    def __call__(self, x, context=None, *, mask, positions=None, rngs=None, shared):
        """Causal self-attention only; a context, or a mask that is not causal, is refused."""
        refuse_context(self.label, context)
        refuse_mask(self.label, mask, self.supports)
        return self._run(*self.enter(x), mask=mask, positions=positions)[0]

    def init_state(self, batch, dtype):
        """An empty memory, float32 whatever `dtype`, and no inputs yet."""
        memory = jnp.zeros((batch, *self.shape()), jnp.float32)
        inputs = None if self.conv is None else self.conv.init_state(batch, dtype)
        return RecurrentState(memory, inputs)

    def step(self, x, state, *, position):
        """One token through convolution and recurrence; the state does not grow."""
        (streams, aside), inputs = self.enter(x), None
        if self.conv is not None:
            streams, inputs = self.conv.step(streams, state.inputs)
        given = self.given(streams, aside, position[:, None])
        out, memory = decode_step(**given, state=state.memory, backend=self.site.backend)
        return self.leave(out, streams, aside, None), RecurrentState(memory, inputs)

    def prefill(self, x, state, *, keys):
        """The prompt in parallel; the state is that of each row's last token."""
        streams, aside = self.enter(x)
        mask = Mask(causal=True, keys=keys)
        out, memory = self._run(streams, aside, mask=mask, memory=state.memory)
        inputs = state.inputs
        if self.conv is not None:
            inputs = self.conv.last(streams, inputs, keys=keys)
        return out, RecurrentState(memory, inputs)

    def _run(self, streams, aside, *, mask: Mask, positions=None, memory=None):
        if self.conv is not None:
            streams = self.conv(streams, mask=mask)
        positions = jnp.arange(streams.shape[1])[None] if positions is None else positions
        out, memory = self.op(
            **self.given(streams, aside, positions),
            mask=mask, chunk=CHUNK, initial_state=memory, backend=self.site.backend,
        )  # fmt: skip
        return self.leave(out, streams, aside, mask.keys), memory


class Projected(Recurrent):
    """A recurrence of queries, keys and values that pass through one short convolution, if any.

    Its options are `expand_k` and `expand_v`, the width of keys and values over the model's, and
    `conv`, the taps; 0 is none.
    """

    def __init__(self, config: Any, site: Site, *, rngs: nnx.Rngs):
        keys, values = (site.heads * width for width in self.widths(config, site))
        conv = None
        if config.conv:
            conv = ShortConv(2 * keys + values, config.conv, rngs=rngs)
        super().__init__(config, site, conv=conv)
        self.query = projection(site.width, keys, site, rngs=rngs)
        self.key = projection(site.width, keys, site, rngs=rngs)
        self.value = projection(site.width, values, site, rngs=rngs)

    @classmethod
    def widths(cls, config: Any, site: Site) -> tuple[int, int]:
        """Of a key and of a value."""
        return (
            expanded(cls.label, "expand_k", config.expand_k, site),
            expanded(cls.label, "expand_v", config.expand_v, site),
        )

    def shape(self):
        """Of the options."""
        return self.site.heads, *self.widths(self.config, self.site)

    def together(self, x: Float[Array, "B T E"]) -> Float[Array, "B T W"]:
        """Queries, keys and values side by side."""
        return jnp.concatenate([self.query(x), self.key(x), self.value(x)], axis=-1)

    def apart(self, streams: Float[Array, "B T W"]) -> list[Float[Array, "B T H D"]]:
        """Queries, keys and values."""
        keys = self.query.out_features
        return [
            split_heads(x, self.site.heads) for x in jnp.split(streams, [keys, 2 * keys], axis=-1)
        ]


class Discretisation(nnx.Module):
    """dt = softplus(z + bias), log a = -A dt, one A > 0 and one bias per head (arXiv 2405.21060).

    A begins uniform in `rates`, softplus(bias) log-uniform in [0.001, 0.1].
    """

    def __init__(self, heads: int, *, rates: tuple[float, float], rngs: nnx.Rngs):
        low, high = rates
        rate = jax.random.uniform(rngs.params(), (heads,), minval=low, maxval=high)
        span = math.log(0.001), math.log(0.1)
        dt = jnp.exp(jax.random.uniform(rngs.params(), (heads,), minval=span[0], maxval=span[1]))
        self.log_rate = nnx.Param(jnp.log(rate))
        self.bias = nnx.Param(dt + jnp.log(-jnp.expm1(-dt)))  # softplus, inverted

    def __call__(self, z: Float[Array, "B T H"]):
        """(dt, log a), float32."""
        dt = jax.nn.softplus(z.astype(jnp.float32) + self.bias[...][None, None])
        return dt, -jnp.exp(self.log_rate[...].astype(jnp.float32))[None, None] * dt


def projection(
    inputs: int, out: int, site: Site, *, gain: float = 1.0, use_bias: bool = False, rngs: nnx.Rngs
) -> nnx.Linear:
    """A linear map, Xavier uniform times `gain`, in the site's dtype."""
    init = nnx.initializers.variance_scaling(gain**2, "fan_avg", "uniform")
    bias, dtype = use_bias, site.dtype
    return nnx.Linear(inputs, out, use_bias=bias, kernel_init=init, dtype=dtype, rngs=rngs)


def head_norm(
    kind: Literal["group", "layer", "rms"], width: int, site: Site, *, epsilon: float = 1e-5,
    use_scale: bool = True, rngs: nnx.Rngs,
) -> nnx.LayerNorm | nnx.RMSNorm:  # fmt: skip
    """A norm over the channels of each head, without a bias: an output of 0 stays 0.

    "layer" and "group" subtract the mean: a GroupNorm whose groups are the heads.
    """
    if kind == "rms":
        return nnx.RMSNorm(width, epsilon=epsilon, use_scale=use_scale, dtype=site.dtype, rngs=rngs)
    return nnx.LayerNorm(
        width, epsilon=epsilon, use_scale=use_scale, use_bias=False, use_fast_variance=False,
        dtype=site.dtype, rngs=rngs,
    )  # fmt: skip


def expanded(label: str, option: str, factor: float, site: Site) -> int:
    """The width of a head that is `factor` times the site's.

    Raises:
        UserError: not a whole number.
    """
    exact = factor * site.width / site.heads
    width = round(exact)
    require(
        width >= 1 and abs(width - exact) < 1e-6,
        f"{label}: {option}={factor} makes heads of {exact:g} channels out of width={site.width} "
        f"and heads={site.heads}; choose a factor that makes a whole number",
    )
    return width


def split_heads(x: Float[Array, "B T W"], heads: int) -> Float[Array, "B T H D"]:
    """Neighbouring channels make a head."""
    return rearrange(x, "b t (h d) -> b t h d", h=heads)


def tokens_run(length: int, chunk: int) -> int:
    """Tokens that a scan runs over, the last chunk filled."""
    return -(-length // chunk) * chunk
