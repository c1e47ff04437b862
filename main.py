"""LoRA on MNIST, in one script.

    pip install -r requirements.txt && python main.py

Trains a classifier of handwritten digits, attaches LoRA (Hu et al. 2021,
https://arxiv.org/abs/2106.09685) to every linear layer, fine-tunes on images of one digit alone
(9, which the classifier gets wrong most often), proves that no frozen weight moved, and reports
what was gained, what the other digits paid for it, and whether something simpler would have earned
the same.

The chapters: settings, data, model, LoRA, low rank, training, evaluation, experiment; then report
and command line, which only show what the experiment found.
"""

# torchvision and tqdm carry no types, and some methods of torch neither:
# mypy: disable-error-code="import-untyped, no-untyped-call"

from __future__ import annotations

import gc

gc.disable()  # else a quarter of the start goes into collecting while thousands of modules load

import argparse
import copy
import io
import json
import math
import os
import platform
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from http.client import HTTPException
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchvision.datasets import MNIST
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

gc.freeze()
gc.enable()

# --- Settings -------------------------------------------------------------------------------------

DATA_DIR = Path(__file__).resolve().parent / "data"  # beside this script, wherever it is run
OUTPUT_DIR = Path("outputs")


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on; each field is an option of the command line."""

    digit: int = option(9, "the digit to fine-tune on")
    rank: int = option(1, "rank r of LoRA's update")
    alpha: float = option(1.0, "LoRA's update is scaled by alpha / rank")
    seed: int = option(0, "seed of all that is random")
    seeds: int = option(1, "repeat for this many seeds, from --seed up")
    epochs: int = option(1, "baseline: passes over the 55,000 training images")
    batch_size: int = option(256, "baseline: images in a step")
    lr: float = option(2e-3, "baseline: learning rate, which falls to 0")
    lora_epochs: int = option(1, "LoRA and full fine-tuning: passes over the digit's images")
    lora_batch_size: int = option(128, "LoRA and full fine-tuning: images in a step")
    lora_lr: float = option(1.5e-3, "LoRA: learning rate, which falls to 0")
    full_lr: float = option(5e-5, "full fine-tuning: learning rate, which falls to 0")
    strength: float | None = option(
        None, "strength of balanced LoRA (default: chosen on validation)"
    )
    max_accuracy_drop: float = option(1.0, "points of accuracy that a balanced method may cost")
    device: str = option("auto", "auto (an accelerator if there is one), cpu, cuda or mps")
    data_dir: Path = option(DATA_DIR, "folder that holds MNIST/raw")
    output_dir: Path = option(OUTPUT_DIR, "folder for pictures, metrics and weights")


# Three dials, which all begin at 0, the baseline.
STRENGTHS = [i / 10 for i in range(1, 11)]  # of LoRA, up to 1, as it was trained
BIASES = [i / 4 for i in range(1, 33)]  # of the control: the number added to one logit
FULL_STRENGTHS = [0.3, 0.7, 1.0]  # on the line from the baseline to full fine-tuning

# --- Data -----------------------------------------------------------------------------------------

MEAN, STD = 0.1307, 0.3081  # of the training pixels, which lie in [0, 1]


@dataclass(frozen=True)
class Split:
    """Images (n, 784), normalised float32, and their labels (n,)."""

    images: Tensor
    labels: Tensor

    def only(self, digit: int) -> Split:
        return Split(self.images[self.labels == digit], self.labels[self.labels == digit])


@dataclass(frozen=True)
class Data:
    """Weights are learned on `train`; all else is chosen on `validation` and reported on `test`."""

    train: Split
    validation: Split
    test: Split


def load_mnist(folder: Path, device: torch.device) -> Data:
    """Read MNIST into memory, once: 55,000, 5,000 and 10,000 images.

    torchvision extracts the archives that lie in `folder`/MNIST/raw and downloads those that do
    not. Raises what torchvision raises where it can do neither.
    """

    def split(file: MNIST) -> Split:
        pixels = file.data.to(device, torch.float32).flatten(1)
        return Split(pixels.div_(255).sub_(MEAN).div_(STD), file.targets.to(device))

    train, test = (split(MNIST(folder, train=train, download=True)) for train in (True, False))
    return Data(
        train=Split(train.images[:-5000], train.labels[:-5000]),
        validation=Split(train.images[-5000:], train.labels[-5000:]),
        test=test,
    )


# --- Model ----------------------------------------------------------------------------------------


class MNISTClassifier(nn.Module):
    """784 -> 1000 -> 2000 -> 10 with ReLU: 2,807,010 parameters. It knows nothing of LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(28 * 28, 1000)
        self.linear2 = nn.Linear(1000, 2000)
        self.linear3 = nn.Linear(2000, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 784)."""
        hidden = self.linear1(images).relu_()  # in place: saves one pass over memory
        hidden = self.linear2(hidden).relu_()
        logits: Tensor = self.linear3(hidden)
        return logits


# --- LoRA -----------------------------------------------------------------------------------------


class LoRAParametrization(nn.Module):
    """W -> W + strength * (alpha / r) * B A  (Hu et al. 2021, section 4.1).

    A parametrization is a module through which a layer reads its own weight W (out, in): the class
    of the layer, and of the model around it, stays as it is. lora_A (r, in) starts random and
    lora_B (out, r) at zero, so that training starts at exactly W.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        lora_A = torch.randn(rank, in_features) / math.sqrt(in_features)
        self.lora_A = nn.Parameter(lora_A.to(weight))  # drawn on the CPU: the same on any device
        self.lora_B = nn.Parameter(weight.new_zeros(out_features, rank))
        self.scaling = alpha / rank
        self.strength = 1.0

    def forward(self, weight: Tensor) -> Tensor:
        """The weight (out, in) that the layer uses; at strength 0 the frozen one itself."""
        if self.strength == 0:
            return weight
        return torch.addmm(weight, self.lora_B, self.lora_A, alpha=self.strength * self.scaling)


