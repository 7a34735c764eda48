"""What the fused kernels of linear attention share, whatever the chip: all but the kernels.

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
    forward(q, k, v, ways, *, state, projection, normalise, chunk, interpret)
        -> out [B,T,H,Dv], den [B,H,T], (S [B,H,R,Dv], z [B,H,R])
    backward(q, k, v, ways, *, dout, inv_den, r, state, dstate, projection, normalise, chunk,
        interpret) -> dq, dk [B,T,H,R or D], dv [B,T,H,Dv], q_dq, k_dk [B,H,T], (dS, dz)
    sums(k, v, *, end [B,G,S] | None, projection, chunk, interpret) -> S [B,G,R,Dv], z [B,G,R]
    read(q, S, z, *, projection, normalise, chunk, interpret) -> out [B,T,H,Dv], den [B,H,T]
    read_backward(q, S, z, *, dout, inv_den, r, projection, chunk, interpret)
        -> dq [B,T,H,R or D], (dS [B,H,R,Dv], dz [B,H,R])
    sums_backward(k, v, dS, dz, *, end, projection, chunk, interpret)
        -> dk [B,S,G,R or D], dv [B,S,G,Dv], k_dk [B,G,S]

with H the most heads of q, k, v; head h reads head h // (H // G) of G. States are float32. Padded
rows and keys are zeros; a chip's module need not look at them.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from kernels.mask import Mask
from kernels.target import refuse_division, target

LEAST = 1e-30
"""A normaliser below this is none, as in `kernels.linear_attention`."""

LEAST_LOG_DECAY = -30.0
"""What a decay is taken for at the least: 1e-13 of the state before it is left."""

MODULES = {"tpu": "kernels.pallas_tpu.linear", "hopper": "kernels.pallas_gpu.linear"}


class Ways(NamedTuple):
    """Factors, in [0, 1], of what passes between tokens of a chunk, and between chunks.

    A key j weighs <q_i, k_j> exp(col_j - row_i) to a query i >= j of its chunk and segment.
    start: of what a query reads of the state before its chunk; end: of a key in the state after it;
    keep: of the state over a chunk. Each is 0 from one segment to another; col is -inf, and end 0,
    of a key that is padding.
    """

    row: Float[Array, "B H T"]
    col: Float[Array, "B H T"]
    start: Float[Array, "B H T"]
    end: Float[Array, "B H T"]
    keep: Float[Array, "B H N"]
    segments: Int[Array, "B T"] | None


class Projection(NamedTuple):
    """FAVOR+'s features of x: exp(<x, w_r> - half |x|^2 - shift), at most about 1."""

    weight: Float[Array, "R D"]
    half: float
    shift_q: Float[Array, "B G T"]
    shift_k: Float[Array, "B G T"]


class How(NamedTuple):
    """What is known when tracing. half: of the `Projection`, if there is one."""

    chip: str
    interpret: Any
    chunk: int
    normalise: bool
    half: float | None = None

    @property
    def module(self) -> ModuleType:
        """The chip's kernels."""
        return _module(self.chip)


class Entry(NamedTuple):
    """What a pass over a sequence starts from: S, z and the log scale that both are held at."""

    sums: Float[Array, "B H R Dv"]
    normaliser: Float[Array, "B H R"]
    top: Float[Array, "B H"] | None


class Tokens(NamedTuple):
    """A sequence in whole chunks. log_decay is 0, k, v and `log_scale`'s exp are where padding is.

    weight: the projection that makes features of q and k, or None where they are features.
    """

    q: Float[Array, "B T Gq D"]
    k: Float[Array, "B T Gk D"]
    v: Float[Array, "B T Gv Dv"]
    weight: Float[Array, "R D"] | None
    log_scale: Float[Array, "B H T"] | None
    log_decay: Float[Array, "B H T"] | None
    segments: Int[Array, "B T"] | None


def linear(q, k, v, *, features, log_scale, mask: Mask, chunk: int):
    """`kernels.linear_attention` in kernels of its own; arguments of its XLA path.

    Products are made in v's dtype, sums held in float32. `features`, being Python, are made of all
    queries and keys before the kernels run, and rounded to v's dtype; FAVOR+'s, of which there are
    many, are made inside them by `favor`. Chunks have the chip's own length, not `chunk`.
    """
    q, k, log_scale = _featured(q, k, features, log_scale)
    return _linear(q, k, v, None, None, log_scale, mask)


