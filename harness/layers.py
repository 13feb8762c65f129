"""Modules as pure functions of their tensors.

Nets and generators are written down as plain modules, for their structure and PyTorch's default initialisation, and
then compiled to closures over torch functions that take the tensors from a flat dict: a training step calls no
module.

BatchNorm's buffers are leaves of that dict too (running_mean, running_var) and are the one impurity: a forward pass
in training mode updates them in place. They get no gradient.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.trees import Tree

# (flat parameters, input [B, ...], training mode) -> output [B, ...]
Op: TypeAlias = Callable[[Tree, Tensor, bool], Tensor]
Shape: TypeAlias = tuple[int, ...]

BUFFERS = ("running_mean", "running_var")  # last part of the names of leaves that are not trained
GROUPS = 2  # of every GroupNorm here, as in Hsieh et al. 2020 and Reddi et al. 2021


def sequence(**layers: nn.Module) -> nn.Sequential:
    """The layers one after the other, by name."""
    return nn.Sequential(OrderedDict(layers))


def seeded(make: Callable[[], nn.Sequential], rng: torch.Generator) -> nn.Sequential:
    """The module that `make` returns, on the CPU, its parameters drawn from `rng`. Global streams stay untouched."""
    seed = int(torch.randint(2**62, (), generator=rng, device=rng.device))
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
        return make()


def tensors(module: nn.Module) -> Tree:
    """Its parameters and buffers by name. BatchNorm's counter of batches is left out: nothing reads it."""
    return {name: x for name, x in module.state_dict().items() if not name.endswith("num_batches_tracked")}


def shape_after(module: nn.Module, shape: Shape, dtype: torch.dtype = torch.float32) -> Shape:
    """The shape of one row behind a module on the CPU. Raises RuntimeError if it can't take rows of this shape."""
    # A real pass: the meta device would import sympy first, for seconds.
    training = module.training
    with torch.no_grad():
        result = module.eval()(torch.zeros(1, *shape, dtype=dtype, device="cpu")).shape[1:]
    module.train(training)
    return tuple(result)


def channels_last(x: Tensor) -> Tensor:
    """The same images [B, C, H, W] with their channels next to each other in memory, which convolutions like best:
    what follows keeps that order. Measured on CPUs at 13 to 33 % of a training step. Other inputs as they are.
    """
    if x.dim() != 4:
        return x
    if x.shape[1] == 1:  # either order is the same memory; torch would go by the strides, and take the other one
        return x.as_strided(x.shape, (x.stride(0), 1, x.stride(2), x.stride(3)))
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # `contiguous(memory_format=...)` has no vmap


def compiled(layer: nn.Module, at: str = "") -> Op:
    """A module as a function of a flat dict, which holds its tensors under names that start with `at`."""
    return _RULES.get(type(layer), _other)(layer, at)


def _chain(layer: nn.Sequential, at: str) -> Op:
    ops = [compiled(child, f"{at}{name}.") for name, child in layer.named_children()]

    def run(p: Tree, x: Tensor, train: bool) -> Tensor:
        for op in ops:
            x = op(p, x, train)
        return x

    return run


def _convolution(layer: Any, at: str) -> Op:
    weight, bias, biased = at + "weight", at + "bias", layer.bias is not None
    more = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return lambda p, x, train: torch.conv2d(x, p[weight], p[bias] if biased else None, *more)


def _transposed(layer: Any, at: str) -> Op:
    weight, bias, biased = at + "weight", at + "bias", layer.bias is not None
    more = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
    return lambda p, x, train: torch.conv_transpose2d(x, p[weight], p[bias] if biased else None, *more)


def _linear(layer: nn.Linear, at: str) -> Op:
    weight, bias, biased = at + "weight", at + "bias", layer.bias is not None
    return lambda p, x, train: F.linear(x, p[weight], p[bias] if biased else None)


def _max_pool(layer: Any, at: str) -> Op:
    size, stride, padding = layer.kernel_size, layer.stride, layer.padding
    halves = (size, stride, padding) == (2, 2, 0)

    def run(p: Tree, x: Tensor, train: bool) -> Tensor:
        if not halves or x.requires_grad or x.is_cuda or x.shape[-1] % 2 or x.shape[-2] % 2:
            return torch.max_pool2d(x, size, stride, padding)
        # Without a gradient to prepare for: the same numbers, on CPUs up to seven times as fast.
        rows = torch.maximum(x[:, :, 0::2], x[:, :, 1::2])
        return torch.maximum(rows[..., 0::2], rows[..., 1::2])

    return run


def _group_norm(layer: nn.GroupNorm, at: str) -> Op:
    weight, bias, groups, eps = at + "weight", at + "bias", layer.num_groups, layer.eps
    return lambda p, x, train: torch.group_norm(x, groups, p[weight], p[bias], eps)


