"""LoRA on MNIST, in one script: pip install -r requirements.txt && python main.py

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) freezes a trained network and learns a small
correction of its weight matrices: here a network of digits learns from images of 9 alone. It
trains 6,794 numbers, 0.242 % of the network's. Errors on 9 fall from 44.2 to 4.3; accuracy falls
from 97.42 to 91.91 %, since other digits are now called 9 (20 seeds, 10,000 test images).
Read to the end of `main_job`: that is LoRA at work. Tables, pictures and three questions follow.
"""

import argparse
import gc
import io
import json
import sys
from copy import deepcopy
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchvision.datasets import MNIST
from torchvision.transforms.functional import InterpolationMode, rotate
from tqdm import tqdm

# --- Model and LoRA -------------------------------------------------------------------------------


class MNISTClassifier(nn.Module):
    """784 -> 1000 -> 2000 -> 10 with ReLU: 2,807,010 numbers. It knows nothing of LoRA."""

    def __init__(self):
        super().__init__()
        self.linear1 = nn.Linear(784, 1000)
        self.linear2 = nn.Linear(1000, 2000)
        self.linear3 = nn.Linear(2000, 10)

    def forward(self, images):
        """Logits (n, 10), one score per digit, of images (n, 28, 28)."""
        hidden = self.linear1(images.flatten(1)).relu()
        hidden = self.linear2(hidden).relu()
        return self.linear3(hidden)


class LoRAParametrization(nn.Module):
    """W -> W + strength * (alpha / rank) * B A (Hu et al. 2021, section 4.1).

    The paper adds B(A x) to a layer's output. Adding B A to its weight W (out, in) is the same sum
    and needs no new kind of layer: torch calls `forward` wherever a layer reads its weight. (B A
    is as large as W: that costs time in training, and nothing once it is added to W for good.)
    lora_A (rank, in) starts random and lora_B (out, rank) at zero, so training starts at W itself.
    """

    def __init__(self, weight, rank, alpha):
        super().__init__()
        out_features, in_features = weight.shape
        lora_A = torch.randn(rank, in_features) / in_features**0.5  # entries of A x as large as x's
        self.lora_A = nn.Parameter(lora_A.to(weight))  # drawn on the CPU: the same on any device
        self.lora_B = nn.Parameter(weight.new_zeros(out_features, rank))
        self.scaling = alpha / rank
        self.strength = 1.0  # our dial: 0 is off, 1 is as trained

    def forward(self, weight):
        # weight + strength * scaling * (lora_B @ lora_A), in one step (this alpha is any factor)
        return torch.addmm(weight, self.lora_B, self.lora_A, alpha=self.strength * self.scaling)


def linear_layers(model):
    """The linear layers of a model, by name; with LoRA they are still nn.Linear."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def attach_lora(model, rank, alpha, layers=()):
    """Freeze `model`, in place, and attach LoRA to the layers named, or to all linear ones.

    Raises, before any change, ValueError for a layer that is not linear or is parametrized already,
    and AttributeError for a name that is not there.
    """
    layers = {name: model.get_submodule(name) for name in layers or linear_layers(model)}
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear) or parametrize.is_parametrized(layer):
            raise ValueError(f"LoRA needs a plain nn.Linear; {name} is a {type(layer).__name__}")
    model.requires_grad_(False)
    for layer in layers.values():
        lora = LoRAParametrization(layer.weight, rank, alpha)
        parametrize.register_parametrization(layer, "weight", lora)
    return model


def lora_layers(model):
    """The LoRAParametrization of each layer that has one, by the name of the layer."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRAParametrization):  # where parametrize keeps it
            found[name.removesuffix(".parametrizations.weight.0")] = module
    return found


def set_strength(model, strength):
    """Set the strength of each LoRA in `model`, in place."""
    for lora in lora_layers(model).values():
        lora.strength = strength
    return model


# --- Data, training, evaluation -------------------------------------------------------------------

