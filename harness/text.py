"""Readers of text data sets: bytes in, rows for next-word prediction out.

A row is a window: the words before a place in a text, and the word that stands there. That keeps the task a
classification over the vocabulary. Words are numbered by their frequency in the training texts alone; a window whose
next word is not in the vocabulary is left out, as accuracy without unknown words is what the field reports (Reddi et
al. 2021).
"""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import numpy.typing as npt

from harness.refusal import Refused, unknown

Ints = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.signedinteger]

UNKNOWN, START = 0, 1  # tokens of a word out of the vocabulary, and of the places before the first word
WORDS = 2  # the most frequent word
TEST_SHARE = 10  # one text in so many is a test text, where a data set has no split of its own
_WORD = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*")

# The lexicographer files of WordNet by number: lexnames(5WN).
_NOUNS = (
    "Tops act animal artifact attribute body cognition communication event feeling food group location motive object "
    "person phenomenon plant possession process quantity relation shape state substance time"
)
_VERBS = (
    "body change cognition communication competition consumption contact creation emotion motion perception "
    "possession social stative weather"
)
LEXICOGRAPHER_FILES = (
    *("adj.all", "adj.pert", "adv.all"),
    *(f"noun.{name}" for name in _NOUNS.split()),
    *(f"verb.{name}" for name in _VERBS.split()),
    "adj.ppl",
)


@dataclass(frozen=True)
class Text:
    """A text in lower-case words; the number of its domain; whether it is a test text."""

    words: tuple[str, ...]
    domain: int
    test: bool

    def place(self) -> int:
        """A number in [0, 2^64) that depends on the words alone: a fixed random order of all texts there can be."""
        return int.from_bytes(hashlib.blake2b(" ".join(self.words).encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, eq=False)
class Windows:
    """Rows of one side: x [n, T] tokens, y [n] the next words' tokens, domain [n] numbers of domains."""

    x: Tokens
    y: Ints
    domain: Ints


def glosses(data: bytes, name: str, domains: Sequence[str]) -> Iterator[Text]:
    """The glosses of a WordNet data file, wndb(5WN), with their examples.

    domains: names of lexicographer files ("noun.animal") or parts of speech ("noun"); a gloss belongs to the first
    that fits and is left out if none does. One text in ten is for testing, which follows from its words alone: equal
    glosses are on one side.
    """
    member = [_domain_of(file, domains) for file in LEXICOGRAPHER_FILES]
    for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), 1):
        if line.startswith("  ") or not line:  # the licence, at the top
            continue
        head, bar, gloss = line.partition("| ")
        fields = head.split()
        if not bar or len(fields) < 2 or not fields[1].isdigit() or int(fields[1]) >= len(member):
            raise Refused(f"{name}, line {number}: not a line of a WordNet data file")
        domain = member[int(fields[1])]
        if domain is not None:
            text = Text(split_words(gloss), domain, False)
            yield replace(text, test=text.place() % TEST_SHARE == 0)


def posts(data: bytes, name: str, domains: Sequence[str]) -> Iterator[Text]:
    """The rows of a Parquet file with columns `text` or `tokens`, `domain` and `split`.

    tokens: words, as a list or between blanks; text is cut into words here. split: "train" or "test". Rows of other
    splits and of other domains are left out.
    """
    import pandas as pd

    try:
        table = pd.read_parquet(io.BytesIO(data))
    except (OSError, ValueError) as error:
        raise Refused(f"{name} cannot be read as a Parquet file: {str(error).splitlines()[0]}") from None
    column = next((c for c in ("tokens", "text") if c in table.columns), "tokens or text")
    if missing := [c for c in (column, "domain", "split") if c not in table.columns]:
        raise Refused(f"{name} has no column {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")
    number = {domain: i for i, domain in enumerate(domains)}
    kept = table[table["split"].isin(["train", "test"]) & table["domain"].isin(list(number))]
    for said, domain, split in zip(kept[column], kept["domain"], kept["split"], strict=True):
        yield Text(_words_of(said, column, name), number[domain], split == "test")


def split_words(text: str) -> tuple[str, ...]:
    """Lower-case runs of letters and digits; an apostrophe or hyphen inside a word is part of it."""
    return tuple(_WORD.findall(text.lower()))


def sample(texts: Iterable[Text], train: int, test: int) -> list[Text]:
    """At most `train` training and `test` test texts of each domain (0: all), in their order.

    Which ones follows from their words alone, not from their places in a file.
    """
    kept = list(texts)
    piles: dict[tuple[int, bool], list[int]] = {}
    for i, text in enumerate(kept):
        piles.setdefault((text.domain, text.test), []).append(i)
    chosen: list[int] = []
    for (_, is_test), pile in piles.items():
        most = (test if is_test else train) or len(pile)
        chosen += sorted(pile, key=lambda i: kept[i].place())[:most] if most < len(pile) else pile
    return [kept[i] for i in sorted(chosen)]


def vocabulary(texts: Iterable[Text], size: int) -> dict[str, int]:
    """Word -> token, for the `size` - 2 most frequent words of the training texts; equals in alphabetical order."""
    counts = Counter(chain.from_iterable(text.words for text in texts if not text.test))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return {word: WORDS + i for i, word in enumerate(ranked[: size - WORDS])}


def windows(texts: Iterable[Text], tokens: dict[str, int], context: int, most: int, size: int) -> Windows:
    """At most `most` windows a text (0: all), evenly spread over its known words, in the texts' order.

    context: T. Places before a text hold START. size: of the vocabulary, which decides the integer type of x.
    """
    stream: list[int] = []
    ends: list[int] = []  # where in the stream the next words stand
    domain: list[int] = []
    for text in texts:
        stream += [START] * context
        known = [len(stream) + i for i, word in enumerate(text.words) if word in tokens]
        stream += [tokens.get(word, UNKNOWN) for word in text.words]
        if most and len(known) > most:
            known = [known[(2 * j + 1) * len(known) // (2 * most)] for j in range(most)]
        ends += known
        domain += [text.domain] * len(known)
    kind = np.int16 if size <= np.iinfo(np.int16).max else np.int32
    flat, at = np.array(stream, kind), np.array(ends, np.int64)
    before = at[:, None] + np.arange(-context, 0)
    return Windows(flat[before], flat[at].astype(np.int64), np.array(domain, np.int64))


def _domain_of(file: str, domains: Sequence[str]) -> int | None:
    return next((i for i, name in enumerate(domains) if f"{file}.".startswith(f"{name}.")), None)


def check_domains(domains: Sequence[str]) -> None:
    """Refused unless every name is a lexicographer file or a part of speech."""
    known = {*LEXICOGRAPHER_FILES, *(file.partition(".")[0] for file in LEXICOGRAPHER_FILES)}
    for name in domains:
        if name not in known:
            raise unknown("domain", name, sorted(known))


def _words_of(said: object, column: str, name: str) -> tuple[str, ...]:
    if isinstance(said, str):
        return split_words(said) if column == "text" else tuple(said.split())
    words = tuple(said) if isinstance(said, list | tuple | np.ndarray) and column == "tokens" else (None,)
    if not all(isinstance(word, str) for word in words):
        wanted = "words" if column == "tokens" else "plain text"
        raise Refused(f"{name}: column {column} must hold {wanted}, not {said!r:.60}")
    return words
