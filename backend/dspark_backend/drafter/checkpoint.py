"""Drafter checkpoints on disk, read and written in the published format (DSPARK.md, section 3).

Ours besides: ``d2t`` (the draft vocabulary), ``calibration.json``, and matrices in int8 with a
``<name>_scale`` per row, a quarter of float32, for drafters that ship inside a package.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.checkpoint.safetensors import TensorStore
from dspark_backend.drafter.calibration import Calibration
from dspark_backend.drafter.config import DrafterConfig
from dspark_backend.drafter.layout import D2T, EMBEDDING, LM_HEAD, optional_shapes, trained_shapes
from dspark_backend.errors import ModelFormatError
from dspark_backend.kernels.linear.reference import quantise_weight

_SCALE = "_scale"
# A file that goes into the package, or under version control, is to stay below 40 MB.
_SHARD_BYTES = 36_000_000
# Reads the target's residual stream, whose outliers would blow up the rounding of int8 weights.
_RESIDUAL = "fc.weight"


class Storage(StrEnum):
    """How matrices are kept: ``bf16`` as published, or ``int8`` with a scale per row."""

    BF16 = "bf16"
    INT8 = "int8"


@dataclass(frozen=True)
class DrafterFiles:
    """A drafter on disk, checked against its config. ``d2t`` int64 [output_size] maps draft ids to
    target ids and ascends; None where the drafter speaks the whole vocabulary."""

    folder: Path
    config: DrafterConfig
    calibration: Calibration
    d2t: Tensor | None
    _store: TensorStore

    @property
    def has_target_copies(self) -> bool:
        """Whether the frozen embedding and LM head are in the checkpoint."""
        return EMBEDDING in self._store and LM_HEAD in self._store

    def get(self, name: str) -> Tensor:
        """A tensor of the drafter as float32, out of int8 if it is kept so.

        Raises ModelFormatError where there is none of that name.
        """
        tensor = self._store.get(name)
        if tensor.dtype is torch.int8:
            return tensor.float() * self._store.get(name + _SCALE).float()[:, None]
        return tensor.float()

    def state(self) -> dict[str, Tensor]:
        """All trained tensors as float32, for ``DraftModel.load_state_dict``."""
        return {name: self.get(name) for name in trained_shapes(self.config)}

    def digest(self) -> str:
        """sha256 over names and values of the trained tensors: what a continued run began with."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def open_drafter(folder: Path, target: TargetConfig) -> DrafterFiles:
    """Map a drafter's checkpoint for ``target``.

    Raises:
        ModelFormatError: not a drafter, one for another target, damaged files, a tensor that is
            missing or of another shape, or a ``d2t`` that is no ascending list of target ids.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFormatError(f"{path} is no drafter's config: {error}") from error
    if not isinstance(raw, dict):
        raise ModelFormatError(f"{path} holds no JSON object")
    config = DrafterConfig.from_dict(raw)
    config.check_target(target, folder)
    store = TensorStore.from_folder(folder)
    _check(config, store, folder)
    calibration = Calibration.read(folder, config.block_size)
    return DrafterFiles(folder, config, calibration, _read_d2t(config, store, folder), store)


def write_drafter(
    folder: Path,
    config: DrafterConfig,
    state: Mapping[str, Tensor],
    d2t: Tensor | None,
    calibration: Calibration | None = None,
    storage: Storage = Storage.BF16,
    target_copies: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint, in files of at most 36 MB; ``folder`` is replaced at once or not at all.

    ``state`` holds the trained tensors; ``target_copies`` the frozen embedding and LM head where
    they are wanted in the file. Raises ModelFormatError for tensors that do not fit ``config``.
    """
    tensors: dict[str, Tensor] = {}
    for name, shape in trained_shapes(config).items():
        if name not in state or tuple(state[name].shape) != shape:
            raise ModelFormatError(f"tensor {name!r} is missing or not of shape {shape}")
        tensors |= _stored(name, state[name].detach().cpu(), storage)
    for name, tensor in (target_copies or {}).items():
        tensors[name] = tensor.detach().cpu().bfloat16().contiguous()
    if d2t is not None:
        tensors[D2T] = d2t.cpu().to(torch.int64).contiguous()
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        text = json.dumps(config.to_dict(), indent=1, sort_keys=True)
        (work / "config.json").write_text(text + "\n", encoding="utf-8")
        # Under the safetensors names: one file, or an index and shards as in a large model.
        save_torch_state_dict(tensors, work, max_shard_size=_SHARD_BYTES)
        if calibration is not None:
            calibration.write(work)
        # Made for the writer alone; a checkpoint is for whoever may read its folder.
        work.chmod(0o755)
        for file in work.iterdir():
            file.chmod(0o644)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _stored(name: str, tensor: Tensor, storage: Storage) -> dict[str, Tensor]:
    narrow = tensor.dim() == 2 and tensor.shape[0] > 1 and name != _RESIDUAL
    if storage is Storage.INT8 and narrow:
        q, scale = quantise_weight(tensor)
        return {name: q.contiguous(), name + _SCALE: scale.contiguous()}
    return {name: tensor.bfloat16().contiguous()}


def _check(config: DrafterConfig, store: TensorStore, folder: Path) -> None:
    for name, shape in trained_shapes(config).items():
        if name not in store:
            raise ModelFormatError(f"{folder}: tensor {name!r} is missing")
        _check_tensor(store, folder, name, shape)
    for name, shape in optional_shapes(config).items():
        if name in store:
            _check_tensor(store, folder, name, shape)


def _check_tensor(store: TensorStore, folder: Path, name: str, shape: tuple[int, ...]) -> None:
    if store.shape(name) != shape:
        raise ModelFormatError(
            f"{folder}: tensor {name!r} has shape {store.shape(name)}, its config says {shape}"
        )
    if store.dtype(name) is not torch.int8:
        return
    scale = name + _SCALE
    if scale not in store or store.shape(scale) != shape[:1]:
        raise ModelFormatError(f"{folder}: {name!r} is int8 but {scale!r} {list(shape[:1])} is not")


def _read_d2t(config: DrafterConfig, store: TensorStore, folder: Path) -> Tensor | None:
    size = config.draft_vocab_size
    if size is None:
        return None
    if D2T not in store:
        raise ModelFormatError(f"{folder}: draft_vocab_size is {size} but there is no tensor 'd2t'")
    d2t = store.get(D2T).to(torch.int64)
    if tuple(d2t.shape) != (size,):
        raise ModelFormatError(f"{folder}: d2t has shape {tuple(d2t.shape)}, not ({size},)")
    rising = bool((d2t[1:] > d2t[:-1]).all())
    if not rising or int(d2t[0]) < 0 or int(d2t[-1]) >= config.shape.vocab_size:
        raise ModelFormatError(
            f"{folder}: d2t is no ascending list of ids below {config.shape.vocab_size}"
        )
    return d2t
