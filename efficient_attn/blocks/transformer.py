"""One transformer block: a mixer, perhaps cross-attention, a feed-forward layer."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient_attn import attention
from efficient_attn.attention import Choice, Site
from efficient_attn.blocks import reversible
from efficient_attn.config import require
from efficient_attn.layers.conv_mlp import ConvMlp
from efficient_attn.layers.mlp import GATES, Mlp, MlpType
from efficient_attn.layers.norm import NormType, SequenceNorm, make_norm
from kernels import Mask

Stream = Array | tuple[Array, Array]
"""What runs through the blocks: x [B,T,E], or the two halves of a reversible residual."""


@dataclass(frozen=True)
class Shape:
    """What a stack is, whatever the attention.

    mlp_ratio: hidden width of the feed-forward layer over the width; 1 is Lite Transformer's flat
    one.
    mlp: "gelu" or "relu" between two linear layers; "swiglu" or "geglu" with a gate, a third
    matrix. mlp_norm: what follows each of the two. mlp_bias: whether they have biases (see
    `layers.mlp`). mlp_conv: the convolution between them (see `layers.conv_mlp`), on pictures:
    "depthwise", or "relu_depthwise" behind a relu.
    norm: "pre" normalises before each branch and once at the end, "post" after each residual sum.
    norm_type, norm_epsilon: see `layers.norm`.
    final_norm: whether one more follows the last block of a "pre" stack.
    layer_scale: what learned factors of each branch's channels begin with (LayerScale, arXiv
    2103.17239); None has no such factors.
    branch_scale: what each branch's output is multiplied by, never learned (1 / skip_lam of LV-ViT,
    arXiv 2104.10858, as released).
    dropout: of each branch's output and inside the feed-forward layer.
    drop_path: stochastic depth (arXiv 1603.09382): an example skips each branch of layer l = 1 ...
    L with the probability drop_path * l / L (equation 4), and kept branches are scaled up in
    training rather than down afterwards.
    residual: "add", or "reversible" (see `blocks.reversible`; with norm="pre"): the input is
    doubled, the two halves are kept in float32, and their mean goes on to the last norm. (Reformer
    as released concatenates them, which makes that norm and the layer after it twice as wide.)
    remat: recompute each block in the backward pass rather than keep its activations.
    """

    depth: int = 4
    width: int = 64
    heads: int = 4
    mlp_ratio: float = 4.0
    mlp: MlpType = "gelu"
    mlp_norm: Literal["none"] = "none"
    mlp_bias: bool = True
    mlp_conv: Literal["none"] = "none"
    dropout: float = 0.1
    drop_path: float = 0.0
    norm: Literal["pre", "post"] = "pre"
    norm_type: SequenceNorm = "layernorm"
    norm_epsilon: float = 1e-6
    final_norm: bool = True
    layer_scale: float | None = None
    branch_scale: float = 1.0
    residual: Literal["add", "reversible"] = "add"
    remat: bool = False

    def __post_init__(self):
        for name in ("depth", "width", "heads", "mlp_ratio", "branch_scale"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        for name in ("dropout", "drop_path"):
            require(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} is not in [0, 1)")
        require(
            round(self.mlp_ratio * self.width) > 0,
            f"mlp_ratio={self.mlp_ratio} of width={self.width} leaves the feed-forward layer no "
            "hidden width; raise it",
        )
        require(
            self.residual == "add" or self.norm == "pre",
            f"residual='reversible' needs norm='pre', not {self.norm!r}: a norm after the sum "
            "cannot be undone",
        )
        require(
            self.residual == "add" or not self.remat,
            "residual='reversible' recomputes every block already; set remat=False",
        )


@dataclass(frozen=True)
class GridShape(Shape):
    """A stack over pictures: nothing is padding and nobody looks ahead, so that norms over all
    positions ("groupnorm"), or over the batch (`mlp_norm`), are no leak.

    runs: how many runs of neighbours the sequence has; mixers see each by itself.
    """

    norm_type: NormType = "layernorm"
    mlp_norm: Literal["none", "batchnorm"] = "none"
    mlp_conv: Literal["none", "depthwise", "relu_depthwise"] = "none"
    runs: int = 1

    def __post_init__(self):
        super().__post_init__()
        require(
            self.residual == "add" or self.mlp_norm == "none",
            "residual='reversible' recomputes every block, and the running statistics of "
            f"mlp_norm={self.mlp_norm!r} would move twice; set residual='add'",
        )
        require(
            self.mlp_conv == "none"
            or (self.mlp not in GATES and self.mlp_norm == "none" and self.mlp_bias),
            f"mlp_conv={self.mlp_conv!r} goes with an mlp without a gate, mlp_norm='none' and "
            "mlp_bias=True",
        )


@dataclass(frozen=True)
class Cross:
    """The cross-attention of a decoder's stack: its expression, and its site, whose seq is the
    longest context."""

    expression: str
    site: Site


class Block(nnx.Module):
    """x + mixer(norm(x)); x + cross(norm(x), context) where asked; x + mlp(norm(x)).

    Or the norm after each sum, or each sum into the other half of a reversible stream.
    """

    def __init__(
        self,
        choice: Choice,
        shape: Shape,
        site: Site,
        *,
        needs: Iterable[str],
        rngs: nnx.Rngs,
        shared: dict[str, nnx.Module],
        drop_path: float,
        cross: tuple[Choice, Site] | None = None,
    ):
        norm = {"epsilon": shape.norm_epsilon, "dtype": site.dtype, "rngs": rngs}
        self.shape = shape
        self.runs = shape.runs if isinstance(shape, GridShape) else 1
        self.mixer = attention.build(choice, site, needs=needs, rngs=rngs, shared=shared)
        self.mlp = _mlp(shape, site, rngs)
        self.mixer_norm = make_norm(shape.norm_type, shape.width, **norm)
        self.mlp_norm = make_norm(shape.norm_type, shape.width, **norm)
        self.branches = ("mixer", "mlp") if cross is None else ("mixer", "cross", "mlp")
        if cross is not None:
            needed = {"cross", "padding"}
            self.cross = attention.build(*cross, needs=needed, rngs=rngs, shared=shared)
            self.cross_norm = make_norm(shape.norm_type, shape.width, **norm)
        if shape.layer_scale is not None:
            begin = jnp.full((shape.width,), shape.layer_scale)
            self.scales = nnx.Dict({name: nnx.Param(begin) for name in self.branches})
        self.dropout = nnx.Dropout(shape.dropout)
        self.drop_path = nnx.Dropout(drop_path, broadcast_dims=(1, 2))

    def __call__(
        self,
        x: Stream,
        *,
        mask: Mask,
        positions=None,
        rngs: nnx.Rngs | None,
        shared,
        context: Float[Array, "B S E"] | None = None,
        context_mask: Mask | None = None,
    ) -> Stream:
        """The stream after this block. `context_mask` says who of the context is seen."""
        given = {"mask": mask, "positions": positions, "shared": shared}
        given |= {"context": context, "context_mask": context_mask}
        for name in self.branches:
            added = self.branch(name, self.read(x), rngs=rngs, **given)
            x = self.write(name, x, added)
        return x

    def branch(
        self, name: str, x, *, mask, positions, rngs, shared, context=None, context_mask=None
    ):
        """What the branch `name` adds to the stream, x [B,T,E] being what `read` gives."""
        y = self.normed(name, x)
        if name == "mixer":
            batch, length = y.shape[:2]
            y = y.reshape(batch * self.runs, length // self.runs, -1)
            y = self.mixer(y, mask=mask, positions=positions, rngs=rngs, shared=shared)
            y = y.reshape(batch, length, -1)
        elif name == "cross":
            assert context is not None
            y = self.cross(y, context, mask=context_mask or Mask(), shared=shared)
        else:
            y = self.mlp(y, rngs=rngs)
        return self.finished(name, y, rngs=rngs)

    def finished(self, name: str, y: Float[Array, "B T E"], *, rngs) -> Float[Array, "B T E"]:
        """What the branch `name` adds when its mixer or layer gives y: scaled, or dropped."""
        y = self.scaled(name, y)
        y = self.dropout(y, deterministic=rngs is None, rngs=rngs)
        return self.drop_path(y, deterministic=rngs is None, rngs=rngs)

    def scaled(self, name: str, y: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The branch's output times `branch_scale` and its layer scale."""
        if self.shape.branch_scale != 1:
            y = y * self.shape.branch_scale
        if self.shape.layer_scale is None:
            return y
        return y * self.scales[name][...].astype(y.dtype)[None, None]

    def read(self, x: Stream) -> Float[Array, "B T E"]:
        """What the next branch sees of the stream."""
        return x[1] if isinstance(x, tuple) else x

    def normed(self, name: str, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The branch's input."""
        return getattr(self, f"{name}_norm")(x) if self.shape.norm == "pre" else x

    def write(self, name: str, x: Stream, added: Float[Array, "B T E"]) -> Stream:
        """The stream with a branch's output in it."""
        if isinstance(x, tuple):
            return reversible.couple(*x, added)
        x = x + added
        return x if self.shape.norm == "pre" else getattr(self, f"{name}_norm")(x)

    def prefill(self, x: Stream, state, *, keys, shared):
        """`keys` [B,T] shows the tokens of each prompt; returns the stream and the state."""
        y, state = self.mixer.prefill(self.normed("mixer", self.read(x)), state, keys=keys)
        return self._finish(self._add("mixer", x, y), None, shared), state

    def step(self, x: Stream, state, *, position, memory=None, shared):
        """One token of each row at `position` [B]; returns the stream and the state.

        memory: what `init_cross` of the mixer `cross` gave.
        """
        y, state = self.mixer.step(self.normed("mixer", self.read(x)), state, position=position)
        return self._finish(self._add("mixer", x, y), memory, shared), state

    def _finish(self, x, memory, shared):
        if "cross" in self.branches:
            y = self.cross.cross(self.normed("cross", self.read(x)), memory, shared=shared)
            x = self._add("cross", x, y)
        return self._add("mlp", x, self.mlp(self.normed("mlp", self.read(x)), rngs=None))

    def _add(self, name: str, x: Stream, y) -> Stream:
        return self.write(name, x, self.scaled(name, y))


def _mlp(shape: Shape, site: Site, rngs: nnx.Rngs) -> Mlp | ConvMlp:
    hidden = round(shape.mlp_ratio * shape.width)
    given = {"kind": shape.mlp, "dropout": shape.dropout, "dtype": site.dtype, "rngs": rngs}
    if shape.mlp_conv != "none":
        before = "relu" if shape.mlp_conv == "relu_depthwise" else "none"
        return ConvMlp(shape.width, hidden, grid=site.sides, before=before, **given)
    return Mlp(
        shape.width, hidden, norm=shape.mlp_norm, use_bias=shape.mlp_bias,
        begin=0.0 if shape.layer_scale is None else 1.0, **given,
    )  # fmt: skip


def open_stream(x: Float[Array, "B T E"], shape: Shape) -> Stream:
    """The stream that x enters."""
    if shape.residual == "add":
        return x
    x = x.astype(jnp.float32)
    return x, x


def close_stream(x: Stream, dtype: Any) -> Float[Array, "B T E"]:
    """What leaves the stream."""
    return ((x[0] + x[1]) / 2).astype(dtype) if isinstance(x, tuple) else x
