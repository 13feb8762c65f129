"""Data sets: the shipped cards, the file formats on small made files, the search, downloads and what is refused.

Made files have the layout of the published ones and checksums of their own, in a card written beside them.
"""

import copyreg
import functools
import gzip
import hashlib
import http.server
import io
import json
import pickle
import struct
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from harness import cards, data, formats
from harness.refusal import Refused

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the machine's data nor its proxies may decide a test."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.delenv("FEDSTILL_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "*")


def md5(content: bytes) -> str:
    return "md5:" + hashlib.md5(content, usedforsecurity=False).hexdigest()


def make_card(
    folder: Path, kind: str, shape: tuple[int, int, int], classes: int, counts: tuple[int, int], /, **more: object
):
    """A card for made data; tables among `more` are dicts."""
    values: dict[str, object] = {
        "title": "made",
        "source": "the test",
        "licence": "none",
        "format": kind,
        "shape": list(shape),
        "classes": classes,
        "class_names": [f"class{c}" for c in range(classes)],
        "mean": [0.5] * shape[0],
        "std": [0.5] * shape[0],
        "train": counts[0],
        "test": counts[1],
        "default_net": "mlp",
        **more,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"[{key}]", *(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in value.items())]
    path = folder / "made.toml"
    path.write_text("\n".join(lines))
    return data.card(str(path))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


# The shipped cards --------------------------------------------------------------------------------------------------


def test_the_cards_that_are_promised_exist() -> None:
    promised = "digits fashion-mnist mnist emnist-letters svhn cifar10 cifar100 cifar100-coarse cinic10 tiny-imagenet"
    assert set(promised.split()) <= set(cards.names("datasets"))


@pytest.mark.parametrize("name", cards.names("datasets"))
def test_shipped_cards_are_whole(name: str) -> None:
    card = data.card(name)
    assert card.name == name
    assert card.train > card.classes or card.format == "posts"
    assert len(set(card.class_names)) == card.classes or card.tokens  # a vocabulary is made from the texts
    assert card.format == "digits" or card.files
    assert all(0 < m < 1 for m in card.mean)
    checked = [*card.files.values(), *card.archives.values(), card.arrays]
    assert any(checked) or card.format == "posts", "no checksum at all"  # a user's own file has none


def test_cards_agree_with_torchvision() -> None:
    """Its checksums, addresses and class names are what most people have been using."""
    from torchvision import datasets as tv

    for name, theirs in (("cifar10", tv.CIFAR10), ("cifar100", tv.CIFAR100), ("cifar100-coarse", tv.CIFAR100)):
        card = data.card(name)
        assert card.archives == {theirs.filename: f"md5:{theirs.tgz_md5}"}
        assert card.files == {file: f"md5:{digest}" for file, digest in theirs.train_list + theirs.test_list}
        assert card.download == {theirs.filename: (theirs.url,)}
        assert theirs.base_folder in card.places
    emnist, svhn, fashion = data.card("emnist-letters"), data.card("svhn"), data.card("fashion-mnist")
    assert emnist.archives == {"gzip.zip": f"md5:{tv.EMNIST.md5}"}
    assert list(emnist.class_names) == tv.EMNIST.classes_split_dict["letters"][1:]
    assert svhn.files == {tv.SVHN.split_list[s][1]: f"md5:{tv.SVHN.split_list[s][2]}" for s in ("train", "test")}
    assert list(fashion.class_names) == tv.FashionMNIST.classes
    for name, theirs in (("mnist", tv.MNIST), ("fashion-mnist", tv.FashionMNIST)):
        expected = {file: tuple(mirror + file for mirror in theirs.mirrors) for file, _ in theirs.resources}
        assert data.card(name).download == expected


