"""The cases that tests, `kernels.static` and `kernels.bench` share: an op, its shapes and options.

    python -m kernels.shapes        prints them all

A case names an op of this package, and `function` makes it a function of arrays: whoever runs,
compiles or times a case needs to know no more of it. What a case must compute and move at least
(`work`, `traffic`) is what its rates and bounds are counted by.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import jax
import jax.numpy as jnp

import kernels
from kernels.dispatch import Backend
from kernels.mask import Mask

Pass = Literal["forward", "training"]
"""training: forward and backward."""
PASSES: tuple[Pass, ...] = ("forward", "training")
CHUNK = 64
"""Tokens in a chunk of linear attention, as operations are counted: Helion's and FLA's."""
FADING = ("gated_linear_attention", "gated_delta_rule")
LINEAR = ("linear_attention", "favor_attention", *FADING)
DIFFERENTIATED = ("q", "k", "v", "beta", "log_decay")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call.

    op: a name in `kernels`; q, k and v have `heads` heads, k and v `groups` of them if it is not 0.
    rank: FAVOR+'s features or Linformer's projected keys. window: keys seen to the left, itself
    not counted, and as many to the right where nothing is causal. segments: how many, of one size.
    channels: gated linear attention has a decay per key channel, in place of one per head.
    """

    op: str
    batch: int
    length: int
    heads: int
    dim: int
    causal: bool = False
    groups: int = 0
    rank: int = 0
    window: int = 0
    segments: int = 0
    channels: bool = False
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """E.g. "favor_attention causal B1 T8192 H8 D64 R256 bfloat16"."""
        sizes = {"B": self.batch, "T": self.length, "H": self.heads, "G": self.groups}
        sizes |= {"D": self.dim, "R": self.rank, "W": self.window, "segments": self.segments}
        shape = [f"{letter}{size}" for letter, size in sizes.items() if size]
        kind = [*["causal"] * self.causal, *["channels"] * self.channels]
        return " ".join([self.op, *kind, *shape, self.dtype])

    @property
    def keys(self) -> int:
        """S, the length of k and v."""
        return self.rank if self.op == "linformer_attention" else self.length


