"""Linear attention by a chip's own kernels: what these share, whatever the chip.

A chip's module (`kernels.pallas_tpu.linear`, `kernels.pallas_gpu.linear`) computes, in chunks,

    num_i = sum_{j <= i} w_ij v_j + start_i q_i S,    w_ij = <q_i, k_j> exp(col_j - row_i)

over the keys of i's chunk and segment, S being what earlier chunks leave behind; and the gradients.
Here lengths are filled up to whole chunks, the exponents are made (`Ways`), gradients are put
together from what the kernels give (`custom_vjp`), and cases that no kernel takes are refused. A
chip's module has, on arrays of [B, T, heads, channels]:

    refuse(q, k, v, *, rank) -> a sentence or None     of arrays or their shapes; rank is R where a
                                                       projection makes the features, else None
    chunk_length(length, *, rank, dim) -> tokens of a chunk (R features, Dv channels of a value)
    log_scale(x, weight, half, *, interpret) -> [B,H,S]    max_r <x, w_r> - half |x|^2
    SHIFTS_QUERIES        whether they want that of q; all want that of k, which is in the exponents
    forward(q, k, v, ways, *, state, projection, normalise, chunk, interpret)
        -> out [B,T,H,Dv], den [B,H,T], (S [B,H,R,Dv], z [B,H,R])
    backward(q, k, v, ways, *, dout, inv_den, r, state, dstate, projection, normalise, chunk,
        interpret) -> dq, dk [B,T,H,R or D], dv [B,T,H,Dv], q_dq, k_dk [B,H,T], (dS, dz), S
        S: after the last token, of the rounded numbers that q_dq and k_dk are sums of; only decays,
        where nothing is normalised, ask for it
        r: -<dout, out> / den; a module that finds it itself, of sums not rounded, leaves the one
        that is given, here and in read_backward
    sums(k, v, *, end [B,G,S] | None, fill [B,G,S] | None, projection, chunk, interpret)
        -> S = sum end_j k_j v_j^T [B,G,R,Dv], z = sum fill_j k_j [B,G,R]; fill None: end's
    read(q, S, z, *, projection, normalise, chunk, interpret) -> out [B,T,H,Dv], den [B,H,T]
    read_backward(q, S, z, *, dout, inv_den, r, projection, chunk, interpret)
        -> dq [B,T,H,R or D], (dS [B,H,R,Dv], dz [B,H,R])
    sums_backward(k, v, dS, dz, *, end, projection, chunk, interpret)
        -> dk [B,S,G,R or D], dv [B,S,G,Dv], k_dk [B,G,S]

with H the most heads of q, k, v; head h reads head h // (H // G) of G. States are float32. Padded
rows and keys are zeros; a chip's module need not look at them.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange

from kernels.divide import by_batch
from kernels.fused.packed import both_ways
from kernels.fused.passes import (
    Entry,
    How,
    Tokens,
    causal_pass,
    module_of,
    to_heads,
    two_sided,
)
from kernels.fused.split import pieces
from kernels.mask import Mask
from kernels.target import refuse_kernels, target

LEAST_LOG_DECAY = -30.0
"""What a decay is taken for at the least: 1e-13 of the state before it is left."""


def linear(q, k, v, *, features, log_scale, mask: Mask, chunk: int):
    """`kernels.linear_attention` in kernels of its own; arguments of its XLA path.

    Products are made in v's dtype, sums held in float32. `features`, being Python, are made of all
    queries and keys before the kernels run, and rounded to v's dtype; FAVOR+'s, of which there are
    many, are made inside them by `favor`. Chunks have the chip's own length, not `chunk`.
    Segments without a causal mask take two causal passes' work, see `kernels.fused.packed`.
    """
    q, k, log_scale = _featured(q, k, features, log_scale)
    return by_batch(_linear, q, k, v, log_scale, mask)


def causal(q, k, v, state, *, features, log_scale, mask: Mask, chunk: int):
    """`kernels.causal_linear_attention`, as `linear` is of the other one."""
    q, k, log_scale = _featured(q, k, features, log_scale)
    return by_batch(_causal, q, k, v, log_scale, mask, state)


def gated(q, k, v, log_decay, *, mask: Mask, chunk: int, state):
    """`kernels.gated_linear_attention` with a decay per head; arguments of its XLA path.

    Log decays below `LEAST_LOG_DECAY` are taken for it and get no gradient: inside a chunk of C
    tokens their sums keep an absolute precision of 1e-7 of the largest, 30 C at the most. Products
    are made in v's dtype, sums held in float32. Chunks have the chip's own length.
    """
    return by_batch(_gated, q, k, v, log_decay, mask, state)


def _gated(q, k, v, log_decay, mask: Mask, state):
    log_decay = jnp.maximum(log_decay.astype(jnp.float32), LEAST_LOG_DECAY)
    if mask.keys is not None:
        log_decay = jnp.where(mask.keys[:, :, None], log_decay, 0.0)
    tokens, how = _in_chunks(q, k, v, None, mask, log_decay=log_decay)
    entry = None
    if state is not None:
        state = state.astype(jnp.float32)
        entry = Entry(state, jnp.zeros_like(state[..., 0]), None)
    out, last = causal_pass(how, tokens, entry)
    return out[:, : v.shape[1]], last.sums


def favor(q, k, v, weight, *, half: float, log_scale=None, mask: Mask, chunk: int, state=None):
    """FAVOR+: linear attention of the features exp(<x, w_r> - half |x|^2) of q and k.

    They are made inside the kernels: no array of T x R numbers is written out. weight [R, D] has
    D^-1/4 folded in, and half is 1 / (2 sqrt D); no gradient reaches it. log_scale [B, S, H] is
    added to the keys' exponents. With `state`, a `LinearState`, the mask must be causal and the
    result is (out, the state after the last token). Chunks have the chip's own length.
    """
    weight = jax.lax.stop_gradient(weight.astype(jnp.float32))
    if state is None:
        run = functools.partial(_linear, half=half)
        return by_batch(run, q, k, v, log_scale, mask, whole=weight)
    run = functools.partial(_causal, half=half)
    return by_batch(run, q, k, v, log_scale, mask, state, whole=weight)


def refuse_linear(q, k, v, *, features, log_scale, mask: Mask, chunk: int) -> str | None:
    """Why no kernel takes this call of `linear`, and what to do; None where one does."""
    if features is not None:
        (q, _), (k, _) = (_features_shape(features, x) for x in (q, k))
    return _refuse(q, k, v, None)


def refuse_causal(q, k, v, state, *, features, log_scale, mask: Mask, chunk: int) -> str | None:
    """Why no kernel takes this call of `causal`, and what to do; None where one does."""
    return refuse_linear(q, k, v, features=features, log_scale=log_scale, mask=mask, chunk=chunk)


def refuse_gated(q, k, v, log_decay, *, mask: Mask, chunk: int, state) -> str | None:
    """Why no kernel takes this call of `gated`, and what to do; None where one does."""
    return _refuse(q, k, v, None)


def refuse_favor(q, k, v, weight) -> str | None:
    """Why no kernel takes this call of `favor`, and what to do; None where one does."""
    return _refuse(q, k, v, weight.shape[0])


def _features_shape(features: Callable, x):
    return jax.eval_shape(features, x, jax.ShapeDtypeStruct(x.shape[:2], jnp.int32))


def _refuse(q, k, v, rank: int | None) -> str | None:
    if reason := refuse_kernels():
        return reason
    heads = max(x.shape[2] for x in (q, k, v))
    if any(heads % x.shape[2] for x in (q, k, v)):
        counts = [x.shape[2] for x in (q, k, v)]
        return f"the fused kernels take heads that divide each other, not {counts}"
    q, k, v = (jax.ShapeDtypeStruct(x.shape, v.dtype) for x in (q, k, v))
    return module_of(target().chip).refuse(q, k, v, rank=rank)


def _featured(q, k, features, log_scale):
    """Features, and the keys' log scales with theirs."""
    if features is not None:
        (q, _), (k, own) = (features(x, _positions(x)) for x in (q, k))
        if own is not None:
            log_scale = own if log_scale is None else log_scale + own
    return q, k, log_scale


