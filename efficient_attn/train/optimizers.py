"""Optimizers and learning-rate schedules by config, put together from optax."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from efficient_attn.train.config import Optimizer


def schedule(config: Optimizer, *, steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of updates made so far (0 for the first).

    With t = that number + 1, so that the first update is not lost:
    cosine: learning_rate * t / warmup, then down to 0 at t = steps;
    rsqrt: learning_rate * min(1, t / warmup) / sqrt(max(t, warmup)), as in Long Range Arena;
    constant: learning_rate * min(1, t / warmup).
    """
    rate, warmup = config.learning_rate, max(config.warmup, 1)
    if config.schedule == "cosine":
        shape = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, max(steps, warmup + 1))
    elif config.schedule == "constant":
        shape = optax.warmup_constant_schedule(0.0, rate, warmup)
    else:
        shape = functools.partial(_rsqrt, rate, warmup)
    return lambda count: shape(count + 1)


def _rsqrt(rate: float, warmup: int, t: jax.typing.ArrayLike) -> jax.Array:
    t = jnp.asarray(t, jnp.float32)
    return rate * jnp.minimum(1.0, t / warmup) / jnp.sqrt(jnp.maximum(t, warmup))


def create(config: Optimizer, *, steps: int) -> optax.GradientTransformation:
    """Clip, direction, decoupled weight decay, learning rate: the same four stages for each."""
    directions = {
        "adamw": lambda: optax.scale_by_adam(config.b1, config.b2),
        "lion": lambda: optax.scale_by_lion(config.b1, config.b2),
        "sgd": lambda: optax.trace(config.momentum),
        "adafactor": _adafactor,
    }
    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        directions[config.name](),
        optax.add_decayed_weights(config.weight_decay, mask=matrices),
        optax.scale_by_learning_rate(schedule(config, steps=steps)),
    )


def _adafactor() -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )


def matrices(params: Any) -> Any:
    """True for each parameter that weight decay applies to: a matrix or more, not a bias or scale.

    An axis of length 1 does not count, as of a token [1, 1, E]; the name does, since a bias split
    into heads has shape [H, D].
    """

    def decays(path, leaf):
        name = str(getattr(path[-1], "key", ""))
        return sum(size > 1 for size in leaf.shape) >= 2 and name not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(decays, params)
