"""Who takes part in a run: the model under test, our engine on it, and the peers asked for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar

from dspark_backend.bench.contender import ContenderSpec, Turn
from dspark_backend.bench.errors import BenchError
from dspark_backend.bench.worker import Worker
from dspark_backend.catalog import ModelFiles, ProgressSink, resolve
from dspark_backend.devices import gpu
from dspark_backend.grammar.dialect import Dialect, dialect_for
from dspark_backend.processor import usable_cores
from dspark_backend.request import ForcedMode
from dspark_backend.speculation.signals import Signals
from dspark_backend.tokenizer import Tokenizer

W = TypeVar("W", bound=Worker)

OURS = "dspark_backend.bench.dspark:DSparkContender"
OTHERS = {
    "transformers": "dspark_backend.bench.peers.transformers:TransformersPeer",
    "transformers-static": "dspark_backend.bench.peers.transformers:StaticTransformersPeer",
    "llama-cpp": "dspark_backend.bench.peers.llama_cpp:LlamaCppPeer",
}
TOKEN_BY_TOKEN = "token-by-token"
# Our own engine beside itself: without speculation (and without forced spans), or drafting as
# engines without agents do.
OURSELVES = (TOKEN_BY_TOKEN, "plain", "fixed", "threshold", "prefix_throughput")
PEERS = (*OTHERS, *OURSELVES)
_CONTEXT_STEP = 256
_WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Subject:
    """The model under test, as this process needs it: to write prompts and to read answers."""

    model: str
    files: ModelFiles
    tokenizer: Tokenizer
    dialect: Dialect

    @classmethod
    def of(cls, model: str, progress: ProgressSink | None = None) -> Subject:
        """Fetches and converts ``model`` if need be."""
        files = resolve(model, progress=progress)
        tokenizer = files.tokenizer()
        return cls(model, files, tokenizer, dialect_for(tokenizer, files.config))


@dataclass(frozen=True, slots=True)
class Terms:
    """Who takes part, and how. ``threads`` are equal for all, ``None`` takes the usable cores;
    ``precision``, ``speculation``, ``drafter`` and ``policy`` (a budget policy's name) are our
    engine's; ``device`` is the GPU that all run on, None for the CPU."""

    precision: str | None = None
    threads: int | None = None
    peers: tuple[str, ...] = ()
    speculation: bool = False
    drafter: Path | None = None
    policy: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        """Raises BenchError for terms that contradict each other, DeviceError for a GPU that is not
        there."""
        gpu(self.device)
        unknown = [peer for peer in self.peers if peer not in PEERS]
        if unknown:
            raise BenchError(f"unknown peer {unknown[0]!r}: choose from {', '.join(PEERS)}")
        if self.threads is not None and self.threads < 1:
            raise BenchError(f"threads must be at least 1, not {self.threads}")
        elsewhere = "transformers-static" if self.device in (None, "cpu") else "llama-cpp"
        if elsewhere in self.peers:
            where = "a GPU: name it with --device" if "static" in elsewhere else "the CPU only here"
            raise BenchError(f"the peer {elsewhere!r} runs on {where}")
        if self.drafter is not None and not self.speculation:
            raise BenchError("a drafter drafts only with speculation on")
        if self.policy is not None and not self.speculation:
            raise BenchError("a policy decides about nothing unless speculation is on")

    @property
    def switch(self) -> Literal["on", "off"]:
        """Speculation as the reports spell it."""
        return "on" if self.speculation else "off"


class Lineup:
    """The contenders' processes, loaded and warmed up; a context manager."""

    def __init__(self, subject: Subject, terms: Terms, context: int) -> None:
        self.threads = terms.threads or usable_cores()
        spec = contender_spec(subject, terms, context)
        with ExitStack() as stack:
            # Peers first: what keeps one of them from taking part shows within a second.
            self.peers = {name: stack.enter_context(_peer(name, spec)) for name in terms.peers}
            self.ours = stack.enter_context(Worker("dspark", OURS, spec))
            warm_up(subject, self.all)
            self._stack = stack.pop_all()

    @property
    def all(self) -> Sequence[Worker]:
        """Ours first, then the peers as they were asked for."""
        return [self.ours, *self.peers.values()]

    def order(self, index: int) -> list[Worker]:
        """Who goes when on prompt ``index``: each in turn goes first, so that a drift of the
        machine's clock is nobody's advantage."""
        return in_turn(self.all, index)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def contender_spec(subject: Subject, terms: Terms, context: int) -> ContenderSpec:
    """What our engine is to load on these terms, with room for ``context`` tokens.

    Raises BenchError when the model has no room for that many.
    """
    return ContenderSpec(
        model=subject.model,
        folder=subject.files.folder,
        gguf=subject.files.gguf,
        dialect=subject.dialect.name,
        end_token_ids=tuple(subject.tokenizer.eos_token_ids),
        precision=terms.precision,
        threads=terms.threads or usable_cores(),
        max_context=_rounded(context, subject.files.config.max_position_embeddings),
        speculation=terms.speculation,
        drafter=terms.drafter,
        policy=terms.policy,
        device=terms.device,
    )


def plain_spec(spec: ContenderSpec) -> ContenderSpec:
    """The same engine without speculation."""
    return replace(spec, speculation=False, drafter=None, policy=None)


def token_by_token_spec(spec: ContenderSpec) -> ContenderSpec:
    """Plain decoding with a pass for every token, also for those that the grammar determines: what
    published speed-ups of constrained steps are over."""
    return replace(plain_spec(spec), forced=ForcedMode.OFF)


def drafting_spec(spec: ContenderSpec, policy: str) -> ContenderSpec:
    """The same engine verifying its drafter's blocks alone, as engines without agents do."""
    return replace(spec, speculation=True, policy=policy, signals=Signals.drafts_alone())


def warm_up(subject: Subject, workers: Sequence[Worker]) -> None:
    """A few tokens of each, so that nobody's first pass is measured."""
    tokens = tuple(subject.tokenizer.encode("Count from one to ten."))
    for worker in workers:
        worker.start()
        worker.turn(Turn(tokens=tokens, max_new_tokens=_WARM_UP_TOKENS))


def in_turn(workers: Sequence[W], index: int) -> list[W]:
    """``workers`` from number ``index`` on, and round."""
    start = index % len(workers)
    return [*workers[start:], *workers[:start]]


def _peer(name: str, spec: ContenderSpec) -> Worker:
    if name == "plain":
        return Worker(name, OURS, plain_spec(spec))
    if name == TOKEN_BY_TOKEN:
        return Worker(name, OURS, token_by_token_spec(spec))
    if name in OURSELVES:
        return Worker(name, OURS, drafting_spec(spec, name))
    return Worker(name, OTHERS[name], spec)


def _rounded(context: int, most: int) -> int:
    """``context`` rounded up to a whole number of steps, as far as the model reaches.

    Raises BenchError when the longest conversation does not fit.
    """
    if context > most:
        raise BenchError(
            f"the longest prompt needs {context} tokens; the model has room for {most}"
        )
    return min(most, -(-context // _CONTEXT_STEP) * _CONTEXT_STEP)
