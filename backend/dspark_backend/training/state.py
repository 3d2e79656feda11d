"""A training run's state on disk: weights and optimiser, written atomically, without pickle."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dspark_backend.training.errors import TrainingError

_SEP = "|"


def save_state(
    folder: Path,
    step: int,
    settings: dict[str, Any],
    model: nn.Module,
    optimiser: torch.optim.AdamW,
) -> None:
    """Replace ``folder`` by the state after ``step`` steps of a run with ``settings``."""
    tensors = {f"model{_SEP}{name}": p.detach().cpu() for name, p in model.named_parameters()}
    for name, moments in _moments(model, optimiser).items():
        tensors |= {f"{kind}{_SEP}{name}": tensor.cpu() for kind, tensor in moments.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_file({n: t.contiguous() for n, t in tensors.items()}, work / "state.safetensors")
        document = {"step": step, "settings": settings}
        (work / "state.json").write_text(json.dumps(document), encoding="utf-8")
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(work, folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def load_state(
    folder: Path, settings: dict[str, Any], model: nn.Module, optimiser: torch.optim.AdamW
) -> int:
    """Restore what :func:`save_state` wrote; returns the number of steps done, 0 without a state.

    Raises TrainingError for a damaged state, or one of a run with other settings (names them).
    """
    if not (folder / "state.json").exists():
        return 0
    try:
        document = json.loads((folder / "state.json").read_text("utf-8"))
        tensors = load_file(folder / "state.safetensors")
        before, step = document["settings"], int(document["step"])
    except Exception as error:
        raise TrainingError(f"{folder} is damaged ({error!r}): delete it to start anew") from error
    differing = sorted(
        name for name in {*before, *settings} if before.get(name) != settings.get(name)
    )
    if differing:
        details = ", ".join(f"{n} {before.get(n)!r} -> {settings.get(n)!r}" for n in differing)
        raise TrainingError(
            f"{folder} belongs to a run with other settings ({details}): use another folder, or "
            "delete it to start anew"
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_get(tensors, folder, f"model{_SEP}{name}"))
            moments = {
                kind: _get(tensors, folder, f"{kind}{_SEP}{name}").to(parameter.device)
                for kind in ("exp_avg", "exp_avg_sq")
            }
            optimiser.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                **moments,
            }
    return step


def _moments(model: nn.Module, optimiser: torch.optim.AdamW) -> dict[str, dict[str, Tensor]]:
    moments = {}
    for name, parameter in model.named_parameters():
        held = optimiser.state.get(parameter) or {}
        moments[name] = {
            kind: held.get(kind, torch.zeros_like(parameter)) for kind in ("exp_avg", "exp_avg_sq")
        }
    return moments


def _get(tensors: dict[str, Tensor], folder: Path, name: str) -> Tensor:
    if name not in tensors:
        raise TrainingError(f"{folder} lacks {name!r}: delete it to start anew")
    return tensors[name]
