"""The XLA paths on this CPU beside what PyTorch users run, forward and backward, in one process.

    python -m kernels.bench --cpu-peers [--quick] [--out DIR]

Batch 4, 8 heads of 64, float32, 512 to 8,192 tokens (--quick: 512). After one call each to compile,
all of a length take turns of two calls; the least time counts, so that another process slows none
alone. Ours and theirs begin with what a layer's projections give, [B,T,H,D], which most peers turn
to [B,H,T,D], as their own layers do; their time on contiguous [B,H,T,D] stands in brackets. They
run as they are by default: queries of linear-attention-transformer's causal attention see none of
the 64 keys of their own bucket, which ours do. The packages are compared with where they are
installed:

    pip install torch --index-url https://download.pytorch.org/whl/cpu
    pip install --no-deps performer-pytorch axial-positional-embedding local-attention linformer \\
        linear-attention-transformer product-key-memory CoLT5-attention hyper-connections \\
        torch-einops-utils
    pip install "setuptools<80" wheel    # then, with a C++ compiler and no nvcc in PATH:
    pip install --no-deps --no-build-isolation pytorch-fast-transformers
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.bench.rivals import package
from kernels.bench.run import commit, versions
from kernels.favor_attention import favor_attention
from kernels.linear_attention import linear_attention
from kernels.linformer_attention import linformer_attention
from kernels.mask import Mask
from kernels.softmax_attention import softmax_attention

BATCH, HEADS, DIM, RANK = 4, 8, 64, 256
LENGTHS = (512, 1024, 2048, 4096, 8192)
TURNS = 12
"""At the shortest; fewer at others, as their time grows."""
AT_MOST = {"softmax_attention": 1.5, "softmax_attention causal": 1.5}
"""Our time over the peer's that is still good: 1 where nothing is said."""
Step = Callable[[], Any]


class Peer(NamedTuple):
    """make(length) gives what computes on tensors q, k, v [B,H,T,D], or [B,T,H,D] if `heads_last`.

    longest: tokens above which it needs more memory or minutes than there are. same: it computes
    just what ours does, and is checked for it.
    """

    ours: str
    make: Callable[[int], Callable[..., Any]]
    longest: int = LENGTHS[-1]
    heads_last: bool = False
    same: bool = False


def _elu(x, at):
    """elu(x) + 1 without losing what is small beside 1."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0))), None


def _linear(causal: bool):
    return lambda q, k, v: linear_attention(q, k, v, features=_elu, mask=Mask(causal=causal))


def _favor(causal: bool):
    w = jnp.asarray(np.random.default_rng(1).standard_normal((RANK, DIM)), jnp.float32)
    return lambda q, k, v: favor_attention(q, k, v, w, mask=Mask(causal=causal))


def _softmax(causal: bool):
    mask = Mask(causal=causal)
    return lambda q, k, v: softmax_attention(q, k, v, mask=mask)


def _relu(q, k, v):
    """The generalised Performer: relu(x W^T) + 0.001 in place of exponentials."""
    w = jnp.asarray(np.random.default_rng(1).standard_normal((RANK, DIM)), jnp.float32)
    return linear_attention(q, k, v, features=lambda x, at: (jax.nn.relu(x @ w.T) + 1e-3, None))


def _linformer(q, k, v):
    random = np.random.default_rng(1).standard_normal((2, RANK, k.shape[1]))
    e, f = jnp.asarray(random * k.shape[1] ** -0.5, jnp.float32)
    k, v = jnp.einsum("bshd,rs->brhd", k, e), jnp.einsum("bshd,rs->brhd", v, f)
    return linformer_attention(q, k, v)


OURS: dict[str, Callable[..., Any]] = {
    f"{name}{' causal' * causal}": make(causal)
    for name, make in (("softmax_attention", _softmax), ("favor_attention", _favor),
                       ("linear_attention", _linear))
    for causal in (False, True)
} | {"linear_attention relu": _relu, "linformer_attention": _linformer}  # fmt: skip


def _sdpa(causal: bool):
    def make(length: int):
        attend = package("torch.nn.functional").scaled_dot_product_attention
        return lambda q, k, v: attend(q, k, v, is_causal=causal)

    return make


def _performer(causal: bool, relu: bool = False):
    def make(length: int):
        attend = package("performer_pytorch").FastAttention
        return attend(DIM, nb_features=RANK, causal=causal, generalized_attention=relu)

    return make


def _lucidrains(name: str):
    module = "linear_attention_transformer.linear_attention_transformer"
    return lambda length: getattr(package(module), name)


def _linformer_torch(length: int):
    """The core of lucidrains' linformer, whose package holds it inside a layer."""
    torch = package("torch")
    e, f = torch.randn(2, length, RANK) * length**-0.5

    def call(q, k, v):
        k, v = (torch.einsum("bhnd,nk->bhkd", x, w) for x, w in ((k, e), (v, f)))
        weights = (torch.einsum("bhnd,bhkd->bhnk", q, k) * DIM**-0.5).softmax(dim=-1)
        return torch.einsum("bhnk,bhkd->bhnd", weights, v)

    return call


