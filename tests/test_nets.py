"""The zoo and its generators: golden sizes, cut points, purity, and what is refused."""

from __future__ import annotations

import pickle
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness import nets, trees
from harness.layers import BUFFERS, LastState, channels_last, compiled, sequence
from harness.refusal import Refused
from harness.trees import Tree
from harness.zoo import RECURRENT

DIGITS, MNIST, CIFAR, WORDS = (1, 8, 8), (1, 28, 28), (3, 32, 32), (6,)
STATELESS = [name for name in nets.names() if name != "fedgen-cnn-bn"]


def trained(p: Tree) -> int:
    """How many numbers are trained: all but BatchNorm's running statistics."""
    return sum(x.numel() for path, x in trees.leaves(p) if not path.endswith(BUFFERS))


def rows(net: nets.Net, count: int, seed: int = 1) -> Tensor:
    if net.name in RECURRENT:
        return torch.randint(net.classes, (count, *net.input_shape), generator=trees.stream(seed))
    return torch.randn(count, *net.input_shape, generator=trees.stream(seed))


def learning(p: Tree) -> Tree:
    """A copy all of whose leaves require gradients."""
    return trees.tree_map(lambda leaf: leaf.clone().requires_grad_(), p)


def gradients(loss: Tensor, p: Tree) -> dict[str, Tensor | None]:
    paths, leaves = zip(*trees.leaves(p), strict=True)
    return dict(zip(paths, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True))


def made(name: str, shape: tuple[int, ...] = DIGITS, seed: int = 0) -> tuple[nets.Net, Tree]:
    net = nets.build(name, WORDS if name in RECURRENT else shape, 10)
    return net, net.init(trees.stream(seed))


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("mlp", MNIST, 199_210),
        ("lenet5", MNIST, 61_706),
        ("lenet5", CIFAR, 62_006),
        ("kdia-lenet", CIFAR, 92_626),
        ("fedgen-cnn", MNIST, 26_434),
        ("fedgen-cnn-bn", MNIST, 26_434),
        ("mcmahan-cnn", MNIST, 1_663_370),
        ("fedntd-cnn", CIFAR, 2_156_490),
        ("resnet8", CIFAR, 78_042),
        ("resnet20", CIFAR, 272_474),
        ("resnet18", CIFAR, 11_173_962),
        ("gru-small", WORDS, 21_546),
        ("gru-large", WORDS, 162_250),
    ],
)
def test_parameter_counts(name: str, shape: tuple[int, ...], count: int) -> None:
    """Weights plus biases, layer by layer, for 10 classes. (n) are a norm's: two per channel.

    mlp            784*200+200 = 157,000; 200*200+200 = 40,200; 200*10+10 = 2,010: the 199,210 of McMahan et al.
    lenet5         1*6*25+6 = 156 (3 channels: 456); 6*16*25+16 = 2,416; 400*120+120 = 48,120; 120*84+84 = 10,164;
                   84*10+10 = 850. The flattened 400 at 28x28 come from the first convolution's padding of 2.
    kdia-lenet     456; 2,416; 48,120; 10,164; 84*84+84 = 7,140; 84*256+256 = 21,760; 256*10+10 = 2,570.
    fedgen-cnn     1*6*9+6 = 60; (12); 6*16*9+16 = 880; (32); 16*7*7*32+32 = 25,120; 32*10+10 = 330. BatchNorm's
                   2 * 22 running statistics are not in the count.
    mcmahan-cnn    1*32*25+32 = 832; 32*64*25+64 = 51,264; 64*7*7*512+512 = 1,606,144; 512*10+10 = 5,130.
    fedntd-cnn     3*32*25+32 = 2,432; 51,264; 64*8*8*512+512 = 2,097,664; 5,130.
    resnet         stem 3*16*9 = 432, (32). A block of width w on inner i: 9*i*w + 9*w*w, (4w); and i*w, (2w) for its
                   shortcut where i != w. 16 on 16: 4,672; 32 on 16: 14,528; 64 on 32: 57,728; 32 on 32: 18,560;
                   64 on 64: 73,984. Head 650. resnet8: 464 + 4,672 + 14,528 + 57,728 + 650.
                   resnet20 has two more blocks of each width: + 2 * (4,672 + 18,560 + 73,984) = 194,432.
    resnet18       as above, two blocks a width: stem 3*64*9 = 1,728, (128); 64: 2 * (2*36,864 + (256)) = 147,968;
                   128: 73,728 + 3*147,456 + 8,192 + (4*256 + 256) = 525,568 (one (256) for each of five norms);
                   256: 294,912 + 3*589,824 + 32,768 + (5*512) = 2,099,712; 512: 1,179,648 + 3*2,359,296 + 131,072
                   + (5*1024) = 8,393,728; head 512*10+10 = 5,130.
    gru            embedding 10*32 = 320; three gates on inputs and state, with two biases each: 3 * (32*64 + 64*64
                   + 2*64) = 18,816; 64*32+32 = 2,080; 32*10+10 = 330. Large: 10*64 = 640; 3 * (64*192 + 192*192 +
                   2*192) = 148,608; 192*64+64 = 12,352; 64*10+10 = 650.
    """
    net, p = made(name, shape)
    assert trained(p) == count
    assert sum(x.numel() for x in net.module().parameters()) == count
    assert list(p) == ["features", "latent", "head"]
    assert trained(p["head"]) == net.latent_width * 10 + 10  # the head is the last linear layer and nothing else


