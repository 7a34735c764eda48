"""Every op on the chip at hand, checked and timed beside others: `python -m kernels.bench`."""
