"""Chapter "Low rank"."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import main


def test_a_matrix_of_rank_2_is_40_numbers_instead_of_100() -> None:
    W = torch.randn(10, 2) @ torch.randn(2, 10)
    B, A = main.factorize(W, rank=2)
    assert B.numel() + A.numel() == 40
    torch.testing.assert_close(B @ A, W, atol=1e-5, rtol=1e-5)
    # B carries the singular values, so that the rows of A are of length 1
    torch.testing.assert_close(A @ A.T, torch.eye(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9)])
@pytest.mark.parametrize("rank", [1, 5, 7])
def test_the_error_is_the_tail_of_the_singular_values(shape: tuple[int, int], rank: int) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(rank))
    B, A = main.factorize(W, rank)
    assert (B.shape, A.shape) == ((shape[0], rank), (rank, shape[1]))
    tail = torch.linalg.svdvals(W)[rank:].square().sum()
    torch.testing.assert_close((W - B @ A).square().sum(), tail, atol=1e-4, rtol=1e-4)
    kept = 1 - tail / W.square().sum()
    shares = main.energy_kept(W)
    assert len(shares) == min(shape)
    assert shares[rank - 1] == pytest.approx(kept.item(), abs=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_low_rank_part_of_what_training_added(rank: int) -> None:
    before, after = (nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 9)) for _ in "ab")
    updates = main.weight_updates(before, after)
    model, energy = main.low_rank_part(before, updates, rank), main.update_energy(updates)
    assert list(main.lora_layers(model)) == ["0", "2"]
    assert list(energy) == [1, 2, 4, 8]
    for name in ("0", "2"):
        layers = [m.get_submodule(name) for m in (before, after, model)]
        W, trained, got = (layer.weight.detach() for layer in layers)
        U, S, Vh = torch.linalg.svd((trained - W).double(), full_matrices=False)
        best = W + (U[:, :rank] * S[:rank] @ Vh[:rank]).float()
        torch.testing.assert_close(got, best, atol=1e-5, rtol=1e-4)
        assert torch.equal(layers[2].bias, layers[0].bias)
        shares = S.square().cumsum(0) / S.square().sum()
        for at, kept in energy.items():
            assert kept[name] == pytest.approx(shares[at - 1].item(), abs=1e-5)
    assert not main.lora_layers(before)


def test_energy_by_hand() -> None:
    # as long as its two entries say, in directions of its own
    matrix = torch.tensor([[0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    for W in (matrix, matrix.T):
        assert main.energy_kept(W) == pytest.approx([0.8, 1, 1])
    assert main.energy_kept(torch.zeros(3, 5)) == [1, 1, 1]
