"""Which rollouts a step trains on: a function of seed and step, so that a resumed run is exact."""

from __future__ import annotations

import hashlib

import torch


def rollouts_of_step(step: int, count: int, per_step: int, seed: int) -> list[int]:
    """Indices into ``count`` rollouts: every epoch is a permutation of its own.

    An epoch's remainder that fills no whole step is left out.
    """
    per_step = min(per_step, count)
    steps_an_epoch = count // per_step
    epoch, place = divmod(step, steps_an_epoch)
    order = torch.randperm(count, generator=generator("order", seed, epoch))
    return order[place * per_step : (place + 1) * per_step].tolist()


def generator(purpose: str, *key: int) -> torch.Generator:
    """Random numbers for one purpose and key, independent of all others."""
    digest = hashlib.sha256(repr((purpose, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
