"""Benchmarks: decoding, steps and quality, ours beside peers within one run."""
