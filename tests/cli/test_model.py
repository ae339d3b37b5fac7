"""`placer model`, and --model where a step time is modelled."""

from __future__ import annotations

import json

import pytest

from .running import run


def test_a_preset_is_shown_and_checked_against_memory():
    done = run("model", "deepseek-v3", "--cluster", "h200-nvl8", "--nodes", "4", "--json")
    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert document["format"] == "placer.model"
    assert document["num_experts"] == 256
    assert document["memory"]["slots_per_rank"] == 8
    assert document["memory"]["free_bytes"] > 0
    text = run("model", "deepseek-v3", "--cluster", "h200-nvl8", "--nodes", "4")
    assert "671.03 billion" in text.stdout
    assert "modelled, on each of 32 ranks" in text.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["deepseek-v4"], 2, "neither a model preset nor a folder"),
        (["deepseek-v3", "--cluster", "h100-nvl8"], 3, "too much"),
        (["deepseek-v3", "--cluster", "h100"], 2, "neither a cluster preset nor a TOML file"),
        (["deepseek-v3", "--cluster", "h100-nvl8", "--gpus", "9", "--nodes", "2"], 2,
         "2 nodes do not divide 9 GPUs"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_its_code(arguments, code, message):
    done = run("model", *arguments, "--json")
    assert done.exit_code == code
    assert done.stdout == ""
    assert message in done.stderr
