"""A small run, no option at its default, computed a second time in plain torch."""

import json
from copy import deepcopy

import conftest
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import main

OPTIONS = {"digit": 4, "rank": 3, "alpha": 2.5, "lora_epochs": 5, "lora_lr": 1.2e-3}
SEED = 7


def network():
    """Fewer hidden units than MNISTClassifier, since the questions train many networks."""
    layers = nn.Linear(784, 60), nn.ReLU(), nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 10)
    return nn.Sequential(nn.Flatten(), *layers)


@pytest.fixture(scope="module")
def splits(mnist):
    return conftest.some(mnist, 12000, 330, 800)  # 330: a bias costs exactly what LoRA does


@pytest.fixture(scope="module")
def run(splits):
    """Run the script on these splits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "load_mnist", lambda *_: splits)
        patch.setattr(main, "TASKS", {"mirrored": main.TASKS["mirrored"]})
        patch.setattr(main, "MNISTClassifier", network)
        patch.setattr(main, "BFLOAT16", False)  # whose training test_lora looks at

        def run(folder, **seeds):
            options = OPTIONS | seeds | {"output_dir": folder}
            main.main([f"--{x.replace('_', '-')}={y}" for x, y in options.items()])
            return json.loads((folder / "metrics.json").read_text())

        yield run


@pytest.fixture(scope="module")
def found(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    return folder, run(folder, seed=SEED, seeds=2)


def fit(model, images, labels, lr, epochs, batch):
    """Train what is not frozen in plain torch."""
    tensors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(tensors, lr, fused=True)
    generator, batches = torch.Generator().manual_seed(SEED), []
    for _ in range(epochs):
        batches += torch.randperm(len(labels), generator=generator).split(batch)
    for step, some in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / len(batches))
        optimizer.zero_grad()
        cross_entropy(model(images[some]), labels[some]).backward()
        optimizer.step()


@torch.no_grad()
def cut(base, full, rank):
    """The network with each weight's change cut by an exact SVD, and the shares of its ranks."""
    near, shares = deepcopy(base), {}
    for name in "135":
        weight = near.get_submodule(name).weight
        change = (full.get_submodule(name).weight - weight).double()
        U, S, V = torch.linalg.svd(change, full_matrices=False)
        weight += (U[:, :rank] * S[:rank] @ V[:rank]).float()
        held = (S.square().cumsum(0) / S.square().sum()).tolist()
        shares[name] = [held[min(r, len(S)) - 1] for r in (1, 2, 4, 8, 16)]
    return near, shares


def right(forward, split):
    return 100 * (forward(split.images).argmax(1) == split.labels).tolist().count(True)


