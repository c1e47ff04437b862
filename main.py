"""LoRA on MNIST, in one script: pip install -r requirements.txt && python main.py

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) freezes a trained network and learns a small
correction of each weight matrix. Here the network reads handwritten digits, and the correction is
learned on images of 9 alone, usually the digit that it gets wrong most often. At its core:

    lora = attach_lora(copy.deepcopy(baseline), rank=1, alpha=1.0)  # adds 0.242 % of parameters
    train(lora, data.train.only(9), recipe, seed)
    assert not changed_tensors(baseline, lora)  # no frozen value moved by a bit

Means over 20 seeds on the 10,000 test images: of 44.0 errors on 9, LoRA leaves 4.1, and accuracy
over all digits falls from 97.43 to 91.77 %. A run takes 20 s on two CPU cores with bfloat16 units.
"""

# mypy: disable-error-code="import-untyped, no-any-return, no-untyped-call"
import argparse
import copy
import gc
import io
import json
import math
import os
import platform
import signal
import sys
import tempfile
import textwrap
import time
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import Field, asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NoReturn

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main(): some imports swallow an exception
    os.environ["MPLBACKEND"] = "agg"  # a notebook may have set its own, which matplotlib lacks here
gc.disable()  # else the start takes longer: it collects again and again while modules load

import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchvision.datasets import MNIST
from torchvision.datasets.utils import check_integrity, extract_archive
from torchvision.transforms.functional import InterpolationMode, rotate
from tqdm import tqdm

gc.freeze()
gc.enable()

# --- Model ----------------------------------------------------------------------------------------


class MNISTClassifier(nn.Module):
    """784 -> 1000 -> 2000 -> 10 with ReLU: 2,807,010 parameters. It knows nothing of LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(28 * 28, 1000)
        self.linear2 = nn.Linear(1000, 2000)
        self.linear3 = nn.Linear(2000, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, 10), one score per digit, of images (n, 784)."""
        hidden = self.linear1(images).relu_()  # in place: saves one pass over memory
        hidden = self.linear2(hidden).relu_()
        return self.linear3(hidden)


def count_trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


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
    """Freeze all of `model`, biases too, and attach LoRA to each of its linear layers, in place."""
    model.requires_grad_(False)
    for layer in [module for module in model.modules() if isinstance(module, nn.Linear)]:
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
    """Set the strength of each LoRA in `model`, in place: 0 is off, 1 is as it was trained."""
    for lora in lora_layers(model).values():
        lora.strength = strength
    return model


def merge_lora(model: nn.Module) -> nn.Module:
    """Write the weights that LoRA makes, at its strength, into plain layers; remove LoRA, in place.

    Of a model and its deep copy merge only one: torch lets their parametrized layers share a class,
    and removing a parametrization changes that class.
    """
    for name in lora_layers(model):
        parametrize.remove_parametrizations(model.get_submodule(name), "weight")
    return model


def changed_tensors(before: nn.Module, after: nn.Module) -> list[str]:
    """The names of the tensors of `before` that differ by a bit in `after`, which may have LoRA."""
    held = {
        name.replace("parametrizations.weight.original", "weight"): tensor.view(torch.uint8)
        for name, tensor in after.state_dict().items()
    }  # as bytes, since to floats 0.0 equals -0.0
    tensors = before.state_dict().items()
    return [n for n, t in tensors if n not in held or not torch.equal(t.view(torch.uint8), held[n])]


# --- Settings -------------------------------------------------------------------------------------


class InputError(Exception):
    """An option, a file or a folder that the user has to change."""


COUNT, RATE = (1, 10**6), (1e-20, 1e20)  # least and largest


def setting(default: Any, help: str, least: Any = None, largest: Any = None) -> Any:
    """A field of Settings, with its line in --help and the smallest and largest number allowed."""
    return field(default=default, metadata={"help": help, "allowed": (least, largest)})


@dataclass(frozen=True)
class Settings:
    """All that a run can be told; each field is an option of the command line."""

    digit: int = setting(9, "the digit to fine-tune on", 0, 9)
    rank: int = setting(1, "rank r of LoRA on the digit", 1, 10)  # the last layer holds 10
    alpha: float = setting(1.0, "LoRA on the digit: its update is scaled by alpha / rank", *RATE)
    seed: int = setting(0, "seed of all that is random", 0, 2**63 - 1)
    seeds: int = setting(1, "repeat for this many seeds, from --seed up", *COUNT)
    epochs: int = setting(1, "baseline: passes over the 55,000 training images", *COUNT)
    batch_size: int = setting(256, "baseline: images in a step", 1, 55_000)
    lr: float = setting(2e-3, "baseline: learning rate, which falls to 0", *RATE)
    lora_epochs: int = setting(1, "LoRA, full fine-tuning: passes over the digit's images", *COUNT)
    lora_batch_size: int = setting(128, "LoRA, full fine-tuning: images in a step", 1, 55_000)
    lora_lr: float = setting(1.5e-3, "LoRA: learning rate, which falls to 0", *RATE)
    full_lr: float = setting(6e-5, "full fine-tuning: learning rate, which falls to 0", *RATE)
    angle: float = setting(45.0, "new data: by how many degrees the digits are turned", 0, 360)
    biases_lr: float = setting(1.0, "new data, ten biases: learning rate, which falls to 0", *RATE)
    rank1_lr: float = setting(3e-2, "new data, LoRA of rank 1: likewise", *RATE)
    rank8_lr: float = setting(1.5e-2, "new data, LoRA of rank 8: likewise", *RATE)
    turned_lr: float = setting(2e-3, "new data, full fine-tuning: likewise", *RATE)
    strength: float | None = setting(None, "of balanced LoRA (default: chosen on validation)", 0, 1)
    max_accuracy_drop: float = setting(1.0, "points that a balanced method may cost", 0, 100)
    device: str = setting("auto", "auto (an accelerator if there is one), cpu, cuda or mps")
    data_dir: Path = setting(Path(__file__).resolve().parent / "data", "folder with MNIST/raw")
    output_dir: Path = setting(Path("outputs"), "folder for pictures, metrics and weights")


# --- Data -----------------------------------------------------------------------------------------

MEAN, STD = 0.1307, 0.3081  # of the training pixels, which lie in [0, 1]


@dataclass(frozen=True)
class Split:
    """Images (n, 784), normalised float32, and their labels (n,)."""

    images: Tensor
    labels: Tensor

    def only(self, digit: int) -> "Split":
        return Split(self.images[self.labels == digit], self.labels[self.labels == digit])


