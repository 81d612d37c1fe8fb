"""Which layers run on int8 operands, and which as float: a compiler's integer kernels differ more than its float ones.

XLA for CPU has fast int8 products for channels-last layouts, and slow ones for stems of few channels, depthwise
convolutions and channels-first layouts. XLA for CUDA has cuDNN's int8 convolutions only, which give float32, and has
computed wrong sums for groups (openxla/xla#49123). So a `Policy` says per backend what to trust; `self_test` and
`measure_policy` replace trust by observation.

A layer that runs as float still computes on codes, held in float32 where their sums are exact up to 2^24: the choice
changes the speed and not the network. Only `activations="float"`, which nothing but `measure_policy` chooses by itself,
changes the network.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from dfq_jax.base import check_field, check_fields
from dfq_jax.graph import Graph, Layer
from dfq_jax.quantizers import QTensor, QuantizerParams, code_limits, int8_zero

BACKENDS = ("cpu", "cuda", "tpu")
ACCUMULATORS = ("int32", "float32")
STORAGE = ("speed", "memory")
ACTIVATIONS = ("codes", "float")
INT8, FLOAT, WEIGHT_ONLY, UNQUANTIZED = "int8", "float", "weight-only", "unquantized"

INT32_LIMIT = 2**31
FLOAT32_LIMIT = 2**24  # integers up to here, and their sums, are exact in float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """What runs as int8 on one backend.

    Attributes:
      backend: "cpu", "cuda" or "tpu".
      accumulator: type that int8 products are asked to give, "int32" or "float32".
      min_input_channels: convolutions that sum over fewer input channels run as float.
      depthwise, grouped, channels_first: whether such convolutions run as int8 (`grouped`: of more than one channel to
        a group).
      self_test: compare the int8 kernel of every layer shape with integers held in float, and run as float where they
        differ; once per shape and process.
      storage: "speed" holds kernels ready to multiply: int8, and float32 where a layer runs as float. "memory" holds
        all of them as int8, or packed where they have 2 to 4 bits, and unpacks them in every call.
      int4: kernels of 3 and 4 bits that fit, less their zero point, are held as int4, and multiplied with int8 as they
        are: nothing is unpacked.
      measured: by layer, the time of the float kernel over that of the int8 kernel, from `measure_policy`; goes before
        the rules about channels, layouts and depthwise convolutions.
      min_speedup: measured ratio above which a layer runs as int8.
      activations: "codes" quantizes them as the network says. "float" leaves them in float and keeps quantized
        weights alone: another network than the simulated one, and where codes are slow, as fast as the float network.
      network: measured time of the float network over that of the network under this policy; None if not measured.
    """

    backend: str = "cpu"
    accumulator: str = "int32"
    min_input_channels: int = 1
    depthwise: bool = True
    grouped: bool = True
    channels_first: bool = True
    self_test: bool = True
    storage: str = "speed"
    int4: bool = False
    measured: tuple[tuple[str, float], ...] = ()
    min_speedup: float = 1.0
    activations: str = "codes"
    network: float | None = None

    def __post_init__(self) -> None:
        choices = {"backend": BACKENDS, "accumulator": ACCUMULATORS, "storage": STORAGE, "activations": ACTIVATIONS}
        for name, allowed in choices.items():
            check_fields(self, allowed, name)
        check_fields(self, "an integer of at least 1", "min_input_channels")
        check_fields(self, "True or False", "depthwise", "grouped", "channels_first", "self_test", "int4")
        check_field("min_speedup", self.min_speedup, "a ratio of at least 0", lambda v: v >= 0)

    def ratio(self, layer: str) -> float | None:
        """Measured time of the float kernel over that of the int8 kernel; above 1 where int8 is faster."""
        return dict(self.measured).get(layer)


def default_policy(backend: str | None = None) -> Policy:
    """The policy for a backend: "cpu", "cuda" or "tpu"; by default the one that JAX uses here.

    Raises:
      ValueError: there is no such backend.
    """
    backend = jax.default_backend() if backend is None else backend
    backend = "cuda" if backend in ("gpu", "rocm") else backend  # "gpu" is what JAX calls CUDA devices
    if backend == "cpu":
        # YNN's int8 convolutions, twenty to forty times faster than others, are for more than 16 channels.
        return Policy(backend=backend, min_input_channels=17, depthwise=False, channels_first=False)
    if backend == "cuda":
        return Policy(backend=backend, accumulator="float32", min_input_channels=8, depthwise=False, grouped=False)
    if backend == "tpu":
        return Policy(backend=backend, int4=True)  # products of int8 and int4: `benchmarks/tpu_compile.txt`
    raise ValueError(f"backend: expected one of {BACKENDS}, found {backend!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """How one layer runs, and why.

    Attributes:
      runs: "int8"; "float" for integers held in float32; "weight-only" where its input is not quantized;
        "unquantized" where its kernel is not.
      reason: why it does not run as int8; empty if it does.
      largest_sum: bound on the absolute value of its sums, the largest of its channels.
    """

    runs: str
    reason: str = ""
    largest_sum: int = 0

    @property
    def exact(self) -> bool:
        """Whether no input whatever makes a sum overflow or round."""
        return self.runs == INT8 or (self.runs == FLOAT and self.largest_sum < FLOAT32_LIMIT)


def decide(policy: Policy, graph: Graph, layer: Layer, kernel: object, params: QuantizerParams | None) -> Decision:
    """How a layer runs under a policy.

    Args:
      policy: of the backend.
      graph: the network.
      layer: one of its layers.
      kernel: its kernel; a `QTensor` if quantized.
      params: quantizer of its input; None if that stays in float.
    """
    if not isinstance(kernel, QTensor):
        return Decision(runs=UNQUANTIZED, reason="its kernel is not quantized")
    if policy.activations == "float":
        return Decision(runs=WEIGHT_ONLY, reason="no network on codes measured as fast as the float one")
    if params is None:
        return Decision(runs=WEIGHT_ONLY, reason="its input is not quantized")
    largest = largest_sum(layer, kernel, params)
    codes = np.asarray(kernel.centered())
    if codes.min(initial=0) < -128 or codes.max(initial=0) > 127:
        reason = "its weights less their zero point do not fit int8"
    elif largest >= INT32_LIMIT:
        reason = f"its sums may reach {largest}, beyond int32"
    else:
        reason = _unsupported(policy, layer) or _slow(policy, graph, layer)
    return Decision(runs=FLOAT if reason else INT8, reason=reason, largest_sum=largest)


def _unsupported(policy: Policy, layer: Layer) -> str:
    if not policy.grouped and layer.groups > 1 and not layer.depthwise:
        return f"int8 convolutions in groups are not trusted on {policy.backend}"
    return ""


def _slow(policy: Policy, graph: Graph, layer: Layer) -> str:
    ratio = policy.ratio(layer.name)
    if ratio is not None:
        if ratio > policy.min_speedup:
            return ""
        if ratio > 1:
            return f"int8 measured at {1 / ratio:.2f} of the float time, and the network gains nothing by it"
        return f"int8 measured at {1 / ratio:.2f} of the float time"
    if layer.kind != "conv":
        return ""
    if layer.depthwise:
        return "" if policy.depthwise else f"depthwise int8 convolutions are slow on {policy.backend}"
    form = graph.form(layer)
    if not policy.channels_first and form.input_axes.summed != (len(form.result_shape) - 1,):
        return f"channels-first int8 convolutions are slow on {policy.backend}"
    _, _, channels, _ = form.kernel.sizes
    if channels < policy.min_input_channels:
        return f"{channels} input channels: int8 convolutions of less than {policy.min_input_channels} are slow"
    return ""


def largest_sum(layer: Layer, kernel: QTensor, params: QuantizerParams) -> int:
    """Bound on the sums of products of codes: the largest code times the sum of |weights|, over output channels."""
    zeros = (0.0, int8_zero(params))  # of codes in float, and in int8 where that differs
    limits = map(float, code_limits(params))
    largest = max(abs(int(limit + float(zero))) for limit in limits for zero in zeros if zero is not None)
    axes = tuple(a for a in range(kernel.ndim) if a not in layer.channel_axes)
    return largest * int(np.abs(np.asarray(kernel.centered(), np.int64)).sum(axes).max(initial=0))
