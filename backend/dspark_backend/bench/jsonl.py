"""JSON-lines input of the benchmarks: a validated object a line, errors that name the line."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from dspark_backend.bench.errors import BenchError

Row = TypeVar("Row", bound=BaseModel)


def read_rows(path: Path, row: type[Row], limit: int | None = None) -> list[Row]:
    """The first ``limit`` rows of ``path`` as ``row`` objects; blank lines are skipped.

    Raises:
        BenchError: the file cannot be read, a line is no such object, or there is no row at all.
    """
    if limit is not None and limit < 1:
        raise BenchError(f"limit must be at least 1, not {limit}")
    rows: list[Row] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if limit is not None and len(rows) == limit:
                    break
                if line.strip():
                    rows.append(_parse(path, number, line, row))
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"cannot read {path}: {error}") from error
    if not rows:
        raise BenchError(f"{path} holds no rows: expected a JSON object a line")
    return rows


def shipped(folder: str, name: str, ending: str = ".jsonl") -> Path:
    """The file ``name`` as given, or the one of that name that ships in ``folder``.

    A path that exists wins over a shipped name. Raises BenchError naming what ships.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    home = Path(str(resources.files("dspark_backend.bench").joinpath(folder)))
    names = shipped_names(folder, ending)
    if name in names:
        return home / f"{name}{ending}"
    raise BenchError(f"{name}: no such file, and none ships by that name ({', '.join(names)})")


def shipped_names(folder: str, ending: str = ".jsonl") -> list[str]:
    """Names of the files with that ending that ship in ``folder`` of this package, sorted."""
    home = Path(str(resources.files("dspark_backend.bench").joinpath(folder)))
    return sorted(path.stem for path in home.glob(f"*{ending}"))


def _parse(path: Path, number: int, line: str, row: type[Row]) -> Row:
    try:
        return row.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the line"
        raise BenchError(f"{path}, line {number}: {where}: {first['msg']}") from error
