"""Readers of the file formats in which image data sets are published: bytes in, arrays out.

Archives are never unpacked onto the disk: their members are read into memory one by one, so that a name such as
`../x`, a link or a device in an archive has nowhere to go. All the same they are refused, and so is what would unpack
to more than the limits below: an archive that holds such things is not the data set.
"""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from harness.refusal import Refused

Bytes = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Shape = tuple[int, ...]

MEMBER_BYTES = 2**30  # the largest file that any card needs is SVHN's train_32x32.mat, 182 MB
ARCHIVE_BYTES = 2**33  # CINIC-10 unpacks to about 0.9 GB, EMNIST's gzip.zip holds 0.6 GB

_DAMAGE = (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile, RuntimeError)


def content(path: Path, packed: bool | None = None) -> bytes:
    """The bytes of a file, gunzipped if packed (default: its name says so). Refused if unreadable or too large."""
    try:
        with path.open("rb") as file:
            gz = path.suffix == ".gz" if packed is None else packed
            return _gunzip(file, path.name) if gz else _bounded(file, path.name)
    except _DAMAGE as error:
        raise Refused(f"{path} cannot be read: {error}") from None


def _gunzip(packed: IO[bytes], name: str) -> bytes:
    """The bytes inside a gzip stream, at most MEMBER_BYTES: a few packed kB can hold gigabytes."""
    with gzip.GzipFile(fileobj=packed) as file:
        return _bounded(file, name)


def members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """The regular files of a tar (any compression) or zip of a wanted name: (name, bytes), in the archive's order.

    A member called *.gz is gunzipped and keeps its name. Refused: names that are absolute or hold "..", links,
    devices, more than ARCHIVE_BYTES in all or MEMBER_BYTES in one member, and damaged archives.
    """
    walk = _zip_members if path.name.endswith(".zip") else _tar_members
    try:
        for name, file in walk(path, wanted):
            yield name, _gunzip(file, name) if name.endswith(".gz") else _bounded(file, name)
    except _DAMAGE as error:
        raise Refused(f"archive {path} cannot be read: {error}") from None


def _tar_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, IO[bytes]]]:
    total = 0
    with tarfile.open(path) as archive:
        for member in archive:
            total += member.size
            _safe(path, member.name, total, special=not (member.isfile() or member.isdir()))
            file = archive.extractfile(member) if member.isfile() and wanted(member.name) else None
            if file is not None:
                yield member.name, file


def _zip_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, IO[bytes]]]:
    total = 0
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            total += member.file_size
            kind = member.external_attr >> 16 & 0o170000  # Unix file type, 0 when the writer left it out
            _safe(path, member.filename, total, special=kind not in (0, 0o100000, 0o040000))
            if not member.is_dir() and wanted(member.filename):
                with archive.open(member) as file:
                    yield member.filename, file


def _safe(path: Path, name: str, total: int, special: bool) -> None:
    parts = PurePosixPath(name.replace("\\", "/"))
    if special:
        raise Refused(f"archive {path} holds {name!r}, a link or a device: only plain files are allowed")
    if parts.is_absolute() or ".." in parts.parts:
        raise Refused(f"archive {path} holds {name!r}, which points out of the archive")
    if total > ARCHIVE_BYTES:
        raise Refused(f"archive {path} unpacks to more than {ARCHIVE_BYTES:,} bytes at {name!r}")


def _bounded(file: IO[bytes] | gzip.GzipFile, name: str) -> bytes:
    data = file.read(MEMBER_BYTES + 1)
    if len(data) > MEMBER_BYTES:
        raise Refused(f"{name} unpacks to more than {MEMBER_BYTES:,} bytes")
    return data


def idx(data: bytes, name: str) -> Bytes:
    """An IDX file of unsigned bytes (MNIST and its kin): 0, 0, type 8, rank, big-endian sizes, the values."""
    rank = data[3] if len(data) > 3 else 0
    start = 4 + 4 * rank
    if data[:3] != b"\x00\x00\x08" or not 1 <= rank <= 4 or len(data) < start:
        raise Refused(f"{name} is not an IDX file of unsigned bytes (it starts with {data[:4].hex() or 'nothing'})")
    shape = np.frombuffer(data, dtype=">u4", count=rank, offset=4).astype(np.int64)
    expected = start + int(np.prod(shape.astype(object)))  # Python integers: sizes in a header may overflow
    if len(data) != expected:
        raise Refused(f"{name} has {len(data)} bytes, its header promises {expected}: the file is cut or damaged")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)


class _PlainUnpickler(pickle.Unpickler):
    """Builds dicts, lists, strings, numbers and numpy arrays; any other name in the pickle is refused, not called."""

    _ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("_codecs", "encode"),  # how Python 3 writes bytes into an old-style pickle
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise Refused(f"the pickle asks for {module}.{name}: only plain values and numpy arrays are allowed")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def cifar(data: bytes, labels: str, name: str) -> tuple[Bytes, Labels]:
    """A batch of CIFAR's Python version, a pickled dict: images [n, 3, 32, 32] and the labels under the given key."""
    try:
        batch = _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
        x, y = np.asarray(batch["data"]), np.asarray(batch[labels])
    except Refused as refused:
        raise Refused(f"{name}: {refused}") from None
    except Exception as error:  # a pickle can fail in any way; all of them mean the same
        raise Refused(f"{name} is no CIFAR batch with {labels!r}: {type(error).__name__} {error}") from None
    if x.dtype != np.uint8 or x.ndim != 2 or x.shape[1] != 3072 or y.shape != x.shape[:1] or y.dtype.kind not in "iu":
        raise Refused(f"{name}: expected bytes [n, 3072] and n labels, found {x.dtype} {x.shape} and {y.shape}")
    return x.reshape(-1, 3, 32, 32), y.astype(np.int64)


def svhn(data: bytes, name: str) -> tuple[Bytes, Labels]:
    """SVHN's cropped digits, a MATLAB 5 file: X [32, 32, 3, n] to [n, 3, 32, 32]. The digit 0 is labelled 10."""
    from scipy.io import loadmat

    try:
        found = loadmat(io.BytesIO(data), variable_names=["X", "y"])  # type: ignore[arg-type]
        x, y = found["X"], found["y"].reshape(-1)
    except Exception as error:  # scipy's reader raises many types for a damaged file
        raise Refused(f"{name} is no MATLAB file with X and y: {type(error).__name__} {error}") from None
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1:] != y.shape or y.dtype.kind not in "iu":
        raise Refused(f"{name}: expected bytes X [32, 32, 3, n] and n labels y, found {x.dtype} {x.shape}, {y.shape}")
    return np.ascontiguousarray(x.transpose(3, 2, 0, 1)), y.astype(np.int64) % 10


def image(data: bytes, shape: Shape, name: str) -> Bytes:
    """A PNG or JPEG as [C, H, W]; grey images of a colour set fill every channel. Refused at another size.

    JPEG is decoded by Pillow's libjpeg: other builds of it may differ in single grey levels.
    """
    from PIL import Image, UnidentifiedImageError

    channels, height, width = shape
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as picture:
            if picture.size != (width, height):  # known from the header, before anything is decoded
                found = "x".join(map(str, picture.size))
                raise Refused(f"{name} is {found} pixels, the card says {width}x{height}")
            pixels = np.asarray(picture.convert("RGB" if channels == 3 else "L"))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise Refused(f"{name} is no readable PNG or JPEG: {error}") from None
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)
