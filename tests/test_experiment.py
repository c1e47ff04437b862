"""Chapter "Experiment": one run, no option at its default, computed again in plain torch.

Every option and every stage shows in some number, so that a wrong wire between them does too. The
second computation does the same operations in the same order; so its numbers are equal, not close.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import signal
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import first_images
from torch import Tensor, nn
from torchvision.transforms.functional import InterpolationMode, rotate

import main

OPTIONS: dict[str, Any] = {  # rates at which all methods stay useful and none equals another
    "digit": 4,
    "rank": 3,
    "alpha": 2.5,
    "seed": 7,
    "seeds": 2,
    "epochs": 5,
    "batch_size": 90,
    "lr": 0.003,
    "lora_epochs": 6,
    "lora_batch_size": 17,
    "lora_lr": 0.0022,
    "full_lr": 0.00016,
    "angle": 35.0,
    "biases_lr": 0.6,
    "rank1_lr": 0.013,
    "rank8_lr": 0.008,
    "turned_lr": 0.0007,
    "strength": 0.35,
    "max_accuracy_drop": 2.2,
    "device": "cpu",
}
FIGURES = ("draw_examples", "draw_errors", "draw_trade_off", "draw_low_rank", "draw_new_data")
LAYERS = ("linear1", "linear2", "linear3")
METHODS = ("baseline", "lora", "lora_off", "lora_balanced", "logit_bias", "full", "full_rank1")
NEW_METHODS = ("baseline", "biases", "lora_rank1", "lora_rank8", "full")

Tensors = dict[str, Tensor]


def command_line(**options: Any) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


# --- What the script finds ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(mnist: main.Data) -> main.Data:
    return first_images(mnist, 600, 400, 800)


@dataclass(frozen=True)
class Found:
    folder: Path
    stdout: str
    arguments: dict[str, list[Any]] = field(default_factory=dict)  # of each call, by function
    returned: dict[str, Any] = field(default_factory=dict)  # by the last call, by function

    def metrics(self) -> dict[str, Any]:
        return json.loads((self.folder / "metrics.json").read_text())

    def load(self, name: str) -> Tensors:
        return torch.load(self.folder / name)


@pytest.fixture(scope="module")
def found(data: main.Data, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The run of OPTIONS; it looks at what the functions that draw and check are given."""
    result = Found(tmp_path_factory.mktemp("out"), "")
    there, out, handler = result.folder / "mnist", io.StringIO(), signal.getsignal(signal.SIGINT)

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            result.arguments.setdefault(name, []).append(arguments)
            result.returned[name] = function(*arguments)
            return result.returned[name]

        return call

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        asked_for = {(there, torch.device("cpu")): data}  # a KeyError if another folder is read
        patch.setattr(main, "load_mnist", lambda *asked: asked_for[asked])
        for name in (*FIGURES, "check_lora"):
            patch.setattr(main, name, watched(name, getattr(main, name)))
        arguments = command_line(**OPTIONS, data_dir=there, output_dir=result.folder)
        assert main.main(arguments) == 0
    signal.signal(signal.SIGINT, handler)
    return Found(result.folder, out.getvalue(), result.arguments, result.returned)


@pytest.fixture(scope="module")
def entry(found: Found) -> dict[str, Any]:
    """What metrics.json says of the first seed."""
    return found.metrics()["runs"][0]


# --- The same, a second time ----------------------------------------------------------------------


def logits_of(state: Tensors, images: Tensor, lora: Tensors | None = None, by: float = 0) -> Tensor:
    """The network as a formula, with `by` times B A added to each weight."""
    for layer in LAYERS:
        weight = state[f"{layer}.weight"]
        if lora and by:
            weight = torch.addmm(weight, lora[f"{layer}.B"], lora[f"{layer}.A"], alpha=by)
        images = F.linear(images, weight, state[f"{layer}.bias"])
        images = images if layer == LAYERS[-1] else images.relu()
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
    for layer, (out, into) in zip(LAYERS, ((1000, 784), (2000, 1000), (10, 2000)), strict=True):
        lora[f"{layer}.A"] = torch.randn(rank, into) / math.sqrt(into)
        lora[f"{layer}.B"] = torch.zeros(out, rank)
    return lora


def scored(logits: Tensor, labels: Tensor, digit: int) -> dict[str, Any]:
    pairs = list(zip(labels.tolist(), logits.argmax(1).tolist(), strict=True))
    wrong = [(label, said) for label, said in pairs if label != said]
    return {
        "accuracy": (len(pairs) - len(wrong)) / len(pairs),
        "errors": [sum(label == d for label, _ in wrong) for d in range(10)],
        "false_positives": sum(said == digit for _, said in wrong),
    }


