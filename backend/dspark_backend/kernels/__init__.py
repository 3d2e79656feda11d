"""One folder an op: ``reference.py`` is the maths in torch, the oracle; ``cpu.py`` the kernel.

All CPU kernels share one rule: what a row's result is may depend on that row alone, never on how
many rows share the call or how many threads run. Integer accumulation and a fixed order of
floating-point operations per row give it bit for bit, so batching, chunked prefill, prefix re-use
and verification width cannot change a token.
"""
