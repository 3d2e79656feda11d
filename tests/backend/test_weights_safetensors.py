"""The tensor store: zero-copy, any number of shards, and headers that lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dspark_backend.checkpoint.safetensors import (
    SafetensorsWriter,
    TensorStore,
    checkpoint_files,
    read_header,
)
from dspark_backend.errors import ModelFormatError

_DTYPES = [
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.uint8,
    torch.int16, torch.int32, torch.int64, torch.bool,
]  # fmt: skip


def _file(folder: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def _entry(dtype: str, shape: Any, start: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_every_dtype_reads_as_the_reference_library_does(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in _DTYPES}
    save_file(tensors, tmp_path / "model.safetensors")
    store = TensorStore.from_folder(tmp_path)
    assert set(store.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert store.shape(name) == (2, 3)
        assert store.dtype(name) == tensor.dtype
        assert torch.equal(store.get(name), tensor)


def test_tensors_are_views_of_one_mapping(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4), "b": torch.zeros(4)}, tmp_path / "model.safetensors")
    store = TensorStore.from_folder(tmp_path)
    assert store.get("a").data_ptr() == store.get("a").data_ptr()
    assert abs(store.get("a").data_ptr() - store.get("b").data_ptr()) == 16


def test_release_keeps_the_tensor_readable(tmp_path: Path) -> None:
    tensor = torch.randn(300, 500)
    save_file({"first": torch.ones(3), "big": tensor}, tmp_path / "model.safetensors")
    store = TensorStore.from_folder(tmp_path)
    view = store.get("big")
    store.release("big")
    assert torch.equal(view, tensor)
    assert torch.equal(store.get("first"), torch.ones(3))


def test_unaligned_and_empty_tensors(tmp_path: Path) -> None:
    header = {
        "odd": _entry("U8", [3], 0, 3),
        "empty": _entry("F32", [0, 7], 3, 3),
        "floats": _entry("F32", [2], 3, 11),
    }
    data = bytes([1, 2, 3]) + torch.tensor([1.5, -2.0]).numpy().tobytes()
    store = TensorStore([_file(tmp_path, header, data)])
    assert store.get("floats").tolist() == [1.5, -2.0]
    assert store.get("odd").tolist() == [1, 2, 3]
    assert store.get("empty").shape == (0, 7)


def test_an_unknown_name_says_what_there_is(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelFormatError, match=r"'lm_head\.weight'.*model\.norm\.weight"):
        TensorStore.from_folder(tmp_path).get("lm_head.weight")


def test_writer_makes_files_that_the_reference_library_reads(tmp_path: Path) -> None:
    rows = torch.randn(10, 16)
    path = tmp_path / "model.safetensors"
    with SafetensorsWriter(path, [("a", (10, 16)), ("b", (3,))], torch.bfloat16) as writer:
        writer.append(rows[:7])
        writer.append(rows[7:])
        writer.append(torch.arange(3))
    loaded = load_file(path)
    assert torch.equal(loaded["a"], rows.bfloat16())
    assert loaded["b"].tolist() == [0, 1, 2]


def test_writer_refuses_to_end_early(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with (
        pytest.raises(ModelFormatError, match="bytes"),
        SafetensorsWriter(path, [("a", (10, 16))], torch.bfloat16) as writer,
    ):
        writer.append(torch.ones(9, 16))


@pytest.mark.parametrize(
    ("header", "data", "named"),
    [
        (b"not json", b"", "header"),
        (b"[1, 2]", b"", "no JSON object"),
        (b"[" * 100_000, b"", "header"),
        ({"t": 5}, b"", "no object"),
        ({"t": {}}, b"", "dtype"),
        ({"t": _entry("F31", [1], 0, 4)}, bytes(4), "dtype"),
        ({"t": _entry("F32", [1 << 60], 0, 4)}, bytes(4), "shape"),
        ({"t": _entry("F32", [-1], 0, 4)}, bytes(4), "shape"),
        ({"t": _entry("F32", [True], 0, 4)}, bytes(4), "shape"),
        ({"t": _entry("F32", "1", 0, 4)}, bytes(4), "shape"),
        ({"t": _entry("F32", [1] * 9, 0, 4)}, bytes(4), "shape"),
        ({"t": _entry("F32", [1 << 40, 1 << 40], 0, 4)}, bytes(4), "bytes"),
        ({"t": _entry("F32", [2], 0, 4)}, bytes(4), "bytes"),
        ({"t": _entry("F32", [1], 4, 0)}, bytes(4), "bytes"),
        ({"t": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, bytes(4), "offsets"),
        ({"t": _entry("F32", [1 << 30], 0, 1 << 32)}, bytes(4), "describes"),
        ({"t": _entry("F32", [1], 0, 4)}, bytes(3), "describes"),
        ({"t": _entry("F32", [1], 0, 4)}, bytes(5), "describes"),
        ({"t": _entry("F32", [1], 4, 8)}, bytes(8), "gap"),
        ({"t": _entry("F32", [1], 0, 4), "u": _entry("F32", [1], 2, 6)}, bytes(6), "overlap"),
        ({"t": _entry("F32", [1], 0, 4), "u": _entry("F32", [1], 0, 4)}, bytes(4), "overlap"),
    ],
)  # fmt: skip
def test_hostile_headers_are_refused(tmp_path: Path, header: Any, data: bytes, named: str) -> None:
    with pytest.raises(ModelFormatError, match=named):
        TensorStore([_file(tmp_path, header, data)])


@pytest.mark.parametrize("length", [1 << 63, 1 << 31, 200_000_000, 3])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(ModelFormatError, match="header length"):
        read_header(_file(tmp_path, b"{}", length=length))


def test_a_file_too_short_for_a_length_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x01\x02")
    with pytest.raises(ModelFormatError, match="truncated"):
        TensorStore.from_folder(tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(position=st.integers(0, 300), value=st.binary(min_size=1, max_size=4))
def test_damaged_bytes_load_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: bytes
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "model.safetensors"
    save_file({"a": torch.ones(3, 5), "b": torch.zeros(2, dtype=torch.bfloat16)}, path)
    data = path.read_bytes()
    path.write_bytes(data[:position] + value + data[position + len(value) :])
    try:
        store = TensorStore.from_folder(folder)
    except ModelFormatError:
        return
    for name in store.names():
        assert tuple(store.get(name).shape) == store.shape(name)


def test_shards_must_be_there_and_stay_in_the_folder(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    assert len(checkpoint_files(tiny_checkpoint("llama", shards=3))) == 3
    index = tmp_path / "model.safetensors.index.json"
    for name, named in (("../x.safetensors", "outside"), ("gone.safetensors", "lacks")):
        index.write_text(json.dumps({"weight_map": {"t": name}}))
        with pytest.raises(ModelFormatError, match=named):
            checkpoint_files(tmp_path)
    for text in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(ModelFormatError, match="index"):
            checkpoint_files(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        save_file({"same": torch.ones(2)}, path)
    with pytest.raises(ModelFormatError, match="another file"):
        TensorStore(paths)


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ModelFormatError, match=r"no model\.safetensors"):
        TensorStore.from_folder(tmp_path)
