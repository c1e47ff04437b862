"""One run, no option at its default, computed again in plain torch.

Every option and every stage shows in some number, so that a wrong wire between them does too.
"""

import io
import itertools
import json
import math
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import first_images, named
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, rotate

import main

OPTIONS: dict[str, Any] = {  # rates at which all methods stay useful and none equals another
    "digit": 4,
    "rank": 3,
    "alpha": 2.5,
    "seed": 7,
    "seeds": 2,
    "epochs": 6,
    "lr": 0.003,
    "lora_epochs": 5,
    "lora_lr": 0.008,
    "angle": 35.0,
    "main_job_only": False,
    "device": "cpu",
}
LR = {name: lr * 0.55 for name, lr in main.NEW_DATA_LR.items()}  # of few images, gentler
FULL_LR = 0.0006
RANKS = (1, 2, 4, 8, 16)
DIAL = (0.4, 0.6, 0.8)
LAYERS = {"linear1": (1000, 784), "linear2": (2000, 1000), "linear3": (10, 2000)}
PEFT = "base_model.model.{}.lora_{}.weight"  # its name of a matrix of a layer
PICTURES = ("learned", "examples", "errors", "trade_off", "low_rank", "new_data")
SEED, DIGIT, SCALING = OPTIONS["seed"], OPTIONS["digit"], OPTIONS["alpha"] / OPTIONS["rank"]

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def data(mnist: main.Data) -> main.Data:
    return first_images(mnist, 700, 300, 600)


