"""Learned rounding: its pieces against closed forms, and blocks that come out better than they went in."""

import dataclasses
import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import Compilations
from flax import linen as nn
from model_grid import cifar_resnet8, mlp, transposed_conv

from dfq_jax import Convention, ReconstructionConfig, apply_quantized, estimate_ranges, quantize_params, trace
from dfq_jax.quantizers.qtensor import QTensor
from dfq_jax.quantizers.weights import quantize_kernel
from dfq_jax.stages.comparison import compare, kl_divergence
from dfq_jax.stages.rounding.block import random_mask
from dfq_jax.stages.rounding.learned import reconstruct
from dfq_jax.stages.rounding.soft import base_codes, harden, init_soft, soft_weight, undecided


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (4, False), (8, True)])
def test_soft_rounding_starts_at_the_float_weights_and_hardens_to_the_codes(bits, symmetric):
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4, 8)), jnp.float32)
    kernel = quantize_kernel(weight, bits=bits, symmetric=symmetric, channel_axes=(3,))
    base, soft = base_codes(weight, kernel), init_soft(weight, kernel, 0.0)
    low, high = (np.asarray(end) for end in (kernel.params.lo, kernel.params.hi))
    expected = np.clip(weight, low, high)  # but for the margin that keeps the variables finite
    np.testing.assert_allclose(
        soft_weight(soft, base, kernel), expected, rtol=0, atol=0.0101 * float(kernel.scale.max())
    )
    np.testing.assert_array_equal(harden(soft, base, kernel).qvalue, kernel.qvalue)
    trusted = harden(init_soft(weight, kernel, 1.0), base, kernel)
    np.testing.assert_array_equal(trusted.qvalue, kernel.qvalue)


def test_the_regularizer_is_zero_where_all_is_decided():
    weight = jnp.linspace(-1.0, 1.0, 64).reshape(8, 8)
    soft = init_soft(weight, quantize_kernel(weight, bits=4, symmetric=False, channel_axes=()), 0.0)
    decided = soft._replace(rounding=jnp.where(soft.rounding > 0, 10.0, -10.0))
    assert float(undecided(decided, jnp.float32(2.0))) == 0
    assert float(undecided(soft, jnp.float32(2.0))) > 1


@pytest.mark.parametrize("share", [0.5, 0.25, 0.3, 1.0])
def test_random_mask_has_the_share_asked_for(share):
    mask = np.asarray(random_mask(jnp.uint32(123456789), (41, 31, 33), share))
    assert mask.shape == (41, 31, 33) and abs(mask.mean() - share) < 0.01


@pytest.mark.parametrize("shortcuts", ["float", "quantized"])
def test_reconstruction_lowers_the_error_of_blocks(shortcuts):
    graph, variables, qvariables, images = quantized_network(count=32, shortcuts=shortcuts)
    config = ReconstructionConfig(steps=60, batch_size=8, rounding_rate=0.1, regularizer=0.01)
    reports = []
    learned, info = reconstruct(
        graph, variables, qvariables, images, jax.random.key(0), config, on_progress=reports.append
    )
    assert info.completed and [b.layers for b in info.blocks] == [b.layers for b in graph.blocks]
    assert sum(b.kept for b in info.blocks) >= 3 and all(b.after < b.before for b in info.blocks if b.kept)
    assert reports[-1].eta == 0 and jax.tree.structure(learned) == jax.tree.structure(qvariables)
    kernels = [leaf for leaf in graph.leaves(learned) if isinstance(leaf, QTensor)]
    assert len(kernels) == len(graph.layers)
    simulated, integer = (apply_quantized(graph, learned, images[:2], integer=i) for i in (False, True))
    np.testing.assert_allclose(simulated, integer, rtol=0, atol=1e-5 * float(jnp.abs(simulated).max()))


