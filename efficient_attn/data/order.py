"""The order in which training comes upon the examples: epoch after epoch, each shuffled anew."""

from functools import lru_cache

import numpy as np


class Order:
    """Which example comes at each place of a run without end.

    An epoch's permutation is that of `numpy.random.RandomState([seed, epoch])`, whose numbers numpy
    never changes, so that a run is the same on any version. Thread-safe; the permutations of the
    last two epochs are kept, 8 bytes an example each.
    """

    def __init__(self, count: int, seed: int):
        self.count = count

        @lru_cache(maxsize=2)
        def epoch(number: int) -> np.ndarray:
            return np.random.RandomState([seed, number]).permutation(count)

        self._epoch = epoch

    def at(self, places: np.ndarray) -> np.ndarray:
        """The examples at these places, int64."""
        epochs, within = np.divmod(places, self.count)
        found = np.empty_like(places)
        for number in np.unique(epochs):
            here = epochs == number
            found[here] = self._epoch(int(number))[within[here]]
        return found