@dataclass(frozen=True)
class Data:
    """`train` is learned from, `validation` chooses, and `test` is only reported."""

    train: Split
    validation: Split
    test: Split


def load_mnist(folder: Path, device: torch.device) -> Data:
    """Read MNIST: 55,000 images for training, 5,000 for validation, 10,000 for testing.

    torchvision extracts the archives, into a temporary folder. Raises InputError if one is damaged.
    """

    def split(file: MNIST) -> Split:
        pixels = file.data.to(device, torch.float32).flatten(1)
        return Split(pixels.div_(255).sub_(MEAN).div_(STD), file.targets.to(device))

    with tempfile.TemporaryDirectory() as temporary:
        os.makedirs(raw := f"{temporary}/MNIST/raw")
        for name, md5 in MNIST.resources:
            archive = folder / "MNIST" / "raw" / name
            if not check_integrity(archive, md5):
                raise InputError(f"{archive} is missing or damaged: --data-dir needs it there")
            extract_archive(str(archive), raw)
        train, test = (split(MNIST(temporary, train=train)) for train in (True, False))
    images, labels = train.images.split([55_000, 5_000]), train.labels.split([55_000, 5_000])
    return Data(Split(images[0], labels[0]), Split(images[1], labels[1]), test)


def turn(split: Split, angle: float) -> Split:
    """The images of a split, turned counter-clockwise by `angle` degrees on black."""
    images, black = split.images.view(-1, 1, 28, 28), -MEAN / STD
    chunks = [rotate(x - black, angle, InterpolationMode.BILINEAR) for x in images.split(2500)]
    return Split(torch.cat(chunks).flatten(1).add_(black), split.labels)


# --- Training -------------------------------------------------------------------------------------


class RunError(Exception):
    """The experiment itself failed: training diverged, or a check does not hold."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, and the options to lower if the training diverges."""

    name: str
    epochs: int
    batch_size: int
    lr: float
    lr_options: str


# Training multiplies in bfloat16 where the CPU has units for it, which takes half the time.
BFLOAT16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


def train(model: nn.Module, split: Split, recipe: Recipe, seed: int) -> int:
    """Train whatever in `model` is not frozen, in place: the one loop of every stage.

    Cross-entropy, Adam, a learning rate that falls linearly to zero, batches in an order drawn
    from `seed`. Returns the bytes of the optimiser's state. Raises RunError if the loss diverges.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, fused=True)
    steps = recipe.epochs * math.ceil(len(split.images) / recipe.batch_size)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    generator = torch.Generator().manual_seed(seed)

    def finite_loss(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
            loss = F.cross_entropy(model(split.images[batch]), split.labels[batch])
        if not loss.isfinite():
            message = f"{recipe.name}: the loss is {loss.item()} after {scheduler.last_epoch} of"
            raise RunError(f"{message} {steps} steps; lower {recipe.lr_options}")
        return loss

    with progress(total=steps, desc=recipe.name, unit="step") as bar:
        for _ in range(recipe.epochs):
            order = torch.randperm(len(split.images), generator=generator).to(split.images.device)
            for batch in order.split(recipe.batch_size):
                loss = finite_loss(batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
                bar.update()
    with torch.inference_mode():
        finite_loss(batch)  # the last step, too, may have made it diverge
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values())


# --- Low rank -------------------------------------------------------------------------------------

RANKS = [1, 2, 4, 8]
Energy = dict[int, dict[str, float]]  # by rank and layer: the share of its energy that is kept


def factorize(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (m, r) and A (r, n): B A is the nearest matrix of rank r (Eckart and Young 1936)."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank], Vh[:rank]


def energy_kept(matrix: Tensor) -> list[float]:
    """The share of the energy, the sum of squared singular values, that ranks 1, 2, ... keep."""
    gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    squares = torch.linalg.eigvalsh(gram).clamp(min=0).flip(0)  # of the singular values
    energy = squares.double().cumsum(0)
    return [float(share) for share in (energy / energy[-1]).nan_to_num(1.0)]  # 1: a zero matrix


def weight_updates(before: nn.Module, after: nn.Module) -> dict[str, Tensor]:
    """What training added to the weight (out, in) of each linear layer, by the layer's name."""
    return {
        name: (after.get_parameter(f"{name}.weight") - layer.weight).detach().cpu()
        for name, layer in before.named_modules()
        if isinstance(layer, nn.Linear)
    }


def low_rank_part(before: nn.Module, updates: Mapping[str, Tensor], rank: int) -> nn.Module:
    """A copy of `before` whose LoRA is the best rank-r approximation of each weight's update."""
    model = attach_lora(copy.deepcopy(before), rank, alpha=rank)  # scaling 1
    for name, lora in lora_layers(model).items():
        lora.lora_B.data[:], lora.lora_A.data[:] = factorize(updates[name], rank)
    return model


def update_energy(updates: Mapping[str, Tensor]) -> Energy:
    """The shares of the energy of each update that some ranks keep."""
    kept = {name: energy_kept(update) for name, update in updates.items()}
    return {rank: {name: shares[rank - 1] for name, shares in kept.items()} for rank in RANKS}


# --- Evaluation -----------------------------------------------------------------------------------

CHOICES = [i / 10 for i in range(11)]  # strengths of LoRA from which validation chooses
STRENGTHS = [0.0, 0.2, 0.5, 0.8, 0.9, 1.0]  # strengths of LoRA that the test images see
BIASES = [i / 4 for i in range(33)]  # of the control: the number added to one logit


