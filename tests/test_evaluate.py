"""Counts and metrics against confusion matrices worked out by hand and against scikit-learn."""

from __future__ import annotations

import math
from functools import reduce
from operator import add

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness import nets, trees
from harness.evaluate import Counts, count, count_logits, metrics, own_label_metrics, recall_of, tail_classes


def sure(guesses: list[int], classes: int, margin: float = 50.0) -> Tensor:
    """Logits that are certain of these guesses: confidence 1."""
    return margin * torch.nn.functional.one_hot(torch.tensor(guesses), classes).float()


def tail(classes: int, *members: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    return np.isin(np.arange(classes), members)


def test_every_metric_by_hand() -> None:
    """Rows are true classes, columns guesses:

        0: 3 1 0    recall 3/4, precision 3/5
        1: 2 2 0    recall 1/2, precision 2/3
        2: 0 0 2    recall 1,   precision 1

    accuracy 7/10; balanced (.75 + .5 + 1) / 3 = .75; F1 2 * 3 / (4 + 5) = 2/3, 2 * 2 / (4 + 3) = 4/7, 1: macro
    (2/3 + 4/7 + 1) / 3 = 47/63. All guesses have confidence 1, in the last bin: ECE = |7 - 10| / 10 = .3. A wrong one
    costs 50 nats, a right one none: loss 3 * 50 / 10 = 15.
    """
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
    found = metrics(count_logits(sure([0, 0, 0, 1, 0, 0, 1, 1, 2, 2], 3), labels), tail(3, 1, 2))
    assert found.pop("recall") == [0.75, 0.5, 1.0]
    assert found == pytest.approx(
        {
            "accuracy": 0.7,
            "balanced_accuracy": 0.75,
            "macro_f1": 47 / 63,
            "worst_recall": 0.5,
            "tail_recall": 0.75,
            "loss": 15.0,
            "ece": 0.3,
        }
    )


def test_calibration_by_hand() -> None:
    """Two classes with 15 bins of 1/15 between .5 and 1: confidences .9 (right), .9 (wrong) and .6 (right).

    .9 lies in bin 13: |1 hit - 1.8| = .8; .6 in bin 9: |1 - .6| = .4; ECE (.8 + .4) / 3 = .4.
    """
    chosen = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]]).log()
    counts = count_logits(chosen, torch.tensor([0, 1, 1]))
    assert counts.bin_rows.nonzero()[0].tolist() == [9, 13]
    assert counts.bin_rows[[9, 13]].tolist() == [1, 2]
    assert metrics(counts, tail(2, 1))["ece"] == pytest.approx(0.4, abs=1e-6)


