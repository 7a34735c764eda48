"""Softmax, sliding-window and Linformer attention in one kernel each way, on TPU and Hopper.

What both chips share: which cases they take (`refuse_*`), padding to whole tiles, gradients. What
they do not is in `kernels.pallas_tpu.softmax` and `kernels.pallas_gpu.softmax`, which have

    tiles(q, k, *, causal, window, resident) -> Tiles
    refuse(q, k, v, *, causal, window, segments, keys, resident) -> str | None
    forward(q, k, v, *, scale, causal, window, segments, keys, tiles, interpret) -> out, lse
    backward(q, k, v, out, lse, dout, dlse, *, the same) -> dq, dk, dv

on q, out, dout [B,T,H,D], k, v [B,S,G,D], lse, dlse float32 [B,H,T], segments int32 [B,T] or None,
keys bool [B,S] or None; T is a multiple of tiles.q and S of tiles.k, as is T where T = S. A query
sees the keys t - left <= s <= t + right of `window`, s <= t if `causal` (the window is then
(left, 0)), those of its segment, those that are not hidden. One that sees none has out 0, lse -inf,
and gives no gradient. dk and dv are sums over the query heads of a group.
"""

import functools
import importlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels.block_attention import Part
from kernels.divide import by_batch
from kernels.mask import Mask
from kernels.target import refuse_kernels, target

RESIDENT = 512
"""Up to this many keys, all of a head's are on chip at once: Linformer's rank."""
MODULES = {"tpu": "kernels.pallas_tpu.softmax", "hopper": "kernels.pallas_gpu.softmax"}
Window = tuple[int, int] | None


class Tiles(NamedTuple):
    """Queries and keys in a tile. Where k is all keys, a row's softmax is taken at once."""

    q: int
    k: int


class _How(NamedTuple):
    """What is static of one call."""

    chip: str
    interpret: Any
    scale: float
    causal: bool
    window: Window
    tiles: Tiles


def softmax(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G D"],
    *,
    mask: Mask,
    scale: float,
    logit_cap: float | None = None,
    bias=None,
    tiles: Tiles | None = None,
) -> Float[Array, "B T H D"]:
    """`kernels.softmax_attention` where `refuse_softmax` does not object."""
    del logit_cap, bias
    how = {"causal": mask.causal, "window": None, "resident": k.shape[1] <= RESIDENT}
    run = functools.partial(_padded, scale=scale, tiles=tiles, **how)
    return by_batch(run, q, k, v, mask)[0]


def window(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T G D"],
    v: Float[Array, "B T G D"],
    *,
    left: int,
    right: int,
    mask: Mask,
    dilation: int = 1,
    slopes=None,
    tiles: Tiles | None = None,
) -> Part:
    """`kernels.window_attention` where `refuse_window` does not object.

    Tiles of keys that lie outside the window of a whole tile of queries are neither read nor
    computed. `out` has been rounded to v's dtype.
    """
    del dilation, slopes
    causal, reach = _reach(q.shape[1], left, right, mask)
    how = {"causal": causal, "window": reach, "resident": False}
    out, lse = by_batch(functools.partial(_padded, tiles=tiles, **how), q, k, v, mask)
    return Part(out.astype(jnp.float32), jnp.swapaxes(lse, 1, 2))


def linformer(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B R G D"],
    v: Float[Array, "B R G D"],
    *,
    alive: Bool[Array, "B R"] | None = None,
    tiles: Tiles | None = None,
) -> Float[Array, "B T H D"]:
    """`kernels.linformer_attention` where `refuse_linformer` does not object."""
    how = {"causal": False, "window": None, "resident": True}
    return by_batch(functools.partial(_padded, tiles=tiles, **how), q, k, v, Mask(keys=alive))[0]


def refuse_softmax(q, k, v, *, mask: Mask, scale, logit_cap=None, bias=None) -> str | None:
    """Why `softmax` does not take these arguments, and what to do; None if it does."""
    if logit_cap is not None:
        return "the fused softmax kernel has no logit_cap; take backend='xla'"
    if bias is not None:
        return "the fused softmax kernel has no slopes (ALiBi); take backend='xla'"
    if not isinstance(scale, float | int):
        return f"the fused softmax kernel takes a Python number for scale, not {scale!r}"
    resident = k.shape[1] <= RESIDENT
    return _refuse(q, k, v, mask=mask, causal=mask.causal, window=None, resident=resident)


def refuse_window(
    q, k, v, *, left: int, right: int, mask: Mask, dilation: int = 1, slopes=None
) -> str | None:
    """Why `window` does not take these arguments, and what to do; None if it does."""
    if dilation != 1:
        return f"the fused window kernel has no dilation ({dilation}); take backend='xla'"
    if slopes is not None:
        return "the fused window kernel has no slopes (ALiBi); take backend='xla'"
    causal, reach = _reach(q.shape[1], left, right, mask)
    return _refuse(q, k, v, mask=mask, causal=causal, window=reach, resident=False)


