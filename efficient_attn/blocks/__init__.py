"""Blocks that backbones are made of."""

from efficient_attn.blocks.grid import GridStack
from efficient_attn.blocks.stack import Stack
from efficient_attn.blocks.transformer import Block, Cross, GridShape, Shape

__all__ = ["Block", "Cross", "GridShape", "GridStack", "Shape", "Stack"]
