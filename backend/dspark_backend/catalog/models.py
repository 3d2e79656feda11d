"""From what a user calls a model to files that are ready to load; and back out of the cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dspark_backend.catalog.converted import conversions, converted, is_converted
from dspark_backend.catalog.fetch import fetch, source_path
from dspark_backend.catalog.files import (
    ModelFiles,
    file_identity,
    folder_identity,
    open_checkpoint,
)
from dspark_backend.catalog.home import (
    delete,
    derived_folders,
    home,
    locked,
    size_of,
    source_folder,
)
from dspark_backend.catalog.hub import cached_checkpoint, delete_cached, fetch_checkpoint
from dspark_backend.catalog.known import KNOWN_MODELS, KnownModel
from dspark_backend.checkpoint.progress import Progress, ProgressSink, Stage
from dspark_backend.checkpoint.safetensors import checkpoint_files
from dspark_backend.errors import ModelFormatError, ModelNotFoundError


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """What the cache has of a model. ``known`` is None for models from a path or the hub;
    ``present`` says that a load needs no network."""

    name: str
    known: KnownModel | None
    present: bool
    size_bytes: int


def resolve(name_or_path: str, *, progress: ProgressSink | None = None) -> ModelFiles:
    """Files of a model, fetched and converted if need be.

    ``name_or_path`` is a known name, a local checkpoint folder, a local ``.gguf`` file, a folder
    with one ``.gguf`` file, a hub repository ``owner/name``, or a GGUF file of one,
    ``owner/name/file.gguf``.

    Raises:
        ModelNotFoundError: nothing goes by that name.
        DownloadError: it could not be fetched.
        ModelFormatError: it is damaged, or a model that this engine does not run.
    """
    known = KNOWN_MODELS.get(name_or_path)
    if known is not None:
        source = source_path(known) if is_converted(known.sha256) else fetch(known, progress)
        return converted(known.name, source, known.sha256, progress)
    return _open(name_or_path, _locate(name_or_path, progress), progress)


def pull(name: str, *, progress: ProgressSink | None = None) -> Path:
    """Fetch a model without converting it: the path of its GGUF file or checkpoint folder.

    Raises:
        ModelNotFoundError: nothing goes by that name.
        DownloadError: it could not be fetched.
    """
    known = KNOWN_MODELS.get(name)
    return fetch(known, progress) if known is not None else _locate(name, progress)


def list_models() -> list[ModelStatus]:
    """The known models, then whatever else was converted; with their size on disk in bytes."""
    sizes = {name: size_of(source_folder(name)) for name in KNOWN_MODELS}
    complete = {name for name, model in KNOWN_MODELS.items() if source_path(model).is_file()}
    for entry in conversions():
        made = [entry.folder, *derived_folders(entry.source_sha)]
        sizes[entry.name] = sizes.get(entry.name, 0) + sum(size_of(folder) for folder in made)
        complete.add(entry.name)
    return [
        ModelStatus(name, KNOWN_MODELS.get(name), name in complete, size)
        for name, size in sizes.items()
    ]


def remove(name: str) -> int:
    """Delete what the cache has of a model; returns the bytes freed.

    A user's own folder or file is never touched, only what was derived from it. A hub repository
    leaves the hub's cache, which other programs share.

    Raises:
        ModelNotFoundError: nothing goes by that name.
    """
    freed = 0
    with locked(name):
        for entry in conversions():
            if entry.name in (name, _absolute(name)):
                freed += delete(entry.folder) + _delete_derived(entry.source_sha)
        if name in KNOWN_MODELS:
            return freed + delete(source_folder(name))
    path = _local(name)
    if path is not None:
        is_checkpoint = (path / "config.json").is_file()
        return freed + (_delete_derived(folder_identity(path)) if is_checkpoint else 0)
    repository = _repository(name)
    if repository is not None:
        snapshot = cached_checkpoint(*repository)
        if snapshot is not None and _is_whole(snapshot, None):
            freed += _delete_derived(folder_identity(snapshot))
        freed += delete_cached(repository[0])
    if not freed:
        raise _not_found(name)
    return freed


def _delete_derived(source_sha: str) -> int:
    return sum(delete(folder) for folder in derived_folders(source_sha))


def _locate(name: str, progress: ProgressSink | None) -> Path:
    """The folder or GGUF file behind a path or a hub id."""
    path = _local(name)
    if path is not None:
        return path
    repository = _repository(name)
    if repository is None:
        raise _not_found(name)
    return _fetch_from_hub(*repository, progress)


def _fetch_from_hub(repository: str, filename: str | None, progress: ProgressSink | None) -> Path:
    def report(done: int) -> None:
        if progress is not None:
            progress(Progress(repository, Stage.FETCH, done, 0))

    with locked(repository):
        folder = cached_checkpoint(repository, filename)
        if folder is None or not _is_whole(folder, filename):
            folder = fetch_checkpoint(repository, filename, report)
    if filename is None and not _is_whole(folder, None):
        raise ModelNotFoundError(
            f"hub repository {repository} has no safetensors checkpoint with a tokenizer.json; "
            f"for a GGUF file of it, give {repository}/<file>.gguf"
        )
    if filename is not None and not _is_whole(folder, filename):
        raise ModelNotFoundError(f"hub repository {repository} has no file {filename}")
    return folder if filename is None else folder / filename


def _is_whole(folder: Path, filename: str | None) -> bool:
    if filename is not None:
        return (folder / filename).is_file()
    try:
        return bool(checkpoint_files(folder)) and (folder / "tokenizer.json").is_file()
    except ModelFormatError:
        return False


def _open(name: str, path: Path, progress: ProgressSink | None) -> ModelFiles:
    if path.is_dir() and not (path / "config.json").is_file():
        path = _only_gguf(path)
    if path.is_dir():
        return open_checkpoint(name, path)
    if path.suffix != ".gguf":
        raise ModelFormatError(f"{path} is neither a checkpoint folder nor a .gguf file")
    own_name = name if _local(name) is None else _absolute(name)
    return converted(own_name, path, file_identity(path), progress)


def _local(name: str) -> Path | None:
    """The existing file or folder that a name is the path of, if it is one."""
    path = Path(name).expanduser()
    return path if name and path.exists() else None


def _absolute(name: str) -> str:
    """A path as one and the same name, wherever the program was started."""
    return str(Path(name).expanduser().resolve())


def _only_gguf(folder: Path) -> Path:
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise ModelFormatError(
            f"{folder} has no config.json and {len(found)} .gguf files; "
            "name the checkpoint folder or one .gguf file"
        )
    return found[0]


def _repository(name: str) -> tuple[str, str | None] | None:
    """``owner/name`` or ``owner/name/file.gguf`` taken apart; None for anything else."""
    parts = name.split("/")
    if len(parts) < 2 or not all(parts) or parts[0] in (".", "..", "~"):
        return None
    if len(parts) == 2:
        return name, None
    return ("/".join(parts[:2]), "/".join(parts[2:])) if name.endswith(".gguf") else None


def _not_found(name: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"no model {name!r}: give one of {', '.join(KNOWN_MODELS)}, a local folder or .gguf file, "
        f"or a hub repository owner/name (the cache is {home()})"
    )
