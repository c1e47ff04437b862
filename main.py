"""LoRA on MNIST, in one script: pip install -r requirements.txt && python main.py

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) freezes a trained network and learns a small
correction of each weight matrix: here of a network that reads digits, from images of 9 alone. It
trains 6,794 numbers, 0.242 % of the network's. Errors on 9 fall from 43.7 to 4.2; accuracy falls
from 97.43 to 91.84 %, since other digits are now called 9 (20 seeds, 10,000 test images).
Read to the end of the main job, and you have seen LoRA at work; three questions follow.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from copy import deepcopy
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and "IPython" not in sys.modules:
    os.environ.pop("MPLBACKEND", None)  # `!python main.py` inherits a notebook's; we need none

import matplotlib.style
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
        hidden = self.linear1(images.flatten(1)).relu_()  # in place: saves one pass over memory
        hidden = self.linear2(hidden).relu_()
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
        lora_A = torch.randn(rank, in_features) / in_features**0.5
        self.lora_A = nn.Parameter(lora_A.to(weight))  # drawn on the CPU: the same on any device
        self.lora_B = nn.Parameter(weight.new_zeros(out_features, rank))
        self.scaling = alpha / rank
        self.strength = 1.0

    def forward(self, weight):
        """The weight (out, in) that the layer uses; at strength 0 the frozen one itself."""
        if self.strength == 0:
            return weight
        # weight + strength * scaling * (lora_B @ lora_A), in one step
        return torch.addmm(weight, self.lora_B, self.lora_A, alpha=self.strength * self.scaling)


def linear_layers(model):
    """The linear layers of a model, by name; with LoRA they are still nn.Linear."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def attach_lora(model, rank, alpha, layers=()):
    """Freeze all of `model`, in place, and attach LoRA to the layers named, or to all linear ones.

    Raises ValueError if a layer has LoRA already.
    """
    model.requires_grad_(False)
    for name in layers or linear_layers(model):
        layer = model.get_submodule(name)
        if parametrize.is_parametrized(layer):
            raise ValueError(f"{name} has LoRA already: attach it to a copy of the plain model")
        parametrize.register_parametrization(
            layer, "weight", LoRAParametrization(layer.weight, rank, alpha)
        )
    return model


def lora_layers(model):
    """The LoRAParametrization of each layer that has one, by the name of the layer."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRAParametrization):  # where parametrize keeps it
            found[name.removesuffix(".parametrizations.weight.0")] = module
    return found


def set_strength(model, strength):
    """Set the strength of each LoRA in `model`, in place: 0 is off, 1 is as it was trained."""
    for lora in lora_layers(model).values():
        lora.strength = strength
    return model


# --- Data, training, evaluation -------------------------------------------------------------------

MEAN, STD = 0.1307, 0.3081  # of the training pixels, which lie in [0, 1]
# Training multiplies in bfloat16 where the CPU has units for it, which takes half the time.
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
    images = (torch.cat([part.data for part in parts]) / 255 - MEAN) / STD
    labels = torch.cat([part.targets for part in parts])
    sizes = [55_000, 5_000, 10_000]
    return list(map(Split, images.to(device).split(sizes), labels.to(device).split(sizes)))


def say(line):
    """Print a line, whatever stdout is: a run does not end because nobody reads what it says."""
    try:
        print(line, flush=True)
    except UnicodeEncodeError:
        say(ascii(line))
    except (OSError, ValueError):
        pass  # a pipe, terminal or stream that was closed


def progress(steps, name):
    """The steps; on a terminal, a bar shows how many of them are done."""
    on_terminal = hasattr(sys.stderr, "isatty") and sys.stderr.isatty()
    return tqdm(steps, name, leave=False) if on_terminal else steps


def train(model, split, seed, name, lr, epochs=1, batch=128):
    """Train whatever in `model` is not frozen, in place: `batch` images a step, shuffled by `seed`.

    The learning rate falls linearly to 0. Returns a line that says what was done.
    """
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    steps, losses = [], []
    for _ in range(epochs):
        steps += torch.randperm(len(split.labels), generator=generator).split(batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(steps))
    model.train()
    for which in progress(steps, name):
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
            loss = nn.functional.cross_entropy(model(split.images[which]), split.labels[which])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        sys.exit(f"main.py: {name}: training diverged; lower its learning rate, {lr:g}")
    cost = f"{len(split.labels):,} images, {len(steps)} steps, {time.perf_counter() - began:.1f} s"
    return f"{name}: {cost}, loss {losses[0]:.3f} to {losses[-1]:.3f}"


@torch.inference_mode()
def evaluate(model, images):
    """Logits (n, 10) of images (n, 28, 28)."""
    return model.eval()(images)


def accuracy(logits, labels):
    """The share of the images whose largest logit is that of their label."""
    return int((logits.argmax(1) == labels).sum()) / len(labels)


def count_trained(model):
    """How many numbers of a model are not frozen."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def values(rows, method, metric, task=None):
    """A metric in each row of a method, (rows,) or (rows, n) if it is a list; accuracy in %.

    There is a row for each seed (shares of a matrix: for each seed and layer).
    """
    found = [row[metric] for row in rows if (row["method"], row.get("task")) == (method, task)]
    scale = 100 if metric == "accuracy" else 1
    return scale * torch.tensor(found, dtype=torch.double)


