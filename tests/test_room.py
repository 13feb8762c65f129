"""What has room is placed and what has not is refused, judged by trying every placement."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.config import Execution
from harness.refusal import Refused
from harness.room import at_once, bundles, check_room, listed

SHARES = (0.0, 0.25, 0.5, 1.0, 2.0)


def node(cpus: float, gpus: float = 0) -> dict[str, float]:
    return {"CPU": float(cpus), "GPU": float(gpus)}


def placed(how: Execution, nodes: list[dict[str, float]]) -> bool:
    """Tries every node for every bundle, and there every GPU for a share of one."""
    places = [(i, gpu) for i, one in enumerate(nodes) for gpu in range(max(1, int(one["GPU"])))]
    for chosen in product(places, repeat=how.hosts + 1):
        cpus = [one["CPU"] for one in nodes]
        gpus = [[1.0] * int(one["GPU"]) for one in nodes]
        for (at, gpu), bundle in zip(chosen, bundles(how), strict=True):
            cpus[at] -= bundle["CPU"]
            wanted = bundle.get("GPU", 0.0)
            free = [i for i, left in enumerate(gpus[at]) if left == 1.0]
            if wanted >= 1:
                if len(free) < wanted:
                    break
                for i in free[: int(wanted)]:
                    gpus[at][i] = 0.0
            elif wanted:
                if not gpus[at] or gpus[at][gpu] < wanted:
                    break
                gpus[at][gpu] -= wanted
        else:
            if min(cpus, default=0) >= 0:
                return True
    return False


EXECUTIONS = st.builds(
    Execution,
    hosts=st.integers(0, 3),
    cpus_per_host=st.sampled_from([0.5, 1.0, 2.0]),
    cpus_per_server=st.sampled_from([None, 0.0, 1.0]),
    gpus_per_host=st.sampled_from(SHARES),
    gpus_per_server=st.sampled_from(SHARES),
)
NODES = st.lists(st.builds(node, st.integers(0, 3), st.integers(0, 2)), max_size=3)


@settings(max_examples=400)
@given(EXECUTIONS, NODES)
def test_a_trial_is_refused_exactly_when_no_placement_exists(how: Execution, nodes: list[dict[str, float]]) -> None:
    """Whole GPUs may be given out in an order that a real scheduler would not find; shares never across two."""
    try:
        check_room(how, nodes)
    except Refused as refused:
        assert not placed(how, nodes), refused
    else:
        assert placed(how, nodes)


def test_what_no_single_node_has_is_refused_though_their_sum_would_do() -> None:
    with pytest.raises(Refused) as caught:
        check_room(Execution(hosts=2, cpus_per_host=3.0), [node(4), node(2)])
    assert "0 CPUs for its server and 3 CPUs for each of 2 hosts" in str(caught.value)
    assert "1 node with 4 CPUs, 1 node with 2 CPUs" in str(caught.value)
    check_room(Execution(hosts=2, cpus_per_host=2.0), [node(2), node(2)])


def test_the_sum_is_named_where_it_is_too_small() -> None:
    with pytest.raises(Refused, match=r"a trial needs 2 GPUs \(4 hosts and a server\), but there are 1"):
        check_room(Execution(hosts=4, gpus_per_host=0.5), [node(8, 1)])


@pytest.mark.parametrize(
    ("execution", "nodes", "most", "count"),
    [
        ({}, [node(4)], 99, 4),  # a core each
        ({}, [node(4), node(2)], 99, 6),
        ({}, [node(4)], 3, 3),  # no more trials than there are
        ({"parallel": 2}, [node(4)], 99, 2),
        ({"gpus_per_host": 0.25}, [node(16, 1)], 99, 4),  # four shares of the GPU
        ({"gpus_per_host": 0.25}, [node(3, 1)], 99, 3),  # but three cores
        ({"hosts": 2}, [node(5)], 99, 2),
        ({"hosts": 2, "cpus_per_server": 1.0}, [node(5), node(4)], 99, 3),
        ({"hosts": 4, "gpus_per_host": 0.5}, [node(16, 4)], 99, 2),
    ],
)
def test_trials_at_once(execution: dict[str, float], nodes: list[dict[str, float]], most: int, count: int) -> None:
    assert at_once(Execution.model_validate(execution), nodes, most) == count


def test_nodes_in_words() -> None:
    assert listed([node(4), node(8, 1), node(4)]) == "2 nodes with 4 CPUs, 1 node with 8 CPUs and 1 GPUs"
    assert listed([]) == "no nodes"
