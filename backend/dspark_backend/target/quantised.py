"""The int8 form of a checkpoint: made once from the bfloat16 tensors, then memory-mapped.

Projections that read the same input are stored as one matrix (q, k, v; gate, up), so that a layer
is four products. Two files: ``weights.safetensors`` (int8, in the kernel's panels) and
``scales.safetensors`` (float32: ``<name>.scale``, ``<name>.sums``; a sum of int8 values fits).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dspark_backend.catalog.files import ModelFiles
from dspark_backend.catalog.home import home, locked
from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.checkpoint.progress import Progress, ProgressSink, Stage
from dspark_backend.checkpoint.safetensors import SafetensorsWriter, TensorStore
from dspark_backend.errors import ModelFormatError
from dspark_backend.kernels.linear.cpu import MAX_DEPTH
from dspark_backend.kernels.linear.panels import PANEL, pack, panels_shape
from dspark_backend.kernels.linear.reference import quantise_weight

_ROWS = 8192  # channels quantised at a time: bounds the float32 copy of a vocabulary-sized matrix


@dataclass(frozen=True, slots=True)
class Fused:
    """A matrix of the quantised checkpoint and the tensors stacked in it."""

    name: str
    parts: tuple[str, ...]


def fused_linears(config: TargetConfig) -> Iterator[Fused]:
    """Every matrix that a pass multiplies with, in the order of use."""
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        yield Fused(prefix + "qkv", tuple(f"{attention}{n}_proj.weight" for n in "qkv"))
        yield Fused(prefix + "output", (attention + "o_proj.weight",))
        yield Fused(prefix + "gate_up", (mlp + "gate_proj.weight", mlp + "up_proj.weight"))
        yield Fused(prefix + "down", (mlp + "down_proj.weight",))
    tied = config.tie_word_embeddings
    yield Fused("head", ("model.embed_tokens.weight" if tied else "lm_head.weight",))


def quantised_folder(source_sha: str) -> Path:
    """Where the int8 form of the checkpoint with that identity is kept."""
    return home() / "int8-panels" / source_sha


def open_quantised(files: ModelFiles, progress: ProgressSink | None = None) -> TensorStore:
    """The int8 form, made first if it is not there.

    Raises:
        ModelFormatError: the checkpoint does not fit its config, or cannot be held in int8.
    """
    folder = quantised_folder(files.source_sha)
    if not folder.is_dir():
        with locked(f"int8 {files.source_sha}"):
            if not folder.is_dir():
                _quantise(files, folder, progress)
    return TensorStore([folder / "weights.safetensors", folder / "scales.safetensors"])


def _quantise(files: ModelFiles, folder: Path, progress: ProgressSink | None) -> None:
    store = files.tensors()
    linears = list(fused_linears(files.config))
    sizes = [_size(store, linear) for linear in linears]
    total = sum(channels * depth for channels, depth in sizes)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=folder.name[:16] + ".", dir=folder.parent))
    try:
        names = [linear.name for linear in linears]
        matrices = [
            (name, panels_shape(channels, depth))
            for name, (channels, depth) in zip(names, sizes, strict=True)
        ]
        vectors = [
            (f"{name}.{kind}", (channels,))
            for name, (channels, _) in zip(names, sizes, strict=True)
            for kind in ("scale", "sums")
        ]
        done = 0
        with (
            SafetensorsWriter(work / "weights.safetensors", matrices, torch.int8) as weights,
            SafetensorsWriter(work / "scales.safetensors", vectors, torch.float32) as scales,
        ):
            for linear, (channels, depth) in zip(linears, sizes, strict=True):
                scale, sums = [], []
                for piece in _whole_panels(_pieces(store, linear)):
                    q, s = quantise_weight(piece)
                    weights.append(pack(q))
                    scale.append(s)
                    sums.append(q.sum(dim=1, dtype=torch.int32).float())
                scales.append(torch.cat(scale))
                scales.append(torch.cat(sums))
                done += channels * depth
                if progress is not None:
                    progress(Progress(files.name, Stage.QUANTISE, done, total))
        os.replace(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _size(store: TensorStore, linear: Fused) -> tuple[int, int]:
    """Output channels and inputs."""
    depth = store.shape(linear.parts[0])[1]
    if depth > MAX_DEPTH:
        raise ModelFormatError(
            f"{linear.parts[0]}: {depth} inputs would overflow int32 sums (at most {MAX_DEPTH}); "
            "load the model with precision='bf16'"
        )
    return sum(store.shape(part)[0] for part in linear.parts), depth


def _whole_panels(pieces: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same rows, cut so that all pieces but the last fill whole panels."""
    rest: torch.Tensor | None = None
    for piece in pieces:
        rows = piece if rest is None else torch.cat([rest, piece])
        whole = len(rows) // PANEL * PANEL
        if whole:
            yield rows[:whole]
        rest = rows[whole:].clone()
    if rest is not None and len(rest):
        yield rest


def _pieces(store: TensorStore, linear: Fused) -> Iterator[torch.Tensor]:
    for part in linear.parts:
        tensor = store.get(part)
        for first in range(0, tensor.shape[0], _ROWS):
            yield tensor[first : first + _ROWS]
        store.release(part)