def cell(found):
    """What was found for each seed (seeds,): the value if all agree, or else mean ± deviation."""
    if (found == found[0]).all():
        return f"{found[0]:,.10g}"
    return f"{found.mean():.1f}±{found.std():.1f}"


# --- The main job: a network, then LoRA on images of one digit ------------------------------------


class Job(NamedTuple):
    """The main job of one seed: what it was given, its models, and what they say."""

    settings: argparse.Namespace
    digit: int
    seed: int
    train: Split
    validation: Split  # chooses
    test: Split  # is only reported
    chosen: Tensor  # of each training image: whether LoRA was trained on it
    own: Split  # the training images that were chosen
    baseline: nn.Module
    start: nn.Module  # the baseline with LoRA, before LoRA is trained
    lora: nn.Module
    before: Tensor  # logits (n, 10) of the test images, from the baseline
    after: Tensor  # and from LoRA

    def score(self, method, logits, trained):
        """The row of a method of so many numbers: what its logits of the test images get wrong."""
        labels, said = self.test.labels, logits.argmax(1)
        errors = torch.bincount(labels[said != labels].cpu(), minlength=10).tolist()
        return {
            "method": method,
            "accuracy": accuracy(logits, labels),
            "errors": errors,  # on each of the ten digits
            "missed": errors[self.digit],
            "false": int(((said == self.digit) & (said != labels)).sum()),  # others called it
            "trained": trained,
        }


def check_lora(baseline, lora, alpha):
    """End the run if LoRA, switched off, is not the baseline, or on, not what the paper says."""
    off = set_strength(deepcopy(lora), 0)
    for name, tensor in baseline.named_parameters():
        used = attrgetter(name)(off)  # of a layer with LoRA, what comes out of its forward
        # as bytes, since 0.0 equals -0.0
        if not torch.equal(tensor.view(torch.uint8), used.view(torch.uint8)):
            sys.exit(f"main.py: with LoRA off, {name} is not the baseline's, to the bit")
    for name, matrices in lora_layers(lora).items():
        A, B = matrices.parameters()
        x = torch.randn(100, A.shape[1]).to(A)
        paper = baseline.get_submodule(name)(x) + alpha / len(A) * (x @ A.T @ B.T)  # W x + b + ...
        difference = (lora.get_submodule(name)(x) - paper).abs().max() / paper.abs().max()
        if not difference < 1e-5:  # of float32, which rounds
            sys.exit(f"main.py: {name} does not compute W x + b + (alpha / rank) B (A x)")


def main_job(settings, seed, splits):
    """Train the baseline on all digits, then LoRA on images of one digit alone, and check LoRA."""
    training, _, test = splits
    torch.manual_seed(seed)  # nn.Linear and LoRA draw from torch's own generator, in turn
    baseline = MNISTClassifier().to(settings.device)
    say(train(baseline, training, seed, "baseline", lr=2e-3, batch=256))

    chosen = (training.labels == settings.digit).cpu()
    own = training.some(chosen)
    start = attach_lora(deepcopy(baseline), settings.rank, settings.alpha)
    lora = deepcopy(start)
    say(train(lora, own, seed, "LoRA", settings.lora_lr, settings.lora_epochs))
    check_lora(baseline, lora, settings.alpha)

    before, after = evaluate(baseline, test.images), evaluate(lora, test.images)
    return Job(
        settings, settings.digit, seed, *splits, chosen, own, baseline, start, lora, before, after
    )


