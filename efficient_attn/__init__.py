"""Efficient attention in JAX/Flax: interchangeable mechanisms in shared backbones."""
