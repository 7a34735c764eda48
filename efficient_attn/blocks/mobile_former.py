"""Mobile-Former's blocks (arXiv 2108.05895): a map and a few tokens that ask each other."""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from efficient_attn.attention import Choice, Mixer, Site
from efficient_attn.attention.base import Cost, refuse_context, refuse_mask
from efficient_attn.blocks.transformer import Block, Shape
from efficient_attn.layers.conv2d import ConvNorm
from efficient_attn.layers.norm import make_norm
from kernels import Mask, softmax_attention
from kernels.dispatch import Backend

LITE_HEADS, FORMER_HEADS = 2, 4
INIT = nnx.initializers.normal(0.01)


class Former(Mixer):
    """softmax(q x^T / sqrt(D)) x W, q = x W_q, by heads: keys and values are the tokens as they
    are, in the released networks."""

    paper = "Mobile-Former, arXiv 2108.05895"
    supports = frozenset({"bidirectional"})

    def __init__(self, config, site, *, rngs, shared):
        self.backend = site.backend
        self.query, self.out = (
            _linear(site.width, site.width, dtype=site.dtype, rngs=rngs) for _ in range(2)
        )

    @classmethod
    def cost(cls, config, site, length):
        """Two projections, two products of T x T."""
        return Cost(2 * length * site.width * (site.width + length), None)

    def __call__(self, x, context=None, *, mask, positions=None, rngs=None, shared):
        """Self-attention only."""
        refuse_context("mobile-former", context)
        refuse_mask("mobile-former", mask, self.supports)
        out = _attend(self.query(x), x, x, heads=FORMER_HEADS, backend=self.backend)
        return self.out(out)


NATIVE = Choice("former", Former, Former.Config())


