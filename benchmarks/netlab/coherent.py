"""Where tokens that move pay: `coherent` against `alltoall` on two top-1 models, in the laboratory.

    sudo python -m benchmarks.netlab.coherent --folder /tmp/coherent

Under `alltoall` every token's hidden state crosses there and back, under `coherent` only there, and
after each pass its keys and values go to everybody. So keys and values decide: `narrow`, random
weights, has 32 elements of them per token and layer beside hidden states of 512 (DeepSeek-V3: 576
beside 7,168); `shipped`, the trained model of examples/ with one expert per token instead of four,
has 128 beside 128. Each is traced, solved for, calibrated on and measured on 2 nodes x 2 ranks;
plans are fitted to other requests than those that run. What a step has written is not made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODELS = ("narrow", "shipped")
MOST_REQUESTS = 96
LINE = "{:<11} {:<20} {:>9} {:>8} {:>7} {:>9} {:>13} {:>9} {:>6}"


def main() -> None:
    """Make what is missing, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for all that is made")
    parser.add_argument("--mbit", type=float, default=30.0, help="rate of a node's link")
    parser.add_argument("--new-tokens", type=int, default=24, help="of each request")
    parser.add_argument("--repeats", type=int, default=3, help="of the bench and of probes")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    write_prompts(asked.folder)
    print(LINE.format("model", "placement", "dispatch", "tokens/s", "faster", "predicted",
                      "decode faster", "predicted", "exact"))  # fmt: skip
    for model in MODELS:
        document = json.loads(bench(model, asked).read_text(encoding="utf-8"))
        for line in lines(model, document):
            print(line)


def write_prompts(folder: Path) -> None:
    """The first words of prompts: those that plans are fitted to, and those that are run."""
    fit: list[str] = []
    held: list[str] = []
    for path in sorted((EXAMPLES / "prompts").glob("*.jsonl")):
        texts = [json.loads(line)["prompt"] for line in path.read_text("utf-8").splitlines()]
        half = len(texts) // 2
        fit += [" ".join(text.split()[:5]) for text in texts[:half]]
        held += [" ".join(text.split()[:2]) for text in texts[half : half + 14]]
    for name, prompts in (("fit", fit), ("held", held[:MOST_REQUESTS])):
        rows = [json.dumps({"prompt": prompt}) for prompt in prompts]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def bench(model: str, asked: argparse.Namespace) -> Path:
    """The bench's document; makes model, trace, plan and cluster first."""
    folder: Path = asked.folder
    checkpoint, trace = folder / model, folder / f"{model}-trace"
    plan, cluster = folder / f"{model}.json", folder / f"{model}.toml"
    document = folder / f"{model}-bench.json"
    if not checkpoint.exists():
        if model == "narrow":
            make_random(checkpoint, head_size=16)
        else:
            make_shipped(checkpoint)
    if not trace.exists():
        run("trace", checkpoint, "--prompts", folder / "fit.jsonl", "--max-new-tokens", 32,
            "--batch-size", 70, "--dtype", "float32", "-o", trace)  # fmt: skip
    if not plan.exists():
        run("solve", trace, "--gpus", 4, "--nodes", 2, "--dispatch", "coherent",
            "--max-imbalance", "none", "-o", plan)  # fmt: skip
    lab = ["--mbit", asked.mbit, "--time-limit", 550]
    if not cluster.exists():
        run("calibrate", "--gpus", 4, "--nodes", 2, "--model", checkpoint, "--dtype", "float32",
            "--repeats", asked.repeats, "-o", cluster, lab=lab)  # fmt: skip
    if not document.exists():
        made = run("bench", plan, "--model", checkpoint, "--dtype", "float32",
                   "--prompts", folder / "held.jsonl", "--baseline", "contiguous",
                   "--dispatch", "coherent", "--dispatch", "alltoall", "--cluster", cluster,
                   "--max-new-tokens", asked.new_tokens, "--batch-size", MOST_REQUESTS,
                   "--repeats", asked.repeats, "--json", lab=lab)  # fmt: skip
        document.write_text(made, encoding="utf-8")
    return document


def make_random(folder: Path, *, head_size: int, key_heads: int = 1, num_layers: int = 8) -> None:
    """A model with random weights and one expert per token, with few keys and values or many."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=2048, hidden_size=512, num_hidden_layers=num_layers, num_experts=16,
        num_experts_per_tok=1, moe_intermediate_size=64, intermediate_size=128,
        num_attention_heads=8, num_key_value_heads=key_heads, head_dim=head_size,
        initializer_range=0.05, bos_token_id=0, eos_token_id=0, pad_token_id=1,
        tie_word_embeddings=True, max_position_embeddings=1024, norm_topk_prob=False,
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLES / "model" / name, folder / name)


def make_shipped(folder: Path) -> None:
    """The shipped model, told to take one expert per token."""
    shutil.copytree(EXAMPLES / "model", folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "num_experts_per_tok": 1}), encoding="utf-8")


def run(*arguments: object, lab: list[object] | None = None) -> str:
    """What a command of placer prints; in the laboratory with the options `lab`."""
    command = [sys.executable, "-m", "placer", *map(str, arguments)]
    if lab is not None:
        command = [sys.executable, "-m", "benchmarks.netlab", *map(str, lab), "--", *command]
    print("+", " ".join(command), file=sys.stderr)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def lines(model: str, document: dict[str, Any]) -> list[str]:
    """A row of the table for each placement and way."""
    found = []
    for name, arm in document["arms"].items():
        row = [model, name, arm["dispatch"], f"{arm['measured']['tokens_per_second']:.1f}"]
        factor = arm.get("plan_against_it")
        for one in (factor, factor and factor["by_phase"]["decode"]):
            row += (
                ["", ""] if one is None else [f"{one['measured']:.3f}", f"{one['predicted']:.3f}"]
            )
        found.append(LINE.format(*row, "yes" if all(arm["exact"].values()) else "NO"))
    return found


if __name__ == "__main__":
    main()
