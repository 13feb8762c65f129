"""Text as windows: readers of made files in the published formats, the vocabulary, what is cut and refused."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import data, text
from harness.refusal import Refused
from harness.text import START, UNKNOWN, WORDS, Text

DEBIAN = Path("/usr/share/wordnet")
LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by  \n"


def line(file: int, kind: str, gloss: str, offset: int = 1740) -> str:
    """A line of a WordNet data file with one word and one pointer."""
    return f"{offset:08} {file:02} {kind} 01 entity 0 001 ~ 00001930 n 0000 | {gloss}  \n"


def made(words: str, domain: int = 0, test: bool = False) -> Text:
    return Text(tuple(words.split()), domain, test)


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    """Glosses in the published format: 60 of nouns, 40 of verbs."""
    nouns = [line(4 + i % 3, "n", f'the act of thing {i}; "it\'s a self-made one"', i) for i in range(60)]
    verbs = [line(29 + i % 2, "v", f"cause to move {i} away from; be", i) for i in range(40)]
    (tmp_path / "data.noun").write_text(LICENCE + "".join(nouns))
    (tmp_path / "data.verb").write_text(LICENCE + "".join(verbs))
    return tmp_path


def card_in(folder: Path, files: list[str], **more: Any) -> data.Card:
    """A card for made text, with checksums of the files as they are."""
    sums = {name: "sha256:" + hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
    values = {
        "title": "made",
        "source": "the test",
        "licence": "none",
        "format": "glosses",
        "shape": [4],
        "classes": 40,
        "domains": ["noun", "verb"],
        "default_net": "gru-small",
        "files": sums,
        **more,
    }
    path = folder / "made.toml"
    path.write_text("\n".join(f"{key} = {toml(value)}" for key, value in values.items()))
    return data.card(str(path))


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


def loaded(folder: Path, **more: Any) -> data.Arrays:
    return data.load(card_in(folder, ["data.noun", "data.verb"], **more), folder)


# ---- words and windows


def test_words_are_runs_of_letters_with_what_joins_them() -> None:
    said = 'an entity; "It\'s a self-made man - the 2nd of 3", he said (rock-)'
    assert " ".join(text.split_words(said)) == "an entity it's a self-made man the 2nd of 3 he said rock"


def test_the_vocabulary_is_by_training_frequency_and_then_alphabetical() -> None:
    """b 3, a and c 2, d 1; z is frequent in a test text only. Five tokens have room for three words."""
    texts = [made("b a c b"), made("c d b a"), made("z z z z z", test=True)]
    assert text.vocabulary(texts, 5) == {"b": 2, "a": 3, "c": 4}
    assert text.vocabulary(texts, 100) == {"b": 2, "a": 3, "c": 4, "d": 5}


def test_windows_by_hand() -> None:
    """Tokens a 2, b 3, c 4; x is unknown (0) and not predicted; 1 stands before a text, whatever came earlier."""
    found = text.windows([made("a b x c", 1), made("c", 0)], {"a": 2, "b": 3, "c": 4}, context=2, most=0, size=5)
    assert found.x.tolist() == [[1, 1], [1, 2], [3, 0], [1, 1]]
    assert found.y.tolist() == [2, 3, 4, 4]
    assert found.domain.tolist() == [1, 1, 1, 0]
    assert (found.x.dtype, found.y.dtype, found.domain.dtype) == (np.int16, np.int64, np.int64)


def test_tokens_take_the_smaller_integer_that_holds_the_vocabulary() -> None:
    kinds = [text.windows([made("a")], {"a": 2}, 2, 0, size).x.dtype for size in (2**15 - 1, 2**15)]
    assert kinds == [np.int16, np.int32]


def test_a_cap_takes_windows_evenly() -> None:
    """Two of six: the middles of both halves, places (1 * 6) // 4 = 1 and (3 * 6) // 4 = 4."""
    tokens = {word: 2 + i for i, word in enumerate("abcdef")}
    found = text.windows([made("a b c d e f")], tokens, context=1, most=2, size=9)
    assert found.y.tolist() == [tokens["b"], tokens["e"]]
    assert found.x.tolist() == [[tokens["a"]], [tokens["d"]]]


