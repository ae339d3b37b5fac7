"""Load records: kept exactly, refused where tokens are needed, solved for balance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.errors import BadFileError, UsageError
from placer.load_planning import balance_figures, plan_from_load, rank_load
from placer.placement import Placement, contiguous
from placer.planning import Settings
from placer.trace import open_trace
from placer.trace.load import inspect_load, is_load, make_load, read_load, write_load


def skewed(windows: int = 6) -> np.ndarray:
    """[windows, 3, 16] hot experts that stay hot."""
    rng = np.random.default_rng(5)
    return rng.poisson(np.tile(rng.gamma(0.7, 60, (1, 3, 16)), (windows, 1, 1)))


def test_a_load_record_comes_back_as_it_was(tmp_path):
    record = make_load(skewed(), layer_ids=[1, 2, 5], source={"importer": "x"}, where="test")
    write_load(record, tmp_path / "load.npz")
    again = read_load(tmp_path / "load.npz")
    np.testing.assert_array_equal(again.load, skewed())
    assert again.layer_ids.tolist() == [1, 2, 5]
    assert again.source == {"importer": "x"}
    assert again.fingerprint() == record.fingerprint()
    assert is_load(tmp_path / "load.npz")
    assert inspect_load(tmp_path / "load.npz")["pairs"] == int(skewed().sum())


def test_windows_without_load_are_left_out():
    load = skewed(3)
    load[1] = 0
    assert make_load(load, where="test").num_windows == 2


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (np.zeros((2, 3)), "no load at all"),
        (np.ones(4), "has shape"),
        (np.full((2, 3), -1), "-1, expected 0 or more"),
        (np.full((2, 3), 0.5), "no whole numbers"),
        (np.full((2, 3), np.nan), "no whole numbers"),
        (np.full((2, 3), 2**62), "more than can be added"),
        (np.array([["a"]]), "expected counts"),
    ],
)
def test_impossible_load_is_refused(load, message):
    with pytest.raises(BadFileError, match=message):
        make_load(load, where="file")


def test_a_damaged_load_record_is_refused(tmp_path):
    path = tmp_path / "load.npz"
    write_load(make_load(skewed(), where="test"), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadFileError):
        read_load(path)
    with pytest.raises(BadFileError):
        open_trace(path)
    np.savez(path, format="placer.load", schema_version=2, load=skewed(), layer_ids=[0, 1, 2])
    with pytest.raises(BadFileError, match="reads up to 1"):
        read_load(path)


def test_a_load_record_is_no_trace_and_says_why(tmp_path):
    write_load(make_load(skewed(), where="test"), tmp_path / "load.npz")
    with pytest.raises(UsageError, match="co-activation, affinity and traffic cannot be known"):
        open_trace(tmp_path / "load.npz")


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=25)
def test_rank_load_shares_an_experts_load_among_its_copies(seed):
    rng = np.random.default_rng(seed)
    load = rng.integers(0, 50, (2, 3, 6))
    table = np.stack([[0, 1, 2, 3, 0, 4, 5, -1] for _ in range(3)])
    placement = Placement(table, 6, 4, 4)
    ranks = rank_load(placement, load)
    np.testing.assert_allclose(ranks.sum(axis=-1), load.sum(axis=-1))
    np.testing.assert_allclose(ranks[..., 0], load[..., 0] / 2 + load[..., 1])
    np.testing.assert_allclose(ranks[..., 2], load[..., 0] / 2 + load[..., 4])


def test_balance_figures_equal_their_definitions():
    placement = contiguous(2, 4, 2, 2, 2)
    load = np.array([[[3, 1, 2, 2], [8, 0, 0, 0]], [[1, 1, 1, 1], [0, 0, 4, 4]]])
    figures = {name: entry["value"] for name, entry in balance_figures(placement, load).items()}
    # totals: layer 0 ranks 6, 6; layer 1 ranks 8, 8; windows: (1 + 2) / 2 and (1 + 2) / 2
    assert figures["imbalance"] == 1.0
    assert figures["balancedness"] == 1.0
    assert figures["imbalance_batches_mean"] == 1.5


def test_a_plan_is_fitted_to_earlier_windows_and_judged_on_later_ones():
    record = make_load(skewed(), layer_ids=[1, 2, 5], where="test")
    asked = Settings(num_ranks=4, objective="balance", solver="local_search")
    plan = plan_from_load(record, asked, name="load.npz")
    assert plan.layer_ids == (1, 2, 5)
    assert plan.prediction["scope"] == "held-out"
    assert plan.prediction["windows"] == 3
    assert plan.prediction["pairs"] == int(skewed()[3:].sum())
    ours = plan.prediction["metrics"]["imbalance"]["value"]
    assert ours < plan.prediction["baselines"]["contiguous"]["imbalance"]["value"]
    fitted = rank_load(plan.placement, skewed()[:3].sum(axis=0))
    in_sample = (fitted.max(axis=1) / fitted.mean(axis=1)).mean()
    assert plan.certificate["value"] == pytest.approx(in_sample)
    assert plan.certificate["lower_bound"] <= plan.certificate["value"] + 1e-9
    assert "messages_alltoall" not in plan.prediction["metrics"]


def test_one_window_is_judged_in_sample_only():
    record = make_load(skewed(1), where="test")
    with pytest.raises(UsageError, match="one window"):
        plan_from_load(record, Settings(num_ranks=4, objective="balance"), name="load.npz")
    plan = plan_from_load(
        record,
        Settings(num_ranks=4, objective="balance", in_sample=True, solver="eplb"),
        name="load.npz",
    )
    assert plan.prediction["scope"] == "in-sample"


@pytest.mark.parametrize(
    "asked",
    [
        Settings(num_ranks=4),
        Settings(num_ranks=4, objective="balance", phase="decode"),
        Settings(num_ranks=4, objective="balance", cluster="h100-nvl8"),
        Settings(num_ranks=4, objective="balance", solver="exflow"),
        Settings(num_ranks=4, objective="balance", num_nodes=3),
    ],
)
def test_what_needs_tokens_is_refused(asked):
    with pytest.raises(UsageError):
        plan_from_load(make_load(skewed(), where="test"), asked, name="load.npz")
