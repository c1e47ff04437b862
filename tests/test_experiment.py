"""A small run, no option at its default, computed a second time in plain torch.

Every option and every stage shows in some number, so that a wrong wire between them does too.
"""

import io
import json
import math
from contextlib import redirect_stdout
from copy import deepcopy
from types import SimpleNamespace

import conftest
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import main

OPTIONS = {
    "digit": 4,
    "rank": 3,
    "alpha": 2.5,
    "lora_epochs": 5,
    "lora_lr": 0.002,
    "seed": 7,
    "seeds": 2,
    "device": "cpu",
    "main_job_only": False,
}
SEED, DIGIT, SCALING = 7, 4, 2.5 / 3
FULL_LR, FEW = 1e-4, 40
WAYS = {"adapter": (1e-2, 40), "last": (1e-2, 40), "copy": (1e-3, 40), "new": (2e-3, 200)}
TASKS = {"mirrored": main.TASKS["mirrored"]}  # the whole run has all three
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


def arguments(folder, **changed):
    options = {**OPTIONS, "output_dir": folder, **changed}
    only = ["--main-job-only"] if options.pop("main_job_only") else []
    return only + [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def shorten(patch):
    changed = {"FULL_LR": FULL_LR, "IMAGES": FEW, "TASKS": TASKS, "MNISTClassifier": Small}
    for name, value in changed.items():
        patch.setattr(main, name, value)


@pytest.fixture(scope="module")
def found(splits, tmp_path_factory):
    """The run of OPTIONS, and the jobs of its seeds."""
    folder, jobs, main_job = tmp_path_factory.mktemp("out"), [], main.main_job
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.setattr(main, "load_mnist", lambda folder, device: splits)
        patch.setattr(main, "main_job", lambda *x: jobs.append(main_job(*x)) or jobs[-1])
        shorten(patch)
        main.main(arguments(folder))
    metrics = json.loads((folder / "metrics.json").read_text())
    return SimpleNamespace(folder=folder, jobs=jobs, metrics=metrics, out=out.getvalue())


def network(state, lora=None, scale=1.0):
    """MNISTClassifier as a formula, with `scale` times B A added to each weight."""

    def forward(images):
        hidden = images.flatten(1)
        for name in LAYERS:
            weight = state[f"{name}.weight"]
            if lora and scale:
                A, B = lora[name]
                weight = torch.addmm(weight, B, A, alpha=scale)
            hidden = F.linear(hidden, weight, state[f"{name}.bias"])
            hidden = hidden if name == "linear3" else hidden.relu()
        return hidden

    return forward


def fit(forward, tensors, images, labels, lr, epochs=1, batch=128):
    tensors = [tensor.requires_grad_() for tensor in tensors]
    optimizer = torch.optim.Adam(tensors, lr, fused=True)
    total, step = epochs * math.ceil(len(labels) / batch), 0
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(epochs):
        for some in torch.randperm(len(labels), generator=generator).split(batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=main.BFLOAT16):
                loss = F.cross_entropy(forward(images[some]), labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            optimizer.param_groups[0]["lr"] = lr * (1 - step / total)
    for tensor in tensors:
        tensor.requires_grad_(False)
    return sum(tensor.numel() for tensor in tensors)


def new_lora(rank):
    lora = {}
    for name, (out, into) in LAYERS.items():
        lora[name] = torch.randn(rank, into) / into**0.5, torch.zeros(out, rank)
    return lora


def matrices(lora):
    return [matrix for pair in lora.values() for matrix in pair]


def percent_free(logits, labels):
    return int((logits.argmax(1) == labels).sum()) / len(labels)


class Again:
    """The rows of seed 7, by method and task."""

    def __init__(self, splits):
        self.train, self.validation, self.test = splits
        self.rows = {}
        self.main_job()
        self.cost()
        self.rank()
        self.tasks()

    def add(self, method, logits, trained):
        pairs = list(zip(self.test.labels.tolist(), logits.argmax(1).tolist()))
        wrong = [(label, said) for label, said in pairs if label != said]
        self.rows[method, None] = {
            "accuracy": 1 - len(wrong) / len(pairs),
            "errors": [sum(label == digit for label, _ in wrong) for digit in range(10)],
            "missed": sum(label == DIGIT for label, _ in wrong),
            "false": sum(said == DIGIT for _, said in wrong),
            "trained": trained,
        }

    def main_job(self):
        torch.manual_seed(SEED)
        self.state = dict(Small().state_dict())
        self.base, (images, labels) = network(self.state), self.train
        count = fit(self.base, self.state.values(), images, labels, 2e-3, batch=256)
        self.before = self.base(self.test.images)
        self.add("baseline", self.before, count)
        self.own = [i for i, label in enumerate(labels.tolist()) if label == DIGIT]
        self.start = new_lora(3)
        self.lora = deepcopy(self.start)
        lora = network(self.state, self.lora, SCALING)
        count = fit(lora, matrices(self.lora), images[self.own], labels[self.own], 0.002, 5)
        self.after = lora(self.test.images)
        self.add("LoRA", self.after, count)

    def cost(self):
        images, labels = self.train
        for strength in (0.2, 0.4, 0.6, 0.8):
            lora = network(self.state, self.lora, strength * SCALING)
            self.add(f"LoRA at strength {strength}", lora(self.test.images), 3 * 1014)

        def biased(logits, bias):
            return torch.cat([logits[:, :4], logits[:, 4:5] + bias, logits[:, 5:]], 1)

        for bias in range(1, 7):
            self.add(f"bias of {bias}", biased(self.before, bias), 1)
        plain = self.base(self.validation.images)
        changed = network(self.state, self.lora, SCALING)(self.validation.images)
        least = percent_free(changed, self.validation.labels)
        fair = [
            step / 4
            for step in range(80)
            if percent_free(biased(plain, step / 4), self.validation.labels) >= least
        ]
        self.bias = max(fair)
        self.add("one biased logit", biased(self.before, self.bias), 1)

        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
        own = [i for i in order.tolist() if labels[i] == DIGIT]
        mixed = own + [i for i in order.tolist() if labels[i] != DIGIT][: 3 * len(own)]
        lora = deepcopy(self.start)
        forward = network(self.state, lora, SCALING)
        count = fit(forward, matrices(lora), images[mixed], labels[mixed], 0.002, 5, 512)
        self.add("LoRA + other digits", forward(self.test.images), count)

    def rank(self):
        state, (images, labels) = deepcopy(self.state), self.train
        full, own = network(state), self.own
        count = fit(full, state.values(), images[own], labels[own], FULL_LR, 5)
        self.add("full fine-tuning", full(self.test.images), count)
        cut, self.shares = dict(self.state), {}
        for name in LAYERS:
            weight = self.state[f"{name}.weight"]
            change = state[f"{name}.weight"] - weight
            U, S, Vh = torch.linalg.svd(change, full_matrices=False)
            cut[f"{name}.weight"] = weight + S[0] * torch.outer(U[:, 0], Vh[0])
            for method, found in (
                ("what fine-tuning changed", S),
                ("the weights", torch.linalg.svdvals(weight)),
            ):
                held = found.square().cumsum(0) / found.square().sum()
                held = [held[min(rank, len(held)) - 1].item() for rank in (1, 2, 4, 8, 16)]
                self.shares[method, name] = held
        self.add("full fine-tuning, cut to rank 1", network(cut)(self.test.images), count)

    def tasks(self):
        for task, change in TASKS.items():
            torch.manual_seed(SEED)
            few = torch.randperm(len(self.train.labels))[:FEW]
            few = change(self.train.images[few]), self.train.labels[few]
            self.task = task, few, change(self.test.images[::4])
            self.learn("baseline", self.base, [], None)
            for rank, hidden in ((1, 1), (4, 5), (16, 20)):
                lora = new_lora(rank)
                forward = network(self.state, lora)
                self.learn(f"adapter, rank {rank}", forward, matrices(lora), "adapter")
                new = nn.Sequential(nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10))
                tensors = [tensor.data for tensor in new.parameters()]
                name = f"new small network, as rank {rank}"
                self.learn(name, two_layers(tensors), tensors, "new")
            last = dict(self.state)
            last |= {x: last[x].clone() for x in ("linear3.weight", "linear3.bias")}
            tensors = [last["linear3.weight"], last["linear3.bias"]]
            self.learn("last layer alone", network(last), tensors, "last")
            copy = deepcopy(self.state)
            self.learn("copy of the network", network(copy), copy.values(), "copy")

    def learn(self, method, forward, tensors, way):
        (task, few, images), count = self.task, 0
        if way:
            lr, steps = WAYS[way]
            count = fit(forward, tensors, *few, lr, steps)
        right = percent_free(forward(images), self.test.labels[::4])
        self.rows[method, task] = {"accuracy": right, "trained": count}


def two_layers(tensors):
    def forward(images):
        hidden = F.linear(images.flatten(1), *tensors[:2]).relu()
        return F.linear(hidden, *tensors[2:])

    return forward


@pytest.fixture(scope="module")
def again(splits):
    with torch.random.fork_rng(devices=[]):
        return Again(splits)


def test_the_run_can_tell_one_thing_from_another(again):
    for tasks in ([None], TASKS):
        rows = [row for (_, task), row in again.rows.items() if task in tasks]
        assert len({str(row) for row in rows}) == len(rows)
    assert all(row["accuracy"] > 0.1 for row in again.rows.values())
    assert 0 < again.bias < 19.75


def test_every_row_is_computed_a_second_time(found, again):
    rows = [row for row in found.metrics["rows"] if row["seed"] == SEED]
    questions, shares = {}, {}
    for row in rows:
        questions.setdefault(row.pop("question"), []).append(row["method"])
        if "shares" in row:
            shares[row["method"], row["layer"]] = row["shares"]
            continue
        wanted = again.rows.pop((row["method"], row.get("task")))
        for name in wanted:
            assert row[name] == pytest.approx(wanted[name], abs=1e-9), (row["method"], name)
        assert set(row) - set(wanted) <= {"seed", "method", "task"}
    assert not again.rows
    assert {name: len(methods) for name, methods in questions.items()} == {
        "main": 2,
        "cost": 12,
        "rank": 8,
        "tasks": 9,
    }
    assert shares.keys() == again.shares.keys()
    for name, wanted in again.shares.items():
        assert shares[name] == pytest.approx(wanted, rel=0.05), name  # which it searches for


def test_the_files_are_of_this_run_and_its_first_seed(found, again):
    saved = torch.load(found.folder / "baseline.pt")
    assert saved.keys() == again.state.keys()
    assert all(torch.equal(saved[name], again.state[name]) for name in saved)
    saved = torch.load(found.folder / "adapter" / "adapter_model.bin")
    wanted = {}
    for name, pair in again.lora.items():
        for x, matrix in zip("AB", pair):
            wanted[f"base_model.model.{name}.lora_{x}.weight"] = matrix
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[name], wanted[name]) for name in saved)
    config = json.loads((found.folder / "adapter" / "adapter_config.json").read_text())
    about = {"peft_type": "LORA", "r": 3, "lora_alpha": 2.5, "target_modules": list(LAYERS)}
    assert config == about
    assert found.metrics["config"] == OPTIONS
    environment = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    assert found.metrics["environment"] == environment | {"bfloat16": main.BFLOAT16}
    job = found.jobs[0]
    assert torch.equal(job.before, again.before) and torch.equal(job.after, again.after)
    for layer, A in ((x, again.start[name][0]) for name, x in main.lora_layers(job.start).items()):
        assert torch.equal(layer.lora_A, A)
    assert {layer.strength for layer in main.lora_layers(job.lora).values()} == {1.0}


def test_the_tables_of_all_seeds_are_printed(found, capsys, monkeypatch):
    shorten(monkeypatch)
    for _, _, show, *_ in main.PARTS:
        show(found.metrics["rows"], found.jobs[0])
    assert capsys.readouterr().out in found.out
    lines = (found.folder / "metrics.json").read_text().splitlines()
    assert len(lines) == 1 + len(found.metrics["rows"])  # a line for each


def test_a_run_of_the_second_seed_alone_gives_the_same_bytes_twice(
    found, splits, monkeypatch, tmp_path
):
    monkeypatch.setattr(main, "load_mnist", lambda folder, device: splits)
    shorten(monkeypatch)
    for name, only in (("one", False), ("two", False), ("main", True)):
        main.main(arguments(tmp_path / name, seed=8, seeds=1, main_job_only=only))
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("one", "two")
    )
    assert len(one) == 10 and one == two
    rows = [row for row in found.metrics["rows"] if row["seed"] == 8]
    assert json.loads(one["metrics.json"])["rows"] == rows
    alone = json.loads((tmp_path / "main" / "metrics.json").read_text())["rows"]
    assert alone == rows[:2] and rows[0]["errors"] != found.metrics["rows"][0]["errors"]