def refuse_linformer(q, k, v, *, alive=None) -> str | None:
    """Why `linformer` does not take these arguments, and what to do; None if it does."""
    if k.shape[1] > RESIDENT:
        return (
            f"{k.shape[1]} projected keys are more than the {RESIDENT} that stay on chip; "
            "take a lower rank, softmax_attention or backend='xla'"
        )
    mask = Mask(keys=alive)
    return _refuse(q, k, v, mask=mask, causal=False, window=None, resident=True)


def cudnn(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G D"],
    *,
    mask: Mask,
    scale: float,
    logit_cap: float | None = None,
    bias=None,
) -> Float[Array, "B T H D"]:
    """cuDNN's attention on NVIDIA, through jax, where `refuse_cudnn` does not object."""
    del logit_cap, bias
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=mask.causal, implementation="cudnn"
    )


def refuse_cudnn(q, k, v, *, mask: Mask, scale, logit_cap=None, bias=None) -> str | None:
    """Why `cudnn` does not take these arguments, and what to do; None if it does."""
    chip, interpret = target()
    dim, most = q.shape[-1], 256 if chip == "hopper" else 128
    if chip not in ("hopper", "gpu") or interpret is not None:
        return f"cuDNN runs on an NVIDIA GPU, not on a {chip}; take backend='xla'"
    if logit_cap is not None or bias is not None:
        return "cuDNN's attention has no logit_cap and no slopes (ALiBi); take backend='xla'"
    if mask.keys is not None or mask.segments is not None:
        return "cuDNN takes no mask of padding or segments without T x S numbers; take another"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16 or float16, not {q.dtype}, {k.dtype} and {v.dtype}"
    if dim % 8 or dim > most or v.shape[-1] != dim:
        return f"cuDNN takes one head dim, a multiple of 8 up to {most}, not {dim}, {v.shape[-1]}"
    if not isinstance(scale, float | int):
        return f"cuDNN takes a Python number for scale, not {scale!r}"
    return None


def _reach(length: int, left: int, right: int, mask: Mask) -> tuple[bool, Window]:
    """(causal, window) that say the same: no window where it hides nothing."""
    causal = mask.causal or right == 0
    left, right = min(left, length - 1), 0 if causal else min(right, length - 1)
    everything = left == length - 1 and (causal or right == length - 1)
    return causal, None if everything else (left, right)


def _refuse(q, k, v, *, mask: Mask, causal: bool, window: Window, resident: bool) -> str | None:
    if reason := refuse_kernels():
        return reason
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: give them one dtype"
    if v.shape[-1] != q.shape[-1]:
        return f"values of {v.shape[-1]} channels, keys of {q.shape[-1]}: give as many, or 'xla'"
    how = {"causal": causal, "window": window, "resident": resident}
    return _module(target().chip).refuse(q, k, v, segments=mask.segments, keys=mask.keys, **how)


def _module(chip: str):
    return importlib.import_module(MODULES[chip])


def _padded(
    q, k, v, mask: Mask, *, scale: float | None = None, tiles: Tiles | None, causal: bool,
    window: Window, resident: bool,
):  # fmt: skip
    """(out, lse) of the padded problem, cut to size. Keys that padding adds are hidden."""
    chip, interpret = target()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    shape = {"causal": causal, "window": window}
    sizes: Tiles = tiles or _module(chip).tiles(q, k, resident=resident, **shape)
    queries, count = q.shape[1], k.shape[1]
    both = math.lcm(*sizes) if queries == count else 0
    more_q, more_k = -queries % (both or sizes.q), -count % (both or sizes.k)
    hidden = mask.keys
    if more_k and hidden is None and not causal:  # a later key is hidden as it is
        hidden = jnp.ones(k.shape[:2], bool)
    segments = None if mask.segments is None else mask.segments.astype(jnp.int32)
    q, segments = _fill((q, segments), more_q)
    k, v, hidden = _fill((k, v, hidden), more_k)
    how = _How(chip, interpret, float(scale), tiles=sizes, **shape)
    result: Any = _attend(how, q, k, v, segments, hidden)
    out, lse = result
    return out[:, :queries], lse[:, :, :queries]


def _fill(tree, more: int):
    """Each x [B,T,...] with `more` zeros at the end."""

    def fill(x):
        return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2)) if more else x

    return jax.tree.map(fill, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: _How, q, k, v, segments, keys):
    module, options = _split(how)
    return module.forward(q, k, v, segments=segments, keys=keys, **options)


def _attend_forward(how: _How, q, k, v, segments, keys):
    result: Any = _attend(how, q, k, v, segments, keys)
    return result, (q, k, v, segments, keys, *result)


def _attend_backward(how: _How, kept, cotangents):
    q, k, v, segments, keys, *result = kept
    module, options = _split(how)
    grads = module.backward(q, k, v, *result, *cotangents, segments=segments, keys=keys, **options)
    return *grads, None, None


def _split(how: _How):
    options = how._asdict()
    return _module(options.pop("chip")), options


_attend.defvjp(_attend_forward, _attend_backward)
