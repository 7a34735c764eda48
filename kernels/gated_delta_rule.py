"""The gated delta rule: a memory that fades, and that overwrites what it held under a key.

    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,    out_t = S_t^T q_t,

a_t = exp(log_decay_t), one number per head and token (arXiv 2412.06464, equation 10, transposed);
without decay the delta rule (arXiv 2406.06484, equation 5). With keys of length 1, b = 1 replaces
what k_t pointed to by v_t, b = 2 reflects it (arXiv 2411.12537). A token that `mask.keys` hides is
skipped: it writes nothing and lets nothing fade. A new segment starts from an empty state.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.dispatch import Backend, Path, run
from kernels.fused import gated_delta as fused
from kernels.mask import Mask
from kernels.recurrence import Reach, causal, fade, scan_chunks, written


def gated_delta_rule(
    q: Float[Array, "B T H R"],
    k: Float[Array, "B T H R"],
    v: Float[Array, "B T H Dv"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"] | None = None,
    *,
    mask: Mask | None = None,
    chunk: int = 64,
    initial_state: Float[Array, "B H R Dv"] | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H R Dv"]]:
    """Outputs in v's dtype, and the state after the last token in float32.

    Sums are held in float32 (for their precision see `kernels.recurrence`).
    Chunks of `chunk` tokens run in parallel inside and one after the other: T (chunk (2 R + 2 Dv +
    chunk / 3) + 3 R Dv) multiply-adds a head, memory linear in T. `log_decay` is at most 0.
    `initial_state` belongs to the segment of the first token, the one returned to that of the last:
    cutting a sequence in two and passing it on gives the whole. backend="pallas" is
    `kernels.fused.gated_delta.delta`: see there.

    Raises:
        ValueError: the mask is not causal or does not fit.
        NotImplementedError: the op has no such backend, or it does not take these arguments.
    """
    mask = causal(mask, q.shape[1])
    how = {"mask": mask, "chunk": chunk, "state": initial_state}
    paths = {"pallas": Path(fused.delta, fused.refuse_delta), "xla": Path(_xla)}
    return run("gated_delta_rule", backend, paths, (q, k, v, beta, log_decay), how)


def _xla(q, k, v, beta, log_decay, *, mask: Mask, chunk: int, state):
    dtype = v.dtype
    log_decay = jnp.zeros_like(beta) if log_decay is None else log_decay
    k, v, beta, log_decay = written(mask, k, v, beta, log_decay)
    if state is None:
        shape = (v.shape[0], v.shape[2], k.shape[3], v.shape[3])
        state = jnp.zeros_like(v, shape=shape)  # "like": sharded as v is
    out, state = scan_chunks(
        _chunk, state.astype(jnp.float32), (q.astype(jnp.float32), k, v, beta, log_decay),
        mask.segments, chunk=min(chunk, q.shape[1]),
    )  # fmt: skip
    return out.astype(dtype), state


def _chunk(state, tokens, reach: Reach):
    """A chunk: what each token really changes, d_t = b_t (v_t - what is under k_t by then).

    (I + A) d = b (v - a S k), A_ts = b_t a_{s+1..t} <k_t, k_s> for s < t: the UT transform
    (2406.06484, equations 8-11), with the state's part on the right side, so that the inverse is
    applied to Dv columns and not to R + Dv.
    """
    q, k, v, beta, log_decay = tokens
    left = fade(log_decay, reach)
    b = jnp.swapaxes(beta, 1, 2)[..., None]
    system = b * jnp.einsum("bthr,bshr->bhts", k, k) * left.within
    held = jnp.einsum("bthr,bhrd->bthd", k, state) * left.start[..., None]
    wrong = jnp.swapaxes((v - held) * beta[..., None], 1, 2)
    change = unit_lower_inverse(system) @ wrong
    weights = jnp.einsum("bthr,bshr->bhts", q, k) * left.within
    out = jnp.einsum("bhts,bhsd->bthd", weights, change)
    out += jnp.einsum("bthr,bhrd->bthd", q, state) * left.start[..., None]
    new = jnp.einsum("bshr,bhsd->bhrd", k * left.end[..., None], change)
    return state * left.keep[..., None, None] + new, out


_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@jax.custom_jvp
def unit_lower_inverse(a: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """(I + A)^-1, A being what `a` has below its diagonal; C (C^2 - 1) / 3 multiply-adds.

    Blocks of 1, 2, 4, ... rows are inverted two by two: [[F, 0], [L, S]]^-1 = [[F', 0], [-S' L F',
    S']]. No power of A is formed: those of a repeated key are binomials, which float32 cannot
    subtract, where the inverse has entries of the size of A's. An eighth of the time of LAPACK's
    triangular solve on a CPU, and matrix products alone, of float32's own precision everywhere.
    """
    rows, lead = a.shape[-1], a.shape[:-2]
    size = 1 << (rows - 1).bit_length()
    a = jnp.pad(a, [(0, 0)] * len(lead) + [(0, size - rows)] * 2)
    inverse, half = jnp.ones((*lead, size, 1, 1), a.dtype), 1
    while half < size:
        pairs = a.reshape(*lead, size // (2 * half), 2, half, size // (2 * half), 2, half)
        low = jnp.diagonal(pairs[..., 1, :, :, 0, :], axis1=-4, axis2=-2)
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        low = -_product(_product(second, jnp.moveaxis(low, -1, -3)), first)
        above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([above, jnp.concatenate([low, second], axis=-1)], axis=-2)
        half *= 2
    return inverse[..., 0, :rows, :rows]


@unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals, tangents):
    inverse = unit_lower_inverse(*primals)
    return inverse, -_product(_product(inverse, jnp.tril(tangents[0], -1)), inverse)
