"""transformers ``generate`` in bf16 from the converted weights: the reference implementation."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StaticCache
from transformers.utils import logging

from dspark_backend.bench.contender import ContenderSpec, Loaded, Sample, Turn
from dspark_backend.bench.errors import BenchError
from dspark_backend.metrics import EngineMetrics
from dspark_backend.tokenizer import Tokenizer


class TransformersPeer:
    """``AutoModelForCausalLM.generate`` with its default cache; each turn reads the whole log
    again, since ``generate`` keeps no KV between calls."""

    def __init__(self, spec: ContenderSpec) -> None:
        began = time.perf_counter()
        torch.set_num_threads(spec.threads)
        logging.disable_progress_bar()
        self._end = list(spec.end_token_ids)
        self._tokenizer = Tokenizer(spec.folder)
        self._model: Any = AutoModelForCausalLM.from_pretrained(spec.folder, dtype=torch.bfloat16)
        self._device = torch.device(spec.device or "cpu")
        self._model.eval().to(self._device)
        self._log: list[int] = []
        self.loaded = Loaded(precision="bf16", load_s=time.perf_counter() - began)

    def start(self) -> None:
        self._log = []

    def turn(self, turn: Turn) -> Sample:
        if turn.spec is not None:
            raise BenchError("transformers has no grammar here; use it with `bench decode`")
        self._log.extend(turn.tokens)
        sampled: dict[str, Any] = (
            {"do_sample": True, "temperature": turn.temperature, "top_k": 0, "top_p": 1.0}
            if turn.temperature > 0.0
            else {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        )
        torch.manual_seed(turn.seed)
        ids = torch.tensor([self._log], device=self._device)
        clock = _FirstToken()
        began = time.perf_counter()
        with torch.inference_mode():
            written = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=turn.max_new_tokens,
                eos_token_id=self._end,
                pad_token_id=self._end[0],
                repetition_penalty=1.0,
                streamer=clock,
                **self._cache(),
                **sampled,
            )
        new = written[0, ids.shape[1] :].tolist()
        total_s = time.perf_counter() - began
        metrics = EngineMetrics(
            prefill_new_tokens=len(self._log),
            ttft_s=clock.at - began,
            total_s=total_s,
            new_tokens=len(new),
            cycles=len(new),
        )
        self._log.extend(new)
        text = self._tokenizer.decode([token for token in new if token not in self._end])
        return Sample(tuple(new), text, metrics.ttft_s, total_s, metrics)

    def close(self) -> None:
        self._model = None

    def _cache(self) -> dict[str, Any]:
        """What ``generate`` is told of its cache: nothing, for its default."""
        return {}


class StaticTransformersPeer(TransformersPeer):
    """The same with a static cache as long as any conversation of the run, so that ``generate``
    compiles its decoding pass once, which it does on a GPU."""

    def __init__(self, spec: ContenderSpec) -> None:
        super().__init__(spec)
        self._static = StaticCache(config=self._model.config, max_cache_len=spec.max_context)

    def _cache(self) -> dict[str, Any]:
        self._static.reset()
        return {"past_key_values": self._static}


class _FirstToken:
    """A streamer that notes when the first new token came: ``generate`` hands over the prompt, then
    each token."""

    def __init__(self) -> None:
        self.at = 0.0
        self._calls = 0

    def put(self, value: object) -> None:
        self._calls += 1
        if self._calls == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        """Nothing to flush."""