@torch.inference_mode()
def evaluate(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (n, 10) of images (n, 784), 625 at once: more take more memory and no less time."""
    with parametrize.cached():  # W + B A once, not once per chunk
        return torch.cat([model(chunk) for chunk in progress(images.split(625), "evaluate")])


@dataclass(frozen=True)
class Score:
    """Accuracy in [0, 1], errors on each digit, and other digits' images called the target."""

    accuracy: float
    errors: list[int]
    false_positives: int


Dials = dict[str, dict[float, Tensor]]  # logits (n, 10) by dial and position
Scores = dict[str, dict[float, Score]]


def score(logits: Tensor, labels: Tensor, digit: int) -> Score:
    """Compare logits (n, 10) with labels (n,)."""
    labels, predictions = labels.cpu(), logits.argmax(1).cpu()
    wrong = predictions != labels
    errors: list[int] = torch.bincount(labels[wrong], minlength=10).tolist()
    false_positives = int((wrong & (predictions == digit)).sum())
    return Score(int((~wrong).sum()) / len(labels), errors, false_positives)


def choose(dial: Callable[[float], Score], positions: Sequence[float], most: float) -> float:
    """The last position before a dial's accuracy is more than `most` points below that at 0."""
    lowest = dial(0.0).accuracy - most / 100 - 1e-9  # 1e-9: for rounding
    # Once too low, accuracy stays too low further along: bisection tries few of the positions.
    return positions[bisect(positions, False, 1, key=lambda at: dial(at).accuracy < lowest) - 1]


def check_lora(baseline: nn.Module, lora: nn.Module, rank: int, images: Tensor) -> dict[str, float]:
    """Hold LoRA to what it promises, and merge it. Raises RunError, which says what was found."""
    overhead = count_trainable(lora) / count_trainable(baseline)
    off, on = (evaluate(set_strength(lora, strength), images) for strength in (0.0, 1.0))
    changed = changed_tensors(baseline, lora)
    merged = evaluate(merge_lora(lora), images)
    found = {
        "frozen_weights_unchanged": changed,
        "lora_off_equals_baseline": int((off != evaluate(baseline, images)).sum()),
        "merged_equals_lora": int((on.argmax(1) != merged.argmax(1)).sum()),
        "parameter_overhead": overhead if overhead > 0.0025 * rank else 0,
    }
    if any(found.values()):
        raise RunError(f"LoRA broke a promise; what differs, by name or number: {found}")
    return {**dict.fromkeys(found, True), "parameter_overhead": overhead}


# --- Experiment -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One way to treat the target digit, or to learn new data: its scores and its costs."""

    test: Score
    trainable_parameters: int
    optimizer_bytes: int
    file_bytes: int
    extra: dict[str, float] = field(default_factory=dict)  # accuracies that new data adds


@dataclass(frozen=True)
class Run:
    """What one seed found: numbers only, so that memory does not grow with the seeds."""

    seed: int
    methods: dict[str, Method]
    new_data: dict[str, Method]
    checks: dict[str, bool | float]
    lora_strength: float  # of lora_balanced
    logit_bias: float
    constant_share: float  # how much of LoRA's change of the logits is the same for every image
    constant_logit: float  # what that adds to the target digit
    validation: dict[str, Score]
    trade_off: Scores  # on the test images
    energies: tuple[Energy, Energy]  # of full fine-tuning's update: on the digit, on new data


@dataclass(frozen=True)
class Artifacts:
    """What is saved and drawn of the first seed alone; the logits (n, 10) are of test images."""

    baseline: nn.Module
    adapter: dict[str, Tensor]
    logits: Dials
    turned_logits: dict[str, Tensor]  # by method of the new data


def learn_new_data(
    s: Settings, seed: int, baseline: nn.Module, data: Data, upright: Tensor
) -> tuple[dict[str, Method], Energy, dict[str, Tensor]]:
    """Learn turned digits from 5,000 of them, in four ways; `upright`: the baseline's test logits.

    Returns the methods, the energies of full fine-tuning's update, and the logits of the turned
    test images. Raises RunError if training diverges or LoRA breaks a promise.
    """
    few = Split(data.train.images[:5000], data.train.labels[:5000])
    images = [turn(split, s.angle) for split in (few, data.validation, data.test)]
    logits = [Split(evaluate(baseline, split.images), split.labels) for split in images]
    images, logits = [*images, data.test], [*logits, Split(upright, data.test.labels)]
    biases = nn.Linear(10, 10).to(few.images)  # takes logits in place of images: identity + biases
    nn.init.eye_(biases.weight).requires_grad_(False)
    nn.init.zeros_(biases.bias)
    rank1, rank8 = (attach_lora(copy.deepcopy(baseline), r, alpha=r) for r in (1, 8))  # scaling 1
    full = copy.deepcopy(baseline)
    methods, turned_logits = dict[str, Method](), dict[str, Tensor]()
    for name, model, splits, recipe in (
        ("baseline", nn.Identity(), logits, None),
        ("biases", biases, logits, Recipe("ten biases", 1, 128, s.biases_lr, "--biases-lr")),
        ("lora_rank1", rank1, images, Recipe("LoRA, rank 1", 1, 128, s.rank1_lr, "--rank1-lr")),
        ("lora_rank8", rank8, images, Recipe("LoRA, rank 8", 1, 128, s.rank8_lr, "--rank8-lr")),
        ("full", full, images, Recipe("full fine-tuning", 1, 128, s.turned_lr, "--turned-lr")),
    ):
        learn, validation, test, old = splits  # old: the upright test images
        memory = train(model, learn, recipe, seed) if recipe else 0
        trained = {key: x.detach() for key, x in model.named_parameters() if x.requires_grad}
        shipped = len(to_bytes(adapter_state(model) or trained)) if trained else 0
        chosen = score(evaluate(model, validation.images), validation.labels, s.digit).accuracy
        turned_logits[name] = evaluate(model, test.images)
        found = score(turned_logits[name], test.labels, s.digit)
        on = score(evaluate(model, old.images), old.labels, s.digit).accuracy
        # LoRA, switched off, is exactly the baseline: check_lora, below, sees to it
        off = methods["baseline"].extra["accuracy_upright"] if lora_layers(model) else on
        extra = {"validation_accuracy": chosen, "accuracy_upright": off, "accuracy_upright_on": on}
        methods[name] = Method(found, count_trainable(model), memory, shipped, extra)
    for rank, lora in ((1, rank1), (8, rank8)):
        check_lora(baseline, lora, rank, data.validation.images[:100])
    return methods, update_energy(weight_updates(baseline, full)), turned_logits


def run_seed(s: Settings, seed: int, data: Data) -> tuple[Run, Artifacts]:
    """The whole experiment for one seed."""
    digit, target = s.digit, data.train.only(s.digit)
    stage = timed if s.seeds == 1 else nullcontext

    with stage("baseline: train on all digits"):
        torch.manual_seed(seed)  # of torch's own generator: nn.Linear and LoRA draw from it in turn
        baseline = MNISTClassifier().to(target.images.device)
        recipe = Recipe("baseline", s.epochs, s.batch_size, s.lr, "--lr")
        baseline_memory = train(baseline, data.train, recipe, seed)

    with stage(f"LoRA: train on {len(target.labels):,} images of {digit}"):
        lora = attach_lora(copy.deepcopy(baseline), s.rank, s.alpha)
        recipe = Recipe("LoRA", s.lora_epochs, s.lora_batch_size, s.lora_lr, "--lora-lr or --alpha")
        lora_memory = train(lora, target, recipe, seed)
        adapter, added = adapter_state(lora), count_trainable(lora)

    with stage("full fine-tuning: train on the same batches"):
        full = copy.deepcopy(baseline)
        recipe = replace(recipe, name="full fine-tuning", lr=s.full_lr, lr_options="--full-lr")
        full_memory = train(full, target, recipe, seed)
        updates = weight_updates(baseline, full)
        full_rank1 = low_rank_part(baseline, updates, rank=1)

    def dials_of(images: Tensor) -> dict[str, Callable[[float], Tensor]]:
        """Logits (n, 10) of images at any position of three dials, which are the baseline at 0."""
        logits = evaluate(baseline, images)
        one_hot = F.one_hot(torch.tensor(digit), 10).to(logits)
        return {  # check_lora sees to it that LoRA, too, is exactly the baseline at 0
            "lora": lambda at: evaluate(set_strength(lora, at), images) if at else logits,
            "logit_bias": lambda at: logits + at * one_hot,
            "full": lambda at: evaluate(full, images) if at else logits,
        }

    with stage("validation images: choose strength and bias"):
        dials = dials_of(data.validation.images)

        def validate(dial: str, position: float) -> Score:
            return score(dials[dial](position), data.validation.labels, digit)

        ends = {"baseline": ("full", 0.0), "lora": ("lora", 1.0), "full": ("full", 1.0)}
        validation = {name: validate(*end) for name, end in ends.items()}
        bias = choose(partial(validate, "logit_bias"), BIASES, s.max_accuracy_drop)
        chosen = choose(partial(validate, "lora"), CHOICES, s.max_accuracy_drop)
        strength = chosen if s.strength is None else s.strength

    with stage("test images: report, and check LoRA"):
        logits, test = Dials(), Scores()
        places = {"lora": sorted({*STRENGTHS, strength}), "logit_bias": BIASES, "full": [0.0, 1.0]}
        for name, dial in dials_of(data.test.images).items():
            logits[name] = {at: dial(at) for at in places[name]}
            test[name] = {at: score(x, data.test.labels, digit) for at, x in logits[name].items()}
        rank1_score = score(evaluate(full_rank1, data.test.images), data.test.labels, digit)
        checks = check_lora(baseline, lora, s.rank, data.validation.images[:1000])

    with stage(f"new data: learn digits turned by {s.angle:g} degrees"):
        upright = logits["full"][0.0]
        new_data, new_energy, turned = learn_new_data(s, seed, baseline, data, upright)

    change = logits["lora"][1.0] - logits["lora"][0.0]
    change = change - change.mean(1, keepdim=True)  # what all ten logits share predicts nothing
    constant = change.mean(0)  # the same for every image
    share = float((len(change) * constant.square().sum() / change.square().sum()).nan_to_num(0))
    parameters = count_trainable(baseline)
    states = baseline.state_dict(), adapter, adapter_state(full_rank1)
    model_size, adapter_size, rank1_size = (len(to_bytes(state)) for state in states)
    methods = {
        "baseline": Method(test["full"][0.0], parameters, baseline_memory, model_size),
        "lora": Method(test["lora"][1.0], added, lora_memory, adapter_size),
        "lora_off": Method(test["lora"][0.0], added, lora_memory, adapter_size),
        "lora_balanced": Method(test["lora"][strength], added, lora_memory, adapter_size),
        "logit_bias": Method(test["logit_bias"][bias], 0, 0, 4),  # a float32, not trained
        "full": Method(test["full"][1.0], parameters, full_memory, model_size),
        "full_rank1": Method(rank1_score, parameters, full_memory, rank1_size),
    }
    energies = update_energy(updates), new_energy
    numbers = strength, bias, share, float(constant[digit])
    run = Run(seed, methods, new_data, checks, *numbers, validation, test, energies)
    return run, Artifacts(baseline, adapter, logits, turned)


# --- Report ---------------------------------------------------------------------------------------

NAMES = {  # of the methods that are shown, with colours by Okabe and Ito for colour-blind readers
    "baseline": ("baseline", "#999999"),
    "lora": ("LoRA", "#0072b2"),
    "lora_balanced": ("balanced LoRA", "#56b4e9"),
    "logit_bias": ("one biased logit", "#e69f00"),
    "full": ("full fine-tuning", "#d55e00"),
    "full_rank1": ("its rank-1 part", "#cc79a7"),
}
LORAS = {"lora_rank1": "LoRA, rank 1", "lora_rank8": "LoRA, rank 8"}
NEW_NAMES = {"baseline": "baseline", "biases": "ten biases", **LORAS, "full": "full fine-tuning"}


def mean_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over the seeds; the deviation of one seed is 0."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def text(values: Sequence[float], decimals: int = 0, sign: str = "") -> str:
    """One seed's value as it is, many seeds' as mean and standard deviation."""
    if len(values) == 1:
        return f"{values[0]:{sign}.{decimals}f}"
    mean, deviation = mean_deviation(values)
    decimals = max(decimals, 1 if mean < 100 else 0)
    return f"{mean:{sign}.{decimals}f}±{deviation:.{decimals}f}"


def seeds_text(runs: Sequence[Run]) -> str:
    return f" (mean ± standard deviation of {len(runs)} seeds)" if len(runs) > 1 else ""


def errors_on(digit: int, runs: Sequence[Run], name: str) -> list[float]:
    """A method's errors on one digit of the test set, for each seed."""
    return [run.methods[name].test.errors[digit] for run in runs]


def accuracies(runs: Sequence[Run], name: str) -> list[float]:
    """A method's accuracy on the test set, in percent, for each seed."""
    return [100 * run.methods[name].test.accuracy for run in runs]


def new_accuracies(runs: Sequence[Run], name: str) -> tuple[list[float], ...]:
    """A method's accuracy, in percent: on turned test images, upright ones, these with LoRA off."""
    methods = [run.new_data[name] for run in runs]
    on, off = ([100 * x.extra[f"accuracy_upright{key}"] for x in methods] for key in ("_on", ""))
    return [100 * method.test.accuracy for method in methods], on, off


def size(n: int) -> str:
    return f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.1f} kB" if n >= 1e3 else f"{n} B"


