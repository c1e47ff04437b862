"""One run, no option at its default, computed again in plain torch.

Every option and every stage shows in some number, so that a wrong wire between them does too.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
LR = {  # in place of main.NEW_DATA_LR: so few images need other rates
    "biases": 0.6,
    "lora_rank1": 0.013,
    "lora_rank2": 0.012,
    "lora_rank4": 0.011,
    "lora_rank8": 0.009,
    "lora_rank16": 0.006,
    "full": 0.0011,
    "full_matched": 0.0007,
}
FULL_LR = 0.0006
RANKS = (1, 2, 4, 8, 16)
LAYERS = {"linear1": (1000, 784), "linear2": (2000, 1000), "linear3": (10, 2000)}
DRAWS = ("learned", "examples", "errors", "trade_off", "low_rank", "new_data")

Tensors = dict[str, Tensor]


# --- What the script finds ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(mnist: main.Data) -> main.Data:
    return first_images(mnist, 700, 400, 800)


@dataclass(frozen=True)
class Found:
    folder: Path
    stdout: str
    arguments: dict[str, list[Any]] = field(default_factory=dict)  # of each call, by function

    def metrics(self) -> dict[str, Any]:
        return json.loads((self.folder / "metrics.json").read_text())

    def rows(self, seed: int) -> list[dict[str, Any]]:
        return [row for row in self.metrics()["rows"] if row["seed"] == seed]


@pytest.fixture(scope="module")
def found(data: main.Data, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The run of OPTIONS; it looks at what the functions that draw and check are given."""
    result = Found(tmp_path_factory.mktemp("out"), "")
    there, out = result.folder / "mnist", io.StringIO()

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            result.arguments.setdefault(name, []).append(arguments)
            return function(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        asked_for = {(there, torch.device("cpu")): data}  # a KeyError if another folder is read
        patch.setattr(main, "load_mnist", lambda *asked: asked_for[asked])
        patch.setattr(main, "NEW_DATA_LR", LR)
        patch.setattr(main, "FULL_LR", FULL_LR)
        for name in (*[f"draw_{x}" for x in DRAWS], "check_lora"):
            patch.setattr(main, name, watched(name, getattr(main, name)))
        options = {k: v for k, v in OPTIONS.items() if k != "main_job_only"}
        options |= {"data_dir": there, "output_dir": result.folder}
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        assert main.main(arguments) == 0
    return Found(result.folder, out.getvalue(), result.arguments)


# --- The same, a second time ----------------------------------------------------------------------


def logits_of(state: Tensors, images: Tensor, lora: Tensors | None = None, by: float = 0) -> Tensor:
    """The network as a formula, with `by` times B A added to each weight."""
    for layer in LAYERS:
        weight = state[f"{layer}.weight"]
        if lora and by:
            weight = torch.addmm(weight, lora[f"{layer}.B"], lora[f"{layer}.A"], alpha=by)
        images = F.linear(images, weight, state[f"{layer}.bias"])
        images = images if layer == "linear3" else images.relu()
    return images


def learn(
    values: Tensors,
    forward: Callable[[Tensor], Tensor],
    split: main.Split,
    recipe: tuple[int, int, float],
    seed: int,
) -> None:
    (epochs, batch_size, lr), generator = recipe, torch.Generator().manual_seed(seed)
    trained = [value.requires_grad_() for value in values.values()]
    optimizer = torch.optim.Adam(trained, lr, fused=True)
    steps = epochs * math.ceil(len(split.labels) / batch_size)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    for _ in range(epochs):
        order = torch.randperm(len(split.labels), generator=generator)
        for batch in order.split(batch_size):
            with torch.autocast("cpu", torch.bfloat16, enabled=main.BFLOAT16):
                loss = F.cross_entropy(forward(split.images[batch]), split.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    for value in trained:
        value.requires_grad_(False)


def new_lora(rank: int) -> Tensors:
    lora = {}
    for layer, (out, into) in LAYERS.items():
        lora[f"{layer}.A"] = torch.randn(rank, into) / math.sqrt(into)
        lora[f"{layer}.B"] = torch.zeros(out, rank)
    return lora


def scored(logits: Tensor, labels: Tensor, digit: int) -> dict[str, Any]:
    pairs = list(zip(labels.tolist(), logits.argmax(1).tolist(), strict=True))
    wrong = [(label, said) for label, said in pairs if label != said]
    return {
        "images": len(pairs),
        "accuracy": (len(pairs) - len(wrong)) / len(pairs),
        "errors": [sum(label == d for label, _ in wrong) for d in range(10)],
        "digit_errors": sum(label == digit for label, _ in wrong),
        "false_positives": sum(said == digit for _, said in wrong),
    }


def costs(trained: Tensors, file: Tensors | None = None) -> dict[str, int]:
    torch.save(file or trained, buffer := io.BytesIO())
    numbers = sum(tensor.numel() for tensor in trained.values())
    # Adam keeps two moments of each number and the count of steps of each tensor
    return {
        "trainable_parameters": numbers,
        "optimizer_bytes": 8 * numbers + 4 * len(trained),
        "file_bytes": buffer.tell(),
    }


def for_peft(lora: Tensors) -> Tensors:
    return {f"base_model.model.{k[:-1]}lora_{k[-1]}.weight": x for k, x in lora.items()}


def turned(split: main.Split, angle: float) -> main.Split:
    black = -main.MEAN / main.STD
    images = (split.images - black).view(-1, 1, 28, 28)
    images = rotate(images, angle, InterpolationMode.BILINEAR) + black
    return main.Split(images.flatten(1), split.labels)


def cut(state: Tensors, after: Tensors, rank: int) -> Tensors:
    """`state` plus the part of rank r of what training changed in its weights, not its biases."""
    part = dict(state)
    for layer in LAYERS:
        change = after[f"{layer}.weight"] - state[f"{layer}.weight"]
        rows = torch.linalg.svd(change, full_matrices=False).Vh[:rank]
        part[f"{layer}.weight"] = state[f"{layer}.weight"] + change @ rows.T @ rows
    return part


def furthest(curve: dict[float, float]) -> float:
    """The largest position whose accuracy is at most a point below that at 0."""
    return max(at for at, right in curve.items() if right > curve[0.0] - 0.01 - 1e-9)


def reference(data: main.Data) -> SimpleNamespace:
    o = SimpleNamespace(**OPTIONS)
    digit, scaling, rows = o.digit, o.alpha / o.rank, {}
    test, validation = data.test, data.validation

    def add(name: str, logits: Tensor, **more: Any) -> None:
        rows[name] = scored(logits, test.labels, digit) | more

    torch.manual_seed(o.seed)
    model = main.MNISTClassifier()
    state = {name: value.detach() for name, value in model.state_dict().items()}
    learn(state, lambda x: logits_of(state, x), data.train, (o.epochs, 256, o.lr), o.seed)
    own = data.train.labels == digit
    target = main.Split(data.train.images[own], data.train.labels[own])
    lora, full = new_lora(o.rank), copy.deepcopy(state)
    start = copy.deepcopy(lora)
    learn(
        lora,
        lambda x: logits_of(state, x, lora, scaling),
        target,
        (o.lora_epochs, 128, o.lora_lr),
        o.seed,
    )
    learn(full, lambda x: logits_of(full, x), target, (o.lora_epochs, 128, FULL_LR), o.seed)
    before, after = logits_of(state, test.images), logits_of(state, test.images, lora, scaling)
    add("digit/baseline", before, **costs(state))
    checks = ("frozen_weights_unchanged", "lora_off_equals_baseline", "merged_equals_lora")
    add(
        "digit/lora",
        after,
        **costs(lora, for_peft(lora)),
        checks=dict.fromkeys([*checks, "few_parameters"], True),
        parameter_overhead=6_794 * o.rank / 2_807_010,
    )
    add("digit/full", logits_of(full, test.images), **costs(full))
    add("digit/full_rank1", logits_of(cut(state, full, 1), test.images))

    # question 1
    def dial(split: main.Split, strength: float) -> Tensor:
        return logits_of(state, split.images, lora, strength * scaling)

    def biased(logits: Tensor, bias: float) -> Tensor:
        logits = logits.clone()
        logits[:, digit] += bias
        return logits

    there = {at: dial(validation, at) for at in [i / 10 for i in range(11)]}
    right = {at: scored(x, validation.labels, digit)["accuracy"] for at, x in there.items()}
    strength = furthest(right)
    rows["validation/baseline"] = scored(there[0.0], validation.labels, digit)
    right = {
        i / 4: scored(biased(there[0.0], i / 4), validation.labels, digit)["accuracy"]
        for i in range(33)
    }
    bias = furthest(right)
    add("digit/lora_balanced", dial(test, strength), strength=strength)
    add("digit/logit_bias", biased(before, bias), strength=bias)
    add("digit/constant_part", before + (there[1.0] - there[0.0]).mean(0))
    add("digit/lora_at_0.75", dial(test, 0.75), strength=0.75)
    for at in range(9):
        add(f"digit/logit_bias_at_{at}", biased(before, at), strength=at)

    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(o.seed)).tolist()
    mixed = [i for i in order if own[i]]
    mixed += [i for i in order if not own[i]][: 3 * len(mixed)]
    torch.manual_seed(o.seed)
    replay = new_lora(o.rank)
    learn(
        replay,
        lambda x: logits_of(state, x, replay, scaling),
        main.Split(data.train.images[mixed], data.train.labels[mixed]),
        (o.lora_epochs, 512, o.lora_lr),
        o.seed,
    )
    logits = logits_of(state, test.images, replay, scaling)
    add("digit/lora_replay", logits, **costs(replay, for_peft(replay)))

    # new data
    few = main.Split(data.train.images[:5000], data.train.labels[:5000])
    few, test_turned = turned(few, o.angle), turned(test, o.angle)

    def add_turned(
        method: str,
        forward: Callable[[Tensor], Tensor],
        step: int = 1,
        upright: bool = True,
        **more: Any,
    ) -> None:
        row = scored(forward(test_turned.images[::step]), test.labels[::step], digit) | more
        if upright:
            old = scored(forward(test.images[::step]), test.labels[::step], digit)
            row["accuracy_upright"] = old["accuracy"]
        rows[f"new_data/{method}"] = row
        if step == 1:
            add_turned(f"{method}_at_1.0", forward, step=8, **more)

    def moved(weight_of: Callable[[str], Tensor]) -> list[float]:
        found = []
        for layer in LAYERS:
            old = state[f"{layer}.weight"]
            found.append(float((weight_of(layer) - old).norm() / old.norm()))
        return found

    add_turned("baseline", lambda x: logits_of(state, x))
    biases = {"bias": state["linear3.bias"].clone()}
    learn(
        biases,
        lambda x: logits_of({**state, "linear3.bias": biases["bias"]}, x),
        few,
        (1, 128, LR["biases"]),
        o.seed,
    )
    shift = biases["bias"] - state["linear3.bias"]
    file = {"linear3.bias": biases["bias"]}
    add_turned("biases", lambda x: logits_of(state, x) + shift, **costs(file))
    for name in ("full", "full_matched"):
        new = copy.deepcopy(state)
        learn(new, lambda x, new=new: logits_of(new, x), few, (1, 128, LR[name]), o.seed)
        change = moved(lambda layer, new=new: new[f"{layer}.weight"])
        forward = lambda x, new=new: logits_of(new, x)
        add_turned(name, forward, **costs(new), weight_change=change)
        if name == "full":
            for rank in RANKS:
                part = cut(state, new, rank)
                forward = lambda x, part=part: logits_of(part, x)
                add_turned(f"full_part_rank{rank}", forward, step=8, upright=False)
            for at in (0.4, 0.6, 0.8):
                way = {key: torch.lerp(state[key], new[key], at) for key in state}
                forward = lambda x, way=way: logits_of(way, x)
                add_turned(f"full_at_{at}", forward, step=8, strength=at)
    for rank in RANKS:
        torch.manual_seed(o.seed)
        new = new_lora(rank)
        forward = lambda x, new=new: logits_of(state, x, new, 1.0)
        learn(new, forward, few, (1, 128, LR[f"lora_rank{rank}"]), o.seed)
        more = costs(new, for_peft(new))
        change = lambda x, new=new: state[f"{x}.weight"] + new[f"{x}.B"] @ new[f"{x}.A"]
        more["weight_change"] = moved(change)
        known = {"step": 1, "upright": True} if rank == 8 else {"step": 8, "upright": False}
        add_turned(f"lora_rank{rank}", forward, **known, **more)
        for at in (0.4, 0.6, 0.8) if rank == 8 else ():
            forward = lambda x, new=new, at=at: logits_of(state, x, new, at)
            add_turned(f"lora_rank8_at_{at}", forward, step=8, strength=at)
            forward = lambda x, new=new: logits_of(state, x, new, 1.0)
        if rank == 8:
            says = forward(test_turned.images[:8]).argmax(1)
    return SimpleNamespace(
        state=state, start=start, lora=lora, rows=rows, before=before, after=after, says=says
    )


@pytest.fixture(scope="module")
def expected(data: main.Data) -> SimpleNamespace:
    with torch.random.fork_rng(devices=[]):
        return reference(data)


# --- Both are the same ----------------------------------------------------------------------------


def test_the_run_can_tell_one_thing_from_another(expected: SimpleNamespace) -> None:
    for name, value in OPTIONS.items():
        if name not in ("device", "main_job_only"):
            assert value != getattr(main.Settings(), name)
    rows = {name: row for name, row in expected.rows.items() if "_at_" not in name}
    for task in ("digit/", "new_data/"):
        same = [row["errors"] for name, row in rows.items() if name.startswith(task)]
        assert all(a != b for a, b in itertools.combinations(same, 2))
    assert all(row["accuracy"] > 0.3 for row in rows.values())
    assert 0 < rows["digit/lora_balanced"]["strength"] < 1
    assert 0 < rows["digit/logit_bias"]["strength"] < 8


def test_every_row_is_computed_a_second_time(found: Found, expected: SimpleNamespace) -> None:
    rows = found.rows(OPTIONS["seed"])
    assert {f"{row['task']}/{row['method']}" for row in rows} == set(expected.rows)
    for name, wanted in expected.rows.items():
        row = named(rows, name)
        task, method = name.split("/")
        about = {"seed": OPTIONS["seed"], "task": task, "method": method}
        change = row.pop("weight_change", None)
        if change:
            assert change == pytest.approx(wanted.pop("weight_change"), rel=1e-4), name
        assert row == wanted | about, name


def test_the_metrics_name_the_run(found: Found) -> None:
    content = found.metrics()
    assert list(content) == ["config", "environment", "rows"]
    assert content["config"] == OPTIONS
    environment = content["environment"]
    assert (environment["torch"], environment["device"]) == (torch.__version__, "cpu")
    assert environment["bfloat16"] == main.BFLOAT16


def test_each_lora_is_checked_on_validation_images(found: Found, data: main.Data) -> None:
    _, loras, ranks, looked_at = zip(*found.arguments["check_lora"], strict=True)
    assert ranks == (OPTIONS["rank"], 8) * OPTIONS["seeds"]
    assert len(set(map(id, loras))) == len(ranks)
    for split, most in zip(looked_at, (1000, 100) * OPTIONS["seeds"]):
        assert torch.equal(split.images, data.validation.images[:most])


def test_the_saved_weights_are_those_of_the_first_seed(
    found: Found, expected: SimpleNamespace
) -> None:
    for name, held in (
        ("baseline.pt", expected.state),
        ("adapter/adapter_model.bin", for_peft(expected.lora)),
    ):
        saved = torch.load(found.folder / name)
        assert saved.keys() == held.keys()
        assert all(torch.equal(saved[key], held[key]) for key in held), name
    assert json.loads((found.folder / "adapter" / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "r": OPTIONS["rank"],
        "lora_alpha": OPTIONS["alpha"],
        "target_modules": list(LAYERS),
    }


def test_each_picture_is_drawn_once_of_the_first_seed(
    found: Found, data: main.Data, expected: SimpleNamespace
) -> None:
    drawn = {}
    for name in DRAWS:
        (drawn[name],) = found.arguments[f"draw_{name}"]
    rows, job = drawn["errors"]
    assert rows == found.metrics()["rows"]
    assert drawn["examples"] == drawn["learned"] == (job,)
    assert drawn["trade_off"] == (rows, OPTIONS["digit"])
    assert drawn["low_rank"] == (rows, job)
    assert drawn["new_data"][:2] == (rows, job)
    assert (job.seed, job.digit, job.data) == (OPTIONS["seed"], OPTIONS["digit"], data)
    assert torch.equal(job.before, expected.before)
    assert torch.equal(job.after, expected.after)
    for layer in LAYERS:
        for model, held in ((job.start, expected.start), (job.lora, expected.lora)):
            assert torch.equal(main.lora_layers(model)[layer].lora_A, held[f"{layer}.A"])
    new = drawn["new_data"][2]
    assert torch.equal(new.test.images, turned(data.test, OPTIONS["angle"]).images)
    says = main.evaluate(new.lora, new.test.take(slice(8))).argmax(1)
    assert torch.equal(says, expected.says)
    for model in (job.lora, new.lora):  # as they were trained, not as a dial left them
        assert {lora.strength for lora in main.lora_layers(model).values()} == {1.0}


def test_two_seeds_are_two_runs_of_one(
    found: Found, data: main.Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "NEW_DATA_LR", LR)
    monkeypatch.setattr(main, "FULL_LR", FULL_LR)
    settings = main.Settings(**OPTIONS)
    rows, _, _ = main.run_seed(settings, OPTIONS["seed"] + 1, data)
    assert rows == found.rows(OPTIONS["seed"] + 1)
    assert rows[0]["errors"] != found.rows(OPTIONS["seed"])[0]["errors"]
