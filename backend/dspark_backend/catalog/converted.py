"""The cache of converted checkpoints: each GGUF file is converted once, and atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dspark_backend.catalog.files import ModelFiles
from dspark_backend.catalog.home import converted_folder, delete, home, locked
from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.checkpoint.progress import Progress, ProgressSink, Stage
from dspark_backend.errors import BackendError, ModelFormatError

# Part of the key: a change of what conversion writes makes older results stale.
_FORMAT = 1
_ORIGIN = "origin.json"


@dataclass(frozen=True, slots=True)
class Conversion:
    """One entry of the cache: the model's name, and the identity of what it was made from."""

    name: str
    source_sha: str
    folder: Path


def converted(
    name: str, source: Path, source_sha: str, progress: ProgressSink | None
) -> ModelFiles:
    """The checkpoint made from ``source``, converted now if it has not been yet.

    Raises:
        ModelFormatError: the file is damaged or holds a model that this engine does not run.
    """
    folder = folder_of(source_sha)
    if not (folder / _ORIGIN).is_file():
        with locked(folder.name):
            if not (folder / _ORIGIN).is_file():
                _convert(name, source, source_sha, progress)
    return ModelFiles(
        name=name,
        folder=folder,
        config=TargetConfig.from_folder(folder),
        source_sha=source_sha,
        gguf=source if source.is_file() else None,
    )


def folder_of(source_sha: str) -> Path:
    """Where the checkpoint of a source is, or will be."""
    return converted_folder(f"{source_sha[:32]}-{_FORMAT}")


def is_converted(source_sha: str) -> bool:
    """Whether a load needs no conversion, and so not even the source."""
    return (folder_of(source_sha) / _ORIGIN).is_file()


def conversions() -> Iterator[Conversion]:
    """All entries of the cache."""
    for origin in sorted((home() / "converted").glob(f"*/{_ORIGIN}")):
        try:
            document = json.loads(origin.read_text("utf-8"))
            yield Conversion(document["name"], document["source_sha"], origin.parent)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelFormatError(
                f"{origin} is damaged ({error!r}); delete the folder it is in"
            ) from error


def _convert(name: str, source: Path, source_sha: str, progress: ProgressSink | None) -> None:
    # gguf and numpy are needed here only; a load from the cache does without them.
    from dspark_backend.checkpoint.convert import convert_gguf

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(Progress(name, Stage.CONVERT, done, total))

    folder = folder_of(source_sha)
    work = folder.with_name(folder.name + ".partial")
    delete(work)
    work.mkdir(parents=True)
    try:
        convert_gguf(source, work, report)
        origin = {"name": name, "source": str(source), "source_sha": source_sha}
        (work / _ORIGIN).write_text(json.dumps(origin), encoding="utf-8")
        delete(folder)  # what an earlier, interrupted `remove` left
        os.replace(work, folder)
    except OSError as error:
        raise BackendError(f"could not convert {source} into {folder}: {error}") from error
    finally:
        delete(work)