def _idiap(name: str, features: int = 0):
    """fast-transformers: C++ where it is causal; `features` are Favor's, 0 is elu."""

    def make(length: int):
        torch, masks = package("torch"), package("fast_transformers.masking")
        maps = package("fast_transformers.feature_maps")
        phi = maps.Favor.factory(n_dims=features) if features else None
        attend = getattr(package("fast_transformers.attention"), name)(DIM, feature_map=phi)
        order = masks.TriangularCausalMask(length) if "Causal" in name else masks.FullMask(length)
        full = masks.LengthMask(torch.full((BATCH,), length, dtype=torch.int64))
        return lambda q, k, v: attend(q, k, v, order, full, full)

    return make


PEERS = {
    "torch SDPA": Peer("softmax_attention", _sdpa(False), same=True),
    "torch SDPA, causal": Peer("softmax_attention causal", _sdpa(True), same=True),
    "performer-pytorch FAVOR+": Peer("favor_attention", _performer(False)),
    "performer-pytorch relu": Peer("linear_attention relu", _performer(False, relu=True)),
    "idiap Favor": Peer("favor_attention", _idiap("LinearAttention", RANK), heads_last=True),
    "performer-pytorch FAVOR+, causal": Peer(
        "favor_attention causal", _performer(True), longest=512
    ),
    "idiap Favor, causal": Peer(
        "favor_attention causal", _idiap("CausalLinearAttention", RANK), heads_last=True
    ),
    "linear-attention-transformer": Peer("linear_attention", _lucidrains("linear_attn")),
    "idiap elu": Peer("linear_attention", _idiap("LinearAttention"), heads_last=True, same=True),
    "linear-attention-transformer, causal": Peer(
        "linear_attention causal", _lucidrains("causal_linear_attn")
    ),
    "idiap elu, causal": Peer(
        "linear_attention causal", _idiap("CausalLinearAttention"), heads_last=True, same=True
    ),
    "linformer": Peer("linformer_attention", _linformer_torch),
}


def _draw(length: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    shape = (BATCH, length, HEADS, DIM)
    return [random.standard_normal(shape).astype(np.float32) for _ in range(4)]


def _jax_step(call, arrays) -> Step:
    q, k, v, cotangent = map(jnp.asarray, arrays)

    @jax.jit
    def step(q, k, v, cotangent):
        out, back = jax.vjp(call, q, k, v)
        return out, *back(cotangent)

    return lambda: jax.block_until_ready(step(q, k, v, cotangent))


def _torch_step(call, arrays, *, turned: bool) -> Step:
    """turned: `call` is given the arrays, and gives its result, with the axes 1 and 2 exchanged."""
    torch = package("torch")
    *leaves, cotangent = [torch.from_numpy(x) for x in arrays]
    leaves = [x.requires_grad_() for x in leaves]

    def turn(x):
        return x.transpose(1, 2) if turned else x

    def step():
        out = turn(call(*map(turn, leaves)))
        return out, *torch.autograd.grad(out, leaves, cotangent)

    return step


def _off(ours: tuple, theirs: tuple) -> float:
    """The greatest relative error of the outputs and the gradients, one against the other."""
    pairs = zip(ours, (y.detach().numpy() for y in theirs), strict=True)
    return max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in pairs)