@dataclass(frozen=True)
class Row:
    """One block of the table.

    kind: "lite" is a depthwise and a pointwise convolution, without tokens; "down" depthwise,
    pointwise and the same again, expanding by 4 the second time, at half the resolution; "mobile"
    an inverted residual. width: channels after it. expand: of the first expansion. stride: of
    "lite".
    """

    kind: Literal["lite", "down", "mobile"]
    width: int
    expand: int
    stride: int = 1


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What the blocks of a network have in common: number and width of the tokens, the groups of
    the pointwise convolutions."""

    tokens: int
    token_width: int
    groups: int
    dtype: Any
    backend: Backend


class Lite(nnx.Module):
    """Depthwise and pointwise, plus x where shapes allow it; the tokens pass by."""

    def __init__(self, width: int, row: Row, where: Situation, *, rngs: nnx.Rngs):
        given = {"dtype": where.dtype, "rngs": rngs}
        hidden, self.shuffled = width * row.expand, width if where.groups > 1 else 1
        self.depthwise = ConvNorm(
            width, hidden, 3, stride=row.stride, groups=width, activation="relu6", **given
        )
        self.pointwise = ConvNorm(hidden, row.width, groups=where.groups, **given)
        self.added = row.stride == 1 and width == row.width

    def __call__(self, x, tokens, *, rngs, shared):
        """The map [B,H,W,C] and the tokens [B,M,E] after this block."""
        y = shuffle(self.depthwise(x, rngs=rngs), self.shuffled)
        y = self.pointwise(y, rngs=rngs)
        return x + y if self.added else y, tokens


class MobileFormerBlock(nnx.Module):
    """Map -> tokens, tokens among themselves, the convolutions, tokens -> map.

    `choice` is the attention among the tokens. The activations of the convolutions are dynamic
    ReLUs that the first token steers.
    """

    def __init__(
        self, width: int, row: Row, where: Situation, choice: Choice, *, layer: int,
        rngs: nnx.Rngs, shared: dict[str, nnx.Module],
    ):  # fmt: skip
        given: dict[str, Any] = {"dtype": where.dtype, "rngs": rngs}
        self.kind, out, groups = row.kind, row.width, where.groups
        hidden, inner = width * row.expand, where.token_width
        self.to_tokens = ToTokens(width, where, rngs=rngs)
        shape = Shape(
            depth=1, width=inner, heads=FORMER_HEADS, mlp_ratio=2.0, mlp="gelu_exact",
            norm="post", norm_epsilon=1e-5, dropout=0.0,
        )  # fmt: skip
        site = Site(
            width=inner, heads=FORMER_HEADS, seq=where.tokens, layer=layer, dtype=where.dtype,
            backend=where.backend,
        )  # fmt: skip
        self.former = Block(
            choice, shape, site, needs={"bidirectional"}, rngs=rngs, shared=shared, drop_path=0.0
        )
        if row.kind == "mobile":
            self.conv1 = ConvNorm(width, hidden, groups=groups, **given)
            self.conv2 = ConvNorm(hidden, hidden, 3, groups=hidden, **given)
            self.conv3 = ConvNorm(hidden, out, groups=groups, **given)
            self.shuffles, widths = (groups, groups), (hidden, hidden)
        else:
            self.conv1 = ConvNorm(width, hidden, 3, stride=2, groups=width, **given)
            self.conv2 = ConvNorm(hidden, out, groups=groups, **given)
            self.conv3 = ConvNorm(out, 4 * out, 3, groups=out, **given)
            self.conv4 = ConvNorm(4 * out, out, groups=groups, **given)
            self.shuffles, widths = (width, out) if groups > 1 else (1, 1), (hidden, 4 * out)
        self.relus = nnx.List([DynamicRelu(inner, wide, **given) for wide in widths])
        self.added = row.kind == "mobile" and width == out
        self.to_map = ToMap(out, where, rngs=rngs)

    def __call__(self, x, tokens, *, rngs, shared):
        """The map [B,H,W,C] and the tokens [B,M,E] after this block."""
        stream = self.former(self.to_tokens(x, tokens), mask=Mask(), rngs=rngs, shared=shared)
        tokens = self.former.read(stream)
        first, (before, after) = tokens[:, 0], self.shuffles
        y = self.relus[0](shuffle(self.conv1(x, rngs=rngs), before), first)
        y = self.conv2(y, rngs=rngs)
        if self.kind == "mobile":
            y = self.relus[1](y, first)
            y = shuffle(self.conv3(y, rngs=rngs), after)
        else:
            z = self.relus[1](shuffle(self.conv3(y, rngs=rngs), after), first)
            y = y + self.conv4(z, rngs=rngs)
        return self.to_map(x + y if self.added else y, tokens), tokens


class ToTokens(nnx.Module):
    """norm(z + (2 sigma(z W_a) * attention(z W_q, x, x)) W), x the map, z the tokens (equation 1).

    Keys and values are the map as it is; sigma is hard, its gate the released code's.
    """

    def __init__(self, width: int, where: Situation, *, rngs: nnx.Rngs):
        given: dict[str, Any] = {"dtype": where.dtype, "rngs": rngs}
        self.backend: Backend = where.backend
        self.query = _linear(where.token_width, width, **given)
        self.gate = _linear(where.token_width, width, **given)
        self.out = _linear(width, where.token_width, **given)
        self.norm = make_norm("layernorm", where.token_width, epsilon=1e-5, **given)

    def __call__(
        self, x: Float[Array, "B H W C"], tokens: Float[Array, "B M E"]
    ) -> Float[Array, "B M E"]:
        """The tokens that have seen the map."""
        places = rearrange(x, "b h w c -> b (h w) c")
        seen = _attend(self.query(tokens), places, places, heads=LITE_HEADS, backend=self.backend)
        return self.norm(tokens + self.out(seen * 2 * hard_sigmoid(self.gate(tokens))))


class ToMap(nnx.Module):
    """x + attention(x, z W_k, z W_v), x the map, z the tokens (equation 2)."""

    def __init__(self, width: int, where: Situation, *, rngs: nnx.Rngs):
        given: dict[str, Any] = {"dtype": where.dtype, "rngs": rngs}
        self.backend: Backend = where.backend
        self.key = _linear(where.token_width, width, **given)
        self.value = _linear(where.token_width, width, **given)

    def __call__(
        self, x: Float[Array, "B H W C"], tokens: Float[Array, "B M E"]
    ) -> Float[Array, "B H W C"]:
        """The map that has seen the tokens."""
        places = rearrange(x, "b h w c -> b (h w) c")
        keys, values = self.key(tokens), self.value(tokens)
        seen = _attend(places, keys, values, heads=LITE_HEADS, backend=self.backend)
        return x + seen.reshape(x.shape)


class DynamicRelu(nnx.Module):
    """max(a_1 x, a_2 x) for each channel, a_1 in (0, 2), a_2 in (-1, 1), from the first token
    (dynamic ReLU, arXiv 2003.10027, without its shifts)."""

    def __init__(self, token_width: int, width: int, *, dtype: Any, rngs: nnx.Rngs):
        self.squeeze = _linear(token_width, token_width // 4, dtype=dtype, rngs=rngs)
        self.excite = _linear(token_width // 4, 2 * width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], token: Float[Array, "B E"]
    ) -> Float[Array, "B H W C"]:
        """x bent as the token says."""
        slopes = 2 * hard_sigmoid(self.excite(nnx.relu(self.squeeze(token))))
        first, second = jnp.split(slopes[:, None, None], 2, axis=-1)
        return jnp.maximum(x * first, x * (second - 1))


def hard_sigmoid(x: Array) -> Array:
    """min(max(x + 3, 0), 6) / 6."""
    return nnx.relu6(x + 3) / 6


def shuffle(x: Float[Array, "B H W C"], groups: int) -> Float[Array, "B H W C"]:
    """Channels of `groups` groups dealt in turn (ShuffleNet, arXiv 1707.01083, section 3.1)."""
    return rearrange(x, "b h w (g c) -> b h w (c g)", g=groups)


def _attend(q, k, v, *, heads: int, backend: Backend):
    q, k, v = (rearrange(part, "b t (h d) -> b t h d", h=heads) for part in (q, k, v))
    return rearrange(softmax_attention(q, k, v, backend=backend), "b t h d -> b t (h d)")


def _linear(width: int, out: int, *, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(width, out, kernel_init=INIT, dtype=dtype, rngs=rngs)
