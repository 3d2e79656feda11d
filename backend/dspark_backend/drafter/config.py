"""The shape of a drafter, read from and written to its ``config.json`` (DSPARK.md, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.errors import ModelFormatError

_ARCHITECTURES = {
    "llama": "LlamaDSparkModel",
    "qwen2": "Qwen2DSparkModel",
    "qwen3": "Qwen3DSparkModel",
}
_MAX_BLOCK = 64
_MAX_RANK = 1 << 16


class HeadType(StrEnum):
    """The sequential stage: what slot k learns of the drafts before it. ``none`` is DFlash."""

    NONE = "none"
    VANILLA = "vanilla"
    GATED = "gated"
    RNN = "rnn"


@dataclass(frozen=True)
class DrafterConfig:
    """A drafter's hyper-parameters.

    ``shape`` is the target's config with ``num_layers`` set to the number of *draft* layers: width,
    heads, vocabulary and RoPE are the target's. ``target_layer_ids`` are the tapped layers,
    ascending; -1 is the embedding output. ``block_size`` inputs give as many drafts.
    ``markov_rank`` is 0 iff ``head`` is ``none``. ``confidence_with_markov`` says that the
    confidence head reads ``[h ; W1[x]]`` and not ``h`` alone. ``draft_vocab_size`` is None where
    the drafter speaks the whole vocabulary.
    """

    shape: TargetConfig
    num_target_layers: int
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    head: HeadType = HeadType.VANILLA
    markov_rank: int = 256
    confidence: bool = True
    confidence_with_markov: bool = True
    draft_vocab_size: int | None = None

    def __post_init__(self) -> None:
        """Raises ModelFormatError for settings that contradict each other."""
        ids = self.target_layer_ids
        vocab = self.shape.vocab_size
        size = self.draft_vocab_size
        wrong = {
            f"block_size {self.block_size} is not in 1..{_MAX_BLOCK}": not (
                1 <= self.block_size <= _MAX_BLOCK
            ),
            f"mask_token_id {self.mask_token_id} is no row of an embedding of {vocab}": not (
                0 <= self.mask_token_id < vocab
            ),
            "target_layer_ids is empty": not ids,
            f"target_layer_ids {list(ids)} are not ascending": list(ids) != sorted(set(ids)),
            f"target_layer_ids {list(ids)} do not lie in -1..{self.num_target_layers - 2}, the "
            "layers whose output is not normed": any(
                not -1 <= i <= self.num_target_layers - 2 for i in ids
            ),
            f"markov_rank {self.markov_rank} does not go with markov_head_type "
            f"{self.head.value!r}": (self.head is HeadType.NONE) != (self.markov_rank == 0)
            or not 0 <= self.markov_rank <= _MAX_RANK,
            "confidence_head_with_markov needs a Markov head": self.confidence
            and self.confidence_with_markov
            and self.head is HeadType.NONE,
            f"draft_vocab_size {size} is not in 1..{vocab}": size is not None
            and not 1 <= size <= vocab,
        }
        for what, bad in wrong.items():
            if bad:
                raise ModelFormatError(f"drafter config: {what}")

    @property
    def feature_size(self) -> int:
        """Width of a position's context feature: the tapped layers side by side."""
        return len(self.target_layer_ids) * self.shape.hidden_size

    @property
    def output_size(self) -> int:
        """How many tokens the drafter can say."""
        return self.draft_vocab_size or self.shape.vocab_size

    @property
    def confidence_size(self) -> int:
        """How wide the confidence head's input is."""
        return self.shape.hidden_size + (self.markov_rank if self.confidence_with_markov else 0)

    @classmethod
    def for_target(
        cls,
        target: TargetConfig,
        *,
        num_layers: int,
        block_size: int,
        mask_token_id: int,
        target_layer_ids: tuple[int, ...],
        head: HeadType = HeadType.VANILLA,
        markov_rank: int = 64,
        confidence: bool = True,
        draft_vocab_size: int | None = None,
    ) -> DrafterConfig:
        """A drafter for ``target``; ``markov_rank`` is not looked at where the head is ``none``.

        Raises ModelFormatError for settings that do not go together.
        """
        if num_layers < 1:
            raise ModelFormatError(f"a drafter has at least one layer, not {num_layers}")
        raw = {**target.raw, "num_hidden_layers": num_layers}
        raw.pop("layer_types", None)
        rank = 0 if head is HeadType.NONE else markov_rank
        return cls(
            shape=TargetConfig.from_dict(raw),
            num_target_layers=target.num_layers,
            block_size=block_size,
            mask_token_id=mask_token_id,
            target_layer_ids=target_layer_ids,
            head=head,
            markov_rank=rank,
            confidence=confidence,
            confidence_with_markov=confidence and rank > 0,
            draft_vocab_size=draft_vocab_size,
        )

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> DrafterConfig:
        """Read a published or an own ``config.json``.

        Raises ModelFormatError naming the field that is missing or wrong.
        """
        shape = TargetConfig.from_dict(d)
        rank = _integer(d, "markov_rank", default=0)
        kind = d.get("markov_head_type") or ("vanilla" if rank else "none")
        if kind not in list(HeadType):
            raise ModelFormatError(
                f"drafter config: markov_head_type {kind!r} is not known; known are "
                + ", ".join(HeadType)
            )
        head = HeadType(kind) if rank else HeadType.NONE
        ids = d.get("target_layer_ids")
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise ModelFormatError(
                f"drafter config: target_layer_ids = {ids!r} is no list of layer numbers; is this "
                "a drafter's checkpoint?"
            )
        confidence = bool(d.get("enable_confidence_head", False))
        size = d.get("draft_vocab_size")
        return cls(
            shape=shape,
            num_target_layers=_integer(d, "num_target_layers"),
            block_size=_integer(d, "block_size"),
            mask_token_id=_integer(d, "mask_token_id"),
            target_layer_ids=tuple(ids),
            head=head,
            markov_rank=0 if head is HeadType.NONE else rank,
            confidence=confidence,
            confidence_with_markov=confidence and bool(d.get("confidence_head_with_markov", False)),
            draft_vocab_size=None if size is None else _integer(d, "draft_vocab_size"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The ``config.json``: the target's own fields and the drafter's."""
        d = dict(self.shape.raw)
        d.update(
            architectures=[_ARCHITECTURES[self.shape.family]],
            num_hidden_layers=self.shape.num_layers,
            num_target_layers=self.num_target_layers,
            layer_types=["full_attention"] * self.shape.num_layers,
            tie_word_embeddings=False,
            block_size=self.block_size,
            mask_token_id=self.mask_token_id,
            target_layer_ids=list(self.target_layer_ids),
            markov_rank=self.markov_rank,
            markov_head_type=self.head.value,
            enable_confidence_head=self.confidence,
            confidence_head_with_markov=self.confidence_with_markov,
        )
        if self.draft_vocab_size is not None:
            d["draft_vocab_size"] = self.draft_vocab_size
        return d

    def check_target(self, target: TargetConfig, source: object) -> None:
        """Refuse a target that this drafter was not built for; ``source`` names the drafter.

        Raises ModelFormatError naming every difference.
        """
        pairs = {
            "layers": (self.num_target_layers, target.num_layers),
            "hidden_size": (self.shape.hidden_size, target.hidden_size),
            "vocab_size": (self.shape.vocab_size, target.vocab_size),
        }
        differences = [
            f"{name} {ours} there, {theirs} here"
            for name, (ours, theirs) in pairs.items()
            if ours != theirs
        ]
        if differences:
            raise ModelFormatError(
                f"{source} is a drafter for another target ({'; '.join(differences)}): use one "
                "that was trained for this model, or train one"
            )


def _integer(d: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = d.get(name)
    value = default if value is None else value
    if type(value) is not int:
        raise ModelFormatError(f"drafter config: {name} = {value!r} is not an integer")
    return value