def causal(q, k, v, state, *, features, log_scale, mask: Mask, chunk: int):
    """`kernels.causal_linear_attention`, as `linear` is of the other one."""
    q, k, log_scale = _featured(q, k, features, log_scale)
    return _causal(q, k, v, None, None, log_scale, mask, state)


def gated(q, k, v, log_decay, *, mask: Mask, chunk: int, state):
    """`kernels.gated_linear_attention` with a decay per head; arguments of its XLA path.

    Log decays below `LEAST_LOG_DECAY` are taken for it and get no gradient: inside a chunk of C
    tokens their sums keep an absolute precision of 1e-7 of the largest, 30 C at the most. Products
    are made in v's dtype, sums held in float32. Chunks have the chip's own length.
    """
    log_decay = jnp.maximum(log_decay.astype(jnp.float32), LEAST_LOG_DECAY)
    if mask.keys is not None:
        log_decay = jnp.where(mask.keys[:, :, None], log_decay, 0.0)
    tokens, how = _in_chunks(q, k, v, None, None, None, mask, log_decay=log_decay)
    entry = None
    if state is not None:
        state = state.astype(jnp.float32)
        entry = Entry(state, jnp.zeros_like(state[..., 0]), None)
    out, last = _pass(how, tokens, entry)
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
        return _linear(q, k, v, weight, half, log_scale, mask)
    return _causal(q, k, v, weight, half, log_scale, mask, state)


def refuse_linear(q, k, v, *, features, log_scale, mask: Mask, chunk: int) -> str | None:
    """Why no kernel takes this call of `linear`, and what to do; None where one does."""
    if features is not None:
        (q, _), (k, _) = (_features_shape(features, x) for x in (q, k))
    return _refuse(q, k, v, None, mask)


def refuse_causal(q, k, v, state, *, features, log_scale, mask: Mask, chunk: int) -> str | None:
    """Why no kernel takes this call of `causal`, and what to do; None where one does."""
    return refuse_linear(q, k, v, features=features, log_scale=log_scale, mask=mask, chunk=chunk)


def refuse_gated(q, k, v, log_decay, *, mask: Mask, chunk: int, state) -> str | None:
    """Why no kernel takes this call of `gated`, and what to do; None where one does."""
    if log_decay.ndim == 4:
        return "the fused kernels take a decay per head, not per channel: use backend='xla'"
    return _refuse(q, k, v, None, mask)


def refuse_favor(q, k, v, weight, *, mask: Mask) -> str | None:
    """Why no kernel takes this call of `favor`, and what to do; None where one does."""
    return _refuse(q, k, v, weight.shape[0], mask)


def _module(chip: str) -> ModuleType:
    return importlib.import_module(MODULES[chip])


def _features_shape(features: Callable, x):
    return jax.eval_shape(features, x, jax.ShapeDtypeStruct(x.shape[:2], jnp.int32))


def _refuse(q, k, v, rank: int | None, mask: Mask) -> str | None:
    chip = target().chip
    if chip not in MODULES:
        return f"there are kernels for TPUs and Hopper GPUs, not for this {chip}: use backend='xla'"
    if reason := refuse_division():
        return reason
    if mask.segments is not None and not mask.causal:
        return "the fused kernels take segments with a causal mask only: use backend='xla'"
    heads = max(x.shape[2] for x in (q, k, v))
    if any(heads % x.shape[2] for x in (q, k, v)):
        counts = [x.shape[2] for x in (q, k, v)]
        return f"the fused kernels take heads that divide each other, not {counts}"
    q, k, v = (jax.ShapeDtypeStruct(x.shape, v.dtype) for x in (q, k, v))
    return _module(chip).refuse(q, k, v, rank=rank)


def _featured(q, k, features, log_scale):
    """Features, and the keys' log scales with theirs."""
    if features is not None:
        (q, _), (k, own) = (features(x, _positions(x)) for x in (q, k))
        if own is not None:
            log_scale = own if log_scale is None else log_scale + own
    return q, k, log_scale


def _positions(x):
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])