@pytest.mark.parametrize(
    ("name", "shape", "features", "latent"),
    [
        ("mlp", DIGITS, (200,), 200),
        ("lenet5", DIGITS, (16, 2, 2), 84),
        ("lenet5", MNIST, (16, 5, 5), 84),
        ("lenet5", (1, 15, 15), (16, 3, 3), 84),
        ("lenet5", (1, 16, 16), (16, 2, 2), 84),
        ("lenet5", (1, 31, 31), (16, 5, 5), 84),
        ("lenet5", CIFAR, (16, 5, 5), 84),
        ("lenet5", (3, 64, 64), (16, 13, 13), 84),
        ("kdia-lenet", MNIST, (16, 5, 5), 256),
        ("kdia-lenet", CIFAR, (16, 5, 5), 256),
        ("fedgen-cnn", MNIST, (16, 7, 7), 32),
        ("mcmahan-cnn", MNIST, (64, 7, 7), 512),
        ("resnet8", CIFAR, (64, 8, 8), 64),
        ("resnet18", CIFAR, (512, 4, 4), 512),
        ("gru-small", WORDS, (64,), 32),
        ("gru-large", WORDS, (192,), 64),
    ],
)
def test_cut_points_are_where_the_papers_cut(
    name: str, shape: tuple[int, ...], features: tuple[int, ...], latent: int
) -> None:
    net = nets.build(name, shape, 10)
    assert (net.features_shape, net.latent_width) == (features, latent)
    assert net.shape("features") == features
    assert net.shape("latent") == (latent,)


@pytest.mark.parametrize(
    ("name", "at", "rectified"),
    [
        ("mlp", "features", True),
        ("mlp", "latent", True),
        ("lenet5", "features", True),
        ("lenet5", "latent", True),
        ("kdia-lenet", "features", True),
        ("kdia-lenet", "latent", False),  # projected, as in MOON
        ("fedgen-cnn", "features", True),
        ("fedgen-cnn", "latent", False),
        ("mcmahan-cnn", "latent", True),
        ("resnet8", "latent", True),
    ],
)
def test_which_cut_points_lie_behind_a_relu(name: str, at: str, rectified: bool) -> None:
    net, p = made(name)
    z = net.embed(p, rows(net, 8), at)
    assert bool((z >= 0).all()) == rectified
    assert (z > 0).any()


@pytest.mark.parametrize("name", nets.names())
@pytest.mark.parametrize("shape", [DIGITS, (3, 20, 12)])
def test_classify_of_embed_is_the_call(name: str, shape: tuple[int, ...]) -> None:
    net, p = made(name, shape)
    x = rows(net, 3)
    for train in (True, False):
        logits = net(trees.clone(p), x, train=train)
        assert logits.shape == (3, 10)
        for at in nets.CUTS:
            q = trees.clone(p)
            z = net.embed(q, x, at, train=train)
            assert z.shape == (3, *net.shape(at))
            assert torch.equal(net.classify(q, z, at, train=train), logits)