def results_table(digit: int, runs: Sequence[Run]) -> str:
    """Errors, accuracy and costs, a column per method, 79 characters wide."""
    headings = [textwrap.wrap(name, 10) for name, _ in NAMES.values()]
    costs = [runs[0].methods[name] for name in NAMES]
    rows = {
        "": [" ".join(words[:-1]) for words in headings],
        "errors on": [words[-1] for words in headings],
    }
    for d in range(10):
        rows[f"{'====>' * (d == digit)} {d}"] = [text(errors_on(d, runs, name)) for name in NAMES]
    rows |= {
        f"false {digit}s": [text([r.methods[x].test.false_positives for r in runs]) for x in NAMES],
        "accuracy, %": [text(accuracies(runs, name), 2) for name in NAMES],
        "trained": [f"{method.trainable_parameters:,}" for method in costs],
        "optimiser": [size(method.optimizer_bytes) for method in costs],
        "to ship": [size(method.file_bytes) for method in costs],
    }
    lines = (f"{label:>12} " + "".join(f"{x:>11}" for x in row) for label, row in rows.items())
    return "\n".join(lines)


def at_lora_errors(digit: int, run: Run, dial: str) -> float | None:
    """A dial's accuracy at its first position with at most LoRA's errors on the digit."""
    most = run.methods["lora"].test.errors[digit]
    scores = run.trade_off[dial].values()
    return next((score.accuracy for score in scores if score.errors[digit] <= most), None)


