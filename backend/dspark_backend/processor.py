"""What this machine computes with: what a figure measured on it depends on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_INSTRUCTION_SETS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_int8",
    "amx_bf16",
)


def processor() -> tuple[str, tuple[str, ...]]:
    """Name of the processor, and which of the instruction sets that matter here it has."""
    facts = Path("/proc/cpuinfo")
    if not facts.exists():
        return platform.processor() or platform.machine(), ()
    fields: dict[str, str] = {}
    for line in facts.read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    flags = set(fields.get("flags", "").split())
    name = fields.get("model name", platform.machine())
    return name, tuple(flag for flag in _INSTRUCTION_SETS if flag in flags)


def usable_cores() -> int:
    """Cores that this process may run on: its affinity where the system has one."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
