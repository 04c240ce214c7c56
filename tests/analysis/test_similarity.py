"""Linear CKA against its definition in Gram matrices, and its properties."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.analysis.similarity import linear_cka


def _features(rows, width, seed):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _by_gram_matrices(*features):
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of arXiv 1905.00414, section 3, with K and L of examples by examples."""
    K, L = (some.double() @ some.double().T for some in features)
    n = len(K)
    H = torch.eye(n, dtype=torch.float64) - 1 / n
    kl, kk, ll = (torch.trace(a @ H @ b @ H) / (n - 1) ** 2 for a, b in ((K, L), (K, K), (L, L)))
    return float(kl / (kk * ll).sqrt())


@pytest.mark.parametrize("rows", [7, 40, 1500], ids=["fewer than features", "more", "more than a chunk"])
def test_it_is_what_the_gram_matrices_give(rows):
    X = _features(rows, 12, 0)
    Y = X[:, :9] + 0.7 * _features(rows, 9, 1) + 5
    found = linear_cka(X, Y)
    assert found == pytest.approx(_by_gram_matrices(X, Y), rel=1e-10)  # both in float64
    assert 0.1 < found < 0.99


def test_a_turn_a_scale_and_a_shift_change_nothing():
    X = _features(60, 8, 0)
    turned, _ = torch.linalg.qr(_features(8, 8, 1))
    assert linear_cka(X, 3 * X @ turned + 7) == pytest.approx(1, abs=1e-12)


def test_the_same_features_are_alike_to_the_bit():
    X = _features(60, 8, 0).float()
    assert linear_cka(X, X.clone()) == 1.0


def test_unrelated_features_are_unlike_where_there_are_many_examples_and_alike_where_there_are_few():
    assert linear_cka(_features(5000, 8, 0), _features(5000, 8, 1)) < 0.01
    assert linear_cka(_features(8, 500, 0), _features(8, 500, 1)) > 0.8


def test_a_far_mean_in_float32_does_not_drown_the_features():
    X = _features(500, 8, 0)
    Y = X + _features(500, 8, 1)
    far = [(features + 1000).float() for features in (X, Y)]
    # float32 holds 1000 to 6e-5, of features near 1
    assert linear_cka(*far) == pytest.approx(linear_cka(X, Y), abs=1e-3)
    assert linear_cka(*far) == pytest.approx(_by_gram_matrices(*(f.double() - 1000 for f in far)), rel=1e-9)


def test_features_that_are_the_same_for_all_examples_are_like_nothing_else():
    X, same = _features(20, 4, 0), torch.ones(20, 4)
    assert linear_cka(X, same) == 0.0
    assert linear_cka(same, 2 * same) == 1.0


@pytest.mark.parametrize("shapes", [((4, 3), (5, 3)), ((1, 3), (1, 3)), ((2, 4, 3), (2, 4, 3))])
def test_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match=r"takes \(n, p\) and \(n, q\) of 2 examples or more, but got"):
        linear_cka(*(torch.zeros(shape) for shape in shapes))
