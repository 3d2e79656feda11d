"""What must hold on a GPU: the same tokens as on the CPU, with speculation and without, in any
company, and no waiting for the device inside a verification."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dspark_backend.bench.gpu.stages import CheckFailedError, Facts
from dspark_backend.catalog import ModelFiles
from dspark_backend.engine import Engine
from dspark_backend.kernels.recording import Capture, Recordings
from dspark_backend.kernels.verify.contract import Batch, Rule
from dspark_backend.kernels.verify.triton import verify
from dspark_backend.parts import Parts, cpu_parts, device_parts
from dspark_backend.request import AcceptanceRule, SamplingParams, StepRequest
from dspark_backend.scheduler import Limits
from dspark_backend.speculation.policies import Fixed
from dspark_backend.speculation.signals import Signals
from dspark_backend.target.batch import Batch as Pass
from dspark_backend.target.batch import Rows

Texts = list[tuple[int, ...]]

_LETTERS = "start: /[a-z ]{1000,2000}/"

SAMPLINGS = {
    "greedy": SamplingParams(),
    "coupled": SamplingParams(temperature=0.8, seed=7),
    "coupled, cut and penalised": SamplingParams(
        temperature=0.8, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=7
    ),
}


@dataclass(frozen=True, slots=True)
class Trial:
    """A model on ``device``, with a drafter if there is one; ``prompts`` of token ids and how many
    ``tokens`` to write after each."""

    files: ModelFiles
    drafter: Path | None
    device: torch.device
    prompts: Sequence[tuple[int, ...]]
    tokens: int
    kv_bytes: int = 2**29

    @property
    def room(self) -> int:
        """Positions of a session."""
        return max(map(len, self.prompts)) + self.tokens + 64

    def on_device(
        self,
        precision: str,
        drafter: Path | None = None,
        recordings: Recordings | None = None,
        *,
        ahead: bool = False,
    ) -> Parts:
        return device_parts(
            self.files, precision, self.room, drafter, self.device, recordings, ahead=ahead
        )

    def texts(
        self, parts: Parts, sampling: SamplingParams, *, together: bool, drafts: int = 0
    ) -> Texts:
        """What an engine of ``parts`` writes, all prompts at once or one after the other, with
        blocks of ``drafts`` drafts."""
        with self._engine(parts, drafts) as engine:
            return self._written(engine, sampling, together=together)

    def timed(
        self, parts: Parts, sampling: SamplingParams, drafts: int, lark: str | None = None
    ) -> tuple[Texts, float]:
        """What an engine of ``parts`` writes to all prompts at once when it does so for the third
        time, under the grammar ``lark`` where one is given, and the seconds that took."""
        with self._engine(parts, drafts) as engine:
            for _ in range(2):
                self._written(engine, sampling, lark, together=True)
            started = time.perf_counter()
            written = self._written(engine, sampling, lark, together=True)
            return written, time.perf_counter() - started

    def _engine(self, parts: Parts, drafts: int) -> Engine:
        signals = Signals.drafts_alone() if drafts else Signals(copies=False)
        policy = Fixed(drafts)
        return Engine(self.files, parts, 1, self.kv_bytes, Limits(), policy, signals=signals)

    def _written(
        self, engine: Engine, sampling: SamplingParams, lark: str | None = None, *, together: bool
    ) -> Texts:
        grammar = None if lark is None else engine.dialect.compiler.compile_lark(lark)
        steps = [
            StepRequest(prompt, self.tokens, sampling, ignore_eos=True, grammar=grammar)
            for prompt in self.prompts
        ]
        groups = [steps] if together else [[step] for step in steps]
        written: Texts = []
        for group in groups:
            sessions = [engine.open_session() for _ in group]
            handles = [engine.submit(s, r) for s, r in zip(sessions, group, strict=True)]
            written += [handle.result().token_ids for handle in handles]
            for session in sessions:
                session.close()
        return written


def as_on_the_cpu(trial: Trial) -> Facts:
    """Greedy texts in float32, against the CPU's engine in float32."""
    cpu = cpu_parts(trial.files, "fp32", trial.room, None)
    expected = trial.texts(cpu, SAMPLINGS["greedy"], together=False)
    written = trial.texts(trial.on_device("fp32"), SAMPLINGS["greedy"], together=False)
    _same(expected, written, "the CPU", "the device")
    return {"texts": len(written), "tokens": sum(map(len, written))}


