"""Partitions: exact cover for every rule, the rules' own promises, realised statistics, refusals, feature shift;
domains, levels, what is held out, and the server's rows.
"""

import hashlib
import math
import struct
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import deals
from harness.config import Fleet, Holdout, Partition, Proxy, Trial
from harness.partitions import Split, assign_levels, describe, divide, halves, shift, split
from harness.refusal import Refused

KINDS = sorted(deals._RULES)


def labels_of(*rows: int, seed: int = 0) -> np.ndarray:
    """Labels with rows[c] rows of class c, in random order."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(rows)), rows))


def make(labels: np.ndarray, clients: int, seed: int = 0, **how: object) -> Split:
    return split(labels, int(labels.max()) + 1, clients, Partition(**how), seed)


def assert_exact(labels: np.ndarray, classes: int, clients: int, found: Split) -> None:
    assert len(found.clients) == clients
    assert np.array_equal(np.sort(np.concatenate([*found.clients, found.left])), np.arange(len(labels)))
    for rows, counts in zip(found.clients, found.counts, strict=True):
        assert rows.dtype == np.int64
        assert np.all(np.diff(rows) > 0)
        assert np.array_equal(np.bincount(labels[rows], minlength=classes), counts)


settings_of_any_kind = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(KINDS),
        "alpha": st.floats(0.05, 100.0),
        "size_alpha": st.floats(0.05, 100.0),
        "min_samples": st.integers(0, 4),
        "shards_per_client": st.integers(1, 4),
        "classes_per_client": st.integers(1, 4),
        "group": st.integers(1, 5),
        "fraction": st.floats(0.3, 1.0),
        "long_tail": st.floats(1.0, 8.0),
    }
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.integers(0, 60), min_size=2, max_size=6),
    clients=st.integers(1, 9),
    how=settings_of_any_kind,
    seed=st.integers(0, 2**32),
)
def test_every_row_goes_to_one_place_or_the_deal_is_refused(
    rows: list[int], clients: int, how: dict[str, object], seed: int
) -> None:
    labels, partition = labels_of(*rows), Partition(**how)
    try:
        found = split(labels, len(rows), clients, partition, seed)
    except Refused as refused:
        assert "\n" not in str(refused)
        return
    assert_exact(labels, len(rows), clients, found)
    assert min(map(len, found.clients)) >= max(1, partition.min_samples)
    assert split(labels, len(rows), clients, partition, seed).digest == found.digest


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), clients=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_an_easy_deal_is_never_refused_and_leaves_nothing(kind: str, clients: int, seed: int) -> None:
    labels = labels_of(200, 200, 200, 200)
    found = make(labels, clients, seed, kind=kind, alpha=5.0, size_alpha=5.0, classes_per_client=4)
    assert_exact(labels, 4, clients, found)
    assert len(found.left) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides(kind: str) -> None:
    labels = labels_of(200, 200, 200, 200)
    before = np.random.get_state()[1].copy()
    digests = {make(labels, 5, seed, kind=kind, alpha=5.0, size_alpha=5.0).digest for seed in range(4)}
    assert len(digests) == 4
    assert np.array_equal(before, np.random.get_state()[1])


def test_iid_sizes_differ_by_at_most_one() -> None:
    sizes = make(labels_of(50, 53), 10, kind="iid", min_samples=1).counts.sum(axis=1)
    assert sorted(sizes) == [10] * 7 + [11] * 3


def test_dirichlet_with_a_huge_alpha_is_an_equal_division_of_every_class() -> None:
    """q -> (1/N, ..., 1/N), cut at the cumulative shares of 100 rows: 25 each, one more or less by rounding."""
    counts = make(labels_of(100, 100, 100), 4, kind="dirichlet", alpha=1e6).counts
    assert np.abs(counts - 25).max() <= 1


def test_dirichlet_shares_have_the_spread_of_the_distribution() -> None:
    """One share of Dir(alpha 1_N) has mean 1/N and variance (N-1)/(N^2 (N alpha + 1)): .25 and .0375 at alpha 1, N 4.

    Over 400 classes x 4 clients the mean is exact; the variance's standard error is about 5 %, so 20 % is wide.
    """
    shares = make(np.repeat(np.arange(400), 1000), 4, kind="dirichlet", alpha=1.0).counts / 1000
    assert shares.mean() == pytest.approx(0.25)
    assert shares.var() == pytest.approx(0.0375, rel=0.2)


@pytest.mark.parametrize(("kind", "holds"), [("dirichlet-capped", True), ("dirichlet", False)])
def test_the_cap_keeps_full_clients_from_getting_more(kind: str, holds: bool) -> None:
    """As in MOON and KDIA, who has n/N rows when a class is divided gets none of it. The plain rule has no cap."""
    labels = labels_of(*[100] * 10)
    ok = []
    for seed in range(5):
        counts = make(labels, 10, seed, kind=kind, alpha=0.3, min_samples=1).counts
        before = np.cumsum(counts, axis=1) - counts
        ok.append(bool(np.all(before[counts > 0] < 100)))
    assert all(ok) == holds


def test_groups_share_fairly_and_hold_half_the_mean_at_least() -> None:
    """23 clients in groups of 10: 10, 10 and 3. A group's rows are proportional to its clients: 920 * 10/23 = 400."""
    sizes = make(labels_of(230, 230, 230, 230), 23, kind="dirichlet-grouped", alpha=0.5).counts.sum(axis=1)
    assert [sizes[:10].sum(), sizes[10:20].sum(), sizes[20:].sum()] == [400, 400, 120]
    assert sizes.min() >= 20