def costs(trained: int, tensors: int, file: Tensors | int) -> dict[str, int]:
    if isinstance(file, dict):
        torch.save(file, buffer := io.BytesIO())
        file = buffer.tell()
    # Adam keeps two moments of each number and the count of steps of each tensor
    return {
        "trainable_parameters": trained,
        "optimizer_bytes": 8 * trained * bool(tensors) + 4 * tensors,
        "file_bytes": file,
    }


def for_peft(lora: Tensors) -> Tensors:
    return {f"base_model.model.{k[:-1]}lora_{k[-1]}.weight": x for k, x in lora.items()}


def turned(split: main.Split, angle: float) -> main.Split:
    black = -main.MEAN / main.STD
    images = (split.images - black).view(-1, 1, 28, 28)
    images = rotate(images, angle, InterpolationMode.BILINEAR) + black
    return main.Split(images.flatten(1), split.labels)


def gram(state: Tensors, after: Tensors, layer: str) -> Tensor:
    change = (after[f"{layer}.weight"] - state[f"{layer}.weight"]).double()
    return change.T @ change if layer != "linear3" else change @ change.T


def energies(state: Tensors, after: Tensors) -> dict[str, dict[str, float]]:
    """The squared singular values of a matrix are the eigenvalues of its Gram matrix."""
    held: dict[str, dict[str, float]] = {f"update_energy_rank{rank}": {} for rank in (1, 2, 4, 8)}
    for layer in LAYERS:
        squares = torch.linalg.eigvalsh(gram(state, after, layer)).flip(0)
        for name, shares in held.items():
            shares[layer] = float(squares[: int(name[-1])].sum() / squares.sum())
    return held


def rank1_part(state: Tensors, after: Tensors) -> Tensors:
    part = {}
    for layer in LAYERS:
        change = after[f"{layer}.weight"] - state[f"{layer}.weight"]
        row = torch.linalg.svd(change, full_matrices=False).Vh[:1].clone()
        part |= {f"{layer}.A": row, f"{layer}.B": change @ row.T}
    return part


def dial_of(name: str, curve: dict[float, dict[str, Any]], digit: int) -> list[dict[str, Any]]:
    return [
        {name: at, "accuracy": score["accuracy"], "target_errors": score["errors"][digit]}
        for at, score in curve.items()
    ]


def furthest(curve: dict[float, dict[str, Any]], points: float) -> float:
    least = curve[0.0]["accuracy"] - points / 100
    return max(at for at, score in curve.items() if score["accuracy"] > least - 1e-9)


