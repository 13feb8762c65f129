from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.mixes import complementarity, entropy, js, mixes, neighbours, scores, similarity, teachers, uniformity

# Mixes of two to six classes for up to ten clients.
COUNTS = st.integers(2, 6).flatmap(
    lambda c: st.lists(st.lists(st.integers(0, 9), min_size=c, max_size=c), min_size=1, max_size=10)
)
EVEN3 = np.full((3, 4), 0.25)


def test_mixes_are_shares_and_a_client_without_rows_leans_to_no_class() -> None:
    assert mixes(np.array([[3, 1], [0, 0]])).tolist() == [[0.75, 0.25], [0.5, 0.5]]


def test_js_of_mixes_without_a_common_class_is_ln_2() -> None:
    assert js(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(np.log(2))
    assert entropy(np.full(4, 0.25)) == pytest.approx(np.log(4))


@given(COUNTS)
def test_all_three_parts_of_a_score_lie_between_0_and_1(counts: list[list[int]]) -> None:
    q = mixes(np.array(counts))
    for own in q:
        for part in (similarity(own, q), uniformity(q), complementarity(own, q)):
            assert (part >= -1e-12).all() and (part <= 1 + 1e-12).all()
        assert np.allclose(js(own, q), js(q, own))
    assert np.allclose(np.diag(scores(q, (1, 0, 0))), 1)


@given(COUNTS, st.data())
def test_pairs_keep_to_the_paths(counts: list[list[int]], data: st.DataObject) -> None:
    """One teacher at most for a student, `most` students at most for a teacher, levels l or l + 1, and no cycle."""
    q, n = mixes(np.array(counts)), len(counts)
    levels = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    students = data.draw(st.sets(st.integers(0, n - 1)))
    able = data.draw(st.sets(st.integers(0, n - 1)))
    most = data.draw(st.integers(1, 3))
    found = teachers(scores(q, (1, 1, 1)), q, levels, sorted(students), sorted(able), most)
    assert set(found) <= students and set(found.values()) <= able
    assert all(levels[t] - levels[s] in (0, 1) and s != t for s, t in found.items())
    assert all(list(found.values()).count(t) <= most for t in found.values())
    for s in found:
        path = [s]
        while path[-1] in found:
            path.append(found[path[-1]])
            assert len(path) <= n, "a cycle"


def test_the_best_pair_comes_first_and_a_full_teacher_takes_nobody_else() -> None:
    """Clients 0 and 1 want 2; with room for one, 1 gets it, whose score is higher; 0 takes the next larger number."""
    score = np.array([[0, 0.2, 0.7], [0, 0, 0.9], [0, 0, 0]])
    assert teachers(score, EVEN3, (0, 0, 0), (0, 1, 2), (0, 1, 2), most=1) == {1: 2, 0: 1}
    assert teachers(score, EVEN3, (0, 0, 0), (0, 1, 2), (0, 1, 2), most=2) == {1: 2, 0: 2}


def test_within_a_level_only_the_more_even_teach_and_levels_are_never_skipped() -> None:
    q = mixes(np.array([[1, 1], [3, 1], [1, 0]]))
    assert teachers(np.ones((3, 3)), q, (0, 0, 0), (0, 1, 2), (0, 1, 2), most=9) == {1: 0, 2: 0}
    assert teachers(np.ones((3, 3)), q, (0, 1, 2), (0, 1, 2), (0, 1, 2), most=9) == {0: 1, 1: 2}
    assert teachers(np.ones((3, 3)), q, (0, 2, 2), (0,), (1, 2), most=9) == {}


def test_groups_begin_with_the_first_and_grow_by_the_best() -> None:
    """0 takes 3 (.9), then 2 (.1 + .5 against .2 + .3 for 1); 1 and 4 are left."""
    score = np.zeros((5, 5))
    score[0, 3], score[0, 1], score[0, 2], score[3, 1], score[3, 2] = 0.9, 0.2, 0.1, 0.3, 0.5
    assert neighbours(score, 3) == {0: [3, 2], 3: [0, 2], 2: [0, 3], 1: [4], 4: [1]}


@given(st.integers(1, 12), st.integers(1, 5))
def test_everybody_is_in_one_group(n: int, size: int) -> None:
    found = neighbours(np.random.default_rng(n).random((n, n)), size)
    assert sorted(found) == list(range(n))
    for i, others in found.items():
        assert len(others) < size and i not in others
        assert all(sorted([*found[j], j]) == sorted([*others, i]) for j in others)