def attach_lora(model: nn.Module, rank: int, alpha: float) -> nn.Module:
    """Freeze all of `model`, biases too, and attach LoRA to each of its linear layers, in place.

    Raises ValueError if a layer cannot hold this rank or has a parametrization already.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        if not 1 <= rank <= min(layer.weight.shape):
            raise ValueError(f"rank {rank}: {layer} holds 1 to {min(layer.weight.shape)}")
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(f"{layer} has a parametrization already")
    model.requires_grad_(False)
    for layer in layers:
        lora = LoRAParametrization(layer.weight, rank, alpha)
        parametrize.register_parametrization(layer, "weight", lora)
    return model


def lora_layers(model: nn.Module) -> dict[str, LoRAParametrization]:
    """The LoRA of each layer that has one, by the name of the layer."""
    return {
        name.removesuffix("parametrizations.weight.0").rstrip("."): module
        for name, module in model.named_modules()
        if isinstance(module, LoRAParametrization)
    }


def set_strength(model: nn.Module, strength: float) -> nn.Module:
    """Turn the dial of each LoRA in `model`, in place: 0 is off, 1 is as it was trained."""
    for lora in lora_layers(model).values():
        lora.strength = strength
    return model


@contextmanager
def lora_off(model: nn.Module) -> Iterator[None]:
    """Switch LoRA off inside a `with` block, after which, error or not, all is as before."""
    strengths = {lora: lora.strength for lora in lora_layers(model).values()}
    set_strength(model, 0.0)
    try:
        yield
    finally:
        for lora, strength in strengths.items():
            lora.strength = strength


def merge_lora(model: nn.Module) -> nn.Module:
    """Write the weights that LoRA makes, at its strength, into plain layers; remove LoRA, in place.

    Of a model and its deep copy merge only one: torch lets their parametrized layers share a class,
    and removing a parametrization changes that class.
    """
    for name in lora_layers(model):
        parametrize.remove_parametrizations(model.get_submodule(name), "weight")
    return model


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """LoRA's tensors by the names that Hugging Face PEFT reads ("PEFT checkpoint format")."""
    return {
        f"base_model.model.{name}.{matrix}.weight": getattr(lora, matrix).detach()
        for name, lora in lora_layers(model).items()
        for matrix in ("lora_A", "lora_B")
    }


def to_bytes(state: Mapping[str, Tensor]) -> bytes:
    """What torch.save writes: into memory, since into a file it writes the file's name too."""
    buffer = io.BytesIO()
    torch.save({name: tensor.cpu() for name, tensor in state.items()}, buffer)
    return buffer.getvalue()


# --- Low rank -------------------------------------------------------------------------------------


def factorize(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best rank-r approximation B A of a matrix (m, n), by SVD (Eckart and Young 1936).

    Returns B (m, r), which carries the singular values, A (r, n), and all the singular values:
    the squares of those after the r-th add up to the squared error of B A.
    Raises ValueError if the rank is not from 1 to min(m, n).
    """
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"rank {rank}: {tuple(matrix.shape)} holds 1 to {min(matrix.shape)}")
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank], Vh[:rank], S


def energy_kept(singular_values: Tensor) -> list[float]:
    """The share of the sum of squares that ranks 1, 2, ... keep, in [0, 1]."""
    energy = singular_values.double().square().cumsum(0)
    shares = (energy / energy[-1]).nan_to_num(1.0)  # a zero matrix is kept whole
    return [float(share) for share in shares]


def low_rank_part(
    before: nn.Module, after: nn.Module, rank: int
) -> tuple[nn.Module, dict[str, list[float]]]:
    """What low rank keeps of a training that changed every weight from `before` to `after`.

    Returns a copy of `before` whose LoRA is the best rank-r approximation of each weight's change
    (biases stay as before), and by layer the shares of energy that ranks 1, 2, ... keep.
    """
    model = attach_lora(copy.deepcopy(before), rank, alpha=rank)  # scaling 1
    energy = {}
    for name, lora in lora_layers(model).items():
        update = after.get_parameter(f"{name}.weight") - before.get_parameter(f"{name}.weight")
        B, A, singular_values = factorize(update.detach().cpu(), rank)
        lora.lora_B.data.copy_(B)
        lora.lora_A.data.copy_(A)
        energy[name] = energy_kept(singular_values)
    return model, energy


# --- Training -------------------------------------------------------------------------------------

progress = partial(tqdm, disable=None, leave=False, ncols=79)  # None: no bars in a log file


class RunError(Exception):
    """The experiment itself failed: training diverged, or a check does not hold."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, and what to lower where that diverges."""

    name: str
    epochs: int
    batch_size: int
    lr: float
    to_lower: str


@contextmanager
def reduced_precision() -> Iterator[None]:
    """Let float32 matrices be multiplied in bfloat16 on a CPU that has it, in TF32 on CUDA.

    For training alone, which takes a third less time on a CPU with AMX.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@reduced_precision()
def train(model: nn.Module, split: Split, recipe: Recipe, seed: int) -> int:
    """Train whatever in `model` is not frozen, in place: the one loop of every stage.

    Cross-entropy, Adam, a learning rate that falls linearly to zero, batches in an order drawn
    from `seed`. Returns the bytes of the optimiser's state.
    Raises RunError if the loss is not finite.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=recipe.lr, fused=True)
    steps = recipe.epochs * math.ceil(len(split.images) / recipe.batch_size)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    generator = torch.Generator().manual_seed(seed)
    with progress(total=steps, desc=recipe.name, unit="step") as bar:
        for _ in range(recipe.epochs):
            order = torch.randperm(len(split.images), generator=generator).to(split.images.device)
            for batch in order.split(recipe.batch_size):
                loss = F.cross_entropy(model(split.images[batch]), split.labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                bar.update()
                bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
                if not math.isfinite(loss.item()):
                    where = f"the loss is {loss.item()} at step {scheduler.last_epoch} of {steps}"
                    raise RunError(f"{recipe.name}: {where}; lower {recipe.to_lower}")
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values())


def count_trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# --- Evaluation -----------------------------------------------------------------------------------


CHUNK = 2500  # images that are evaluated at once


def check_finite(logits: Tensor, recipe: Recipe) -> Tensor:
    """The logits themselves. Raises RunError, which names the training, if one is not finite."""
    if not logits.isfinite().all():
        where = "a logit is not finite after the last step"
        raise RunError(f"{recipe.name}: {where}; lower {recipe.to_lower}")
    return logits