MEAN, STD = 0.1307, 0.3081  # of the training pixels, which lie in [0, 1]
# Training, not evaluation, multiplies in bfloat16 where AVX-512 can: half the time.
BFLOAT16 = torch.cpu.get_capabilities().get("avx512_bf16", False)


class Split(NamedTuple):
    """Images (n, 28, 28), normalised float32, and their labels (n,)."""

    images: Tensor
    labels: Tensor

    def some(self, which):
        """The images and labels at these indices, or where a mask is true."""
        return Split(self.images[which], self.labels[which])


def load_mnist(folder, device):
    """Three splits: 55,000 images for training, 5,000 for validation and 10,000 for testing.

    torchvision unpacks the archives in folder/MNIST/raw and downloads those that are missing.
    """
    parts = [MNIST(folder, train, download=True) for train in (True, False)]
    images = torch.cat([part.data for part in parts]) / 255
    images -= MEAN
    images /= STD
    labels = torch.cat([part.targets for part in parts])
    sizes = [55_000, 5_000, 10_000]
    return list(map(Split, images.to(device).split(sizes), labels.to(device).split(sizes)))


def train(model, split, seed, name, lr, epochs=1, batch=128):
    """Train whatever in `model` is not frozen, in place: `batch` images a step, shuffled by `seed`.

    The learning rate falls linearly to 0. Returns the loss of each step.
    """
    generator = torch.Generator().manual_seed(seed)
    steps, losses = [], []
    for _ in range(epochs):
        steps += torch.randperm(len(split.labels), generator=generator).split(batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)  # skips what is frozen
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(steps))
    model.train()
    for which in tqdm(steps, name, leave=False, disable=None):  # no bar in a log file
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
            loss = nn.functional.cross_entropy(model(split.images[which]), split.labels[which])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        sys.exit(f"main.py: {name}: training diverged; lower its learning rate, {lr:g}")
    return losses


@torch.inference_mode()
def evaluate(model, split):
    """Logits (n, 10) of a split, a thousand images at a time, so that little memory is needed."""
    model.eval()
    return torch.cat([model(images) for images in split.images.split(1000)])


def accuracy(logits, split):
    """The percentage of a split's images whose largest logit is that of their label."""
    return 100 * int((logits.argmax(1) == split.labels).sum()) / len(split.labels)


def count_trained(model):
    """How many numbers of a model are not frozen."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# --- The main job: a network, then LoRA on images of one digit ------------------------------------


def check_lora(baseline, lora, alpha):
    """End the run if LoRA, switched off, is not the baseline, or on, not what the paper says."""
    off = set_strength(deepcopy(lora), 0)
    for name, tensor in baseline.state_dict().items():
        if not torch.equal(tensor, attrgetter(name)(off)):  # of linear1.weight: W + 0 B A
            sys.exit(f"main.py: with LoRA off, {name} is not the baseline's")
    # in double precision, so that rounding stays far below the tolerance
    baseline, lora = (deepcopy(model).cpu().double() for model in (baseline, lora))
    for name, matrices in lora_layers(lora).items():
        A, B = matrices.parameters()  # (rank, in), (out, rank)
        x = torch.randn(100, A.shape[1]).to(A)
        paper = baseline.get_submodule(name)(x) + alpha / len(A) * (x @ A.T @ B.T)  # W x + b + ...
        difference = (lora.get_submodule(name)(x) - paper).abs().max() / paper.abs().max()
        if not difference < 1e-12:
            sys.exit(f"main.py: {name} does not compute W x + b + (alpha / rank) B (A x)")


def main_job(args, seed, splits):
    """Train the baseline on all digits, then LoRA on images of one digit alone, and check LoRA.

    Returns what the questions start from: the settings, splits, networks and logits of this seed.
    """
    job = deepcopy(args)
    job.seed = seed
    job.train, job.validation, job.test = splits  # the second chooses, the third is only reported
    torch.manual_seed(job.seed)  # nn.Linear and LoRA draw from torch's own generator, in turn
    job.baseline = MNISTClassifier().to(job.device)
    losses = train(job.baseline, job.train, job.seed, "baseline", lr=2e-3, batch=256)
    print(f"seed {seed}: baseline, {len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}")

    job.own = job.train.some(job.train.labels == job.digit)
    job.lora = attach_lora(deepcopy(job.baseline), job.rank, job.alpha)
    losses = train(job.lora, job.own, job.seed, "LoRA", job.lora_lr, job.lora_epochs)
    print(f"seed {seed}: LoRA, {len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}")
    check_lora(job.baseline, job.lora, job.alpha)

    job.before = evaluate(job.baseline, job.test)  # logits (n, 10)
    job.after = evaluate(job.lora, job.test)
    return job


# --- Results: a row for each seed and method, for tables and pictures -----------------------------


def score(job, method, logits, stored):
    """A row: what a method, which stores so many numbers beside the baseline's, gets wrong."""
    labels, said = job.test.labels, logits.argmax(1)
    wrong = said != labels
    errors = torch.bincount(labels[wrong], minlength=10).tolist()
    return {
        "method": method,
        "accuracy": accuracy(logits, job.test),
        "errors": errors,  # on each of the ten digits
        "missed": errors[job.digit],
        "false": int((said[wrong] == job.digit).sum()),  # other digits called it
        "stored": stored,
    }