def reference(data: main.Data, **options: Any) -> SimpleNamespace:
    o = SimpleNamespace(**options)
    digit, scaling = o.digit, o.alpha / o.rank
    torch.manual_seed(o.seed)
    model = main.MNISTClassifier()
    state = {name: value.detach() for name, value in model.state_dict().items()}
    learn(state, lambda x: logits_of(state, x), data.train, (o.epochs, o.batch_size, o.lr), o.seed)
    own = data.train.labels == digit
    target = main.Split(data.train.images[own], data.train.labels[own])
    lora, full = new_lora(o.rank), copy.deepcopy(state)
    plan = o.lora_epochs, o.lora_batch_size
    learn(lora, lambda x: logits_of(state, x, lora, scaling), target, (*plan, o.lora_lr), o.seed)
    learn(full, lambda x: logits_of(full, x), target, (*plan, o.full_lr), o.seed)
    rank1 = rank1_part(state, full)

    def dials(split: main.Split, strengths: list[float]) -> tuple[Any, Any]:
        plain = logits_of(state, split.images)
        biased = {i / 4: plain.clone() for i in range(33)}
        for bias, logits in biased.items():
            logits[:, digit] += bias
        found = {
            "lora": {s: logits_of(state, split.images, lora, s * scaling) for s in strengths},
            "logit_bias": biased,
            "full": {0.0: plain, 1.0: logits_of(full, split.images)},
        }
        return found, {
            name: {at: scored(x, split.labels, digit) for at, x in dial.items()}
            for name, dial in found.items()
        }

    _, validation = dials(data.validation, [i / 10 for i in range(11)])
    logits, test = dials(data.test, sorted({0.0, 0.2, 0.5, 0.8, 0.9, 1.0, o.strength}))
    bias = furthest(validation["logit_bias"], o.max_accuracy_drop)
    last = scored(logits_of(state, data.test.images, rank1, 1.0), data.test.labels, digit)
    all_of_it = costs(2_807_010, 6, state)
    of_lora = costs(6_794 * o.rank, 6, for_peft(lora))
    methods = {
        "baseline": test["full"][0.0] | all_of_it,
        "lora": test["lora"][1.0] | of_lora,
        "lora_off": test["full"][0.0] | of_lora,
        "lora_balanced": test["lora"][o.strength] | of_lora,
        "logit_bias": test["logit_bias"][bias] | costs(0, 0, 4),
        "full": test["full"][1.0] | all_of_it,
        "full_rank1": last | all_of_it | {"file_bytes": costs(0, 0, for_peft(rank1))["file_bytes"]},
    }

    # new data; torch's generator goes on where LoRA left it, with what else was made in between
    new_lora(1)
    nn.Linear(10, 10)
    new1, new8, new_full = new_lora(1), new_lora(8), copy.deepcopy(state)
    biases = {"bias": torch.zeros(10)}
    forwards: dict[str, tuple[Tensors, Callable[[Tensor], Tensor], float]] = {
        "baseline": ({}, lambda x: logits_of(state, x), 0),
        "biases": (biases, lambda x: logits_of(state, x) + biases["bias"], o.biases_lr),
        "lora_rank1": (new1, lambda x: logits_of(state, x, new1, 1.0), o.rank1_lr),
        "lora_rank8": (new8, lambda x: logits_of(state, x, new8, 1.0), o.rank8_lr),
        "full": (new_full, lambda x: logits_of(new_full, x), o.turned_lr),
    }
    few, validation_turned, test_turned = (
        turned(split, o.angle) for split in (data.train, data.validation, data.test)
    )
    few_logits = main.Split(logits_of(state, few.images), few.labels)
    new_methods: dict[str, dict[str, Any]] = {}
    turned_logits = {}
    for name, (values, forward, lr) in forwards.items():
        if name == "biases":
            learn(
                values,
                lambda x: F.linear(x, torch.eye(10), biases["bias"]),
                few_logits,
                (1, 128, lr),
                o.seed,
            )
        elif values:
            learn(values, forward, few, (1, 128, lr), o.seed)
        off = forwards["baseline"][1] if name.startswith("lora") else forward
        turned_logits[name] = forward(test_turned.images)
        count = sum(x.numel() for x in values.values())
        file = for_peft(values) if name.startswith("lora") else values or 0
        new_methods[name] = {
            **costs(count, len(values), file),
            **scored(turned_logits[name], data.test.labels, digit),
            "validation_accuracy": scored(
                forward(validation_turned.images), data.validation.labels, digit
            )["accuracy"],
        }
        for key, way in (("accuracy_upright", off), ("accuracy_upright_on", forward)):
            upright = scored(way(data.test.images), data.test.labels, digit)
            new_methods[name][key] = upright["accuracy"]

    change = logits["lora"][1.0] - logits["lora"][0.0]
    change = (change - change.mean(1, keepdim=True)).double()
    constant = change.mean(0)
    return SimpleNamespace(
        state=state,
        lora=lora,
        logits=logits,
        turned_logits=turned_logits,
        validation=validation,
        test=test,
        methods=methods,
        new_methods=new_methods,
        bias=bias,
        share=float(constant.square().sum() / change.square().sum(1).mean()),
        constant_logit=float(constant[digit]),
        energies=energies(state, full),
        new_energies=energies(state, new_full),
        checks={
            "frozen_weights_unchanged": True,
            "lora_off_equals_baseline": True,
            "merged_equals_lora": True,
            "parameter_overhead": 6_794 * o.rank / 2_807_010,
        },
    )


@pytest.fixture(scope="module")
def expected(data: main.Data) -> SimpleNamespace:
    with torch.random.fork_rng(devices=[]):
        return reference(data, **OPTIONS)


# --- Both are the same ----------------------------------------------------------------------------


def test_the_run_can_tell_one_thing_from_another(expected: SimpleNamespace) -> None:
    values = [float(x) for x in OPTIONS.values() if not isinstance(x, str)]
    assert len(set(values)) == len(values)
    assert all(OPTIONS[name] != getattr(main.Settings(), name) for name in OPTIONS)
    for methods in (expected.methods, expected.new_methods):
        shown = [m for name, m in methods.items() if name != "lora_off"]
        assert all(a["errors"] != b["errors"] for a, b in itertools.combinations(shown, 2))
        assert all(method["accuracy"] > 0.3 for method in shown)
    bias = expected.validation["logit_bias"]
    assert expected.bias != furthest(bias, 1.0)
    assert bias != expected.test["logit_bias"]