def measure_main_job(job):
    yield job.score("baseline", job.before, count_trained(job.baseline))
    yield job.score("LoRA", job.after, count_trained(job.lora))


BOTH = ("baseline", "LoRA")


def print_main_job(rows, job):
    """What LoRA added, what was checked (or the run had ended), and the errors on each digit."""
    for name, lora in lora_layers(job.lora).items():
        say(f"  {name}: W + lora_B {tuple(lora.lora_B.shape)} @ lora_A {tuple(lora.lora_A.shape)}")
    trained, frozen = count_trained(job.lora), count_trained(job.baseline)
    say(
        f"  {trained:,} numbers trained ({4 * trained / 1e3:.0f} kB), {trained / frozen:.3%} "
        f"of the {frozen:,} ({4 * frozen / 1e6:.0f} MB) that are frozen"
    )
    say("  checked: off, it has the baseline's bits; on, W x + b + (alpha / rank) B (A x)")

    heading = [f"{digit:5}" for digit in range(10)]
    heading[job.digit] += "*"
    say(f"\nerrors on {''.join(heading)} accuracy, %")
    for method in BOTH:
        errors = [f"{count:5.0f}" for count in values(rows, method, "errors").mean(0)]
        say(f"{method:9} {''.join(errors)} {values(rows, method, 'accuracy').mean():9.2f}")
    before, after = (values(rows, method, "false").mean() for method in BOTH)
    say(f"missed: errors on {job.digit}; false: others called it, {before:.0f}, then {after:.0f}")


# --- Tables and pictures --------------------------------------------------------------------------


def print_table(rows, methods, columns):
    """A line for each method. A column is a heading and what `values` needs besides the method."""
    say(f"{'':32}" + "".join(f"{heading:>12}" for heading in columns))
    for method in methods:
        cells = [cell(values(rows, method, *column)) for column in columns.values()]
        say(f"{method:32}" + "".join(f"{text:>12}" for text in cells))


SCORES = {name: [name] for name in ("accuracy", "missed", "false", "trained")}


def show_images(panels, images, words):
    """An image (28, 28) in each panel, dark where its values are high, with a word above."""
    for axes in panels:
        axes.set_axis_off()
    for axes, image, word in zip(panels, images.cpu(), words):
        axes.imshow(image, "Greys")
        axes.set_title(word, fontsize="medium")


def draw_curve(axes, rows, methods, x, y, task=None, **look):
    """A dot for each method, placed by the means of two metrics, and a line through the dots."""
    dots = [[values(rows, name, z, task).mean().item() for z in (x, y)] for name in methods]
    axes.plot(*zip(*dots), "o-", **look)
    return dots


def draw_error_counts(figure, rows, job):
    """The errors on each digit, without LoRA and with it: a bar with its number for each."""
    figure.suptitle("Errors on each digit, before and after LoRA")
    axes = figure.subplots()
    axes.axvspan(job.digit - 0.5, job.digit + 0.5, color="#fff3b0")
    errors = {name: values(rows, name, "errors").mean(0) for name in BOTH}
    axes.grouped_bar(errors, tick_labels=[*"0123456789"], colors=["0.6", "C0"])
    for bars in axes.containers:
        axes.bar_label(bars, fmt="%.0f", fontsize="small")
    axes.set(xlabel="digit in the image", ylabel="errors on test images")
    axes.legend()


def draw_examples(figure, rows, job):
    """The first images of the digit that LoRA puts right, and of other digits that it spoils."""
    figure.suptitle(f"Images that only LoRA calls {job.digit}: rightly above, wrongly below")
    (images, labels), before, after = job.test, job.before.argmax(1), job.after.argmax(1)
    changed = (before != job.digit) & (after == job.digit)
    for panels, kind in zip(figure.subplots(2, 8), (labels == job.digit, labels == before)):
        first = (changed & kind).nonzero().flatten()[:8]
        show_images(panels, images[first], [f"{before[i]} → {after[i]}" for i in first])


