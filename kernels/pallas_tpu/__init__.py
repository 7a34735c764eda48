"""Kernels of TPU, in Pallas (Mosaic)."""
