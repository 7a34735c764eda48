"""The order in which training comes upon the examples, a whole epoch at a time.

It is that of `grain.MapDataset.range(count).seed(seed).shuffle().repeat()`: in each epoch grain's
`index_shuffle`, four rounds of the Simon cipher (Beaulieu et al. 2013, eprint 2013/404) on an even
number of bits that holds the set, at least 16; what falls outside the set is enciphered again until
it falls inside (cycle walking). Grain does so index by index, and of a set much smaller than 65,536
most of the work is walking: 51 turns each for 1,294 examples, 2.4 ms for a batch of 64.
"""

from functools import lru_cache

import numpy as np

ROUNDS = 4
LEAST_BITS = 16
CHUNK = 2**16  # numbers enciphered at a time


class Order:
    """Which example comes at each place of a run without end.

    Thread-safe. The permutations of the last two epochs are kept, 4 bytes an example each; making
    one takes up to 40 more for a moment.
    """

    def __init__(self, count: int, seed: int):
        self.count = count
        # As grain derives the seed of a `shuffle` right after `seed(seed)`.
        derived = int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])

        @lru_cache(maxsize=2)
        def epoch(number: int) -> np.ndarray:
            return permutation(count, (derived + number) % 2**32)

        self._epoch = epoch

    def at(self, places: np.ndarray) -> np.ndarray:
        """The examples at these places, int64."""
        epochs, within = np.divmod(places, self.count)
        found = np.empty_like(places)
        for number in np.unique(epochs):
            here = epochs == number
            found[here] = self._epoch(int(number))[within[here]]
        return found


def permutation(count: int, seed: int) -> np.ndarray:
    """`index_shuffle(i, max_index=count - 1, seed=seed, rounds=4)` of each i < count, as uint32.

    Of 4**k + 1 examples, k > 7, it is no permutation: grain's block is one bit short there, so that
    one example comes twice in an epoch and the last one never. Kept, for the sake of old runs.
    """
    if count == 1:
        return np.zeros(1, np.uint32)
    bits = max((count - 2).bit_length(), LEAST_BITS)
    word, keys = (bits + 1) // 2, _keys(seed)
    table = np.concatenate(
        [
            _encipher(np.arange(start, start + CHUNK, dtype=np.uint32), word, keys)
            for start in range(0, 4**word, CHUNK)
        ]
    )
    found = table[np.arange(count) % len(table)]
    table[:count] = np.arange(min(count, len(table)))  # what is inside the set stays there
    while (found >= count).any():
        found, table = table[found], table[table]  # as many turns again as before
    return found


def _encipher(numbers: np.ndarray, word: int, keys: list[int]) -> np.ndarray:
    """Simon on blocks of two words of so many bits each, at most 16."""
    mask = np.uint32(2**word - 1)

    def rotated(x: np.ndarray, by: int) -> np.ndarray:
        return (x << np.uint32(by) | x >> np.uint32(word - by)) & mask

    def mixed(x: np.ndarray, key: int) -> np.ndarray:
        return rotated(x, 1) & rotated(x, 8) ^ rotated(x, 2) ^ (np.uint32(key) & mask)

    left, right = numbers >> np.uint32(word), numbers & mask
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        left = left ^ mixed(right, first)
        right = right ^ mixed(left, second)
    return left << np.uint32(word) | right


def _keys(seed: int) -> list[int]:
    """A key for each round: C++'s `std::seed_seq{seed}` ([rand.util.seedseq]) for four words."""
    full, words = 2**32, [0x8B8B8B8B] * ROUNDS
    for k in range(2 * ROUNDS):
        i, p, q, last = (j % ROUNDS for j in (k, k + 1, k + 2, k - 1))
        if k < ROUNDS:
            x = words[i] ^ words[p] ^ words[last]
            r = 1664525 * (x ^ x >> 27) % full
            s = (r + {0: 1, 1: 1 + seed}.get(k, k)) % full
            words[p], words[q] = (words[p] + r) % full, (words[q] + s) % full
        else:
            x = (words[i] + words[p] + words[last]) % full
            r = 1566083941 * (x ^ x >> 27) % full
            s = (r - i) % full
            words[p], words[q] = words[p] ^ r, words[q] ^ s
        words[i] = s
    return words