def compare(length: int) -> list[dict[str, Any]]:
    """Rows of one length: ours and each peer's milliseconds, and the peer's over ours.

    contiguous_ms: the peer's on contiguous [B,H,T,D], where it wants that.
    """
    arrays, rows = _draw(length), []
    heads_first = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in arrays]
    ours = {name: _jax_step(call, arrays) for name, call in OURS.items()}
    results = {name: step() for name, step in ours.items()}
    steps: dict[str, Step] = dict(ours)
    for name, peer in PEERS.items():
        row = {"length": length, "op": peer.ours, "peer": name}
        try:
            if length > peer.longest:
                raise NotImplementedError(
                    f"takes too much memory or time above {peer.longest} tokens"
                )
            call = peer.make(length)
            step = _torch_step(call, arrays, turned=not peer.heads_last)
            result = step()
            if peer.same:
                row["off"] = _off(results[peer.ours], result)
                if not row["off"] < 1e-3:
                    raise NotImplementedError(f"ours and theirs differ by {row['off']:.1e}")
            steps[name] = step
            if not peer.heads_last:
                steps[f"{name}, contiguous"] = _torch_step(call, heads_first, turned=False)
        except Exception as error:  # a peer that fails must not end the others
            row["skipped"] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        rows.append(row)
    del results
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(max(1, TURNS * LENGTHS[0] // length)):
        for name, step in steps.items():
            for _ in range(2):  # the first finds its memory given back to another
                start = time.perf_counter()
                step()
                best[name] = min(best[name], time.perf_counter() - start)
            time.sleep(0.02)  # a pool's threads spin a while after their last work
    for row in rows:
        row["ours_ms"] = 1e3 * best[row["op"]]
        if "skipped" not in row:
            row["peer_ms"] = 1e3 * best[row["peer"]]
            row["ratio"] = row["peer_ms"] / row["ours_ms"]
            if not PEERS[row["peer"]].heads_last:
                row["contiguous_ms"] = 1e3 * best[f"{row['peer']}, contiguous"]
    return rows


def line(row: dict[str, Any]) -> str:
    """A row for a terminal: how many times the peer's time is ours, and whether that is enough."""
    head = f"{row['length']:6,d} {row['op']:26s} {row['ours_ms']:10.1f} ms   {row['peer']:38s}"
    if "skipped" in row:
        return f"{head} {row['skipped']}"
    enough = "" if row["ratio"] * AT_MOST.get(row["op"], 1.0) >= 1 else "   BEHIND"
    other = f" ({row['contiguous_ms']:.1f} ms)" if "contiguous_ms" in row else ""
    return f"{head} {row['peer_ms']:10.1f} ms{other} {row['ratio']:6.2f} x{enough}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: ours / theirs in milliseconds, an op beside a peer of it by length."""
    lengths = sorted({row["length"] for row in rows})
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        if "skipped" not in row:
            times = f"{row['ours_ms']:,.0f} / {row['peer_ms']:,.0f}"
            cells.setdefault((row["op"], row["peer"]), {})[row["length"]] = times
    lines = [
        ["op", "peer", *(f"{length:,d}" for length in lengths)],
        ["---", "---", *("--:" for _ in lengths)],
        *([f"`{op}`" if " " not in op else f"`{op.split()[0]}` {op.split()[1]}",
           peer.removesuffix(", causal"), *(times.get(length, "") for length in lengths)]
          for (op, peer), times in sorted(cells.items())),
    ]  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(folder: Path, *, quick: bool = False) -> int:
    """Compare, print and write cpu-peers.json; the exit status."""
    found = versions() | {"cores": str(os.cpu_count())}
    try:
        found["torch threads"] = str(package("torch").get_num_threads())
    except NotImplementedError as why:
        print(f"no peers: {why}; see the head of kernels/bench/peers.py")
        return 2
    print(f"commit {commit()}, {found}; forward and backward, ours and then the peer's")
    rows = []
    for length in LENGTHS[:1] if quick else LENGTHS:
        rows += compare(length)
        print("\n".join(line(row) for row in rows[-len(PEERS) :]), flush=True)
        kept = {"versions": found, "commit": commit(), "rows": rows}
        (folder / "cpu-peers.json").write_text(json.dumps(kept, indent=1) + "\n")
    print(table(rows))
    return 0