def in_any_company(trial: Trial, precision: str = "bf16") -> Facts:
    """Texts of steps that share their passes, against each alone."""
    facts: Facts = {"precision": precision}
    for name, sampling in SAMPLINGS.items():
        alone = trial.texts(trial.on_device(precision), sampling, together=False)
        shared = trial.texts(trial.on_device(precision), sampling, together=True)
        _same(alone, shared, "alone", "together")
        facts[name] = sum(map(len, shared))
    return facts


def with_and_without_speculation(trial: Trial, precision: str = "bf16") -> Facts:
    """Texts with drafts verified, against plain ones; by rejection they only have to come out."""
    if trial.drafter is None:
        raise CheckFailedError(f"no drafter ships for {trial.files.name}: name one")
    facts: Facts = {"precision": precision}
    for name, sampling in SAMPLINGS.items():
        plain = trial.texts(trial.on_device(precision), sampling, together=True)
        fast = trial.on_device(precision, trial.drafter)
        _same(plain, trial.texts(fast, sampling, together=True, drafts=3), "off", "on")
        facts[name] = sum(map(len, plain))
    rejection = SamplingParams(temperature=0.8, seed=7, acceptance=AcceptanceRule.REJECTION)
    fast = trial.on_device(precision, trial.drafter)
    facts["rejection"] = sum(map(len, trial.texts(fast, rejection, together=True, drafts=3)))
    return facts


def bits_of_a_row(trial: Trial, precision: str = "bf16") -> Facts:
    """Logits of a row, alone and among others, bit for bit."""
    target = trial.on_device(precision).target
    storage = target.storage(None, 8 * 256 * target.kv_shape.bytes_per_token)
    prompts = [prompt[:100] for prompt in trial.prompts][:4]
    alone, together = [], []
    for prompt in prompts:
        both = [storage.new(), storage.new()]
        for kv in both:
            kv.reserve(len(prompt))
            target.forward(Pass([Rows(kv, prompt[:-1], 0)]))
            kv.length = len(prompt) - 1
        alone.append(target.forward(Pass([Rows(both[0], prompt[-1:], 1)])).logits[0])
        together.append(Rows(both[1], prompt[-1:], 1))
    shared = target.forward(Pass(together)).logits
    wrong = int((torch.stack(alone) != shared).any(dim=1).sum())
    if wrong:
        raise CheckFailedError(
            f"{wrong} of {len(prompts)} rows have other bits in company than alone"
        )
    return {"precision": precision, "rows": [{"rows compared": len(prompts)}]}


def recorded_steps(trial: Trial, precision: str = "bf16", capture: Capture | None = None) -> Facts:
    """Texts of steps that are replayed as CUDA graphs, plain ones and with drafts, against launched
    ones; and what both take."""
    rows = []
    kinds = [(name, None, 0) for name in SAMPLINGS]
    drafted = [] if trial.drafter is None else [("greedy", trial.drafter, 3)]
    for name, drafter, drafts in (*kinds, *drafted):
        sampling = SAMPLINGS[name]
        launched, launched_s = trial.timed(trial.on_device(precision, drafter), sampling, drafts)
        recordings = Recordings(trial.device, capture)
        parts = trial.on_device(precision, drafter, recordings)
        replayed, replayed_s = trial.timed(parts, sampling, drafts)
        _same(launched, replayed, "launched", "replayed")
        if recordings.counts.failed or not recordings.counts.hits:
            raise CheckFailedError(f"not recorded, or not replayed: {recordings.counts}")
        rows.append(
            {
                "steps": f"{name}, {drafts} drafts",
                "launched_s": launched_s,
                "replayed_s": replayed_s,
                **asdict(recordings.counts),
            }
        )
    return {"precision": precision, "rows": rows}