def test_dirichlet_client_gives_equal_sizes_and_its_own_mix_to_each() -> None:
    labels = labels_of(*[300] * 4)
    skewed = make(labels, 12, kind="dirichlet-client", alpha=0.05)
    even = make(labels, 12, kind="dirichlet-client", alpha=1000.0)
    assert set(skewed.counts.sum(axis=1)) == {100}
    assert (skewed.counts / 100).max(axis=1).mean() > 0.75
    assert (even.counts / 100).max() < 0.4


def test_quantity_skews_sizes_and_nothing_else() -> None:
    labels = labels_of(5000, 5000)
    found = make(labels, 10, kind="quantity", size_alpha=0.3, min_samples=50)
    assert found.statistics["size_cv"] > 0.7
    assert found.statistics["smallest"] >= 50
    big = found.counts[found.counts.sum(axis=1) > 500]
    assert np.abs(big[:, 0] / big.sum(axis=1) - 0.5).max() < 0.1
    both = make(labels, 10, kind="quantity-dirichlet", size_alpha=0.3, alpha=0.1, min_samples=50)
    assert np.array_equal(np.sort(both.counts.sum(axis=1)), np.sort(found.counts.sum(axis=1)))
    assert both.statistics["js"] > 5 * found.statistics["js"]


def test_quantity_reaches_its_minimum_with_many_clients() -> None:
    """Redrawn until the minimum holds, as NIID-Bench does it, 100 clients at 0.5 would be drawn for ever."""
    sizes = make(labels_of(3000, 3000), 100, kind="quantity", size_alpha=0.5).counts.sum(axis=1)
    assert sizes.min() >= 10
    assert sizes.max() > 200


def test_shards_are_mcmahans() -> None:
    """6,000 rows of 10 classes, 100 clients x 2 shards of 30: every client has 60 rows of at most 2 classes."""
    found = make(labels_of(*[600] * 10), 100, kind="shards", shards_per_client=2)
    assert set(found.counts.sum(axis=1)) == {60}
    assert set(np.unique(found.counts)) == {0, 30, 60}


