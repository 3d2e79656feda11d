"""A model that is ready to load: its folder, its config, its tensors, its tokenizer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.checkpoint.layout import check_tensors
from dspark_backend.checkpoint.safetensors import TensorStore, checkpoint_files
from dspark_backend.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelFiles:
    """A checkpoint on disk. ``source_sha`` identifies its content, for caches derived from it;
    ``gguf`` is the GGUF file that it was converted from, if it was and the file is still there."""

    name: str
    folder: Path
    config: TargetConfig
    source_sha: str
    gguf: Path | None

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer. Raises ModelFormatError when it is missing or damaged."""
        return Tokenizer(self.folder)

    def tensors(self) -> TensorStore:
        """Map the weights, checked against the config: every tensor there, in its shape.

        Raises:
            ModelFormatError: damaged files, or weights that do not fit the config.
        """
        store = TensorStore.from_folder(self.folder)
        check_tensors(self.config, store.names(), store.shape, self.folder)
        return store


def open_checkpoint(name: str, folder: Path) -> ModelFiles:
    """A checkpoint folder in Hugging Face's layout, as it is.

    Raises:
        ModelFormatError: a config that this engine does not run, or no safetensors weights.
    """
    config = TargetConfig.from_folder(folder)
    return ModelFiles(name, folder, config, folder_identity(folder), None)


def folder_identity(folder: Path) -> str:
    """A hex digest that changes with the folder's files: names, sizes, times, and the config.

    Hashing gigabytes on every load would cost more than the load itself.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in [*checkpoint_files(folder), folder / "tokenizer.json"]:
        digest.update(_stamp(path))
    return digest.hexdigest()


def file_identity(path: Path) -> str:
    """A hex digest that changes with a file: its name, size and time of change."""
    return hashlib.sha256(_stamp(path)).hexdigest()


def _stamp(path: Path) -> bytes:
    if not path.exists():
        return f"{path.name}:absent\n".encode()
    status = path.stat()
    return f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}\n".encode()