@pytest.mark.parametrize("name", nets.names())
def test_the_functions_compute_what_the_plain_modules_compute(name: str) -> None:
    """Values, gradients and BatchNorm's statistics, bit for bit, against PyTorch's own forward pass on images whose
    channels lie next to each other.
    """
    net, p = made(name)
    module = net.module()
    for stage, part in module.named_children():
        part.load_state_dict(p[stage], strict=False)  # not strict: BatchNorm's counter is not in the tree
    x, y = rows(net, 4), torch.tensor([1, 2, 3, 4])
    q = learning(p)
    ours = gradients(F.cross_entropy(net(q, x), y), q)
    paths, parameters = zip(*module.named_parameters(), strict=True)
    theirs = torch.autograd.grad(F.cross_entropy(module(channels_last(x)), y), parameters)
    for path, expected in zip(paths, theirs, strict=True):
        found = ours[path.replace(".", "/", 1)]
        assert found is not None and torch.equal(found, expected), path
    for path, buffer in module.named_buffers():
        stage, leaf = path.split(".", 1)
        assert leaf.endswith("num_batches_tracked") or torch.equal(q[stage][leaf], buffer), path
    assert torch.equal(net.frozen(q, x), module.eval()(channels_last(x)).detach())


@pytest.mark.parametrize("name", [name for name in STATELESS if name not in RECURRENT])
def test_many_clients_at_once_have_the_gradients_of_each(name: str) -> None:
    """vmap over stacked parameters and batches; float32 sums differ in order, hence a tolerance."""
    net = nets.build(name, DIGITS, 10)
    clients = [net.init(trees.stream(seed)) for seed in range(2)]
    x = torch.stack([rows(net, 4, seed) for seed in range(2)])
    y = torch.tensor([[0, 1, 2, 3], [9, 8, 7, 6]])

    def loss(p: Tree, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(p, x), y)

    together = torch.func.vmap(torch.func.grad(loss))(trees.stack(clients), x, y)
    for k, p in enumerate(clients):
        own = torch.func.grad(loss)(p, x[k], y[k])
        found = dict(trees.leaves(together))
        for path, expected in trees.leaves(own):
            torch.testing.assert_close(found[path][k], expected, rtol=1e-3, atol=1e-5, msg=path)


@pytest.mark.parametrize("name", STATELESS)
def test_a_stateless_net_changes_nothing_it_is_given(name: str) -> None:
    net, p = made(name)
    before = trees.flat(p)
    net(p, rows(net, 3), train=True)
    assert torch.equal(trees.flat(p), before)
    assert not any(path.endswith(BUFFERS) for path, _ in trees.leaves(p))


@pytest.mark.parametrize("name", nets.names())
def test_init_depends_on_its_stream_alone_and_leaves_the_global_one(name: str) -> None:
    nets.build.cache_clear()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    net, first = made(name)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(trees.flat(net.init(trees.stream(0))), trees.flat(first))
    assert not torch.equal(trees.flat(net.init(trees.stream(1))), trees.flat(first))
    rng = trees.stream(0)  # a stream moves on: two nets drawn from one are not the same
    assert not torch.equal(trees.flat(net.init(rng)), trees.flat(net.init(rng)))
    assert not any(x.requires_grad for _, x in trees.leaves(first))


def test_a_recurrent_net_by_hand() -> None:
    """One gated unit (Cho et al. 2014) over two tokens, as PyTorch defines it: r and z gate, n is new, and
    h = (1 - z) n + z h. Every weight is 1 and every bias 0, embeddings are .5 for token 0 and -1 for token 1.

    Token 0 on h = 0: r = z = s(.5) = .622459, n = tanh(.5) = .462117, h = .377541 * .462117 = .174468.
    Token 1: r = z = s(-1 + .174468) = .304591, n = tanh(-1 + .304591 * .174468) = -.738358,
    h = .695409 * -.738358 + .304591 * .174468 = -.460319.
    """
    state = LastState(1, 1)
    for name, p in state.named_parameters():
        torch.nn.init.constant_(p, 1.0 if "weight" in name else 0.0)
    net = compiled(sequence(embedding=torch.nn.Embedding(2, 1), state=state))
    p = {f"state.{name}": x for name, x in state.state_dict().items()}
    p["embedding.weight"] = torch.tensor([[0.5], [-1.0]])
    assert net(p, torch.tensor([[0]]), True).item() == pytest.approx(0.174468, abs=1e-6)
    assert net(p, torch.tensor([[0, 1]]), True).item() == pytest.approx(-0.460319, abs=1e-6)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_net_reads_the_order_of_the_words(name: str) -> None:
    net, p = made(name)
    said = net.frozen(p, torch.tensor([[1, 2, 3, 4, 5, 6], [2, 1, 3, 4, 5, 6]]))
    assert not torch.allclose(said[0], said[1])