@pytest.fixture(scope="module")
def found(data: main.Data, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The run of OPTIONS, and what the functions that check and draw were given."""
    folder = tmp_path_factory.mktemp("out")
    watched = ["check_lora", *[f"draw_{name}" for name in PICTURES]]
    calls = {name: Mock(wraps=getattr(main, name)) for name in watched}
    options = {name: value for name, value in OPTIONS.items() if name != "main_job_only"}
    options |= {"data_dir": folder / "mnist", "output_dir": folder}
    with pytest.MonkeyPatch.context() as patch:
        asked_for = {(folder / "mnist", torch.device("cpu")): data}  # another is a KeyError
        patch.setattr(main, "load_mnist", lambda *asked: asked_for[asked])
        patch.setattr(main, "NEW_DATA_LR", LR)
        patch.setattr(main, "FULL_LR", FULL_LR)
        for name, call in calls.items():
            patch.setattr(main, name, call)
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        with redirect_stdout(io.StringIO()) as out:
            assert main.main(arguments) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    given = {name: [tuple(x.args) for x in call.call_args_list] for name, call in calls.items()}
    found = {"folder": folder, "metrics": metrics, "rows": metrics["rows"], "calls": given}
    return SimpleNamespace(**found, printed=out.getvalue())


@dataclass
class Net:
    """The network as a formula, with `scale` times B A added to each weight."""

    state: Tensors
    lora: Tensors | None = None
    scale: float = 0.0

    def weight(self, layer: str) -> Tensor:
        weight = self.state[f"{layer}.weight"]
        if not self.lora or not self.scale:
            return weight
        A, B = (self.lora[PEFT.format(layer, x)] for x in "AB")
        return torch.addmm(weight, B, A, alpha=self.scale)

    def __call__(self, images: Tensor) -> Tensor:
        for layer in LAYERS:
            images = F.linear(images, self.weight(layer), self.state[f"{layer}.bias"])
            if layer != "linear3":
                images = images.relu()
        return images


def learn(
    net: Net, trained: Tensors, split: main.Split, lr: float, epochs: int = 1, batch: int = 128
) -> dict[str, Any]:
    """Train some tensors of a net in place; returns what it costs."""
    for tensor in trained.values():
        tensor.requires_grad_(True)
    optimizer = torch.optim.Adam(list(trained.values()), lr, fused=True)
    steps = epochs * math.ceil(len(split.labels) / batch)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(epochs):
        order = torch.randperm(len(split.labels), generator=generator)
        for some in order.split(batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=main.BFLOAT16):
                loss = F.cross_entropy(net(split.images[some]), split.labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    for tensor in trained.values():
        tensor.requires_grad_(False)
    numbers = sum(tensor.numel() for tensor in trained.values())
    torch.save(trained, buffer := io.BytesIO())
    # Adam keeps two moments of each number and the count of steps of each tensor
    return {
        "trainable_parameters": numbers,
        "optimizer_bytes": 8 * numbers + 4 * len(trained),
        "file_bytes": buffer.tell(),
    }


def new_lora(rank: int) -> Tensors:
    lora = {}
    for layer, (out, into) in LAYERS.items():
        lora[PEFT.format(layer, "A")] = torch.randn(rank, into) / math.sqrt(into)
        lora[PEFT.format(layer, "B")] = torch.zeros(out, rank)
    return lora


def scored(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    pairs = zip(labels.tolist(), logits.argmax(1).tolist(), strict=True)
    wrong = [(label, said) for label, said in pairs if label != said]
    return {
        "images": len(labels),
        "accuracy": (len(labels) - len(wrong)) / len(labels),
        "errors": [sum(label == digit for label, _ in wrong) for digit in range(10)],
        "digit_errors": sum(label == DIGIT for label, _ in wrong),
        "false_positives": sum(said == DIGIT for _, said in wrong),
    }


def turned(split: main.Split) -> main.Split:
    black = -main.MEAN / main.STD
    images = (split.images - black).view(-1, 1, 28, 28)
    images = rotate(images, OPTIONS["angle"], InterpolationMode.BILINEAR) + black
    return main.Split(images.flatten(1), split.labels)


def cuts(state: Tensors, after: Tensors, ranks: tuple[int, ...]) -> dict[int, Net]:
    """`state` plus the part of each rank of what training changed in its weights alone."""
    parts = {rank: Net(dict(state)) for rank in ranks}
    for layer in LAYERS:
        name = f"{layer}.weight"
        change = after[name] - state[name]
        vectors = torch.linalg.svd(change, full_matrices=False).Vh
        for rank, part in parts.items():
            part.state[name] = state[name] + change @ vectors[:rank].T @ vectors[:rank]
    return parts


def furthest(logits: dict[float, Tensor], labels: Tensor) -> float:
    """The largest position whose accuracy is at most a point below that at 0."""
    right = {at: scored(x, labels)["accuracy"] for at, x in logits.items()}
    return max(at for at in right if right[at] > right[0.0] - 0.01 - 1e-9)


def main_job_again(data: main.Data, rows: dict[str, Any]) -> SimpleNamespace:
    torch.manual_seed(SEED)
    state = dict(deepcopy(main.MNISTClassifier().state_dict()))
    baseline = Net(state)
    cost = learn(baseline, state, data.train, OPTIONS["lr"], OPTIONS["epochs"], batch=256)
    before = baseline(data.test.images)
    rows["digit/baseline"] = scored(before, data.test.labels) | cost
    images = data.train[data.train.labels == DIGIT]
    lora = new_lora(OPTIONS["rank"])
    start, net = deepcopy(lora), Net(state, lora, SCALING)
    cost = learn(net, lora, images, OPTIONS["lora_lr"], OPTIONS["lora_epochs"])
    checks = ["frozen_weights_unchanged", "lora_off_equals_baseline", "merged_equals_lora"]
    cost["checks"] = dict.fromkeys([*checks, "only_lora_trained"], True)
    cost["parameter_overhead"] = 6_794 * OPTIONS["rank"] / 2_807_010
    after = net(data.test.images)
    rows["digit/lora"] = scored(after, data.test.labels) | cost
    job = SimpleNamespace(state=state, baseline=baseline, start=start, lora=lora, images=images)
    job.before, job.after = before, after
    return job


def question_1_again(data: main.Data, job: SimpleNamespace, rows: dict[str, Any]) -> None:
    def add(method: str, logits: Tensor, **more: Any) -> None:
        rows[f"digit/{method}"] = scored(logits, data.test.labels) | more

    def dial(split: main.Split, strength: float) -> Tensor:
        return Net(job.state, job.lora, strength * SCALING)(split.images)

    def biased(logits: Tensor, bias: float) -> Tensor:
        logits = logits.clone()
        logits[:, DIGIT] += bias
        return logits

    test, validation = data.test, data.validation
    before = job.baseline(test.images)
    there = {i / 10: dial(validation, i / 10) for i in range(11)}
    rows["validation/baseline"] = scored(there[0.0], validation.labels)
    strength = furthest(there, validation.labels)
    biases = {i / 4: biased(there[0.0], i / 4) for i in range(33)}
    bias = furthest(biases, validation.labels)
    add("constant_part", before + (there[1.0] - there[0.0]).mean(0))
    add("lora_balanced", dial(test, strength), strength=strength)
    for at in (0.3, 0.6):
        add(f"lora_at_{at}", dial(test, at), strength=at)
    add("logit_bias", biased(before, bias), strength=bias)
    for at in range(6):
        add(f"logit_bias_at_{at}", biased(before, at), strength=at)

    generator = torch.Generator().manual_seed(SEED)
    order = torch.randperm(len(data.train.labels), generator=generator).tolist()
    mixed = [i for i in order if data.train.labels[i] == DIGIT]
    mixed += [i for i in order if data.train.labels[i] != DIGIT][: 3 * len(mixed)]
    lora = deepcopy(job.start)
    net = Net(job.state, lora, SCALING)
    images, epochs = data.train[torch.tensor(mixed)], OPTIONS["lora_epochs"]
    cost = learn(net, lora, images, OPTIONS["lora_lr"], epochs, batch=512)
    add("lora_replay", net(test.images), **cost)


def new_data_again(data: main.Data, job: SimpleNamespace, rows: dict[str, Any]) -> None:
    few, test = turned(data.train[:5000]), turned(data.test)

    def add(method: str, net: Net, step: int = 1, **more: Any) -> None:
        labels, few_of_them = test.labels[::step], slice(None, None, 8 // step)
        logits = {"": net(test.images[::step]), "_upright": net(data.test.images[::step])}
        row = scored(logits[""], labels) | more
        for name, x in logits.items():
            row[f"accuracy{name}"] = scored(x, labels)["accuracy"]
            eighth = scored(x[few_of_them], labels[few_of_them])
            row[f"accuracy{name}_eighth"] = eighth["accuracy"]
        rows[f"new_data/{method}"] = row

    def fit(net: Net, trained: Tensors, method: str) -> dict[str, Any]:
        cost = learn(net, trained, few, LR[method])
        olds = {layer: job.baseline.weight(layer) for layer in LAYERS}
        change = [float((net.weight(x) - old).norm() / old.norm()) for x, old in olds.items()]
        return cost | {"weight_change": change}

    add("baseline", job.baseline)
    ten = Net(deepcopy(job.state))
    name = "linear3.bias"
    add("biases", ten, **fit(ten, {name: ten.state[name]}, "biases"))
    full, matched = Net(deepcopy(job.state)), Net(deepcopy(job.state))
    add("full", full, **fit(full, full.state, "full"))
    add("full_matched", matched, **fit(matched, matched.state, "full_matched"))
    for at in DIAL:
        way = {name: torch.lerp(job.state[name], full.state[name], at) for name in job.state}
        add(f"full_at_{at}", Net(way), step=8, strength=at)
    for rank, part in cuts(job.state, full.state, RANKS).items():
        add(f"full_part_rank{rank}", part, step=8)
        torch.manual_seed(SEED)
        lora = new_lora(rank)
        net = Net(job.state, lora, 1.0)
        cost = fit(net, lora, f"lora_rank{rank}")
        add(f"lora_rank{rank}", net, step=1 if rank == 8 else 8, **cost)
        if rank == 8:
            job.says = net(test.images[:8]).argmax(1)
            for at in DIAL:
                add(f"lora_rank8_at_{at}", Net(job.state, lora, at), step=8, strength=at)


@pytest.fixture(scope="module")
def expected(data: main.Data) -> SimpleNamespace:
    with torch.random.fork_rng(devices=[]):
        rows: dict[str, Any] = {}
        job = main_job_again(data, rows)
        full = Net(deepcopy(job.state))
        cost = learn(full, full.state, job.images, FULL_LR, OPTIONS["lora_epochs"])
        rows["digit/full"] = scored(full(data.test.images), data.test.labels) | cost
        part = cuts(job.state, full.state, (1,))[1]
        rows["digit/full_rank1"] = scored(part(data.test.images), data.test.labels)
        question_1_again(data, job, rows)
        new_data_again(data, job, rows)
    job.rows = rows
    return job


def test_the_run_can_tell_one_thing_from_another(expected: Any) -> None:
    for name, value in OPTIONS.items():
        assert name in ("device", "main_job_only") or value != getattr(main.Settings(), name)
    rows = {name: row for name, row in expected.rows.items() if "_at_" not in name}
    for task in ("digit/", "new_data/"):
        same = [row["errors"] for name, row in rows.items() if name.startswith(task)]
        assert all(a != b for a, b in itertools.combinations(same, 2))
    assert all(row["accuracy"] > 0.3 for row in rows.values())
    assert 0 < rows["digit/lora_balanced"]["strength"] < 1
    assert 0 < rows["digit/logit_bias"]["strength"] < 8


def test_every_row_is_computed_a_second_time(found: Any, expected: Any) -> None:
    rows = [row for row in found.rows if row["seed"] == SEED]
    assert {f"{row['task']}/{row['method']}" for row in rows} == set(expected.rows)
    for name, wanted in expected.rows.items():
        row = named(rows, name)
        task, method = name.split("/")
        about = {"seed": SEED, "task": task, "method": method}
        change = wanted.pop("weight_change", [])
        assert row.pop("weight_change", []) == pytest.approx(change, rel=1e-4), name
        assert row == wanted | about, name


def test_each_lora_is_checked_on_validation_images(found: Any, data: main.Data) -> None:
    _, loras, looked_at = zip(*found.calls["check_lora"], strict=True)
    assert len(set(map(id, loras))) == 2 * OPTIONS["seeds"]
    for split, most in zip(looked_at, (1000, 100) * OPTIONS["seeds"]):
        assert torch.equal(split.images, data.validation.images[:most])


def test_what_is_saved_is_of_this_run_and_its_first_seed(found: Any, expected: Any) -> None:
    assert list(found.metrics) == ["config", "environment", "rows"]
    assert found.metrics["config"] == OPTIONS
    environment = found.metrics["environment"]
    assert (environment["torch"], environment["device"]) == (torch.__version__, "cpu")
    files = {"baseline.pt": expected.state, "adapter/adapter_model.bin": expected.lora}
    for name, held in files.items():
        saved = torch.load(found.folder / name)
        assert saved.keys() == held.keys()
        assert all(torch.equal(saved[key], held[key]) for key in held), name
    config = json.loads((found.folder / "adapter" / "adapter_config.json").read_text())
    about_lora = {"r": OPTIONS["rank"], "lora_alpha": OPTIONS["alpha"]}
    assert config == about_lora | {"peft_type": "LORA", "target_modules": list(LAYERS)}


def test_each_picture_is_drawn_once_of_the_first_seed(found: Any, data: Any, expected: Any) -> None:
    drawn = {name: found.calls[f"draw_{name}"] for name in PICTURES}
    ((rows, job),) = drawn["new_data"]
    assert drawn["examples"] == drawn["learned"] == [(job,)]
    assert drawn["errors"] == drawn["trade_off"] == [(rows, DIGIT)]
    assert drawn["low_rank"] == [(rows, job)]
    assert len(rows) == len(found.rows)
    assert (job.seed, job.digit, job.data) == (SEED, DIGIT, data)
    assert torch.equal(job.before, expected.before) and torch.equal(job.after, expected.after)
    for model, held in ((job.start, expected.start), (job.lora, expected.lora)):
        for layer, lora in main.lora_layers(model).items():
            assert torch.equal(lora.lora_A, held[PEFT.format(layer, "A")])
    loras = [lora for x in (job.lora, job.new_lora) for lora in main.lora_layers(x).values()]
    assert [lora.strength for lora in loras] == [1] * 6  # not as a dial left them
    assert torch.equal(job.turned_test.images, turned(data.test).images)
    says = main.evaluate(job.new_lora, job.turned_test[:8]).argmax(1)
    assert torch.equal(says, expected.says)


def test_the_tables_of_all_seeds_are_printed(found: Any, capsys: pytest.CaptureFixture) -> None:
    for show in (main.print_errors, main.print_comparison, main.print_low_rank):
        show(found.rows, DIGIT)
    main.print_new_data(found.rows, OPTIONS["angle"])
    assert capsys.readouterr().out in found.printed
    assert all(f"seed {seed}: " in found.printed for seed in (SEED, SEED + 1))
    assert " 6 pictures," in found.printed
    lines = (found.folder / "metrics.json").read_text().splitlines()
    assert len(lines) == 1 + len(found.rows)  # one for each


def test_two_seeds_are_two_runs_of_one(found: Any, data: main.Data, monkeypatch: Any) -> None:
    monkeypatch.setattr(main, "NEW_DATA_LR", LR)
    monkeypatch.setattr(main, "FULL_LR", FULL_LR)
    rows = main.run_seed(main.Settings(**OPTIONS | {"seed": SEED + 1}), SEED + 1, data).rows
    second = [row for row in found.rows if row["seed"] == SEED + 1]
    assert json.loads(json.dumps(rows)) == second
    assert rows[0]["errors"] != found.rows[0]["errors"]
