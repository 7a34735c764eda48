"""Ops by fused kernels: refusals, padding and gradients, the same for every chip."""