words = st.lists(st.sampled_from("abcdefgh"), max_size=12).map(" ".join)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(words, st.integers(0, 2)), max_size=8), st.integers(1, 5), st.integers(0, 4))
def test_every_window_is_a_place_in_its_text(texts: list[tuple[str, int]], context: int, most: int) -> None:
    """Against a slow loop: which words stand before a place; and every text gives its number of windows."""
    tokens = text.vocabulary([made("a a a b b c")], 5)
    found = text.windows([made(said, domain) for said, domain in texts], tokens, context, most, 5)
    assert len(found.x) == len(found.y) == len(found.domain)
    at = 0
    for said, domain in texts:
        ids = [tokens.get(word, UNKNOWN) for word in said.split()]
        places = [i for i, token in enumerate(ids) if token != UNKNOWN]
        all_there = [[*([START] * context + ids[:i])[-context:], ids[i]] for i in places]
        count = min(most or len(places), len(places))
        mine = [[*found.x[j].tolist(), int(found.y[j])] for j in range(at, at + count)]
        assert not Counter(map(tuple, mine)) - Counter(map(tuple, all_there))
        assert most or mine == all_there
        assert set(found.domain[at : at + count]) <= {domain}
        at += count
    assert at == len(found.y)


def test_a_sample_is_of_each_domain_and_side_and_does_not_depend_on_the_order() -> None:
    texts = [made(f"w{i}", i % 2, i % 5 == 0) for i in range(100)]
    kept = text.sample(texts, train=10, test=3)
    assert Counter((t.domain, t.test) for t in kept) == {(0, False): 10, (1, False): 10, (0, True): 3, (1, True): 3}
    assert kept == [t for t in texts if t in kept]
    assert set(text.sample(texts[::-1], 10, 3)) == set(kept)
    assert text.sample(texts, 0, 0) == texts


# ---- WordNet


def test_glosses_are_of_the_first_domain_that_fits() -> None:
    lines = [line(5, "n", "a dog"), line(3, "n", "an entity"), line(29, "v", "to breathe"), line(0, "a", "hot")]
    content = (LICENCE + "".join(lines)).encode()
    found = text.glosses(content, "data", ("noun.animal", "noun", "verb.body"))
    assert [(" ".join(t.words), t.domain) for t in found] == [("a dog", 0), ("an entity", 1), ("to breathe", 2)]


def test_all_45_lexicographer_files_have_their_number() -> None:
    """As lexnames(5WN) numbers them."""
    numbers = {"adj.all": 0, "adv.all": 2, "noun.Tops": 3, "noun.person": 18, "noun.time": 28, "verb.body": 29}
    numbers |= {"verb.weather": 43, "adj.ppl": 44}
    assert len(text.LEXICOGRAPHER_FILES) == 45
    assert {name: text.LEXICOGRAPHER_FILES.index(name) for name in numbers} == numbers


def test_one_gloss_in_ten_is_for_testing_and_equal_ones_are_on_one_side() -> None:
    glosses = [f"thing number {i % 1000}" for i in range(2000)]
    content = "".join(line(4, "n", said, i) for i, said in enumerate(glosses)).encode()
    found = list(text.glosses(content, "data", ("noun",)))
    sides = {t.words: t.test for t in found}
    assert all(sides[t.words] == t.test for t in found)
    assert 70 < sum(sides.values()) < 130  # 100 of 1000, deviation 9.5


def test_a_wordnet_is_loaded_with_its_domains(wordnet: Path) -> None:
    arrays = loaded(wordnet)
    assert arrays.x_train.shape[1:] == (4,)
    assert arrays.domains_train is not None and arrays.domains_test is not None
    assert set(arrays.domains_train) == set(arrays.domains_test) == {0, 1}
    assert min(arrays.y_train.min(), arrays.y_test.min()) >= WORDS
    assert max(arrays.y_train.max(), arrays.y_test.max(), arrays.x_train.max(), arrays.x_test.max()) < 40
    again = loaded(wordnet)
    assert again.checksum() == arrays.checksum()
    moved = data.Arrays(arrays.x_train, arrays.y_train, arrays.x_test, arrays.y_test, None, arrays.domains_test)
    assert moved.checksum() != arrays.checksum()
    assert [len(part) for part in (arrays.empty().x_train, arrays.empty().domains_test)] == [0, 0]


def test_the_cards_limits_are_kept(wordnet: Path) -> None:
    """Windows: 2 for each of 10 training and 2 test glosses of either domain; every gloss has more known words."""
    arrays = loaded(wordnet, reading={"windows": 2, "train_texts": 10, "test_texts": 2}, classes=30)
    assert np.bincount(arrays.domains_train).tolist() == [20, 20]
    assert np.bincount(arrays.domains_test).tolist() == [4, 4]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"shape": [1, 4, 4]}, "text has 1"),
        ({"domains": ["nouns"]}, "Did you mean 'noun'"),
        ({"domains": []}, "names of its domains"),
        ({"domains": ["noun", "noun"]}, "each once"),
        ({"mean": [0.5]}, "text has no mean"),
        ({"reading": {"windows": -1}}, "greater than or equal to 0"),
        ({"format": "digits", "shape": [1, 8, 8]}, "for text"),
    ],
)
def test_cards_that_contradict_themselves_are_refused(wordnet: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said):
        card_in(wordnet, ["data.noun"], **more)


