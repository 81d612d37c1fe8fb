"""Random small networks, for properties that must hold on any architecture.

`random_network(seed)` writes a network as people write them, of parts drawn by the seed: the same seed gives the same
network and the same weights, and `print(network)` says what it is and how to get it again.

    from random_networks import random_network

    network = random_network(7)
    graph = dfq_jax.trace(network.apply_fn, network.variables, network.input_shape)

The generator knows what it wrote, so a network also says what there is to find: its kernels, and the bias and the
BatchNorm of each.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The first `DEALT` seeds are dealt their options in turn, so that together they hold every feature.
DEALT = 30

LETTERS = "xyz"
Function = Callable[[Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """What tracing is to find of one kernel.

    Attributes:
      kernel: path of the leaf.
      bias: path of its bias.
      norm: path of the mean of the BatchNorm behind it.
    """

    kernel: str
    bias: str | None = None
    norm: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomNetwork:
    """A network drawn from a seed.

    Attributes:
      seed: of `random_network`.
      features: what it holds, as words that tests choose by.
      lines: its parts in the order they run.
      apply_fn: `(variables, x) -> outputs`.
      variables: its weights.
      input_shape: `[N, ...]`.
      expected: what there is to find, each execution of a kernel.
      norms: paths of the means of all BatchNorms.
    """

    seed: int
    features: frozenset[str]
    lines: tuple[str, ...]
    apply_fn: Callable[[Any, jax.Array], Any]
    variables: Any
    input_shape: tuple[int, ...]
    expected: tuple[Expected, ...]
    norms: tuple[str, ...]

    def images(self, count: int) -> jax.Array:
        """`count` standard Gaussian inputs."""
        rng = np.random.default_rng(self.seed)
        return jnp.asarray(rng.normal(size=(count, *self.input_shape[1:])), jnp.float32)

    def __str__(self) -> str:
        lines = (*self.lines, f"features: {', '.join(sorted(self.features))}")
        return "\n  ".join([f"random_network({self.seed}): input {self.input_shape}", *lines])


@functools.cache
def random_network(seed: int) -> RandomNetwork:
    """The network of a seed."""
    return _Writer(seed).network()


# --- activations ---


@jax.custom_jvp
def _relu_with_gradient_of_ones(x):
    return jnp.maximum(x, 0)


@_relu_with_gradient_of_ones.defjvp
def _(primals, tangents):
    return _relu_with_gradient_of_ones(*primals), tangents[0]


@jax.custom_vjp
def _relu_with_halved_gradient(x):
    return jnp.maximum(x, 0)


_relu_with_halved_gradient.defvjp(lambda x: (jnp.maximum(x, 0), None), lambda _, g: (g / 2,))

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "none": lambda x: x,
    "relu6": jax.nn.relu6,
    "clip": lambda x: jnp.clip(x, 0, 1),
    "swish": jax.nn.swish,
    "gelu": jax.nn.gelu,
    "exact gelu": functools.partial(jax.nn.gelu, approximate=False),
    "leaky relu": jax.nn.leaky_relu,
    "hard swish": jax.nn.hard_swish,
    "where": lambda x: jnp.where(x > 0, x, 0.25 * x),
    "custom_jvp": _relu_with_gradient_of_ones,
    "custom_vjp": _relu_with_halved_gradient,
    "tanh": jnp.tanh,
    "elu": jax.nn.elu,
}

# --- BatchNorms, `(x, mean, var, scale, bias, epsilon)` with parameters that broadcast; scale and bias may be None ---


def _norm_rsqrt(x, mean, var, scale, bias, epsilon):
    factor = lax.rsqrt(var + epsilon)
    factor = factor if scale is None else factor * scale
    y = (x - mean) * factor
    return y if bias is None else y + bias


def _norm_division(x, mean, var, scale, bias, epsilon):
    y = (x - mean) / jnp.sqrt(var + epsilon)
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def _norm_folded(x, mean, var, scale, bias, epsilon):
    inverse = (var + epsilon) ** -0.5
    inverse = inverse if scale is None else inverse * scale
    shift = -mean * inverse
    return x * inverse + (shift if bias is None else shift + bias)


def _norm_standardize(x, mean, var, scale, bias, epsilon):
    y = jax.nn.standardize(x, mean=mean, variance=var, epsilon=epsilon)
    y = y if scale is None else scale * y
    return y if bias is None else bias + y


NORMS = {"rsqrt": _norm_rsqrt, "division": _norm_division, "folded": _norm_folded, "standardize": _norm_standardize}


CONVOLUTIONS = ("plain", "strided", "dilated", "grouped", "depthwise", "transposed", "pointwise", "padded")
UNITS = ("convolution", "residual", "gate", "tied", "convolution", "concatenation", "normalized_first", "dense",
         "stacked", "pool")  # fmt: skip

# --- the writer ---


@dataclasses.dataclass(frozen=True)
class _Part:
    """A function of the variables and a value, and the shape of its result without the batch: `(*space, channels)`."""

    function: Function
    shape: tuple[int, ...]


class _Product(NamedTuple):
    """A convolution or matrix product, the shape of its result as in `_Part`, and the path of its kernel."""

    function: Function
    shape: tuple[int, ...]
    kernel: str


class _Writer:
    """Draws a network. Shapes are `(*space, channels)` here, whatever the network's own order of axes."""

    def __init__(self, seed: int):
        self.seed = seed
        self.rng = np.random.default_rng(seed)
        self.drawn: set[str] = set()
        self.features: set[str] = set()
        self.lines: list[str] = []
        self.tree: dict[str, dict[str, np.ndarray]] = {}
        self.expected: list[tuple[str, str | None, str | None]] = []  # kernel, bias and mean as "name/field"
        self.norms: list[str] = []
        self.batched: set[str] = set()  # kernels with one for each position
        self.dims = self.draw("dims", (2, 1, 2, 3))
        self.first = self.draw("layout", ("channels last", "channels last", "channels first")) == "channels first"
        self.per_example = self.draw("batch", ("batch", "batch", "batch", "vmap")) == "vmap"
        self.dtype = jnp.dtype(self.draw("dtype", ("float32",) * 4 + ("bfloat16", "float16")))
        own = self.draw("stored as", ("float32", "its own type", "float32", "its own type", "float32")) != "float32"
        self.stored = str(self.dtype) if own else "float32"

    # --- drawing ---

    def draw(self, category: str, options: Sequence[Any]) -> Any:
        """One of the options; what was drawn is a feature."""
        if self.seed < DEALT and category not in self.drawn:
            option = options[(self.seed + zlib.crc32(f"{category}g".encode())) % len(options)]
        else:
            option = options[int(self.rng.integers(len(options)))]
        self.drawn.add(category)
        self.features.add(f"{category}: {option}")
        return option

    def chance(self, feature: str, probability: float) -> bool:
        found = self.rng.random() < probability
        if found:
            self.features.add(feature)
        return found

    def name(self, word: str) -> str:
        return f"{word}{sum(name.rstrip('0123456789') == word for name in self.tree)}"

    def leaf(self, name: str, field: str, value: Any) -> str:
        self.tree.setdefault(name, {})[field] = np.asarray(value, np.float32)
        return f"{name}/{field}"

    def kernel(self, name: str, shape: Sequence[int], fan_in: int, axis: int) -> str:
        """A kernel whose output channels (on `axis`) differ in size, so that scales along a wrong axis show."""
        value = self.rng.normal(0.0, math.sqrt(2.0 / fan_in), shape)
        spread = self.rng.permutation(np.geomspace(0.4, 2.0, shape[axis]))
        return self.leaf(name, "kernel", np.moveaxis(np.moveaxis(value, axis, -1) * spread, -1, axis))

    # --- values and their axes ---

    @property
    def lead(self) -> int:
        """Axes before those of one example."""
        return 0 if self.per_example else 1

    def channel_axis(self, shape: tuple[int, ...]) -> int:
        return self.lead if self.first and len(shape) > 1 else self.lead + len(shape) - 1

    def space_axes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        start = self.lead + (1 if self.first else 0)
        return tuple(range(start, start + len(shape) - 1))

    def along_channels(self, vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """A vector shaped to broadcast against a value."""
        if self.channel_axis(shape) == self.lead + len(shape) - 1:
            return vector
        return vector.reshape(-1, *[1] * (len(shape) - 1))

    # --- products ---

    def conv(self, shape: tuple[int, ...], kind: str, features: int | None = None) -> _Product:
        """A convolution: function, shape, and the path of its kernel."""
        *space, channels = shape
        dims, name = len(space), self.name("conv")
        features = features or int(self.rng.choice([3, 4, 5, 6]))
        size = 1 if kind == "pointwise" else int(self.rng.choice([2, 3]))
        stride, dilation, expand, groups = 1, 1, 1, 1
        padding = "SAME"
        if kind == "strided":
            stride, padding = 2, ("SAME", "VALID")[int(self.rng.integers(2))]
            padding = padding if min(space) >= size else "SAME"
        elif kind == "dilated":
            dilation = 2
        elif kind == "transposed":
            expand = 2
        elif kind == "padded":
            padding = [(int(a), int(b)) for a, b in self.rng.integers(0, 3, (dims, 2))]
            padding = padding if min(space) >= size else "SAME"
        elif kind == "grouped":
            groups = next((g for g in (2, 3, 5) if channels % g == 0), 1)
            features = groups * max(1, features // groups)
        elif kind == "depthwise":
            groups, features = channels, channels * int(self.rng.choice([1, 1, 2]))
        if expand > 1:
            padding = [(size - 1, size - 1)] * dims
        oihw = self.first or self.draw("kernel layout", ("HWIO", "HWIO", "OIHW")) == "OIHW"
        letters = LETTERS[:dims]
        value = f"NC{letters}" if self.first else f"N{letters}C"
        spec = f"OI{letters}" if oihw else f"{letters}IO"
        inner = channels // groups
        sides = [size] * dims
        kernel_shape = [features, inner, *sides] if oihw else [*sides, inner, features]
        path = self.kernel(name, kernel_shape, inner * size**dims, 0 if oihw else dims + 1)
        arguments = dict(
            window_strides=(stride,) * dims,
            padding=padding,
            lhs_dilation=(expand,) * dims,
            rhs_dilation=(dilation,) * dims,
            dimension_numbers=(value, spec, value),
            feature_group_count=groups,
        )
        per_example, dtype = self.per_example, self.dtype

        def function(v, h):
            h = h[None] if per_example else h
            h = lax.conv_general_dilated(h, v[name]["kernel"].astype(dtype), **arguments)
            return h[0] if per_example else h

        out = self.shape_of(function, shape)
        self.lines.append(
            f"{name}: {kind} convolution {'x'.join(map(str, kernel_shape))} ({spec}), stride {stride}, dilation "
            f"{dilation}, groups {groups}, padding {padding}: {shape} -> {out}"
        )
        return _Product(function, out, path)

    def dense(self, shape: tuple[int, ...], kind: str, features: int) -> _Product:
        """A matrix product over the channels, or over all axes of the value."""
        name, dtype, batch = self.name("dense"), self.dtype, "n" * self.lead
        *space, channels = shape
        letters = LETTERS[: len(space)]
        first = self.first and bool(space)
        value = f"{batch}c{letters}" if first else f"{batch}{letters}c"
        out = (*space, features)
        if kind == "einsum":  # over all axes
            physical = (channels, *space) if first else shape
            path = self.kernel(name, (*physical, features), math.prod(shape), len(shape))
            equation, out = f"{value},{value[self.lead :]}o->{batch}o", (features,)
        elif kind == "batched":  # a kernel for each position of the first spatial axis
            path = self.kernel(name, (space[0], channels, features), channels, 2)
            equation = f"{value},{letters[0]}co->{value.replace('c', 'o')}"
            self.batched.add(path)
        elif kind == "stored transposed":
            path = self.kernel(name, (features, channels), channels, 0)
            equation = f"{value},oc->{value.replace('c', 'o')}" if first else ""
        else:
            path = self.kernel(name, (channels, features), channels, 1)
            equation = f"{value},co->{value.replace('c', 'o')}" if first else ""

        def function(v, h):
            kernel = v[name]["kernel"].astype(dtype)
            if equation:
                return jnp.einsum(equation, h, kernel)
            return h @ (kernel.T if kind == "stored transposed" else kernel)

        self.lines.append(f"{name}: {kind} dense {shape} -> {out}")
        return _Product(function, out, path)

    def shape_of(self, function: Function, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a result, `(*space, channels)`, from that of a value."""
        variables = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self.tree)
        physical = (shape[-1], *shape[:-1]) if self.first and len(shape) > 1 else shape
        result = jax.eval_shape(function, variables, jax.ShapeDtypeStruct((1,) * self.lead + physical, self.dtype))
        out = result.shape[self.lead :]
        return (*out[1:], out[0]) if self.first and len(out) > 1 else out

    # --- what stands around products ---

    def bias(self, shape: tuple[int, ...], kernel: str) -> tuple[Function, str | None]:
        kind = self.draw("bias", ("plain", "none", "broadcast", "plain"))
        if kind == "none":
            return lambda v, h: h, None
        name, dtype = kernel.split("/")[0], self.dtype
        path = self.leaf(name, "bias", self.rng.normal(0, 0.3, shape[-1]))

        def function(v, h):
            bias = self.along_channels(v[name]["bias"].astype(dtype), shape)
            return h + (jnp.broadcast_to(bias, h.shape) if kind == "broadcast" else bias)

        self.lines.append(f"  bias, {kind}")
        return function, path

    def batch_norm(self, shape: tuple[int, ...]) -> tuple[Function, str]:
        name, dtype, channels = self.name("bn"), self.dtype, shape[-1]
        style = self.draw("BatchNorm", (*NORMS, "vmapped"))
        parameters = self.draw("BatchNorm has", ("both", "both", "scale", "bias", "neither"))
        epsilon = float(self.rng.choice([1e-3, 1e-5, 2e-5]))
        mean = self.leaf(name, "mean", self.rng.normal(0, 0.3, channels))
        self.leaf(name, "var", self.rng.uniform(0.5, 2.0, channels))
        if parameters in ("both", "scale"):
            sign = np.where(self.rng.random(channels) < 0.2, -1, 1)
            self.leaf(name, "scale", sign * self.rng.uniform(0.5, 1.5, channels))
        if parameters in ("both", "bias"):
            self.leaf(name, "bias", self.rng.normal(0, 0.3, channels))
        axis = self.channel_axis(shape)

        def function(v, h):
            p = v[name]
            h = h.astype(jnp.float32)
            vectors = [p["mean"], p["var"], p.get("scale"), p.get("bias")]
            vectors = [None if a is None else a.astype(jnp.float32) for a in vectors]
            if style == "vmapped":
                axes = (axis, *(None if a is None else 0 for a in vectors), None)
                result = jax.vmap(_norm_rsqrt, axes, axis)(h, *vectors, epsilon)
            else:
                shaped = [None if a is None else self.along_channels(a, shape) for a in vectors]
                result = NORMS[style](h, *shaped, epsilon)
            return result.astype(dtype)

        self.norms.append(mean)
        self.lines.append(f"  {name}: BatchNorm ({style}), {parameters} of scale and bias, epsilon {epsilon}")
        return function, mean

    def activation(self, shape: tuple[int, ...]) -> Function:
        kind = self.draw("activation", (*ACTIVATIONS, "prelu"))
        self.lines.append(f"  activation {kind}")
        if kind != "prelu":
            return lambda v, h: ACTIVATIONS[kind](h)
        name = self.name("prelu")
        self.leaf(name, "slope", self.rng.uniform(0.1, 0.4, shape[-1]))

        def prelu(v, h):
            slope = self.along_channels(v[name]["slope"].astype(h.dtype), shape)
            return jnp.where(h >= 0, h, slope * h)

        return prelu

    def behind(self, product: _Product, norm: bool | None = None) -> _Part:
        """Bias, BatchNorm and activation behind a product."""
        function, shape, kernel = product
        add, bias = self.bias(shape, kernel)
        functions, mean = [function, add], None
        if norm if norm is not None else self.draw("BatchNorm place", ("after", "after", "missing")) == "after":
            normalize, mean = self.batch_norm(shape)
            functions.append(normalize)
        functions.append(self.activation(shape))
        # The channels of a kernel for each position are the positions, too: no bias or BatchNorm is of that size.
        self.expected.append((kernel, None, None) if kernel in self.batched else (kernel, bias, mean))
        return _Part(_chain(functions), shape)

    # --- units ---

    def unit_convolution(self, shape):
        kind = self.draw("convolution", CONVOLUTIONS)
        if kind == "transposed" and math.prod(shape[:-1]) > 100:
            kind = "plain"
        return self.behind(self.conv(shape, kind))

    def unit_normalized_first(self, shape):
        """BatchNorm and activation before the convolution."""
        normalize, _ = self.batch_norm(shape)
        act = self.activation(shape)
        function, out, kernel = self.conv(shape, "plain")
        self.expected.append((kernel, None, None))
        return _Part(_chain([normalize, act, function]), out)

    def unit_residual(self, shape):
        self.lines.append("residual sum of the value and:")
        one = self.behind(self.conv(shape, self.draw("in residual", ("plain", "depthwise", "pointwise")), shape[-1]))
        two = self.behind(self.conv(one.shape, "plain", shape[-1]))
        act = self.activation(shape)
        return _Part(lambda v, h: act(v, h + two.function(v, one.function(v, h))), shape)

    def unit_concatenation(self, shape):
        self.lines.append("concatenation of the value and:")
        one = self.behind(self.conv(shape, "plain", 3))
        two = self.behind(self.conv(shape, "pointwise", 2))
        axis = self.channel_axis(shape)

        def function(v, h):
            return jnp.concatenate([h, one.function(v, h), two.function(v, h)], axis)

        return _Part(function, (*shape[:-1], shape[-1] + 5))

    def unit_gate(self, shape):
        """Squeeze and excitation, by convolutions or by matrix products."""
        self.lines.append("squeeze and excitation:")
        gate = {"sigmoid": jax.nn.sigmoid, "hard sigmoid": jax.nn.hard_sigmoid}[
            self.draw("gate", ("sigmoid", "hard sigmoid"))
        ]
        axes = self.space_axes(shape)
        if self.draw("gate by", ("dense", "convolution")) == "dense":
            down = self.behind(self.dense(shape[-1:], "plain", 3), norm=False)
            up, _, kernel = self.dense((3,), "plain", shape[-1])
            add, bias = self.bias(shape[-1:], kernel)

            def function(v, h):
                s = add(v, up(v, down.function(v, h.mean(axes))))
                return h * jnp.expand_dims(gate(s), axes)
        else:
            pooled = (*[1] * (len(shape) - 1), shape[-1])
            down = self.behind(self.conv(pooled, "pointwise", 3), norm=False)
            up, _, kernel = self.conv(down.shape, "pointwise", shape[-1])
            add, bias = self.bias(pooled, kernel)

            def function(v, h):
                return h * gate(add(v, up(v, down.function(v, h.mean(axes, keepdims=True)))))

        self.expected.append((kernel, bias, None))
        return _Part(function, shape)

    def unit_dense(self, shape):
        """Over the channels at every position."""
        kind = self.draw("dense over channels", ("plain", "stored transposed", "batched"))
        return self.behind(self.dense(shape, kind, int(self.rng.choice([4, 5]))))

    def unit_tied(self, shape):
        """One kernel read twice along the same axes, or transposed the second time."""
        kind = self.draw("tied", ("same axes", "other axes"))
        if kind == "same axes" or self.first:
            self.lines.append("one kernel read twice along the same axes:")
            function, out, kernel = self.conv(shape, "plain", shape[-1])
            if out != shape:
                function, out, kernel = self.conv(shape, "pointwise", shape[-1])
            act = self.activation(shape)
            self.expected += [(kernel, None, None)] * 2
            return _Part(lambda v, h: function(v, act(v, function(v, h))), shape)
        self.features.add("read along other axes")
        self.lines.append("one kernel read twice, transposed the second time:")
        function, out, kernel = self.dense(shape, "plain", 6)
        act, name, dtype = self.activation(out), kernel.split("/")[0], self.dtype
        self.expected += [(kernel, None, None)] * 2
        return _Part(lambda v, h: act(v, function(v, h)) @ v[name]["kernel"].astype(dtype).T, shape)

    def unit_stacked(self, shape):
        """Layers of one shape, their kernels stacked in one leaf: along the first or the last axis, or in a scan."""
        kind = self.draw("stacked", ("first axis", "last axis", "scan"))
        name, dtype, depth, axis = self.name("stack"), self.dtype, 2, self.channel_axis(shape)
        self.features.add("scan" if kind == "scan" else "stacked")
        channels = shape[-1]
        stack_axis = 2 if kind == "last axis" else 0
        kernels = self.rng.normal(0, math.sqrt(2 / channels), (depth, channels, channels))
        kernels *= np.array([1.0, 0.3])[:, None, None] * np.geomspace(0.4, 2, channels)
        self.leaf(name, "kernel", np.moveaxis(kernels, 0, stack_axis))
        self.leaf(name, "bias", self.rng.normal(0, 0.3, (depth, channels)))
        self.lines.append(f"{name}: {depth} dense layers {channels} -> {channels}, kernels stacked: {kind}")

        def layer(h, kernel, bias):
            h = jnp.moveaxis(h, axis, -1)
            return jnp.moveaxis(jax.nn.relu(h @ kernel.astype(dtype) + bias.astype(dtype)), -1, axis)

        def function(v, h):
            p = v[name]
            if kind == "scan":
                return lax.scan(lambda h, p: (layer(h, p["kernel"], p["bias"]), None), h, p)[0]
            for i in range(depth):
                h = layer(h, jnp.take(p["kernel"], i, stack_axis), p["bias"][i])
            return h

        return _Part(function, shape)

    def unit_pool(self, shape):
        kind = self.draw("pool", ("max", "average"))
        self.lines.append(f"{kind} pooling")
        windows = [1] * (self.lead + len(shape))
        for a in self.space_axes(shape):
            windows[a] = 2

        def function(v, h):
            h = h.astype(jnp.float32)
            if kind == "max":
                h = lax.reduce_window(h, -jnp.inf, lax.max, windows, windows, "SAME")
            else:
                h = lax.reduce_window(h, 0.0, lax.add, windows, windows, "SAME") / math.prod(windows)
            return h.astype(self.dtype)

        return _Part(function, (*(-(-s // 2) for s in shape[:-1]), shape[-1]))

    def unit(self, shape: tuple[int, ...]) -> _Part:
        part = getattr(self, f"unit_{self.draw('unit', UNITS)}")(shape)
        wrapper = self.draw("wrapped in", ("nothing", "nothing", "nothing", "jit", "remat"))
        if wrapper == "nothing":
            return part
        self.lines.append(f"  ({wrapper} around the last part)")
        return _Part({"jit": jax.jit, "remat": jax.checkpoint}[wrapper](part.function), part.shape)

    # --- the whole ---

    def head(self, shape: tuple[int, ...]) -> list[Function]:
        """From a value to a vector of 5 scores."""
        kind = self.draw("head", ("mean", "flatten", "einsum"))
        self.lines.append(f"head: {kind}")
        functions: list[Function] = []
        size = (math.prod(shape),) if kind == "flatten" else shape[-1:]
        if kind == "mean":
            axes = self.space_axes(shape)
            functions.append(lambda v, h: h.mean(axes))
        elif kind == "flatten":
            functions.append(lambda v, h: h.reshape(*h.shape[: self.lead], -1))
        if kind != "einsum" and self.chance("hidden dense layer", 0.4):
            hidden = self.behind(self.dense(size, self.draw("hidden", ("plain", "stored transposed")), 6))
            functions.append(hidden.function)
            size = hidden.shape
        kind = "einsum" if kind == "einsum" else self.draw("last layer", ("plain", "stored transposed"))
        function, out, kernel = self.dense(shape if kind == "einsum" else size, kind, 5)
        add, bias = self.bias(out, kernel)
        self.expected.append((kernel, bias, None))
        return [*functions, function, add]

    def network(self) -> RandomNetwork:
        sizes = {1: (9, 12), 2: (5, 6, 7), 3: (3, 4)}[self.dims]
        shape = (*(int(self.rng.choice(sizes)) for _ in range(self.dims)), int(self.rng.choice([2, 3])))
        input_shape = (2, shape[-1], *shape[:-1]) if self.first else (2, *shape)
        parts = [self.unit_convolution(shape)]
        for _ in range(int(self.rng.integers(1, 4))):
            parts.append(self.unit(parts[-1].shape))
        features = _chain([part.function for part in parts])
        head = _chain(self.head(parts[-1].shape))
        outputs = self.draw("outputs", ("array", "array", "dict", "tuple"))
        kind, names, stored = self.draw("tree", ("dict", "dict", "list", "tuple")), list(self.tree), self.stored

        def one(v, x):
            h = features(v, x.astype(self.dtype))
            logits = head(v, h).astype(jnp.float32)
            return {"array": logits, "dict": {"features": h, "logits": logits}, "tuple": (h, logits)}[outputs]

        def apply_fn(variables, x):
            inner = variables if kind == "tuple" else variables["params" if kind == "dict" else "layers"]
            v = inner if kind == "dict" else dict(zip(names, inner, strict=True))
            return jax.vmap(functools.partial(one, v))(x) if self.per_example else one(v, x)

        leaves = {n: {f: jnp.asarray(a, stored) for f, a in fields.items()} for n, fields in self.tree.items()}
        listed = list(leaves.values())
        variables = {"dict": {"params": leaves}, "list": {"layers": listed}, "tuple": tuple(listed)}[kind]

        def place(path: str | None) -> str | None:
            if path is None:
                return None
            name, field = path.split("/")
            return {"dict": f"params/{name}", "list": f"layers/{names.index(name)}", "tuple": f"{names.index(name)}"}[
                kind
            ] + f"/{field}"

        about = f"computes in {self.dtype}, variables in {stored}, {kind} of variables, {outputs} of outputs"
        about += ", channels first" * self.first + ", written for one example and vmapped" * self.per_example
        return RandomNetwork(
            seed=self.seed,
            features=frozenset(self.features),
            lines=(about, *self.lines),
            apply_fn=apply_fn,
            variables=variables,
            input_shape=input_shape,
            expected=tuple(Expected(kernel=place(k), bias=place(b), norm=place(n)) for k, b, n in self.expected),
            norms=tuple(map(place, self.norms)),
        )


def _chain(functions: Sequence[Function]) -> Function:
    def function(v, h):
        for f in functions:
            h = f(v, h)
        return h

    return function