def steps_ahead(trial: Trial, precision: str = "bf16", capture: Capture | None = None) -> Facts:
    """Texts of cycles that are launched before the last one was read, plain ones and with drafts,
    launched and replayed as CUDA graphs, against synchronous ones; and what both take."""
    kinds: list[tuple[str, Path | None, int]] = [("greedy", None, 0), ("coupled", None, 0)]
    if trial.drafter is not None:
        kinds.append(("greedy", trial.drafter, 3))
    rows = [_ahead(trial, precision, capture, *kind) for kind in kinds]
    return {"precision": precision, "rows": rows}


def guided_steps_ahead(
    trial: Trial, precision: str = "bf16", capture: Capture | None = None
) -> Facts:
    """The same under a grammar that never says what comes next: masks are made while the device
    computes what they are for."""
    kinds = [(trial.drafter, 3 if trial.drafter is not None else 0), (None, 0)]
    rows = [_ahead(trial, precision, capture, "coupled", *kind, _LETTERS) for kind in kinds]
    return {"precision": precision, "rows": rows}


def _ahead(
    trial: Trial,
    precision: str,
    capture: Capture | None,
    name: str,
    drafter: Path | None,
    drafts: int,
    lark: str | None = None,
) -> Facts:
    sampling = SAMPLINGS[name]
    last, last_s = trial.timed(trial.on_device(precision, drafter), sampling, drafts, lark)
    row: Facts = {"steps": f"{name}, {drafts} drafts", "synchronous_s": last_s}
    for kind, recordings in (("ahead", None), ("replayed", Recordings(trial.device, capture))):
        parts = trial.on_device(precision, drafter, recordings, ahead=True)
        written, row[f"{kind}_s"] = trial.timed(parts, sampling, drafts, lark)
        _same(last, written, "synchronous", kind)
        if parts.flights is None or not parts.flights.cycles:
            raise CheckFailedError("no cycle was launched ahead")
        if recordings is not None and not recordings.counts.hits:
            raise CheckFailedError(f"nothing was replayed: {recordings.counts}")
    return row


def never_waits(device: torch.device, vocab: int = 50_000) -> Facts:
    """A verification, between its tensors and its verdict, does not wait for the device."""
    rules = torch.tensor([Rule.GREEDY, Rule.COUPLED, Rule.REJECTION], device=device).int()
    four = torch.arange(3, device=device)
    batch = Batch(
        logits=torch.randn(12, vocab, device=device),
        offsets=torch.tensor([0, 4, 8, 12], dtype=torch.int32, device=device),
        drafts=torch.zeros(12, dtype=torch.int32, device=device),
        rules=rules,
        temperatures=torch.ones(3, device=device),
        seeds=four,
        positions=four,
        longest=4,
    )
    verify(batch)  # compiles
    _without_waiting(device, lambda: verify(batch))
    return {"vocabulary": vocab}


def _without_waiting(device: torch.device, run: Callable[[], object]) -> None:
    if device.type != "cuda":
        run()
        return
    torch.cuda.synchronize(device)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        raise CheckFailedError(f"the host waited for the device: {error}") from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _same(expected: Texts, written: Texts, one: str, other: str) -> None:
    for number, (a, b) in enumerate(zip(expected, written, strict=True)):
        if a != b:
            first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
            raise CheckFailedError(
                f"text {number} parts at token {first} of {len(a)}: {one} {a[first : first + 3]}, "
                f"{other} {b[first : first + 3]}"
            )