@settings(max_examples=40, deadline=None)
@given(clients=st.integers(1, 25), k=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_pathological_clients_hold_exactly_k_classes(clients: int, k: int, seed: int) -> None:
    """Numbers of holders differ by at most one; with N k < 6 classes without a holder, and only they, are left."""
    labels = labels_of(*[200] * 6)
    found = make(labels, clients, seed, kind="pathological", classes_per_client=k, size_alpha=2.0, min_samples=1)
    assert set((found.counts > 0).sum(axis=1)) == {k}
    holders = (found.counts > 0).sum(axis=0)
    assert holders.max() - holders.min() <= 1
    assert len(found.left) == 200 * (holders == 0).sum()


def test_pathological_sizes_differ() -> None:
    assert make(labels_of(*[200] * 6), 12, kind="pathological", min_samples=1).statistics["size_cv"] > 0.3


def test_long_tail_counts() -> None:
    """n_c = n_max * IF^(-c/(C-1)): IF 100, 3 classes of 1,000: 1000, 100, 10. IF 4: 1000, 500, 250."""
    labels = labels_of(1000, 1000, 1000)
    assert list(make(labels, 1, kind="iid", long_tail=100.0).counts[0]) == [1000, 100, 10]
    found = make(labels, 3, kind="iid", long_tail=4.0)
    assert list(found.counts.sum(axis=0)) == [1000, 500, 250]
    assert len(found.left) == 3000 - 1750


def test_long_tail_of_unequal_classes_keeps_its_ratio() -> None:
    """Classes of 800, 300, 900 at IF 4: the second allows n_max = 300 / 4^(-1/2) = 600, so 600, 300, 150."""
    assert list(make(labels_of(800, 300, 900), 1, kind="iid", long_tail=4.0).counts[0]) == [600, 300, 150]


def test_fraction_takes_the_same_share_of_every_class() -> None:
    """0.29 of 100 and 200 rows: 29 and 58, though 0.29 * 100 is 28.999999999999996 to a computer."""
    found = make(labels_of(100, 200), 2, kind="iid", fraction=0.29)
    assert list(found.counts.sum(axis=0)) == [29, 58]
    assert len(found.left) == 300 - 87


def test_statistics_of_two_clients_with_one_class_each() -> None:
    """Local mixes (1,0) and (0,1), global (1/2,1/2), middle (3/4,1/4):

    KL(local || middle) = ln(4/3) = .287682; KL(global || middle) = ln(4/3)/2 = .143841; half the sum .215762.
    """
    found = describe(np.array([[2, 0], [0, 2]]))
    assert found["js"] == pytest.approx((math.log(4 / 3) + 0.5 * math.log(4 / 3)) / 2)
    assert found["js"] == pytest.approx(0.215762, abs=1e-6)
    assert (found["classes"], found["size_cv"], found["smallest"], found["largest"]) == (1.0, 0.0, 2.0, 2.0)


def test_statistics_of_unequal_sizes() -> None:
    """Sizes 2 and 6: mean 4, deviation 2, so .5; both have the global mix, so js = 0."""
    found = describe(np.array([[1, 1], [3, 3]]))
    assert (found["js"], found["classes"], found["size_cv"]) == (0.0, 2.0, 0.5)


def test_smaller_alpha_is_more_skewed() -> None:
    labels = labels_of(*[300] * 10)
    js = [make(labels, 10, kind="dirichlet", alpha=a, min_samples=1).statistics["js"] for a in (0.1, 1.0, 10.0)]
    assert js[0] > js[1] > js[2]


def test_digest_is_over_the_sorted_rows_of_each_client() -> None:
    found = make(labels_of(20, 20), 3, kind="iid", min_samples=1)
    expected = hashlib.sha256()
    for rows in found.clients:
        expected.update(struct.pack(f"<q{len(rows)}q", len(rows), *rows))
    assert found.digest == expected.hexdigest()


@pytest.mark.parametrize(
    ("clients", "how", "said"),
    [
        (0, {"kind": "iid"}, "clients = 0"),
        (41, {"kind": "iid", "min_samples": 0}, "41 clients with at least 1 rows"),
        (5, {"kind": "iid", "min_samples": 9}, "lower clients or partition.min_samples"),
        (19, {"kind": "dirichlet", "alpha": 0.05, "min_samples": 2}, "raise partition.alpha"),
        (
            19,
            {"kind": "pathological", "classes_per_client": 1, "size_alpha": 0.05, "min_samples": 2},
            "raise partition.size_alpha",
        ),
        (4, {"kind": "shards", "shards_per_client": 11, "min_samples": 1}, "partition.shards_per_client = 11"),
        (13, {"kind": "shards", "shards_per_client": 2, "min_samples": 3}, "min_samples is 3"),
        (2, {"kind": "pathological", "classes_per_client": 3, "min_samples": 1}, "classes_per_client = 3"),
        (30, {"kind": "pathological", "classes_per_client": 2, "min_samples": 1}, "lower clients"),
        (2, {"kind": "iid", "long_tail": 50.0, "min_samples": 1}, "partition.long_tail = 50"),
    ],
)
def test_what_cannot_be_dealt_is_refused(clients: int, how: dict[str, object], said: str) -> None:
    with pytest.raises(Refused, match=said.replace(".", r"\.")):
        make(labels_of(20, 20), clients, **how)


def test_redraws_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = []
    real = deals._divide
    monkeypatch.setattr(deals, "_divide", lambda *given: draws.append(1) or real(*given))
    with pytest.raises(Refused, match="in 1000 draws"):
        make(labels_of(20, 20), 19, kind="dirichlet", alpha=0.05, min_samples=2)
    assert len(draws) == 1000


def test_labels_out_of_range_are_refused() -> None:
    with pytest.raises(Refused, match="expected 0 to 1"):
        split(np.array([0, 1, 2]), 2, 1, Partition(kind="iid", min_samples=1), 0)


def test_shift_levels_are_evenly_spaced_in_a_seeded_order() -> None:
    """5 clients, level 30. Rotation: midpoints of 5 parts of (-30, 30). Noise: 30 i / 5."""
    turned = shift(Partition(shift="rotation", shift_level=30.0), 5, seed=3)
    assert np.allclose(np.sort(turned), [-24, -12, 0, 12, 24])
    noisy = shift(Partition(shift="noise", shift_level=0.5), 5, seed=3)
    assert np.allclose(np.sort(noisy), [0.1, 0.2, 0.3, 0.4, 0.5])
    assert np.array_equal(shift(Partition(), 5, seed=3), np.zeros(5))
    orders = {tuple(shift(Partition(shift="noise", shift_level=1.0), 5, seed=s)) for s in (3, 3, 4, 5)}
    assert len(orders) == 3


# ---- a trial's deal: proxy, domains, what clients hold out, levels


def trial(clients: int = 6, seed: int = 0, **more: object) -> Trial:
    """Rows dealt at random to these clients, unless told otherwise."""
    usual = {"partition": Partition(kind="iid", min_samples=1)}
    return Trial(method="fedavg", clients=clients, seed=seed, **{**usual, **more})


shares = st.floats(0, 0.49)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.integers(4, 40), min_size=2, max_size=5),
    clients=st.integers(2, 6),
    domains=st.sampled_from(["none", "card", "halves"]),
    proxy=st.tuples(st.integers(0, 5), st.booleans()),
    holdout=st.tuples(shares, shares),
    seed=st.integers(0, 2**32),
)
def test_a_trials_rows_are_in_one_place_each(
    rows: list[int], clients: int, domains: str, proxy: tuple[int, bool], holdout: tuple[float, float], seed: int
) -> None:
    """Clients' rows, validation, test, proxy and what is left cover the training rows exactly; domains never mix."""
    labels, classes = labels_of(*rows), len(rows)
    own_domain = np.arange(len(labels)) % 2
    how = trial(
        clients,
        seed,
        partition=Partition(kind="dirichlet", alpha=50.0, min_samples=1, domains=domains, fraction=0.8),
        holdout=Holdout(test=holdout[0], validation=holdout[1]),
        proxy=Proxy(source="train", rows=proxy[0], balanced=proxy[1]) if proxy[0] else Proxy(),
    )
    try:
        found = divide(labels, classes, how, own_domain)
    except Refused as refused:
        assert "\n" not in str(refused)
        return
    parts = [*found.clients, *found.validation, *found.test, found.proxy, found.left]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    assert len(found.proxy) == proxy[0]
    side = {"none": np.zeros(len(labels), int), "card": own_domain, "halves": labels >= classes // 2}[domains]
    held = zip(found.clients, found.validation, found.test, found.counts, strict=True)
    for train, validation, test, counts in held:
        total = len(train) + len(validation) + len(test)
        assert len(train) >= 1
        assert len(test) == min(round(holdout[0] * total), total - 1)
        assert len(validation) <= round(holdout[1] * total)
        assert np.array_equal(np.bincount(labels[train], minlength=classes), counts)
        assert len(np.unique(side[np.concatenate([train, validation, test])])) == 1
    again = divide(labels, classes, how, own_domain)
    assert (again.digest, again.levels) == (found.digest, found.levels)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.integers(10, 90), min_size=2, max_size=4), clients=st.integers(2, 12))