def values(rows, method, metric, task=None):
    """A metric of a method as an array: a value for each seed (ten of errors, a dict of shares)."""
    return np.array(
        [row[metric] for row in rows if row["method"] == method and row.get("task") == task]
    )


def print_table(rows, methods, columns):
    """A line for each method; columns: heading -> (metric, decimals[, task])."""
    print(f"{'':32}" + "".join(f"{heading:>12}" for heading in columns))
    for method in methods:
        line = f"{method:32}"
        for metric, decimals, *task in columns.values():
            found = values(rows, method, metric, *task)
            text = f"{found.mean():,.{decimals}f}"
            if found.std():
                text += f" ({found.std(ddof=1):.{decimals}f})"
            line += f"{text:>12}"
        print(line)


def new_figure(job, title, height=3.6):
    """An empty picture; its foot has some options of the run (not each matters to each picture)."""
    figure = Figure(figsize=(6.4, height), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize="medium")
    foot = f"--digit {job.digit} --rank {job.rank} --seed {job.seed} --seeds {job.seeds}"
    figure.supxlabel(foot, fontsize="x-small")
    return figure


# --- The main job's rows, table and pictures ------------------------------------------------------


def measure_main_job(job):
    stored = count_trained(job.lora)
    yield score(job, "baseline", job.before, 0)
    yield score(job, "LoRA", job.after, stored)
    off = set_strength(deepcopy(job.lora), 0)
    yield score(job, "LoRA, off", evaluate(off, job.test), stored)


def report_main_job(rows, job):
    """What LoRA added, what was checked (or the run had ended), and the errors on each digit."""
    for name, lora in lora_layers(job.lora).items():
        print(
            f"{name}: W + {lora.scaling:g} * lora_B {tuple(lora.lora_B.shape)} "
            f"@ lora_A {tuple(lora.lora_A.shape)}"
        )
    trained, frozen = count_trained(job.lora), count_trained(job.baseline)
    print(f"{trained:,} numbers trained, {trained / frozen:.3%} of the {frozen:,} that are frozen")
    print("checked: off, it is the baseline; on, these layers add (alpha / rank) B (A x)")
    if job.seeds > 1:
        print(f"below: means over {job.seeds} seeds; what is in brackets is a standard deviation")

    print("\nerrors on" + "".join(f"{digit:5}" for digit in range(10)) + "  accuracy, %")
    errors = {}
    for method in ("baseline", "LoRA", "LoRA, off"):
        errors[method] = values(rows, method, "errors").mean(0)
        counts = "".join(f"{count:5.0f}" for count in errors[method])
        print(f"{method:9}{counts} {values(rows, method, 'accuracy').mean():12.2f}")
    print(
        f"other digits called {job.digit}: {values(rows, 'baseline', 'false').mean():.0f} "
        f"without LoRA, {values(rows, 'LoRA', 'false').mean():.0f} with it, which saw no others"
    )

    figure = new_figure(job, f"Errors on each digit, before and after LoRA on {job.digit}s")
    axes = figure.subplots()
    axes.axvspan(job.digit - 0.5, job.digit + 0.5, color="#fff3b0")
    del errors["LoRA, off"]
    axes.grouped_bar(errors, tick_labels=[*"0123456789"], colors=["0.6", "C0"])
    for bars in axes.containers:
        axes.bar_label(bars, fmt="%.0f", fontsize="x-small")
    axes.set(xlabel="digit in the image", ylabel="errors on test images")
    axes.legend()
    return figure