def test_what_is_no_wordnet_is_refused(wordnet: Path) -> None:
    for bad in ("entity | that which is\n", line(45, "n", "a thing"), "00001740 03 n 01 entity 0 001\n"):
        with pytest.raises(Refused, match="line 2: not a line of a WordNet data file"):
            list(text.glosses((LICENCE + bad).encode(), "data.noun", ("noun",)))
    card = card_in(wordnet, ["data.noun", "data.verb"], train=1, test=1)
    with pytest.raises(Refused, match="training rows were found, its card says 1"):
        data.load(card, wordnet)
    (wordnet / "data.noun").write_text(line(4, "n", "another thing"))
    with pytest.raises(Refused, match="wrong checksum"):
        data.load(card, wordnet)


def test_a_domain_without_rows_is_refused(wordnet: Path) -> None:
    with pytest.raises(Refused, match=r"no row of domain 'noun\.time'"):
        loaded(wordnet, domains=["noun", "verb", "noun.time"])


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's wordnet-base is not installed")
def test_the_real_glosses() -> None:
    """Counts and checksum are the card's; half of what English predicts is of, the, a and their like."""
    arrays = data.load(data.card("wordnet"), download=False)
    assert arrays.x_train.shape == (80_832, 8)
    assert arrays.x_train.dtype == np.int16
    assert np.bincount(arrays.domains_train).tolist() == [44_182, 36_650]
    assert np.bincount(arrays.y_test)[:WORDS].tolist() == [0, 0]
    assert 0.01 < (arrays.x_train == UNKNOWN).mean() < 0.06


# ---- Stack Overflow, as a user brings it


def parquet(folder: Path, **columns: Any) -> bytes:
    kept = {name: column for name, column in columns.items() if column is not None}
    pd.DataFrame(kept).to_parquet(folder / "stackoverflow.parquet")
    return (folder / "stackoverflow.parquet").read_bytes()


SPLIT = ["train", "test", "train", "test", "heldout", "train"]
DOMAIN = ["question", "question", "answer", "answer", "answer", "comment"]
SAID = ["How do I sort?", "How to sort", "You can sort", "You sort", "you", "me too"]


@pytest.mark.parametrize(
    "column",
    [
        {"text": SAID},
        {"tokens": [" ".join(text.split_words(said)) for said in SAID]},
        {"tokens": [list(text.split_words(said)) for said in SAID], "text": [""] * 6},
    ],
)
def test_posts_are_read_from_text_or_tokens(tmp_path: Path, column: dict[str, Any]) -> None:
    """Other splits and domains are left out; tokens go before text."""
    content = parquet(tmp_path, **column, domain=DOMAIN, split=SPLIT)
    assert list(text.posts(content, "made", ("question", "answer"))) == [
        made("how do i sort", 0, False),
        made("how to sort", 0, True),
        made("you can sort", 1, False),
        made("you sort", 1, True),
    ]


def test_the_stackoverflow_card_reads_a_users_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its vocabulary is how, do, i, sort, you, can; "to" of a test post is not in it. No counts are promised."""
    monkeypatch.delenv("FEDSTILL_DATA", raising=False)
    parquet(tmp_path, text=SAID, domain=DOMAIN, split=SPLIT)
    arrays = data.load(data.card("stackoverflow"), tmp_path)
    assert arrays.x_train.shape == (4 + 3, 20)
    assert np.bincount(arrays.domains_test).tolist() == [2, 2]
    assert arrays.y_train.max() == WORDS + 5
    assert arrays.y_train.tolist()[3] == arrays.y_train.tolist()[6] == WORDS  # sort is the most frequent word


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"text": None}, "has no column tokens or text; it has domain, split"),
        ({"split": None}, "has no column split"),
        ({"text": [1, 2, 3, 4, 5, 6]}, "column text must hold plain text, not 1"),
        ({"tokens": [[1]] * 6}, "column tokens must hold words"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, columns: dict[str, Any], said: str) -> None:
    content = parquet(tmp_path, **{"text": SAID, "domain": DOMAIN, "split": SPLIT, **columns})
    with pytest.raises(Refused, match=said):
        list(text.posts(content, "made", ("question", "answer")))


def test_a_damaged_parquet_is_refused() -> None:
    for content in (b"", b"PAR1", io.BytesIO(b"no such thing" * 40).getvalue()):
        with pytest.raises(Refused, match="cannot be read as a Parquet file"):
            list(text.posts(content, "made", ("question", "answer")))