@pytest.fixture(scope="module")
def again(splits):
    """What seed 7 has to find: rows by method and task, shares, and the baseline."""
    train, validation, test = splits
    rows, shares, labels = {}, {}, train.labels

    def add(method, forward, stored):
        pairs = list(zip(test.labels.tolist(), forward(test.images).argmax(1).tolist()))
        errors = [sum(a == digit != b for a, b in pairs) for digit in range(10)]
        rows[method, None] = {
            "accuracy": right(forward, test) / 800,
            "errors": errors,
            "missed": errors[4],
            "false": sum(a != 4 == b for a, b in pairs),
            "stored": stored,
        }

    torch.manual_seed(SEED)
    base = network()
    fit(base, *train, 2e-3, 1, 256)
    own, lora = train.some(labels == 4), main.attach_lora(deepcopy(base), 3, 2.5)
    fit(lora, *own, 1.2e-3, 5, 128)
    add("baseline", base, 0)
    add("LoRA", lora, 3042)
    add("LoRA, off", base, 3042)
    least = right(lora, validation)
    for strength in (0.2, 0.4, 0.6, 0.8):
        add(f"LoRA at strength {strength}", main.set_strength(lora, strength), 3042)

    def biased(bias):
        return lambda images: base(images) + bias * (torch.arange(10) == 4)

    for bias in range(1, 7):
        add(f"bias of {bias}", biased(bias), 1)
    fair = [x / 4 for x in range(80) if right(biased(x / 4), validation) >= least]
    add("one biased logit", biased(max(fair)), 1)

    torch.manual_seed(SEED)
    others = (labels != 4).nonzero().flatten()
    few = others[torch.randperm(len(others))[: 3 * len(own.labels)]].tolist()
    mixed = sorted(few + (labels == 4).nonzero().flatten().tolist())
    lora = main.attach_lora(deepcopy(base), 3, 2.5)
    fit(lora, *train.some(mixed), 1.2e-3, 5, 512)
    add("LoRA + other digits", lora, 3042)

    torch.manual_seed(SEED)
    every = train.some(torch.randperm(len(labels))[: len(own.labels)])
    for name, split in (("full fine-tuning", own), ("full fine-tuning on all digits", every)):
        full = deepcopy(base)
        fit(full, *split, 6e-5, 1, 128)
        add(name, full, 50660)
        near, shares[name] = cut(base, full, 1)
        if split is own:
            add(f"{name}, cut to rank 1", near, 1014)

    torch.manual_seed(SEED)
    few, fourth = train.some(torch.randperm(len(labels))[:100]), slice(0, None, 4)
    few, choose, seen = (
        main.Split(x.images.flip(2), x.labels)
        for x in (few, validation.some(fourth), test.some(fourth))
    )
    adapter, last = main.attach_lora(deepcopy(base), 4, 4.0), deepcopy(base).requires_grad_(False)
    last[5].requires_grad_()
    new = nn.Sequential(nn.Flatten(), nn.Linear(784, 5), nn.ReLU(), nn.Linear(5, 10))
    for method, start, rates, epochs, stored in (
        ("baseline", base, [0.0], 0, 0),
        ("LoRA, rank 4", adapter, [1e-2, 2e-2], 10, 4056),
        ("last layer alone", last, [3e-3, 1e-2], 10, 510),
        ("new small network", new, [3e-3, 5e-3], 50, 3985),
        ("copy of the network", base, [6e-4, 1e-3], 10, 50660),
        ("copy, cut to rank 4", base, [6e-4, 1e-3], 10, 4056),
    ):
        tried = []
        for lr in rates:
            model = deepcopy(start)
            fit(model, *few, lr, epochs, 25)
            tried.append(cut(base, model, 4)[0] if "cut" in method else model)
        best = max(tried, key=lambda model: right(model, choose))
        rows[method, "mirrored"] = {"accuracy": right(best, seen) / 200, "stored": stored}
    return rows, shares, base.state_dict()


def test_the_rows_are_computed_a_second_time(found, again):
    wanted, shares, _ = again
    rows = {(x["method"], x.get("task")): x for x in found[1]["rows"] if x["seed"] == SEED}
    assert rows.keys() == wanted.keys()
    for key, row in rows.items():
        assert row | wanted[key] == row, key
    for method, layers in shares.items():
        for layer, held in layers.items():
            assert rows[method, None]["shares"][layer] == pytest.approx(held, abs=2e-3)


def test_what_is_saved_is_of_the_first_seed(found, again):
    folder, metrics = found
    saved = torch.load(folder / "baseline.pt")
    assert all(torch.equal(saved[name], tensor) for name, tensor in again[2].items())
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 2.5)
    options = {"seed": SEED, "seeds": 2, "device": "cpu", "main_job_only": False}
    assert metrics["config"] == OPTIONS | options


def test_a_second_seed_is_a_run_of_its_own_and_gives_the_same_bytes_twice(found, run, tmp_path):
    files = []
    for folder in (tmp_path / "1", tmp_path / "2"):
        rows = run(folder, seed=8)["rows"]
        files.append({x.name: x.read_bytes() for x in folder.rglob("*.*")})
    assert len(files[0]) == 10 and files[0].keys() == files[1].keys()
    assert [x for x in files[0] if files[0][x] != files[1][x]] == []
    assert rows == [row for row in found[1]["rows"] if row["seed"] == 8]
