"""Operations over windows: pooling."""

from __future__ import annotations

from typing import Any

import numpy as np

from dfq_jax.export.onnx.operations.table import Call, Unsupported, emits
from dfq_jax.export.onnx.writer import Value, constant


@emits("reduce_window_max")
def _max_pool(call: Call) -> Value:
    return _pool(call, call.inputs[0], "MaxPool")


@emits("reduce_window_min")
def _min_pool(call: Call) -> Value:
    x = call.inputs[0]
    negative = call.writer.elementwise("Neg", [x], x.shape)
    return call.elementwise("Neg", _pool(call, negative, "MaxPool"))


@emits("reduce_window_sum")
def _sum_pool(call: Call) -> Value:
    count = constant(np.float32(np.prod(call.params["window_dimensions"])))
    return call.elementwise("Mul", average_pool(call), count)


def average_pool(call: Call) -> Value:
    """The sum over a window by the number of elements in it, those of the padding included."""
    if any(d != 1 for d in call.params["window_dilation"]):
        raise Unsupported("its windows are dilated")
    return _pool(call, call.inputs[0], "AveragePool", count_include_pad=1)


def _pool(call: Call, x: Value, kind: str, **attributes: Any) -> Value:
    params, rank = call.params, len(x.shape)
    if any(d != 1 for d in params["base_dilation"]):
        raise Unsupported("its input is dilated")
    window, strides, padding = params["window_dimensions"], params["window_strides"], params["padding"]
    if any(low < 0 or high < 0 for low, high in padding):
        raise Unsupported("it pads by less than nothing")
    idle = [a for a in range(rank) if window[a] == strides[a] == 1 and tuple(padding[a]) == (0, 0)]
    if len(idle) < 2 or rank < 3:
        raise Unsupported("its windows extend over more axes than there are in space")
    axes = x.axes
    if not set(axes[:2]) <= set(idle):
        first = (idle[0], idle[-1])
        axes = (*first, *(a for a in range(rank) if a not in first))
    spatial = axes[2:]
    if any(d != 1 for d in params["window_dilation"]):
        attributes["dilations"] = [params["window_dilation"][a] for a in spatial]
    name = call.writer.node(
        kind,
        [call.writer.whole(x, axes)],
        kernel_shape=[window[a] for a in spatial],
        strides=[strides[a] for a in spatial],
        pads=[padding[a][0] for a in spatial] + [padding[a][1] for a in spatial],
        **attributes,
    )
    return Value(shape=call.shape, axes=axes, name=name)
