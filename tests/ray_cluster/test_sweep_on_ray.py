"""Sweeps on a real local Ray cluster: started by placer, and one that was there before.

Run by `make test-ray`, in an environment of its own.
"""

from __future__ import annotations

import pytest

from placer.errors import PlacerError
from placer.planning import Settings, open_traces
from placer.sweep.grid import Grid
from placer.sweep.running import run_sweep
from placer.sweep.workers import in_this_process, on_ray

pytestmark = pytest.mark.ray
ray = pytest.importorskip("ray")

GRID = Grid(num_ranks=(2, 4), spare_slots=(0, 1), batch_tokens=(16, 64))
SETTINGS = Settings(num_ranks=2, max_imbalance=1.1, cap_is_default=True)


def figures(document):
    return [{**cell, "seconds": None} for cell in document["cells"]]


@pytest.fixture(scope="module")
def sources(trace_folder):
    return open_traces([trace_folder])


@pytest.fixture(scope="module")
def expected(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("here") / "sweep"
    return run_sweep(sources, SETTINGS, GRID, folder, in_this_process)


def test_a_cluster_that_placer_starts_makes_the_same_cells(sources, expected, tmp_path):
    told = []
    document = run_sweep(sources, SETTINGS, GRID, tmp_path / "sweep", on_ray("local"), told.append)
    assert document["made"] == 8
    assert figures(document) == figures(expected)
    assert told[-1] == "8 of 8 cells"
    assert not ray.is_initialized()


def test_ctrl_c_leaves_finished_cells_and_no_cluster(sources, expected, tmp_path):
    def interrupt(text):
        if text == "2 of 8 cells":
            raise KeyboardInterrupt

    folder = tmp_path / "sweep"
    document = run_sweep(sources, SETTINGS, GRID, folder, on_ray("local"), interrupt)
    assert document["interrupted"]
    assert document["made"] == 2
    assert not ray.is_initialized()
    again = run_sweep(sources, SETTINGS, GRID, folder, in_this_process)
    assert again["found"] == 2
    assert figures(again) == figures(expected)


def test_a_cluster_that_is_not_there_is_named(sources, tmp_path):
    with pytest.raises(PlacerError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        run_sweep(sources, SETTINGS, GRID, tmp_path / "sweep", on_ray("127.0.0.1:1"))


@pytest.fixture
def running_cluster():
    """A cluster of one node with two cores, as `ray start --head` makes it; its address."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    yield cluster.address
    cluster.shutdown()


def test_a_cluster_that_was_there_is_used_and_left_running(
    running_cluster, sources, expected, tmp_path
):
    for name in ("first", "second"):
        document = run_sweep(sources, SETTINGS, GRID, tmp_path / name, on_ray(running_cluster))
        assert figures(document) == figures(expected)
