"""Every device kernel compiles for compute capability 9.0 (H100, H200), which takes no GPU: the
interpreter runs much that the compiler refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROW = {"stride": "i32", "vocab": "i32", "words": "*i32", "mask_of_row": "*i32", "word_count": "i32"}
REQUEST = {"offsets": "*i32", "rules": "*i32", "temperatures": "*fp32", "seeds": "*i64",
           "positions": "*i64"}  # fmt: skip
Q = {"q": "*fp64", "q_of_row": "*i32", "columns": "*i32", "column_count": "i32",
     "is_mapped": "i32"}  # fmt: skip
VERDICT = {"best": "*fp64", "best_id": "*i32", "mass": "*fp32", "peak_and_mass": "*fp64",
           "open_row": "*i32", "drafts": "*i32", "scores": "*fp64", "accepted": "*i32",
           "tokens": "*i32", "blocks": "i32", "longest": "i32"}  # fmt: skip


def kernels(dtype: str) -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Kernel, the types of its arguments, its constants: of a 0.5B model."""
    from dspark_backend.kernels.markov import triton as markov
    from dspark_backend.kernels.norm import triton as norm
    from dspark_backend.kernels.ragged_attention import triton as attention
    from dspark_backend.kernels.rope import triton as rope
    from dspark_backend.kernels.swiglu import triton as swiglu
    from dspark_backend.kernels.verify import triton as verify

    x = "*" + dtype
    made: list[tuple[Any, dict[str, str], dict[str, Any]]] = []
    for adds in (True, False):
        types = {"x": "*fp32", "delta": x, "weight": "*fp32", "out": x, "eps": "fp32"}
        made.append((norm._rms_norm, types, {"ADDS": adds, "WIDTH": 896, "PADDED": 1024}))
    made.append((swiglu._silu_mul, {"gate_up": x, "out": x, "width": "i32"}, {"BLOCK": 1024}))
    for heads, normed in ((14, False), (0, True), (14, True)):
        types = {"qkv": x, "positions": "*i32", "pages": "*i32", "slots": "*i32", "cos": "*fp32",
                 "sin": "*fp32", "q_norm": "*fp32", "k_norm": "*fp32", "eps": "fp32", "q": x,
                 "keys": x, "values": x}  # fmt: skip
        sizes = {"NORMED": normed, "HEADS": heads, "KV_HEADS": 2, "PAGE": 64, "WIDTH": 64,
                 "ALL_HEADS": 32, "HALF": 32}  # fmt: skip
        made.append((rope._rope_append, types, sizes))
    for sight in (0, 1):
        own = {"sums": "*fp32", "peaks": "*fp32", "masses": "*fp32", "offsets": "*i32",
               "starts": "*i32"}  # fmt: skip
        types = own | {"q": x, "keys": x, "values": x, "table": "*i32", "table_stride": "i32",
                       "tiles": "i32", "scale": "fp32"}  # fmt: skip
        sizes = {"SIGHT": sight, "HEADS": 14, "WIDTH": 64, "SPLIT": 256, "PADDED": 64}
        more = {"GROUP": 7, "PAGE": 64, "PAIRS": 64, "KEYS": 64, "UPCAST": False}
        made.append((attention._attend_split, types, sizes | more))
        types = own | {"out": x, "splits": "i32", "longest": "i32"}
        made.append((attention._combine, types, sizes))
    chain = {"keys": "*i64", "anchors": "*i32", "ids": "*i32"}
    for mapped in (True, False):
        types = chain | {"base": x, "w1": x, "w2": x, "words": "*i32", "mask_of_row": "*i32",
                         "word_count": "i32", "requests": "i32", "drafts": "i32", "k": "i32",
                         "size": "i32"}  # fmt: skip
        sizes = {"WIDTH": 256, "BLOCK": 128, "TILE": 16, "STEP": 64, "UPCAST": False}
        made.append((markov._slot, types, {"MAPPED": mapped} | sizes))
    types = chain | {"tokens": "*i32", "slots": "i32"}
    made.append((markov._settle, types, {"MAPPED": True, "TILE": 128}))
    everything = REQUEST | ROW | Q | VERDICT | {"logits": x}
    made.append((verify._scan, everything, {"BLOCK": 4096}))
    made.append((verify._walk, everything, {"COMBINED": 64}))
    made.append((verify._resample, everything, {"BLOCK": 4096}))
    made.append((verify._settle, everything, {"COMBINED": 64}))
    return made


def compile_all(dtype: str) -> None:
    """To machine code; raises what the compiler does."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for kernel, types, constants in kernels(dtype):
        given = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=given, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert compiled.asm["cubin"]
        print("compiled", kernel.__module__, kernel.__name__)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_kernel_compiles_for_a_gpu(dtype: str, tmp_path: Path) -> None:
    """In a process of its own: this one may have been told to interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, __file__, dtype], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("compiled") == 17


if __name__ == "__main__":
    compile_all(sys.argv[1])
