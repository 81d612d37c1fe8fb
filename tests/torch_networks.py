"""Networks in torch with torchvision's names of modules, to be references for its checkpoints.

Only what gives the state dicts their names and the networks their arithmetic: torchvision itself need not be installed.
"""

import torch
from torch import nn


def conv_norm(inputs, outputs, kernel=1, stride=1, groups=1, activation=None, bias=False):
    """[convolution, BatchNorm, activation if any]"""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)
    return [conv, nn.BatchNorm2d(outputs), *([activation()] if activation else [])]


def global_mean(x):
    return x.mean((2, 3))


class Lambda(nn.Module):
    """A function as a module without parameters."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def named(**modules):
    """A sequence of named modules."""
    sequence = nn.Sequential()
    for name, module in modules.items():
        sequence.add_module(name, module)
    return sequence


# --- ResNet ---


class ResNetBlock(nn.Module):
    def __init__(self, inputs, outputs, stride, bottleneck):
        super().__init__()
        inner = outputs // 4 if bottleneck else outputs
        shapes = [(1, inputs, inner), (3, inner, inner), (1, inner, outputs)]
        if not bottleneck:
            shapes = [(3, inputs, inner), (3, inner, outputs)]
        self.count = len(shapes)
        strided = 2 if bottleneck else 1
        for i, (kernel, a, b) in enumerate(shapes, start=1):
            conv, norm = conv_norm(a, b, kernel, stride if i == strided else 1)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"bn{i}", norm)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(*conv_norm(inputs, outputs, 1, stride))

    def forward(self, x):
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = torch.relu(y) if i < self.count else y
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


def resnet(blocks, bottleneck):
    conv, norm = conv_norm(3, 64, 7, 2)
    modules = dict(conv1=conv, bn1=norm, relu=nn.ReLU(), maxpool=nn.MaxPool2d(3, 2, 1))
    inputs = 64
    for stage, count in enumerate(blocks, start=1):
        outputs = 64 * 2 ** (stage - 1) * (4 if bottleneck else 1)
        layer = nn.Sequential()
        for block in range(count):
            layer.append(ResNetBlock(inputs, outputs, 2 if stage > 1 and block == 0 else 1, bottleneck))
            inputs = outputs
        modules[f"layer{stage}"] = layer
    return named(**modules, avgpool=Lambda(global_mean), fc=nn.Linear(inputs, 1000))


# --- VGG ---


def vgg16_bn():
    features, inputs = [], 3
    for outputs, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            features += conv_norm(inputs, outputs, 3, activation=nn.ReLU, bias=True)
            inputs = outputs
        features.append(nn.MaxPool2d(2, 2))
    classifier = [nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout()]
    return named(
        features=nn.Sequential(*features),
        avgpool=nn.AdaptiveAvgPool2d(7),
        flatten=nn.Flatten(),
        classifier=nn.Sequential(*classifier, nn.Linear(4096, 1000)),
    )


# --- MobileNetV2 ---


class InvertedResidual(nn.Module):
    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        hidden = inputs * expansion
        layers = [nn.Sequential(*conv_norm(inputs, hidden, activation=nn.ReLU6))] if expansion != 1 else []
        layers.append(nn.Sequential(*conv_norm(hidden, hidden, 3, stride, hidden, nn.ReLU6)))
        self.conv = nn.Sequential(*layers, *conv_norm(hidden, outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


def mobilenet_v2():
    features, inputs = [nn.Sequential(*conv_norm(3, 32, 3, 2, activation=nn.ReLU6))], 32
    rows = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expansion, outputs, count, stride in rows:
        for block in range(count):
            features.append(InvertedResidual(inputs, outputs, stride if block == 0 else 1, expansion))
            inputs = outputs
    features.append(nn.Sequential(*conv_norm(320, 1280, activation=nn.ReLU6)))
    return named(
        features=nn.Sequential(*features),
        pool=Lambda(global_mean),
        classifier=nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000)),
    )


# --- DenseNet ---


class DenseLayer(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 128, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(128), nn.Conv2d(128, 32, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv1(torch.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(torch.relu(self.norm2(y)))], 1)


def densenet121():
    conv, norm = conv_norm(3, 64, 7, 2)
    features, channels = dict(conv0=conv, norm0=norm, relu0=nn.ReLU(), pool0=nn.MaxPool2d(3, 2, 1)), 64
    for block, count in enumerate((6, 12, 24, 16), start=1):
        layers = {f"denselayer{i + 1}": DenseLayer(channels + 32 * i) for i in range(count)}
        features[f"denseblock{block}"] = named(**layers)
        channels += 32 * count
        if block < 4:
            features[f"transition{block}"] = named(
                norm=nn.BatchNorm2d(channels),
                relu=nn.ReLU(),
                conv=nn.Conv2d(channels, channels // 2, 1, bias=False),
                pool=nn.AvgPool2d(2, 2),
            )
            channels //= 2
    features["norm5"] = nn.BatchNorm2d(channels)
    return named(
        features=named(**features),
        relu=nn.ReLU(),
        pool=Lambda(global_mean),
        classifier=nn.Linear(channels, 1000),
    )


# --- RegNetX ---


class RegNetBlock(nn.Module):
    def __init__(self, inputs, outputs, stride, group_width):
        super().__init__()
        self.proj = None
        if stride != 1 or inputs != outputs:
            self.proj = nn.Sequential(*conv_norm(inputs, outputs, 1, stride))
        self.f = named(
            a=nn.Sequential(*conv_norm(inputs, outputs, activation=nn.ReLU)),
            b=nn.Sequential(*conv_norm(outputs, outputs, 3, stride, outputs // group_width, nn.ReLU)),
            c=nn.Sequential(*conv_norm(outputs, outputs)),
        )

    def forward(self, x):
        return torch.relu(self.f(x) + (x if self.proj is None else self.proj(x)))


def regnet_x(depths, widths, group_width):
    stages, inputs = {}, 32
    for stage, (count, outputs) in enumerate(zip(depths, widths, strict=True), start=1):
        blocks = {}
        for block in range(count):
            blocks[f"block{stage}-{block}"] = RegNetBlock(inputs, outputs, 2 if block == 0 else 1, group_width)
            inputs = outputs
        stages[f"block{stage}"] = named(**blocks)
    return named(
        stem=nn.Sequential(*conv_norm(3, 32, 3, 2, activation=nn.ReLU)),
        trunk_output=named(**stages),
        avgpool=Lambda(global_mean),
        fc=nn.Linear(inputs, 1000),
    )


# --- ShuffleNet V2 ---


class ShuffleUnit(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        half = outputs // 2
        self.branch1 = nn.Sequential()
        if stride == 2:
            depthwise = conv_norm(inputs, inputs, 3, 2, inputs)
            self.branch1 = nn.Sequential(*depthwise, *conv_norm(inputs, half, activation=nn.ReLU))
        self.branch2 = nn.Sequential(
            *conv_norm(inputs if stride == 2 else half, half, activation=nn.ReLU),
            *conv_norm(half, half, 3, stride, half),
            *conv_norm(half, half, activation=nn.ReLU),
        )
        self.stride = stride

    def forward(self, x):
        kept, y = (x, x) if self.stride == 2 else x.chunk(2, dim=1)
        y = torch.stack([self.branch1(kept), self.branch2(y)], dim=2)  # even channels of one, odd ones of the other
        return y.flatten(1, 2)


def shufflenet_v2():
    modules = dict(conv1=nn.Sequential(*conv_norm(3, 24, 3, 2, activation=nn.ReLU)), maxpool=nn.MaxPool2d(3, 2, 1))
    inputs = 24
    for stage, (outputs, count) in enumerate(((116, 4), (232, 8), (464, 4)), start=2):
        units = [ShuffleUnit(inputs, outputs, 2)] + [ShuffleUnit(outputs, outputs, 1) for _ in range(count - 1)]
        modules[f"stage{stage}"], inputs = nn.Sequential(*units), outputs
    modules["conv5"] = nn.Sequential(*conv_norm(464, 1024, activation=nn.ReLU))
    return named(**modules, pool=Lambda(global_mean), fc=nn.Linear(1024, 1000))