@given(st.integers(2, 8), st.integers(1, 60), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_metrics_agree_with_scikit_learn(classes: int, rows: int, seed: int) -> None:
    """Also where classes have no rows, or are never guessed."""
    from sklearn.metrics import f1_score, log_loss, recall_score

    rng = trees.stream("evaluate", seed)
    logits = 2 * torch.randn(rows, classes, generator=rng)
    y = torch.randint(max(1, classes - seed % 3), (rows,), generator=rng)  # at times the last classes are missing
    logits += 2 * torch.nn.functional.one_hot(y, classes)
    found, guess, there = metrics(count_logits(logits, y), tail(classes, 0)), logits.argmax(1), y.unique()
    assert found["accuracy"] == pytest.approx(float((guess == y).double().mean()))
    assert found["balanced_accuracy"] == pytest.approx(recall_score(y, guess, labels=there, average="macro"))
    assert found["macro_f1"] == pytest.approx(f1_score(y, guess, labels=there, average="macro", zero_division=0))
    assert found["loss"] == pytest.approx(
        log_loss(y, logits.double().softmax(1), labels=range(classes)), rel=1e-5, abs=1e-6
    )
    assert found["worst_recall"] == pytest.approx(min(r for r in found["recall"] if not math.isnan(r)))
    assert [c for c, r in enumerate(found["recall"]) if not math.isnan(r)] == there.tolist()


@given(st.integers(1, 80), st.lists(st.integers(1, 30), max_size=6), st.randoms())
@settings(max_examples=40, deadline=None)
def test_shards_add_up_exactly(rows: int, cuts: list[int], shuffled: object) -> None:
    """Scored in pieces of any size and added in any order: the same counts, bit for bit; the loss to rounding."""
    rng = trees.stream("shards", rows)
    logits, y = 3 * torch.randn(rows, 5, generator=rng), torch.randint(5, (rows,), generator=rng)
    whole = count_logits(logits, y)
    ends = sorted({min(c, rows) for c in np.cumsum(cuts).tolist()} | {rows})
    parts = [count_logits(logits[start:end], y[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    shuffled.shuffle(parts)  # type: ignore[attr-defined]
    summed = reduce(add, parts)
    for name in ("rows", "hits", "predicted", "bin_rows", "bin_hits", "bin_confidence"):
        assert np.array_equal(getattr(summed, name), getattr(whole, name)), name
    assert summed.loss == pytest.approx(whole.loss, rel=1e-12)


def test_a_net_is_scored_in_evaluation_mode() -> None:
    """BatchNorm uses its running statistics and keeps them: the counts of a shard are those of its rows alone."""
    net = nets.build("fedgen-cnn-bn", (1, 8, 8), 4)
    p = net.init(trees.stream("score"))
    before = trees.clone(p)
    x, y = torch.randn(12, 1, 8, 8, generator=trees.stream("x")), torch.arange(12) % 4
    whole = count(net, p, x, y)
    parts = [count(net, p, x[i : i + 1], y[i : i + 1]) for i in range(12)]
    assert np.array_equal(sum(c.hits for c in parts), whole.hits)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(trees.leaves(p), trees.leaves(before), strict=True))


def test_classes_without_test_rows_stay_out_of_the_means() -> None:
    """Class 2 has no rows. Recalls 1 and 0 (the row of class 1 was taken for 2); F1 1 and 0; no tail recall."""
    found = metrics(count_logits(sure([0, 2], 3), torch.tensor([0, 1])), tail(3, 2))
    assert found["balanced_accuracy"] == 0.5
    assert found["macro_f1"] == 0.5
    assert found["worst_recall"] == 0.0
    assert found["tail_recall"] is None
    assert math.isnan(found["recall"][2])


def test_own_labels_by_hand() -> None:
    """Recall (.9, .5, unknown). Mixes: (1, 0, 0) sees .9; (.5, .5, 0) sees .7; (0, .25, .75) only knows class 1: .5;
    (0, 0, 1) has nothing to be measured on. Mean .7, worst tenth of three = the worst one, .5; sd sqrt(.08 / 3).
    """
    mixes = np.array([[1, 0, 0], [0.5, 0.5, 0], [0, 0.25, 0.75], [0, 0, 1]])
    found = own_label_metrics(np.array([0.9, 0.5, np.nan]), mixes)
    assert found == pytest.approx(
        {"own_label_accuracy": 0.7, "own_label_worst_decile": 0.5, "own_label_std": math.sqrt(0.08 / 3)}
    )


def test_the_worst_decile_is_a_tenth_of_the_clients() -> None:
    """20 clients whose own accuracies are 0, .05, ..., .95: the worst two have 0 and .05."""
    share = np.arange(20) / 20
    found = own_label_metrics(np.array([1.0, 0.0]), np.stack([share, 1 - share], 1))
    assert found["own_label_worst_decile"] == pytest.approx(0.025)
    assert found["own_label_accuracy"] == pytest.approx(0.475)


@pytest.mark.parametrize(
    ("rows", "share", "expected"),
    [
        ([5, 1, 3, 2, 4], 0.4, [1, 3]),
        ([5, 1, 3, 2, 4], 0.01, [1]),
        ([2, 2, 2, 2], 0.5, [0, 1]),
        ([1, 2, 3], 1.0, [0, 1, 2]),
    ],
)
def test_the_tail_is_the_classes_with_the_fewest_rows(rows: list[int], share: float, expected: list[int]) -> None:
    assert tail_classes(np.array(rows, float), share).nonzero()[0].tolist() == expected


def test_counts_are_plain_numbers() -> None:
    """They are sent between machines: numpy and floats, no tensors."""
    counts = count_logits(sure([0, 1], 2), torch.tensor([0, 0]))
    assert isinstance(counts, Counts)
    assert isinstance(counts.loss, float)
    assert all(isinstance(getattr(counts, f), np.ndarray | float) for f in counts.__dataclass_fields__)


def test_a_vocabulary_keeps_no_list_of_recalls_but_all_else() -> None:
    """1001 classes, three rows: 5 right with all confidence, 7 taken for 5 with all confidence, 9 right at 1/2.

    accuracy 2/3. Half against half: 9 and 4 have log 1/2 each, the others nothing: loss (0 + 50 + ln 2) / 3. ECE: the
    last bin has |1 - 2| = 1, the one of 1/2 has |1 - 1/2|: 1.5 / 3. Recalls 1, 0, 1; F1 2/3, 0, 1 of these.
    """
    logits = sure([5, 5, 9], 1001)
    logits[2, 4] = 50 - 1e-5  # a hair below, so that the guess is 9
    counts = count_logits(logits, torch.tensor([5, 7, 9]))
    found = metrics(counts, tail(1001, 7, 9))
    assert found.pop("recall") is None
    assert found == pytest.approx(
        {
            "accuracy": 2 / 3,
            "balanced_accuracy": 2 / 3,
            "macro_f1": (2 / 3 + 0 + 1) / 3,
            "worst_recall": 0.0,
            "tail_recall": 0.5,
            "loss": (50 + math.log(2)) / 3,
            "ece": 0.5,
        },
        abs=1e-5,
    )
    assert np.flatnonzero(~np.isnan(recall_of(counts))).tolist() == [5, 7, 9]
    assert metrics(count_logits(logits[:, :1000], torch.tensor([5, 7, 9])), tail(1000, 7))["recall"] is not None


def test_clients_without_any_label_of_a_domain_have_no_own_label_accuracy() -> None:
    """Labels 0 and 1 are theirs; only label 2 has test rows."""
    assert own_label_metrics(np.array([math.nan, math.nan, 0.5]), np.array([[1.0, 0, 0], [0.5, 0.5, 0]])) == {}
