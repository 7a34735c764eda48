"""Training: one loop, the checkpoints of a run, and the numbers it leaves."""
