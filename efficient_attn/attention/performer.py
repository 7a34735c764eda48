"""Performer: softmax attention estimated by random features (FAVOR+), or any other kernel."""

import math
from dataclasses import dataclass
from typing import Literal

import jax

from efficient_attn.attention.base import Buffer, redraw
from efficient_attn.attention.diagnostics import Diagnostic, estimate_quality
from efficient_attn.attention.features import SOFTMAX_MAPS, FeatureMap, draw_projection, feature_map
from efficient_attn.attention.kernelised import CHUNK, Kernelised
from efficient_attn.config import positive_or_none, require
from kernels import Mask, causal_favor_attention, favor_attention


class Performer(Kernelised):
    """D^-1 phi(q) (phi(k)^T v), D = diag(phi(q) phi(k)^T 1) (arXiv 2009.14794, equation 4).

    phi is FAVOR+'s random features of the softmax kernel, or a generalised kernel. Causal
    attention runs by chunked prefix sums. Scales are taken out row by row in float32
    (`kernels.linear_attention`): rows sum to 1, no constant is added to the normaliser, and
    neither a later key nor another example has any influence.
    """

    @dataclass(frozen=True)
    class Config:
        """features: rows R of the projection; None is D ln D, the paper's order of magnitude
        (theorem 4). "hyperbolic" and "trigonometric" use each row twice.
        feature_map: "positive" is FAVOR+; "hyperbolic" and "trigonometric" estimate softmax too
        (the last for ablations: its normaliser can vanish or turn negative); the others are
        generalised kernels (section 2.3).
        projection: "orthogonal", "regularised" (row norm sqrt(D)), "iid"; "none" for a generalised
        kernel on the queries and keys themselves.
        redraw: steps of training between two draws of the projection; 0 keeps the first.
        epsilon: added to generalised features that can vanish; the released code's 1e-3.
        """

        features: int | None = None
        feature_map: FeatureMap = "positive"
        projection: Literal["orthogonal", "regularised", "iid", "none"] = "orthogonal"
        redraw: int = 0
        epsilon: float = 1e-3

        def __post_init__(self):
            positive_or_none(self, "features")
            require(self.redraw >= 0, f"redraw={self.redraw} must be 0 or a number of steps")
            require(self.epsilon >= 0, f"epsilon={self.epsilon} must not be negative")
            require(
                self.projection != "none" or self.feature_map not in SOFTMAX_MAPS,
                f"feature_map={self.feature_map!r} needs a projection; "
                "projection='none' goes with relu, elu, ...",
            )

    paper = "Rethinking Attention with Performers, arXiv 2009.14794"

    def __init__(self, config, site, *, rngs, shared):
        super().__init__(config, site, rngs=rngs, shared=shared)
        if config.projection != "none":
            self.key = Buffer(jax.random.key_data(rngs.params()))
            self.projection = Buffer(self._draw(0))

    @classmethod
    def count(cls, config, site):
        """The features that the projection's rows make."""
        return _features(config, site)[1]

    @classmethod
    def cost(cls, config, site, length):
        """`Kernelised.cost`, and the projection of queries and keys."""
        made = 2 * cls.tokens(config, site, length) * _features(config, site)[0] * site.width
        attend = super().cost(config, site, length)
        return attend._replace(multiply_adds=attend.multiply_adds + made)

    def __call__(self, q, k, v, *, mask, shared):
        """See `kernels.favor_attention`; for generalised kernels, `kernels.linear_attention`."""
        if self.config.feature_map not in SOFTMAX_MAPS:
            return super().__call__(q, k, v, mask=mask, shared=shared)
        out = favor_attention(q, k, v, self.projection[...], mask=mask, **self._how)
        if self.watched:
            self.sow(Diagnostic, "favor", estimate_quality(self, q, k, v, out, mask=mask))
        return out

    def prefill(self, q, k, v, state, *, keys):
        """See `kernels.causal_favor_attention`."""
        if self.config.feature_map not in SOFTMAX_MAPS:
            return super().prefill(q, k, v, state, keys=keys)
        mask = Mask(causal=True, keys=keys)
        return causal_favor_attention(q, k, v, self.projection[...], state, mask=mask, **self._how)

    @property
    def _how(self):
        kind = self.config.feature_map
        return {"feature_map": kind, "chunk": CHUNK, "backend": self.site.backend}

    def features(self, x, positions):
        """(features, log_scale) of queries or keys; see `features.feature_map`."""
        w = None if self.config.projection == "none" else self.projection[...]
        return feature_map(x, w, kind=self.config.feature_map, epsilon=self.config.epsilon)

    def refresh(self, step: jax.Array) -> None:
        """Redraw the projection where `step` is a multiple of `redraw`.

        What is drawn depends on the key of construction and on step // redraw alone.
        """
        if self.config.projection != "none":
            redraw(self.projection, self._draw, step=step, every=self.config.redraw)

    def _draw(self, count):
        rows = _features(self.config, self.site)[0]
        key = jax.random.fold_in(jax.random.wrap_key_data(self.key[...]), count)
        return draw_projection(key, rows, self.site.head_dim, self.config.projection)


def _features(config, site) -> tuple[int, int]:
    """(rows of the projection, features): without a projection there are D features."""
    rows = config.features or max(1, round(site.head_dim * math.log(max(site.head_dim, 2))))
    if config.projection == "none":
        return 0, site.head_dim
    return rows, rows * (2 if config.feature_map in ("hyperbolic", "trigonometric") else 1)
