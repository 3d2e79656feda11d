"""What a device's kernels are compiled for: all of it as an engine loads, none of it in a step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend

from dspark_backend.catalog import resolve
from dspark_backend.drafter.checkpoint import write_drafter
from dspark_backend.engine import Engine
from dspark_backend.kernels.norm.triton import _rms_norm
from dspark_backend.kernels.upload import Mailbox
from dspark_backend.parts import device_parts
from dspark_backend.rehearsal import compile_kernels
from dspark_backend.request import AcceptanceRule, ForcedMode, SamplingParams, StepRequest
from dspark_backend.scheduler import Limits
from dspark_backend.speculation.policies import Fixed
from dspark_backend.speculation.signals import Signals

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REJECTING = SamplingParams(temperature=1.5, seed=1, acceptance=AcceptanceRule.REJECTION)
SAMPLINGS = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=11),
    SamplingParams(temperature=0.7, seed=3, top_k=40, repetition_penalty=1.3, logit_bias={5: 1.0}),
    REJECTING,
]

Variant = tuple[Any, ...]


class Launches:
    """The variants of kernels that launches ask for: Triton compiles one for each. Constants are
    part of a variant, and so is what Triton's own specialisation makes of every other argument."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._into: list[Variant] = []
        kind = type(_rms_norm)
        launch = kind.run

        def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            self._into.append(self._variant(kernel, args, kwargs))
            return launch(kernel, *args, **kwargs)

        monkeypatch.setattr(kind, "run", run)

    def _variant(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
        signature = inspect.signature(kernel.fn)
        given = {k: v for k, v in kwargs.items() if k in signature.parameters}
        options = getattr(kernel, "kwargs", None) or vars(kernel)
        varying = options["do_not_specialize"] or ()
        key: list[Any] = [kernel.fn.__module__, kernel.fn.__name__]
        for name, value in signature.bind(*args, **given).arguments.items():
            if "constexpr" in str(signature.parameters[name].annotation):
                key.append((name, value))
            else:
                special = native_specialize_impl(
                    BaseBackend, value, False, name not in varying, True
                )
                key.append((name, *special))
        return tuple(key)

    @contextmanager
    def during(self) -> Iterator[list[Variant]]:
        self._into = made = []
        yield made
        self._into = []


@pytest.mark.slow
def test_a_step_asks_for_no_kernel_that_loading_did_not_compile(
    make_drafter: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two heads of three: what lies behind a part of an array is not aligned by chance.
    fields = {"head_dim": 24, "num_attention_heads": 6, "num_key_value_heads": 3}
    random = make_drafter("qwen3", draft_vocab=200, **fields)
    write_drafter(tmp_path / "drafter", random.config, random.state, random.d2t)
    files = resolve(str(random.target_folder))
    parts = device_parts(files, "bf16", 512, tmp_path / "drafter", DEVICE, ahead=True)
    launches = Launches(monkeypatch)
    with torch.inference_mode(), launches.during() as warmed:
        compile_kernels(parts.target, parts.drafter, parts.verifier, 1)
    assert {key[0].split(".")[2] for key in warmed} == {
        *("markov", "norm", "ragged_attention", "rope", "swiglu", "verify")
    }
    # The variants that a model needs, whatever is asked of it: few enough to wait for at load.
    assert len(set(warmed)) <= 40
    options = {"signals": Signals.drafts_alone()}
    with (
        launches.during() as asked,
        Engine(files, parts, 1, 2**23, Limits(), Fixed(4), **options) as engine,
    ):
        source = 'start: "call " /[a-z]{2,3}/ " with " /[0-9]{2,3}/ ", stop."'
        grammar = engine.dialect.compiler.compile_lark(source)
        steps = [
            StepRequest(tuple(range(7, 9 + 16 * i)), 4 + i, sampling, ignore_eos=True)
            for i, sampling in enumerate(SAMPLINGS)
        ]
        steps += [
            StepRequest(tuple(range(30, 40)), 7, sampling, grammar, forced=ForcedMode.VERIFY)
            for sampling in (SamplingParams(), REJECTING)
        ]
        # Sixteen in company, and alone: 1 and multiples of 16 are what Triton looks for.
        steps += [StepRequest((5 + i,), 2, ignore_eos=True) for i in range(10)]
        sessions = [engine.open_session() for _ in steps]
        handles = [engine.submit(s, step) for s, step in zip(sessions, steps, strict=True)]
        for handle in handles:
            handle.result(600)
        for sampling in (SamplingParams(), REJECTING):
            with engine.open_session() as session:
                long = StepRequest(tuple(range(20, 90)), 2, sampling, ignore_eos=True)
                engine.step(session, long)
        # Ahead of the host, alone and sixteen in company.
        for count in (1, 16):
            simple = StepRequest((7, 8), 6, SAMPLINGS[1], ignore_eos=True)
            sessions = [engine.open_session() for _ in range(count)]
            for handle in [engine.submit(session, simple) for session in sessions]:
                handle.result(600)
    assert parts.flights is not None
    assert parts.flights.cycles > 4
    assert len(asked) > 5 * len(set(asked))
    assert set(asked) <= set(warmed)


def test_arrays_that_are_uploaded_lie_where_kernels_expect_them() -> None:
    arrays = {
        f"{dtype.__name__}-{size}": np.arange(size).astype(dtype)
        for dtype in (np.int32, np.float64, np.float32, np.int64)
        for size in (0, 1, 3, 4, 5, 17)
    }
    there = Mailbox(arrays, DEVICE).tensors
    assert {name: tensor.tolist() for name, tensor in there.items()} == {
        name: array.tolist() for name, array in arrays.items()
    }
    assert all(tensor.data_ptr() % 16 == 0 for tensor in there.values())
