"""Mixup and CutMix: two images of a batch become one, and so do what is told of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from efficient_attn.data import Augment

Batch = dict[str, Any]


def mix(batch: Batch, key: jax.Array, options: Augment) -> Batch:
    """The batch with image i mixed with image B - 1 - i, by one number lambda for the whole batch.

    mixup (1710.09412): lambda x_i + (1 - lambda) x_j, lambda from Beta(mixup, mixup).
    CutMix (1905.04899): a rectangle of x_i, of the share 1 - lambda, lambda from Beta(cutmix,
    cutmix), at a random place and cut off at the border, comes from x_j.
    With both, either has an even chance. Then "partner" is the other's label [B] and "share" how
    much the first's counts [B]: lambda, or what of x_i is left. An image that does not count
    (weight 0) is not mixed with any.
    """
    if not options.mixes:
        return batch
    which, blend, cut = jax.random.split(key, 3)
    images, weight = batch["inputs"], batch["weight"]
    if options.mixup and options.cutmix:
        cuts = jax.random.bernoulli(which)
        mask = jnp.where(cuts, _box(cut, images, options.cutmix), _even(blend, options.mixup))
    elif options.cutmix:
        mask = _box(cut, images, options.cutmix)
    else:
        mask = _even(blend, options.mixup)
    both = (weight > 0) & (weight[::-1] > 0)
    mask = jnp.where(both[:, None, None], jnp.broadcast_to(mask, (1, *images.shape[1:3])), 1.0)
    share, mask = mask.mean(axis=(1, 2)), mask[..., None].astype(images.dtype)
    mixed = mask * images + (1 - mask) * images[::-1]
    return batch | {"inputs": mixed, "partner": batch["label"][::-1], "share": share}


def _even(key, alpha):
    return jax.random.beta(key, alpha, alpha)[None, None, None]


def _box(key, images, alpha):
    """[1, H, W]: 0 inside a random rectangle, 1 outside."""
    share, *centre = jax.random.split(key, 3)
    side = jnp.sqrt(1 - jax.random.beta(share, alpha, alpha))
    inside = []
    for draw, length in zip(centre, images.shape[1:3], strict=True):
        half = jnp.floor(side * length) // 2
        middle = jax.random.randint(draw, (), 0, length)
        inside.append((jnp.arange(length) >= middle - half) & (jnp.arange(length) < middle + half))
    rows, columns = inside
    return 1.0 - (rows[:, None] & columns[None])[None]


def told(batch: Batch, value: Callable[[Array], Array]) -> Array:
    """value(label) of each example; of mixed ones the mean over both labels, by their shares.

    That is the value for soft labels, if it is linear in them as cross-entropy is.
    """
    first = value(batch["label"])
    if "partner" not in batch:
        return first
    share = batch["share"]
    return share * first + (1 - share) * value(batch["partner"])
