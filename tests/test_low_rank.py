"""Chapter "Low rank"."""

from __future__ import annotations

import pytest
import torch

import main


def test_a_matrix_of_rank_2_is_40_numbers_instead_of_100() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(10, 2, generator=generator), torch.randn(2, 10, generator=generator)
    W = left @ right
    B, A, _ = main.factorize(W, rank=2)
    assert B.numel() + A.numel() == 40
    x = torch.randn(10, generator=generator)
    torch.testing.assert_close(B @ (A @ x), W @ x, atol=1e-5, rtol=1e-5)
    # B carries the singular values, so that the rows of A are of length 1
    torch.testing.assert_close(A @ A.T, torch.eye(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9)])
@pytest.mark.parametrize("rank", [1, 2, 5, 7])
def test_the_error_is_the_tail_of_the_singular_values(shape: tuple[int, int], rank: int) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(rank))
    B, A, singular_values = main.factorize(W, rank)
    assert B.shape == (shape[0], rank)
    assert A.shape == (rank, shape[1])
    tail = torch.linalg.svdvals(W)[rank:].square().sum()
    torch.testing.assert_close((W - B @ A).square().sum(), tail, atol=1e-4, rtol=1e-4)
    kept = 1 - tail / W.square().sum()
    assert main.energy_kept(singular_values)[rank - 1] == pytest.approx(kept.item(), abs=1e-5)


def test_the_low_rank_part_of_what_training_added() -> None:
    rank = 2
    torch.manual_seed(0)
    before, after = main.MNISTClassifier(), main.MNISTClassifier()
    model, energy = main.low_rank_part(before, after, rank)
    assert list(energy) == ["linear1", "linear2", "linear3"]
    for name, kept in energy.items():
        layers = [m.get_submodule(name) for m in (before, after, model)]
        W, trained, got = (layer.weight.detach() for layer in layers)
        U, S, Vh = torch.linalg.svd((trained - W).double(), full_matrices=False)
        best = W + (U[:, :rank] * S[:rank] @ Vh[:rank]).float()
        torch.testing.assert_close(got, best, atol=1e-5, rtol=1e-4)
        assert torch.equal(layers[2].bias, layers[0].bias)
        share = S[:rank].square().sum() / S.square().sum()
        assert kept[rank - 1] == pytest.approx(share.item(), abs=1e-5)


def test_energy_by_hand() -> None:
    assert main.energy_kept(torch.tensor([2.0, 1.0, 0.0])) == pytest.approx([0.8, 1, 1])
    assert main.energy_kept(torch.zeros(3)) == [1, 1, 1]


@pytest.mark.parametrize("rank", [0, 4])
def test_a_rank_that_the_matrix_cannot_have(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank}"):
        main.factorize(torch.ones(3, 5), rank)
