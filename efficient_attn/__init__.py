"""Efficient transformers and attention in JAX/Flax: interchangeable mechanisms in shared backbones."""
