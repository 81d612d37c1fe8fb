"""What Flax's training programs write, read into the variables of a module."""

import flax
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx
from flax.training import train_state

from dfq_jax.zoo.arrays import open_arrays
from dfq_jax.zoo.checkpoint import flatten_names, load_checkpoint
from dfq_jax.zoo.names import flax_names

SHAPE = (1, 8, 8, 3)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(5)(x.mean((1, 2)))


class Twin(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.relu(self.bn(self.conv(x))))


class TrainState(train_state.TrainState):
    batch_stats: object
    ema_params: object = None
    dropout_rng: object = None


def random_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), tree)


@pytest.fixture(scope="module")
def variables():
    return random_like(jax.eval_shape(lambda k, x: Net().init(k, x, False), jax.random.key(0), jnp.zeros(SHAPE)))


@pytest.fixture(scope="module")
def state(variables):
    made = TrainState.create(
        apply_fn=Net().apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        ema_params=random_like(variables["params"], 1),
        dropout_rng=jax.random.PRNGKey(0),
        tx=optax.adam(1e-3),
    )
    return made.replace(step=7)


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def load(path, **arguments):
    return load_checkpoint(path, Net(), input_shape=SHAPE, **arguments)


def write_msgpack(path, tree):
    path.write_bytes(flax.serialization.to_bytes(tree))
    return path


def test_train_state_msgpack(tmp_path, state, variables):
    same(load(write_msgpack(tmp_path / "state", state)), variables)
    same(load(write_msgpack(tmp_path / "inner", {"state": state, "epoch": 3})), variables)
    with pytest.raises(ValueError, match="unexpected: config"):
        load(write_msgpack(tmp_path / "other", {"model": state, "config": np.ones(3)}))


def test_statistics_under_another_name(tmp_path, variables):
    tree = {
        "params": variables["params"],
        "model_state": {"batch_stats": variables["batch_stats"]},
        "opt_state": {"0": {"mu": random_like(variables["params"], 2)}},
    }
    same(load(write_msgpack(tmp_path / "state", tree)), variables)


FORMS = {
    "dots": lambda name: name.replace("/", "."),
    "keystr": lambda name: "".join(f"['{part}']" for part in name.split("/")),
    "slashes": lambda name: f"state/{name}",
    "wrapped": lambda name: f"params.{name}" if name.startswith("params") else name,
    "boxed": lambda name: f"{name}/value",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_flat_names(tmp_path, variables, form, suffix):
    content = {FORMS[form](name): leaf for name, leaf in flatten_names(variables).items()}
    path = tmp_path / f"w.{suffix}"
    if suffix == "npz":
        np.savez(path, **content)
    else:
        safetensors.numpy.save_file(content, path)
    same(load(path), variables)


def test_parameters_alone(tmp_path, variables):
    for number, tree in enumerate((variables["params"], {"params": variables["params"]})):
        path = write_msgpack(tmp_path / f"{number}", tree)
        with pytest.raises(ValueError, match=r"no 'batch_stats', which the model needs.*variables=\{'batch_stats'"):
            load(path)
        given = {"batch_stats": jax.tree.map(jnp.asarray, variables["batch_stats"])}
        same(load(path, variables=given), variables)
        # What the file has is the file's.
        same(load(path, variables={**given, "params": random_like(variables["params"], 9)}), variables)
    with pytest.raises(ValueError, match=r"variables: the model has no 'statistics/BatchNorm_0/mean'"):
        load(path, variables={"statistics": variables["batch_stats"]})
    with pytest.raises(ValueError, match=r"variables: 'batch_stats/BatchNorm_0/mean': shape \(3,\)"):
        load(path, variables={"batch_stats": {"BatchNorm_0": {"mean": np.zeros(3), "var": np.ones(4)}}})


def test_replicated(tmp_path, state, variables):
    copies = jax.tree.map(lambda leaf: np.stack([np.asarray(leaf)] * 3), flax.serialization.to_state_dict(state))
    with pytest.warns(UserWarning, match="leading axis of 3.*the first copy is taken"):
        found = load(write_msgpack(tmp_path / "copies", copies))
    same(found, variables)
    copies["batch_stats"]["BatchNorm_0"]["mean"][1] += 1
    with pytest.raises(ValueError, match=r"mean: shape \(3, 4\), and what lies along the first axis differs"):
        load(write_msgpack(tmp_path / "differ", copies))
    partly = {
        **variables,
        "params": {**variables["params"], "Dense_0": {"kernel": np.ones((2, 4, 5)), "bias": np.ones(5)}},
    }
    with pytest.raises(ValueError, match=r"Dense_0/kernel: shape \(2, 4, 5\) has an axis too many"):
        load(write_msgpack(tmp_path / "partly", partly))


def test_names_of_layers_that_training_uses_too():
    """A projection called `key` is a layer, the top-level `key` is not."""
    wanted = ["params/attention/key/kernel", "params/key/kernel", "params/head/bias"]
    readers = {name: name.upper for name in ("attention/key/kernel", "key/kernel", "head/bias", "rng", "step")}
    assert list(flax_names(readers, wanted)) == wanted


def test_files_of_other_programs_keep_their_names():
    readers = {name: name.upper for name in ("fc.weight", "fc.bias", "bn.weight", "bn.bias", "bn.running_mean")}
    assert flax_names(readers, ["fc/kernel", "fc/bias", "bn/scale", "bn/bias", "bn/mean", "bn/var"]) is readers


def test_a_wrong_part_is_not_taken_for_a_wrapper(tmp_path, variables):
    deeper = {**variables, "params": {**variables["params"], "Stage_0": variables["params"]}}
    with pytest.raises(ValueError, match="unexpected: params/Stage_0/BatchNorm_0/bias"):
        load(write_msgpack(tmp_path / "deeper", deeper))


# Directories


@pytest.fixture(scope="module")
def ocp():
    return pytest.importorskip("orbax.checkpoint", reason="needs orbax-checkpoint")


def save(ocp, path, tree, **options):
    checkpointer = ocp.PyTreeCheckpointer(**options)
    checkpointer.save(path, tree)
    return path


@pytest.mark.parametrize("ocdbt", [True, False])
def test_orbax(tmp_path, ocp, state, variables, ocdbt):
    same(load(save(ocp, tmp_path / "variables", variables, use_ocdbt=ocdbt)), variables)
    same(load(save(ocp, tmp_path / "state", state, use_ocdbt=ocdbt)), variables)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "standard", variables)
    same(load(tmp_path / "standard"), variables)