def _linear(q, k, v, weight, half, log_scale, mask: Mask):
    if mask.causal:
        tokens, how = _in_chunks(q, k, v, weight, half, log_scale, mask)
        return _pass(how, tokens, None)[0][:, : q.shape[1]]
    q, k, v, log_scale = _seen(q, k, v, log_scale, mask, scaled=weight is not None)
    length, rank = q.shape[1], k.shape[3] if weight is None else weight.shape[0]
    chunk, of_keys = (_chunk_length(x.shape[1], rank, v.shape[3]) for x in (q, k))
    if log_scale is not None:
        log_scale = rearrange(_pad(log_scale, of_keys, -jnp.inf), "b s g -> b g s")
    k, v = _pad(k, of_keys), _pad(v, of_keys)
    how = How(*target(), chunk, True, half)
    return _two_sided(how, of_keys, _pad(q, chunk), k, v, weight, log_scale)[:, :length]


def _causal(q, k, v, weight, half, log_scale, mask: Mask, state):
    tokens, how = _in_chunks(q, k, v, weight, half, log_scale, mask, scaled=True)
    memory, top = (x.astype(jnp.float32) for x in state)
    out, last = _pass(how, tokens, Entry(memory[..., :-1], memory[..., -1], top))
    memory = jnp.concatenate([last.sums, last.normaliser[..., None]], axis=-1)
    return out[:, : q.shape[1]], state._replace(memory=memory, top=last.top)


def _chunk_length(length: int, rank: int, dim: int) -> int:
    return _module(target().chip).chunk_length(length, rank=rank, dim=dim)


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


def _in_chunks(q, k, v, weight, half, log_scale, mask: Mask, *, scaled=False, log_decay=None):
    """`Tokens` in whole chunks, and how to run over them; normalised if there is no decay."""
    q, k, v, log_scale = _seen(q, k, v, log_scale, mask, scaled=scaled or weight is not None)
    heads = max(x.shape[2] for x in (q, k, v))
    rank = k.shape[3] if weight is None else weight.shape[0]
    chunk = _chunk_length(q.shape[1], rank, v.shape[3])

    def by_head(x, fill):
        if x is None:
            return None
        return _to_heads(rearrange(_pad(x, chunk, fill), "b t h -> b h t"), heads)

    segments = mask.segments
    if segments is not None:
        segments = jnp.pad(segments, [(0, 0), (0, -segments.shape[1] % chunk)], mode="edge")
    scales = by_head(log_scale, -jnp.inf), by_head(log_decay, 0.0)
    q, k, v = (_pad(x, chunk) for x in (q, k, v))
    return Tokens(q, k, v, weight, *scales, segments), How(
        *target(), chunk, log_decay is None, half
    )


def _pad(x, chunk: int, fill=0.0):
    if not x.shape[1] % chunk:
        return x
    width = [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, width, constant_values=fill)


def _heads(tokens: Tokens) -> int:
    return max(x.shape[2] for x in tokens[:3])


def _pass_forward(how: How, tokens: Tokens, entry: Entry | None):
    projection = _projection(how, tokens.q, tokens.k, tokens.weight)
    ways, top = _ways(how, tokens, entry, projection)
    out, den, (sums, normaliser) = how.module.forward(
        tokens.q, tokens.k, tokens.v, ways,
        state=None if entry is None else (entry.sums, entry.normaliser),
        projection=projection, normalise=how.normalise,
        chunk=how.chunk, interpret=how.interpret,
    )  # fmt: skip
    left = Entry(sums, normaliser, top)
    held = (out, den) if how.normalise else ()
    return (out, left), (tokens, entry, projection, ways, held, sums)