def _batch_norm(layer: Any, at: str) -> Op:
    weight, bias, mean, var = (at + name for name in ("weight", "bias", *BUFFERS))
    momentum, eps = layer.momentum, layer.eps

    def run(p: Tree, x: Tensor, train: bool) -> Tensor:
        # One value per channel has no variance: a batch of one is normalised as in evaluation instead of failing.
        own = train and x.numel() > x.shape[1]
        # Detached: the in-place update is allowed even if a caller lets every leaf of the tree require gradients.
        return F.batch_norm(x, p[mean].detach(), p[var].detach(), p[weight], p[bias], own, momentum, eps)

    return run


def _residual(layer: Residual, at: str) -> Op:
    body, shortcut = compiled(layer.body, at + "body."), compiled(layer.shortcut, at + "shortcut.")
    return lambda p, x, train: torch.relu(body(p, x, train) + shortcut(p, x, train))


def _embedding(layer: nn.Embedding, at: str) -> Op:
    weight = at + "weight"
    return lambda p, x, train: F.embedding(x, p[weight])


def _last_state(layer: LastState, at: str) -> Op:
    names = [f"{at}gru.{kind}_{to}_l0" for kind in ("weight", "bias") for to in ("ih", "hh")]
    width = layer.gru.hidden_size

    def run(p: Tree, x: Tensor, train: bool) -> Tensor:
        start = x.new_zeros(1, len(x), width)
        state: Tensor = torch.gru(x, start, [p[name] for name in names], True, 1, 0.0, train, False, True)[1]
        return state[0]

    return run


def _other(layer: nn.Module, at: str) -> Op:
    """Any other module, called with the tensors in its place. Slower; for blocks of other libraries."""
    modes = {mode: copy.deepcopy(layer).to("meta").train(mode) for mode in (True, False)}  # no weights in memory
    own = [(name, at + name) for name in tensors(layer)]

    def run(p: Tree, x: Tensor, train: bool) -> Tensor:
        output: Tensor = torch.func.functional_call(modes[train], {name: p[key] for name, key in own}, (x,))
        return output

    return run


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016): a 1x1 convolution where the shape changes."""

    def __init__(self, inner: int, width: int, stride: int) -> None:
        super().__init__()
        conv = partial(nn.Conv2d, bias=False)
        self.body = sequence(
            conv1=conv(inner, width, 3, stride, padding=1),
            norm1=nn.GroupNorm(GROUPS, width),
            relu=nn.ReLU(),
            conv2=conv(width, width, 3, padding=1),
            norm2=nn.GroupNorm(GROUPS, width),
        )
        same = stride == 1 and inner == width
        project = {"conv": conv(inner, width, 1, stride), "norm": nn.GroupNorm(GROUPS, width)}
        self.shortcut = nn.Sequential() if same else sequence(**project)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inner, H, W] -> [B, width, H / stride, W / stride]."""
        return torch.relu(self.body(x) + self.shortcut(x))


class Attention(nn.Module):
    """Features weighted by a softmax over them: u = d softmax(W f) f, or without the factor d if not `rescale`.

    W [d, d] starts at zero and draws no random numbers: a net with it starts as the net without it, bit for bit.
    """

    def __init__(self, width: int, rescale: bool = True) -> None:
        super().__init__()
        self.rescale = rescale
        self.weight = nn.Parameter(torch.zeros(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, d] -> [B, d]."""
        return _attend(x, self.weight, self.rescale)


def _attend(x: Tensor, weight: Tensor, rescale: bool) -> Tensor:
    scores = F.linear(x, weight)
    powers = (scores - scores.detach().amax(-1, keepdim=True)).exp()
    # The factor goes into the quotient: d ones add up to d, so equal scores give exactly 1.
    return x * (powers * ((x.shape[-1] if rescale else 1) / powers.sum(-1, keepdim=True)))


def _attention(layer: Attention, at: str) -> Op:
    weight, rescale = at + "weight", layer.rescale
    return lambda p, x, train: _attend(x, p[weight], rescale)


class LastState(nn.Module):
    """A gated recurrent unit (Cho et al. 2014) over a sequence, of which the last state is kept."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(inner, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, inner] -> [B, width]."""
        state: Tensor = self.gru(x)[1]
        return state[0]


_RULES: dict[type[nn.Module], Callable[[Any, str], Op]] = {
    nn.Sequential: _chain,
    nn.Conv2d: _convolution,
    nn.ConvTranspose2d: _transposed,
    nn.Linear: _linear,
    nn.MaxPool2d: _max_pool,
    nn.GroupNorm: _group_norm,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    Residual: _residual,
    nn.Embedding: _embedding,
    LastState: _last_state,
    Attention: _attention,
    nn.ReLU: lambda layer, at: lambda p, x, train: torch.relu(x),
    nn.LeakyReLU: lambda layer, at: lambda p, x, train: F.leaky_relu(x, layer.negative_slope),
    nn.Sigmoid: lambda layer, at: lambda p, x, train: torch.sigmoid(x),
    nn.Flatten: lambda layer, at: lambda p, x, train: torch.flatten(x, layer.start_dim, layer.end_dim),
    nn.Unflatten: lambda layer, at: lambda p, x, train: torch.unflatten(x, layer.dim, layer.unflattened_size),
    nn.AdaptiveAvgPool2d: lambda layer, at: lambda p, x, train: F.adaptive_avg_pool2d(x, layer.output_size),
}
