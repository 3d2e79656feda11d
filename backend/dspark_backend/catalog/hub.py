"""Files and whole checkpoints from the Hugging Face hub, for machines that reach it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dspark_backend.catalog.known import HubSource
from dspark_backend.errors import DownloadError, ModelNotFoundError

# A machine behind a package index only must learn quickly that there is no hub. The request's own
# limit does not cover name resolution, hence a limit on the whole probe.
_REQUEST_S = 3.0
_PROBE_S = 4.0

# What a checkpoint needs; pickled weights are not among it.
_CHECKPOINT_PATTERNS = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model*.safetensors",
    "model.safetensors.index.json",
]


def fetch_hub_file(source: HubSource, folder: Path, on_bytes: Callable[[int], None]) -> Path:
    """Download one file into ``folder``; the hub's client resumes what was interrupted.

    Raises:
        DownloadError: offline mode, the hub is out of reach, or the download failed.
    """
    from huggingface_hub import hf_hub_download

    _probe(source.repository, source.filename)
    try:
        return Path(
            hf_hub_download(
                source.repository,
                source.filename,
                local_dir=folder,
                tqdm_class=_bar_reporting(on_bytes),
            )
        )
    except Exception as error:  # the client raises HTTP, file system and its own errors
        raise DownloadError(_reason(error)) from error


def cached_checkpoint(repository: str, filename: str | None) -> Path | None:
    """The snapshot folder of a repository that is in the hub's cache, perhaps not all of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        wanted = _wanted(filename)
        return Path(snapshot_download(repository, allow_patterns=wanted, local_files_only=True))
    except HFValidationError as error:
        raise ModelNotFoundError(f"{repository!r} is no hub repository: {error}") from error
    except LocalEntryNotFoundError:
        return None


def fetch_checkpoint(
    repository: str, filename: str | None, on_bytes: Callable[[int], None]
) -> Path:
    """Download a repository's checkpoint (or just ``filename`` of it) into the hub's cache.

    Returns the snapshot's folder.

    Raises:
        ModelNotFoundError: the hub has no such repository, or does not show it to this user.
        DownloadError: offline mode, the hub is out of reach, or the download failed.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        _probe(repository, filename or "config.json")
        return Path(
            snapshot_download(
                repository,
                allow_patterns=_wanted(filename),
                tqdm_class=_bar_reporting(on_bytes),
            )
        )
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"the hub has no repository {repository!r} that you may read; "
            "a private or gated one needs `hf auth login`"
        ) from error
    except DownloadError as error:
        raise DownloadError(f"could not fetch {repository} from the hub: {error}") from error
    except Exception as error:  # the client raises HTTP, file system and its own errors
        raise DownloadError(
            f"could not fetch {repository} from the hub: {_reason(error)}"
        ) from error


def _wanted(filename: str | None) -> list[str]:
    return _CHECKPOINT_PATTERNS if filename is None else [filename]


def delete_cached(repository: str) -> int:
    """Delete a repository from the hub's cache; returns the bytes freed."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return 0
    revisions = [
        revision.commit_hash
        for repo in cache.repos
        if repo.repo_type == "model" and repo.repo_id == repository
        for revision in repo.revisions
    ]
    if not revisions:
        return 0
    plan = cache.delete_revisions(*revisions)
    plan.execute()
    return plan.expected_freed_size


def _probe(repository: str, filename: str) -> None:
    """Ask for a file's metadata, and give up soon.

    Raises:
        DownloadError: no answer in time, or none at all. An answer of any kind is fine.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        raise DownloadError("not asked, since HF_HUB_OFFLINE is set")
    failures: list[Exception] = []

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(repository, filename), timeout=_REQUEST_S)
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code >= 500:
                failures.append(error)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_S)
    if thread.is_alive():
        raise DownloadError(f"no answer within {_PROBE_S:.0f} s")
    if failures:
        raise DownloadError(f"not reachable ({_reason(failures[0])})") from failures[0]


def _reason(error: Exception) -> str:
    """The first line of an error, which names the cause; clients append advice to it."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def _bar_reporting(on_bytes: Callable[[int], None]) -> type[Any]:
    """A progress bar class for the hub's client that draws nothing and reports bytes."""
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    lock = threading.Lock()
    total = 0.0

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts_bytes = options.get("unit") == "B"
            self._report(options.get("initial", 0))
            options.pop("name", None)  # the hub client's own option, unknown to tqdm
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self._report(n or 0)

        def _report(self, more: float) -> None:
            nonlocal total
            if self._counts_bytes:
                with lock:
                    total += more
                    on_bytes(int(total))

    return Bar
