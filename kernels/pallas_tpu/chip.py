"""What all TPUs that the kernels are for have in common."""

LANES = 128
VMEM = 40 << 20
"""Bytes that a kernel may take, the largest more than 32 MiB: v5e and v6e have 128 MiB, tpu7x 64,
of which XLA wants a third for the arrays that it keeps there; its own limit is less."""
