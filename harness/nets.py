"""Nets as pure functions of a tree of parameters, each with two cut points; and generators for what is there.

A net has three stages, and its parameters are a tree with a flat dict of tensors for each of them: `features` is the
extractor, `latent` leads to the input of the last layer, `head` is the last linear layer. The papers cut nets behind
the first stage (a map for convolutional nets) or behind the second (a vector). A stage without parameters is an empty
dict.
Neither holds parameters, both are hashable and pickle as their names. BatchNorm's running statistics are leaves of
the tree that a pass in training mode updates in place (see `layers`); everything else is a pure function.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.layers import Attention, Op, Shape, channels_last, compiled, seeded, sequence, shape_after, tensors
from harness.refusal import Refused, unknown
from harness.trees import Tree
from harness.zoo import RECURRENT, ZOO

CUTS = ("features", "latent")
Style: TypeAlias = Literal["auto", "kdia", "fedgen"]
# What a net's name may end with: an attention on its latent (see `layers.Attention`), with its factor d or without.
ADDITIONS = {"+attention": True, "+attention-plain": False}
LAYERS = 4  # transposed convolutions of a generator of the style kdia


@dataclass(frozen=True)
class Net:
    """A net for one input shape (without B) and number of classes C. Holds no parameters; `build` makes it.

    Its inputs are images, float [B, channels, height, width], or tokens, int64 [B, T].

    features_shape is the shape of one row at the cut "features", latent_width is Z, its width at the cut "latent".
    """

    name: str
    input_shape: Shape
    classes: int
    features_shape: Shape = field(compare=False)
    latent_width: int = field(compare=False)
    _ops: tuple[Op, Op, Op] = field(compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return build, (self.name, self.input_shape, self.classes)

    def init(self, rng: torch.Generator) -> Tree:
        """New parameters on the CPU, PyTorch's default initialisation. Depends on nothing but `rng`."""
        stages = seeded(self.module, rng)
        return {name: tensors(stage) for name, stage in stages.named_children()}

    def module(self) -> nn.Sequential:
        """The same net as a plain module; its children are the three stages. For export and for checks."""
        return _stages(self.name, self.input_shape, self.classes)

    def __call__(self, p: Tree, x: Tensor, train: bool = True) -> Tensor:
        """Logits [B, C] of inputs x: [B, *input_shape]."""
        features, latent, head = self._ops
        return head(p["head"], latent(p["latent"], features(p["features"], channels_last(x), train), train), train)

    def embed(self, p: Tree, x: Tensor, at: str = "latent", train: bool = True) -> Tensor:
        """What inputs x: [B, *input_shape] are at a cut point: [B, *features_shape] or [B, Z]."""
        features, latent, _ = self._ops
        z = features(p["features"], channels_last(x), train)
        if at == "features":
            return z
        if at == "latent":
            return latent(p["latent"], z, train)
        raise unknown("cut point", at, CUTS)

    def classify(self, p: Tree, z: Tensor, at: str = "latent", train: bool = True) -> Tensor:
        """Logits [B, C] of what `embed` returned for the same cut point. classify(embed(x)) is the call itself."""
        _, latent, head = self._ops
        if at == "features":
            z = latent(p["latent"], z, train)
        elif at != "latent":
            raise unknown("cut point", at, CUTS)
        return head(p["head"], z, train)

    def frozen(self, p: Tree, x: Tensor) -> Tensor:
        """Logits [B, C] without gradients and in evaluation mode: for teachers and for evaluation."""
        with torch.no_grad():
            return self(p, x, train=False)

    def shape(self, at: str) -> Shape:
        """The shape of one row at a cut point."""
        if at not in CUTS:
            raise unknown("cut point", at, CUTS)
        return self.features_shape if at == "features" else (self.latent_width,)


def names(of: str = "") -> tuple[str, ...]:
    """The names of all nets; and those of the variants of one net, given the name of any of them."""
    base = of.partition("+")[0]
    return (*ZOO, *(base + addition for addition in ADDITIONS if base in ZOO))


@cache
def build(name: str, input_shape: Shape, classes: int) -> Net:
    """The net of that name for images of (channels, height, width) or tokens (T,). Refused if there can be none."""
    if name not in names(of=name):
        raise unknown("net", name, names(of=name))
    recurrent = name.partition("+")[0] in RECURRENT
    if len(input_shape) != (1 if recurrent else 3) or min(input_shape) < 1:
        inputs = "tokens of shape (words,)" if recurrent else "images of shape (channels, height, width)"
        raise Refused(f"net {name!r} takes {inputs}, not {tuple(input_shape)}.")
    if classes < 2:
        raise Refused(f"a net needs at least 2 classes, not {classes}.")
    try:
        return _trace(name, tuple(input_shape), classes)
    except RuntimeError as cause:
        least = next((side for side in range(1, 65) if _fits(name, (input_shape[0], side, side))), None)
        if least is None or min(input_shape[1:]) >= least:
            raise
        shape = "x".join(map(str, input_shape))
        raise Refused(f"net {name!r} cannot take {shape} images: it needs {least}x{least} or more.") from cause


def _stages(name: str, input_shape: Shape, classes: int) -> nn.Sequential:
    base, plus, addition = name.partition("+")
    stages = ZOO[base](input_shape, classes)
    if plus:
        width = next(stages.get_submodule("head").parameters()).shape[1]
        stages.get_submodule("latent").add_module("attention", Attention(width, ADDITIONS[plus + addition]))
    return stages