def show_image(axes, image, title, **look):
    axes.set_axis_off()
    axes.set_title(title, y=1, fontsize="small")  # y: else it looks for ticks, and is slow
    axes.imshow(image.cpu().numpy(), **look)


def draw_examples(rows, job):
    """The first images of the digit that LoRA puts right, and of other digits that it spoils."""
    digit, before, after = job.digit, job.before.argmax(1), job.after.argmax(1)
    title = f"Baseline → LoRA (seed {job.seed}): rightly {digit} above, wrongly {digit} below"
    figure = new_figure(job, title, height=2.8)
    changed = (before != digit) & (after == digit)
    for row, kind in enumerate((job.test.labels == digit, job.test.labels == before)):
        for place, i in enumerate((changed & kind).nonzero().flatten()[:8]):
            axes = figure.add_subplot(2, 8, 8 * row + place + 1)
            show_image(axes, job.test.images[i], f"{before[i]} → {digit}", cmap="Greys")
    return figure


@torch.no_grad()
def draw_added(rows, job):
    """Five hidden units' weights as images: frozen above, and below what LoRA adds; white is 0.

    The units are from the lowest number in lora_B's first column to the highest. At rank 1 there is
    no other: what LoRA adds to a unit is alpha times this number times the one row of lora_A.
    """
    name, lora = next(iter(lora_layers(job.lora).items()))
    if lora.lora_A.shape[1] != 784:
        return None  # the layer does not read images
    column = lora.lora_B[:, 0]
    units = column.argsort()[torch.linspace(0, len(column) - 1, 5).long()]
    frozen = job.baseline.get_submodule(name).weight[units]
    added = job.lora.get_submodule(name).weight[units] - frozen
    most = frozen.abs().max()
    scale = most / added.abs().max()
    title = f"Weights of five units of {name}, blue plus, red minus (seed {job.seed}):"
    figure = new_figure(job, f"{title}\nfrozen above, what LoRA adds x {scale:.0f} below")
    for panels, weights in zip(figure.subplots(2, 5), (frozen, added * scale)):
        for axes, image, number in zip(panels, weights.view(5, 28, 28), column[units]):
            word = f"lora_B[:, 0] {number:+.3f}"
            show_image(axes, image, word, cmap="RdBu", vmin=-most, vmax=most)
    return figure


# --- What two questions share: columns of a table, and a change, cut to a rank --------------------


def score_columns(job):
    return {
        "accuracy, %": ("accuracy", 2),
        f"missed {job.digit}s": ("missed", 0),
        f"false {job.digit}s": ("false", 0),
        "stored": ("stored", 0),
    }