def _pass_backward(how: How, residuals, cotangents):
    tokens, entry, projection, ways, held, last = residuals
    dout, dleft = cotangents
    inverse, r = _quotient(dout, *held) if how.normalise else _plain(tokens, dout)
    state = None if entry is None else (entry.sums, entry.normaliser)
    dq, dk, dv, q_dq, k_dk, dstate = how.module.backward(
        tokens.q, tokens.k, tokens.v, ways,
        dout=dout, inv_den=inverse, r=r, state=state,
        dstate=(dleft.sums, dleft.normaliser), projection=projection,
        normalise=how.normalise, chunk=how.chunk, interpret=how.interpret,
    )  # fmt: skip
    log_decay = None
    if tokens.log_decay is not None:
        crossing = jnp.sum(last * dleft.sums, axis=(2, 3))[..., None]
        log_decay = _cumsum_back(q_dq - k_dk) + crossing
    grads = Tokens(
        _grouped(dq, tokens.q), _grouped(dk, tokens.k), _grouped(dv, tokens.v), None,
        None if tokens.log_scale is None else k_dk, log_decay, None,
    )  # fmt: skip
    if entry is None:
        return grads, None
    dtop = None
    if entry.top is not None:
        dtop = jnp.sum(entry.sums * dstate[0], axis=(2, 3))
        dtop += jnp.sum(entry.normaliser * dstate[1], axis=2)
    return grads, Entry(dstate[0], dstate[1], dtop)


def _passed(how: How, tokens: Tokens, entry: Entry | None):
    """Causal attention over whole chunks: outputs, and what the last token leaves behind."""
    return _pass_forward(how, tokens, entry)[0]


_pass: Any = jax.custom_vjp(_passed, nondiff_argnums=(0,))
_pass.defvjp(_pass_forward, _pass_backward)


def _two_sided_forward(how: How, chunk: int, q, k, v, weight, log_scale):
    projection, end = _projection(how, q, k, weight), None
    if log_scale is not None:
        scale = _to_heads(log_scale, max(k.shape[2], v.shape[2]))
        if projection is not None:
            scale = scale + _to_heads(projection.shift_k, scale.shape[1])
        end = jnp.exp(scale - _finite(jnp.max(scale, axis=2, keepdims=True)))
    of = {"projection": projection, "interpret": how.interpret}
    state = how.module.sums(k, v, end=end, chunk=chunk, **of)
    out, den = how.module.read(q, *state, normalise=True, chunk=how.chunk, **of)
    return out, (q, k, v, log_scale, projection, end, state, out, den)


def _two_sided_backward(how: How, chunk: int, residuals, dout):
    q, k, v, log_scale, projection, end, state, out, den = residuals
    inverse, r = _quotient(dout, out, den)
    of = {"projection": projection, "interpret": how.interpret}
    dq, dstate = how.module.read_backward(
        q, *state, dout=dout, inv_den=inverse, r=r, chunk=how.chunk, **of
    )
    groups = state[0].shape[1]
    dstate = [jnp.sum(x.reshape(x.shape[0], groups, -1, *x.shape[2:]), axis=2) for x in dstate]
    dk, dv, k_dk = how.module.sums_backward(k, v, *dstate, end=end, chunk=chunk, **of)
    if log_scale is not None:
        per = log_scale.shape[1]
        k_dk = jnp.sum(k_dk.reshape(k_dk.shape[0], per, -1, k_dk.shape[2]), axis=2)
    return (
        _grouped(dq, q), _grouped(dk, k), _grouped(dv, v), None,
        None if log_scale is None else k_dk,
    )  # fmt: skip


def _summed(how: How, chunk: int, q, k, v, weight, log_scale):
    """Every query reads every key; `chunk` is that of the keys, `how.chunk` of the queries."""
    return _two_sided_forward(how, chunk, q, k, v, weight, log_scale)[0]


_two_sided: Any = jax.custom_vjp(_summed, nondiff_argnums=(0, 1))
_two_sided.defvjp(_two_sided_forward, _two_sided_backward)


def _projection(how: How, q, k, weight) -> Projection | None:
    if weight is None:
        return None
    assert how.half is not None
    shifts = (how.module.log_scale(x, weight, how.half, interpret=how.interpret) for x in (q, k))
    return Projection(weight, how.half, *shifts)


