"""Try the grids that main.py's constants were chosen from: `python tests/choose_rates.py`.

Run by hand: it takes some ten minutes and writes results/rates.json, a row for each seed, method
and setting tried. All but the rows of the task "draws" are scores on the 5,000 validation images.
results/README.md states the rules; tests/test_readme.py holds them to the file.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import main

SEEDS = range(5)
DIGIT = {
    "lora": [1e-3, 1.2e-3, 1.3e-3, 1.4e-3, 1.5e-3, 1.6e-3],
    "full": [2e-5, 3e-5, 4e-5, 5e-5, 6e-5, 7e-5],
}
OTHERS = [1, 3, 9]
NEW_DATA = {
    "biases": [0.1, 0.3, 1.0, 3.0],
    "lora_rank1": [1e-2, 2e-2, 3e-2, 4e-2, 6e-2],
    "lora_rank2": [1e-2, 1.5e-2, 2e-2, 3e-2, 4e-2],
    "lora_rank4": [1e-2, 1.5e-2, 2e-2, 3e-2],
    "lora_rank8": [5e-3, 1e-2, 1.5e-2, 2e-2, 3e-2],
    "lora_rank16": [5e-3, 7e-3, 1e-2, 1.5e-2, 2e-2],
    "full": [5e-4, 6e-4, 7e-4, 8e-4, 1e-3, 1.5e-3, 2e-3, 3e-3],
}


def likeness(job: main.Job) -> float:
    """How far what training added to lora_A of the first layer looks like the mean image."""
    start, lora = (
        main.lora_layers(model)["linear1"].lora_A[0].data for model in (job.start, job.lora)
    )
    image = main.only(job.data.train, job.digit).images.mean(0)
    return float(torch.corrcoef(torch.stack([lora - start, image]))[0, 1].abs())


def rank1_share(matrix: torch.Tensor) -> float:
    """The share of a matrix, in squares, that its nearest matrix of rank 1 holds."""
    return float(torch.linalg.matrix_norm(matrix, 2) / matrix.norm()) ** 2


def try_all(seed: int, data: main.Data) -> list[dict[str, Any]]:
    """All rows of one seed, from the functions of main.py with validation in place of test."""
    settings = main.Settings()
    chosen_on = replace(data, test=data.validation)
    job = main.main_job(settings, seed, chosen_on)
    rows = [job.rows[0]]
    images = main.only(data.train, job.digit)

    def add(method: str, model: main.Model, **more: Any) -> None:
        logits = main.evaluate(model, data.validation)
        rows.append(main.score(f"digit/{method}", logits, data.validation, job.digit, **more))

    for lr in DIGIT["lora"]:
        lora = copy.deepcopy(job.start)
        main.train(lora, images, seed, "LoRA", lr=lr)
        add("lora", lora, lr=lr)
    for lr in DIGIT["full"]:
        full = copy.deepcopy(job.baseline)
        main.train(full, images, seed, "full", lr=lr)
        add("full", full, lr=lr)
        if lr == main.FULL_LR:
            layers = [(main.weight(job.baseline, x), main.weight(full, x)) for x in main.LAYERS]
            rows[-1]["change_in_rank1"] = [rank1_share(after - before) for before, after in layers]
            rows[-1]["weights_in_rank1"] = [rank1_share(before) for before, _ in layers]
    for others in OTHERS:
        main.OTHERS = others
        torch.manual_seed(seed)
        lora = main.attach_lora(copy.deepcopy(job.baseline), settings.rank, settings.alpha)
        mixed = main.add_other_digits(data.train, job.digit, seed)
        batch = 128 * (1 + others)
        main.train(lora, mixed, seed, "LoRA + other digits", settings.lora_lr, batch=batch)
        add("lora_replay", lora, others=others)

    turned = main.turn(data.validation, settings.angle)
    few = main.turn(data.train.take(slice(5000)), settings.angle)
    new = main.NewData(few, turned, job.lora, job.baseline, [])
    for method, grid in NEW_DATA.items():
        for lr in grid:
            model = copy.deepcopy(job.baseline)
            if method == "biases":
                model.requires_grad_(False).get_parameter("linear3.bias").requires_grad_()
            elif method != "full":
                model = main.new_lora(job, int(method.removeprefix("lora_rank")))
            main.NEW_DATA_LR[method] = lr
            cost = main.train_turned(job, new, method, model)
            logits, upright = (main.evaluate(model, x) for x in (turned, data.validation))
            more = {"accuracy_upright": main.accuracy(upright, data.validation), "lr": lr} | cost
            rows.append(main.score(f"new_data/{method}", logits, turned, job.digit, **more))

    # What is left to chance: LoRA of one baseline, from several draws of lora_A, on test images.
    for draw in range(5):
        torch.manual_seed(1000 + draw)
        lora = main.attach_lora(copy.deepcopy(job.baseline), settings.rank, settings.alpha)
        main.train(lora, images, seed, "LoRA, another draw", lr=settings.lora_lr)
        logits = main.evaluate(lora, data.test)
        rows.append(main.score("draws/lora", logits, data.test, job.digit, draw=draw))
    rows.append({"task": "draws", "method": "lora_A", "likeness": likeness(job)})
    return [{"seed": seed, **found} for found in rows]


def write() -> None:
    main.make_repeatable()
    data = main.load_mnist(main.Settings().data_dir, torch.device("cpu"))
    others = main.OTHERS
    rows = []
    for seed in SEEDS:
        rows += try_all(seed, data)
        print(f"seed {seed}: {len(rows)} rows")
    main.OTHERS = others
    lines = ",\n".join(json.dumps(row) for row in rows)
    place = Path(__file__).resolve().parent.parent / "results" / "rates.json"
    place.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    write()