@torch.no_grad()
def cut(model, baseline, rank):
    """The baseline plus the change of each linear layer's weight, cut to a rank; no other change.

    Returns that network, how many numbers the cut changes store, and of each layer's change how
    much of its squared norm the first 32 directions hold. (On the CPU: not every device can.)
    """
    network = deepcopy(baseline)
    stored = 0
    shares = {}
    for name, layer in linear_layers(network).items():
        change = (model.get_submodule(name).weight - layer.weight).cpu()
        U, S, V = torch.svd_lowrank(change, q=min(32, *change.shape), niter=4)
        # the nearest matrix of that rank (Eckart and Young 1936)
        layer.weight += (U[:, :rank] * S[:rank] @ V[:, :rank].T).to(layer.weight)
        stored += rank * sum(change.shape)
        shares[name] = S.square() / change.square().sum()
    return network, stored, shares


# --- Question 1: what did it cost, and would something simpler do? --------------------------------

STRENGTHS = (0.2, 0.4, 0.6, 0.8)  # 0 is the baseline, and 1 is LoRA
BIASES = range(1, 7)  # 0 is the baseline
OTHERS = 3  # images of other digits for each one of the digit; chosen on validation from 1, 3, 9


def measure_cost(job):
    """LoRA turned down; a bias on the digit's logit instead; and LoRA with other digits too."""
    lora = deepcopy(job.lora)
    stored = count_trained(lora)
    for strength in STRENGTHS:
        set_strength(lora, strength)
        yield score(job, f"LoRA at strength {strength}", evaluate(lora, job.test), stored)
    one_hot = torch.eye(10)[job.digit].to(job.before)
    for bias in BIASES:
        yield score(job, f"bias of {bias}", job.before + bias * one_hot, 1)

    # The largest bias, below 20, that costs no more accuracy than LoRA does, on validation images.
    plain = evaluate(job.baseline, job.validation)
    floor = accuracy(evaluate(job.lora, job.validation), job.validation)
    chosen = 0.0
    for bias in torch.arange(0, 20, 0.25).tolist():
        if accuracy(plain + bias * one_hot, job.validation) >= floor:
            chosen = bias
    yield score(job, "one biased logit", job.before + chosen * one_hot, 1)

    # As many steps as LoRA took, with as many images of the digit (on average) in each.
    torch.manual_seed(job.seed)
    shown = job.train.labels == job.digit
    others = (~shown).nonzero().flatten()
    few = torch.randperm(len(others))[: OTHERS * len(job.own.labels)]
    shown[others[few]] = True
    lora = attach_lora(deepcopy(job.baseline), job.rank, job.alpha, lora_layers(job.lora))
    split = job.train.some(shown)
    batch = 128 * (1 + OTHERS)
    train(lora, split, job.seed, "LoRA + other digits", job.lora_lr, job.lora_epochs, batch)
    yield score(job, "LoRA + other digits", evaluate(lora, job.test), stored)


def report_cost(rows, job):
    """The scores; then errors on the digit against accuracy, over LoRA's strength and the bias."""
    print("\n1. What did it cost, and would something simpler do? (stored: numbers to keep)")
    methods = ["baseline", "LoRA", "one biased logit", "LoRA + other digits"]
    print_table(rows, methods, score_columns(job))
    before, lora, bias = (values(rows, method, "accuracy").mean() for method in methods[:3])
    print(f"LoRA costs {before - lora:.2f} points of accuracy, the bias {before - bias:.2f}")

    figure = new_figure(job, f"Missed {job.digit}s and accuracy: LoRA, or a bias on one logit")
    axes = figure.subplots()
    axes.set(xlabel=f"missed {job.digit}s (← better)", ylabel="accuracy, % (better →)")
    for label, look, *methods in (
        (
            "LoRA at strength 0 to 1",
            "o-",
            "baseline",
            *[f"LoRA at strength {x}" for x in STRENGTHS],
            "LoRA",
        ),
        ("bias of 0 to 6", "s-", "baseline", *[f"bias of {x}" for x in BIASES]),
        ("LoRA + other digits", "kx", "LoRA + other digits"),
        ("baseline: strength 0, bias 0", "ko", "baseline"),
    ):
        missed = [values(rows, method, "missed").mean() for method in methods]
        right = [values(rows, method, "accuracy").mean() for method in methods]
        axes.plot(missed, right, look, label=label)
    axes.legend()
    return figure


