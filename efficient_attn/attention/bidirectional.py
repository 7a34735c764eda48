"""Two causal mixers, one from either end: what gives a recurrence both sides of a token."""

import functools
from dataclasses import dataclass, field

import jax.numpy as jnp
from jaxtyping import Array, Int

from efficient_attn.attention.base import Choice, Cost, Mixer, refuse_context, refuse_mask
from efficient_attn.attention.gla import Gla
from efficient_attn.attention.multihead import make_mixer, mixer_cost
from efficient_attn.config import require
from kernels import Mask


class Bidirectional(Mixer):
    """forwards(x) + reversed(backwards(reversed x)) (Vision Mamba, arXiv 2401.09417, section 3.3).

    Both see the token itself. The paper shares the projections in and out between the directions;
    here each has its own, so that any causal mixer will do.
    """

    @dataclass(frozen=True)
    class Config:
        """mixer: any mechanism with causal attention; each direction has one of its own."""

        mixer: Choice = field(default_factory=lambda: Choice("gla", Gla, Gla.Config()))

        def __post_init__(self):
            inner = self.mixer
            require(
                "causal" in inner.mechanism.capabilities(inner.config),
                f"bidirectional: {inner} is not causal, there is no direction to reverse; "
                "use it as it is",
            )

    paper = "Vision Mamba, arXiv 2401.09417"
    supports = frozenset({"padding", "bidirectional", "segments"})

    def __init__(self, config, site, *, rngs, shared):
        self.allowed = self.capabilities(config)
        self.forwards = make_mixer(config.mixer, site, rngs=rngs, shared=shared)
        self.backwards = make_mixer(config.mixer, site, rngs=rngs, shared=shared)

    @classmethod
    def capabilities(cls, config):
        """Of `supports`, what the mixer can: both directions it has from here."""
        inner = config.mixer
        can = inner.mechanism.capabilities(inner.config) | {"bidirectional"}
        return cls.supports & can

    @classmethod
    def cost(cls, config, site, length):
        """Twice the mixer's; nothing to decode."""
        return Cost(2 * mixer_cost(config.mixer, site, length).multiply_adds, None)

    def __call__(self, x, context=None, *, mask, positions=None, rngs=None, shared):
        """Self-attention only; a context, or a causal mask, is refused."""
        refuse_context("bidirectional", context)
        refuse_mask("bidirectional", mask, self.allowed)
        positions = jnp.arange(x.shape[1])[None] if positions is None else positions

        def run(mixer, x, keys, segments, positions):
            mask = Mask(causal=True, keys=keys, segments=segments)
            return mixer(x, mask=mask, positions=positions, rngs=rngs, shared=shared)

        given = x, mask.keys, mask.segments, positions
        turn = functools.partial(_turned, at=_places(mask, x.shape[1]))
        back = run(self.backwards, *(None if y is None else turn(y) for y in given))
        return run(self.forwards, *given) + turn(back)


def _places(mask: Mask, length: int) -> Int[Array, "#B T"]:
    """Where each row, turned about its last token that is no padding, has its tokens from.

    Padding at the end stays there, for mixers that know places. Segments, which such mixers do not
    know, stay runs of neighbours: with them the whole row is turned.
    """
    at, last = jnp.arange(length)[None], length - 1
    if mask.keys is not None and mask.segments is None:
        last = last - jnp.argmax(jnp.flip(mask.keys, axis=1), axis=1)[:, None]
    return jnp.where(at <= last, last - at, at)


def _turned(x: Array, at: Int[Array, "#B T"]) -> Array:
    return jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)