def test_digits() -> None:
    """1,797 rows; of each class every fifth is test, so sum_c floor(n_c / 5) = 355 with n_c = 178, 182, 177, ..."""
    from sklearn.datasets import load_digits

    card, theirs = data.card("digits"), load_digits()
    arrays = data.load(card)
    assert len(arrays.y_test) == sum(n // 5 for n in np.bincount(theirs.target)) == 355
    assert arrays.x_train.shape == (1797 - 355, 1, 8, 8)
    assert np.array_equal(arrays.x_train[0, 0], np.round(theirs.images[0] * 255 / 16))
    assert arrays.x_train.max() == 255
    assert sorted(arrays.y_train.tolist() + arrays.y_test.tolist()) == sorted(theirs.target)
    assert (arrays.x_train / 255).mean() == pytest.approx(card.mean[0], abs=5e-5)
    assert (arrays.x_train / 255).std() == pytest.approx(card.std[0], abs=5e-5)


def test_digits_in_the_size_of_mnist() -> None:
    """8 x 3 = 24 pixels, and 2 on each side: every third one from the third on is the original."""
    card, small = data.card("digits-28"), data.load(data.card("digits"))
    arrays = data.load(card)
    assert arrays.x_train.shape == (1442, 1, 28, 28)
    assert np.array_equal(arrays.x_test[:, :, 2:26:3, 4:27:3], small.x_test)
    assert not arrays.x_train[:, :, :2].any() and not arrays.x_train[..., 26:].any()
    assert int(arrays.x_train.sum(dtype=np.int64)) == 9 * int(small.x_train.sum(dtype=np.int64))
    assert np.array_equal(arrays.y_test, small.y_test)
    assert (arrays.x_train / 255).mean() == pytest.approx(card.mean[0], abs=5e-5)
    assert (arrays.x_train / 255).std() == pytest.approx(card.std[0], abs=5e-5)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_the_debian_package() -> None:
    card = data.card("fashion-mnist")
    arrays = data.load(card, download=False)
    assert arrays.x_train.shape == (60_000, 1, 28, 28)
    assert arrays.x_train.flags.c_contiguous
    assert np.array_equal(np.bincount(arrays.y_train), [6000] * 10)
    assert np.array_equal(np.bincount(arrays.y_test), [1000] * 10)
    levels, share = np.arange(256) / 255, np.bincount(arrays.x_train.ravel(), minlength=256) / arrays.x_train.size
    assert share @ levels == pytest.approx(card.mean[0], abs=5e-5)
    assert np.sqrt(share @ levels**2 - (share @ levels) ** 2) == pytest.approx(card.std[0], abs=5e-5)
    assert card.class_names[arrays.y_train[0]] == "Ankle boot"  # the boot that opens every tutorial


# IDX: MNIST, Fashion-MNIST, EMNIST ----------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


X_TRAIN, X_TEST = RNG.integers(0, 256, (6, 5, 4), np.uint8), RNG.integers(0, 256, (3, 5, 4), np.uint8)
Y_TRAIN, Y_TEST = np.array([2, 0, 1, 1, 0, 2]), np.array([1, 2, 0])
IDX_FILES = {
    "train-images-idx3-ubyte": idx(X_TRAIN),
    "train-labels-idx1-ubyte": idx(Y_TRAIN),
    "t10k-images-idx3-ubyte": idx(X_TEST),
    "t10k-labels-idx1-ubyte": idx(Y_TEST),
}


def idx_card(folder: Path, **more: object) -> data.Card:
    files = {name: md5(content) for name, content in IDX_FILES.items()}
    return make_card(folder, "idx", (1, 5, 4), 3, (6, 3), **{"files": files, "places": ["", "Made/raw"], **more})


def packed(files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(content) for name, content in files.items()}


def assert_is_made(arrays: data.Arrays) -> None:
    assert np.array_equal(arrays.x_train, X_TRAIN[:, None])
    assert np.array_equal(arrays.x_test, X_TEST[:, None])
    assert np.array_equal(arrays.y_train, Y_TRAIN)
    assert np.array_equal(arrays.y_test, Y_TEST)
    assert (arrays.x_train.dtype, arrays.y_train.dtype) == (np.uint8, np.int64)


@pytest.mark.parametrize("place", ["made", ".", "made/Made/raw", "Made/raw"])
@pytest.mark.parametrize("files", [IDX_FILES, packed(IDX_FILES)], ids=["plain", "gz"])
@pytest.mark.parametrize("where", ["folder", "variable", "cwd"])
def test_idx_is_found_wherever_it_may_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, files: dict[str, bytes], where: str
) -> None:
    root = tmp_path / ("cwd/data" if where == "cwd" else "elsewhere")
    write(root / place, files)
    if where == "variable":
        monkeypatch.setenv("FEDSTILL_DATA", str(root))
    assert_is_made(data.load(idx_card(tmp_path), root if where == "folder" else None, download=False))


