"""Kernels compiled for chips that are not here, and their budget: `python -m kernels.static`."""