def sibling(net: Net, name: str) -> Net:
    """The net of another name for the same data."""
    return net if name == net.name else build(name, net.input_shape, net.classes)


def _trace(name: str, input_shape: Shape, classes: int) -> Net:
    features, latent, head = seeded(lambda: _stages(name, input_shape, classes), torch.Generator())
    at_features = shape_after(features, input_shape, torch.int64 if len(input_shape) == 1 else torch.float32)
    (width,) = shape_after(latent, at_features)
    shape_after(head, (width,))
    return Net(name, input_shape, classes, at_features, width, (compiled(features), compiled(latent), compiled(head)))


def _fits(name: str, input_shape: Shape) -> bool:
    try:
        return bool(_trace(name, input_shape, 2))
    except RuntimeError:
        return False


# ---- generators


@dataclass(frozen=True)
class FeatureGenerator:
    """G(z, y) for one shape and number of classes C. noise is the width of z; hidden the width of the middle."""

    shape: Shape
    classes: int
    noise: int
    hidden: int
    style: str
    _op: Op = field(compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return _generator, (self.shape, self.classes, self.noise, self.hidden, self.style)

    def init(self, rng: torch.Generator) -> Tree:
        """New parameters on the CPU, PyTorch's default initialisation. Depends on nothing but `rng`."""
        return tensors(seeded(self.module, rng))

    def module(self) -> nn.Sequential:
        """The layers as plain modules: `labels` (style kdia only) makes the codes of the labels, `body` the rest."""
        return _STYLES[self.style](self.shape, self.classes, self.noise, self.hidden)

    def __call__(self, p: Tree, z: Tensor, y: Tensor, train: bool = True) -> Tensor:
        """[B, *shape] from noise z: [B, noise], of the distribution the method likes, and labels y: [B], int64."""
        if self.style == "kdia":
            code = F.embedding(y, p["labels.weight"])
        else:
            code = (y.unsqueeze(-1) == torch.arange(self.classes, device=y.device)).to(z.dtype)
        return self._op(p, torch.cat([z, code], 1), train)

    def frozen(self, p: Tree, z: Tensor, y: Tensor) -> Tensor:
        """[B, *shape] without gradients and in evaluation mode."""
        with torch.no_grad():
            return self(p, z, y, train=False)


def generator(net: Net, at: str, noise: int, hidden: int = 256, style: Style = "auto") -> FeatureGenerator:
    """A generator for what `net` has at a cut point, "features" or "latent".

    style auto takes kdia for maps and fedgen for vectors; each style makes both.
    """
    shape = net.shape(at)
    if style not in get_args(Style):
        raise unknown("generator style", style, get_args(Style))
    if noise < 1 or hidden < 2:
        raise Refused(f"a generator needs noise >= 1 and hidden >= 2, not noise = {noise} and hidden = {hidden}.")
    chosen = style if style != "auto" else "kdia" if len(shape) == 3 else "fedgen"
    return _generator(shape, net.classes, noise, hidden, chosen)


@cache
def _generator(shape: Shape, classes: int, noise: int, hidden: int, style: str) -> FeatureGenerator:
    layers = seeded(lambda: _STYLES[style](shape, classes, noise, hidden), torch.Generator())
    op = compiled(layers.get_submodule("body"), "body.")
    return FeatureGenerator(shape, classes, noise, hidden, style, op)


def _kdia(shape: Shape, classes: int, noise: int, hidden: int) -> nn.Sequential:
    """KDIA's: codes of the labels, then four transposed convolutions without bias, from 1x1 to the map.

    In the paper's code each has a 2x2 kernel, 1 -> 2 -> 3 -> 4 -> 5, and the widths are 512, 256, 128, 16; that is
    hidden = 256 here and 890,724 parameters at noise 100 and 10 classes. For other maps the H - 1 rows and W - 1
    columns to grow by are shared out over the four kernels; the last ones take more, because they are the thin ones.
    A vector is a map of 1x1.
    """
    depth, height, width = shape if len(shape) == 3 else (shape[0], 1, 1)
    widths = (noise + classes, 2 * hidden, hidden, hidden // 2, depth)
    layers: dict[str, nn.Module] = {"unflatten": nn.Unflatten(1, (widths[0], 1, 1))}
    for i in range(LAYERS):
        kernel = (1 + (height - 1 + i) // LAYERS, 1 + (width - 1 + i) // LAYERS)
        layers[f"conv{i}"] = nn.ConvTranspose2d(widths[i], widths[i + 1], kernel, bias=False)
        if i < LAYERS - 1:
            layers[f"norm{i}"] = nn.BatchNorm2d(widths[i + 1])
            layers[f"relu{i}"] = nn.LeakyReLU(0.2)
    layers["sigmoid"] = nn.Sigmoid()
    body = sequence(**layers) if len(shape) == 3 else sequence(**layers, flatten=nn.Flatten())
    return sequence(labels=nn.Embedding(classes, classes), body=body)


def _fedgen(shape: Shape, classes: int, noise: int, hidden: int) -> nn.Sequential:
    """FedGen's: one hidden layer on noise and one-hot label; 19,744 parameters at noise 32, hidden 256, latent 32 and
    10 classes. A map is the same numbers, reshaped.
    """
    return sequence(
        body=sequence(
            fc1=nn.Linear(noise + classes, hidden),
            norm=nn.BatchNorm1d(hidden),
            relu=nn.ReLU(),
            fc2=nn.Linear(hidden, prod(shape)),
            unflatten=nn.Unflatten(1, shape),
        )
    )


_STYLES = {"kdia": _kdia, "fedgen": _fedgen}
