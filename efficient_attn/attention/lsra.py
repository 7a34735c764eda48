"""Long-short range attention: attention on one half of the channels, convolution on the other."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from efficient_attn.attention.base import Choice, Cost, Mixer, Site, refuse_context, refuse_mask
from efficient_attn.attention.multihead import linear, make_mixer, mixer_cost
from efficient_attn.attention.softmax import Softmax
from efficient_attn.config import require
from kernels import Mask, last_inputs, local_conv, local_conv_step


class LsraState(NamedTuple):
    """attention: the state of the global half; inputs: the last P = K - 1 of the convolution."""

    attention: Any
    inputs: Float[Array, "B P E2"]


class Lsra(Mixer):
    """[attention(x[..., :E/2]), conv(x[..., E/2:])] (Lite Transformer, arXiv 2004.11886).

    As in the released model nothing mixes the halves but the feed-forward layer that follows.
    """

    @dataclass(frozen=True)
    class Config:
        """attention: the global half, any mechanism.
        conv: the local half: "dynamic" predicts the kernels of each position from its input,
        "lightweight" learns one set (arXiv 1901.10430). Both are normalised by a softmax over their
        taps and shared by the channels of a head.
        kernel: number of taps; of a tuple, layer i takes entry i and deeper layers the last one.
        The default is the paper's 3, 7, 15, 31, 31, 31.
        gate: "glu" doubles the projection and halves it by a gated linear unit before the
        convolution (the paper's WMT models), "linear" only projects (its IWSLT models).
        weight_dropout: rate at which taps are dropped in training.
        """

        attention: Choice = field(
            default_factory=lambda: Choice("softmax", Softmax, Softmax.Config())
        )
        conv: Literal["dynamic", "lightweight"] = "dynamic"
        kernel: int | tuple[int, ...] = (3, 7, 15, 31)
        gate: Literal["glu", "linear"] = "glu"
        weight_dropout: float = 0.1

        def __post_init__(self):
            sizes = self.sizes
            require(
                len(sizes) > 0 and min(sizes) > 0,
                f"kernel={self.kernel} must be positive, one number or one for each layer",
            )
            require(
                0 <= self.weight_dropout < 1,
                f"weight_dropout={self.weight_dropout} is not in [0, 1)",
            )

        @property
        def sizes(self) -> tuple[int, ...]:
            """`kernel` as a tuple."""
            return self.kernel if isinstance(self.kernel, tuple) else (self.kernel,)

    paper = "Lite Transformer with Long-Short Range Attention, arXiv 2004.11886"
    supports = frozenset({"padding", "causal", "bidirectional", "segments", "decode", "alibi"})

    def __init__(self, config, site, *, rngs, shared):
        self.allowed = self.capabilities(config)
        self.attention = make_mixer(config.attention, _half(site), rngs=rngs, shared=shared)
        self.local = LocalBranch(config, _half(site), rngs=rngs)

    @classmethod
    def capabilities(cls, config):
        """What both halves support: the convolution all of `supports`."""
        inner = config.attention
        return cls.supports & inner.mechanism.capabilities(inner.config)

    @classmethod
    def cost(cls, config, site, length):
        """The global half's, and the convolution's with its projections."""
        half, taps = _half(site), _taps(config, site.layer)
        inner = mixer_cost(config.attention, half, length)
        predicted = half.width * half.heads * taps if config.conv == "dynamic" else 0
        widened = 2 if config.gate == "glu" else 1
        local = length * ((widened + 1) * half.width**2 + predicted + taps * half.width)
        kept = inner.state_bytes
        return Cost(
            inner.multiply_adds + local,
            None if kept is None else kept + 4 * (taps - 1) * half.width,
        )

    def __call__(self, x, context=None, *, mask, positions=None, rngs=None, shared):
        """Self-attention only; a context is refused."""
        refuse_context("lsra", context)
        refuse_mask("lsra", mask, self.allowed)
        far, near = jnp.split(x, 2, axis=-1)
        far = self.attention(far, mask=mask, positions=positions, rngs=rngs, shared=shared)
        return jnp.concatenate([far, self.local(near, mask=mask, rngs=rngs)], axis=-1)

    def init_state(self, batch, dtype):
        """The global half's state, and no inputs yet."""
        return LsraState(
            self.attention.init_state(batch, dtype), self.local.init_state(batch, dtype)
        )

    def step(self, x, state, *, position):
        """One token through both halves."""
        far, near = jnp.split(x, 2, axis=-1)
        far, attention = self.attention.step(far, state.attention, position=position)
        near, inputs = self.local.step(near, state.inputs)
        return jnp.concatenate([far, near], axis=-1), LsraState(attention, inputs)

    def prefill(self, x, state, *, keys):
        """The prompt through both halves."""
        far, near = jnp.split(x, 2, axis=-1)
        far, attention = self.attention.prefill(far, state.attention, keys=keys)
        near, inputs = self.local.prefill(near, state.inputs, keys=keys)
        return jnp.concatenate([far, near], axis=-1), LsraState(attention, inputs)


class LocalBranch(nnx.Module):
    """Project (and gate), convolve, project: [B,T,E/2] -> [B,T,E/2]."""

    def __init__(self, config: Lsra.Config, site: Site, *, rngs: nnx.Rngs):
        self.site = site
        self.taps = _taps(config, site.layer)
        self.gated = config.gate == "glu"
        entered = site.width * (2 if self.gated else 1)
        self.enter = linear(entered, site, rngs=rngs)
        kernel = {"dynamic": DynamicKernel, "lightweight": LightweightKernel}[config.conv]
        self.kernel = kernel(site, self.taps, rngs=rngs)
        self.dropout = nnx.Dropout(config.weight_dropout)
        self.leave = linear(site.width, site, rngs=rngs)

    def __call__(self, x, *, mask: Mask, rngs: nnx.Rngs | None):
        """Padding is zero to the convolution, whatever the projection makes of it."""
        x = self._enter(x)
        weights = self.dropout(self._weights(x), deterministic=rngs is None, rngs=rngs)
        return self.leave(local_conv(x, weights, mask=mask))

    def init_state(self, batch: int, dtype: Any) -> Float[Array, "B P E2"]:
        """The inputs before the first token: zeros."""
        return jnp.zeros((batch, self.taps - 1, self.site.width), dtype)

    def step(self, x: Float[Array, "B 1 E2"], inputs: Float[Array, "B P E2"]):
        """The causal convolution's output for one token, and its last K - 1 inputs."""
        x = self._enter(x)
        out, inputs = local_conv_step(x, inputs, self._weights(x))
        return self.leave(out), inputs

    def prefill(self, x: Float[Array, "B T E2"], inputs: Float[Array, "B P E2"], *, keys: Array):
        """All tokens at once, and the last K - 1 inputs of those that `keys` shows."""
        x, mask = self._enter(x), Mask(causal=True, keys=keys)
        out = local_conv(x, self._weights(x), mask=mask)
        return self.leave(out), last_inputs(x, inputs, keys=keys)

    def _enter(self, x):
        x = self.enter(x)
        return nnx.glu(x) if self.gated else x

    def _weights(self, x):
        return jax.nn.softmax(self.kernel(x).astype(jnp.float32), axis=-1)


class LightweightKernel(nnx.Module):
    """One set of taps per head, learned (arXiv 1901.10430, equation 5): [1, 1, H, K]."""

    def __init__(self, site: Site, taps: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.xavier_uniform()
        self.weight = nnx.Param(init(rngs.params(), (site.heads, taps)))

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "1 1 H K"]:
        """The same for every position."""
        return self.weight[...][None, None]


class DynamicKernel(nnx.Module):
    """The taps of each position, linear in its input (arXiv 1901.10430, equation 6)."""

    def __init__(self, site: Site, taps: int, *, rngs: nnx.Rngs):
        self.taps = taps
        self.predict = linear(site.heads * taps, site, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T H K"]:
        """Of each position's own input alone."""
        return rearrange(self.predict(x), "b t (h k) -> b t h k", k=self.taps)


def _half(site: Site) -> Site:
    require(
        site.width % 2 == 0 and site.width // 2 % site.heads == 0,
        f"lsra: heads={site.heads} does not divide half of width={site.width}; "
        "attention and convolution each have that many heads",
    )
    return replace(site, width=site.width // 2)


def _taps(config: Lsra.Config, layer: int) -> int:
    return config.sizes[min(layer, len(config.sizes) - 1)]
