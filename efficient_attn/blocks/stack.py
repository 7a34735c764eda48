"""A stack of transformer blocks, each with the mixer that the attention expression names."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from efficient_attn import attention
from efficient_attn.attention import Site
from efficient_attn.blocks import reversible
from efficient_attn.blocks.transformer import Block, Cross, Shape, close_stream, open_stream
from efficient_attn.layers.norm import make_norm
from efficient_attn.layers.rngs import make_rngs
from kernels import Mask


class Stack(nnx.Module):
    """`shape.depth` blocks, and the modules that their mixers share.

    With `cross` every block looks at a context between its mixer and its feed-forward layer. `part`
    is where the stack stands in a network of several: blocks before it, blocks in all; drop path
    grows along all of them.
    """

    def __init__(
        self,
        expression: str,
        shape: Shape,
        site: Site,
        *,
        needs: Iterable[str],
        rngs: nnx.Rngs,
        cross: Cross | None = None,
        part: tuple[int, int] | None = None,
    ):
        self.shape, needs = shape, frozenset(needs)
        before, all_blocks = part or (0, shape.depth)
        shared: dict[str, nnx.Module] = {}
        looks = attention.pattern(cross.expression, shape.depth) if cross else ()
        blocks = []
        for layer, choice in enumerate(attention.pattern(expression, shape.depth)):
            look = (looks[layer], replace(cross.site, layer=layer)) if cross else None
            here = replace(site, layer=layer)
            skipped = shape.drop_path * (before + layer + 1) / all_blocks
            blocks.append(
                Block(
                    choice, shape, here, needs=needs, rngs=rngs, shared=shared,
                    drop_path=skipped, cross=look,
                )
            )  # fmt: skip
        self.blocks = nnx.List(blocks)
        self.shared = nnx.Dict(shared)
        if shape.norm == "pre" and shape.final_norm:
            self.norm = make_norm(
                shape.norm_type, shape.width,
                epsilon=shape.norm_epsilon, dtype=site.dtype, rngs=rngs,
            )  # fmt: skip

    def __call__(
        self,
        x: Float[Array, "B T E"],
        *,
        mask: Mask,
        positions: Int[Array, "#B T"] | None = None,
        rngs: nnx.Rngs | None,
        context: Float[Array, "B S E"] | None = None,
        context_mask: Mask | None = None,
    ) -> Float[Array, "B T E"]:
        """Without `rngs` nothing is dropped."""
        given = {
            "mask": mask, "positions": positions, "context": context, "context_mask": context_mask,
        }  # fmt: skip
        stream = open_stream(x, self.shape)
        if self.shape.residual == "reversible" and not _watched(self):
            stream = self._reversible(stream, given, rngs)
        else:
            run = nnx.remat(_run) if self.shape.remat else _run
            for block in self.blocks:
                stream = run(block, stream, given, rngs, self.shared)
        return self._close(stream, x.dtype)

    def _reversible(self, stream, given, rngs):
        """The blocks as pure functions, for `blocks.reversible.run`."""
        key = None if rngs is None else rngs.dropout()
        shared_graph, shared = nnx.split(self.shared)
        common = {"given": given, "shared": shared, "key": key}
        layers, weights = [], []
        for block in self.blocks:
            graph, state = nnx.split(block)
            layers.append(
                [
                    partial(_branch, name, graph, shared_graph, len(layers))
                    for name in block.branches
                ]
            )
            weights.append(state)
        return reversible.run(layers, weights, common, *stream)

    def init_state(self, batch: int, dtype: Any) -> tuple[Any, ...]:
        """What decoding carries, one state for each block, before the first token."""
        return tuple(block.mixer.init_state(batch, dtype) for block in self.blocks)

    def init_cross(self, context: Float[Array, "B S E"], *, mask: Mask) -> tuple[Any, ...]:
        """What each block keeps of the context, for `step`; `mask` says who of it is seen."""
        given = {"mask": mask, "shared": self.shared}
        return tuple(block.cross.init_cross(context, **given) for block in self.blocks)

    def prefill(
        self, x: Float[Array, "B T E"], state: tuple[Any, ...], *, keys: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T E"], tuple[Any, ...]]:
        """Prompts from position 0 on at once; `keys` is True on a beginning of each row.

        For a stack without `cross`.
        """
        return self._decode([partial(block.prefill, keys=keys) for block in self.blocks], x, state)

    def step(
        self,
        x: Float[Array, "B 1 E"],
        state: tuple[Any, ...],
        *,
        position: Int[Array, " B"],
        memory: tuple[Any, ...] | None = None,
    ) -> tuple[Float[Array, "B 1 E"], tuple[Any, ...]]:
        """One token at `position` (from 0), equal to that row of the causal forward pass."""
        steps = [
            partial(block.step, position=position, memory=memory and memory[i])
            for i, block in enumerate(self.blocks)
        ]
        return self._decode(steps, x, state)

    def _decode(self, steps, x, state):
        stream, after = open_stream(x, self.shape), []
        for step, before in zip(steps, state, strict=True):
            stream, now = step(stream, before, shared=self.shared)
            after.append(now)
        return self._close(stream, x.dtype), tuple(after)

    def _close(self, stream, dtype):
        x = close_stream(stream, dtype)
        return self.norm(x) if self.shape.norm == "pre" and self.shape.final_norm else x


def _run(block, stream, given, rngs, shared):
    return block(stream, rngs=rngs, shared=shared, **given)


def _branch(name, graph, shared_graph, layer, state, common, x):
    block = nnx.merge(graph, state)
    key = common["key"]
    if key is not None:
        key = jax.random.fold_in(key, len(block.branches) * layer + block.branches.index(name))
    return block.branch(
        name, x,
        rngs=None if key is None else make_rngs(key),
        shared=nnx.merge(shared_graph, common["shared"]), **common["given"],
    )  # fmt: skip


def _watched(stack: Stack) -> bool:
    """Whether a core is asked to say how well it estimates: it does so on the module itself."""
    return any(getattr(module, "watched", False) for _, module in nnx.iter_modules(stack))
