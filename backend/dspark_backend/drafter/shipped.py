"""The drafters that come with the package, by the name of the model they draft for."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def shipped_drafter(model: str) -> Path | None:
    """The checkpoint folder of the drafter that ships for ``model``; None where none does."""
    root = Path(str(resources.files("dspark_backend"))) / "drafters"
    folder = root / model
    known = folder.parent == root and (folder / "config.json").is_file()
    return folder if known else None