# --- Question 2: why is low rank enough? ----------------------------------------------------------

FULL_LR = 6e-5  # for one epoch on 9s; chosen on validation, as --lora-lr: see results/README.md
RANKS = (1, 2, 4, 8, 16)


def measure_rank(job):
    """Full fine-tuning on the digit's images, and on as many of all digits; its change's rank."""
    torch.manual_seed(job.seed)
    any_digits = torch.randperm(len(job.train.labels))[: len(job.own.labels)]
    for name, split in (
        ("full fine-tuning", job.own),
        ("full fine-tuning on all digits", job.train.some(any_digits)),
    ):
        full = deepcopy(job.baseline)
        held = {}
        train(full, split, job.seed, name, FULL_LR)
        cut_full, stored, shares = cut(full, job.baseline, 1)
        for layer, share in shares.items():
            held[layer] = [share[:rank].sum().item() for rank in RANKS]
        yield score(job, name, evaluate(full, job.test), count_trained(full)) | {"shares": held}
        if split is job.own:
            yield score(job, f"{name}, cut to rank 1", evaluate(cut_full, job.test), stored)


def report_rank(rows, job):
    """The scores; then how much of the squared norm of the largest matrix's change a rank holds."""
    print("\n2. Why is low rank enough?")
    own, every = "full fine-tuning", "full fine-tuning on all digits"
    print_table(rows, ["LoRA", own, f"{own}, cut to rank 1", every], score_columns(job))
    layers = linear_layers(job.baseline)
    largest = max(layers, key=lambda name: layers[name].weight.numel())

    figure = new_figure(job, f"How much of what training changes in {largest} a low rank holds")
    axes = figure.subplots()
    for method, learned_from in ((own, f"{job.digit}s"), (every, "as many of all digits")):
        held = np.mean([shares[largest] for shares in values(rows, method, "shares")], 0)
        print(
            f"{learned_from}: rank 1 holds {held[0]:.0%} of the squared norm of {largest}'s change"
        )
        axes.plot(RANKS, 100 * held, "o-", label=f"learned from {learned_from}")
    axes.set(xlabel="rank", xticks=RANKS, ylabel="% of the change's squared norm", ylim=(0, 100))
    axes.legend()
    return figure


# --- Question 3: what is LoRA for? One more task for a frozen network -----------------------------

SHUFFLE = torch.randperm(784, generator=torch.Generator().manual_seed(0))
TASKS = {  # functions of normalised images (n, 28, 28)
    "rotated": lambda x: rotate(x, 30, InterpolationMode.BILINEAR, fill=-MEAN / STD),
    "mirrored": lambda x: x.flip(2),
    "shuffled": lambda x: x.flatten(1)[:, SHUFFLE].view_as(x),
}
IMAGES = 100  # of each task, to learn it from


def ways(baseline):
    """The ways to learn a task: a name, the network to copy and train, two rates, and epochs."""
    adapter = attach_lora(deepcopy(baseline), rank=4, alpha=4)
    yield "LoRA, rank 4", adapter, (1e-2, 2e-2), 10
    last = deepcopy(baseline).requires_grad_(False)
    list(linear_layers(last).values())[-1].requires_grad_()
    yield "last layer alone", last, (3e-3, 1e-2), 10
    hidden = count_trained(adapter) // 795  # a hidden unit has 784 + 1 + 10 numbers
    new = nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    # from scratch, so with five times the steps
    yield "new small network", new.to(next(baseline.parameters())), (3e-3, 5e-3), 50
    yield "copy of the network", baseline, (6e-4, 1e-3), 10


