"""Where fetched and converted models are kept, and the locks on them.

The only module of the engine that reads the environment.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from dspark_backend.errors import DownloadError

HOME_VARIABLE = "DSPARK_AGENT_HOME"


def home() -> Path:
    """The cache folder: ``$DSPARK_AGENT_HOME``, else ``dspark-agent`` in the platform's caches."""
    chosen = os.environ.get(HOME_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    return platformdirs.user_cache_path("dspark-agent", appauthor=False)


def source_folder(name: str) -> Path:
    """Where the source file of a known model is kept."""
    return home() / "sources" / name


def converted_folder(key: str) -> Path:
    """Where the checkpoint converted from the source with identity ``key`` is kept."""
    return home() / "converted" / key


def derived_folders(source_sha: str) -> list[Path]:
    """What was made for the engine from the source with that identity, such as quantised weights.

    Each kind has a folder of its own in the cache, with one folder per source in it.
    """
    return sorted(home().glob(f"*/{source_sha}"))


@contextmanager
def locked(what: str) -> Iterator[None]:
    """One process (and thread) at a time works on ``what``; others wait for it.

    Raises:
        DownloadError: the cache folder cannot be written to.
    """
    from filelock import FileLock  # a load from the cache needs no lock and skips the import

    folder = home() / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(
            f"cannot write to the model cache {home()}: {error}; set {HOME_VARIABLE} to another one"
        ) from error
    with FileLock(folder / (hashlib.sha256(what.encode()).hexdigest()[:16] + ".lock")):
        yield


def child_environment(temporary: Path) -> dict[str, str]:
    """This process's environment for a child whose temporary files go to ``temporary``."""
    place = str(temporary)
    return {**os.environ, "TMPDIR": place, "TEMP": place, "TMP": place}


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 when there is nothing."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())


def delete(path: Path) -> int:
    """Remove a file or folder of the cache, if it is there; returns the bytes freed."""
    freed = size_of(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    return freed