@torch.inference_mode()
def evaluate(model: nn.Module, images: Tensor, recipe: Recipe) -> Tensor:
    """Logits (n, 10) of images (n, 784) by a model that `recipe` trained."""
    with parametrize.cached():  # W + B A once, not once per chunk
        logits = torch.cat([model(chunk) for chunk in images.split(CHUNK)])
    return check_finite(logits, recipe)


@torch.inference_mode()
def turn_dial(
    model: nn.Module, strengths: Sequence[float], images: Tensor, recipe: Recipe
) -> dict[float, Tensor]:
    """Logits (n, 10) of images (n, 784) at each strength of LoRA; leaves `model` at strength 1.

    The first layer multiplies by W + strength * B A, so that between off and on its output moves on
    a straight line: two evaluations of that layer serve all strengths.
    """
    first = model.get_submodule("linear1")
    rest = copy.deepcopy(model)
    rest.set_submodule("linear1", nn.Identity())
    logits = {strength: images.new_empty(len(images), 10) for strength in strengths}
    for start in progress(range(0, len(images), CHUNK), desc="LoRA's dial", unit="chunk"):
        rows = slice(start, start + CHUNK)
        off, on = (set_strength(first, at)(images[rows]) for at in (0.0, 1.0))
        for strength, outputs in logits.items():
            outputs[rows] = set_strength(rest, strength)(off.lerp(on, strength))
    return {strength: check_finite(outputs, recipe) for strength, outputs in logits.items()}


@dataclass(frozen=True)
class Score:
    """Accuracy in [0, 1], errors on each digit, and other digits' images called the target."""

    accuracy: float
    errors: list[int]
    false_positives: int


def score(logits: Tensor, labels: Tensor, digit: int) -> Score:
    """Compare logits (n, 10) with labels (n,)."""
    labels, predictions = labels.cpu(), logits.argmax(1).cpu()
    wrong = predictions != labels
    return Score(
        accuracy=int((~wrong).sum()) / len(labels),
        errors=torch.bincount(labels[wrong], minlength=10).tolist(),
        false_positives=int((wrong & (predictions == digit)).sum()),
    )


def add_biases(logits: Tensor, digit: int) -> dict[float, Tensor]:
    """The control's dial: logits (n, 10), by the number that is added to the digit's own."""
    one_hot = F.one_hot(torch.tensor(digit), 10).to(logits)
    return {bias: logits + bias * one_hot for bias in (0.0, *BIASES)}


def interpolate(start: nn.Module, end: nn.Module, strength: float) -> nn.Module:
    """A new model on the straight line between two (WiSE-FT, Wortsman et al. 2022)."""
    model = copy.deepcopy(start)
    with torch.no_grad():
        for parameter, target in zip(model.parameters(), end.parameters(), strict=True):
            parameter.lerp_(target, strength)
    return model


def choose(validation: Mapping[float, Score], max_accuracy_drop: float) -> float:
    """The furthest position of a dial that costs at most so many points of validation accuracy."""
    least = validation[0.0].accuracy - max_accuracy_drop / 100 - 1e-9  # less what rounding may do
    return max(at for at, found in validation.items() if found.accuracy >= least)


def read_off(dial: Mapping[float, Score], digit: int, most: int) -> float | None:
    """The accuracy where a dial first leaves at most so many errors on the digit, if it ever does.

    It reads a finished curve; nothing is chosen by it.
    """
    return next((at.accuracy for at in dial.values() if at.errors[digit] <= most), None)


def require(holds: bool, otherwise: str) -> None:
    """Raise RunError unless `holds`; unlike an assert, `python -O` keeps it."""
    if not holds:
        raise RunError(f"check failed: {otherwise}")


def check_frozen(before: Mapping[str, Tensor], model: nn.Module) -> None:
    """Every tensor of the plain model is in the model with LoRA as it was, bit for bit."""
    after = {
        name.replace("parametrizations.weight.original", "weight"): tensor
        for name, tensor in model.state_dict().items()
    }
    for name, tensor in before.items():  # as bytes, since to floats 0.0 equals -0.0
        same = name in after and torch.equal(
            tensor.view(torch.uint8), after[name].view(torch.uint8)
        )
        require(same, f"the frozen tensor {name} is not what it was before fine-tuning")


def check_off(baseline: Tensor, off: Tensor) -> None:
    """With LoRA off, the logits are exactly the baseline's."""
    differ = int((baseline != off).sum())
    require(differ == 0, f"with LoRA off, {differ} of {off.numel()} logits are not the baseline's")


def check_merged(lora: Tensor, merged: Tensor) -> None:
    """Merged into plain weights, LoRA predicts the same."""
    differ = int((lora.argmax(1) != merged.argmax(1)).sum())
    require(differ == 0, f"merging LoRA changed {differ} of {len(lora)} predictions")


def check_overhead(added: int, parameters: int, rank: int) -> float:
    """LoRA adds at most 0.25 % of the parameters for each rank; returns the share."""
    share, limit = added / parameters, 0.0025 * rank
    require(
        share <= limit, f"LoRA adds {100 * share:.3f} % of parameters, over {100 * limit:.2f} %"
    )
    return share


# --- Experiment -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One way to treat the target digit: what it trains, what it ships, and how it scores."""

    trainable_parameters: int
    optimizer_bytes: int
    file_bytes: int
    test: Score


@dataclass(frozen=True)
class Run:
    """What one seed found: numbers only, so that memory does not grow with the seeds."""

    seed: int
    methods: dict[str, Method]
    parameter_overhead: float
    lora_strength: float  # of lora_balanced
    logit_bias: float
    control_at_lora_errors: float | None  # the control's accuracy with as few errors as LoRA
    validation: dict[str, dict[float, Score]]  # by method: its dial, for what is chosen
    trade_off: dict[str, dict[float, Score]]  # the same on the test set, to be reported
    update_energy: dict[str, list[float]]  # by layer: what ranks 1, 2, ... keep of full's update


@dataclass(frozen=True)
class Artifacts:
    """What is saved and drawn of the first seed alone; logits are of the test images."""

    baseline: nn.Module
    adapter: dict[str, Tensor]
    baseline_logits: Tensor
    lora_logits: Tensor


