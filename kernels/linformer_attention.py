"""Attention to few keys that stand for all (Linformer, Wang et al. 2020, arXiv 2006.04768).

    out_t = sum_r exp(<q_t, k'_r> / sqrt(D)) v'_r / sum_r exp(<q_t, k'_r> / sqrt(D))

over the R projected keys k' and values v' of a head, equation 7: linear in T.
"""

from jaxtyping import Array, Bool, Float

from kernels.chunked_softmax import refuse_chunked, worth_tiles
from kernels.dispatch import Backend, Path, run
from kernels.fused import softmax as fused_softmax
from kernels.mask import Mask, check_heads
from kernels.softmax_attention import softmax_attention


def linformer_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B R G D"],
    v: Float[Array, "B R G Dv"],
    *,
    alive: Bool[Array, "B R"] | None = None,
    backend: Backend = "auto",
) -> Float[Array, "B T H Dv"]:
    """softmax(q k'^T / sqrt(D)) v' over the projected keys that are `alive`, all by default.

    0 where none is. G key-value heads serve H query heads. Logits and their softmax are float32.
    2 T R D multiply-adds a head; "pallas" holds a head's keys on chip and writes no logits, "tiled"
    those of a CPU's caches (`kernels.chunked_softmax`), without forward-mode derivatives.

    Raises:
        ValueError: `alive` does not fit, or G does not divide H.
        NotImplementedError: the op has no such backend.
    """
    Mask(keys=alive).check(q.shape[1], k.shape[1])
    check_heads(q.shape[2], k)
    return run("linformer_attention", backend, PATHS, (q, k, v), {"alive": alive})


def _softmax(backend: Backend):
    return lambda q, k, v, *, alive: softmax_attention(
        q, k, v, mask=Mask(keys=alive), backend=backend
    )


def _of_tiles(said):
    """What `chunked_softmax` says of these arguments."""
    return lambda q, k, v, *, alive: said(q, k, v, mask=Mask(keys=alive), scale=q.shape[-1] ** -0.5)


PATHS = {
    "pallas": Path(fused_softmax.linformer, fused_softmax.refuse_linformer),
    "tiled": Path(_softmax("tiled"), _of_tiles(refuse_chunked), _of_tiles(worth_tiles)),
    "xla": Path(_softmax("xla")),
}
