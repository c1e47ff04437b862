"""A small run, no option at its default, computed a second time in plain torch."""

import json
from copy import deepcopy

import conftest
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import main

OPTIONS = ["--digit=4", "--rank=3", "--alpha=2.5", "--lora-epochs=5", "--lora-lr=1.2e-3"]
SEED = 7


def network():
    """Fewer hidden units than MNISTClassifier, since the questions train many networks."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 60), nn.ReLU(), nn.Linear(60, 10))


@pytest.fixture(scope="module")
def splits(mnist):
    return conftest.some(mnist, 12000, 330, 800)  # 330: a bias costs exactly what LoRA does


@pytest.fixture(scope="module")
def found(splits, tmp_path_factory):
    """A folder, the rows of a run of seed 8 alone, and those of seeds 7 and 8, left in it."""
    folder = tmp_path_factory.mktemp("out")
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "load_mnist", lambda *_: splits)
        patch.setattr(main, "TASKS", {"mirrored": main.TASKS["mirrored"]})
        patch.setattr(main, "MNISTClassifier", network)
        patch.setattr(main, "BFLOAT16", False)  # whose training test_lora looks at
        patch.setattr("matplotlib.figure.Figure.savefig", lambda *_: None)  # it takes most time
        for seeds in (["--seed=8"], ["--seed=7", "--seeds=2"]):
            main.main([*OPTIONS, f"--output-dir={folder}", *seeds])
            rows.append(json.loads((folder / "metrics.json").read_text())["rows"])
    return folder, *rows


def fit(start, split, lr, epochs, batch):
    """Train in plain torch what is not frozen of a copy."""
    model = deepcopy(start)
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)  # skips what is frozen
    generator = torch.Generator().manual_seed(SEED)
    batches = []
    for _ in range(epochs):
        batches += torch.randperm(len(split.labels), generator=generator).split(batch)
    for step, some in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / len(batches))
        optimizer.zero_grad()
        cross_entropy(model(split.images[some]), split.labels[some]).backward()
        optimizer.step()
    return model


@torch.no_grad()
def cut(base, full, rank):
    """The network with each weight's change cut by an exact SVD, and the shares of its ranks."""
    near = deepcopy(base)
    shares = []
    for name in "13":
        weight = near.get_submodule(name).weight
        change = (full.get_submodule(name).weight - weight).double()
        U, S, V = torch.linalg.svd(change, full_matrices=False)
        weight += (U[:, :rank] * S[:rank] @ V[:rank]).float()
        shares.append([(S[:r].norm() / S.norm()).item() ** 2 for r in (1, 2, 4, 8, 16)])
    return near, np.array(shares)


def right(forward, split):
    return main.accuracy(forward(split.images), split)


@pytest.fixture(scope="module")
def again(splits):
    """What seed 7 has to find: rows by method and task, shares, and the baseline."""
    train, validation, test = splits
    rows = {}
    shares = {}

    def add(method, forward, stored):
        pairs = zip(test.labels.tolist(), forward(test.images).argmax(1).tolist())
        wrong = [(label, said) for label, said in pairs if label != said]
        errors = [[label for label, _ in wrong].count(digit) for digit in range(10)]
        rows[method, None] = {
            "accuracy": 100 - len(wrong) / 8,
            "errors": errors,
            "missed": errors[4],
            "false": [said for _, said in wrong].count(4),
            "stored": stored,
        }

    torch.manual_seed(SEED)
    base = fit(network(), train, 2e-3, 1, 256)
    fours = train.labels == 4
    own = train.some(fours)
    lora = fit(main.attach_lora(deepcopy(base), 3, 2.5), own, 1.2e-3, 5, 128)
    add("baseline", base, 0)
    add("LoRA", lora, 2742)
    add("LoRA, off", base, 2742)
    least = right(lora, validation)
    for strength in (0.2, 0.4, 0.6, 0.8):
        add(f"LoRA at strength {strength}", main.set_strength(lora, strength), 2742)

    def biased(bias):
        return lambda images: base(images) + bias * (torch.arange(10) == 4)

    for bias in range(1, 7):
        add(f"bias of {bias}", biased(bias), 1)
    fair = [x / 4 for x in range(80) if right(biased(x / 4), validation) >= least]
    add("one biased logit", biased(max(fair)), 1)

    torch.manual_seed(SEED)
    others = (~fours).nonzero()[:, 0]
    fours[others[torch.randperm(len(others))[: 3 * len(own.labels)]]] = True
    lora = main.attach_lora(deepcopy(base), 3, 2.5)
    add("LoRA + other digits", fit(lora, train.some(fours), 1.2e-3, 5, 512), 2742)

    torch.manual_seed(SEED)
    every = train.some(torch.randperm(12000)[: len(own.labels)])
    for name, split in (("full fine-tuning", own), ("full fine-tuning on all digits", every)):
        full = fit(base, split, 6e-5, 1, 128)
        add(name, full, 47710)
        near, shares[name] = cut(base, full, 1)
        if split is own:
            add(f"{name}, cut to rank 1", near, 914)

    torch.manual_seed(SEED)
    few, fourth = train.some(torch.randperm(12000)[:100]), slice(0, None, 4)
    few, choose, seen = (
        split._replace(images=split.images.flip(2))
        for split in (few, validation.some(fourth), test.some(fourth))
    )
    tried = {"baseline": [base]}
    for method, start, rates, epochs in main.ways(base):
        tried[method] = [fit(start, few, lr, epochs, 25) for lr in rates]
    copies = tried["copy of the network"]
    tried["copy, cut to rank 4"] = [cut(base, copy, 4)[0] for copy in copies]
    for method, models in tried.items():
        best = max(models, key=lambda model: right(model, choose))
        rows[method, "mirrored"] = {"accuracy": right(best, seen)}
    return rows, shares, base.state_dict()


def test_the_rows_are_computed_a_second_time_and_the_next_seed_is_a_run_of_its_own(found, again):
    (folder, alone, both), (wanted, shares, base) = found, again
    assert alone == [row for row in both if row["seed"] == 8]
    rows = {(x["method"], x.get("task")): x for x in both if x["seed"] == SEED}
    assert rows.keys() == wanted.keys()
    for key, row in rows.items():
        assert row | wanted[key] == row, key
    for method, held in shares.items():
        assert np.array([*rows[method, None]["shares"].values()]) == pytest.approx(held, abs=2e-3)
    torch.testing.assert_close(torch.load(folder / "baseline.pt"), base, rtol=0, atol=0)