Stage = Callable[[str], AbstractContextManager[object]]


def run_seed(settings: Settings, seed: int, data: Data, stage: Stage) -> tuple[Run, Artifacts]:
    """The whole experiment for one seed; each of its stages runs inside `with stage(name)`."""
    s, digit = settings, settings.digit
    target, validation, test = data.train.only(digit), data.validation, data.test
    recipe = Recipe("baseline", s.epochs, s.batch_size, s.lr, "--lr")
    lora_recipe = Recipe(
        "LoRA", s.lora_epochs, s.lora_batch_size, s.lora_lr, "--lora-lr or --alpha"
    )
    full_recipe = replace(lora_recipe, name="full fine-tuning", lr=s.full_lr, to_lower="--full-lr")

    with stage("baseline: train on all digits"):
        torch.manual_seed(seed)  # of torch's own generator: nn.Linear and LoRA draw from it in turn
        baseline = MNISTClassifier().to(test.images.device)
        parameters = count_trainable(baseline)
        baseline_bytes = train(baseline, data.train, recipe, seed)
        validation_logits, test_logits = (
            evaluate(baseline, split.images, recipe) for split in (validation, test)
        )

    with stage(f"LoRA: train on {len(target.labels):,} images of {digit}"):
        lora = attach_lora(copy.deepcopy(baseline), s.rank, s.alpha)
        added = count_trainable(lora)
        lora_bytes = train(lora, target, lora_recipe, seed)
        adapter = adapter_state(lora)

    strengths = sorted({*STRENGTHS, *([s.strength] if s.strength else [])})
    with stage(f"LoRA: turn the dial, {len(strengths)} strengths"):
        validation_dial, test_dial = (
            turn_dial(lora, strengths, split.images, lora_recipe) for split in (validation, test)
        )

    with stage("LoRA: check"):
        check_frozen(baseline.state_dict(), lora)
        with lora_off(lora):
            off_logits = evaluate(lora, test.images, lora_recipe)
        check_off(test_logits, off_logits)
        merged = merge_lora(lora)
        check_merged(test_dial[1.0], evaluate(merged, test.images, lora_recipe))
        overhead = check_overhead(added, parameters, s.rank)

    with stage("full fine-tuning: train on LoRA's batches"):
        full = copy.deepcopy(baseline)
        full_bytes = train(full, target, full_recipe, seed)

    with stage("full fine-tuning: the line to it, and its rank-1 part"):
        full_logits = evaluate(full, validation.images, full_recipe)  # only its rate is chosen
        line = {
            at: evaluate(interpolate(baseline, full, at), test.images, full_recipe)
            for at in progress(FULL_STRENGTHS, desc="line to full fine-tuning")
        }
        rank1, energy = low_rank_part(baseline, full, rank=1)
        rank1_logits = evaluate(rank1, test.images, full_recipe)

    def scores(split: Split, **dials: dict[float, Tensor]) -> dict[str, dict[float, Score]]:
        return {
            name: {at: score(logits, split.labels, digit) for at, logits in dial.items()}
            for name, dial in dials.items()
        }

    on_validation = scores(
        validation,
        lora={0.0: validation_logits, **validation_dial},
        logit_bias=add_biases(validation_logits, digit),
        full={0.0: validation_logits, 1.0: full_logits},
    )
    on_test = scores(
        test,
        lora={0.0: test_logits, **test_dial},
        logit_bias=add_biases(test_logits, digit),
        full={0.0: test_logits, **line},
    )
    drop = s.max_accuracy_drop
    bias = choose(on_validation["logit_bias"], drop)
    strength = choose(on_validation["lora"], drop) if s.strength is None else s.strength

    model_size, rank1_size, adapter_size = (
        len(to_bytes(state)) for state in (baseline.state_dict(), adapter_state(rank1), adapter)
    )
    of_lora = partial(Method, added, lora_bytes, adapter_size)
    of_full = partial(Method, parameters, full_bytes)
    methods = {
        "baseline": Method(parameters, baseline_bytes, model_size, on_test["lora"][0.0]),
        "lora": of_lora(on_test["lora"][1.0]),
        "lora_off": of_lora(score(off_logits, test.labels, digit)),
        "lora_balanced": of_lora(on_test["lora"][strength]),
        "logit_bias": Method(1, 0, 4, on_test["logit_bias"][bias]),  # a float32, not trained
        "full": of_full(model_size, on_test["full"][1.0]),
        "full_rank1": of_full(rank1_size, score(rank1_logits, test.labels, digit)),
    }
    run = Run(
        seed=seed,
        methods=methods,
        parameter_overhead=overhead,
        lora_strength=strength,
        logit_bias=bias,
        control_at_lora_errors=read_off(
            on_test["logit_bias"], digit, most=methods["lora"].test.errors[digit]
        ),
        validation=on_validation,
        trade_off=on_test,
        update_energy=energy,
    )
    return run, Artifacts(baseline, adapter, test_logits, test_dial[1.0])


# --- Report ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """How a method appears: the heading of its column, its colour and marker in the pictures."""

    heading: tuple[str, str]
    color: str
    marker: str

    @property
    def name(self) -> str:
        return " ".join(self.heading).strip()


LOOKS = {  # colours by Okabe and Ito, which colour-blind readers tell apart
    "baseline": Look(("", "baseline"), "#999999", "o"),
    "lora": Look(("", "LoRA"), "#0072b2", "s"),
    "lora_balanced": Look(("balanced", "LoRA"), "#56b4e9", "D"),
    "logit_bias": Look(("one biased", "logit"), "#e69f00", "^"),
    "full": Look(("full", "fine-tune"), "#d55e00", "v"),
    "full_rank1": Look(("its rank-1", "part"), "#cc79a7", "P"),
}
IMAGE_RANKS = [1, 2, 4, 8, 16, 28]


def deviation(values: Sequence[float]) -> float:
    """Standard deviation over the seeds; 0 for one."""
    return stdev(values) if len(values) > 1 else 0.0


