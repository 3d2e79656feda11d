"""The drafter's sequential stage: base logits and a vanilla Markov head in, greedy drafts out.

``contract.py`` says what goes in, ``reference.py`` is the maths in torch float64, ``triton.py`` the
kernels.
"""
