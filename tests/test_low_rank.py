"""Matrices cut to low rank."""

from __future__ import annotations

import pytest
import torch

import main


@pytest.mark.parametrize("shape", [(20, 28), (28, 20), (9, 9)])
def test_the_error_of_a_cut_is_the_tail_of_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    cuts = main.cut(matrix, [1, 2, 4, 8, 16])
    assert list(cuts) == [1, 2, 4, 8, 16]
    values = torch.linalg.svdvals(matrix)
    for rank, low in cuts.items():
        assert torch.linalg.matrix_rank(low) == min(rank, *shape)
        tail = values[rank:].square().sum()
        torch.testing.assert_close((matrix - low).square().sum(), tail, atol=1e-4, rtol=1e-4)


def test_only_the_change_is_cut_and_into_plain_weights() -> None:
    before, after = main.MNISTClassifier(), main.MNISTClassifier()
    start = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    models = main.cut_change(before, after, [1, 16])
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, start[name])
    for rank in (1, 16):
        for layer in main.LAYERS:
            W, trained = (model.get_parameter(f"{layer}.weight").data for model in (before, after))
            got = models[rank].get_parameter(f"{layer}.weight").data
            U, S, Vh = torch.linalg.svd((trained - W).double(), full_matrices=False)
            best = W + (U[:, :rank] * S[:rank] @ Vh[:rank]).float()
            torch.testing.assert_close(got, best, atol=1e-4, rtol=1e-3)
            bias = models[rank].get_parameter(f"{layer}.bias")
            assert torch.equal(bias, before.get_parameter(f"{layer}.bias"))


def test_the_weight_change_is_a_share_of_the_norm() -> None:
    before = main.MNISTClassifier()
    after = main.attach_lora(main.MNISTClassifier(), rank=1, alpha=1.0)
    after.load_state_dict(
        {
            name.replace("weight", "parametrizations.weight.original"): x
            for name, x in before.state_dict().items()
        },
        strict=False,
    )
    lora = main.lora_layers(after)["linear2"]
    lora.lora_B.data[3, 0] = 2.0
    moved = 2.0 * lora.lora_A.norm() / before.linear2.weight.norm()
    assert main.weight_change(before, after) == pytest.approx([0, moved.item(), 0])