def _positions(x):
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])


def _linear(q, k, v, log_scale, mask: Mask, weight=None, *, half=None):
    if mask.causal:
        tokens, how = _in_chunks(q, k, v, log_scale, mask, weight, half)
        return causal_pass(how, tokens, None)[0][:, : q.shape[1]]
    if mask.segments is not None:
        run = functools.partial(_linear, weight=weight, half=half)
        return both_ways(run, q, k, v, log_scale, mask.keys, mask.segments)
    q, k, v, log_scale = _seen(q, k, v, log_scale, mask, scaled=weight is not None)
    length, rank = q.shape[1], k.shape[3] if weight is None else weight.shape[0]
    chunk, of_keys = (_chunk_length(x.shape[1], rank, v.shape[3]) for x in (q, k))
    if log_scale is not None:
        log_scale = rearrange(pad(log_scale, of_keys, -jnp.inf), "b s g -> b g s")
    k, v = pad(k, of_keys), pad(v, of_keys)
    how = How(*target(), chunk, True, half)
    return two_sided(how, of_keys, pad(q, chunk), k, v, weight, log_scale)[:, :length]


def _causal(q, k, v, log_scale, mask: Mask, state, weight=None, *, half=None):
    tokens, how = _in_chunks(q, k, v, log_scale, mask, weight, half, scaled=True)
    out, last = causal_pass(how, tokens, Entry(*(x.astype(jnp.float32) for x in state)))
    return out[:, : q.shape[1]], type(state)(*last)