def compare_with_control(digit: int, runs: Sequence[Run]) -> str:
    """LoRA and the control where each first has as few errors as LoRA at strength 1."""
    dials = [[at_lora_errors(digit, run, dial) for run in runs] for dial in ("lora", "logit_bias")]
    lora, control = ([100 * x for x in accuracy if x is not None] for accuracy in dials)
    if len(control) < len(runs):
        seeds = f"In {len(runs) - len(control)} of {len(runs)} seeds one biased logit never has"
        return f"{seeds}\nas few errors on {digit} as LoRA at strength 1"
    gap = round(fmean(control) - fmean(lora), 1)
    sign = (gap > 0) - (gap < 0)
    words = ("as many digits right as", "more digits right than", "fewer digits right than")[sign]
    times = sum((x > y) - (x < y) == sign for x, y in zip(control, lora, strict=True))
    seeds = f" (in {times} of {len(runs)} seeds)" * (len(runs) > 1 and sign != 0)
    found = f"{words} LoRA: {text(control, 1)} % against {text(lora, 1)} %{seeds}"
    return f"With as few errors on {digit} as LoRA at strength 1, one biased logit keeps\n{found}"


def new_data_finding(runs: Sequence[Run]) -> str:
    """The finding on new data, in two sentences."""
    (lora, kept, _), (full, left, _) = (new_accuracies(runs, x) for x in ("lora_rank8", "full"))
    learned = f"LoRA of rank 8 reads {text(lora, 1)} %, full fine-tuning {text(full, 1)} %"
    forgot = f"{text(kept, 1)} % and {text(left, 1)} %; LoRA switched off is the baseline"
    return f"Turned digits: {learned}.\nUpright: {forgot}"


def start_figure(height: float, title: str, edges: Sequence[float]) -> Figure:
    """10 inches wide; `edges` are left, bottom, right and top, and the gaps between panels."""
    figure = Figure(figsize=(10, height))
    figure.subplots_adjust(*edges)
    figure.suptitle(title)
    return figure


def draw_bars(axes: Any, ticks: Sequence[str], groups: Mapping[Any, Any], form: str) -> None:
    """Bars side by side at each tick, numbers on them; `groups` has values by label and colour."""
    width = 0.84 / len(groups)
    for i, ((label, color), columns) in enumerate(groups.items()):
        means, deviations = zip(*map(mean_deviation, columns), strict=True)
        xs = [tick + (i - (len(groups) - 1) / 2) * width for tick in range(len(ticks))]
        bars = axes.bar(xs, means, width, yerr=deviations, color=color, label=label, ec="black")
        axes.bar_label(bars, fmt=form, fontsize=9)
    axes.set_xticks(range(len(ticks)), ticks)
    axes.margins(x=0.01, y=0.1)


