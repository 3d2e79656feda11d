"""The shape of a target model, read from a checkpoint's ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from dspark_backend.errors import ModelFormatError
from dspark_backend.tokenizer import end_of_turn_ids

Family = Literal["llama", "qwen2", "qwen3"]

FAMILIES: tuple[Family, ...] = ("llama", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3")

# Far above any real decoder, far below what would make an allocation dangerous.
_MAX_DIMENSION = 1 << 24
_MAX_LAYERS = 4096


@dataclass(frozen=True)
class TargetConfig:
    """One decoder's hyper-parameters, under the names that Hugging Face configs use.

    ``rope_scaling`` is None for plain RoPE, else a mapping whose ``rope_type`` is ``"linear"``
    or ``"llama3"``. ``attention_bias`` says that q, k and v have biases (and o too, but not in
    the qwen2 family). ``raw`` is the whole ``config.json``.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    raw: Mapping[str, Any]

    @classmethod
    def from_folder(cls, folder: Path) -> TargetConfig:
        """Read ``config.json`` of ``folder``; end tokens of ``generation_config.json`` win.

        Raises:
            ModelFormatError: no readable config, or one of a model that this engine cannot run.
        """
        path = folder / "config.json"
        try:
            raw = json.loads(path.read_text("utf-8"))
        except FileNotFoundError as error:
            raise ModelFormatError(
                f"{folder} has no config.json: give the folder of a Hugging Face checkpoint"
            ) from error
        except (OSError, ValueError) as error:
            raise ModelFormatError(f"{path} is not readable JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ModelFormatError(f"{path} holds no JSON object")
        return cls.from_dict({**raw, "eos_token_id": list(end_of_turn_ids(folder))})

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> TargetConfig:
        """Check a config and take what the decoder needs.

        Raises:
            ModelFormatError: the family or one of its options is not supported, or a field is
                missing or absurd; the message names the field.
        """
        family = _family(d)
        _refuse_unsupported(d, family)
        num_heads = _dimension(d, "num_attention_heads")
        hidden_size = _dimension(d, "hidden_size")
        head_dim = _head_dim(d, family, hidden_size, num_heads)
        num_kv_heads = _dimension(d, "num_key_value_heads", default=num_heads)
        if num_heads % num_kv_heads:
            raise ModelFormatError(
                f"config.json: num_attention_heads {num_heads} is not a multiple of "
                f"num_key_value_heads {num_kv_heads}"
            )
        rope_theta, rope_scaling = _rope(d)
        vocab_size = _dimension(d, "vocab_size")
        return cls(
            family=family,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=_dimension(d, "intermediate_size"),
            num_layers=_dimension(d, "num_hidden_layers", most=_MAX_LAYERS),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_number(d, "rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=_dimension(d, "max_position_embeddings", default=2048),
            tie_word_embeddings=bool(d.get("tie_word_embeddings", False)),
            attention_bias=family == "qwen2" or bool(d.get("attention_bias", False)),
            eos_token_ids=tuple(i for i in _ids(d, "eos_token_id") if i < vocab_size),
            bos_token_id=next(iter(_ids(d, "bos_token_id")), None),
            raw=dict(d),
        )


def _family(d: Mapping[str, Any]) -> Family:
    name = d.get("model_type")
    if name not in FAMILIES:
        raise ModelFormatError(
            f"config.json: model_type {name!r} is not supported; this engine runs "
            + ", ".join(FAMILIES)
        )
    return cast(Family, name)


def _refuse_unsupported(d: Mapping[str, Any], family: Family) -> None:
    """Options that change the arithmetic in a way our decoder does not know are refused."""
    layer_types = d.get("layer_types") or []
    refused: dict[str, bool] = {
        "use_sliding_window": bool(d.get("use_sliding_window")),
        "layer_types": not isinstance(layer_types, list)
        or any(kind != "full_attention" for kind in layer_types),
        "quantization_config": d.get("quantization_config") is not None,
        "hidden_act": d.get("hidden_act", "silu") not in ("silu", "swish"),
        "mlp_bias": family == "llama" and bool(d.get("mlp_bias")),
        "num_experts": bool(d.get("num_experts") or d.get("num_local_experts")),
        "partial_rotary_factor": d.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0),
    }
    for name, bad in refused.items():
        if bad:
            raise ModelFormatError(
                f"config.json: {name} = {d.get(name)!r} is not supported for {family} models"
            )


def _head_dim(d: Mapping[str, Any], family: Family, hidden_size: int, num_heads: int) -> int:
    implied: int | None = None
    if family == "qwen3":
        implied = 128  # the family's default; Qwen3 does not tie it to hidden_size
    elif hidden_size % num_heads == 0:
        implied = hidden_size // num_heads
    elif d.get("head_dim") is None:
        raise ModelFormatError(
            f"config.json: hidden_size {hidden_size} is not a multiple of "
            f"num_attention_heads {num_heads}, and there is no head_dim"
        )
    head_dim = _dimension(d, "head_dim", default=implied)
    if head_dim % 2:
        raise ModelFormatError(f"config.json: head_dim {head_dim} is odd; RoPE needs pairs")
    return head_dim


def _rope(d: Mapping[str, Any]) -> tuple[float, Mapping[str, Any] | None]:
    """Both spellings: ``rope_parameters`` (transformers 5) and ``rope_theta``/``rope_scaling``."""
    parameters = d.get("rope_parameters") or {}
    scaling = d.get("rope_scaling") or parameters
    for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if not isinstance(value, Mapping):
            raise ModelFormatError(f"config.json: {name} must be an object, not {value!r}")
    source = parameters if "rope_theta" in parameters else d
    theta = _number(source, "rope_theta", 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ModelFormatError(
            f"config.json: rope_scaling type {kind!r} is not supported; known are "
            + ", ".join(ROPE_TYPES)
        )
    if kind == "default":
        return theta, None
    needed = ["factor"]
    if kind == "llama3":
        needed += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    values = {name: _number(scaling, name, None) for name in needed}
    return theta, {"rope_type": kind, **values}


def _dimension(
    d: Mapping[str, Any], name: str, *, default: int | None = None, most: int = _MAX_DIMENSION
) -> int:
    value = d.get(name)
    if value is None:
        value = default
    if value is None:
        raise ModelFormatError(f"config.json: {name} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        raise ModelFormatError(f"config.json: {name} = {value!r} is not an integer in 1..{most}")
    return value


def _number(d: Mapping[str, Any], name: str, default: float | None) -> float:
    value = d.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise ModelFormatError(f"config.json: {name} = {value!r} is not a positive number")
    return float(value)


def _ids(d: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """A token id, a list of them, or nothing."""
    value = d.get(name)
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    for item in values:
        if isinstance(item, bool) or not isinstance(item, int) or item < 0:
            raise ModelFormatError(f"config.json: {name} = {value!r} is not a token id")
    return tuple(values)
