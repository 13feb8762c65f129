"""Data sets: from a card to checked arrays. There is no stand-in for data that is missing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from harness import cards, formats, sources, text
from harness.refusal import Refused

Bytes = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Inputs = npt.NDArray[np.integer]  # images uint8 [n, C, H, W] or tokens int16 or int32 [n, T]


class Augment(BaseModel):
    """What is done to training images, in batches on the device: pad and crop at random, mirror left to right."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    crop_pad: Annotated[int, Field(ge=0)] = 0  # pixels on each side
    flip: bool = False
    pad_mode: Literal["zeros", "reflect"] = "zeros"


class Reading(BaseModel):
    """How texts become rows, windows of words; see `text`. 0 is no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    windows: Annotated[int, Field(ge=0)] = 0  # of one text, at most
    train_texts: Annotated[int, Field(ge=0)] = 0  # of one domain, at most
    test_texts: Annotated[int, Field(ge=0)] = 0


class Card(sources.Source):
    """A data set as its card describes it.

    Images: shape (channels, height, width); mean, std of x/255, per channel. Text: shape (words before the next,);
    classes is the size of the vocabulary, which is made from the training texts.
    """

    title: str
    licence: str
    note: str = ""
    format: Literal["digits", "idx", "cifar", "svhn", "images", "glosses", "posts"]
    shape: tuple[Annotated[int, Field(ge=1)], ...]
    classes: Annotated[int, Field(ge=2)]
    class_names: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[Annotated[float, Field(gt=0)], ...] = ()
    train: int = 0  # rows; 0: as many as there are, for files that a user brings
    test: int = 0
    default_net: str
    augment: Augment = Augment()
    domains: tuple[str, ...] = ()  # names of parts of the data set between which its rows are told apart
    reading: Reading = Reading()
    arrays: sources.Checksum = ""  # of the loaded arrays, where it is known: "sha256:" + Arrays.checksum()
    label_key: str = "labels"  # cifar: which of its labels
    first_label: int = 0  # idx: the label that becomes class 0
    transposed: bool = False  # idx: images are stored column by column

    @property
    def tokens(self) -> bool:
        """Whether rows are windows of words, not images."""
        return self.format in ("glosses", "posts")

    @model_validator(mode="after")
    def _lengths_agree(self) -> Card:
        if len(self.shape) != (1 if self.tokens else 3):
            raise ValueError(f"shape has {len(self.shape)} numbers: images have 3, text has 1")
        if self.tokens:
            return self._text_agrees()
        if self.domains or self.reading != Reading():
            raise ValueError("domains and reading are for text")
        if min(self.train, self.test) < 1:
            raise ValueError("train and test must say how many rows there are")
        if len(self.class_names) != self.classes:
            raise ValueError(f"classes = {self.classes}, but class_names has {len(self.class_names)} names")
        if not len(self.mean) == len(self.std) == self.shape[0]:
            raise ValueError(f"mean and std need one value for each of the {self.shape[0]} channels")
        return self

    def _text_agrees(self) -> Card:
        if self.mean or self.std or self.class_names or self.augment != Augment():
            raise ValueError("text has no mean, std, class_names or augment")
        if not self.domains or len(set(self.domains)) < len(self.domains):
            raise ValueError("text needs the names of its domains, each once")
        if self.format == "glosses":
            text.check_domains(self.domains)
        return self


@dataclass(frozen=True, eq=False)
class Arrays:
    """Images uint8 [n, C, H, W] or tokens [n, T], labels int64 [n], C-contiguous. Normalising is left to the device.

    domains: int64 [n] numbers of the rows' domains, in the order of the card; None where a data set has none.
    """

    x_train: Inputs
    y_train: Labels
    x_test: Inputs
    y_test: Labels
    domains_train: Labels | None = None
    domains_test: Labels | None = None

    def empty(self) -> Arrays:
        """The same arrays without rows."""
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        cut: dict[str, Any] = {name: part if part is None else part[:0] for name, part in parts.items()}
        return Arrays(**cut)

    def checksum(self) -> str:
        """sha256 (hex) over the type, shape and bytes of the arrays there are: the provenance of every trial."""
        digest = hashlib.sha256()
        for array in (getattr(self, field.name) for field in fields(self)):
            if array is None:
                continue
            digest.update(f"{array.dtype.name}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def card(name: str | Path) -> Card:
    """The card of a data set: a shipped name, or a path to a .toml file. Refused when unknown or not valid."""
    raw = {"name": Path(name).stem, **cards.read("datasets", name)}
    try:
        return Card.model_validate_json(json.dumps(raw, default=str))  # JSON: strict types, and lists become tuples
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise Refused(f"data set card {name}{f', key {key}' if key else ''}: {first['msg']}") from None


def load(card: Card, folder: Path | None = None, download: bool = True) -> Arrays:
    """The arrays of a data set; their files are found as `sources.locate` says, in `folder` first.

    Refused: data that is missing and cannot be downloaded, incomplete, or other than the card says.
    """
    if card.format == "digits":
        arrays = _digits(card.shape[1])
    else:
        found = sources.locate(card, folder, download)
        arrays = _readers(card)(card, found)
    _check(card, arrays)
    return arrays


def _readers(card: Card) -> Callable[[Card, Path], Arrays]:
    if card.tokens:
        return _read_texts
    return _read_images if card.format == "images" else _read_batches


def _digits(side: int) -> Arrays:
    """scikit-learn's 8x8 digits, grey levels 0..16 as 0..255. Each fifth row of a class, in file order, is test.

    side: of the images, in pixels. Larger ones have each pixel several times, as far as it goes, and a black margin.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = np.round(bunch.images * (255 / 16)).astype(np.uint8).repeat(side // 8, 1).repeat(side // 8, 2)
    margin = (side % 8 // 2, side % 8 - side % 8 // 2)
    x = np.pad(x, ((0, 0), margin, margin))[:, None]
    y = bunch.target.astype(np.int64)
    test = np.zeros(len(y), dtype=bool)
    for c in range(10):
        test[np.flatnonzero(y == c)[4::5]] = True
    return Arrays(x[~test], y[~test], x[test], y[test])


def _read_batches(card: Card, found: Path) -> Arrays:
    """Data sets of a few files, each with many rows: IDX, CIFAR, SVHN."""
    x: dict[bool, list[Bytes]] = {False: [], True: []}
    y: dict[bool, list[Labels]] = {False: [], True: []}
    for key, _, data in sorted(sources.entries(card, found)):  # an archive has its own order
        test = _is_test(key)
        if card.format == "idx":
            values = formats.idx(data, key)
            if values.ndim == 1:
                y[test].append(values.astype(np.int64) - card.first_label)
            else:
                x[test].append(values.swapaxes(-1, -2)[:, None] if card.transposed else values[:, None])
        else:
            read = formats.svhn(data, key) if card.format == "svhn" else formats.cifar(data, card.label_key, key)
            x[test].append(read[0])
            y[test].append(read[1])
    for what, parts in (("images", x), ("labels", y)):
        if not (parts[False] and parts[True]):
            raise Refused(
                f"{card.name}: {found} holds no {what} of its {'test' if parts[False] else 'training'} part"
            )
    x_train, x_test = (np.ascontiguousarray(np.concatenate(x[test])) for test in (False, True))
    return Arrays(x_train, np.concatenate(y[False]), x_test, np.concatenate(y[True]))


def _read_images(card: Card, found: Path) -> Arrays:
    """Data sets of one file per image: CLASS/[images/]FILE, or images/FILE with the classes in an annotation file."""
    rows: dict[bool, list[tuple[str, str]]] = {False: [], True: []}  # (path, class or "")
    x = {test: np.empty((count, *card.shape), np.uint8) for test, count in ((False, card.train), (True, card.test))}
    annotated: dict[str, str] = {}
    for key, below, data in sources.entries(card, found):
        test, path = _is_test(key), Path(below)
        if path.name == sources.ANNOTATIONS:
            lines = data.decode("utf-8", errors="replace").splitlines()
            annotated |= {fields[0]: fields[1] for line in lines if len(fields := line.split("\t")) > 1}
            continue
        if len(rows[test]) < len(x[test]):  # any more are counted, and refused with the count
            x[test][len(rows[test])] = formats.image(data, card.shape, f"{key}{below}")
        rows[test].append((below, "" if path.parts[0] == "images" else path.parts[0]))

    def side(test: bool) -> tuple[Bytes, Labels]:
        _count(card, test, len(rows[test]), len(x[test]))
        order = sorted(range(len(rows[test])), key=rows[test].__getitem__)  # an archive has its own order
        return x.pop(test)[order], _numbered(card, [rows[test][i] for i in order], annotated)

    return Arrays(*side(False), *side(True))


def _numbered(card: Card, rows: list[tuple[str, str]], annotated: dict[str, str]) -> Labels:
    labels = [name or annotated.get(Path(path).name, "(not annotated)") for path, name in rows]
    number = {name: i for i, name in enumerate(card.class_names)}
    if strange := sorted(set(labels) - set(number)):
        raise Refused(f"{card.name}: images of class {', '.join(strange[:3])}, which its card does not list")
    return np.array([number[label] for label in labels], dtype=np.int64)


def _read_texts(card: Card, found: Path) -> Arrays:
    """Data sets of texts, as windows of words."""
    read = text.glosses if card.format == "glosses" else text.posts
    ordered = sorted(sources.entries(card, found))
    how = card.reading
    texts = text.sample(
        (one for key, _, data in ordered for one in read(data, key, card.domains)), how.train_texts, how.test_texts
    )
    tokens = text.vocabulary(texts, card.classes)
    train, test = (
        text.windows([t for t in texts if t.test == side], tokens, card.shape[0], how.windows, card.classes)
        for side in (False, True)
    )
    return Arrays(train.x, train.y, test.x, test.y, train.domain, test.domain)


def _is_test(key: str) -> bool:
    return "test" in key or key.startswith("t10k") or key.endswith("val/")


def _count(card: Card, test: bool, found: int, expected: int) -> None:
    if card.tokens and not expected:  # the user's own file
        return
    if found != expected:
        part = "test" if test else "training"
        raise Refused(f"{card.name}: {found} {part} rows were found, its card says {expected}")


def _check(card: Card, arrays: Arrays) -> None:
    """What the card promises: counts, shapes, what has to occur on both sides and, where known, a checksum."""
    sides = (
        (arrays.x_train, arrays.y_train, arrays.domains_train, card.train),
        (arrays.x_test, arrays.y_test, arrays.domains_test, card.test),
    )
    for test, (x, y, domains, expected) in enumerate(sides):
        part = f"{card.name}, {'test' if test else 'training'} part"
        _count(card, bool(test), len(y), expected)
        if domains is None:
            _all_there(part, "class", card.class_names, y)
        else:
            _all_there(part, "domain", card.domains, domains)
        if x.shape != (len(y), *card.shape):
            raise Refused(f"{part}: rows of shape {x.shape}, its card says {(len(y), *card.shape)}")
    if card.arrays and card.arrays != (found := f"sha256:{arrays.checksum()}"):
        raise Refused(f"{card.name}: the arrays have the wrong checksum: expected {card.arrays}, found {found}")


def _all_there(part: str, what: str, names: tuple[str, ...], numbers: Labels) -> None:
    """Refused unless the numbers are those of all the names. (Of a vocabulary not every word is in a test part.)"""
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(names):
        raise Refused(f"{part}: labels from {numbers.min()} to {numbers.max()}, its card says 0 to {len(names) - 1}")
    if absent := [names[i] for i in np.flatnonzero(np.bincount(numbers, minlength=len(names)) == 0)]:
        raise Refused(f"{part}: no row of {what} {', '.join(absent[:3])!r}")