def test_init_is_pytorchs_default() -> None:
    """Linear draws weights and biases from U(-k, k), k = 1/sqrt(fan-in): standard deviation k/sqrt(3)."""
    _, p = made("mlp", MNIST)
    weight = p["features"]["fc1.weight"]
    bound = 784**-0.5
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)


def test_batchnorm_in_training_updates_its_statistics_in_place() -> None:
    """new = 0.9 * old + 0.1 * batch, with the unbiased variance; they start at 0 and 1."""
    net, p = made("fedgen-cnn-bn")
    x = rows(net, 5)
    maps = F.conv2d(x, p["features"]["conv1.weight"], p["features"]["conv1.bias"], stride=2, padding=1)
    mean, var = p["features"]["norm1.running_mean"], p["features"]["norm1.running_var"]
    net(p, x, train=True)
    torch.testing.assert_close(mean, 0.1 * maps.mean((0, 2, 3)))
    torch.testing.assert_close(var, 0.9 + 0.1 * maps.var((0, 2, 3), unbiased=True))


def test_batchnorm_in_evaluation_uses_its_statistics_and_keeps_them() -> None:
    net, p = made("fedgen-cnn-bn")
    x = rows(net, 5)
    for _ in range(3):
        net(p, x, train=True)
    before = trees.flat(p)
    whole = net.frozen(p, x)
    assert torch.equal(trees.flat(p), before)
    torch.testing.assert_close(net.frozen(p, x[:1]), whole[:1])  # a row does not depend on its companions
    assert not torch.allclose(net(trees.clone(p), x, train=True), whole)
    p["features"]["norm1.running_mean"] += 1
    assert not torch.allclose(net.frozen(p, x), whole)


def test_batchnorm_of_a_single_value_is_finite_and_moves_nothing() -> None:
    """A variance needs two values. A 1x2x2 image has one value per channel at either norm."""
    net = nets.build("fedgen-cnn-bn", (1, 2, 2), 3)
    p = net.init(trees.stream(0))
    before = trees.flat(p)
    assert net(p, rows(net, 1), train=True).isfinite().all()
    assert torch.equal(trees.flat(p), before)


def test_batchnorm_gives_no_gradient_to_its_statistics() -> None:
    net, p = made("fedgen-cnn-bn")
    q = learning(p)
    for path, gradient in gradients(net(q, rows(net, 4)).square().sum(), q).items():
        assert (gradient is None) == path.endswith(BUFFERS), path


def test_frozen_has_no_gradient() -> None:
    net, p = made("lenet5")
    q = learning(p)
    x = rows(net, 2)
    assert not net.frozen(q, x).requires_grad
    assert torch.equal(net.frozen(q, x), net(q, x).detach())


@pytest.mark.parametrize("name", nets.names())
def test_a_net_pickles_as_its_name(name: str) -> None:
    net, p = made(name)
    raw = pickle.dumps(net)
    assert len(raw) < 300  # no parameters inside
    nets.build.cache_clear()  # as in another process
    again = pickle.loads(raw)
    assert again == net
    assert hash(again) == hash(net)
    assert again.features_shape == net.features_shape
    assert torch.equal(again.frozen(p, rows(net, 2)), net.frozen(p, rows(net, 2)))