def test_orbax_lists_and_half_precision(tmp_path, ocp):
    tree = {"params": {"layers": [{"w": jnp.ones((2, 3), jnp.bfloat16)}, {"w": jnp.arange(3.0)}]}, "name": "x"}
    with open_arrays(save(ocp, tmp_path / "lists", tree)) as readers:
        found = {name: read() for name, read in readers.items()}
    assert {name: (leaf.shape, leaf.dtype.name) for name, leaf in found.items()} == {
        "params/layers/0/w": ((2, 3), "bfloat16"),
        "params/layers/1/w": ((3,), "float32"),
    }
    np.testing.assert_array_equal(found["params/layers/1/w"], [0, 1, 2])


def test_newest_complete_step(tmp_path, ocp, state, variables):
    with ocp.CheckpointManager(tmp_path / "manager") as manager:
        for step in (9, 10):
            tree = random_like(variables, step) if step == 9 else state
            manager.save(step, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
    (tmp_path / "manager" / "11").mkdir()  # cut off
    same(load(tmp_path / "manager"), variables)
    same(load(tmp_path / "manager" / "9"), random_like(variables, 9))


def test_items_of_a_step(tmp_path, ocp, variables):
    with ocp.CheckpointManager(tmp_path / "manager") as manager:
        items = {name: ocp.args.StandardSave(tree) for name, tree in variables.items()}
        manager.save(3, args=ocp.args.Composite(meta=ocp.args.JsonSave({"a": 1}), **items))
        manager.wait_until_finished()
    same(load(tmp_path / "manager"), variables)


@pytest.mark.filterwarnings("ignore:Flax Checkpointing will soon be deprecated:DeprecationWarning")
@pytest.mark.parametrize("use_orbax", [True, False])
def test_flax_training_checkpoints(tmp_path, state, variables, use_orbax, monkeypatch):
    if use_orbax:
        pytest.importorskip("orbax.checkpoint", reason="needs orbax-checkpoint")
    from flax.training import checkpoints

    monkeypatch.setattr(flax.config, "_values", {**flax.config._values, "flax_use_orbax_checkpointing": use_orbax})
    checkpoints.save_checkpoint(tmp_path, random_like(variables, 9), step=9, keep=2)
    checkpoints.save_checkpoint(tmp_path, state, step=10, keep=2)
    assert (tmp_path / "checkpoint_10").is_dir() == use_orbax
    same(load(tmp_path), variables)
    same(load(tmp_path / "checkpoint_9"), random_like(variables, 9))


@pytest.mark.parametrize("pure", [True, False])
def test_nnx_states(tmp_path, ocp, pure):
    module = Twin(nnx.Rngs(0))
    _, _, full = nnx.split(module, nnx.RngState, ...)
    expected = random_like(nnx.to_pure_dict(full))
    nnx.update(module, expected)
    state = nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState))) if pure else nnx.state(module)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "nnx", state)
    same(load_checkpoint(tmp_path / "nnx", Twin(nnx.Rngs(1))), expected)


def test_directories_that_are_none(tmp_path):
    def refused(match):
        with pytest.raises(ValueError, match=match):
            load(tmp_path)

    refused("it is a directory and no checkpoint.*it holds nothing")
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(r"name the file: model\.safetensors.*Read are: what Orbax")
    (tmp_path / "saved_model.pb").write_bytes(b"")
    refused("TensorFlow SavedModel")


def test_damaged_orbax(tmp_path, ocp, variables):
    path = save(ocp, tmp_path / "damaged", variables)
    (path / "_METADATA").write_text("{")
    with pytest.raises(ValueError, match=r"cannot be read: Orbax (cannot read|finds no tree of arrays in) '.*damaged'"):
        load(path)


def test_without_orbax(tmp_path, ocp, variables, monkeypatch):
    import sys

    path = save(ocp, tmp_path / "tree", variables)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"pip install 'dfq_jax\[orbax\]'"):
        load(path)


@pytest.mark.parametrize(
    ("content", "match"),
    [(b"\x89HDF\r\n\x1a\n" + bytes(9), "load it with Keras"), (b"\x1f\x8b" + bytes(9), "a gzip file: unpack it")],
)
def test_files_of_other_kinds(tmp_path, content, match):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        load(tmp_path / "file")


def test_directories_for_models_of_the_zoo(tmp_path, ocp):
    """As `--checkpoint` of the command line gives them."""
    from dfq_jax.cli.models import resolve

    expected = random_like(resolve("fashion_resnet20", weights=False).variables)
    save(ocp, tmp_path / "1" / "state", {"state": expected, "step": 3})
    found = resolve("fashion_resnet20", tmp_path).variables
    same(jax.tree.map(np.asarray, found), expected)
