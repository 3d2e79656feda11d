"""Cost tables in the cache folder: one for each machine, model, precision, thread count, drafter.

A cache and no more: whatever is wrong with a file means that it is measured again, and a folder
that cannot be written to means that it will be measured at every load.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from importlib import metadata
from pathlib import Path

from pydantic import ValidationError

from dspark_backend.catalog.home import home
from dspark_backend.errors import RequestError
from dspark_backend.processor import processor, usable_cores
from dspark_backend.speculation.cost_table import SCHEMA_VERSION, Conditions, CostTable

_log = logging.getLogger(__name__)

# What brings the kernels: another version of one of these may run at another speed.
_SOFTWARE = ("dspark-agent", "torch", "numba", "triton")


def conditions_here(
    model: str,
    precision: str,
    threads: int,
    drafter: str | None = None,
    gpu: str | None = None,
) -> Conditions:
    """The conditions on this machine. ``model`` and ``drafter`` are identities of files
    (``ModelFiles.source_sha``, ``folder_identity``); ``gpu`` is the name of the one that computes,
    None where the CPU does."""
    cpu, flags = processor()
    cpu = cpu if gpu is None else f"{cpu} with {gpu}"
    return Conditions(
        cpu=cpu,
        cpu_flags=flags,
        cores=usable_cores(),
        threads=threads,
        software=" ".join(f"{name} {_version(name)}" for name in _SOFTWARE),
        model=model,
        precision=precision,
        drafter=drafter,
    )


def cost_file(conditions: Conditions) -> Path:
    """Where the table for ``conditions`` is kept: with all else that was derived from the model."""
    text = f"{SCHEMA_VERSION} {conditions.model_dump_json()}"
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return home() / "cost" / conditions.model / f"{name}.json"


def read_kept(conditions: Conditions) -> CostTable | None:
    """The table kept for ``conditions``; None where there is none that can be trusted. The log says
    why a file was refused."""
    path = cost_file(conditions)
    try:
        table = CostTable.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        _log.warning("%s is no cost table, measuring again: %s", path, error)
        return None
    if table.conditions is None or table.conditions != conditions:
        _log.warning("%s is a cost table of something else, measuring again: %s", path,
                     _difference(table, conditions))  # fmt: skip
        return None
    return table


def keep(table: CostTable) -> None:
    """Write ``table`` to its place, at once or not at all; a failure is logged, not raised.

    Raises ValueError for a table without conditions, which has no place.
    """
    if table.conditions is None:
        raise ValueError("a cost table without conditions was not measured here: it is not kept")
    path = cost_file(table.conditions)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, work = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(table.model_dump_json(indent=1) + "\n")
            os.replace(work, path)
        except BaseException:
            Path(work).unlink(missing_ok=True)
            raise
    except OSError as error:
        _log.warning("the cost table cannot be kept, the next load measures again: %s", error)


def forget(conditions: Conditions) -> None:
    """Drop the table kept for ``conditions``: cycles have contradicted it for long, and the next
    load measures again. A failure is logged, not raised."""
    try:
        cost_file(conditions).unlink(missing_ok=True)
    except OSError as error:
        _log.warning("a cost table that is out of date cannot be removed: %s", error)


def check_conditions(table: CostTable, conditions: Conditions) -> None:
    """Raises RequestError for a table that was measured under other conditions; one without any is
    taken at its word."""
    if table.conditions is not None and table.conditions != conditions:
        raise RequestError(
            f"the cost table was measured under other conditions ({_difference(table, conditions)})"
            ": leave it out to have one measured here, or take its conditions away to use the "
            "curve all the same"
        )


def _difference(table: CostTable, wanted: Conditions) -> str:
    if table.conditions is None:
        return "it does not say what of"
    return wanted.difference(table.conditions)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