def _to_heads(x, heads: int):
    return x if x.shape[1] == heads else jnp.repeat(x, heads // x.shape[1], axis=1)


def _quotient(dout, out, den):
    """1 / den, 0 where there is none, and -<dout, out> / den: the gradients of num / den."""
    dead = jnp.abs(den) <= LEAST  # NaN is alive
    inverse = jnp.where(dead, 0.0, 1.0 / jnp.where(dead, 1.0, den))
    both = jnp.einsum("bthd,bthd->bht", dout, out, preferred_element_type=jnp.float32)
    return inverse, -both * inverse


def _plain(tokens: Tokens, dout):
    shape = (dout.shape[0], _heads(tokens), dout.shape[1])
    ones = jnp.ones_like(dout, jnp.float32, shape=shape)
    return ones, jnp.zeros_like(ones)


def _grouped(x, like):
    """The gradients [B,T,H,D] of H heads summed over those that share one of `like`."""
    if x.shape[2] != like.shape[2]:
        x = rearrange(x.astype(jnp.float32), "b t (g n) d -> b t g n d", g=like.shape[2]).sum(3)
    return x.astype(like.dtype)


def _cumsum_back(x):
    return jnp.flip(jnp.cumsum(jnp.flip(x, -1), axis=-1), -1)


def _finite(top):
    return jnp.where(top == -jnp.inf, 0.0, top)


def _ways(how: How, tokens: Tokens, entry: Entry | None, projection: Projection | None):
    """The factors of every token and chunk, and the log scale that the last state is held at."""
    scale, decay = tokens.log_scale, tokens.log_decay
    entered = None if entry is None else entry.top
    if scale is None and decay is None and tokens.segments is None:
        return None, None
    chunk, reach = how.chunk, _reach(tokens.segments, how.chunk)
    if decay is not None:
        return _decaying(decay, reach, tokens.segments, chunk), None
    if scale is None:
        shape = (tokens.q.shape[0], _heads(tokens), tokens.q.shape[1])
        scale = jnp.zeros_like(tokens.q, jnp.float32, shape=shape)
    if projection is not None:
        scale = scale + _to_heads(projection.shift_k, scale.shape[1])
    first = jnp.full_like(scale[..., 0], -jnp.inf) if entered is None else entered
    row = _running_max(scale, first, tokens.segments)
    after = row[..., chunk - 1 :: chunk]
    before = jnp.concatenate([first[..., None], after[..., :-1]], axis=-1)
    by_chunk = functools.partial(rearrange, pattern="b h (n c) -> b h n c", c=chunk)
    flat = functools.partial(rearrange, pattern="b h n c -> b h (n c)")
    start = jnp.exp(before[..., None] - _finite(by_chunk(row)))
    end = jnp.exp(by_chunk(scale) - _finite(after)[..., None])
    keep = jnp.exp(before - _finite(after))
    start, end, keep = _reached(reach, start, end, keep)
    ways = Ways(_finite(row), scale, flat(start), flat(end), keep, tokens.segments)
    return ways, after[..., -1]


def _decaying(decay, reach, segments, chunk: int) -> Ways:
    since = jnp.cumsum(rearrange(decay, "b h (n c) -> b h n c", c=chunk), axis=-1)
    last = since[..., -1:]
    flat = functools.partial(rearrange, pattern="b h n c -> b h (n c)")
    start, end, keep = jnp.exp(since), jnp.exp(last - since), jnp.exp(last[..., 0])
    start, end, keep = _reached(reach, start, end, keep)
    return Ways(-flat(since), -flat(since), flat(start), flat(end), keep, segments)


def _reached(reach, start, end, keep):
    if reach is None:
        return start, end, keep
    return (jnp.where(r, x, 0.0) for r, x in zip(reach, (start, end, keep), strict=True))


def _reach(segments, chunk: int):
    """Who reads the state before a chunk [B 1 N C], is in that after it, and whether it stays."""
    if segments is None:
        return None
    by_chunk = rearrange(segments, "b (n c) -> b 1 n c", c=chunk)
    last = by_chunk[..., -1]
    before = jnp.concatenate([by_chunk[:, :, :1, 0], last[..., :-1]], axis=-1)
    return by_chunk == before[..., None], by_chunk == last[..., None], before == last


def _running_max(scale, first, segments):
    """max of the log scales up to each token in its segment; `first` is before the first."""
    scale = jnp.concatenate(
        [jnp.maximum(scale[..., :1], first[..., None]), scale[..., 1:]], axis=-1
    )
    if segments is None:
        return jax.lax.cummax(scale, axis=2)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], [(0, 0), (1, 0)])
    begins = jnp.broadcast_to(begins[:, None], scale.shape)

    def join(left, right):
        (begun, top), (begins, own) = left, right
        return begun | begins, jnp.where(begins, own, jnp.maximum(top, own))

    return jax.lax.associative_scan(join, (begins, scale), axis=2)[1]
