"""Each operation of JAX that has an ONNX form: a plain session of ONNX Runtime against JAX, at two batch sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dfq_jax

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from dfq_jax.export.onnx import to_onnx  # noqa: E402

SHAPE = (6, 4, 3)
INDEX = np.array([[2, 0], [5, 1]])


def conv(y, kernel, strides=1, padding="SAME", groups=1, dilation=1, spread=1):
    return lax.conv_general_dilated(
        y, jnp.asarray(kernel, jnp.float32), (strides,) * 2, padding, lhs_dilation=(spread,) * 2,
        rhs_dilation=(dilation,) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
    )  # fmt: skip


def kernel(*shape):
    return np.random.default_rng(3).normal(size=shape)


def pool(y, window, operation, start, strides=(1, 1), padding="VALID", **dilation):
    return lax.reduce_window(y, start, operation, (1, *window, 1), (1, *strides, 1), padding, **dilation)


# Functions of y, [N, 6, 4, 3], and of a parameter p, [1, 1, 1, 3].
OPERATIONS = {
    # repetition and constants of the batch's size
    "tile_parameter": lambda y, p: jnp.concatenate([jnp.tile(p, (y.shape[0], 1, 4, 1)), y], 1),
    "tile_twice": lambda y, p: jnp.tile(y, (1, 2, 3, 1)),
    "tile_channels": lambda y, p: jnp.tile(conv(y, kernel(1, 1, 3, 2)), (1, 1, 1, 2)),
    "tile_rank": lambda y, p: jnp.tile(p[0, 0, 0], (y.shape[0], 6, 4, 1)) * y,
    "broadcast_parameter": lambda y, p: jnp.concatenate([jnp.broadcast_to(p, (y.shape[0], 1, 4, 3)), y], 1),
    "broadcast_vector": lambda y, p: jnp.broadcast_to(p[0, 0, 0], y.shape) + y,
    "zeros_of_the_batch": lambda y, p: jnp.concatenate([y, jnp.zeros((*y.shape[:3], 2))], -1),
    "iota_of_the_batch": lambda y, p: y * lax.broadcasted_iota(jnp.float32, (y.shape[0], 6, 4, 3), 1),
    "repeat": lambda y, p: jnp.repeat(jnp.repeat(y, 2, axis=1), 2, axis=2),
    "stack": lambda y, p: jnp.stack([y, 2 * y, y + p], axis=2),
    "select_of_booleans": lambda y, p: jnp.where(y > 0, y > p, y < 1).astype(jnp.float32),
    # pieces
    "split": lambda y, p: jnp.concatenate(jnp.split(y, 2, axis=1)[::-1], axis=2),
    "roll": lambda y, p: jnp.roll(y, (1, -1), (1, 2)),
    "reverse": lambda y, p: y[:, ::-1],
    "reverse_strided": lambda y, p: y[:, ::-2, 1::2],
    "space_to_depth": lambda y, p: y.reshape(-1, 3, 2, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 3, 2, 12),
    "dynamic_slice": lambda y, p: lax.dynamic_slice_in_dim(y, 2, 3, axis=1),
    "dynamic_index": lambda y, p: lax.dynamic_index_in_dim(y, 2, axis=2, keepdims=False),
    "take": lambda y, p: jnp.take(y, INDEX, axis=1),
    "take_two_axes": lambda y, p: y[:, INDEX, INDEX % 4],
    "take_apart": lambda y, p: y[:, INDEX[:, 0], :, INDEX[:, 1]],
    "take_by_input": lambda y, p: jnp.take(
        jnp.arange(40.0).reshape(8, 5), jnp.abs(y * 2).astype(jnp.int32), axis=0, mode="clip"
    ),
    "pad_reflect": lambda y, p: jnp.pad(y, ((0, 0), (1, 2), (1, 0), (0, 0)), mode="reflect"),
    "pad_edge": lambda y, p: jnp.pad(y, ((0, 0), (1, 2), (1, 0), (0, 0)), mode="edge"),
    "pad_negative": lambda y, p: lax.pad(y, 2.0, ((0, 0, 0), (-1, 2, 0), (1, -2, 0), (0, 0, 0))),
    "pad_between": lambda y, p: lax.pad(y, 2.0, ((0, 0, 0), (1, -1, 1), (0, 1, 2), (0, 0, 0))),
    "squeeze": lambda y, p: jnp.squeeze(y[:, 2:3], 1),
    # reductions
    "reduce_max_min": lambda y, p: y.max((1, 2)) - y.min((1, 2)),
    "reduce_prod": lambda y, p: y.prod(-1),
    "all_any": lambda y, p: jnp.stack([(y > 0).all(-1), (y > 0).any(-1)]).astype(jnp.float32).transpose(1, 2, 3, 0),
    "argmax_argmin": lambda y, p: jax.nn.one_hot(y.argmax(1), 6) + jax.nn.one_hot(y.argmin(1), 6),
    "argmax_of_transposed": lambda y, p: conv(y, kernel(1, 1, 3, 2)).argmax(2).astype(jnp.float32),
    "top_k": lambda y, p: jnp.concatenate([lax.top_k(y, 2)[0], lax.top_k(y, 2)[1].astype(jnp.float32)], -1),
    "norm_var_std": lambda y, p: jnp.linalg.norm(y, axis=-1) + y.var(-1) + y.std(-1),
    "cumsum": lambda y, p: jnp.cumsum(y, 1) + lax.cumsum(y, 2, reverse=True),
    "softmax": lambda y, p: jax.nn.softmax(y, 1) + jax.nn.log_softmax(y) + jax.nn.logsumexp(y, 2, keepdims=True),
    # functions
    "activations": lambda y, p: jnp.concatenate(
        [f(y) for f in (jax.nn.mish, jax.nn.softplus, jax.nn.celu, jax.nn.selu, jax.nn.hard_tanh, jax.nn.swish,
                        jax.nn.log_sigmoid, jax.nn.soft_sign, jax.nn.squareplus, jax.nn.gelu, jax.nn.relu6)]
    , -1),
    "functions": lambda y, p: jnp.concatenate(
        [f(y) for f in (jnp.exp2, jnp.square, jnp.sinh, jnp.cosh, jnp.tanh, jnp.arctan, jnp.arcsinh, lax.erf, lax.erfc,
                        jnp.expm1, jnp.cbrt, jnp.sign, jnp.round, jnp.floor, jnp.ceil)]
    , -1),
    "of_positive": lambda y, p: jnp.concatenate(
        [f(jnp.abs(y) + 0.5) for f in (lax.rsqrt, jnp.log, jnp.log1p, jnp.sqrt, lambda z: z**-3, lambda z: z**1.7)], -1
    ),
    "clamp": lambda y, p: lax.clamp(-0.5, y, 0.25) + lax.clamp(y * p - 1, y, y * p),
    "select": lambda y, p: jnp.where(y > 0, y, p * y),
    "logic": lambda y, p: (((y > 0) & (y < 1)) | ~(y > -1) ^ (y > p)).astype(jnp.float32),
    "bits": lambda y, p: ((y * 9).astype(jnp.int32) & 5 | 2).astype(jnp.float32),
    "glu": lambda y, p: jax.nn.glu(jnp.concatenate([y, y * p], -1)),
    "remainder": lambda y, p: jnp.mod(y, 0.7) + lax.rem(y, 0.3 + p**2),
    "bfloat16": lambda y, p: (jnp.round(y.astype(jnp.bfloat16)) * 2).astype(jnp.float32),
    # pooling
    "max_pool_same": lambda y, p: pool(y, (3, 2), lax.max, -jnp.inf, (2, 1), "SAME"),
    "min_pool": lambda y, p: pool(y, (2, 2), lax.min, jnp.inf),
    "sum_pool": lambda y, p: pool(y, (3, 2), lax.add, 0.0, (2, 1), "SAME"),
    "mean_of_what_is_there": lambda y, p: pool(y, (3, 3), lax.add, 0.0, (2, 2), "SAME")
    / pool(jnp.ones_like(y), (3, 3), lax.add, 0.0, (2, 2), "SAME"),
    "max_pool_dilated": lambda y, p: pool(y, (2, 2), lax.max, -jnp.inf, window_dilation=(1, 2, 2, 1)),
    "pool_over_channels": lambda y, p: lax.reduce_window(y, -jnp.inf, lax.max, (1, 1, 2, 3), (1, 1, 1, 1), "VALID"),
    # images
    **{f"resize_{method}": lambda y, p, method=method: jax.image.resize(y, (y.shape[0], 9, 5, 3), method)
       for method in ("nearest", "bilinear", "bicubic", "lanczos3")},
    # products
    "products_of_inputs": lambda y, p: jnp.einsum("nhwc,nhvc->nhwv", y, jnp.tanh(y)),
    "several_batch_axes": lambda y, p: jnp.einsum("nhwc,hwcd->nhwd", y, jnp.asarray(kernel(6, 4, 3, 2), jnp.float32)),
    "kernel_on_the_left": lambda y, p: jnp.einsum("vw,nhwc->nhvc", jnp.asarray(kernel(5, 4), jnp.float32), y),
    "depthwise": lambda y, p: conv(y, kernel(3, 3, 1, 6), groups=3, dilation=2),
    "cropping_convolution": lambda y, p: conv(y, kernel(3, 3, 3, 2), padding=((-1, 2), (0, -1))),
    "transposed": lambda y, p: conv(y, kernel(3, 3, 3, 2), padding=((2, 1), (1, 1)), spread=2),
    "transposed_grouped": lambda y, p: conv(y, kernel(3, 3, 1, 6), padding=((2, 1), (1, 1)), spread=2, groups=3),
    "transposed_beyond_reach": lambda y, p: conv(y, kernel(2, 2, 3, 2), padding=((1, 2), (1, 2)), spread=3),
    "transposed_far_beyond": lambda y, p: conv(y, kernel(1, 2, 3, 2), padding=((3, 4), (2, 0)), spread=2),
    "transposed_strided": lambda y, p: conv(y, kernel(3, 3, 3, 2), strides=2, padding=((1, 1), (1, 1)), spread=3),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name):
    function = OPERATIONS[name]

    def network(v, x):
        y = x @ v["kernel"]
        z = function(y, v["p"])
        return z.reshape(x.shape[0], -1)

    rng = np.random.default_rng(0)
    variables = {"kernel": rng.normal(size=(3, 3)), "p": rng.normal(size=(1, 1, 1, 3))}
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), variables)
    x = rng.normal(size=(3, *SHAPE)).astype(np.float32)
    graph = dfq_jax.trace(network, variables, (2, *SHAPE))
    session = onnxruntime.InferenceSession(to_onnx(graph, variables).SerializeToString())
    for n in (3, 1):
        expected = np.asarray(network(variables, x[:n]))
        (found,) = session.run(["logits"], {"input": x[:n]})
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize(
    "function",
    [
        lambda y: jnp.concatenate([y, jnp.broadcast_to(y[-1:], y.shape)], 1),  # the last example
        lambda y: y ** y.shape[0],
        lambda y: y * lax.broadcasted_iota(jnp.float32, y.shape, 0),
        lambda y: y.reshape(-1, 3)[: 2 * y.shape[0]],
    ],
    ids=["last_example", "power", "number_of_the_example", "part"],
)
def test_what_depends_on_the_batch_size_is_refused(function):
    variables = {"kernel": jnp.ones((3, 3))}
    graph = dfq_jax.trace(lambda v, x: function(x @ v["kernel"]), variables, (2, *SHAPE))
    with pytest.raises(dfq_jax.GraphError, match="batch"):
        to_onnx(graph, variables)