def test_a_system_package_is_found(tmp_path: Path) -> None:
    place = write(tmp_path / "usr", packed(IDX_FILES))
    assert_is_made(data.load(idx_card(tmp_path, system=[str(place)]), download=False))


def test_the_given_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable's folder holds a damaged copy: were it read, the checksum would be refused."""
    good = write(tmp_path / "good", IDX_FILES)
    bad = write(tmp_path / "bad", {name: content + b"x" for name, content in IDX_FILES.items()})
    monkeypatch.setenv("FEDSTILL_DATA", str(bad))
    assert_is_made(data.load(idx_card(tmp_path), good))
    with pytest.raises(Refused, match="wrong checksum"):
        data.load(idx_card(tmp_path))


def test_emnist_zip_of_gzips_transposed_with_labels_from_one(tmp_path: Path) -> None:
    files = {
        "emnist-letters-train-images-idx3-ubyte": idx(X_TRAIN.transpose(0, 2, 1)),
        "emnist-letters-train-labels-idx1-ubyte": idx(Y_TRAIN + 1),
        "emnist-letters-test-images-idx3-ubyte": idx(X_TEST.transpose(0, 2, 1)),
        "emnist-letters-test-labels-idx1-ubyte": idx(Y_TEST + 1),
    }
    others = {"emnist-digits-train-images-idx3-ubyte.gz": b"not even gzip"}
    archive = zipped({f"gzip/{name}": content for name, content in {**packed(files), **others}.items()})
    settings = {"files": dict.fromkeys(files, ""), "transposed": True, "first_label": 1}
    card = make_card(tmp_path, "idx", (1, 5, 4), 3, (6, 3), archives={"gzip.zip": md5(archive)}, **settings)
    assert_is_made(data.load(card, write(tmp_path / "archive", {"gzip.zip": archive})))
    assert_is_made(data.load(card, write(tmp_path / "unpacked", files)))


# CIFAR --------------------------------------------------------------------------------------------------------------


