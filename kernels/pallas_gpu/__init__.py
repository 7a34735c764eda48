"""Kernel bodies for NVIDIA Hopper, in Mosaic GPU; imported lazily, by the op that runs them."""
