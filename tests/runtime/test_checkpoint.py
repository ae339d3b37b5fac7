"""Tensors are read as safetensors' own library wrote them, and damage is named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from placer.errors import BadFileError
from placer.runtime.checkpoint import open_checkpoint

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8)


def written(folder, tensors):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def tensors():
    made = {str(dtype): (torch.randn(7, 3, 5) * 9).to(dtype) for dtype in TYPES}
    return {**made, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4),
            "large": torch.randn(70, 700)}  # fmt: skip


def test_tensors_and_rows_of_them_are_read_as_they_were_written(tmp_path, tensors):
    checkpoint = written(tmp_path, tensors)
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        found = checkpoint.read(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    for dtype in TYPES:
        assert torch.equal(checkpoint.read(str(dtype), slice(2, 5)), tensors[str(dtype)][2:5])


def test_a_tensor_is_filled_whatever_its_type(tmp_path, tensors):
    checkpoint = written(tmp_path, tensors)
    for dtype in (torch.float32, torch.bfloat16):
        for name, tensor in tensors.items():
            held = torch.full(tensor.shape, torch.nan, dtype=dtype)
            checkpoint.read_into(name, held)
            assert torch.equal(held, tensor.to(dtype)), (name, dtype)


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    checkpoint = written(tmp_path, {"one": torch.ones(4)})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BadFileError, match="cannot be read: No such file"):
        checkpoint.read("one")


def header(entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "its header is said to have 0 bytes"),
        (b"\xff" * 64, "its header is said to have"),
        (b"\x04" + bytes(7) + b"none", "its header is none of safetensors"),
        (header({"a": {"dtype": "F32", "shape": [2]}}) + bytes(8), "its header is none"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}) + bytes(8),
         "a has 4 bytes, not what its shape takes"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}) + bytes(8),
         "a ends at byte"),
        (header({"a": {"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}}) + bytes(8),
         "a is of type Q4"),
        (header(["a"]), "its header is none"),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path, content, said):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(BadFileError, match=said):
        open_checkpoint(tmp_path)


def test_a_file_cut_off_later_is_named(tmp_path):
    checkpoint = written(tmp_path, {"one": torch.ones(4)})
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(BadFileError, match="4 bytes are missing"):
        checkpoint.read("one")
