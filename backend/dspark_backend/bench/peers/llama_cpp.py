"""llama.cpp through its Python binding, on the same GGUF file that our weights came from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from dspark_backend.bench.contender import ContenderSpec, Loaded, Sample, Turn
from dspark_backend.bench.errors import BenchError
from dspark_backend.metrics import EngineMetrics
from dspark_backend.tokenizer import Tokenizer

try:
    from llama_cpp import Llama, LlamaGrammar
except ImportError as error:
    raise BenchError(
        "the llama-cpp peer needs the llama-cpp-python package: pip install 'dspark-agent[bench]'"
    ) from error

from dspark_backend.bench.peers.gbnf import gbnf


class LlamaCppPeer:
    """``Llama.generate`` with the binding's defaults. It keeps the KV of the last prompt and
    re-uses the common prefix, so an agent's later steps prefill only what is new, as ours do."""

    def __init__(self, spec: ContenderSpec) -> None:
        if spec.gguf is None:
            raise BenchError(f"the llama-cpp peer needs a GGUF file; {spec.model} has none")
        began = time.perf_counter()
        self._end = frozenset(spec.end_token_ids)
        self._dialect = spec.dialect
        self._tokenizer = Tokenizer(spec.folder)
        self._llama: Any = Llama(
            str(spec.gguf),
            n_ctx=spec.max_context,
            n_threads=spec.threads,
            n_threads_batch=spec.threads,
            verbose=False,
        )
        self._log: list[int] = []
        self._grammars: dict[str, Any] = {}
        self.loaded = Loaded(
            precision=spec.gguf.stem.rpartition("-")[2].rpartition(".")[2],
            load_s=time.perf_counter() - began,
        )

    def start(self) -> None:
        self._log = []

    def turn(self, turn: Turn) -> Sample:
        self._log.extend(turn.tokens)
        self._llama.set_seed(turn.seed)
        cached = self._cached()
        new: list[int] = []
        began = first = time.perf_counter()
        stream = self._llama.generate(
            self._log,
            temp=turn.temperature,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            repeat_penalty=1.0,
            grammar=self._grammar(turn),
        )
        for token in stream:
            if not new:
                first = time.perf_counter()
            new.append(int(token))
            if token in self._end or len(new) == turn.max_new_tokens:
                break
        total_s = time.perf_counter() - began
        stream.close()
        metrics = EngineMetrics(
            prefill_new_tokens=len(self._log) - cached,
            prefill_cached_tokens=cached,
            ttft_s=first - began,
            total_s=total_s,
            new_tokens=len(new),
            cycles=len(new),
        )
        self._log.extend(new)
        text = self._tokenizer.decode([token for token in new if token not in self._end])
        return Sample(tuple(new), text, metrics.ttft_s, total_s, metrics)

    def close(self) -> None:
        self._llama.close()

    def _cached(self) -> int:
        """How much of the log the binding will find in its KV (at least one token is read)."""
        known: Sequence[int] = self._llama.input_ids[: self._llama.n_tokens].tolist()
        shared = 0
        for ours, theirs in zip(self._log, known, strict=False):
            if ours != theirs:
                break
            shared += 1
        return min(shared, len(self._log) - 1)

    def _grammar(self, turn: Turn) -> Any:
        """The turn's grammar: translated once, parsed by llama.cpp anew in each step."""
        source = None if turn.spec is None else gbnf(turn.spec, self._dialect)
        if source is None:
            return None
        if source not in self._grammars:
            self._grammars[source] = LlamaGrammar.from_string(source, verbose=False)
        return self._grammars[source]
