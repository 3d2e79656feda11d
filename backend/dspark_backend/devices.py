"""Where an engine computes: on the CPU, or on a GPU that is there and can be used."""

from __future__ import annotations

import re

import torch

from dspark_backend.errors import DeviceError, RequestError

_OLDEST = (8, 0)  # compute capability: bfloat16 products


def gpu(name: str | None) -> torch.device | None:
    """The GPU that ``name`` means: ``cuda`` or ``cuda:1``; None for ``cpu`` and where none is
    named.

    Raises:
        RequestError: a name that means neither.
        DeviceError: no such GPU here, or not one that the engine's kernels run on.
    """
    if name is None or name == "cpu":
        return None
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise RequestError(f"device {name!r} is not known; choose cpu, cuda or cuda:N")
    if torch.version.cuda is None:
        raise DeviceError(
            f"device {name!r}: torch {torch.__version__} was built without CUDA; install a CUDA "
            "build of torch, or load the engine on the CPU"
        )
    if not torch.cuda.is_available():
        raise DeviceError(
            f"device {name!r}: torch finds no CUDA device; check that the machine has an NVIDIA "
            "GPU and a driver for it, or load the engine on the CPU"
        )
    index, count = int(match.group(1) or 0), torch.cuda.device_count()
    if index >= count:
        raise DeviceError(f"device {name!r}: there are {count} GPUs here, counted from 0")
    capability = torch.cuda.get_device_capability(index)
    if capability < _OLDEST:
        raise DeviceError(
            f"device {name!r}: {torch.cuda.get_device_name(index)} has compute capability "
            f"{capability[0]}.{capability[1]}, and {_OLDEST[0]}.{_OLDEST[1]} is needed: load the "
            "engine on the CPU"
        )
    return torch.device("cuda", index)
