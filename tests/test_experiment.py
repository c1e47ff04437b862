"""A small run, no option at its default, computed a second time in plain torch."""

import io
import json
import math
from contextlib import redirect_stdout
from copy import deepcopy
from types import SimpleNamespace

import conftest
import matplotlib
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

import main

OPTIONS = {"digit": 4, "rank": 3, "alpha": 2.5, "lora_epochs": 5, "lora_lr": 1.6e-3, "seeds": 2}
SEED, SCALING, FULL_LR, FEW = 7, 2.5 / 3, 6e-4, 40
LAYERS = {"linear1": (60, 784), "linear2": (50, 60), "linear3": (10, 50)}


class Small(main.MNISTClassifier):
    """The same with fewer hidden units, since the questions train many networks."""

    def __init__(self):
        nn.Module.__init__(self)
        for name, (out, into) in LAYERS.items():
            self.add_module(name, nn.Linear(into, out))


@pytest.fixture(scope="module")
def splits(mnist):
    return conftest.some(mnist, 12000, 400, 800)


@pytest.fixture(scope="module")
def run(splits):
    """Run the script on these splits, with some changed options."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "load_mnist", lambda folder, device: splits)
        patch.setattr(main, "TASKS", {"mirrored": main.TASKS["mirrored"]})
        patch.setattr(main, "MNISTClassifier", Small)
        patch.setattr(main, "FULL_LR", FULL_LR)
        patch.setattr(main, "IMAGES", FEW)

        def run(folder, *flags, **changed):
            options = {"seed": SEED, **OPTIONS, **changed, "output_dir": folder}
            flags = [*flags, *(f"--{x.replace('_', '-')}={y}" for x, y in options.items())]
            with redirect_stdout(io.StringIO()) as out:
                main.main(flags)
            return json.loads((folder / "metrics.json").read_text()), out.getvalue()

        yield run


@pytest.fixture(scope="module")
def found(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    metrics, out = run(folder)
    return SimpleNamespace(folder=folder, metrics=metrics, rows=metrics["rows"], out=out)


def network(state, lora=None, scale=1.0):
    """The network as a formula, with `scale` times B A added to each weight."""

    def forward(images):
        hidden = images.flatten(1)
        for name in LAYERS:
            weight = state[f"{name}.weight"]
            if lora:
                A, B = lora[name]
                weight = torch.addmm(weight, B, A, alpha=scale)
            hidden = linear(hidden, weight, state[f"{name}.bias"])
            hidden = hidden if name == "linear3" else hidden.relu()
        return hidden

    return forward


def fit(forward, tensors, images, labels, lr, epochs=1, batch=128, seed=SEED):
    tensors = [tensor.requires_grad_() for tensor in tensors]
    optimizer = torch.optim.Adam(tensors, lr, fused=True)
    total, step = epochs * math.ceil(len(labels) / batch), 0
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for some in torch.randperm(len(labels), generator=generator).split(batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=main.BFLOAT16):
                loss = cross_entropy(forward(images[some]), labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            optimizer.param_groups[0]["lr"] = lr * (1 - step / total)
    return sum(tensor.requires_grad_(False).numel() for tensor in tensors)


def new_lora(rank):
    lora = {}
    for name, (out, into) in LAYERS.items():
        lora[name] = torch.randn(rank, into) / into**0.5, torch.zeros(out, rank)
    return lora


def fit_lora(state, lora, scale, *how):
    forward = network(state, lora, scale)
    return forward, fit(forward, [matrix for pair in lora.values() for matrix in pair], *how)


def share_right(logits, labels):
    return (logits.argmax(1) == labels).tolist().count(True) / len(labels)


def biased(logits, bias):
    return torch.cat([logits[:, :4], logits[:, 4:5] + bias, logits[:, 5:]], 1)


@pytest.fixture(scope="module")
def again(splits):
    """What seed 7 has to find: rows by method and task, shares, and what is saved."""
    (images, labels), validation, test = splits
    rows, shares = {}, {}

    def add(method, logits, trained):
        pairs = list(zip(test.labels.tolist(), logits.argmax(1).tolist()))
        errors = [sum(a == digit != b for a, b in pairs) for digit in range(10)]
        rows[method, None] = {
            "accuracy": (len(pairs) - sum(errors)) / len(pairs),
            "errors": errors,
            "missed": errors[4],
            "false": sum(a != 4 == b for a, b in pairs),
            "trained": trained,
        }

    torch.manual_seed(SEED)
    state = dict(Small().state_dict())
    base = network(state)
    count = fit(base, state.values(), images, labels, 2e-3, 1, 256)
    before = base(test.images)
    add("baseline", before, count)
    nines = [i for i, label in enumerate(labels.tolist()) if label == 4]
    own = images[nines], labels[nines]
    start = new_lora(3)
    lora = deepcopy(start)
    forward, count = fit_lora(state, lora, SCALING, *own, 1.6e-3, 5)
    add("LoRA", forward(test.images), count)

    for strength in (0.2, 0.4, 0.6, 0.8):
        turned_down = network(state, lora, strength * SCALING)
        add(f"LoRA at strength {strength}", turned_down(test.images), count)
    for bias in range(1, 7):
        add(f"bias of {bias}", biased(before, bias), 1)
    plain, least = base(validation.images), share_right(forward(validation.images), validation[1])
    tried = [x / 4 for x in range(80)]
    fair = [x for x in tried if share_right(biased(plain, x), validation.labels) >= least]
    add("one biased logit", biased(before, max(fair)), 1)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED)).tolist()
    mixed = [i for i in order if labels[i] == 4]
    mixed += [i for i in order if labels[i] != 4][: 3 * len(mixed)]
    how = deepcopy(start), SCALING, images[mixed], labels[mixed], 1.6e-3, 5, 512
    forward, count = fit_lora(state, *how)
    add("LoRA + other digits", forward(test.images), count)

    full = deepcopy(state)
    count = fit(network(full), full.values(), *own, FULL_LR)
    add("full fine-tuning", network(full)(test.images), count)
    cut = dict(state)
    for name in [f"{x}.weight" for x in LAYERS]:
        U, S, V = torch.linalg.svd(full[name] - state[name], full_matrices=False)
        cut[name] = state[name] + S[0] * torch.outer(U[:, 0], V[0])
        both = {"what fine-tuning changed": S, "the weights": torch.linalg.svdvals(state[name])}
        for method, values in both.items():
            held = [(values[:rank].norm() / values.norm()).item() ** 2 for rank in main.RANKS]
            shares.setdefault(method, []).append(held)
    add("full fine-tuning, cut to rank 1", network(cut)(test.images), count)

    torch.manual_seed(SEED)
    few = torch.randperm(len(labels))[:FEW]
    few = images[few].flip(2), labels[few]

    def learn(method, forward, count):
        right = share_right(forward(test.images[::4].flip(2)), test.labels[::4])
        rows[method, "mirrored"] = {"accuracy": right, "trained": count}

    learn("baseline", base, 0)
    for rank, hidden in ((1, 1), (4, 5), (16, 20)):
        learn(f"adapter, rank {rank}", *fit_lora(state, new_lora(rank), 1.0, *few, 1e-2, 40))
        new = nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10))
        count = fit(new, list(new.parameters()), *few, 2e-3, 200)
        learn(f"new small network, as rank {rank}", new, count)
    last, copy = deepcopy(state), deepcopy(state)
    tensors = [last["linear3.weight"], last["linear3.bias"]]
    learn("last layer alone", network(last), fit(network(last), tensors, *few, 1e-2, 40))
    learn("copy of the network", network(copy), fit(network(copy), copy.values(), *few, 1e-3, 40))
    return SimpleNamespace(rows=rows, shares=shares, state=state, start=start, lora=lora)


def test_the_run_can_tell_one_thing_from_another(again):
    for tasks in ([None], ["mirrored"]):
        rows = [row for (_, task), row in again.rows.items() if task in tasks]
        assert len({str(row) for row in rows}) == len(rows)
    assert all(row["accuracy"] > 0.1 for row in again.rows.values())


def test_every_row_is_computed_a_second_time(found, again):
    shares, left = {}, dict(again.rows)
    for row in found.rows:
        if row["seed"] == SEED and "shares" in row:
            shares.setdefault(row["method"], []).append(row["shares"])
        elif row["seed"] == SEED:
            wanted = left.pop((row["method"], row.get("task")))
            assert {x: row[x] for x in wanted} == wanted, row["method"]
    assert not left and shares.keys() == again.shares.keys()
    for method, layers in again.shares.items():  # which svd_lowrank searches for
        for one, other in zip(shares[method], layers, strict=True):
            assert one == pytest.approx(other, rel=0.05), method


def test_what_is_saved_is_of_this_run_and_its_first_seed(found, again, capsys):
    wanted = {"baseline.pt": again.state, "adapter/adapter_model.bin": {}}
    for name, pair in again.lora.items():
        for x, matrix in zip("AB", pair):
            wanted["adapter/adapter_model.bin"][f"base_model.model.{name}.lora_{x}.weight"] = matrix
    for name, tensors in wanted.items():
        saved = torch.load(found.folder / name)
        assert saved.keys() == tensors.keys()
        assert all(torch.equal(saved[key], tensors[key]) for key in saved), name
    config = json.loads((found.folder / "adapter" / "adapter_config.json").read_text())
    about = {"peft_type": "LORA", "r": 3, "lora_alpha": 2.5, "target_modules": list(LAYERS)}
    assert config == about
    told = {"seed": SEED, **OPTIONS, "device": "cpu", "main_job_only": False}
    assert found.metrics["config"] == told
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    assert found.metrics["environment"] == machine | {"bfloat16": main.BFLOAT16}
    for text in ("seed 7, digit 4, rank 3, alpha 2.5", "seed 8, ", "(seeds: 2, images: seed 7)"):
        assert text in found.out
    lines = (found.folder / "metrics.json").read_text().splitlines()
    assert len(lines) == 1 + len(found.rows)  # a line for each
    for _, _, show, *_ in main.PARTS[1:]:
        show(found.rows, SimpleNamespace(digit=4))  # of all seeds
        assert capsys.readouterr().out in found.out


def test_a_second_seed_is_a_run_of_its_own_and_gives_the_same_bytes_twice(found, run, tmp_path):
    files = []
    for name, size in (("one", 10), ("two", 30)):  # whatever the user's own style
        with matplotlib.rc_context({"font.size": size}):
            metrics, _ = run(tmp_path / name, seed=8, seeds=1)
        assert metrics["rows"] == [row for row in found.rows if row["seed"] == 8]
        paths = sorted((tmp_path / name).rglob("*.*"))
        files.append({path.name: path.read_bytes() for path in paths})
    assert len(files[0]) == 10 and files[0] == files[1]
    alone, _ = run(tmp_path / "main", "--main-job-only", seed=8, seeds=1)
    assert alone["rows"] == metrics["rows"][:2]
    assert found.rows[0]["errors"] != metrics["rows"][0]["errors"]


def test_the_lora_that_is_checked_is_the_trained_one(run, tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr(main, "check_lora", lambda *x: checked.append(x))
    run(tmp_path, "--main-job-only", seeds=1)
    ((_, lora, alpha),) = checked
    assert alpha == 2.5 and all(x.lora_B.any() for x in main.lora_layers(lora).values())
