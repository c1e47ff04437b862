"""Each question can be cut out of the script; and LoRA can be put on the last layer alone."""

import ast
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import SCRIPT, first_images, named
from matplotlib.figure import Figure

import main

OWN_ROWS = {  # some of what a question alone measures, and its picture
    1: ({"lora_balanced", "logit_bias", "lora_replay", "constant_part"}, "trade_off.png"),
    2: ({"full_rank1", "full_part_rank4", "lora_rank1", "lora_rank16"}, "low_rank.png"),
    3: ({"biases", "full_matched", "full_at_0.6", "lora_rank8_at_0.6"}, "new_data.png"),
}


def run(source: str, folder: Path, data: main.Data, patch: pytest.MonkeyPatch) -> list[Any]:
    """The rows of an edited script, on a few hundred images; pictures are empty files."""
    edited = ModuleType("edited")
    edited.__file__ = str(SCRIPT)
    patch.setitem(sys.modules, "edited", edited)  # where dataclasses look
    patch.setattr(Figure, "savefig", lambda *_, **__: None)
    exec(compile(source, "edited.py", "exec", dont_inherit=True), edited.__dict__)  # noqa: S102
    splits = [edited.Split(**vars(split)) for split in data]
    edited.load_mnist = lambda folder, device: edited.Data(*splits)
    arguments = ["--output-dir", str(folder), "--rank", "2", "--lora-lr", "0.01"]
    assert edited.main(arguments) == 0
    return json.loads((folder / "metrics.json").read_text())["rows"]


def without(question: int) -> str:
    """The script without a question's chapter, and without the statements that call it."""
    source = SCRIPT.read_text()
    (chapter,) = re.findall(rf"\n# --- Question {question}: .*?(?=\n# --- )", source, re.DOTALL)
    own = set(re.findall(r"^(?:def )?(\w+)(?: =|\()", chapter, re.MULTILINE))
    source = source.replace(chapter, "")
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        statement = isinstance(node, ast.Expr | ast.Assign | ast.AugAssign)
        if statement and own & {getattr(x, "id", "") for x in ast.walk(node)}:
            for i in range(node.lineno - 1, node.end_lineno):
                lines[i] = ""
    return "\n".join(lines)


def test_each_question_can_be_deleted_alone(
    mnist: main.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = first_images(mnist, 300, 100, 160)
    whole = run(SCRIPT.read_text(), tmp_path / "whole", data, monkeypatch)
    pictures = {path.name for path in (tmp_path / "whole").glob("*.png")}
    for question, (own, picture) in OWN_ROWS.items():
        folder = tmp_path / str(question)
        rows = run(without(question), folder, data, monkeypatch)
        assert {row["method"] for row in whole} - {row["method"] for row in rows} >= own
        assert rows == [row for row in whole if row in rows]  # the same to the bit
        assert {path.name for path in folder.glob("*.png")} == pictures - {picture}


def test_lora_on_the_last_layer_alone_in_the_whole_script(
    mnist: main.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = "attach_lora(deepcopy(baseline), settings.rank, settings.alpha)"
    source = SCRIPT.read_text()
    assert source.count(call) == 1
    edited = source.replace(call, f'{call[:-1]}, ["linear3"])')
    rows = run(edited, tmp_path, first_images(mnist, 300, 100, 160), monkeypatch)
    assert named(rows, "digit/lora")["trainable_parameters"] == 2 * (10 + 2000)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["linear3"]
    state = torch.load(tmp_path / "adapter" / "adapter_model.bin")
    assert {name.split(".")[2] for name in state} == {"linear3"}
    assert not (tmp_path / "learned.png").exists()  # whose lora_A would be no image
    # what is cut to rank 1 is a change of all layers, with LoRA on one of them or on all
    assert named(rows, "digit/full_rank1")["errors"] != named(rows, "digit/baseline")["errors"]