class Python2Pickler(pickle._Pickler):
    """Writes bytes and text as Python 2's `str`, which is what the published batches hold."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_py2_str(self, value: str | bytes) -> None:
        raw = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_py2_str


def python2_pickle(value: object) -> bytes:
    out = io.BytesIO()
    Python2Pickler(out, protocol=2).dump(value)
    return out.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


CIFAR_X = RNG.integers(0, 256, (5, 3, 32, 32), np.uint8)
CIFAR_Y = np.array([0, 1, 1, 0, 1])


def cifar_files(pickled: Callable[[object], bytes]) -> dict[str, bytes]:
    parts = {"data_batch_1": slice(0, 2), "data_batch_2": slice(2, 3), "test_batch": slice(3, 5)}
    return {
        name: pickled({"data": CIFAR_X[rows].reshape(-1, 3072), "labels": CIFAR_Y[rows].tolist(), "batch_label": "x"})
        for name, rows in parts.items()
    }


@pytest.mark.parametrize("pickled", [python2_pickle, functools.partial(pickle.dumps, protocol=4)])
def test_cifar_from_the_archive_and_the_unpacked_folder(tmp_path: Path, pickled: Callable[[object], bytes]) -> None:
    files = cifar_files(pickled)
    inside = {f"cifar-10-batches-py/{name}": content for name, content in reversed(files.items())}
    archive = tar({**inside, "cifar-10-batches-py/readme.html": b"hello"})
    card = make_card(
        tmp_path,
        "cifar",
        (3, 32, 32),
        2,
        (3, 2),
        places=["", "cifar-10-batches-py"],
        files={name: md5(content) for name, content in files.items()},
        archives={"cifar.tar.gz": md5(archive)},
    )
    for root in (write(tmp_path / "a", {"cifar.tar.gz": archive}), write(tmp_path / "b", inside)):
        arrays = data.load(card, root)
        assert np.array_equal(arrays.x_train, CIFAR_X[:3])
        assert np.array_equal(arrays.x_test, CIFAR_X[3:])
        assert np.array_equal(arrays.y_train, CIFAR_Y[:3])


def test_cifar100_has_two_kinds_of_labels(tmp_path: Path) -> None:
    fine, coarse = [0, 1, 2, 3], [0, 0, 1, 1]
    batch = pickle.dumps({"data": CIFAR_X[:4].reshape(4, -1), "fine_labels": fine, "coarse_labels": coarse})
    root = write(tmp_path / "a", {"train": batch, "test": batch})
    for key, expected in (("fine_labels", fine), ("coarse_labels", coarse)):
        files = {"train": md5(batch), "test": md5(batch)}
        classes = max(expected) + 1
        card = make_card(tmp_path, "cifar", (3, 32, 32), classes, (4, 4), files=files, label_key=key)
        assert data.load(card, root).y_train.tolist() == expected


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Bomb()),
        pickle.dumps({"data": copyreg.__newobj__, "labels": []}),
        b"cos\nsystem\n(S'touch exploded'\ntR.",
    ],
)
def test_a_pickle_that_names_anything_else_is_refused_and_not_run(content: bytes) -> None:
    with pytest.raises(Refused, match="only plain values"):
        formats.cifar(content, "labels", "data_batch_1")
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        pickle.dumps([1, 2]),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8)}),
        pickle.dumps({"data": np.zeros((2, 3071), np.uint8), "labels": [0, 1]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]}),
    ],
)
def test_a_damaged_cifar_batch_is_refused(content: bytes) -> None:
    with pytest.raises(Refused, match="data_batch_1"):
        formats.cifar(content, "labels", "data_batch_1")


# SVHN ---------------------------------------------------------------------------------------------------------------


def test_svhn(tmp_path: Path) -> None:
    """MATLAB keeps the rows last, X[height, width, channel, row], and calls the digit 0 "10"."""
    from scipy.io import savemat

    digits = np.arange(10)
    x = RNG.integers(0, 256, (10, 3, 32, 32), np.uint8)
    out = io.BytesIO()
    savemat(out, {"X": x.transpose(2, 3, 1, 0), "y": np.where(digits == 0, 10, digits)[:, None].astype(np.uint8)})
    files = {"train_32x32.mat": out.getvalue(), "test_32x32.mat": out.getvalue()}
    checksums = {name: md5(content) for name, content in files.items()}
    card = make_card(tmp_path, "svhn", (3, 32, 32), 10, (10, 10), files=checksums)
    arrays = data.load(card, write(tmp_path / "a", files))
    assert np.array_equal(arrays.x_train, x)
    assert np.array_equal(arrays.y_train, digits)
    for content in (b"", b"garbage" * 100, out.getvalue()[:-5000]):
        with pytest.raises(Refused, match="MATLAB"):
            formats.svhn(content, "train_32x32.mat")


# Image folders: CINIC-10, Tiny-ImageNet -----------------------------------------------------------------------------


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels).save(out, "PNG")
    return out.getvalue()


PICTURES = RNG.integers(0, 256, (6, 3, 4, 4), np.uint8)
P = [png(picture) for picture in PICTURES]


@pytest.mark.parametrize("prefix", ["", "./", "CINIC-10/"])
def test_cinic_from_the_archive_and_the_unpacked_folder(tmp_path: Path, prefix: str) -> None:
    """Rows come in the order of their paths, whatever the archive's order; `valid` and stray files are not read."""
    files = {
        f"{prefix}train/class1/b.png": P[2],
        f"{prefix}test/class1/a.png": P[4],
        f"{prefix}train/class0/a.png": P[0],
        f"{prefix}train/class1/a.png": P[1],
        f"{prefix}test/class0/a.png": P[3],
        f"{prefix}valid/class0/a.png": b"not read",
        f"{prefix}train/class0/._a.png": b"not read",
        f"{prefix}train/notes.txt": b"not read",
    }
    archive = tar(files)
    card = make_card(
        tmp_path,
        "images",
        (3, 4, 4),
        2,
        (3, 2),
        places=["", "CINIC-10"],
        files={"train/": "", "test/": ""},
        archives={"CINIC-10.tar.gz": md5(archive)},
    )
    for root in (write(tmp_path / "a", {"CINIC-10.tar.gz": archive}), write(tmp_path / "b", files)):
        arrays = data.load(card, root)
        assert np.array_equal(arrays.x_train, PICTURES[:3])
        assert np.array_equal(arrays.x_test, PICTURES[3:5])
        assert arrays.y_train.tolist() == [0, 1, 1]
        assert arrays.y_test.tolist() == [0, 1]