def draw_learned(figure, rows, job):
    """The first row of a lora_A that reads images: its start, what training adds, its end."""
    start, end = (next(iter(lora_layers(x).values())).lora_A[0] for x in (job.start, job.lora))
    if len(end) == 784:
        figure.suptitle("The first row of lora_A, each image in its own scale")
        images = torch.stack([start, end - start, end]).detach().view(3, 28, 28)
        show_images(
            figure.subplots(1, 3), images, ["random start", "+ what training adds", "= lora_A"]
        )


# --- Question 1: what did it cost, and would something simpler do? --------------------------------

STRENGTHS = (0.2, 0.4, 0.6, 0.8)
BIASES = range(1, 7)
OTHERS = 3  # images of other digits for each one of the digit; chosen on validation from 1, 3, 9


def measure_cost(job):
    """LoRA turned down; a bias on the digit's logit instead; and LoRA with other digits too."""
    lora, trained = deepcopy(job.lora), count_trained(job.lora)
    for strength in progress(STRENGTHS, "strengths"):
        logits = evaluate(set_strength(lora, strength), job.test.images)
        yield job.score(f"LoRA at strength {strength}", logits, trained)
    one_hot = torch.eye(10)[job.digit].to(job.before)
    for bias in BIASES:
        yield job.score(f"bias of {bias}", job.before + bias * one_hot, 1)

    # The largest bias that costs no more accuracy than LoRA does, on validation images.
    images, labels = job.validation
    plain, most = evaluate(job.baseline, images), 0.0
    least = accuracy(evaluate(job.lora, images), labels)
    for bias in torch.arange(0, 20, 0.25).tolist():
        if accuracy(plain + bias * one_hot, labels) >= least:
            most = bias
    yield job.score("one biased logit", job.before + most * one_hot, 1)

    # As many steps as LoRA took, with as many images of the digit (on average) in each.
    order = torch.randperm(len(job.chosen), generator=torch.Generator().manual_seed(job.seed))
    own, others = order[job.chosen[order]], order[~job.chosen[order]]
    mixed = job.train.some(torch.cat([own, others[: OTHERS * len(own)]]))
    name, lora, batch = "LoRA + other digits", deepcopy(job.start), 128 * (1 + OTHERS)
    train(lora, mixed, job.seed, name, job.settings.lora_lr, job.settings.lora_epochs, batch)
    yield job.score(name, evaluate(lora, job.test.images), trained)


def print_cost(rows, job):
    say("\n1. What did it cost, and would something simpler do?")
    print_table(rows, ["baseline", "LoRA", "one biased logit", "LoRA + other digits"], SCORES)
    gain = values(rows, "one biased logit", "accuracy") - values(rows, "LoRA", "accuracy")
    say(f"Accuracy with one biased logit minus accuracy with LoRA: {cell(gain)} points.")


def draw_trade_off(figure, rows, job):
    """The errors on the digit against accuracy, over LoRA's strength and over the bias."""
    figure.suptitle(f"Errors on {job.digit} and accuracy: LoRA, or a bias on one logit")
    axes = figure.subplots()
    axes.set(xlabel=f"errors on {job.digit} (← better)", ylabel="accuracy, % (better →)")
    for name, numbers, end, color, shift in (
        ("LoRA at strength", STRENGTHS, ["LoRA"], "C0", (5, -14)),
        ("bias of", BIASES, [], "C1", (-9, 8)),
    ):
        methods = ["baseline", *[f"{name} {number}" for number in numbers], *end]
        dots = draw_curve(axes, rows, methods, "missed", "accuracy", label=f"{name} …")
        for number, dot in zip((0, *numbers, 1), dots):
            axes.annotate(str(number), dot, shift, textcoords="offset points", color=color)
    draw_curve(
        axes, rows, ["LoRA + other digits"], "missed", "accuracy", label="LoRA + other digits"
    )
    axes.legend()


# --- Question 2: why is low rank enough? ----------------------------------------------------------

FULL_LR = 6e-5  # for one epoch; chosen on validation images, by the rule of LoRA's own
RANKS = (1, 2, 4, 8, 16)
MATRICES = ("the weights", "what fine-tuning changed")