def test_every_option_is_in_the_metrics_and_on_the_terminal(found: Found) -> None:
    assert found.metrics()["config"] == OPTIONS
    device = f"cpu with {torch.get_num_threads()} threads, torch {torch.__version__}"
    listed = [f"{k.replace('_', ' ')} {v}" for k, v in (OPTIONS | {"device": device}).items()]
    assert ", ".join(listed) in " ".join(found.stdout.split())


@pytest.mark.parametrize("name", METHODS)
def test_scores_and_costs(name: str, entry: dict[str, Any], expected: SimpleNamespace) -> None:
    assert entry["methods"].keys() == set(METHODS)
    assert entry["methods"][name] == expected.methods[name]


@pytest.mark.parametrize("name", NEW_METHODS)
def test_new_data(name: str, entry: dict[str, Any], expected: SimpleNamespace) -> None:
    new = entry["new_data"]
    assert (new["angle"], new["images"]) == (OPTIONS["angle"], 5000)
    assert new["methods"].keys() == set(NEW_METHODS)
    assert new["methods"][name] == expected.new_methods[name]


def test_dials(entry: dict[str, Any], expected: SimpleNamespace) -> None:
    assert entry["trade_off"] == {
        name: dial_of("bias" if name == "logit_bias" else "strength", curve, OPTIONS["digit"])
        for name, curve in expected.test.items()
    }
    curves = expected.validation
    ends = {
        "baseline": curves["full"][0.0],
        "lora": curves["lora"][1.0],
        "full": curves["full"][1.0],
    }
    assert entry["validation"] == ends


def test_what_is_chosen_read_off_and_explained(
    entry: dict[str, Any], expected: SimpleNamespace
) -> None:
    assert entry["seed"] == OPTIONS["seed"]
    assert entry["checks"] == expected.checks
    assert entry["lora_strength"] == OPTIONS["strength"]
    assert entry["logit_bias"] == expected.bias
    digit, most = OPTIONS["digit"], expected.methods["lora"]["errors"][OPTIONS["digit"]]
    control = expected.test["logit_bias"].values()
    reached = [score["accuracy"] for score in control if score["errors"][digit] <= most]
    assert entry["control_at_lora_errors"] == reached[0]
    assert reached[0] not in {m["accuracy"] for m in expected.methods.values()}
    assert entry["constant_share"] == pytest.approx(expected.share, rel=1e-5)
    assert entry["constant_logit"] == pytest.approx(expected.constant_logit, rel=1e-5)


def test_each_lora_is_checked_on_validation_images(found: Found, data: main.Data) -> None:
    _, loras, ranks, looked_at = zip(*found.arguments["check_lora"], strict=True)
    assert ranks == (OPTIONS["rank"], 1, 8) * OPTIONS["seeds"]
    assert len(set(map(id, loras))) == len(ranks)
    for images, n in zip(looked_at, (400, 100, 100) * OPTIONS["seeds"], strict=True):
        assert torch.equal(images, data.validation.images[:n])  # 400: 1,000 of MNIST's


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_energies(rank: int, entry: dict[str, Any], expected: SimpleNamespace) -> None:
    name = f"update_energy_rank{rank}"
    assert entry[name] == pytest.approx(expected.energies[name], rel=1e-4)
    assert entry["new_data"][name] == pytest.approx(expected.new_energies[name], rel=1e-4)