def tiny_card(folder: Path, counts: tuple[int, int] = (2, 2), **more: object) -> data.Card:
    return make_card(folder, "images", (3, 4, 4), 2, counts, **{"files": {"train/": "", "val/": ""}, **more})


TINY = {
    "train/class0/images/class0_0.JPEG": P[0],
    "train/class1/images/class1_0.JPEG": P[1],
    "train/class1/class1_boxes.txt": b"class1_0.JPEG\t0\t0\t3\t3\n",
    "val/images/val_0.JPEG": P[2],
    "val/images/val_1.JPEG": P[3],
    "val/val_annotations.txt": b"val_0.JPEG\tclass1\t0\t0\t3\t3\nval_1.JPEG\tclass0\t0\t0\t3\t3\n",
}


def test_tiny_imagenet_from_the_archive_and_the_unpacked_folder(tmp_path: Path) -> None:
    archive = zipped({f"tiny-imagenet-200/{name}": content for name, content in TINY.items()})
    card = tiny_card(tmp_path, archives={"tiny.zip": md5(archive)})
    for root in (write(tmp_path / "a", {"tiny.zip": archive}), write(tmp_path / "b", TINY)):
        arrays = data.load(card, root)
        assert np.array_equal(arrays.x_test, PICTURES[2:4])
        assert arrays.y_train.tolist() == [0, 1]
        assert arrays.y_test.tolist() == [1, 0]


def test_a_grey_image_of_a_colour_set_fills_every_channel() -> None:
    grey = PICTURES[0, 0]
    assert np.array_equal(formats.image(png(grey), (3, 4, 4), "x.png"), np.stack([grey] * 3))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train/class0/images/class0_0.JPEG": b"garbage"}, "class0_0.JPEG is no readable PNG or JPEG"),
        ({"train/class0/images/class0_0.JPEG": P[0][: len(P[0]) // 2]}, "no readable"),
        ({"train/class0/images/class0_0.JPEG": png(PICTURES[0][:, :3])}, "4x3 pixels, the card says 4x4"),
        ({"train/class0/images/more.JPEG": P[4]}, "3 training rows were found, its card says 2"),
        ({"val/val_annotations.txt": b"val_0.JPEG\tclass1\n"}, "not annotated"),
        ({"val/val_annotations.txt": b"val_0.JPEG\tclass1\nval_1.JPEG\tclass7\n"}, "class class7"),
        ({"val/val_annotations.txt": b"val_0.JPEG\tclass1\nval_1.JPEG\tclass1\n"}, "no row of class 'class0'"),
    ],
)
def test_image_folders_that_are_not_the_data_set_are_refused(
    tmp_path: Path, change: dict[str, bytes], said: str
) -> None:
    with pytest.raises(Refused, match=said):
        data.load(tiny_card(tmp_path), write(tmp_path / "a", TINY | change))


# Refusals -----------------------------------------------------------------------------------------------------------


def test_a_wrong_checksum_shows_both(tmp_path: Path) -> None:
    changed = IDX_FILES["train-labels-idx1-ubyte"][:-1] + b"\x01"
    root = write(tmp_path / "a", IDX_FILES | {"train-labels-idx1-ubyte": changed})
    with pytest.raises(Refused) as refused:
        data.load(idx_card(tmp_path), root)
    assert md5(changed) in str(refused.value)
    assert md5(IDX_FILES["train-labels-idx1-ubyte"]) in str(refused.value)


def test_a_wrong_archive_is_not_even_opened(tmp_path: Path) -> None:
    card = idx_card(tmp_path, archives={"made.zip": md5(b"the real one")})
    with pytest.raises(Refused, match=r"made\.zip has the wrong checksum"):
        data.load(card, write(tmp_path / "a", {"made.zip": b"something else"}))


def test_an_archive_that_lacks_a_file_is_refused(tmp_path: Path) -> None:
    archive = zipped({name: content for name, content in IDX_FILES.items() if "t10k" not in name})
    card = idx_card(tmp_path, archives={"made.zip": md5(archive)})
    with pytest.raises(Refused, match="no images of its test part"):
        data.load(card, write(tmp_path / "a", {"made.zip": archive}))


def test_an_incomplete_folder_names_what_is_missing(tmp_path: Path) -> None:
    root = write(tmp_path / "a", {k: v for k, v in IDX_FILES.items() if k != "t10k-labels-idx1-ubyte"})
    with pytest.raises(Refused, match="incomplete: t10k-labels-idx1-ubyte missing"):
        data.load(idx_card(tmp_path), root)


def test_missing_data_says_which_file_goes_where(tmp_path: Path) -> None:
    with pytest.raises(Refused) as refused:
        data.load(data.card("cifar10"), download=False)
    message = str(refused.value)
    assert "cifar-10-python.tar.gz" in message
    assert str(tmp_path / "cwd" / "data" / "cifar10") in message
    assert "FEDSTILL_DATA" in message
    assert "\n" not in message


def test_a_named_folder_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="the data folder is set to"):
        data.load(idx_card(tmp_path), tmp_path / "nowhere")
    monkeypatch.setenv("FEDSTILL_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(Refused, match="FEDSTILL_DATA is set to"):
        data.load(idx_card(tmp_path))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"train": 7}, "6 training rows were found, its card says 7"),
        ({"shape": [1, 4, 5]}, r"shape \(6, 1, 5, 4\)"),
        ({"first_label": 1}, "labels from -1 to 1"),
        ({"classes": 4, "class_names": ["a", "b", "c", "d"]}, "no row of class 'd'"),
        ({"arrays": "sha256:" + "0" * 64}, "the arrays have the wrong checksum"),
    ],
)
def test_arrays_that_differ_from_the_card_are_refused(tmp_path: Path, more: dict[str, object], said: str) -> None:
    with pytest.raises(Refused, match=said):
        data.load(idx_card(tmp_path, **more), write(tmp_path / "a", IDX_FILES))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"colour": "red"}, "key colour"),
        ({"train": "6"}, "key train"),
        ({"mean": [0.5, 0.5]}, "mean and std need one value for each of the 1 channels"),
        ({"std": [0.0]}, "key std.0"),
        ({"class_names": ["a"]}, "classes = 3, but class_names has 1 names"),
        ({"files": {"x": "crc32:1234"}}, "key files.x"),
        ({"download": {"x.gz": ["http://localhost/x.gz"]}}, "download lists 'x.gz'"),
        ({"augment": {"crop_pad": -1}}, "key augment.crop_pad"),
    ],
)
def test_a_bad_card_is_refused_with_its_key(tmp_path: Path, more: dict[str, object], said: str) -> None:
    with pytest.raises(Refused, match=said):
        idx_card(tmp_path, **more)