def measure_rank(job):
    """Full fine-tuning, its change cut to rank 1, and how much of a matrix each rank holds."""
    torch.manual_seed(job.seed)  # svd_lowrank starts its search at random vectors
    full, cut = deepcopy(job.baseline), deepcopy(job.baseline)
    train(full, job.own, job.seed, "full fine-tuning", FULL_LR)
    trained = count_trained(full)
    yield job.score("full fine-tuning", evaluate(full, job.test.images), trained)
    for name, layer in linear_layers(full).items():
        weight = cut.get_submodule(name).weight.data  # a view of it
        for method, matrix in zip(MATRICES, (weight, layer.weight.data - weight)):
            # the nearest matrix of rank r is U[:, :r] S[:r] V[:, :r].T (Eckart and Young 1936)
            U, S, V = torch.svd_lowrank(matrix, q=min(32, *matrix.shape), niter=4)
            total = matrix.square().sum()
            shares = [(S[:rank].square().sum() / total).item() for rank in RANKS]
            yield {"method": method, "layer": name, "shares": shares}
        weight += S[0] * U[:, :1] @ V[:, :1].T  # U, S and V are of the change, which came last
    yield job.score("full fine-tuning, cut to rank 1", evaluate(cut, job.test.images), trained)


def print_rank(rows, job):
    say("\n2. Why is low rank enough?")
    print_table(rows, ["LoRA", "full fine-tuning", "full fine-tuning, cut to rank 1"], SCORES)
    weights, change = (values(rows, method, "shares")[:, 0].mean() for method in MATRICES)
    say(f"Rank 1 holds {change:.0%} of the change, {weights:.0%} of the weights (mean of layers).")


def draw_low_rank(figure, rows, job):
    """An image cut to several ranks; below, how much these hold of fine-tuning's change."""
    figure.suptitle("What a low rank holds: of an image (784 numbers), and of the weights")
    top, bottom = figure.subfigures(2, height_ratios=[1, 2])
    U, S, V = torch.linalg.svd(job.own.images[0].cpu() * STD + MEAN)
    images = [U[:, :rank] * S[:rank] @ V[:rank] for rank in RANKS]
    words = [f"rank {rank}\n{56 * rank} numbers" for rank in RANKS]
    show_images(top.subplots(1, len(RANKS)), torch.stack(images), words)
    axes = bottom.subplots()
    for method in MATRICES:
        axes.plot(RANKS, values(rows, method, "shares").mean(0), "o-", label=method)
    axes.set(xlabel="rank", xticks=RANKS, ylabel="share of squared norm,\nmean of layers", ylim=0)
    axes.legend()


# --- Question 3: what is LoRA for? One more task for a frozen network -----------------------------

SHUFFLE = torch.randperm(784, generator=torch.Generator().manual_seed(0))
TASKS = {  # functions of images (n, 28, 28)
    "rotated": lambda x: rotate(x, 30, InterpolationMode.BILINEAR, fill=-MEAN / STD),
    "mirrored": lambda x: x.flip(2),
    "shuffled": lambda x: x.flatten(1)[:, SHUFFLE].view_as(x),
}
IMAGES = 100  # of each task, to learn it from
ADAPTERS = {f"adapter, rank {rank}": rank for rank in (1, 4, 16)}


def ways(baseline):
    """The ways to learn a task: a name, the network to train, its rate, and its steps.

    The rates were chosen on validation images.
    """
    yield "baseline", deepcopy(baseline).requires_grad_(False), 0, 0
    for name, rank in ADAPTERS.items():
        adapter = attach_lora(deepcopy(baseline), rank, alpha=rank)
        yield name, adapter, 1e-2, 40
        hidden = count_trained(adapter) // 795  # a hidden unit has 784 + 1 + 10 numbers
        new = nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10))
        yield f"new small network, as rank {rank}", new.to(next(baseline.parameters())), 2e-3, 200
    last = deepcopy(baseline).requires_grad_(False)
    list(linear_layers(last).values())[-1].requires_grad_()
    yield "last layer alone", last, 1e-2, 40
    yield "copy of the network", deepcopy(baseline), 1e-3, 40


def measure_tasks(job):
    """The accuracy on each task of what is learned from a few of its images, and its size."""
    images, labels = job.test.some(slice(None, None, 4))
    for task, change in TASKS.items():
        torch.manual_seed(job.seed)
        few = job.train.some(torch.randperm(len(job.chosen))[:IMAGES])
        few, seen = Split(change(few.images), few.labels), change(images)
        for method, model, lr, steps in ways(job.baseline):
            if steps:
                # a step is an epoch, since it takes all images
                train(model, few, job.seed, f"{task}: {method}", lr, steps, batch=IMAGES)
            yield {
                "method": method,
                "task": task,
                "accuracy": accuracy(evaluate(model, seen), labels),
                "trained": count_trained(model),
            }


