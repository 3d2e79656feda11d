"""What an engine is made of: the target, its drafter and its verifier, on the CPU or on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dspark_backend.ahead.protocol import Flights
from dspark_backend.catalog import ModelFiles, ProgressSink
from dspark_backend.drafter.drafter import DSparkDrafter
from dspark_backend.drafter.shipped import shipped_drafter
from dspark_backend.errors import DeviceError, RequestError
from dspark_backend.kernels.recording import Recordings
from dspark_backend.sampling.verifier import HostVerifier, Verifier
from dspark_backend.speculation.protocol import Drafter
from dspark_backend.target.load import load_decoder
from dspark_backend.target.precision import Precision, default_precision
from dspark_backend.target.protocol import Target


@dataclass(frozen=True, slots=True)
class Parts:
    """``hardware`` names the GPU that they run on, None for the CPU; ``flights`` run ahead of the
    host there, where that is asked for."""

    target: Target
    verifier: Verifier
    drafter: Drafter | None
    precision: Precision
    hardware: str | None = None
    flights: Flights | None = None


def cpu_parts(
    files: ModelFiles,
    precision: str | None,
    max_context: int,
    drafter: Path | None,
    progress: ProgressSink | None = None,
) -> Parts:
    """Map the weights of ``files`` for sessions of ``max_context`` tokens; ``drafter`` is a
    drafter's folder.

    Raises ModelFormatError for files that do not fit, RequestError for an unknown precision.
    """
    chosen = default_precision(files.name) if precision is None else Precision.parse(precision)
    target = load_decoder(files, chosen, max_context, progress)
    drafting = None if drafter is None else DSparkDrafter.load(drafter, files, max_context)
    return Parts(target, HostVerifier(), drafting, chosen)


def device_parts(
    files: ModelFiles,
    precision: str | None,
    max_context: int,
    drafter: Path | None,
    device: torch.device,
    recordings: Recordings | None = None,
    *,
    ahead: bool = False,
) -> Parts:
    """As :func:`cpu_parts`, on ``device``: a GPU, or the CPU where Triton's interpreter is on, for
    tests. bfloat16 unless ``precision`` says fp32. With ``recordings``, what a step launches is
    recorded there and replayed; ``ahead``, cycles are launched before the last one was read.

    Raises also DeviceError where Triton is not installed, and RequestError for a precision that
    runs on the CPU only.
    """
    chosen = Precision.BF16 if precision is None else Precision.parse(precision)
    dtypes = {Precision.BF16: torch.bfloat16, Precision.FP32: torch.float32}
    if chosen not in dtypes:
        raise RequestError(
            f"precision {chosen.value!r} runs on the CPU; on a GPU choose one of "
            + ", ".join(dtypes)
        )
    try:
        # Here, since Triton is not to be had on every machine that the CPU's engine runs on.
        from dspark_backend.ahead.device import DeviceFlights
        from dspark_backend.drafter.device import DeviceDrafter
        from dspark_backend.sampling.device import DeviceVerifier
        from dspark_backend.target.device_load import load_device_decoder
        from dspark_backend.target.graphs import GraphedDecoder
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise DeviceError(
            f"device {str(device)!r}: the engine's kernels need Triton, which is not installed: "
            "install triton, or load the engine on the CPU"
        ) from error
    decoder = load_device_decoder(files, dtypes[chosen], max_context, device)
    drafting = None if drafter is None else DeviceDrafter.load(drafter, decoder, recordings)
    target = decoder if recordings is None else GraphedDecoder(decoder, recordings)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    flights = DeviceFlights(decoder, drafting, recordings) if ahead else None
    return Parts(target, DeviceVerifier(recordings), drafting, chosen, hardware, flights)


def drafter_folder(
    files: ModelFiles, speculation: bool | None, folder: str | Path | None
) -> Path | None:
    """Where the drafter to use is; None for plain decoding.

    Raises RequestError where ``speculation`` insists on one and there is none.
    """
    if speculation is False:
        return None
    found = shipped_drafter(files.name) if folder is None else Path(folder)
    if found is None and speculation:
        raise RequestError(
            f"no drafter ships for {files.name}: name a drafter's folder, or load with "
            "speculation=None to decode plainly where there is none"
        )
    return found
