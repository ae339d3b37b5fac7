import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from trace_cases import REAL_TRACE, assert_same, random_trace, traces, unhurried

from placer.errors import BadFileError, UsageError
from placer.trace import Trace, open_trace, read_npz, write_npz

GOOD: dict[str, Any] = {"experts": np.array([[[0, 1]], [[2, -1]]]), "num_experts": 4}


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


@unhurried
@given(traces())
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, trace: Trace
) -> None:
    path = tmp_path_factory.mktemp("npz") / "trace.npz"
    write_npz(trace, path)
    assert_same(read_npz(path), trace)


def test_the_two_required_keys_are_enough(tmp_path: Path) -> None:
    trace = read_npz(save(tmp_path / "a.npz", **GOOD))
    assert trace.num_tokens == 2
    assert trace.requests().tolist() == [0]


def test_a_path_without_suffix_is_written_as_named(tmp_path: Path) -> None:
    write_npz(random_trace(), tmp_path / "plain")
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]
    assert read_npz(tmp_path / "plain").num_tokens == 50


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", **GOOD)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        write_npz(random_trace(), path)
    assert path.read_bytes() == before
    write_npz(random_trace(), path, force=True)
    assert read_npz(path).num_tokens == 50


def test_the_same_trace_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_npz(random_trace(labels=True), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_unknown_keys_are_tolerated_and_named(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", **GOOD, router_bias=np.zeros(4), objects=np.array([{}]))
    assert read_npz(path).num_tokens == 2
    assert open_trace(path).warnings == ["keys that placer does not know: objects, router_bias"]


def test_a_number_of_experts_for_each_layer_is_accepted_when_all_agree(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", experts=np.zeros((2, 3, 1), int), num_experts=[4, 4, 4])
    assert read_npz(path).num_experts == 4


def test_layers_of_different_numbers_of_experts_are_refused_by_name(tmp_path: Path) -> None:
    path = save(
        tmp_path / "a.npz",
        experts=np.zeros((2, 3, 1), int),
        num_experts=[4, 4, 8],
        layer_ids=[3, 5, 7],
    )
    with pytest.raises(BadFileError, match="layer 3 has 4 experts and layer 7 has 8"):
        read_npz(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": None}, "has no experts"),
        ({"num_experts": None}, "has no num_experts"),
        ({"num_experts": 4.5}, "num_experts is float64"),
        ({"num_experts": [1, 2, 3]}, r"num_experts is int64 of shape \(3,\)"),
        ({"num_experts": "many"}, "num_experts is <U4"),
        ({"experts": np.array([[[0, 4]]])}, "id 4 at token 0"),
        ({"experts": np.zeros((0, 1, 1), int)}, "no tokens"),
        ({"experts": np.array(7)}, r"experts has shape \(\)"),
        ({"request": np.array(["a", "b"])}, "request is <U1"),
        ({"request": np.array([{}, {}])}, "request cannot be read: Object arrays"),
        ({"weights": np.full((2, 1, 2), np.nan)}, "is nan"),
        ({"request_label": np.array(["a", "b", "c"])}, "3 labels, expected 1"),
        ({"hidden_size": 0}, "hidden_size is 0.0, expected a positive"),
        ({"hidden_size": 1.5}, "hidden_size is 1.5, expected a whole"),
        ({"expert_bytes": [1, 2]}, r"expert_bytes is int64 of shape \(2,\)"),
        ({"expert_flops_per_token": np.nan}, "expert_flops_per_token is nan"),
        ({"model_name": 3}, "model_name is int64"),
    ],
)
def test_unsound_files_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    arrays = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    path = save(tmp_path / "a.npz", **arrays)
    with pytest.raises(BadFileError, match=message) as caught:
        read_npz(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("hello, I am no zip file")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "pickled.npz").write_bytes(pickle.dumps({"experts": 1}))
    for path in tmp_path.iterdir():
        with pytest.raises(BadFileError, match=r"is not an \.npz file"):
            read_npz(path)
    with pytest.raises(BadFileError, match="is a folder"):
        read_npz(tmp_path)
    with pytest.raises(BadFileError, match="does not exist"):
        read_npz(tmp_path / "none.npz")


def test_a_zip_file_of_other_things_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(BadFileError, match="has no experts"):
        read_npz(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("experts", "hello")
        archive.writestr("num_experts.npy", "nonsense")
    with pytest.raises(BadFileError, match="experts"):
        read_npz(path)
    with zipfile.ZipFile(path, "w"):
        pass
    with pytest.raises(BadFileError, match="has no experts"):
        read_npz(path)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_a_file_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.npz"
    write_npz(random_trace(tokens=500, weights=True), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(BadFileError, match=r"a\.npz"):
        read_npz(path)


def test_a_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_npz(random_trace(tokens=500), path)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 4] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(BadFileError, match="damaged at experts"):
        read_npz(path)


def test_an_array_that_claims_a_monstrous_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999999, 1, 1), }"
    npy = b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("experts.npy", npy)
    with pytest.raises(BadFileError, match="experts"):
        read_npz(path)


@pytest.mark.skipif(not REAL_TRACE.exists(), reason="the shared trace is not here")
def test_a_real_trace_is_read() -> None:
    trace = read_npz(REAL_TRACE)
    assert trace.experts.shape == (162_219, 24, 4)
    assert trace.requests().size == 494
    assert len(trace.labels) == 494
