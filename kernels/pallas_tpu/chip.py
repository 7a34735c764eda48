"""What all TPUs that the kernels are for have in common."""

LANES = 128
VMEM = 48 << 20
"""Bytes that a kernel may take: tpu7x has 64 MiB, v5e and v6e 128 MiB; XLA's own limit is less."""