def measure_tasks(job):
    """The accuracy on each task of what is learned from a few of its images, and its size."""
    fourth = slice(None, None, 4)  # enough to tell, and saves time
    for task, change in TASKS.items():
        torch.manual_seed(job.seed)
        few = job.train.some(torch.randperm(len(job.train.labels))[:IMAGES])
        splits = few, job.validation.some(fourth), job.test.some(fourth)
        few, choose, test = (Split(change(split.images), split.labels) for split in splits)

        tried = {"baseline": [job.baseline]}
        stored = {"baseline": 0}
        for method, start, rates, epochs in ways(job.baseline):
            tried[method], stored[method] = [], count_trained(start)
            for lr in rates:
                model = deepcopy(start)
                train(model, few, job.seed, f"{task}: {method}", lr, epochs, batch=25)
                tried[method].append(model)
        cut_copy = "copy, cut to rank 4"
        tried[cut_copy] = []
        for copy in tried["copy of the network"]:
            network, stored[cut_copy], _ = cut(copy, job.baseline, 4)
            tried[cut_copy].append(network)

        for method, models in tried.items():
            best = max(models, key=lambda x: accuracy(evaluate(x, choose), choose))
            yield {
                "method": method,
                "task": task,
                "accuracy": accuracy(evaluate(best, test), test),
                "stored": stored[method],
            }


def report_tasks(rows, job):
    """The accuracies; then five images of each task above the accuracy of each way to learn it."""
    print(
        f"\n3. What is LoRA for? One more task, learned from {IMAGES} images\n"
        "(accuracy, %; of two learning rates, the better on validation images)"
    )
    columns = {task: ("accuracy", 1, task) for task in TASKS}
    columns["stored"] = ("stored", 0, min(TASKS))  # the same for each task
    methods = dict.fromkeys(row["method"] for row in rows if "task" in row)
    print_table(rows, methods, columns)

    figure = new_figure(job, f"Accuracy (%) on one more task, learned from {IMAGES} images")
    top, bottom = figure.subplots(2, len(TASKS), height_ratios=[1, 5], sharey="row", squeeze=False)
    for strip, axes, (task, change) in zip(top, bottom, TASKS.items()):
        show_image(strip, torch.cat([*change(job.test.images[:5])], 1), task, cmap="Greys")
        names = [f"{x}\n{values(rows, x, 'stored', task)[0]:,} numbers" for x in methods]
        found = {method: values(rows, method, "accuracy", task).mean() for method in methods}
        bars = axes.barh(names, found.values(), color="0.7")
        bars[1].set_color("C0")  # LoRA
        axes.bar_label(bars, fmt="%.0f")
        axes.set_xlim(0, 120)  # room for the numbers
        print(
            f"{task}: LoRA against the copy, "
            f"{found['LoRA, rank 4'] - found['copy of the network']:+.1f} points"
        )
    axes.invert_yaxis()  # of all panels, which share it
    return figure


PARTS = [  # a name, what measures a seed, and, by picture, what tells or draws at the end
    (
        "main",
        measure_main_job,
        {"error_counts": report_main_job, "examples": draw_examples, "added": draw_added},
    ),
    ("cost", measure_cost, {"trade_off": report_cost}),
    ("rank", measure_rank, {"low_rank": report_rank}),
    ("tasks", measure_tasks, {"tasks": report_tasks}),
]

# --- Files and command line -----------------------------------------------------------------------


def write(path, content):
    """Write bytes in one step: who stops the run, or a full disk, leaves the old file whole."""
    part = path.with_suffix(".part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        sys.exit(f"main.py: {path}: {error.strerror}")


def save_metrics(args, rows):
    config = vars(args).copy()
    del config["data_dir"], config["output_dir"]  # the same settings give the same file
    metrics = {
        "config": config,
        "environment": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu": dict(torch.cpu.get_capabilities()),
        },
        "rows": rows,
    }
    write(args.output_dir / "metrics.json", json.dumps(metrics).encode())