def test_domains_get_clients_in_proportion_to_their_rows_and_one_at_least(rows: list[int], clients: int) -> None:
    """Within one client of the exact share, unless that share is below the one client that each domain must have."""
    domains = np.repeat(np.arange(len(rows)), rows)
    how = trial(clients, partition=Partition(kind="iid", min_samples=0, domains="card"))
    if clients < len(rows):
        with pytest.raises(Refused, match=f"less than the {len(rows)} domains"):
            divide(np.zeros(len(domains), int), 2, how, domains)
        return
    found = divide(np.zeros(len(domains), int), 2, how, domains)
    owner = [int(domains[mine[0]]) for mine in found.clients]
    assert owner == sorted(owner)
    for domain, n in enumerate(rows):
        exact = n / sum(rows) * clients
        assert owner.count(domain) >= 1
        assert abs(owner.count(domain) - exact) <= 1 or min(np.array(rows) / sum(rows) * clients) < 1


def test_domains_are_dealt_apart_by_hand() -> None:
    """9 rows of domain 0 and 3 of domain 1 over 4 clients: 3 of 3 rows each, and 1 of 3 rows."""
    domains = np.array([0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0])
    how = trial(4, partition=Partition(kind="iid", min_samples=1, domains="card"))
    found = divide(np.zeros(12, int), 2, how, domains)
    assert [sorted(set(domains[rows])) for rows in found.clients] == [[0], [0], [0], [1]]
    assert [len(rows) for rows in found.clients] == [3, 3, 3, 3]


