"""Copies to the host: every tensor as it was, and one wait for all."""

from __future__ import annotations

import pytest
import torch

from dspark_backend.kernels.download import download

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_tensors_arrive_as_they_are_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [
        torch.arange(3, dtype=torch.int32, device=DEVICE),
        torch.randn(2, 3, dtype=torch.float64, device=DEVICE),
        torch.randn(4, 5, device=DEVICE).T,
        torch.arange(7, device=DEVICE)[::2],
        torch.empty(0, 4, device=DEVICE),
        torch.tensor(5, device=DEVICE),
        torch.tensor([True, False, True], device=DEVICE),
    ]
    expected = [tensor.cpu().numpy() for tensor in tensors]
    copies: list[torch.Tensor] = []
    copy = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: copies.append(t) or copy(t))
    for given, right in zip(download(tensors), expected, strict=True):
        assert (given.dtype, given.shape) == (right.dtype, right.shape)
        assert (given == right).all()
    assert len(copies) == 1
    assert download([]) == []
    assert len(copies) == 1
