"""Where a data set's files are: found in folders, else downloaded, and always checked before they are read."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from harness import formats
from harness.refusal import Refused

Checksum = Annotated[str, Field(pattern=r"^(md5:[0-9a-f]{32}|sha256:[0-9a-f]{64})?$")]
Names = tuple[str, ...]
IMAGES = (".png", ".jpg", ".jpeg")
ANNOTATIONS = "val_annotations.txt"  # Tiny-ImageNet keeps the labels of its validation images in one file
DOWNLOAD_TIMEOUT_S = 30.0


class Source(BaseModel):
    """The files of a data set, as its card lists them.

    A key of `files` is a file, or a folder of images if it ends in "/". Checksums are of the unpacked content: a
    file packed anew is recognised. An empty one says that none is published: then the card's counts must do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: str
    source: str  # the data set's home page
    folder: str = ""  # where the files lie below a data folder; default: the card's name
    places: Annotated[Names, Field(min_length=1)] = ("",)  # sub-folders into which other tools put the same files
    system: Names = ()  # folders of operating-system packages
    files: dict[str, Checksum] = {}
    archives: dict[str, Checksum] = {}  # tar or zip that holds all of `files` -> its checksum
    download: dict[str, Annotated[Names, Field(min_length=1)]] = {}  # file to fetch -> its addresses, tried in order

    @model_validator(mode="after")
    def _downloads_are_listed(self) -> Source:
        for name in self.download:
            if name not in self.archives and name.removesuffix(".gz") not in self.files:
                raise ValueError(f"download lists {name!r}, which is neither in archives nor in files")
        return self


def locate(source: Source, folder: Path | None, download: bool) -> Path:
    """The folder or the archive that holds the files, downloaded if need be and allowed.

    Looked for below `folder`, $FEDSTILL_DATA, operating-system packages and ./data, in this order: in NAME/ there and
    in the folder itself. Refused when a named folder does not exist or holds a part of the files, or none is found.
    """
    found = _find(source, folder)
    if found is None and download and source.download:
        _download(source, folder)
        found = _find(source, folder)
    if found is None:
        raise Refused(_missing(source, folder))
    return found


def to_download(source: Source, folder: Path | None) -> bool:
    """Whether the files are not there, and `locate` would download them."""
    return bool(source.files and source.download) and _find(source, folder) is None


def entries(source: Source, found: Path) -> Iterator[tuple[str, str, bytes]]:
    """Every file that the card needs, checked: (its key in `files`, its path below that key, its unpacked bytes)."""
    if found.is_dir():
        yield from _folder_entries(source, found)
        return
    _verify(str(found), source.archives[found.name], found)
    for name, data in formats.members(found, lambda name: _key(source, name) is not None):
        if key := _key(source, name):
            _verify(f"{found.name}: {name}", source.files[key], data)
            yield key, f"/{name}".partition(f"/{key}")[2], data


def _folder_entries(source: Source, found: Path) -> Iterator[tuple[str, str, bytes]]:
    for key, checksum in source.files.items():
        place = _present(found, key)
        if place is None:
            raise Refused(f"{source.name}: {key} has gone from {found}")
        if place.is_dir():
            for path in sorted(place.rglob("*")):
                if _is_image(path.name):
                    yield key, path.relative_to(place).as_posix(), formats.content(path)
        else:
            data = formats.content(place)
            _verify(str(place), checksum, data)
            yield key, "", data


def _key(source: Source, name: str) -> str | None:
    """The key of `files` that an archive's member belongs to."""
    for key in source.files:
        if key.endswith("/"):
            if f"/{key}" in f"/{name}" and _is_image(PurePosixPath(name).name):
                return key
        elif f"/{name}".removesuffix(".gz").endswith(f"/{key}"):
            return key
    return None


def _is_image(name: str) -> bool:
    return not name.startswith(".") and (name.lower().endswith(IMAGES) or name == ANNOTATIONS)