def save_models(job):
    """The baseline, and LoRA in the format of Hugging Face PEFT."""
    folder, loras = job.output_dir, lora_layers(deepcopy(job.lora).cpu())
    adapter = {
        "peft_type": "LORA",
        "r": job.rank,
        "lora_alpha": job.alpha,
        "target_modules": list(loras),
    }
    write(folder / "adapter/adapter_config.json", json.dumps(adapter).encode())
    matrices = {}
    for name, lora in loras.items():
        for matrix, tensor in lora.state_dict().items():
            matrices[f"base_model.model.{name}.{matrix}.weight"] = tensor
    baseline = deepcopy(job.baseline).cpu().state_dict()
    for name, tensors in (("baseline.pt", baseline), ("adapter/adapter_model.bin", matrices)):
        file = io.BytesIO()  # on a full disk torch.save itself would not say so
        torch.save(tensors, file)
        write(folder / name, file.getvalue())
    # PEFT would read another's before ours
    (folder / "adapter/adapter_model.safetensors").unlink(missing_ok=True)


def positive_float(text):  # argparse names these functions in its errors
    if not float(text) > 0:
        raise ValueError
    return float(text)


def positive_int(text):
    positive_float(text)
    return int(text)


def device(text):
    try:
        torch.zeros(1, device=text)
    except Exception as error:  # noqa: BLE001 (of torch: each device has its own)
        raise argparse.ArgumentTypeError(f"{text}: {error}".splitlines()[0])
    return text


PARSER = argparse.ArgumentParser(
    usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
add = PARSER.add_argument
add("--digit", type=int, choices=range(10), default=9, help="the digit that LoRA learns")
add("--rank", type=positive_int, default=1, help="rank of LoRA in the main job")
add("--alpha", type=positive_float, default=1.0, help="LoRA is scaled by alpha / rank")
add("--lora-epochs", type=positive_int, default=1, help="passes of LoRA over the digit's images")
add("--lora-lr", type=positive_float, default=1.5e-3, help="LoRA's learning rate, which falls to 0")
add("--seed", type=int, default=0, help="seed of networks and of the order of images")
add("--seeds", type=positive_int, default=1, help="repeat for so many seeds, from --seed up")
add("--device", type=device, default="cpu", help="cpu, cuda or mps")
add("--data-dir", type=Path, default=Path(__file__).with_name("data"), help="has MNIST/raw")
add("--output-dir", type=Path, default="outputs", help="folder for what is found")
add("--main-job-only", action="store_true", help="leave out the questions")


def main(arguments=None):
    """Run the command line, or a list of arguments; of this process it changes torch's generator.

    Each part of each seed is saved when it is measured, and reported with the last seed.
    """
    args = PARSER.parse_args(arguments)
    try:
        (args.output_dir / "adapter").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        PARSER.error(f"argument --output-dir: {error}")
    try:
        splits = load_mnist(args.data_dir, args.device)
    except Exception as error:  # noqa: BLE001 (of torchvision, for anything but MNIST)
        PARSER.error(
            f"argument --data-dir: {args.data_dir}: {error!r} (incomplete files? delete them)"
        )
    seeds = range(args.seed, args.seed + args.seeds)
    rows = []
    for seed in seeds:
        job = main_job(args, seed, splits)
        if seed == args.seed:
            first = job
            save_models(job)
        for question, measure, reports in PARTS[:1] if args.main_job_only else PARTS:
            rows += [{"seed": seed, "question": question, **row} for row in measure(job)]
            save_metrics(args, rows)
            if seed == seeds[-1]:
                for picture, report in reports.items():
                    figure = report(rows, first)
                    if figure:
                        figure.savefig(args.output_dir / f"{picture}.png")
        gc.collect()  # models with LoRA are cycles, and those of many seeds would pile up
    print(f"in {args.output_dir}: metrics.json, pictures of what was run, baseline.pt, adapter/")


if __name__ == "__main__":
    gc.freeze()  # so that no collection, at exit either, looks through all that was imported
    try:
        main()
    except KeyboardInterrupt:
        print("main.py: interrupted", file=sys.stderr)
        sys.exit(130)