def draw_strip(axes: Any, images: Tensor, words: Sequence[str], title: str) -> None:
    """Up to eight normalised images (n, 784) in a row, with a word above each."""
    tiles = torch.zeros(8, 28, 28)
    tiles[: len(images)] = (images.cpu() * STD + MEAN).view(-1, 28, 28)
    axes.imshow(torch.cat([*tiles], 1).numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set_xticks([28 * column + 13.5 for column in range(len(words))], words)
    axes.tick_params(labeltop=True, labelbottom=False, length=0, labelsize=12)
    axes.set(yticks=[], frame_on=False)
    axes.set_title(title, fontsize=11, pad=24)


def draw_errors(digit: int, runs: Sequence[Run]) -> Figure:
    """Errors on each digit: baseline and LoRA, and in a panel of its own each other method."""
    before, after = (fmean(errors_on(digit, runs, name)) for name in ("baseline", "lora"))
    cost = fmean(accuracies(runs, "baseline")) - fmean(accuracies(runs, "lora"))
    price = f"at a cost of {cost:.1f} points of overall accuracy{seeds_text(runs)}"
    title = f"LoRA leaves {after:.0f} of {before:.0f} errors on {digit}, {price}"
    figure = start_figure(9, title, (0.07, 0.06, 0.99, 0.9, 0.04, 0.3))
    baseline, lora, *others = NAMES
    rows: list[Any] = [[lora, lora], others[:2], others[2:]]
    panels = figure.subplot_mosaic(rows, sharey=True, height_ratios=[1.4, 1, 1])
    for panel, axes in panels.items():
        names = [baseline, lora] if panel == lora else [panel]
        bars = {NAMES[name]: [errors_on(d, runs, name) for d in range(10)] for name in names}
        draw_bars(axes, [str(d) for d in range(10)], bars, "%.0f")
        rights = [f"{NAMES[name][0]}: {text(accuracies(runs, name), 1)} % right" for name in names]
        axes.set_title(", ".join(rights), fontsize=10)
        axes.axvspan(digit - 0.5, digit + 0.5, color="#fff3b0", zorder=0)
    panels[lora].legend(loc="upper left")
    figure.supxlabel("digit in the image", fontsize=10)
    figure.supylabel("errors on the 10,000 test images", x=0.01, fontsize=10)
    return figure


def draw_trade_off(digit: int, runs: Sequence[Run]) -> Figure:
    """Accuracy against errors on the digit: a curve per dial, and the chosen points."""
    figure = start_figure(6.5, compare_with_control(digit, runs), (0.07, 0.09, 0.98, 0.9))
    axes = figure.subplots()
    notes = {0.5: "strength 0.5", 0.8: "LoRA", 1.0: "strength 1"}
    curves = {
        "lora": ("s-", STRENGTHS, "LoRA, at strengths 0.2 to 1", notes, (12, -13)),
        "logit_bias": ("^--", BIASES, "one biased logit, the control", {2.0: "control"}, (-48, 6)),
    }
    for name, (style, positions, label, words, shift) in curves.items():
        scores = [[run.trade_off[name][at] for run in runs] for at in positions]
        xs = [fmean(score.errors[digit] for score in seeds) for seeds in scores]
        ys = [100 * fmean(score.accuracy for score in seeds) for seeds in scores]
        axes.plot(xs, ys, style, color=NAMES[name][1], markevery=slice(1, None), label=label)
        for at, word in words.items():
            i = positions.index(at)
            axes.annotate(word, (xs[i], ys[i]), shift, textcoords="offset points")
    shown = {"baseline": "o", "lora": "s", "lora_balanced": "D", "logit_bias": "^", "full": "v"}
    for name, marker in shown.items():
        x, y = errors_on(digit, runs, name), accuracies(runs, name)
        chosen = ", as chosen" * (name in ("lora_balanced", "logit_bias"))
        label = f"{NAMES[name][0]}{chosen}: errors {text(x)}, accuracy {text(y, 1)} %"
        axes.plot(fmean(x), fmean(y), marker, ms=11, label=label, mfc="none", mec="black", mew=1.5)
    axes.set_ylim(bottom=min(fmean(accuracies(runs, name)) for name in shown) - 0.5)
    axes.set(xlim=(-0.5, None), xlabel=f"errors on {digit}, test images (fewer is better)")
    axes.set_ylabel("accuracy over all digits, % (more is better)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def draw_low_rank(digit: int, runs: Sequence[Run], image: Tensor) -> Figure:
    """An image (784,) at several ranks; below, how few ranks hold what full fine-tuning did."""
    layers = list(runs[0].energies[0][1])
    kept = [[100 * fmean(run.energies[i][1][x] for run in runs) for x in layers] for i in (0, 1)]
    title = f"An image of {digit} at four ranks. Rank 1 holds at least {min(kept[0]):.0f} %"
    title += f" of each layer's change\non {digit} alone, and at most {max(kept[1]):.0f} %"
    title += f" of it on new data{seeds_text(runs)}"
    figure = start_figure(6.6, title, (0.05, 0.06, 0.99, 0.8, 0.9, 0.4))
    shares = energy_kept(pixels := (image.cpu() * STD + MEAN).view(28, 28))
    tiles, bars = [r for r in RANKS for _ in range(3)], [x for x in layers for _ in range(4)]
    panels: dict[Any, Any] = figure.subplot_mosaic([tiles, bars])  # type: ignore[list-item]
    for rank in RANKS:
        low = torch.mm(*factorize(pixels, rank)).numpy()
        panels[rank].imshow(low, cmap="gray_r", vmin=0, vmax=1)
        title = f"rank {rank}: {56 * rank} numbers,\n{100 * shares[rank - 1]:.0f} % of the energy"
        panels[rank].set(xticks=[], yticks=[], title=title)
    tasks = (f"on {digit} alone", "#0072b2"), ("on new data", "#e69f00")
    for layer in layers:
        groups = {
            task: [[100 * run.energies[i][rank][layer] for run in runs] for rank in RANKS]
            for i, task in enumerate(tasks)
        }
        draw_bars(panels[layer], [f"rank {rank}" for rank in RANKS], groups, "%.0f")
        panels[layer].set(ylim=(0, 125), yticks=[], title=f"{layer}: energy of the change, %")
    panels[layers[0]].legend(loc="upper left", ncols=2, fontsize=9)
    return figure


def draw_examples(digit: int, runs: Sequence[Run], test: Split, first: Artifacts) -> Figure:
    """Test images that LoRA corrects, and images that it spoils: up to eight of each."""
    labels = test.labels.cpu()
    baseline, lora = (first.logits["lora"][at].argmax(1).cpu() for at in (0.0, 1.0))
    corrected = (labels == digit) & (baseline != digit) & (lora == digit)
    spoiled = (labels != digit) & (baseline == labels) & (lora == digit)
    gains, costs = int(corrected.sum()), int(spoiled.sum())
    title = f"Images of {digit} LoRA puts right: {gains}; right ones it now calls {digit}: {costs}"
    figure = start_figure(4, f"{title} (seed {runs[0].seed})", (0.01, 0.02, 0.99, 0.76, 0, 0.6))
    texts = "now right; the baseline said:", f"were right, now called {digit}; they are:"
    rows = zip(figure.subplots(2), (corrected, spoiled), (baseline, labels), texts, strict=True)
    for axes, which, digits, sentence in rows:
        some = which.nonzero().flatten()[:8]
        draw_strip(axes, test.images[some], [str(int(d)) for d in digits[some]], sentence)
    return figure


def draw_new_data(angle: float, runs: Sequence[Run], test: Split, first: Artifacts) -> Figure:
    """Turned test digits with what is said of them, and the accuracies of the methods."""
    figure = start_figure(7, new_data_finding(runs), (0.07, 0.09, 0.99, 0.79, 0, 0.55))
    panels = figure.subplot_mosaic([["upright"], ["turned"], ["bars"]], height_ratios=[1, 1, 2.4])
    some = Split(test.images[:8], test.labels[:8])
    says, learned = (first.turned_logits[name][:8].argmax(1) for name in ("baseline", "lora_rank8"))
    digits = [str(int(label)) for label in some.labels]
    draw_strip(panels["upright"], some.images, digits, "the first eight test images")
    words = [f"{int(a)} / {int(b)}" for a, b in zip(says, learned, strict=True)]
    title = f"turned by {angle:g}°: what the baseline / LoRA of rank 8 say (seed {runs[0].seed})"
    draw_strip(panels["turned"], turn(some, angle).images, words, title)
    turned, upright, _ = zip(*(new_accuracies(runs, name) for name in NEW_NAMES), strict=True)
    groups = {("turned digits", "#0072b2"): turned, ("upright digits", "#999999"): upright}
    draw_bars(panels["bars"], list(NEW_NAMES.values()), groups, "%.1f")
    panels["bars"].set(ylabel="test images right, %", ylim=(0, 140), yticks=range(0, 101, 20))
    panels["bars"].legend(loc="upper left", ncols=2)
    panels["bars"].set_xlabel(seeds_text(runs).strip(" ()"))
    return figure


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """LoRA's tensors by the names that Hugging Face PEFT reads ("PEFT checkpoint format")."""
    return {
        f"base_model.model.{name}.{matrix}.weight": getattr(lora, matrix).detach()
        for name, lora in lora_layers(model).items()
        for matrix in ("lora_A", "lora_B")
    }


def adapter_config(model: nn.Module, rank: int, alpha: float) -> dict[str, Any]:
    """What PEFT reads beside the tensors; `model` is the one without LoRA."""
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": [n for n, m in model.named_modules() if isinstance(m, nn.Linear)],
    }


def to_bytes(state: Mapping[str, Tensor]) -> bytes:
    """What torch.save writes: into memory, since into a file it writes the file's name too."""
    buffer = io.BytesIO()
    torch.save({name: tensor.cpu() for name, tensor in state.items()}, buffer)
    return buffer.getvalue()


def to_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def metrics(settings: Settings, device: torch.device, runs: Sequence[Run]) -> dict[str, Any]:
    """What metrics.json holds: no date, no time and no folder, so that runs can be compared."""
    digit, entries = settings.digit, []
    for run in runs:
        entry = asdict(run)
        for method in (*entry["methods"].values(), *entry["new_data"].values()):
            method |= method.pop("test") | method.pop("extra")
        for name, dial in entry["trade_off"].items():
            position = "bias" if name == "logit_bias" else "strength"
            entry["trade_off"][name] = [
                {position: at, "accuracy": x["accuracy"], "target_errors": x["errors"][digit]}
                for at, x in dial.items()
            ]
        energies = entry.pop("energies")
        held = [{f"update_energy_rank{rank}": x for rank, x in e.items()} for e in energies]
        new_data = {"angle": settings.angle, "images": 5000, "methods": entry["new_data"]}
        control = at_lora_errors(digit, run, "logit_bias")
        entry |= {"new_data": new_data | held[1], "control_at_lora_errors": control} | held[0]
        entries.append(entry)
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": BFLOAT16,
    }
    config = {key: value for key, value in asdict(settings).items() if not key.endswith("_dir")}
    return {"config": config, "environment": environment, "runs": entries}