def print_tasks(rows, job):
    say(f"\n3. What is LoRA for? One more task, from {IMAGES} images (accuracy on 2,500)")
    columns = {task: ["accuracy", task] for task in TASKS}
    columns["trained"] = ["trained", min(TASKS)]  # the same for each task
    print_table(rows, dict.fromkeys(x["method"] for x in rows if "task" in x), columns)
    say("Switched off, an adapter leaves the network as it was: the tasks can share it.")


def draw_tasks(figure, rows, job):
    """Five images of each task; below, accuracy by how many numbers are stored for the task."""
    parts = figure.subfigures(1, len(TASKS), squeeze=False)[0]
    for part, (task, change) in zip(parts, TASKS.items()):
        top, axes = part.subplots(2, height_ratios=[1, 5])
        strip = torch.cat([*change(job.test.images[:5])], 1)  # side by side
        show_images([top], strip[None], [task])
        axes.set(xlabel="numbers stored", xscale="log", ylim=(0, 100))
        axes.axhline(
            values(rows, "baseline", "accuracy", task).mean(), color="0.6", label="baseline"
        )
        curves = {
            "adapters of rank 1, 4, 16; whole copy": [*ADAPTERS, "copy of the network"],
            "new small networks": [f"new small network, as rank {x}" for x in ADAPTERS.values()],
            "last layer alone": ["last layer alone"],
        }
        for label, methods in curves.items():
            draw_curve(axes, rows, methods, "trained", "accuracy", task, label=label)
    figure.legend(
        handles=axes.get_lines(),
        title=f"Accuracy (%) on one more task, learned from {IMAGES} images",
        loc="outside upper center",
        ncols=2,
    )


# --- Files and command line -----------------------------------------------------------------------

PARTS = [  # a name, what measures, what prints, and what draws
    ("main", measure_main_job, print_main_job, draw_error_counts, draw_examples, draw_learned),
    ("cost", measure_cost, print_cost, draw_trade_off),
    ("rank", measure_rank, print_rank, draw_low_rank),
    ("tasks", measure_tasks, print_tasks, draw_tasks),
]


PARSER = argparse.ArgumentParser(
    usage=argparse.SUPPRESS,
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
PARSER.add_argument("--digit", type=int, choices=range(10), default=9, help="what LoRA learns")
for option, default, text in (
    ("rank", 1, "rank of LoRA"),
    ("alpha", 1.0, "LoRA is scaled by alpha / rank"),
    ("lora-epochs", 1, "passes of LoRA over the images of the digit"),
    ("lora-lr", 1.5e-3, "learning rate of LoRA, which falls to 0"),
    ("seed", 0, "seed of all that is random"),
    ("seeds", 1, "repeat for so many seeds, from --seed up"),
    ("device", "cpu", "cpu, cuda or mps"),
    ("data-dir", Path(__file__).resolve().parent / "data", "folder with MNIST/raw"),
    ("output-dir", Path("outputs"), "folder for pictures, metrics and weights"),
):
    PARSER.add_argument(f"--{option}", type=type(default), default=default, help=text)
PARSER.add_argument("--main-job-only", action="store_true", help="leave out the questions")


@contextmanager
def new_files(folder):
    """A folder for files, which take their places in `folder` once all of them are written."""
    try:
        (folder / "adapter").mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder / "adapter").close()  # or it cannot be written
        with tempfile.TemporaryDirectory(dir=folder) as new:
            yield Path(new)
            for path in Path(new).rglob("*.*"):
                path.replace(folder / path.relative_to(new))
    except OSError as error:
        PARSER.error(f"--output-dir {folder}: {error.strerror}; give another folder")


