"""A small run, no option at its default, computed a second time in plain torch."""

import json
from copy import deepcopy

import conftest
import matplotlib
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import main

SEED, SCALING = 7, 2.5 / 3
OPTIONS = {"digit": 4, "rank": 3, "alpha": 2.5, "lora_epochs": 5, "lora_lr": 1.2e-3, "seeds": 2}
WEIGHTS = ["1.weight", "3.weight", "5.weight"]


def network():
    """Fewer hidden units than MNISTClassifier, since the questions train many networks."""
    layers = nn.Linear(784, 60), nn.ReLU(), nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 10)
    return nn.Sequential(nn.Flatten(), *layers)


NETWORK = network()


@pytest.fixture(scope="module")
def splits(mnist):
    return conftest.some(mnist, 12000, 330, 800)  # 330: a bias costs exactly what LoRA does


@pytest.fixture(scope="module")
def run(splits):
    """Run the script on these splits, with some changed options."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "load_mnist", lambda *_: splits)
        patch.setattr(main, "TASKS", {"mirrored": main.TASKS["mirrored"]})
        patch.setattr(main, "MNISTClassifier", network)
        patch.setattr(main, "BFLOAT16", False)  # whose training test_lora looks at

        def run(folder, **changed):
            options = {"seed": SEED, **OPTIONS, **changed, "output_dir": folder}
            main.main([f"--{x.replace('_', '-')}={y}" for x, y in options.items()])
            return json.loads((folder / "metrics.json").read_text())["rows"]

        yield run


@pytest.fixture(scope="module")
def found(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    return folder, run(folder)


def formula(state, lora=(), scale=1.0):
    """The network with the tensors of `state`, and `scale` times B A added to its weights."""

    def forward(images):
        used = dict(state)
        for name in lora:
            A, B = lora[name]
            used[name] = torch.addmm(state[name], B, A, alpha=scale)
        return functional_call(NETWORK, used, images)

    return forward


def fit(forward, tensors, images, labels, lr, epochs=1, batch=128):
    """Train `tensors`, in place, and return `forward`, which reads them."""
    optimizer = torch.optim.Adam([x.requires_grad_() for x in tensors], lr, fused=True)
    generator, batches = torch.Generator().manual_seed(SEED), []
    for _ in range(epochs):
        batches += torch.randperm(len(labels), generator=generator).split(batch)
    for step, some in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / len(batches))
        optimizer.zero_grad()
        cross_entropy(forward(images[some]), labels[some]).backward()
        optimizer.step()
    for tensor in tensors:
        tensor.requires_grad_(False)
    return forward


def new_lora(state, rank):
    lora = {}
    for name in WEIGHTS:
        out, into = state[name].shape
        lora[name] = torch.randn(rank, into) / into**0.5, torch.zeros(out, rank)
    return lora


def fit_lora(state, lora, scale, *how):
    return fit(formula(state, lora, scale), sum(lora.values(), ()), *how)


def right(logits, labels):
    return (logits.argmax(1) == labels).tolist().count(True) / len(labels)


@pytest.fixture(scope="module")
def again(splits):
    """What seed 7 has to find: rows by method and task, and the baseline."""
    (images, labels), validation, test = splits
    rows = {}

    def add(method, logits):
        pairs = list(zip(test.labels.tolist(), logits.argmax(1).tolist()))
        errors = [sum(a == digit != b for a, b in pairs) for digit in range(10)]
        rows[method, None] = {
            "accuracy": right(logits, test.labels),
            "errors": errors,
            "missed": errors[4],
            "false": sum(a != 4 == b for a, b in pairs),
        }

    torch.manual_seed(SEED)
    state = network().state_dict()
    base = fit(formula(state), list(state.values()), images, labels, 2e-3, 1, 256)
    before = base(test.images)
    add("baseline", before)
    chosen = [i for i, label in enumerate(labels.tolist()) if label == 4]
    own = images[chosen], labels[chosen]
    start = new_lora(state, 3)
    lora = deepcopy(start)
    forward = fit_lora(state, lora, SCALING, *own, 1.2e-3, 5)
    add("LoRA", forward(test.images))

    four = torch.arange(10) == 4
    plain, least = base(validation.images), right(forward(validation.images), validation.labels)
    tried = [x / 4 for x in range(80)]
    fair = [x for x in tried if right(plain + x * four, validation.labels) >= least]
    add("one biased logit", before + max(fair) * four)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED)).tolist()
    mixed = [i for i in order if labels[i] == 4]
    mixed += [i for i in order if labels[i] != 4][: 3 * len(mixed)]
    forward = fit_lora(state, start, SCALING, images[mixed], labels[mixed], 1.2e-3, 5, 512)
    add("LoRA + other digits", forward(test.images))

    torch.manual_seed(SEED)
    few = torch.randperm(len(labels))[:100]
    few = images[few].flip(2), labels[few]

    def learn(method, forward):
        accuracy = right(forward(test.images[::4].flip(2)), test.labels[::4])
        rows[method, "mirrored"] = {"accuracy": accuracy}

    learn("baseline", base)
    for rank, hidden in ((1, 1), (4, 5), (16, 20)):
        learn(f"adapter, rank {rank}", fit_lora(state, new_lora(state, rank), 1.0, *few, 1e-2, 40))
        new = nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10))
        fit(new, list(new.parameters()), *few, 2e-3, 200)
        learn(f"new small network, as rank {rank}", new)
    last, copy = deepcopy(state), deepcopy(state)
    learn("last layer alone", fit(formula(last), list(last.values())[-2:], *few, 1e-2, 40))
    learn("copy of the network", fit(formula(copy), list(copy.values()), *few, 1e-3, 40))
    return rows, state


def test_the_rows_are_computed_a_second_time(found, again):
    rows = {(row["seed"], row["method"], row.get("task")): row for row in found[1]}
    for (method, task), wanted in again[0].items():
        row = rows[SEED, method, task]
        assert row | wanted == row, method


def test_what_is_saved_is_of_the_first_seed(found, again):
    folder, _ = found
    saved = torch.load(folder / "baseline.pt")
    assert all(torch.equal(saved[name], tensor) for name, tensor in again[1].items())
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 2.5)


def test_a_second_seed_is_a_run_of_its_own_and_gives_the_same_bytes_twice(
    found, run, tmp_path, monkeypatch
):
    files, checked = [], []
    monkeypatch.setattr(main, "check_lora", lambda *arguments: checked.append(arguments[1]))
    for width in (1, 3):  # whatever the user's own style
        with matplotlib.rc_context({"lines.linewidth": width}):
            rows = run(tmp_path / str(width), seed=8, seeds=1)
        paths = sorted((tmp_path / str(width)).rglob("*.*"))
        files.append({path.name: path.read_bytes() for path in paths})
    assert len(files[0]) == 10 and files[0] == files[1]
    assert rows == [row for row in found[1] if row["seed"] == 8]
    for matrices in main.lora_layers(checked[0]).values():
        assert matrices.lora_B.any()  # it was trained