def number(values: Sequence[float], decimals: int = 0) -> str:
    """One seed's value as it is, many seeds' as mean and standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.{decimals}f}"
    decimals = max(decimals, 1 if fmean(values) < 100 else 0)
    return f"{fmean(values):.{decimals}f}±{deviation(values):.{decimals}f}"


def seeds_text(runs: Sequence[Run]) -> str:
    return f" (mean ± standard deviation of {len(runs)} seeds)" if len(runs) > 1 else ""


def errors_on(digit: int, runs: Sequence[Run], name: str) -> list[float]:
    """A method's errors on one digit of the test set, for each seed."""
    return [run.methods[name].test.errors[digit] for run in runs]


def accuracies(runs: Sequence[Run], name: str) -> list[float]:
    """A method's accuracy on the test set, in percent, for each seed."""
    return [100 * run.methods[name].test.accuracy for run in runs]


def size(count: int) -> str:
    for factor, unit in ((1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def results_table(digit: int, runs: Sequence[Run]) -> str:
    """Errors, accuracy and costs, a column per method, 79 characters wide."""
    false = [[run.methods[name].test.false_positives for run in runs] for name in LOOKS]
    costs = [runs[0].methods[name] for name in LOOKS]
    rows = [
        ("", [look.heading[0] for look in LOOKS.values()]),
        ("errors on", [look.heading[1] for look in LOOKS.values()]),
        *(
            (f"{'====>' * (d == digit)} {d}", [number(errors_on(d, runs, name)) for name in LOOKS])
            for d in range(10)
        ),
        ("accuracy, %", [number(accuracies(runs, name), 2) for name in LOOKS]),
        (f"false {digit}s", [number(counts) for counts in false]),
        ("trained", [f"{method.trainable_parameters:,}" for method in costs]),
        ("optimiser", [size(method.optimizer_bytes) for method in costs]),
        ("to ship", [size(method.file_bytes) for method in costs]),
    ]
    return "\n".join(
        f"{label:>12} " + "".join(f"{cell:>11}" for cell in row) for label, row in rows
    )


def low_rank_table(energy: Sequence[float]) -> str:
    rows = [f"{r:>12}{56 * r:>17}{100 * energy[r - 1]:>16.2f}" for r in IMAGE_RANKS]
    return "\n".join([f"{'rank':>12}{'numbers stored':>17}{'energy kept, %':>16}", *rows])


def compare_with_control(digit: int, runs: Sequence[Run]) -> str:
    """The control and LoRA at equal errors on the digit, in a sentence."""
    matched = [run.control_at_lora_errors for run in runs]
    control = [100 * accuracy for accuracy in matched if accuracy is not None]
    if len(control) < len(runs):
        return f"The control's dial ends before it leaves as few errors on {digit} as LoRA"
    lora = accuracies(runs, "lora")
    gap = fmean(control) - fmean(lora)
    verdict = "more than" if gap > 0.05 else "less than" if gap < -0.05 else "as much as"
    return (
        f"With as few errors on {digit}, one number added to one logit keeps {verdict} LoRA:\n"
        f"{number(control, 1)} % of all digits right, against {number(lora, 1)} % at strength 1"
    )


def draw_errors(digit: int, runs: Sequence[Run]) -> Figure:
    """Errors on each digit: a panel per method, beside the baseline's bars."""
    figure = Figure(figsize=(10, 6))
    figure.subplots_adjust(0.08, 0.09, 0.99, 0.86, wspace=0.05, hspace=0.28)
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, (name, look) in zip(panels.flat, LOOKS.items(), strict=True):
        axes.axvspan(digit - 0.5, digit + 0.5, color="#fff3b0", zorder=0)
        shifts = {"baseline": -0.21, name: 0.21} if name != "baseline" else {name: 0.0}
        for which, shift in shifts.items():
            columns = [errors_on(d, runs, which) for d in range(10)]
            axes.bar(
                [d + shift for d in range(10)],
                [fmean(values) for values in columns],
                yerr=[deviation(values) for values in columns] if len(runs) > 1 else None,
                width=0.42,
                color=LOOKS[which].color,
                edgecolor="black",
                linewidth=0.5,
                error_kw={"elinewidth": 0.8},
            )
        errors, accuracy = number(errors_on(digit, runs, name)), number(accuracies(runs, name), 1)
        title = f"{look.name}: {errors} errors on {digit},\n{accuracy} % right overall"
        axes.set_title(title, fontsize=10)
    axes.set_yscale("symlog", linthresh=10)
    axes.set_yticks([0, 10, 100, 1000], ["0", "10", "100", "1000"])
    axes.set_ylim(0, 1200)
    axes.set_xticks(range(10))
    figure.supxlabel("digit in the image", fontsize=10)
    figure.supylabel("errors on the test images (grey: baseline)", x=0.01, fontsize=10)
    before, after = (fmean(errors_on(digit, runs, name)) for name in ("baseline", "lora"))
    cost = fmean(accuracies(runs, "baseline")) - fmean(accuracies(runs, "lora"))
    title = (
        f"LoRA leaves {after:.0f} of {before:.0f} errors on {digit}, "
        f"at a cost of {cost:.1f} points of overall accuracy"
    )
    figure.suptitle(title + seeds_text(runs))
    return figure


def draw_trade_off(digit: int, runs: Sequence[Run]) -> Figure:
    """Accuracy against errors on the digit: a curve per dial, and the chosen points."""
    figure = Figure(figsize=(10, 6))
    figure.subplots_adjust(0.07, 0.09, 0.98, 0.9)
    axes = figure.subplots()
    points = ", ".join(f"{at:g}" for at in FULL_STRENGTHS)
    curves = {
        "lora": ("-", "LoRA, strength 0 to 1"),
        "logit_bias": ("--", "one biased logit, the control: bias 0 to 8"),
        "full": ("none", f"full fine-tuning: {points} of the way to it"),
    }
    lowest = 100.0
    for name, (style, label) in curves.items():
        scores = [[run.trade_off[name][at] for run in runs] for at in runs[0].trade_off[name]]
        xs = [[float(score.errors[digit]) for score in seeds] for seeds in scores]
        ys = [[100 * score.accuracy for score in seeds] for seeds in scores]
        if name != "logit_bias":  # that dial goes on until nearly all is called the digit
            lowest = min([lowest, *(fmean(values) for values in ys)])
        axes.errorbar(
            [fmean(values) for values in xs],
            [fmean(values) for values in ys],
            xerr=[deviation(values) for values in xs] if len(runs) > 1 else None,
            yerr=[deviation(values) for values in ys] if len(runs) > 1 else None,
            elinewidth=0.5,
            linestyle=style,
            color=LOOKS[name].color,
            marker=LOOKS[name].marker,
            markersize=5 if style != "none" else 7,
            label=label,
        )
    for name in ("baseline", "lora_balanced", "logit_bias"):
        x, y = fmean(errors_on(digit, runs, name)), fmean(accuracies(runs, name))
        hollow: dict[str, Any] = {"mfc": "none", "mec": "black", "mew": 1.5, "ls": "none"}
        chosen = LOOKS[name].name + (" as chosen" if name != "baseline" else "")
        axes.plot(x, y, LOOKS[name].marker, ms=11, label=chosen, **hollow)
    axes.set_xlim(left=-0.5)
    axes.set_ylim(bottom=lowest - 2)
    axes.set_xlabel(f"errors on {digit}, test images (fewer is better)")
    axes.set_ylabel("accuracy over all digits, % (more is better)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.suptitle(compare_with_control(digit, runs) + seeds_text(runs))
    return figure


def mean_energy(runs: Sequence[Run]) -> dict[str, list[float]]:
    """By layer, what ranks 1, 2, ... keep of full fine-tuning's update: the mean over seeds."""
    by_layer = {name: [run.update_energy[name] for run in runs] for name in runs[0].update_energy}
    return {
        name: [fmean(kept) for kept in zip(*seeds, strict=True)] for name, seeds in by_layer.items()
    }


def draw_low_rank(digit: int, image: Tensor, runs: Sequence[Run]) -> Figure:
    """An image (28, 28) at several ranks; below, how few ranks hold what full fine-tuning did."""
    figure = Figure(figsize=(10, 6.6))
    figure.subplots_adjust(0.07, 0.08, 0.98, 0.87, hspace=0.1)
    grid = figure.add_gridspec(2, len(IMAGE_RANKS), height_ratios=[1, 1.7])
    B, A, singular_values = factorize(image, rank=28)
    kept = energy_kept(singular_values)
    for column, rank in enumerate(IMAGE_RANKS):
        axes = figure.add_subplot(grid[0, column])
        axes.imshow((B[:, :rank] @ A[:rank]).numpy(), cmap="gray_r", vmin=0, vmax=1)
        text = f"rank {rank}\n{56 * rank} numbers\n{100 * kept[rank - 1]:.1f} % of energy"
        axes.set_title(text, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    axes = figure.add_subplot(grid[1, :])
    energy = mean_energy(runs)
    for (layer, shares), style, color in zip(
        energy.items(), ("o-", "s--", "^:"), ("#0072b2", "#d55e00", "#009e73"), strict=True
    ):
        ranks, percents = range(1, len(shares) + 1), [100 * share for share in shares]
        label = f"{layer}: rank 1 of {len(shares)} holds {100 * shares[0]:.0f} %"
        axes.plot(
            ranks, percents, style, color=color, lw=2, markersize=8, markevery=[0], label=label
        )
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 100, 1000], ["1", "2", "5", "10", "100", "1000"])
    axes.set_ylim(0, 104)
    axes.set_xlabel("rank kept of what full fine-tuning added to a layer's weights")
    axes.set_ylabel("share of its energy, %" + (", mean over seeds" if len(runs) > 1 else ""))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    held = ", ".join(f"{100 * shares[0]:.0f}" for shares in energy.values())
    figure.suptitle(
        f"An image of {digit} takes several ranks; "
        f"of what fine-tuning on {digit} adds to each layer, rank 1 holds {held} %"
    )
    return figure


def pixels(image: Tensor) -> Tensor:
    """A normalised image (784,) as it was: (28, 28), in [0, 1]."""
    return (image.cpu() * STD + MEAN).view(28, 28)


def draw_examples(digit: int, test: Split, first: Artifacts, seed: int) -> Figure:
    """Test images that LoRA corrects, and images that it spoils: up to eight of each."""
    labels = test.labels.cpu()
    baseline, lora = (x.argmax(1).cpu() for x in (first.baseline_logits, first.lora_logits))
    corrected = (labels == digit) & (baseline != digit) & (lora == digit)
    spoiled = (labels != digit) & (baseline == labels) & (lora == digit)
    rows = (
        (
            corrected,
            baseline,
            f"images of {digit} that LoRA corrects; above, what the baseline said",
        ),
        (
            spoiled,
            labels,
            f"images that were right and that LoRA now calls {digit}; above, what they are",
        ),
    )
    figure = Figure(figsize=(10, 3.8))
    figure.subplots_adjust(0.01, 0.02, 0.99, 0.82, hspace=0.6)
    for axes, (which, titles, text) in zip(figure.subplots(2), rows, strict=True):
        indices = which.nonzero().flatten().tolist()
        strip = torch.zeros(28, 8 * 28)
        for column, index in enumerate(indices[:8]):
            strip[:, 28 * column : 28 * (column + 1)] = pixels(test.images[index])
        axes.imshow(strip.numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(f"{len(indices)} {text} (seed {seed})", fontsize=11, pad=24)
        ticks = {28 * column + 13.5: int(titles[i]) for column, i in enumerate(indices[:8])}
        axes.set_xticks(list(ticks), list(map(str, ticks.values())))
        axes.xaxis.tick_top()
        axes.tick_params(length=0, labelsize=12)
        axes.set_yticks([])
        axes.set_frame_on(False)
    return figure


def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def to_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def adapter_config(settings: Settings, model: nn.Module) -> dict[str, Any]:
    """What PEFT reads beside the tensors; `model` is the one without LoRA."""
    return {
        "peft_type": "LORA",
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "target_modules": [n for n, m in model.named_modules() if isinstance(m, nn.Linear)],
        "bias": "none",
        "inference_mode": True,
    }


def metrics(settings: Settings, device: torch.device, runs: Sequence[Run]) -> dict[str, Any]:
    """What metrics.json holds: no date, no time and no folder, so that runs can be compared."""

    def method(m: Method) -> dict[str, Any]:
        costs = {key: value for key, value in vars(m).items() if key != "test"}
        return {**costs, **vars(m.test)}

    def points(dials: Mapping[str, Mapping[float, Score]]) -> dict[str, list[dict[str, float]]]:
        return {
            name: [
                {
                    "bias" if name == "logit_bias" else "strength": at,
                    "accuracy": score.accuracy,
                    "target_errors": score.errors[settings.digit],
                }
                for at, score in dial.items()
            ]
            for name, dial in dials.items()
        }

    def entry(run: Run) -> dict[str, Any]:
        return {
            "seed": run.seed,
            "methods": {name: method(m) for name, m in run.methods.items()},
            "checks": {  # one that did not hold would have ended the run
                "frozen_weights_unchanged": True,
                "lora_off_equals_baseline": True,
                "merged_equals_lora": True,
                "parameter_overhead": run.parameter_overhead,
            },
            "lora_strength": run.lora_strength,
            "logit_bias": run.logit_bias,
            "control_at_lora_errors": run.control_at_lora_errors,
            "update_energy_rank1": {name: kept[0] for name, kept in run.update_energy.items()},
            "trade_off": points(run.trade_off),
            "validation": points(run.validation),
        }

    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": [
            name for name, has in torch.cpu.get_capabilities().items() if has and "bf16" in name
        ],
    }
    config = {key: value for key, value in asdict(settings).items() if not key.endswith("_dir")}
    return {"config": config, "environment": environment, "runs": [entry(run) for run in runs]}


def print_settings(settings: Settings, device: torch.device) -> None:
    s = settings
    seeds = f"seed {s.seed}" if s.seeds == 1 else f"seeds {s.seed} to {s.seed + s.seeds - 1}"
    print(f"LoRA on MNIST: digit {s.digit}, rank {s.rank}, alpha {s.alpha:g}, {seeds}")
    for name, epochs, batch, lr in (
        ("baseline", s.epochs, s.batch_size, s.lr),
        ("LoRA", s.lora_epochs, s.lora_batch_size, s.lora_lr),
        ("full fine-tuning", s.lora_epochs, s.lora_batch_size, s.full_lr),
    ):
        print(f"  {name:<18}epochs {epochs}, batch {batch}, learning rate {lr:g}")
    threads = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"  {'device':<18}{device}{threads}, torch {torch.__version__}")