def test_an_unknown_data_set_gets_the_nearest_name() -> None:
    with pytest.raises(Refused, match="fashion-mnist"):
        data.card("fashion_mnst")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x00",
        b"\x00\x00\x0d\x01" + b"\x00\x00\x00\x01" + bytes(4),  # floats
        b"\x00\x00\x08\x00",
        idx(Y_TRAIN)[:-1],
        idx(Y_TRAIN) + b"x",
        b"\x00\x00\x08\x03" + b"\xff" * 12,  # sizes whose product overflows 64 bits
    ],
)
def test_a_damaged_idx_file_is_refused(content: bytes) -> None:
    with pytest.raises(Refused, match="labels"):
        formats.idx(content, "labels")


def test_a_damaged_gzip_is_refused(tmp_path: Path) -> None:
    files = packed(IDX_FILES)
    files["train-images-idx3-ubyte.gz"] = files["train-images-idx3-ubyte.gz"][:-12]
    with pytest.raises(Refused, match="cannot be read"):
        data.load(idx_card(tmp_path), write(tmp_path / "a", files))


# Archives that mean harm --------------------------------------------------------------------------------------------


def special(kind: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        member = tarfile.TarInfo("data_batch_1")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    return out.getvalue()


def zip_link() -> bytes:
    member = zipfile.ZipInfo("data_batch_1")
    member.external_attr = 0o120777 << 16
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(member, "/etc/passwd")
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.tar", tar({"../data_batch_1": b"x"}), "out of the archive"),
        ("a.tar", tar({"a/../../data_batch_1": b"x"}), "out of the archive"),
        ("a.tar", tar({"/tmp/data_batch_1": b"x"}), "out of the archive"),
        ("a.zip", zipped({"../data_batch_1": b"x"}), "out of the archive"),
        ("a.zip", zipped({"a\\..\\data_batch_1": b"x"}), "out of the archive"),
        ("a.tar", special(tarfile.SYMTYPE), "a link or a device"),
        ("a.tar", special(tarfile.LNKTYPE), "a link or a device"),
        ("a.tar", special(tarfile.FIFOTYPE), "a link or a device"),
        ("a.zip", zip_link(), "a link or a device"),
        ("a.tar", b"garbage", "cannot be read"),
        ("a.zip", b"garbage", "cannot be read"),
        ("a.tar", tar({"a": bytes(50_000)})[:-40], "cannot be read"),
    ],
)
def test_harmful_and_damaged_archives_are_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = write(tmp_path / "a", {name: content}) / name
    with pytest.raises(Refused, match=said):
        list(formats.members(path, lambda name: True))
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [name]