def test_nets_differ_by_name_shape_and_classes() -> None:
    assert nets.build("mlp", DIGITS, 10) is nets.build("mlp", DIGITS, 10)
    different = [("mlp", DIGITS, 10), ("lenet5", DIGITS, 10), ("mlp", MNIST, 10), ("mlp", DIGITS, 9)]
    assert len({nets.build(*key) for key in different}) == 4


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 70), st.integers(4, 70), st.integers(1, 4))
def test_lenet_takes_images_of_any_size_from_4x4(height: int, width: int, channels: int) -> None:
    net = nets.build("kdia-lenet", (channels, height, width), 3)
    p = net.init(trees.stream(0))
    x = rows(net, 2)
    assert net.embed(p, x, "features").shape == (2, *net.features_shape)
    assert net.frozen(p, x).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "words"),
    [
        ("lenet", DIGITS, 10, ["'lenet'", "Did you mean 'lenet5'?", "resnet18"]),
        ("mlp", (64,), 10, ["(channels, height, width)", "(64,)"]),
        ("mlp", (1, 0, 8), 10, ["(1, 0, 8)"]),
        ("gru-small", DIGITS, 10, ["tokens of shape (words,)", "(1, 8, 8)"]),
        ("gru-small+attention", DIGITS, 10, ["tokens of shape (words,)"]),
        ("mlp", DIGITS, 1, ["at least 2 classes", "1"]),
        ("lenet5", (1, 3, 20), 10, ["'lenet5'", "1x3x20", "4x4"]),
        ("mcmahan-cnn", (3, 2, 2), 10, ["'mcmahan-cnn'", "3x2x2", "4x4"]),
    ],
)
def test_refused(name: str, shape: tuple[int, ...], classes: int, words: list[str]) -> None:
    with pytest.raises(Refused) as refusal:
        nets.build(name, shape, classes)
    assert all(word in str(refusal.value) for word in words)


def test_unknown_cut_points_are_refused() -> None:
    net, p = made("mlp")
    z = net.embed(p, rows(net, 2))
    for use in (
        lambda: net.embed(p, rows(net, 2), "feature"),
        lambda: net.classify(p, z, "feature"),
        lambda: net.shape("feature"),
        lambda: nets.generator(net, "feature", 4),
    ):
        with pytest.raises(Refused, match="Did you mean 'features'"):
            use()


def test_a_torchvision_of_another_build_is_refused_with_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setitem(sys.modules, "torchvision.models", Broken("torchvision.models"))
    with pytest.raises(Refused, match="torchvision::nms does not exist"):
        nets.build("resnet18", (3, 9, 9), 10)


# ---- generators


def test_generator_sizes() -> None:
    """kdia, noise 100, C = 10: codes 10*10 = 100; 2x2 kernels (110*512 + 512*256 + 256*128 + 128*16) * 4 = 888,832;
    norms 2 * (512 + 256 + 128) = 1,792; sum 890,724.
    fedgen, noise 32, hidden 256, latent 32: (32+10)*256+256 = 11,008; norm 512; 256*32+32 = 8,224; sum 19,744.
    """
    kdia = nets.generator(nets.build("kdia-lenet", CIFAR, 10), "features", noise=100)
    assert (kdia.style, kdia.shape) == ("kdia", (16, 5, 5))
    assert trained(kdia.init(trees.stream(0))) == 890_724
    kernels = [x.shape for path, x in trees.leaves(kdia.init(trees.stream(0))) if "conv" in path]
    assert kernels == [(110, 512, 2, 2), (512, 256, 2, 2), (256, 128, 2, 2), (128, 16, 2, 2)]
    fedgen = nets.generator(nets.build("fedgen-cnn", MNIST, 10), "latent", noise=32)
    assert (fedgen.style, fedgen.shape) == ("fedgen", (32,))
    assert trained(fedgen.init(trees.stream(0))) == 19_744


