"""Attention of all requests' new rows over paged keys and values: verification and drafting.

``contract.py`` says what goes in, ``reference.py`` is the maths in torch float64, ``triton.py`` the
kernels.
"""