@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
def test_archives_that_unpack_to_too_much_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    make = tar if name == "a.tar" else zipped
    files = {f"file{i}": bytes(1000) for i in range(5)} | {"bomb.gz": gzip.compress(bytes(10**6))}
    path = write(tmp_path / "a", {name: make(files)}) / name
    assert len(list(formats.members(path, lambda name: True))) == 6
    monkeypatch.setattr(formats, "MEMBER_BYTES", 10**5)
    with pytest.raises(Refused, match=r"bomb\.gz unpacks to more than 100,000 bytes"):
        list(formats.members(path, lambda name: True))
    monkeypatch.setattr(formats, "ARCHIVE_BYTES", 3500)
    with pytest.raises(Refused, match="unpacks to more than 3,500 bytes at 'file3'"):
        list(formats.members(path, lambda name: name == "file0"))


# Downloads ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address under which it is served."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *given: object) -> None:
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


def test_download_takes_the_first_address_that_answers(tmp_path: Path, server: tuple[Path, str]) -> None:
    folder, address = server
    write(folder, packed(IDX_FILES))
    download = {f"{name}.gz": [f"{address}gone/{name}.gz", f"{address}{name}.gz"] for name in IDX_FILES}
    card = idx_card(tmp_path, download=download)
    with pytest.raises(Refused, match="not found"):
        data.load(card, download=False)
    assert_is_made(data.load(card))
    placed = tmp_path / "cwd" / "data" / "made"
    assert sorted(p.name for p in placed.iterdir()) == sorted(download)
    assert_is_made(data.load(card, download=False))


def test_download_goes_to_the_given_folder(tmp_path: Path, server: tuple[Path, str]) -> None:
    folder, address = server
    archive = tar(IDX_FILES)
    write(folder, {"made.tar.gz": archive})
    more = {"archives": {"made.tar.gz": md5(archive)}, "download": {"made.tar.gz": [f"{address}made.tar.gz"]}}
    target = tmp_path / "mine"
    target.mkdir()
    assert_is_made(data.load(idx_card(tmp_path, **more), target))
    assert (target / "made" / "made.tar.gz").is_file()


def test_a_download_that_fails_or_is_wrong_leaves_nothing(tmp_path: Path, server: tuple[Path, str]) -> None:
    folder, address = server
    write(folder, packed(IDX_FILES | {"t10k-labels-idx1-ubyte": b"another file"}))
    card = idx_card(tmp_path, download={f"{name}.gz": [f"{address}{name}.gz"] for name in IDX_FILES})
    with pytest.raises(Refused, match="wrong checksum"):
        data.load(card)
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(Refused, match=r"downloading made failed .*404.* Put train-images-idx3-ubyte"):
        data.load(card)
    assert list((tmp_path / "cwd").iterdir()) == []


def test_the_checksum_of_arrays_sees_every_array_and_shape() -> None:
    x, y = np.zeros((2, 1, 2, 2), np.uint8), np.zeros(2, np.int64)
    made = [(x, y, x, y), (x + 1, y, x, y), (x, y + 1, x, y), (x, y, x + 1, y), (x, y, x, y + 1)]
    made.append((x.reshape(2, 1, 1, 4), y, x, y))
    assert len({data.Arrays(*arrays).checksum() for arrays in made}) == len(made)
    assert data.Arrays(*made[0]).checksum() == data.Arrays(x.copy(), y.copy(), x.copy(), y.copy()).checksum()
