"""Blocks that backbones are made of."""

from efficient_attn.blocks.chain import Chain
from efficient_attn.blocks.grid import GridStack
from efficient_attn.blocks.stack import Stack
from efficient_attn.blocks.transformer import Block, Cross, GridShape, Shape

__all__ = ["Block", "Chain", "Cross", "GridShape", "GridStack", "Shape", "Stack"]