def _chunk_length(length: int, rank: int, dim: int) -> int:
    return module_of(target().chip).chunk_length(length, rank=rank, dim=dim)


def _seen(q, k, v, log_scale, mask: Mask, *, scaled: bool):
    """q, k, v in v's dtype and float32 log scales, with what the mask hides taken out.

    Log scales are made, of 0, where there are none and `scaled` asks for them.
    """
    q, k = (x.astype(v.dtype) for x in (q, k))
    if log_scale is not None:
        log_scale = log_scale.astype(jnp.float32)
    elif scaled:
        log_scale = jnp.zeros_like(k, jnp.float32, shape=k.shape[:3])
    if mask.keys is not None:
        seen = mask.keys[:, :, None]
        k, v = (jnp.where(seen[..., None], x, 0) for x in (k, v))
        log_scale = None if log_scale is None else jnp.where(seen, log_scale, -jnp.inf)
    return q, k, v, log_scale


def _in_chunks(
    q, k, v, log_scale, mask: Mask, weight=None, half=None, *, scaled=False, log_decay=None
):
    """`Tokens` in pieces of whole chunks, and how to run over them; normalised if not decaying."""
    q, k, v, log_scale = _seen(q, k, v, log_scale, mask, scaled=scaled or weight is not None)
    heads = max(x.shape[2] for x in (q, k, v))
    rank = k.shape[3] if weight is None else weight.shape[0]
    chunk = _chunk_length(q.shape[1], rank, v.shape[3])
    count = pieces(q.shape[0], heads, v.shape[3], q.shape[1], chunk)
    whole = count * chunk

    def by_head(x, fill):
        if x is None:
            return None
        return to_heads(rearrange(pad(x, whole, fill), "b t h -> b h t"), heads)

    segments = mask.segments
    if segments is not None:
        segments = jnp.pad(segments, [(0, 0), (0, -segments.shape[1] % whole)], mode="edge")
    scales = by_head(log_scale, -jnp.inf), by_head(log_decay, 0.0)
    q, k, v = (pad(x, whole) for x in (q, k, v))
    how = How(*target(), chunk, log_decay is None, half, count)
    return Tokens(q, k, v, weight, *scales, segments), how


def pad(x, chunk: int, fill=0.0):
    """[B, T, ...] filled up to whole chunks."""
    if not x.shape[1] % chunk:
        return x
    width = [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, width, constant_values=fill)
