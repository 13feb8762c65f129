"""The plans of the zoo's nets: plain modules in three named stages. `nets` makes functions of them.

Every norm is a GroupNorm unless a name says otherwise: running statistics do not go well with federated averaging
(Hsieh et al. 2020), and the choice of the norm is part of a protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import TypeAlias

from torch import nn

from harness.layers import GROUPS, LastState, Residual, Shape, sequence, shape_after
from harness.refusal import Refused

# (shape of a row, classes C) -> sequence of the stages "features" (extractor), "latent", "head" (last linear layer)
Plan: TypeAlias = Callable[[Shape, int], nn.Sequential]

ZOO: dict[str, Plan] = {}
RECURRENT = ("gru-small", "gru-large")  # these take tokens (T,), the others images (channels, height, width)


def _zoo(*names: str) -> Callable[[Plan], Plan]:
    def enter(plan: Plan) -> Plan:
        ZOO.update(dict.fromkeys(names, plan))
        return plan

    return enter


@_zoo("mlp")
def _mlp(shape: Shape, classes: int) -> nn.Sequential:
    """Two hidden layers of 200, the 2NN of McMahan et al. 2017: 199,210 parameters at 1x28x28 and 10 classes."""
    inputs = shape[0] * shape[1] * shape[2]
    return sequence(
        features=sequence(flatten=nn.Flatten(), fc1=nn.Linear(inputs, 200), relu1=nn.ReLU()),
        latent=sequence(fc2=nn.Linear(200, 200), relu2=nn.ReLU()),
        head=sequence(fc3=nn.Linear(200, classes)),
    )


def _convs(shape: Shape, widths: tuple[int, int], pads: tuple[tuple[int, int], tuple[int, int]]) -> nn.Sequential:
    """Two 5x5 convolutions, each with a 2x2 max pool and ReLU: in this order, the same value and cheaper."""
    return sequence(
        conv1=nn.Conv2d(shape[0], widths[0], 5, padding=pads[0]),
        pool1=nn.MaxPool2d(2),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(*widths, 5, padding=pads[1]),
        pool2=nn.MaxPool2d(2),
        relu2=nn.ReLU(),
    )


def _lenet_features(shape: Shape) -> nn.Sequential:
    """LeNet's maps (LeCun et al. 1998): 16x5x5 at 32x32. Sides below 32 are padded at the first convolution, which
    gives 16x5x5 at 28x28 too, and sides below 16 at both, which gives 16x2x2 for 8x8 digits.
    """
    _, h, w = shape
    pad = [(2 * (h < least), 2 * (w < least)) for least in (32, 16)]
    return _convs(shape, (6, 16), (pad[0], pad[1]))


@_zoo("lenet5")
def _lenet5(shape: Shape, classes: int) -> nn.Sequential:
    """LeNet-5 with max pools and ReLU: 61,706 parameters at 1x28x28 and 10 classes."""
    features = _lenet_features(shape)
    inputs = prod(shape_after(features, shape))
    latent = sequence(
        flatten=nn.Flatten(),
        fc1=nn.Linear(inputs, 120),
        relu1=nn.ReLU(),
        fc2=nn.Linear(120, 84),
        relu2=nn.ReLU(),
    )
    return sequence(features=features, latent=latent, head=sequence(fc3=nn.Linear(84, classes)))


@_zoo("kdia-lenet")
def _kdia_lenet(shape: Shape, classes: int) -> nn.Sequential:
    """LeNet with the projection head of MOON (Li et al. 2021), as KDIA uses it (Ma 2025): 92,626 parameters at
    3x32x32 and 10 classes. No activation behind the projection to 256.
    """
    features = _lenet_features(shape)
    inputs = prod(shape_after(features, shape))
    latent = sequence(
        flatten=nn.Flatten(),
        fc1=nn.Linear(inputs, 120),
        relu1=nn.ReLU(),
        fc2=nn.Linear(120, 84),
        relu2=nn.ReLU(),
        project1=nn.Linear(84, 84),
        relu3=nn.ReLU(),
        project2=nn.Linear(84, 256),
    )
    return sequence(features=features, latent=latent, head=sequence(fc3=nn.Linear(256, classes)))


def _fedgen_cnn(shape: Shape, classes: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """FedGen's net (Zhu et al. 2021): 26,434 parameters at 1x28x28 and 10 classes, with either norm (BatchNorm's 44
    running statistics not counted). No activation at the latent of 32.
    """
    features = sequence(
        conv1=nn.Conv2d(shape[0], 6, 3, stride=2, padding=1),
        norm1=norm(6),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(6, 16, 3, stride=2, padding=1),
        norm2=norm(16),
        relu2=nn.ReLU(),
    )
    inputs = prod(shape_after(features, shape))
    latent = sequence(flatten=nn.Flatten(), fc1=nn.Linear(inputs, 32))
    return sequence(features=features, latent=latent, head=sequence(fc2=nn.Linear(32, classes)))


_zoo("fedgen-cnn")(partial(_fedgen_cnn, norm=partial(nn.GroupNorm, GROUPS)))
_zoo("fedgen-cnn-bn")(partial(_fedgen_cnn, norm=nn.BatchNorm2d))


@_zoo("mcmahan-cnn", "fedntd-cnn")
def _mcmahan_cnn(shape: Shape, classes: int) -> nn.Sequential:
    """The CNN of McMahan et al. 2017: 1,663,370 parameters at 1x28x28 and 10 classes. The code of FedNTD (Lee et al.
    2022) uses the same net, with 2,156,490 at 3x32x32.
    """
    features = _convs(shape, (32, 64), ((2, 2), (2, 2)))
    inputs = prod(shape_after(features, shape))
    latent = sequence(flatten=nn.Flatten(), fc1=nn.Linear(inputs, 512), relu3=nn.ReLU())
    return sequence(features=features, latent=latent, head=sequence(fc2=nn.Linear(512, classes)))


def _resnet(shape: Shape, classes: int, blocks: int) -> nn.Sequential:
    """The nets for CIFAR of He et al. 2016, of 6 * blocks + 2 layers, with GroupNorm and 1x1 shortcuts."""
    layers: dict[str, nn.Module] = {
        "conv": nn.Conv2d(shape[0], 16, 3, padding=1, bias=False),
        "norm": nn.GroupNorm(GROUPS, 16),
        "relu": nn.ReLU(),
    }
    inner = 16
    for width in (16, 32, 64):
        for block in range(blocks):
            layers[f"block{width}_{block}"] = Residual(inner, width, stride=1 if inner == width else 2)
            inner = width
    latent = sequence(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    return sequence(features=sequence(**layers), latent=latent, head=sequence(fc=nn.Linear(64, classes)))


_zoo("resnet8")(partial(_resnet, blocks=1))
_zoo("resnet20")(partial(_resnet, blocks=3))


@_zoo("resnet18")
def _resnet18(shape: Shape, classes: int) -> nn.Sequential:
    """torchvision's, with GroupNorm and a stem for small images (3x3, no pool): 11,173,962 numbers at 3x32x32."""
    try:
        from torchvision.models import resnet18
    except (ImportError, RuntimeError) as cause:  # RuntimeError: built for another torch
        raise Refused(
            f"net 'resnet18' needs a torchvision that fits this torch; importing it gave: {cause}."
        ) from cause
    whole = resnet18(num_classes=classes, norm_layer=partial(nn.GroupNorm, GROUPS))
    stem = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's convolutions
    blocks = {f"layer{i}": getattr(whole, f"layer{i}") for i in range(1, 5)}
    features = sequence(conv1=stem, norm1=whole.bn1, relu=nn.ReLU(), **blocks)
    latent = sequence(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    return sequence(features=features, latent=latent, head=sequence(fc=whole.fc))


def _gru(shape: Shape, classes: int, embed: int, width: int, latent: int) -> nn.Sequential:
    """Next-word prediction in the manner of Reddi et al. 2021: embedding, one recurrent layer, a narrow linear one.

    The vocabulary is the classes. Parameters at 10,000 words: small 670,896, large 1,450,960.
    """
    return sequence(
        features=sequence(embedding=nn.Embedding(classes, embed), state=LastState(embed, width)),
        latent=sequence(fc1=nn.Linear(width, latent)),
        head=sequence(fc2=nn.Linear(latent, classes)),
    )


_zoo("gru-small")(partial(_gru, embed=32, width=64, latent=32))
_zoo("gru-large")(partial(_gru, embed=64, width=192, latent=64))
