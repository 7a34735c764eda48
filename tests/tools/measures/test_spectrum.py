"""Singular values: of matrices whose spectrum is known."""

import numpy as np

from efficient_attn.tools.measures.spectrum import cumulative


def test_uniform_weights_have_one_direction_and_a_permutation_all_alike():
    uniform, permuted = np.full((8, 8), 1 / 8), np.eye(8)[::-1]
    found = cumulative(np.stack([uniform, permuted]))
    np.testing.assert_allclose(found[0], np.ones(8), atol=1e-12)
    np.testing.assert_allclose(found[1], np.arange(1, 9) / 8)


def test_the_shares_are_those_of_a_diagonal():
    found = cumulative(np.diag([1.0, 4.0, 2.0, 3.0]))
    np.testing.assert_allclose(found, [0.4, 0.7, 0.9, 1.0])