def test_domains_that_a_data_set_does_not_have_are_refused() -> None:
    with pytest.raises(Refused, match="this data set has no domains"):
        divide(labels_of(20, 20), 2, trial(partition=Partition(kind="iid", domains="card")))


def test_halves_of_an_odd_number_of_classes() -> None:
    assert halves(np.arange(5), 5).tolist() == [0, 0, 1, 1, 1]


def test_a_balanced_proxy_has_as_many_rows_of_each_class_as_there_are() -> None:
    """11 rows of classes with 2, 30 and 30: the small one gives both, the others share 9 as 4 and 5 or 5 and 4."""
    labels = labels_of(2, 30, 30)
    found = divide(labels, 3, trial(2, proxy=Proxy(source="train", rows=11, balanced=True)))
    counts = np.bincount(labels[found.proxy], minlength=3)
    assert counts[0] == 2
    assert sorted(counts[1:]) == [4, 5]


def test_a_proxy_of_all_rows_is_refused() -> None:
    with pytest.raises(Refused, match="leaves nothing to train on"):
        divide(labels_of(5, 5), 2, trial(2, proxy=Proxy(source="train", rows=10)))


def test_what_is_held_out_names_another_partition() -> None:
    """A digest covers held-out and proxy rows; without them it is that of the plain split."""
    labels = labels_of(40, 40)
    plain = divide(labels, 2, trial())
    assert plain.digest == split(labels, 2, 6, Partition(kind="iid", min_samples=1), 0).digest
    others = [
        trial(holdout=Holdout(test=0.2)),
        trial(holdout=Holdout(test=0.4)),
        trial(holdout=Holdout(validation=0.2)),
        trial(proxy=Proxy(source="train", rows=5)),
        trial(proxy=Proxy(source="train", rows=6)),
    ]
    assert len({plain.digest, *(divide(labels, 2, how).digest for how in others)}) == 6