def test_mirror_images_are_learned_from():
    """`flip` is the same as mirror images among those to learn from; those held out stay as they are."""
    graph, variables, qvariables, images = quantized_network("w4a4")
    images = np.asarray(images[:8])
    doubled = np.concatenate([images[:6], images[:6, :, ::-1], images[6:]])
    (ours, info), (expected, other) = (
        reconstruct(
            graph,
            variables,
            qvariables,
            x,
            jax.random.key(0),
            ReconstructionConfig(steps=3, batch_size=4, flip=flip, held_out=2 / len(x)),
        )
        for x, flip in ((images, True), (doubled, False))
    )
    assert [b.after for b in info.blocks] == [b.after for b in other.blocks]
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_vectors_have_no_mirror_images():
    case = mlp()
    apply_fn, variables = case.function()
    graph = trace(apply_fn, variables, case.input_shape)
    images = np.random.default_rng(0).normal(size=(8, *case.input_shape[1:])).astype(np.float32)
    qvariables = quantize_params(
        graph, variables, estimate_ranges(graph, variables, images, Convention()), Convention()
    )
    ours, expected = (
        reconstruct(graph, variables, qvariables, images, jax.random.key(0), ReconstructionConfig(steps=3, flip=flip))
        for flip in (True, False)
    )
    for a, b in zip(jax.tree.leaves(ours[0]), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bad_input_is_refused():
    case = cifar_resnet8()
    apply_fn, variables = case.function()
    graph = trace(apply_fn, variables, case.input_shape)
    with pytest.raises(ValueError, match="found float variables"):
        reconstruct(graph, variables, variables, case.images(), jax.random.key(0))
    with pytest.raises(ValueError, match="steps: expected an integer"):
        ReconstructionConfig(steps=0)
    with pytest.raises(ValueError, match="flip: expected True or False, found 1"):
        ReconstructionConfig(flip=1)


class EqualBlocks(nn.Module):
    """A stem, equal residual blocks, a head."""

    blocks: int = 3

    @nn.compact
    def __call__(self, x):
        def layer(x):
            x = nn.Conv(8, (3, 3), use_bias=False)(x)
            return nn.BatchNorm(use_running_average=True)(x)

        x = nn.relu(layer(x))
        for _ in range(self.blocks):
            x = nn.relu(x + layer(nn.relu(layer(x))))
        return nn.Dense(5)(x.mean((1, 2)))


@functools.cache
def quantized_network(bits: str = "w3a4", count: int = 16, blocks: int = 3, **fields: str):
    module = EqualBlocks(blocks)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(count, 8, 8, 3)), jnp.float32)
    variables = jax.jit(module.init)(jax.random.key(0), images)
    graph = trace(module.apply, variables, images.shape)
    convention = Convention.parse(bits, **fields)
    ranges = estimate_ranges(graph, variables, images, convention)
    return graph, variables, quantize_params(graph, variables, ranges, convention), images


def test_equal_blocks_compile_once():
    graph, variables, qvariables, images = quantized_network("w3a4")
    config = ReconstructionConfig(steps=4, batch_size=4, chunk=3)  # the last call takes one step
    with Compilations() as compiled:
        _, info = reconstruct(graph, variables, qvariables, images, jax.random.key(0), config)
    assert len(info.blocks) == 5 and compiled["advance_block"] == 3
    with Compilations() as compiled:
        reconstruct(graph, variables, qvariables, images, jax.random.key(1), config)
    assert compiled["advance_block"] == 0


def test_more_equal_blocks_compile_nothing_more():
    """Not even in another network."""
    config = ReconstructionConfig(steps=2, batch_size=4)
    for blocks in (2, 4):
        graph, variables, qvariables, images = quantized_network("w3a4", blocks=blocks)
        with Compilations() as compiled:
            _, info = reconstruct(graph, variables, qvariables, images, jax.random.key(0), config)
        assert len(info.blocks) == blocks + 2
    assert not compiled


def test_prediction_difference_is_the_divergence_of_class_probabilities():
    rng = np.random.default_rng(0)
    found, expected = rng.normal(size=(2, 6, 5)) * 3
    p, q = (np.exp(z / 2) / np.exp(z / 2).sum(1, keepdims=True) for z in (expected, found))
    wanted = 4 * (p * np.log(p / q)).sum(1).mean()
    np.testing.assert_allclose(kl_divergence(jnp.asarray(expected), jnp.asarray(found), 2.0), wanted, rtol=1e-5)


