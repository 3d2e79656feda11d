"""What a reader needs to know of the machine before comparing two reports."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib import metadata
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from dspark_backend.devices import gpu
from dspark_backend.processor import processor, usable_cores

_PACKAGES = ("dspark-agent", "torch", "triton", "transformers", "llguidance", "llama-cpp-python")


class HostFacts(BaseModel):
    """The machine and the software of one report. ``cores`` are those this process may use."""

    model_config = ConfigDict(frozen=True)

    system: str
    cpu: str
    cpu_flags: tuple[str, ...]
    cores: int
    gpu: str | None = None
    memory_bytes: int
    python: str
    packages: dict[str, str]


def host_facts(device: str | None = None) -> HostFacts:
    """Reads the facts of this host, and of the GPU ``device`` if one is named; nothing that names
    the machine or its user is among them. Raises DeviceError where there is no such GPU."""
    cpu, flags = processor()
    return HostFacts(
        system=f"{platform.system()} {platform.machine()}",
        cpu=cpu,
        cpu_flags=flags,
        cores=usable_cores(),
        gpu=gpu_facts(device),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        python=platform.python_version(),
        packages=_versions(),
    )


def gpu_facts(device: str | None) -> str | None:
    """Name, memory, compute capability and CUDA version of ``device``; None for the CPU.

    Raises DeviceError where there is no such GPU.
    """
    place = gpu(device)
    if place is None:
        return None
    facts = torch.cuda.get_device_properties(place)
    memory = facts.total_memory / 2**30
    return (
        f"{facts.name}, {memory:.0f} GiB, compute capability {facts.major}.{facts.minor}, "
        f"CUDA {torch.version.cuda}"
    )


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far.

    Linux's ``VmHWM`` rather than ``ru_maxrss``: the latter survives ``exec`` and would count the
    process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
