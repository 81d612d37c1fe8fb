"""The bundled Fashion-MNIST networks: their weights fit the modules and reach the stated accuracy."""

from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from dfq_jax.zoo import fashion

WEIGHTS = resources.files("dfq_jax.zoo") / "weights"
SIZE_LIMIT = 8_000_000
# Lowest float top-1 in percent on the 10,000 test images.
TARGETS = {"resnet20": 93.5, "mobilenet": 91.8}
# The first 1,000 test images are a small sample: 1.5 points leave room for its own deviation.
SAMPLE_MARGIN = 1.5


def load_arrays(name: str) -> dict[str, np.ndarray]:
    with (WEIGHTS / name).open("rb") as file, np.load(file) as archive:
        return dict(archive)


def expected_shapes(network: str) -> dict[str, tuple[int, ...]]:
    """What the module itself holds, as flat paths and shapes."""
    if network == "resnet20":
        tree = jax.eval_shape(fashion.FashionResNet20().init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    else:
        tree = nnx.to_pure_dict(nnx.state(fashion.mobilenet()))
    return {key: value.shape for key, value in traverse_util.flatten_dict(tree, sep="/").items()}


def logits_function(network: str):
    """The network with its bundled weights, as a jitted function `[N, 28, 28, 1] -> [N, 10]`."""
    tree = traverse_util.unflatten_dict(load_arrays(f"fashion_{network}.npz"), sep="/")
    if network == "resnet20":
        model = fashion.FashionResNet20()
        return jax.jit(lambda x: model.apply(tree, x))
    graph, state = nnx.split(fashion.mobilenet())
    nnx.replace_by_pure_dict(state, tree)
    return jax.jit(lambda x: nnx.merge(graph, state)(x))


def top1(network: str, count: int) -> float:
    data = load_arrays("fashion_test.npz")
    x = (data["images"][:count].astype(np.float32) / 255 - fashion.MEAN) / fashion.STD
    logits_of = logits_function(network)
    predicted = [np.argmax(logits_of(part), -1) for part in np.split(x, count // 250)]
    return 100 * float(np.mean(np.concatenate(predicted) == data["labels"][:count]))


def test_test_set_is_complete():
    data = load_arrays("fashion_test.npz")
    assert data["images"].shape == (10_000, 28, 28, 1) and data["images"].dtype == np.uint8
    assert data["labels"].shape == (10_000,) and data["labels"].dtype == np.uint8
    assert np.bincount(data["labels"]).tolist() == [1_000] * fashion.CLASSES


@pytest.mark.parametrize("network", TARGETS)
def test_weights_fit_the_module(network):
    arrays = load_arrays(f"fashion_{network}.npz")
    assert {key: value.shape for key, value in arrays.items()} == expected_shapes(network)
    assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in arrays.values())


@pytest.mark.parametrize("network", TARGETS)
def test_top1_on_a_sample(network):
    assert top1(network, 1_000) >= TARGETS[network] - SAMPLE_MARGIN


@pytest.mark.slow
@pytest.mark.parametrize("network", TARGETS)
def test_top1_on_the_test_set(network):
    assert top1(network, 10_000) >= TARGETS[network]


def test_constructors_return_eval_mode_networks():
    x = jnp.zeros((2, 28, 28, 1))
    model = fashion.mobilenet()
    before = jax.tree.leaves(nnx.state(model, nnx.BatchStat))
    assert model(x).shape == (2, fashion.CLASSES)
    after = jax.tree.leaves(nnx.state(model, nnx.BatchStat))
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_package_data_stays_small():
    assert sum(len(file.read_bytes()) for file in WEIGHTS.iterdir() if file.is_file()) < SIZE_LIMIT