def save(folder, rows, job):
    """metrics.json, the baseline, and LoRA in the format of Hugging Face PEFT."""
    settings, loras = job.settings, lora_layers(job.lora)
    metrics = {
        "config": vars(settings),
        "environment": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "bfloat16": BFLOAT16 and settings.device == "cpu",
        },
        "rows": rows,
    }
    adapter = {
        "peft_type": "LORA",
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "target_modules": list(loras),
    }
    state = {}
    for name, lora in loras.items():
        for matrix, tensor in lora.named_parameters():
            state[f"base_model.model.{name}.{matrix}.weight"] = tensor.detach()
    with new_files(folder) as new:
        (new / "adapter").mkdir()
        (new / "metrics.json").write_text(json.dumps(metrics).replace('{"seed"', '\n{"seed"'))
        (new / "adapter" / "adapter_config.json").write_text(json.dumps(adapter, indent=1) + "\n")
        files = {"baseline.pt": job.baseline.state_dict(), "adapter/adapter_model.bin": state}
        for name, tensors in files.items():
            with (new / name).open("wb") as file:
                torch.save({key: tensor.cpu() for key, tensor in tensors.items()}, file)
        foreign = folder / "adapter" / "adapter_model.safetensors"  # PEFT reads it before ours
        if foreign.exists():
            foreign.rename(f"{foreign}.old")


def draw_all(folder, parts, rows, job, note):
    """Save the pictures of `parts`; another run's do not stay beside this one's numbers."""
    with (
        matplotlib.style.context({"font.size": 12, "axes.ymargin": 0.1}, after_reset=True),
        new_files(folder) as new,
    ):
        for part in PARTS:
            for draw in part[3:]:
                path = new / f"{draw.__name__.removeprefix('draw_')}.png"
                figure = Figure(figsize=(8, 4.5), layout="constrained")
                figure.supxlabel(note, fontsize="small")
                if part in parts:
                    draw(figure, rows, job)
                if figure.axes:
                    figure.savefig(path, dpi=120)
                else:
                    (folder / path.name).unlink(missing_ok=True)


def run(settings):
    """Measure each seed, save what was found, print it, and draw it."""
    torch.set_flush_denormal(True)  # such are Adam's moments of dead units, and slow on some CPUs
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it CUDA refuses
    torch.use_deterministic_algorithms(True)
    # Deterministic mode fills new memory, which costs a twentieth of a run; we read none of it.
    torch.utils.deterministic.fill_uninitialized_memory = False
    folder, data = vars(settings).pop("output_dir"), vars(settings).pop("data_dir")
    try:  # `given` is what to name if the line after it fails
        given = f"--output-dir {folder}"
        folder = folder.expanduser()
        given = f"--seed {settings.seed}"
        torch.manual_seed(settings.seed + settings.seeds)  # is it small enough?
        given = f"--device {settings.device}"
        torch.zeros(1, device=settings.device).item()
        given = f"--data-dir {data}"
        splits = load_mnist(data.expanduser(), settings.device)
    except Exception as error:  # noqa: BLE001 (of torch, torchvision or the system)
        reason = str(error).partition("\n")[0]
        PARSER.error(f"{given} will not do: {reason}")
    with new_files(folder):
        pass  # if it cannot be written, this says so before training

    parts = PARTS[:1] if settings.main_job_only else PARTS
    rows, first = [], None
    for seed in range(settings.seed, settings.seed + settings.seeds):
        say(f"seed {seed}, digit {settings.digit}, rank {settings.rank}, alpha {settings.alpha:g}")
        job = main_job(settings, seed, splits)
        for name, measure, *_ in parts:
            rows += [{"seed": seed, "question": name, **row} for row in measure(job)]
        first = first or job
        gc.collect()  # models with LoRA are cycles, and those of many seeds would pile up
    save(folder, rows, first)

    note = f"seeds: {settings.seeds}, images: seed {settings.seed}"
    say(f"\nFound on the test images, as means (±deviations; {note}):")
    for _, _, show, *_ in parts:
        show(rows, first)
    draw_all(folder, parts, rows, first, note)
    say(f"in {folder}: metrics.json, pictures, baseline.pt, adapter/")


def main(arguments=None):
    """Run the command line; in a notebook, pass a list of arguments, which may be empty."""
    settings = PARSER.parse_args(arguments)
    for option in ("rank", "alpha", "lora_epochs", "lora_lr", "seeds"):
        value = vars(settings)[option]
        if not 0 < value <= 1000:
            PARSER.error(f"--{option.replace('_', '-')} {value}: give more than 0, at most 1000")
    try:
        run(settings)
    except KeyboardInterrupt:
        print("main.py: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    gc.freeze()  # so that no collection, at exit either, looks through all that was imported
    main()