def test_pooled_rows_are_those_of_all_clients() -> None:
    found = divide(labels_of(20, 30), 2, trial(proxy=Proxy(source="train", rows=5)))
    (rows,) = found.pooled().clients
    assert np.array_equal(rows, np.setdiff1d(np.arange(50), found.proxy))
    assert np.array_equal(found.pooled().counts[0], found.counts.sum(0))
    assert found.pooled().levels == (0,)


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.lists(st.integers(0, 20), min_size=3, max_size=3), min_size=1, max_size=15),
    cuts=st.lists(st.integers(1, 8), min_size=2, max_size=4),
    by=st.sampled_from(["random", "size", "labels"]),
    seed=st.integers(0, 2**32),
)
def test_levels_are_cut_by_their_shares_in_the_order_asked_for(
    counts: list[list[int]], cuts: list[int], by: str, seed: int
) -> None:
    """Numbers of clients at or below a level are its cumulated share, rounded; keys rise with the level."""
    table, n = np.array(counts), len(counts)
    given_shares = tuple(c / sum(cuts) for c in cuts)
    fleet = Fleet(nets=tuple(f"net{i}" for i in range(len(cuts))), shares=given_shares, by=by)
    levels = np.array(assign_levels(table, np.zeros(n, int), fleet, seed))
    assert [int((levels <= i).sum()) for i in range(len(cuts))] == [
        round(float(end) * n) for end in np.cumsum(given_shares)[:-1]
    ] + [n]
    sizes = table.sum(1)
    mix = table / np.maximum(sizes, 1)[:, None]
    entropy = np.array([-sum(p * math.log(p) for p in row if p) for row in mix])
    key = {"size": sizes, "labels": entropy, "random": np.zeros(n)}[by]
    groups = [key[levels == level] for level in sorted(set(levels))]
    assert all(lower.max() <= upper.min() + 1e-12 for lower, upper in pairwise(groups))
    assert assign_levels(table, np.zeros(n, int), fleet, seed) == tuple(levels)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=3, max_size=20), st.integers(0, 99))
def test_with_a_level_for_each_domain_the_levels_are_the_domains(side: list[int], seed: int) -> None:
    """Else, and with shares, clients are cut by shares in the order of the domains."""
    counts, domains = np.ones((len(side), 2), int), np.array(side)
    found = np.array(assign_levels(counts, domains, Fleet(nets=("a", "b", "c"), by="domain"), seed))
    if len(set(side)) == 3:
        assert found.tolist() == side
    assert all(domains[found == level].max(initial=0) <= domains[found > level].min(initial=2) for level in range(3))
    halved = assign_levels(counts, domains, Fleet(nets=("a", "b", "c"), shares=(0.5, 0.25, 0.25), by="domain"), seed)
    assert halved.count(0) == round(0.5 * len(side))


def test_random_levels_follow_the_seed() -> None:
    fleet = Fleet(nets=("a", "b"))
    found = {assign_levels(np.ones((12, 2), int), np.zeros(12, int), fleet, seed) for seed in range(6)}
    assert len(found) > 3
    assert all(levels.count(1) == 6 for levels in found)


def test_without_a_fleet_all_are_of_one_level() -> None:
    assert assign_levels(np.ones((5, 2), int), np.zeros(5, int), Fleet(), 0) == (0,) * 5


def test_a_vocabulary_of_classes_is_dealt() -> None:
    """Ten thousand classes of two rows or so, some without any."""
    labels = np.random.default_rng(0).integers(10_000, size=20_000)
    found = split(labels, 10_000, 100, Partition(kind="iid"), 0)
    assert_exact(labels, 10_000, 100, found)