@pytest.mark.parametrize("name", nets.names())
@pytest.mark.parametrize("at", nets.CUTS)
def test_a_generator_fits_its_cut_point_and_learns_through_the_net(name: str, at: str) -> None:
    net, p = made(name)
    make = nets.generator(net, at, noise=6, hidden=8)
    q = learning(make.init(trees.stream(1)))
    z, y = torch.randn(5, 6, generator=trees.stream(2)), torch.arange(5)
    made_up = make(q, z, y)
    assert made_up.shape == (5, *net.shape(at))
    loss = F.cross_entropy(net.classify(p, made_up, at, train=False), y)
    for path, gradient in gradients(loss, q).items():
        assert path.endswith(BUFFERS) or (gradient is not None and gradient.abs().sum() > 0), path


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 14), st.integers(1, 14), st.integers(1, 5))
def test_kdia_generators_reach_maps_of_any_size(height: int, width: int, depth: int) -> None:
    """A transposed convolution of stride 1 grows a side by its kernel - 1; the four must add up to the map."""
    make = nets._generator((depth, height, width), 3, 4, 8, "kdia")
    out = make.frozen(make.init(trees.stream(0)), torch.zeros(2, 4), torch.tensor([0, 2]))
    assert out.shape == (2, depth, height, width)
    assert ((out > 0) & (out < 1)).all()


@pytest.mark.parametrize("at", nets.CUTS)
def test_generators_are_the_plain_modules_and_depend_on_noise_and_label(at: str) -> None:
    net = nets.build("lenet5", DIGITS, 10)
    make = nets.generator(net, at, noise=6, hidden=8)
    q = make.init(trees.stream(1))
    z, y = torch.randn(4, 6, generator=trees.stream(2)), torch.tensor([3, 1, 4, 1])
    plain = make.module()
    plain.load_state_dict(q, strict=False)
    body = plain.get_submodule("body")
    code = plain.get_submodule("labels")(y) if make.style == "kdia" else F.one_hot(y, 10).float()
    assert torch.equal(make(q, z, y), body(torch.cat([z, code], 1)).detach())
    out = make.frozen(q, z, y)
    assert torch.equal(out, body.eval()(torch.cat([z, code], 1)).detach())
    torch.testing.assert_close(make.frozen(q, z[1:2], y[1:2]), out[1:2])  # running statistics: no companions needed
    assert not torch.allclose(make.frozen(q, z, y + 1), out)
    assert not torch.allclose(make.frozen(q, z + 1, y), out)


def test_generators_on_request_make_maps_in_fedgens_style() -> None:
    make = nets.generator(nets.build("lenet5", MNIST, 10), "features", noise=3, hidden=8, style="fedgen")
    out = make(make.init(trees.stream(0)), torch.zeros(2, 3), torch.tensor([0, 9]))
    assert out.shape == (2, 16, 5, 5)


def test_generators_are_seeded_pickle_and_hash() -> None:
    net = nets.build("kdia-lenet", MNIST, 10)
    make = nets.generator(net, "features", noise=6, hidden=8)
    state = torch.get_rng_state()
    q = make.init(trees.stream(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(trees.flat(make.init(trees.stream(1))), trees.flat(q))
    raw = pickle.dumps(make)
    nets._generator.cache_clear()
    again = pickle.loads(raw)
    assert (again, hash(again)) == (make, hash(make))
    z, y = torch.ones(2, 6), torch.tensor([0, 1])
    assert torch.equal(again.frozen(q, z, y), make.frozen(q, z, y))
    assert make != nets.generator(net, "features", noise=7, hidden=8)


def test_a_generator_in_training_moves_its_statistics_and_frozen_does_not() -> None:
    make = nets.generator(nets.build("lenet5", DIGITS, 10), "latent", noise=6, hidden=8)
    q = make.init(trees.stream(1))
    before = trees.flat(q)
    z, y = torch.randn(4, 6, generator=trees.stream(2)), torch.arange(4)
    assert not make.frozen(learning(q), z, y).requires_grad
    assert torch.equal(trees.flat(q), before)
    make(q, z[:1], y[:1])  # one row has no variance
    assert torch.equal(trees.flat(q), before)
    make(q, z, y)
    assert not torch.equal(trees.flat(q), before)


def test_generators_refuse_what_cannot_be() -> None:
    net = nets.build("lenet5", DIGITS, 10)
    for options, words in (
        ({"noise": 0}, "noise >= 1"),
        ({"noise": 4, "hidden": 1}, "hidden >= 2"),
        ({"noise": 4, "style": "kdai"}, "Did you mean 'kdia'"),
    ):
        with pytest.raises(Refused, match=words):
            nets.generator(net, "latent", **options)