def arguments(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a call by name: q, k, v, and what else the op takes."""
    b, t, h, d = case.batch, case.length, case.heads, case.dim
    key_heads = case.groups or h
    made = {"q": (b, t, h, d), "k": (b, case.keys, key_heads, d), "v": (b, case.keys, key_heads, d)}
    shapes = {n: jax.ShapeDtypeStruct(s, jnp.dtype(case.dtype)) for n, s in made.items()}
    if case.op == "gated_delta_rule":
        shapes["beta"] = jax.ShapeDtypeStruct((b, t, h), jnp.float32)
    if case.op in FADING:
        shape = (b, t, h, d) if case.channels else (b, t, h)
        shapes["log_decay"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if case.op == "favor_attention":
        shapes["projection"] = jax.ShapeDtypeStruct((case.rank, d), jnp.float32)
    if case.segments:
        shapes["segments"] = jax.ShapeDtypeStruct((b, t), jnp.int32)
    return shapes


def draw(case: Case, seed: int = 0) -> dict[str, jax.Array]:
    """Numbers for `arguments`, of the size that the op meets in a model."""
    keys = dict(zip(arguments(case), jax.random.split(jax.random.key(seed), 8), strict=False))
    made = {}
    for name, aval in arguments(case).items():
        x = jax.random.normal(keys[name], aval.shape)
        if name in ("q", "k") and case.op == "linear_attention":  # features
            x = jnp.exp(0.3 * x)
        if name == "k" and case.op == "gated_delta_rule":
            x /= jnp.linalg.norm(x, axis=-1, keepdims=True)
        if name == "beta":
            x = jax.nn.sigmoid(x)
        if name == "log_decay":  # retention's range: a memory of 8 to 256 tokens
            fading = jnp.log1p(-jnp.exp2(-jnp.linspace(3, 8, case.heads)))
            x = jnp.broadcast_to(fading[:, None] if case.channels else fading, x.shape)
        if name == "segments":
            x = jnp.broadcast_to(jnp.arange(case.length) * case.segments // case.length, x.shape)
        made[name] = x.astype(aval.dtype)
    return made


def function(case: Case, backend: Backend = "auto") -> Callable[..., jax.Array]:
    """The op as a function of the arrays of `arguments`, in their order.

    Raises:
        NotImplementedError: when called, or here if the package has no such op.
    """
    op = getattr(kernels, case.op, None)
    if op is None:
        raise NotImplementedError(f"kernels has no op {case.op!r}")
    names = tuple(arguments(case))

    def call(*arrays: jax.Array) -> jax.Array:
        given = dict(zip(names, arrays, strict=True))
        options: dict[str, Any] = {"backend": backend}
        if case.op != "linformer_attention":
            options["mask"] = Mask(causal=case.causal, segments=given.pop("segments", None))
        if case.op == "window_attention":
            options |= {"left": case.window, "right": 0 if case.causal else case.window}
        out = op(*given.values(), **options)
        return out[0] if isinstance(out, tuple) else out  # what else comes back is not read

    return call


def gradient(case: Case, backend: Backend = "auto") -> Callable[..., tuple[jax.Array, ...]]:
    """(out, gradients) as a function of the arrays, and of the cotangent after them.

    Gradients are those of the arrays in `DIFFERENTIATED`.
    """
    return differentiated(case, function(case, backend))


def differentiated(case: Case, call: Callable[..., Any]) -> Callable[..., tuple[jax.Array, ...]]:
    """`gradient` of another function of the same arrays."""
    wanted = [i for i, n in enumerate(arguments(case)) if n in DIFFERENTIATED]

    def both(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        *given, cotangent = arrays

        def forward(*some: jax.Array) -> jax.Array:
            full = list(given)
            for i, x in zip(wanted, some, strict=True):
                full[i] = x
            return call(*full)

        out, back = jax.vjp(forward, *(given[i] for i in wanted))
        return (out, *back(cotangent.astype(out.dtype)))

    return both


def traffic(case: Case, run: Pass) -> int:
    """Bytes that must cross the memory bus: each array read or written once in each pass over it.

    Backward reads q, k, v, out and its cotangent and writes three gradients; causal linear
    attention goes over keys, values and cotangents twice (`kernels.md`, section 5: 10 arrays), and
    so over decays per channel, whose gradient it writes.
    """
    element = jnp.dtype(case.dtype).itemsize
    rows = case.batch * case.heads * case.length * case.dim * element
    columns = case.batch * (case.groups or case.heads) * case.keys * case.dim * element
    forward = 2 * rows + 2 * columns
    decays = rows * 4 // element if case.channels else 0
    if run == "forward":
        return forward + decays
    if case.causal and case.op in LINEAR:
        return forward + 4 * rows + 6 * columns + 4 * decays
    return forward + 4 * rows + 4 * columns


def work(case: Case, run: Pass) -> int:
    """Floating-point operations of the matrix products, a multiply-add being two.

    Linear attention is counted in chunks of `CHUNK`: its kernels may take another size; so is the
    delta rule, whose states and inverses are made again backward.
    Attention with a softmax counts the pairs that are seen, two products forward and five backward.
    """
    d, rows = case.dim, case.batch * case.heads * case.length
    if case.op == "gated_delta_rule":
        inverse = 2 * CHUNK**2 // 3
        forward = rows * (8 * CHUNK * d + 6 * d * d + inverse)
        backward = rows * (26 * CHUNK * d + 18 * d * d + inverse)
    elif case.op in LINEAR:
        r = case.rank or d
        within = CHUNK * (r + d) if case.causal else 0
        made = 2 * d * r * (case.op == "favor_attention")  # logits of a query or of a key
        forward = rows * (2 * within + 4 * r * d + 2 * made)
        again = 10 if case.causal else 8
        backward = rows * (6 * within + again * r * d + 4 * made)
    else:
        forward, backward = 4 * d * pairs(case), 10 * d * pairs(case)
    return forward if run == "forward" else forward + backward


def pairs(case: Case) -> int:
    """How many (query, key) pairs all heads see, for attention with a softmax."""
    t, parts = case.length, max(1, case.segments)
    t //= parts
    if case.op == "linformer_attention":
        seen = t * case.rank
    elif case.op == "window_attention":
        before = _before(t, case.window)
        seen = t + before * (1 if case.causal else 2)
    else:
        seen = t * (t + 1) // 2 if case.causal else t * t
    return case.batch * case.heads * parts * seen


def _before(length: int, window: int) -> int:
    """Pairs with 1 <= t - s <= window."""
    window = min(window, length - 1)
    return window * length - window * (window + 1) // 2


def _cases(
    op: str, *sizes: tuple[int, int, int, int], causal: bool = False, groups: int = 0,
    rank: int = 0, window: int = 0, segments: int = 0, channels: bool = False,
    dtype: str = "bfloat16",
) -> tuple[Case, ...]:  # fmt: skip
    """Cases of one op at sizes (B, T, H, D)."""
    return tuple(
        Case(op=op, batch=b, length=t, heads=h, dim=d, causal=causal, groups=groups, rank=rank,
             window=window, segments=segments, channels=channels, dtype=dtype)
        for b, t, h, d in sizes
    )  # fmt: skip


PUBLISHED = (
    (1, 8192, 96, 128), (2, 16384, 16, 128), (4, 2048, 16, 128),
    (4, 4096, 64, 128), (8, 1024, 8, 64),
)  # fmt: skip
"""(B, T, H, D) of the linear-attention tables of FLA and Helion (`kernels.md`, section 4)."""
LRA = ((32, 1024, 8, 64), (32, 2048, 8, 64), (32, 4096, 8, 64))
"""The Long Range Arena's lengths: images and pathfinder, ListOps, text and retrieval."""
LONG = tuple((1, 1 << n, 8, 64) for n in range(9, 21))
"""512 to 1,048,576 tokens."""

SHIPPED = (
    *_cases("linear_attention", (1, 8192, 4, 128), (1, 8192, 4, 64), causal=True),
    *_cases("linear_attention", (1, 8192, 4, 128), (1, 8192, 4, 64)),
    *_cases("linear_attention", (1, 8192, 4, 128), causal=True, segments=4),
    *_cases("gated_linear_attention", (1, 8192, 4, 128), (1, 8192, 4, 64), causal=True),
    *_cases(
        "gated_linear_attention", (1, 8192, 4, 128), (1, 8192, 4, 64), causal=True, channels=True
    ),
    *_cases("gated_delta_rule", (1, 8192, 4, 128), (1, 8192, 4, 64), causal=True),
    *_cases("favor_attention", (1, 8192, 4, 64), (1, 8192, 4, 128), causal=True, rank=256),
    *_cases("favor_attention", (1, 8192, 4, 64), (1, 8192, 4, 128), rank=256),
    *_cases("favor_attention", (1, 8192, 4, 64), causal=True, rank=266),  # performer's default
    *_cases("linformer_attention", (1, 8192, 4, 64), (1, 8192, 4, 128), rank=256),
    *_cases("window_attention", (1, 8192, 4, 64), (1, 8192, 4, 128), window=512, causal=True),
    *_cases("window_attention", (1, 8192, 4, 128), window=512),
    *_cases("window_attention", (1, 8192, 8, 128), groups=2, window=512, causal=True, segments=4),
    *_cases("softmax_attention", (1, 4096, 4, 64), (1, 4096, 4, 128), causal=True),
    *_cases("softmax_attention", (1, 4096, 4, 64), (1, 4096, 4, 128)),
)
"""What `kernels.static` compiles: every kernel that ships, at the sizes of its published peers."""

MEASURED = (
    *_cases("linear_attention", *PUBLISHED, causal=True),
    *_cases("favor_attention", *LONG, causal=True, rank=256),
    *_cases("linformer_attention", *LONG[2::2], rank=256),
    *_cases("window_attention", (1, 16384, 8, 64), (1, 16384, 16, 128), window=512, causal=True),
    *_cases("window_attention", (4, 4096, 16, 128), (1, 65536, 8, 64), window=512, causal=True),
    *_cases("gated_linear_attention", *PUBLISHED, causal=True),
    *_cases("gated_linear_attention", *PUBLISHED, causal=True, channels=True),
    *_cases("gated_delta_rule", *PUBLISHED, causal=True),
    *_cases("favor_attention", *LRA, rank=256),
    *_cases("linear_attention", *LRA),
    *_cases("linformer_attention", *LRA, rank=256),
    *_cases(
        "softmax_attention", *((16384 // t, t, 32, 64) for t in (512, 2048, 8192, 16384)),
        *((16384 // t, t, 16, 128) for t in (512, 2048, 8192, 16384)), causal=True,
    ),
    *_cases("softmax_attention", *LRA),
    *_cases("softmax_attention", *LONG[2:9:2]),
)  # fmt: skip
"""What `kernels.bench` times, the first ones first."""

QUICK = (
    *_cases("linear_attention", (1, 512, 2, 64), causal=True, dtype="float32"),
    *_cases("favor_attention", (1, 512, 2, 32), causal=True, rank=64, dtype="float32"),
    *_cases("linformer_attention", (1, 512, 2, 64), rank=64, dtype="float32"),
    *_cases("window_attention", (1, 512, 2, 64), window=64, causal=True, dtype="float32"),
    *_cases("gated_linear_attention", (1, 512, 2, 64), causal=True, dtype="float32"),
    *_cases("gated_delta_rule", (1, 512, 2, 64), causal=True, dtype="float32"),
    *_cases("softmax_attention", (1, 512, 2, 64), causal=True, dtype="float32"),
)
"""One small case of each op: a try of the machinery, a second on a CPU."""


def named(pattern: str, names: Iterable[str], refuse: Callable[[str], NoReturn]) -> list[str]:
    """Those of `names` that a regular expression is found in; `refuse` hears why there are none."""
    names = list(names)
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as why:
        refuse(f"{pattern!r} is no regular expression: {why}")
    if not found:
        refuse(f"{pattern!r} is found in none of {len(names)} names, such as {names[0]!r}")
    return found


def roofline(case: Case, run: Pass, *, bytes_per_second: float, flops_per_second: float) -> float:
    """Seconds below which nothing can be: the memory's or the arithmetic's, whichever is more."""
    return max(traffic(case, run) / bytes_per_second, work(case, run) / flops_per_second)


def main() -> None:
    """Print every case with its bytes and operations."""
    for title, cases in (("shipped", SHIPPED), ("measured", MEASURED), ("quick", QUICK)):
        print(title)
        for case in cases:
            size = math.ceil(traffic(case, "forward") / 2**20)
            print(f"  {case.name:70s} {size:8,d} MiB {work(case, 'forward') / 1e9:12,.1f} GFLOP")


if __name__ == "__main__":
    main()
