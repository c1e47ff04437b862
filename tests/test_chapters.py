"""Each question can be cut out of the script; the rest runs, and every other row is the same.

Also the first edit that a student tries: LoRA on the last layer alone.
"""

from __future__ import annotations

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

import main


def run(source: str, folder: Path, mnist: main.Data, monkeypatch: Any) -> list[dict[str, Any]]:
    """The rows of an edited script, on a few hundred images."""
    edited = ModuleType("edited")
    edited.__file__ = str(SCRIPT)
    monkeypatch.setitem(sys.modules, "edited", edited)  # where dataclasses look
    exec(compile(source, "edited.py", "exec", dont_inherit=True), edited.__dict__)  # noqa: S102
    data = first_images(mnist, 600, 150, 240)
    splits = [edited.Split(**vars(x)) for x in (data.train, data.validation, data.test)]
    edited.load_mnist = lambda folder, device: edited.Data(*splits)
    arguments = ["--output-dir", str(folder), "--rank", "2", "--lora-lr", "0.01"]
    assert edited.main(arguments) == 0
    return json.loads((folder / "metrics.json").read_text())["rows"]


def without(question: int) -> str:
    """The script without a question's chapter and the lines, or blocks, that call it."""
    source = SCRIPT.read_text()
    (chapter,) = re.findall(rf"\n# --- Question {question}: .*?(?=\n# --- )", source, re.DOTALL)
    names = set(re.findall(r"^def (\w+)|^([A-Z_]+) =|^class (\w+)", chapter, re.MULTILINE))
    own = {name for groups in names for name in groups if name}
    source = source.replace(chapter, "")
    lines = source.splitlines()
    for node in sorted(ast.walk(ast.parse(source)), key=lambda x: -getattr(x, "lineno", 0)):
        whole = isinstance(node, ast.With) and "timed" in ast.unparse(node.items[0])
        line = isinstance(node, ast.Expr | ast.Assign | ast.AugAssign)
        if (whole or line) and own & {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}:
            if not whole and "figures" in ast.unparse(node):
                continue  # a dictionary, of which a line goes
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    kept = [line for line in lines if not own & set(re.findall(r"\w+", line.partition("#")[0]))]
    return "\n".join(kept)


def test_each_question_can_be_deleted_alone(
    mnist: main.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(SCRIPT.read_text(), tmp_path / "whole", mnist, monkeypatch)
    pictures = {path.name for path in (tmp_path / "whole").glob("*.png")}
    for question, picture, own in (
        (1, "trade_off.png", {"lora_balanced", "logit_bias", "lora_replay", "constant_part"}),
        (2, "low_rank.png", {"full_rank1", "full_part_rank4", "lora_rank1", "lora_rank16"}),
        (3, "new_data.png", {"biases", "full_matched", "full_at_0.6", "lora_rank8_at_0.6"}),
    ):
        folder = tmp_path / f"without {question}"
        rows = run(without(question), folder, mnist, monkeypatch)
        assert {row["method"] for row in whole} - {row["method"] for row in rows} >= own
        assert rows == [row for row in whole if row in rows]  # the same to the bit
        assert {path.name for path in folder.glob("*.png")} == pictures - {picture}


def test_lora_on_the_last_layer_alone_in_the_whole_script(
    mnist: main.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = "attach_lora(copy.deepcopy(baseline), settings.rank, settings.alpha)"
    source = SCRIPT.read_text()
    assert source.count(call) == 1
    edited = source.replace(call, f'{call[:-1]}, ["linear3"])')
    rows = run(edited, tmp_path, mnist, monkeypatch)
    assert named(rows, "digit/lora")["trainable_parameters"] == 2 * (10 + 2000)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["linear3"]
    state = torch.load(tmp_path / "adapter" / "adapter_model.bin")
    assert {name.split(".")[2] for name in state} == {"linear3"}
    assert not (tmp_path / "learned.png").exists()  # whose lora_A would be no image
    # what is cut to rank 1 is a change of all layers, with LoRA on one of them or on all
    assert named(rows, "digit/full_rank1")["errors"] != named(rows, "digit/baseline")["errors"]