def print_results(settings: Settings, runs: Sequence[Run], image_energy: Sequence[float]) -> None:
    digit, several = settings.digit, len(runs) > 1
    parameters, added = (
        runs[0].methods[name].trainable_parameters for name in ("baseline", "lora")
    )
    print("\nchecks" + (f", each of them for each of {len(runs)} seeds" if several else ""))
    print(f"  ok  no frozen weight moved: {parameters:,} values are the same, bit for bit")
    print("  ok  with LoRA off, the logits are exactly the baseline's")
    print("  ok  merged into plain weights, LoRA predicts the same")
    print(f"  ok  LoRA adds {added:,} parameters: +{100 * runs[0].parameter_overhead:.3f} %")

    print(f"\nresults on the 10,000 test images{seeds_text(runs)}\n{results_table(digit, runs)}\n")
    baselines = [run.methods["baseline"].test.errors for run in runs]
    worst = Counter(d for errors in baselines for d in range(10) if errors[d] == max(errors))
    digits = " ".join(str(d) for d in sorted(worst) if worst[d] == max(worst.values()))
    times = f" (or tied) in {max(worst.values())} of {len(runs)} seeds" if several else ""
    print(f"The baseline's worst digit{times}: {digits}.")
    strength = number([run.lora_strength for run in runs], 2)
    bias = number([run.logit_bias for run in runs], 2)
    how = "chosen on validation" if settings.strength is None else "as given"
    print(f"Balanced: LoRA at strength {strength} ({how}), bias {bias}.")
    print(compare_with_control(digit, runs) + ".")

    print(f"\na test image of {digit}, 784 pixels, as B (28 x r) times A (r x 28), by SVD")
    print(low_rank_table(image_energy))
    shares = ", ".join(
        f"{layer} {100 * kept[0]:.0f} %" for layer, kept in mean_energy(runs).items()
    )
    print(f"Of full fine-tuning's update, rank 1 holds this share of the energy:\n{shares}.")