def test_prediction_difference_lowers_the_divergence_of_outputs():
    """With next to no weight on the blocks' own error the outputs are all there is to learn from."""
    graph, variables, qvariables, images = quantized_network("w2a4")
    config = ReconstructionConfig(
        steps=40, batch_size=8, rounding_rate=0.05, bias_rate=0.03, prediction_weight=1e3, temperature=1.0
    )
    learned, info = reconstruct(graph, variables, qvariables, images, jax.random.key(0), config)
    before, after = (compare(graph, variables, q, images).divergence for q in (qvariables, learned))
    assert info.blocks[-1].kept and after < 0.8 * before


def test_prediction_difference_needs_class_scores():
    case = transposed_conv()
    apply_fn, variables = case.function()
    graph = trace(apply_fn, variables, case.input_shape)
    images = case.images()
    convention = Convention.parse("w4a4")
    qvariables = quantize_params(graph, variables, estimate_ranges(graph, variables, images, convention), convention)
    config = ReconstructionConfig(prediction_weight=1.0)
    with pytest.raises(ValueError, match="no class scores"):
        reconstruct(graph, variables, qvariables, images, jax.random.key(0), config)


# --- interruption and checkpoints ---

QUICK = ReconstructionConfig(steps=70, batch_size=4, rounding_rate=0.1, chunk=10)


def run(path=None, on_progress=None, key=0, config=QUICK, **changes):
    graph, variables, qvariables, images = quantized_network()
    arguments = {"variables": variables, "qvariables": qvariables, "images": images} | changes
    return reconstruct(
        graph, **arguments, key=jax.random.key(key), config=config, checkpoint=path, on_progress=on_progress
    )


@functools.cache
def uninterrupted():
    return run()


def interrupt_at(batch, step):
    def on_progress(report):
        if (report.batch, report.step) == (batch, step):
            signal.raise_signal(signal.SIGINT)

    return on_progress


def same_network(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and (x == y).all()


def facts(info):
    return [dataclasses.replace(block, seconds=0.0) for block in info.blocks]


@pytest.mark.parametrize("at", [(1, 50), (3, 70), (5, 50)])
def test_an_interrupted_reconstruction_resumes_to_the_same_bits(tmp_path, at):
    """In its first block, after the first call of another block, in its last one."""
    path, reports = tmp_path / "work.npz", []
    given = quantized_network()[2]
    unfinished, info = run(path, interrupt_at(*at))
    assert not info.completed and len(info.blocks) == at[0] - (at[1] < 70) and os.listdir(tmp_path) == ["work.npz"]
    if not info.blocks:
        same_network(unfinished, given)
    resumed, info = run(path, reports.append)
    expected, whole = uninterrupted()
    same_network(resumed, expected)
    assert info.completed and facts(info) == facts(whole)
    assert any(block.kept for block in info.blocks[:3])
    assert (reports[0].batch, reports[0].step) > at  # did not start anew
    assert [report.name for report in reports][-1] == info.blocks[-1].name
    assert os.listdir(tmp_path) == []


def test_a_finished_reconstruction_is_read_from_its_file(tmp_path):
    graph, variables, qvariables, images = quantized_network()
    arguments = graph, variables, qvariables, images, jax.random.key(0), dataclasses.replace(QUICK, steps=2)
    first, found = reconstruct(*arguments, checkpoint=tmp_path / "work.npz", keep_checkpoint=True)
    again, info = reconstruct(*arguments, checkpoint=tmp_path / "work.npz", on_progress=pytest.fail)
    same_network(again, first)
    assert facts(info) == facts(found) and os.listdir(tmp_path) == []


def test_checkpoints_of_other_reconstructions_are_refused(tmp_path):
    path = tmp_path / "work.npz"
    run(path, interrupt_at(2, 50))
    _, variables, _, images = quantized_network()
    others = {
        "key": 1,
        "config": dataclasses.replace(QUICK, drop=0.25),
        "variables": jax.tree.map(lambda leaf: leaf + 1e-3, variables),
        "qvariables": quantized_network("w4a4")[2],
        "images": images[::-1],
    }
    for name, value in others.items():
        with pytest.raises(ValueError, match=r"checkpoint: '.*work\.npz' belongs to other work"):
            run(path, **{name: value})
    with pytest.raises(ValueError, match="there is no folder"):
        run(tmp_path / "none" / "work.npz")
