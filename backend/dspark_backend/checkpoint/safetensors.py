"""Memory-mapped safetensors: a checked header, tensors without a copy, and a streaming writer.

The format: eight bytes little-endian header length, a JSON header ``{name: {dtype, shape,
data_offsets}}``, then the tensors' bytes without gaps. Everything the header claims is checked
against the file's size before a tensor exists.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeGuard

import torch

from dspark_backend.errors import ModelFormatError

# The reference implementation's limit; a real header is a few hundred kilobytes.
MAX_HEADER_BYTES = 100_000_000
_MAX_RANK = 8
_ALIGNMENT = 64

_DTYPES: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: ``start`` and ``end`` are byte offsets into the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, checked; nothing of their size is allocated.

    Raises:
        ModelFormatError: truncated file, header longer than the file, unknown dtype, absurd
            shape, offsets that are out of range, overlap, leave gaps, or do not fit the shape.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ModelFormatError(
                    f"{path}: header length {length} does not fit a file of {size} bytes; "
                    "the file is truncated or no safetensors file"
                )
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path}: unreadable safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise ModelFormatError(f"{path}: the header is no JSON object")
    header.pop("__metadata__", None)
    base = 8 + length
    entries = {name: _entry(path, name, value, base) for name, value in header.items()}
    _check_layout(path, entries, base, size)
    return entries


def _entry(path: Path, name: str, value: Any, base: int) -> TensorEntry:
    def refuse(why: str) -> ModelFormatError:
        return ModelFormatError(f"{path}: tensor {name!r}: {why}")

    if not isinstance(value, dict):
        raise refuse("its header entry is no object")
    dtype = _DTYPES.get(str(value.get("dtype")))
    if dtype is None:
        raise refuse(f"unknown dtype {value.get('dtype')!r}")
    shape, offsets = value.get("shape"), value.get("data_offsets")
    if not _naturals(shape) or len(shape) > _MAX_RANK:
        raise refuse(f"bad shape {shape!r}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise refuse(f"bad data_offsets {offsets!r}")
    start, end = offsets
    if end - start != math.prod(shape) * dtype.itemsize:
        raise refuse(f"{end - start} bytes do not hold shape {shape} of {value['dtype']}")
    return TensorEntry(dtype, tuple(shape), base + start, base + end)


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 48
        for item in value
    )


def _check_layout(path: Path, entries: Mapping[str, TensorEntry], base: int, size: int) -> None:
    """Tensors must tile the data exactly: an overlap or a gap is damage, or an attack."""
    position = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise ModelFormatError(
                f"{path}: tensor {name!r} starts at byte {entry.start}, expected {position}: "
                "tensors overlap or leave a gap"
            )
        position = entry.end
    if position != size:
        raise ModelFormatError(
            f"{path}: the header describes {position} bytes, the file has {size}; fetch it again"
        )


class TensorStore:
    """The tensors of a checkpoint's safetensors files, memory-mapped, under Hugging Face names.

    Tensors are views of the mapping (which is private to the process): treat them as read-only.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Check every header, then map every file.

        Raises:
            ModelFormatError: a damaged file, or a tensor that two files hold.
        """
        self._entries: dict[str, tuple[mmap.mmap, TensorEntry]] = {}
        for path in paths:
            entries = read_header(path)
            with path.open("rb") as file:
                # ACCESS_COPY: a private mapping, which torch takes as writable without a copy.
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            for name, entry in entries.items():
                if name in self._entries:
                    raise ModelFormatError(f"{path}: tensor {name!r} is in another file as well")
                self._entries[name] = (mapping, entry)

    @classmethod
    def from_folder(cls, folder: Path) -> TensorStore:
        """The files that ``model.safetensors.index.json`` lists, else ``model.safetensors``.

        Raises:
            ModelFormatError: no safetensors file, an index that leaves the folder, or damage.
        """
        return cls(checkpoint_files(folder))

    def names(self) -> Sequence[str]:
        """All tensor names, in file order."""
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without touching its data."""
        return self._entry(name)[1].shape

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's element type, without touching its data."""
        return self._entry(name)[1].dtype

    def get(self, name: str) -> torch.Tensor:
        """The tensor as a view of the file; pages are read when they are touched."""
        mapping, entry = self._entry(name)
        count = math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if entry.start % entry.dtype.itemsize:
            # A foreign writer did not align its data; torch needs it aligned.
            data = bytearray(mapping[entry.start : entry.end])
            return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)
        flat = torch.frombuffer(mapping, dtype=entry.dtype, count=count, offset=entry.start)
        return flat.reshape(entry.shape)

    def release(self, name: str) -> None:
        """Give the tensor's pages back to the system; a later access reads the file again.

        Keeps the peak memory of a conversion near the size of its result.
        """
        mapping, entry = self._entry(name)
        if not hasattr(mmap, "MADV_DONTNEED"):
            return  # no such advice on this system: the kernel evicts clean pages by itself
        start = entry.start - entry.start % mmap.PAGESIZE
        if entry.end > start:
            mapping.madvise(mmap.MADV_DONTNEED, start, entry.end - start)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def _entry(self, name: str) -> tuple[mmap.mmap, TensorEntry]:
        try:
            return self._entries[name]
        except KeyError:
            raise ModelFormatError(
                f"the checkpoint has no tensor {name!r}; it has {len(self._entries)} others, "
                f"such as {', '.join(list(self._entries)[:3])}"
            ) from None


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face checkpoint folder.

    Raises:
        ModelFormatError: there is none, or the index is damaged or names files elsewhere.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        if single.is_file():
            return [single]
        raise ModelFormatError(
            f"{folder} has no model.safetensors; other weight formats are not loaded "
            "(convert the checkpoint with save_pretrained)"
        )
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFormatError(f"{index} is not a safetensors index: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelFormatError(f"{index} names a file outside its folder: {name!r}")
        if not (folder / name).is_file():
            raise ModelFormatError(f"{folder} lacks the shard {name}: fetch the model again")
    return [folder / name for name in sorted(names)]


class SafetensorsWriter:
    """Writes a file tensor by tensor, in pieces: the shapes are known first, the data is not."""

    def __init__(
        self, path: Path, tensors: Sequence[tuple[str, tuple[int, ...]]], dtype: torch.dtype
    ) -> None:
        """Write the header for ``tensors`` (name, shape), all of ``dtype``."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, shape in tensors:
            end = position + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": _DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        self._end = 8 + len(text) + position
        self._dtype = dtype
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def append(self, rows: torch.Tensor) -> None:
        """Write the next elements, in the order of the header."""
        data = rows.to(self._dtype).contiguous().reshape(-1).view(torch.uint8)
        self._file.write(data.numpy().data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        written = self._file.tell()
        if kind is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if kind is None and written != self._end:
            raise ModelFormatError(f"wrote {written} bytes where the header says {self._end}")
