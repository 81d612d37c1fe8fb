"""A batch computed in pieces: what the function makes of it as a whole, whatever its size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import Compilations

from dfq_jax.base import in_pieces

rng = np.random.default_rng(0)
WEIGHTS = rng.integers(-9, 9, size=(6, 3)).astype(np.float32)


def network(variables, x):
    return {"scores": x @ variables, "places": jnp.argmax(x, 1)}


@pytest.mark.parametrize("first", [1, 5, 40])
@pytest.mark.parametrize("size", [1, 4, 16, 50])
def test_outputs_are_those_of_the_whole_batch(first, size):
    x = rng.integers(-9, 9, size=(size, 6)).astype(np.float32)
    found = in_pieces(network, WEIGHTS, np.zeros((first, 6), np.float32))(x)
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(np.asarray, network(WEIGHTS, x)))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere a batch is computed at once")
@pytest.mark.parametrize(("shape", "expected"), [((3, 224, 224, 3), 3), ((9, 224, 224, 3), 4), ((99, 8), 16)])
def test_pieces_of_large_images_are_of_few(shape, expected):
    sizes = []

    def size(_, x):
        sizes.append(len(x))
        return x.reshape(len(x), -1).sum(1)

    assert in_pieces(size, (), np.zeros(shape, np.float32))(np.ones(shape, np.float32)).shape == shape[:1]
    assert sizes == [expected]


def test_compiled_once_with_the_settings_of_the_caller():
    shapes = []

    def traced(variables, x):
        shapes.append((x.shape[1:], x.dtype, jnp.result_type(float)))
        return x @ variables

    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        function = in_pieces(traced, WEIGHTS.astype(np.float64), np.zeros((8, 6)))
        found = function(np.full((21, 6), 1 / 3))
    assert shapes == [((6,), np.float64, np.float64)]
    np.testing.assert_allclose(found, np.full((21, 6), 1 / 3) @ WEIGHTS.astype(np.float64), rtol=1e-14, atol=1e-14)


def test_the_same_function_is_compiled_once():
    def scaled(factor, variables, x):
        return factor * (x @ variables)

    x = rng.integers(-9, 9, size=(20, 6)).astype(np.float32)
    with Compilations() as compiled:
        for factor, weights in ((2, WEIGHTS), (2, -WEIGHTS), (3, WEIGHTS)):
            found = in_pieces(scaled, weights, x, static=(factor,))(x)
            np.testing.assert_array_equal(found, factor * (x @ weights))
    assert compiled["scaled"] == 2  # what is static makes other programs, weights do not


def test_an_error_in_a_piece_is_the_callers():
    function = in_pieces(network, WEIGHTS, np.zeros((8, 6), np.float32))
    with pytest.raises(TypeError):
        function(np.zeros((8, 5), np.float32))