def progress(*arguments: Any, **options: Any) -> Any:
    """A bar of tqdm; none if the output goes into a file or a pipe."""
    hidden = not (sys.stdout.isatty() and sys.stderr.isatty())
    return tqdm(*arguments, disable=hidden, leave=False, dynamic_ncols=True, **options)


@contextmanager
def timed(name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    tqdm.write(f"  {name:<46}{time.perf_counter() - start:6.1f} s")  # between the bars


def print_results(settings: Settings, runs: Sequence[Run]) -> None:
    digit, several = settings.digit, len(runs) > 1
    parameters, added = (runs[0].methods[n].trainable_parameters for n in ("baseline", "lora"))
    print("\nchecks" + several * f", each of them for each of {len(runs)} seeds")
    print(f"  ok  only LoRA learned: the {parameters:,} frozen values are the same, bit for bit")
    print("  ok  LoRA switches off: at strength 0, the logits are exactly the baseline's")
    print("  ok  LoRA costs nothing in use: merged into the weights, it predicts the same")
    print(f"  ok  LoRA is small: {added:,} new parameters, +{100 * added / parameters:.3f} %")
    print(f"\nresults on the 10,000 test images{seeds_text(runs)}")
    for when, name in (("before", "baseline"), ("with", "lora")):
        errors, right = text(errors_on(digit, runs, name)), text(accuracies(runs, name), 2)
        print(f"  {when:>6} LoRA: errors on {digit} {errors}, accuracy over all digits {right} %")
    print(f"\n{results_table(digit, runs)}\n")
    strength = text([run.lora_strength for run in runs], 2)
    bias = text([run.logit_bias for run in runs], 2)
    cost = f"{settings.max_accuracy_drop:g} point" + "s" * (settings.max_accuracy_drop != 1)
    print(f"""logit: one of the network's ten outputs; the largest says which digit it sees
balanced LoRA: LoRA's change of the weights times a strength, {strength}
one biased logit: the baseline with a bias, {bias}, added to its logit of {digit}
  chosen on validation, if not given: the most for up to {cost} of accuracy
full fine-tuning: all weights trained on LoRA's images; its rank-1 part: what
  it changed in each weight matrix, reduced to a column times a row
false {digit}s: other digits called {digit}; trained: how many numbers; optimiser: its
  memory while training; to ship: the file that a new task costs
""")
    worst = [max(x := run.methods["baseline"].test.errors) == x[digit] for run in runs]
    print(f"{digit} is the baseline's worst digit, or tied, in {sum(worst)} of {len(runs)} seeds.")
    pairs = [(run.methods["logit_bias"].test, run.methods["lora_balanced"].test) for run in runs]
    points = text([100 * (control.accuracy - lora.accuracy) for control, lora in pairs], 2, "+")
    fewer = [control.errors[digit] - lora.errors[digit] for control, lora in pairs]
    seeds = several * f" (fewer in {sum(x < 0 for x in fewer)} of {len(runs)} seeds)"
    print(f"One biased logit minus balanced LoRA, as chosen: accuracy {points} points,")
    print(f"errors on {digit} {text(fewer, 0, '+')}{seeds}.\n{compare_with_control(digit, runs)}.")
    share, constant = [100 * run.constant_share for run in runs], [x.constant_logit for x in runs]
    print(f"Why a bias works: {text(share)} % of LoRA's change of logits is the same for every")
    print(f"image, {text(constant, 1, '+')} on the {digit} above their mean.")
    print(f"\nnew data: digits turned by {settings.angle:g} degrees{seeds_text(runs)}")
    rows: list[Any] = [("", "turned, %", "upright, %", "LoRA off, %", "trained", "to ship")]
    for key, name in NEW_NAMES.items():
        turned, upright, off = (text(values, 1) for values in new_accuracies(runs, key))
        cells, costs = (turned, upright, off if key in LORAS else ""), runs[0].new_data[key]
        rows.append((name, *cells, f"{costs.trainable_parameters:,}", size(costs.file_bytes)))
    print(*(f"{name:19}" + "".join(f"{x:>12}" for x in row) for name, *row in rows), sep="\n")
    print(new_data_finding(runs))


# --- Command line ---------------------------------------------------------------------------------

IMAGES = [5434, 6212, 5465, 5622, 5343, 4963, 5436, 5702, 5357, 5466]  # to train on, by digit
PICTURES = [f"{x}.png" for x in ("examples", "error_counts", "trade_off", "low_rank", "new_data")]
ADAPTER = [f"adapter/adapter_{x}" for x in ("config.json", "model.bin")]
OUTPUTS = [*PICTURES, "metrics.json", "baseline.pt", *ADAPTER]  # in the order of writing


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """In place of argparse's lines on the usage: one line, which `main` prints."""
        raise InputError(f"{message} (--help lists the options)")


def read_value(setting: Field[Any], text: str) -> Any:
    """The value of an option. Raises ArgumentTypeError, which says what is allowed."""
    kind: Any = float if setting.default is None else type(setting.default)
    least, largest = setting.metadata["allowed"]
    with suppress(ValueError):
        value = kind(os.path.expanduser(text))
        if text and (largest is None or least <= value <= largest):
            return value
    hint = f"a {'whole ' * (kind is int)}number from {least} to {largest}" if largest else "a name"
    raise argparse.ArgumentTypeError(f"{text!r} is not allowed: give {hint}")


def parse(arguments: Sequence[str] | None) -> Settings:
    """The settings that the command line asks for. Raises InputError if one is not allowed."""
    parser = Parser(description="LoRA on MNIST, in one script.", allow_abbrev=False)
    for setting in fields(Settings):
        default = " (default: %(default)s)" * (setting.default is not None)
        parser.add_argument(
            "--" + setting.name.replace("_", "-"),
            type=partial(read_value, setting),
            default=setting.default,
            metavar=setting.name.rpartition("_")[2].upper(),
            help=setting.metadata["help"] + default,
        )
    settings = Settings(**vars(parser.parse_args(arguments)))
    if settings.lora_batch_size > IMAGES[settings.digit]:
        most = f"at most {IMAGES[settings.digit]}, all the images of {settings.digit}"
        raise InputError(f"--lora-batch-size {settings.lora_batch_size}: give {most}")
    return settings


def make_repeatable() -> None:
    """The same command on the same machine gives the same bytes."""
    # Before torch does anything, so that its threads inherit it: Adam's moments of dead units decay
    # into denormal numbers, with which some CPUs are several times slower.
    torch.set_flush_denormal(True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it CUDA refuses
    torch.use_deterministic_algorithms(True)


def prepare_output(folder: Path) -> None:
    """Find out before training whether the results can be saved. Raises InputError if not."""
    try:
        for place in (folder, folder / "adapter"):
            place.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=place).close()
        for place in (folder / name for name in OUTPUTS):
            if place.exists():
                place.open("ab").close()
    except OSError as error:
        reason = "not a folder" if isinstance(error, FileExistsError) else error.strerror
        raise InputError(f"--output-dir: {place}: {reason}; give another folder") from error


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all under temporary names, then rename: each file is the old one or the new one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C would leave some files old, some new
    try:
        for name, content in files.items():
            (folder / f"{name}.part").write_bytes(content)
        for name in files:
            (folder / f"{name}.part").replace(folder / name)
    except OSError as error:
        for name in files:
            (folder / f"{name}.part").unlink(missing_ok=True)
        raise InputError(f"--output-dir {folder}: {error.strerror}; give another folder") from error


def run_experiment(settings: Settings) -> None:
    make_repeatable()
    there = {"cuda": torch.cuda.is_available(), "mps": torch.mps.is_available(), "cpu": True}
    name = settings.device if settings.device != "auto" else next(x for x in there if there[x])
    if not there.get(name):
        raise InputError(f"--device {name}: there is none here, give auto or cpu")
    device = torch.device(name)
    prepare_output(settings.output_dir)
    values = {key: x for key, x in asdict(settings).items() if x is not None and "_dir" not in key}
    threads = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    values["device"] = f"{device}{threads}, torch {torch.__version__}"
    listed = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in values.items())
    print("LoRA on MNIST", textwrap.indent(textwrap.fill(listed, 77), "  "), "\nstages", sep="\n")
    with timed("data: read MNIST"):
        data = load_mnist(settings.data_dir, device)
    seeds = range(settings.seed, settings.seed + settings.seeds)
    runs: list[Run] = []
    for seed in progress(seeds, "seeds") if len(seeds) > 1 else seeds:
        with timed(f"seed {seed}") if len(seeds) > 1 else nullcontext():
            run, artifacts = run_seed(settings, seed, data)
        if not runs:
            first = artifacts
        runs.append(run)
        gc.collect()  # models with parametrizations are cycles, which would pile up
    with timed("pictures: draw"):
        figures = (
            draw_examples(settings.digit, runs, data.test, first),
            draw_errors(settings.digit, runs),
            draw_trade_off(settings.digit, runs),
            draw_low_rank(settings.digit, runs, data.test.only(settings.digit).images[0]),
            draw_new_data(settings.angle, runs, data.test, first),
        )
        contents = []
        for figure in figures:
            figure.savefig(buffer := io.BytesIO(), format="png", dpi=120)
            contents.append(buffer.getvalue())
    contents += [
        to_json(metrics(settings, device, runs)),
        to_bytes(first.baseline.state_dict()),
        to_json(adapter_config(first.baseline, settings.rank, settings.alpha)),
        to_bytes(first.adapter),
    ]
    print_results(settings, runs)
    write_files(settings.output_dir, dict(zip(OUTPUTS, contents, strict=True)))
    names = ", ".join([*OUTPUTS[:-2], "adapter/"])
    print("", textwrap.fill(f"files in {settings.output_dir}: {names}", 79), sep="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    try:
        run_experiment(parse(arguments))
        return 0
    except BrokenPipeError:  # as in "python main.py | head"; what is still in the buffer has to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        status, message = 130, "interrupted: the output folder holds what it held before"
    except (InputError, RunError, OSError) as error:
        status, message = 1 if isinstance(error, RunError) else 2, str(error)
    print("main.py:", " ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    os._exit(main())  # tearing down torch would take half a second
