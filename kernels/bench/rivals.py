"""What other packages have for the cases of `kernels.shapes`, where they are installed.

Nothing here is imported unless it is compared with, and what is missing is said, not replaced. The
calls follow each package's documentation; they are checked like our own before they are timed.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from kernels.shapes import DIFFERENTIATED, Case, arguments

Arrays = tuple[Any, ...]
DENSE = "softmax_attention", "window_attention", "linformer_attention"
DECAYING = "gated_linear_attention"


class Rival(NamedTuple):
    """make(case) gives a function of the case's arrays, or raises NotImplementedError, and why.

    torch: it takes and gives torch's tensors, and has torch's gradients.
    """

    make: Callable[[Case], Callable[..., Any]]
    ops: tuple[str, ...]
    torch: bool = False


def package(name: str) -> Any:
    """The module of that name.

    Raises:
        NotImplementedError: it is not installed, or does not import here.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # a GPU package may raise anything where there is no GPU
        raise NotImplementedError(
            f"{name.partition('.')[0]} is not to be had here ({type(error).__name__}: {error})"
        ) from error


def _window(case: Case) -> tuple[int, int] | None:
    right = 0 if case.causal else case.window
    return (case.window, right) if case.op == "window_attention" else None


def _cudnn(case: Case) -> Callable[..., Any]:
    """cuDNN's fused attention through jax."""
    if jax.devices()[0].platform != "gpu":
        raise NotImplementedError("runs on an NVIDIA GPU")

    def call(q, k, v):
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=case.causal, local_window_size=_window(case), implementation="cudnn"
        )

    return call


def _tokamax(case: Case) -> Callable[..., Any]:
    attend = package("tokamax").dot_product_attention
    return lambda q, k, v: attend(q, k, v, is_causal=case.causal, local_window_size=_window(case))


def _jla(case: Case) -> Callable[..., Any]:
    """jax-linear-attention; without a normaliser, which it does not have."""
    if case.channels:
        raise NotImplementedError("has a decay per head")
    attend = package("jla.ops").linear_attention
    return lambda q, k, v, log_decay: attend("simple_gla", q, k, v, g=log_decay)


def _fla(case: Case) -> Callable[..., Any]:
    """flash-linear-attention's Triton kernels, in torch."""
    if not case.causal:
        raise NotImplementedError("is causal only")
    if not package("torch").cuda.is_available():
        raise NotImplementedError("fla's kernels need a GPU that torch sees")
    if case.channels:
        by_channel = package("fla.ops.gla").chunk_gla
        return lambda q, k, v, g: by_channel(q, k, v, g, scale=1.0)[0]
    if case.op == DECAYING:
        gated = package("fla.ops.simple_gla").chunk_simple_gla
        return lambda q, k, v, g: gated(q, k, v, g=g, scale=1.0)[0]
    if case.op == "gated_delta_rule":
        delta = package("fla.ops.gated_delta_rule").chunk_gated_delta_rule
        return lambda q, k, v, beta, g: delta(q, k, v, g=g, beta=beta, scale=1.0)[0]
    linear = package("fla.ops.linear_attn").chunk_linear_attn
    return lambda q, k, v: linear(q, k, v, scale=1.0, normalize=True)[0]


RIVALS: dict[str, Rival] = {
    "cudnn": Rival(_cudnn, DENSE),
    "tokamax": Rival(_tokamax, DENSE),
    "jla": Rival(_jla, (DECAYING,)),
    "fla": Rival(_fla, ("linear_attention", DECAYING, "gated_delta_rule"), torch=True),
}


def of(case: Case) -> list[str]:
    """Names of the rivals that have the case's op."""
    return [name for name, rival in RIVALS.items() if case.op in rival.ops and not case.segments]


def torch_gradient(call: Callable[..., Any], case: Case) -> Callable[..., Arrays]:
    """(out, gradients) by torch, as `shapes.gradient` has them."""
    torch = package("torch")
    wanted = [i for i, n in enumerate(arguments(case)) if n in DIFFERENTIATED]

    def both(*arrays):
        *given, cotangent = arrays
        leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(given)]
        out = call(*leaves)
        grads = torch.autograd.grad(out, [leaves[i] for i in wanted], cotangent.to(out.dtype))
        return (out, *grads)

    return both


def to_torch(x: jax.Array) -> Any:
    """The same memory as a torch tensor."""
    return package("torch").from_dlpack(x)


def from_torch(x: Any) -> jax.Array:
    """The same memory as a jax array."""
    return jax.dlpack.from_dlpack(x.detach().contiguous())