# --- Command line ---------------------------------------------------------------------------------


class InputError(Exception):
    """Something that the user can mend: an option, a data file, a folder."""


LARGEST_SEED = 2**63 - 1
COUNT = ("a whole number from 1 to 1,000,000", lambda value: 1 <= value <= 10**6)
POSITIVE = ("a number from 1e-20 to 1e20", lambda value: 1e-20 <= value <= 1e20)
ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "digit": ("a digit from 0 to 9", lambda value: 0 <= value <= 9),
    "rank": ("1 to 10, which the smallest layer can hold", lambda value: 1 <= value <= 10),
    "seed": ("a whole number from 0 to 2^63 - 1", lambda value: 0 <= value <= LARGEST_SEED),
    **dict.fromkeys(("seeds", "epochs", "batch_size", "lora_epochs", "lora_batch_size"), COUNT),
    **dict.fromkeys(("alpha", "lr", "lora_lr", "full_lr"), POSITIVE),
    "strength": ("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "max_accuracy_drop": ("a number from 0 to 100", lambda value: 0 <= value <= 100),
    "device": ("auto, cpu, cuda or mps", lambda value: value in ("auto", "cpu", "cuda", "mps")),
}


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line, printed by `main`."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the options)")


def parse(arguments: Sequence[str] | None) -> Settings:
    """The settings that the command line asks for. Raises InputError if one is not allowed."""
    parser = Parser(description="LoRA on MNIST, in one script.", allow_abbrev=False)
    parser._negative_number_matcher = re.compile("-[^-]")  # "--lr -inf" is a bad value, no option
    for setting in fields(Settings):
        kind = float if setting.default is None else type(setting.default)
        allowed, holds = ALLOWED.get(setting.name, ("a path", bool))

        def value(text: str, kind: Any = kind, allowed: str = allowed, holds: Any = holds) -> Any:
            try:
                if text and holds(kind(text)):
                    return kind(text)
            except ValueError:
                pass
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed: give {allowed}")

        help = setting.metadata["help"]
        if setting.default is not None:
            help += f" (default: {setting.default})".replace("%", "%%")
        parser.add_argument(
            "--" + setting.name.replace("_", "-"),
            type=value,
            default=setting.default,
            metavar=kind.__name__.upper().removeprefix("POSIX"),
            help=help,
        )
    settings = Settings(**vars(parser.parse_args(arguments)))
    if settings.seed + settings.seeds - 1 > LARGEST_SEED:
        asked = f"--seed {settings.seed} --seeds {settings.seeds}"
        raise InputError(f"{asked}: the last seed is above 2^63 - 1, give a lower --seed")
    folders = settings.data_dir.expanduser(), settings.output_dir.expanduser()
    return replace(settings, data_dir=folders[0], output_dir=folders[1])