def test_the_saved_weights_are_those_of_the_first_seed(
    found: Found, expected: SimpleNamespace
) -> None:
    for name, held in (
        ("baseline.pt", expected.state),
        ("adapter/adapter_model.bin", for_peft(expected.lora)),
    ):
        saved = found.load(name)
        assert saved.keys() == held.keys()
        assert all(torch.equal(saved[key], held[key]) for key in held), name
    assert json.loads((found.folder / "adapter" / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "r": OPTIONS["rank"],
        "lora_alpha": OPTIONS["alpha"],
        "target_modules": list(LAYERS),
    }


def test_each_picture_is_drawn_of_what_was_found(
    found: Found, data: main.Data, expected: SimpleNamespace
) -> None:
    drawn = {}
    for name in FIGURES:
        (drawn[name],) = found.arguments[name]
    digit, (_, runs, test, first) = OPTIONS["digit"], drawn["draw_examples"]
    assert [run.seed for run in runs] == [7, 8] and test is data.test
    image = data.test.images[data.test.labels.tolist().index(digit)]
    assert drawn["draw_examples"] == (digit, runs, test, first)
    assert drawn["draw_errors"] == drawn["draw_trade_off"] == (digit, runs)
    assert drawn["draw_low_rank"][:2] == (digit, runs)
    assert torch.equal(drawn["draw_low_rank"][2], image)
    assert drawn["draw_new_data"] == (OPTIONS["angle"], runs, test, first)
    for logits, held in (
        *((first.logits[name], dial) for name, dial in expected.logits.items()),
        (first.turned_logits, expected.turned_logits),
    ):
        assert logits.keys() == held.keys()
        assert all(torch.equal(logits[key], held[key]) for key in held)


def test_each_picture_is_in_the_file_of_its_name(found: Found) -> None:
    sizes = {}
    for draw, name in zip(
        FIGURES, ("examples", "error_counts", "trade_off", "low_rank", "new_data"), strict=True
    ):
        png = (found.folder / f"{name}.png").read_bytes()
        sizes[name] = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
        assert sizes[name] == tuple(int(120 * x) for x in found.returned[draw].get_size_inches())
    assert len(set(sizes.values())) == 5


def test_what_is_printed_is_of_all_seeds(found: Found) -> None:
    settings = main.Settings(**OPTIONS)
    with redirect_stdout(io.StringIO()) as out:
        main.print_results(settings, found.arguments["draw_errors"][0][1])
    assert out.getvalue() in found.stdout


# --- Other seeds and strengths --------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(data: main.Data) -> tuple[main.Run, main.Artifacts]:
    """The second seed by itself, with a strength that is chosen."""
    others = {name: x for name, x in OPTIONS.items() if name not in ("strength", "seeds")}
    return main.run_seed(main.parse(command_line(**others | {"seed": 8})), 8, data)


def test_two_seeds_are_two_runs_of_one(
    found: Found, alone: tuple[main.Run, main.Artifacts]
) -> None:
    first, second = found.metrics()["runs"]
    single = main.metrics(main.Settings(**OPTIONS), torch.device("cpu"), [alone[0]])
    (rest,) = json.loads(main.to_json(single))["runs"]
    assert first["methods"] != second["methods"]
    assert second.pop("lora_strength") == OPTIONS["strength"] != rest.pop("lora_strength")
    balanced = second["methods"]["lora_balanced"]
    assert {
        "strength": OPTIONS["strength"],
        "accuracy": balanced["accuracy"],
        "target_errors": balanced["errors"][OPTIONS["digit"]],
    } in second["trade_off"]["lora"]
    for run in (second, rest):  # all that does not depend on the strength
        del run["methods"]["lora_balanced"]
        curve = run["trade_off"]["lora"]
        run["trade_off"]["lora"] = [x for x in curve if x["strength"] in main.STRENGTHS]
    assert second == rest


def test_a_strength_that_is_not_given_is_chosen_on_validation(
    alone: tuple[main.Run, main.Artifacts], data: main.Data
) -> None:
    run, artifacts = alone
    state, scaling = artifacts.baseline.state_dict(), OPTIONS["alpha"] / OPTIONS["rank"]
    lora = {f"{key.split('.')[2]}.{key[-8]}": x for key, x in artifacts.adapter.items()}

    def chosen(split: main.Split) -> float:
        curve = {i / 10: logits_of(state, split.images, lora, i / 10 * scaling) for i in range(11)}
        scores = {at: scored(x, split.labels, OPTIONS["digit"]) for at, x in curve.items()}
        return furthest(scores, OPTIONS["max_accuracy_drop"])

    assert run.lora_strength == chosen(data.validation) != chosen(data.test)
    assert 0 < run.lora_strength < 1
    assert run.methods["lora_balanced"].test == run.trade_off["lora"][run.lora_strength]


def test_lora_on_new_data_has_to_switch_off_to_the_bit(
    data: main.Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, baseline = first_images(data, 50, 50, 50), main.MNISTClassifier()
    upright, forward = main.evaluate(baseline, few.test.images), main.LoRAParametrization.forward

    def nudged(lora: main.LoRAParametrization, weight: Tensor) -> Tensor:
        return forward(lora, weight) if lora.strength else torch.nextafter(weight, weight + 1)

    monkeypatch.setattr(main.LoRAParametrization, "forward", nudged)
    with pytest.raises(main.RunError, match="'lora_off_equals_baseline': [1-9]"):
        main.learn_new_data(main.Settings(), 0, baseline, few, upright)
