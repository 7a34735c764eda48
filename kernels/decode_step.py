"""One token of a recurrence: its state is read, changed and read out, all at once.

    S_t = diag(a_t) S_{t-1} + k_t c_t^T,    out_t = S_t^T q_t,    a_t = exp(log_decay_t),

where what changes, c_t, is v_t, or by the delta rule b_t (v_t - S_{t-1}^T diag(a_t) k_t): a token
of `kernels.gated_linear_attention`, of `kernels.gated_delta_rule` and, with the normaliser beside
it, of `kernels.linear_attention`. It takes as long as the state takes to come and to go.

A chip's module (`kernels.pallas_tpu.decode`, `kernels.pallas_gpu.decode`) has

    refuse(rows, columns) -> a sentence or None                       of states [R, Dv]
    step(state [N,R,Dv], keys [N,3,R], values [N,1|2,Dv], *, interpret) -> out [N,Dv], state

on float32 arrays, keys being q, k and a, values v and, for the delta rule, b; N is all heads of all
rows. The state is changed in place.
"""

import functools
import importlib
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.dispatch import Backend, Path, run
from kernels.divide import by_batch
from kernels.target import Target, refuse_kernels, target

MODULES = {"tpu": "kernels.pallas_tpu.decode", "hopper": "kernels.pallas_gpu.decode"}


def decode_step(
    q: Float[Array, "B 1 G R"],
    k: Float[Array, "B 1 G R"],
    v: Float[Array, "B 1 H Dv"],
    *,
    state: Float[Array, "B H R Dv"],
    log_decay: Float[Array, "B 1 H"] | Float[Array, "B 1 H R"] | None = None,
    beta: Float[Array, "B 1 H"] | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Array, "B 1 H Dv"], Float[Array, "B H R Dv"]]:
    """The output in v's dtype, and the state after the token in float32.

    log_decay: at most 0, one number per head or per channel of the keys; None lets nothing fade.
    beta: b, of the delta rule; without it v is written as it is. G groups of queries and keys serve
    H heads. 3 R Dv multiply-adds a head, 4 by the delta rule. A kernel overwrites the state if its
    buffer is given away (in a loop, or by jax.jit's `donate_argnums`), else a copy of it.

    Raises:
        ValueError: G does not divide H.
        NotImplementedError: the op has no such backend, or it does not take these arguments.
    """
    if v.shape[2] % q.shape[2]:
        raise ValueError(f"{q.shape[2]} groups of keys do not divide {v.shape[2]} heads")
    given = _token(q, k, v, log_decay, beta), state.astype(jnp.float32)
    paths = {"pallas": Path(_fused, _refuse), "xla": Path(_xla)}
    out, state = run("decode_step", backend, paths, given, {})
    return out[:, None].astype(v.dtype), state


class _Token(NamedTuple):
    """A token in float32, by head."""

    q: Float[Array, "B H R"]
    k: Float[Array, "B H R"]
    v: Float[Array, "B H Dv"]
    decay: Float[Array, "B H R"]
    beta: Float[Array, "B H"] | None


def _token(q, k, v, log_decay, beta) -> _Token:
    def wide(x):
        return x[:, 0].astype(jnp.float32)

    per = v.shape[2] // q.shape[2]
    q, k = (jnp.repeat(wide(x), per, axis=1) for x in (q, k))
    decay = jnp.ones_like(k)
    if log_decay is not None:
        decay = jnp.exp(wide(log_decay))
        decay = decay if decay.ndim == 3 else jnp.broadcast_to(decay[..., None], k.shape)
    return _Token(q, k, wide(v), decay, None if beta is None else wide(beta))


def _xla(token: _Token, state):
    """One product reads what the state before holds for all that is asked: it is read twice."""
    asked = [token.q] if token.beta is None else [token.q, token.k]
    held = jnp.einsum(
        "bhnr,bhrd->bhnd", jnp.stack(asked, 2) * token.decay[:, :, None], state,
        precision=jax.lax.Precision.HIGHEST,
    )  # fmt: skip
    change = token.v
    if token.beta is not None:
        change = token.beta[..., None] * (change - held[:, :, 1])
    out = held[:, :, 0] + jnp.sum(token.q * token.k, axis=-1, keepdims=True) * change
    return out, state * token.decay[..., None] + token.k[..., None] * change[:, :, None]


def _refuse(token: _Token, state) -> str | None:
    return refuse_kernels() or _module(target()).refuse(*state.shape[2:])


def _fused(token: _Token, state):
    return by_batch(functools.partial(_in_kernel, target()), token, state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_kernel(chip: Target, token: _Token, state):
    of_heads = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    keys = jnp.stack([token.q, token.k, token.decay], axis=2)
    values = [token.v]
    if token.beta is not None:
        values.append(jnp.broadcast_to(token.beta[..., None], token.v.shape))
    out, left = _module(chip).step(
        of_heads(state), of_heads(keys), of_heads(jnp.stack(values, 2)), interpret=chip.interpret
    )
    return out.reshape(token.v.shape), left.reshape(state.shape)


def _forward(chip: Target, token: _Token, state):
    result: Any = _in_kernel(chip, token, state)
    return result, (token, state)


def _backward(chip: Target, kept, cotangents):
    return jax.vjp(_xla, *kept)[1](cotangents)


_in_kernel.defvjp(_forward, _backward)


def _module(chip: Target) -> ModuleType:
    return importlib.import_module(MODULES[chip.chip])