def make_repeatable() -> None:
    """The same command on the same machine gives the same bytes."""
    # Before torch does anything, so that its threads inherit it: Adam's moments of dead units decay
    # into denormal numbers, with which a CPU is several times slower.
    torch.set_flush_denormal(True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it CUDA refuses
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("highest")  # but for training


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if not {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}[name]:
        raise InputError(f"--device {name}: there is none here, give auto or cpu")
    return torch.device(name)


EXTRACTED = {  # MD5 sums, since torchvision verifies the archives alone
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def read_data(folder: Path, device: torch.device) -> Data:
    """`load_mnist`, with an InputError that says which file to mend."""
    raw = folder / "MNIST" / "raw"
    try:
        for name, md5 in EXTRACTED.items():
            if (raw / name).exists() and not check_integrity(raw / name, md5):
                raise InputError(f"{raw / name} is damaged: delete it, to extract it anew")
        return load_mnist(folder, device)
    except (RuntimeError, OSError, HTTPException) as error:
        if isinstance(error, OSError) and error.filename:
            where, advice = Path(error.filename), "mend its permissions or give another folder"
            raise InputError(f"--data-dir {folder}: {where}: {error.strerror}, {advice}") from error
        wrong = [
            f"{name} is {'damaged' if (raw / name).exists() else 'missing'}"
            for name, md5 in MNIST.resources
            if not check_integrity(raw / name, md5)
        ]
        if not wrong:
            raise InputError(f"--data-dir {folder}: {error}") from error
        four = ", ".join(name for name, _ in MNIST.resources)
        raise InputError(
            f"{raw}: {', '.join(wrong)}, no download; put the four archives there: {four}"
        ) from error


def check_batches(settings: Settings, data: Data) -> None:
    for option, batch, split in (
        ("--batch-size", settings.batch_size, data.train),
        ("--lora-batch-size", settings.lora_batch_size, data.train.only(settings.digit)),
    ):
        if batch > len(split.labels):
            raise InputError(f"{option} {batch}: give at most {len(split.labels)}, all the images")


def prepare_output(folder: Path) -> None:
    """Find out before training whether the results can be saved."""
    try:
        for place in (folder, folder / "adapter"):
            place.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        where = f"{error.filename or folder}: {error.strerror}"
        raise InputError(f"--output-dir {folder}: {where}, give another folder") from error


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all under temporary names, then rename: each file is the old one or the new one."""
    parts = {folder / f"{name}.part": folder / name for name in files}
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # it would leave some old, some new
    try:
        for part, content in zip(parts, files.values(), strict=True):
            part.write_bytes(content)
        for part, path in parts.items():
            part.replace(path)
    except OSError as error:
        advice = "make room or give another folder"
        raise InputError(f"--output-dir {folder}: {error.strerror}, {advice}") from error
    finally:
        for part in parts:
            with suppress(OSError):
                part.unlink()
        signal.signal(signal.SIGINT, interrupt)


@contextmanager
def timed(stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    tqdm.write(f"  {stage:<60}{time.perf_counter() - start:8.1f} s")  # between the bars


def run_experiment(settings: Settings) -> None:
    make_repeatable()
    device = pick_device(settings.device)
    prepare_output(settings.output_dir)
    print_settings(settings, device)
    print("\nstages")
    with timed("data: read MNIST"):
        data = read_data(settings.data_dir, device)
    check_batches(settings, data)

    runs: list[Run] = []
    several = settings.seeds > 1
    seeds = range(settings.seed, settings.seed + settings.seeds)
    for seed in progress(seeds, desc="seeds", unit="seed", disable=None if several else True):
        with timed(f"seed {seed}") if several else nullcontext():
            run, artifacts = run_seed(settings, seed, data, nullcontext if several else timed)
        if not runs:
            first = artifacts
        runs.append(run)

    digit, test = settings.digit, data.test
    image = pixels(test.only(digit).images[0])
    drawings: dict[str, Callable[[], Figure]] = {
        "error_counts.png": lambda: draw_errors(digit, runs),
        "trade_off.png": lambda: draw_trade_off(digit, runs),
        "low_rank.png": lambda: draw_low_rank(digit, image, runs),
        "examples.png": lambda: draw_examples(digit, test, first, settings.seed),
    }
    with timed("pictures: draw"):
        files = {name: to_png(draw()) for name, draw in progress(drawings.items(), desc="pictures")}
    files["metrics.json"] = to_json(metrics(settings, device, runs))
    files["baseline.pt"] = to_bytes(first.baseline.state_dict())
    files["adapter/adapter_config.json"] = to_json(adapter_config(settings, first.baseline))
    files["adapter/adapter_model.bin"] = to_bytes(first.adapter)
    print_results(settings, runs, energy_kept(torch.linalg.svdvals(image)))
    write_files(settings.output_dir, files)
    print("\nfiles", *(settings.output_dir / name for name in files), sep="\n  ")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()  # if closed
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    try:
        run_experiment(parse(arguments))
        return 0
    except InputError as error:
        status, message = 2, str(error)
    except RunError as error:
        status, message = 1, str(error)
    except KeyboardInterrupt:
        status, message = 130, "interrupted: the output folder holds what it held before"
    except OSError as error:  # nothing can be printed: what is still in the buffer has to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # as in "python main.py | head"
            return 141
        status, message = 2, f"cannot print: {error.strerror}"
    print("main.py:", " ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
