"""Verification of drafted blocks, and nothing of it on the host.

``contract.py`` says what goes in and comes out, ``reference.py`` is the maths in torch float64,
``triton.py`` the kernels, ``noise.py`` the keyed noise that they share with plain decoding.
"""