def _roots(folder: Path | None) -> list[Path]:
    """Data folders in the order of the search; a download goes to the first. A folder that was named must exist."""
    variable = os.environ.get("FEDSTILL_DATA")
    named = {"the data folder": folder, "FEDSTILL_DATA": Path(variable) if variable else None}
    for what, path in named.items():
        if path is not None and not path.is_dir():
            raise Refused(f"{what} is set to {str(path)!r}, which is not a folder")
    return [path for path in named.values() if path is not None] + [Path("data").absolute()]


def _candidates(source: Source, folder: Path | None) -> list[Path]:
    roots: list[Path] = _roots(folder)
    below = source.folder or source.name
    given = [base for root in roots[:-1] for base in (root / below, root)]
    bases = [*given, *map(Path, source.system), roots[-1] / below, roots[-1]]
    return [base / place for base in bases for place in source.places]


def _find(source: Source, folder: Path | None) -> Path | None:
    for place in _candidates(source, folder):
        absent = [name for name in source.files if _present(place, name) is None]
        if not absent:
            return place
        archive = next((place / name for name in source.archives if (place / name).is_file()), None)
        if archive is not None:
            return archive
        if len(absent) < len(source.files):
            raise Refused(f"{source.name} in {place} is incomplete: {', '.join(absent)} missing")
    return None


def _present(place: Path, name: str) -> Path | None:
    if name.endswith("/"):
        return place / name if (place / name).is_dir() else None
    return next((path for path in (place / name, place / f"{name}.gz") if path.is_file()), None)


def _missing(source: Source, folder: Path | None) -> str:
    packed = f"{', '.join(source.archives)} (packed), or " if source.archives else ""
    gz = "" if any(name.endswith("/") for name in source.files) else " (as they are or as .gz)"
    target = _roots(folder)[0] / (source.folder or source.name)
    looked = ", ".join(dict.fromkeys(map(str, _candidates(source, folder))))
    return (
        f"data set {source.name} was not found. Put {packed}{', '.join(source.files)}{gz} from {source.source} into "
        f"{target}, or set FEDSTILL_DATA to the folder that holds them. Looked in: {looked}."
    )


def _download(source: Source, folder: Path | None) -> None:
    """Fetch the card's files: checked under temporary names, then moved into place together."""
    target = _roots(folder)[0] / (source.folder or source.name)
    parts = {name: target / f".{name}.{os.getpid()}.part" for name in source.download}
    made = [path for path in (target, target.parent) if not path.exists()]
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, part in parts.items():
            _fetch(source.download[name], part)
            if name in source.archives:
                _verify(name, source.archives[name], part)
            else:
                data = formats.content(part, packed=name.endswith(".gz"))
                _verify(name, source.files[name.removesuffix(".gz")], data)
        for name, part in parts.items():
            part.replace(target / name)
    except (OSError, RuntimeError) as error:
        raise Refused(f"downloading {source.name} failed ({error}). {_missing(source, folder)}") from None
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
        for path in made:
            with suppress(OSError):  # not empty: the download worked
                path.rmdir()


def _fetch(addresses: Names, part: Path) -> None:
    """Download with a progress bar from the first address that answers."""
    try:
        from torchvision.datasets.utils import download_url
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(f"torchvision cannot be imported, it has to match the installed torch: {error}") from None
    problems = []
    for address in addresses:
        try:
            with _time_out():
                download_url(address, part.parent, part.name)
                return
        except (OSError, RuntimeError, HTTPException) as error:
            problems.append(f"{address}: {error}")
    raise RuntimeError("; ".join(problems))


@contextmanager
def _time_out() -> Iterator[None]:
    """torchvision downloads without one: a network that swallows packets would hang it for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _verify(name: str, expected: str, data: bytes | Path) -> None:
    """Refused unless the bytes (of the file) have the checksum. An empty checksum passes: see Source."""
    algorithm, _, digest = expected.partition(":")
    if not digest:
        return
    running = hashlib.new(algorithm, usedforsecurity=False)
    if isinstance(data, Path):
        with data.open("rb") as file:
            while chunk := file.read(2**20):
                running.update(chunk)
    else:
        running.update(data)
    if running.hexdigest() != digest:
        found = f"{algorithm}:{running.hexdigest()}"
        raise Refused(f"{name} has the wrong checksum: expected {expected}, found {found}; fetch the file again")
