"""Top-1 and top-5 against a count in NumPy, and their intervals."""

import numpy as np
import pytest

from dfq_jax.data.evaluation import accuracy, predict

rng = np.random.default_rng(0)


def scores(variables, x):
    return x.reshape(x.shape[0], -1) @ variables


def batches(images, size):
    labels = np.arange(len(images), dtype=np.int32)
    return [(images[i : i + size] / np.float32(255), labels[i : i + size]) for i in range(0, len(images), size)]


@pytest.mark.parametrize(("classes", "columns"), [(3, 1), (5, 1), (6, 5), (20, 5)])
def test_predictions_are_sorted(classes, columns):
    weights = rng.normal(size=(12, classes)).astype(np.float32)
    images = rng.integers(0, 256, (23, 2, 2, 3), np.uint8)
    seen = []
    found, labels = predict(scores, weights, batches(images, 5), on_progress=seen.append)
    expected = np.argsort(-(images.reshape(23, -1) / 255 @ weights), axis=1)[:, :columns]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(labels, np.arange(23))
    assert seen == [5, 10, 15, 20, 23]


def test_one_size_of_batch_is_compiled():
    shapes = []

    def traced(variables, x):
        shapes.append(x.shape)
        return scores(variables, x)

    predict(traced, np.zeros((12, 3), np.float32), batches(rng.integers(0, 256, (23, 2, 2, 3), np.uint8), 5))
    assert shapes == [(5, 2, 2, 3)]


def test_accuracy():
    predicted = np.array([[0, 1, 2, 3, 4], [5, 0, 1, 2, 3], [1, 2, 3, 4, 5], [2, 1, 0, 5, 4]])
    found = accuracy(predicted, np.array([0, 3, 0, 4]), predicted[::-1])
    assert (found.top1, found.top5, found.agreement, found.n) == (25.0, 75.0, 0.0, 4)
    assert accuracy(predicted[:, :1], np.array([0, 3, 0, 4])).top5 is None


def test_margins_are_those_of_wilson():
    # Wilson's interval solves (p - share)^2 = z^2 p (1 - p) / n for p.
    found = accuracy(np.tile(np.arange(5), (100, 1)), np.where(np.arange(100) < 80, 0, 9))
    n, share, z = 100, 0.8, 1.96
    roots = np.roots([1 + z**2 / n, -(2 * share + z**2 / n), share**2])
    assert found.margin == pytest.approx(100 * abs(roots[0] - roots[1]) / 2)
    assert found.top5_margin == pytest.approx(found.margin)


@pytest.mark.untyped
def test_bad_input():
    with pytest.raises(ValueError, match="predicted: expected"):
        accuracy(np.zeros(3, int), np.zeros(3, int))
    with pytest.raises(ValueError, match="reference: expected"):
        accuracy(np.zeros((3, 1), int), np.zeros(3, int), np.zeros((2, 1), int))
    with pytest.raises(ValueError, match="found none to evaluate on"):
        predict(scores, np.zeros((12, 3)), [])
    growing = batches(np.zeros((2, 2, 2, 3), np.uint8), 2) + batches(np.zeros((3, 2, 2, 3), np.uint8), 3)
    with pytest.raises(ValueError, match="one has 3 images, the first 2"):
        predict(scores, np.zeros((12, 3), np.float32), growing)


def test_accuracy_over_nothing_is_refused():
    with pytest.raises(ValueError, match="labels: found none"):
        accuracy(np.zeros((0, 5), np.int32), np.zeros(0, np.int32))
