"""Trains the small Mixture-of-Experts language model in examples/model on this machine's text.

The model is a stock Qwen3-MoE (8 layers x 32 experts, 4 per token) with a byte-level BPE tokenizer
of its own. One core trains it in about an hour:

    python examples/train_model.py --work /tmp/train --minutes 70
    python examples/train_model.py --work /tmp/train --export examples/model

The first command collects text (see corpus.py), trains, evaluates on held-out documents, and keeps
a checkpoint in --work; started again, it goes on from there, and Ctrl-C keeps what was reached. The
second writes the checkpoint in --work as a model that AutoModelForCausalLM and AutoTokenizer load.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from corpus import add_arguments, collect
from fast_experts import use_fast_experts, use_stock_experts
from numpy.typing import NDArray
from routing_statistics import RoutingStatistics, routing_statistics
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCABULARY = 2048
END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
SEQUENCE = 256
BATCH = 16
EVALUATION_WINDOWS = 24
WARMUP_STEPS = 200
DECAY_SHARE = 0.35

Corpus = dict[str, NDArray[np.uint16]]


def model_config() -> Qwen3MoeConfig:
    """The architecture: 5.4 million parameters, of which 1.3 million work on a token."""
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        moe_intermediate_size=48,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        initializer_range=0.05,
        router_aux_loss_coef=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer with ids 0 for the end of a text and 1 for padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def prepare(work: Path, roots: list[Path], max_megabytes: float) -> None:
    """Collect text, train the tokenizer and write the tokens of each workload below `work`.

    train.npz and heldout.npz hold one array of token ids per workload, documents ended by id 0.
    """
    workloads = collect(roots, max_megabytes)
    sample = [d.text[:3000] for docs in workloads.values() for d in docs[:800] if not d.heldout]
    tokenizer = train_tokenizer(sample)
    tokenizer.save(str(work / "tokenizer.json"))
    for part, heldout in (("train", False), ("heldout", True)):
        tokens: Corpus = {}
        for workload, documents in workloads.items():
            chosen = [d.text for d in documents if d.heldout == heldout]
            ids = [[*e.ids, 0] for e in tokenizer.encode_batch(chosen)]
            tokens[workload] = np.concatenate([np.array(i, np.uint16) for i in ids])
            size = len(tokens[workload])
            print(f"{part:8} {workload:8} {len(chosen):5} documents {size:9} tokens")
        np.savez(work / f"{part}.npz", **tokens)


def load_corpus(path: Path) -> Corpus:
    """What `prepare` wrote: token ids by workload."""
    with np.load(path) as data:
        return dict(data.items())


@dataclass
class Progress:
    """How far training is, kept in the checkpoint."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    log: list[dict[str, object]] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """Mean held-out loss by workload in nats per token, and the routing of the same tokens."""

    loss: dict[str, float]
    routing: RoutingStatistics


def sample_batch(corpus: Corpus, generator: np.random.Generator) -> torch.Tensor:
    """[BATCH, SEQUENCE + 1] token ids; workloads are drawn by the square root of their size."""
    names = sorted(corpus)
    sizes = np.sqrt([len(corpus[name]) for name in names])
    rows = []
    for name in generator.choice(names, size=BATCH, p=sizes / sizes.sum()):
        start = generator.integers(len(corpus[name]) - SEQUENCE - 1)
        rows.append(corpus[name][start : start + SEQUENCE + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def balance_loss(router_logits: tuple[torch.Tensor, ...], k: int) -> torch.Tensor:
    """E * sum over experts of (share of pairs) * (mean probability), mean over layers; 1 = even.

    `router_logits` holds [tokens, E] for each layer.
    """
    losses = []
    for logits in router_logits:
        probability = logits.float().softmax(-1)
        chosen = torch.zeros_like(probability).scatter_(1, probability.topk(k).indices, 1.0 / k)
        losses.append(logits.shape[1] * (chosen.mean(0) * probability.mean(0)).sum())
    return torch.stack(losses).mean()


def training_loss(
    model: Qwen3MoeForCausalLM, batch: torch.Tensor, balance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss to minimise, and the language-model part of it, of tokens [B, S + 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        output = model.model(input_ids=batch[:, :-1], use_cache=False, output_router_logits=True)
        logits = model.lm_head(output.last_hidden_state)
    loss = cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
    k = model.config.num_experts_per_tok
    return loss + balance * balance_loss(output.router_logits, k), loss.detach()


@torch.no_grad()
def evaluate(model: Qwen3MoeForCausalLM, heldout: Corpus, max_windows: int) -> Evaluation:
    """Loss and routing on at most `max_windows` windows of each workload's held-out documents."""
    losses, experts = {}, []
    k = model.config.num_experts_per_tok
    for workload, tokens in heldout.items():
        windows = tokens[: (len(tokens) - 1) // SEQUENCE * SEQUENCE].reshape(-1, SEQUENCE)
        every = max(1, len(windows) // max_windows)
        total, count = 0.0, 0
        for batch in torch.from_numpy(windows[::every][:max_windows].astype(np.int64)).split(BATCH):
            with torch.autocast("cpu", torch.bfloat16):
                output = model(input_ids=batch, use_cache=False, output_router_logits=True)
            nats = cross_entropy(
                output.logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum"
            )
            total, count = total + nats.item(), count + batch[:, 1:].numel()
            layers = [logits.float().topk(k).indices for logits in output.router_logits]
            experts.append(torch.stack(layers, 1).numpy())
        losses[workload] = total / count
    return Evaluation(losses, routing_statistics(np.concatenate(experts), model.config.num_experts))


def check_fast_experts(model: Qwen3MoeForCausalLM) -> None:
    """Raise ValueError if the fast experts do not compute what the stock model computes."""
    batch = torch.arange(2 * SEQUENCE).view(2, SEQUENCE) % VOCABULARY
    results = []
    for select in (use_stock_experts, use_fast_experts):
        select(model)
        model.zero_grad()
        output = model(input_ids=batch, labels=batch, use_cache=False)
        output.loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((output.logits.detach(), gradients))
    model.zero_grad()
    (stock, stock_gradients), (fast, fast_gradients) = results
    if not torch.allclose(stock, fast, rtol=1e-3, atol=1e-4):
        raise ValueError(f"fast and stock logits differ by {(stock - fast).abs().max():.3g}")
    if not torch.allclose(stock_gradients, fast_gradients, rtol=1e-2, atol=1e-5):
        difference = (stock_gradients - fast_gradients).abs().max()
        raise ValueError(f"fast and stock gradients differ by {difference:.3g}")


def learning_rate(peak: float, steps: int, share: float) -> float:
    """Warm-up, a constant, and over the last DECAY_SHARE of the budget a 1 - sqrt fall to zero."""
    decay = max(0.0, (share - (1 - DECAY_SHARE)) / DECAY_SHARE)
    return peak * min(1.0, (steps + 1) / WARMUP_STEPS) * (1 - math.sqrt(min(1.0, decay)))


def make_optimizer(model: Qwen3MoeForCausalLM) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def save_checkpoint(
    path: Path,
    model: Qwen3MoeForCausalLM,
    optimizer: torch.optim.Optimizer,
    generator: np.random.Generator,
    progress: Progress,
) -> None:
    """Write everything needed to go on, to a temporary name first."""
    temporary = path.with_suffix(".tmp")
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": json.dumps(generator.bit_generator.state),
        "progress": asdict(progress),
    }
    torch.save(state, temporary)
    os.replace(temporary, path)


def train(arguments: argparse.Namespace) -> None:
    """Train until the budget is spent or Ctrl-C, evaluating and saving every few minutes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # also when started in the background
        signal.signal(number, signal.default_int_handler)
    work: Path = arguments.work
    torch.manual_seed(arguments.seed)
    generator = np.random.default_rng(arguments.seed)
    corpus, heldout = load_corpus(work / "train.npz"), load_corpus(work / "heldout.npz")
    model = Qwen3MoeForCausalLM(model_config())
    optimizer = make_optimizer(model)
    progress = Progress()
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.bit_generator.state = json.loads(state["generator"])
        progress = Progress(**state["progress"])
        print(f"going on from step {progress.steps}, {progress.tokens} tokens")
    check_fast_experts(model)
    model.set_attn_implementation("eager")  # at this size faster than the fused kernels
    loss_function = training_loss
    if arguments.compile:
        loss_function = torch.compile(training_loss, dynamic=False)

    def save() -> None:
        save_checkpoint(checkpoint, model, optimizer, generator, progress)

    budget = arguments.minutes * 60
    recent: list[float] = []
    reported = saved = time.monotonic()
    try:
        while progress.seconds < budget:
            start = time.monotonic()
            share = progress.seconds / budget
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(arguments.learning_rate, progress.steps, share)
            loss, text_loss = loss_function(
                model, sample_batch(corpus, generator), arguments.balance
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            recent.append(text_loss.item())
            now = time.monotonic()
            progress.steps += 1
            progress.tokens += BATCH * SEQUENCE
            progress.seconds += now - start
            if now - reported > 20:
                rate = len(recent) * BATCH * SEQUENCE / (now - reported)
                print(
                    f"{progress.seconds / 60:6.1f} min  step {progress.steps:6}  "
                    f"{progress.tokens / 1e6:7.2f} M tokens  {rate:6.0f} tokens/s  "
                    f"training loss {np.mean(recent):.3f}",
                    flush=True,
                )
                recent, reported = [], now
            if now - saved > arguments.save_minutes * 60:
                report(evaluate(model, heldout, EVALUATION_WINDOWS), progress)
                save()
                recent, reported, saved = [], time.monotonic(), time.monotonic()
    except KeyboardInterrupt:
        print("interrupted")
    save()
    report(evaluate(model, heldout, 10 * EVALUATION_WINDOWS), progress)
    save()


def report(evaluation: Evaluation, progress: Progress) -> None:
    """Print an evaluation and add it to the log that the checkpoint keeps."""
    losses = "  ".join(f"{name} {loss:.3f}" for name, loss in evaluation.loss.items())
    print(f"held-out loss: {losses}\nheld-out routing: {evaluation.routing.summary()}", flush=True)
    progress.log.append(
        {
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "loss": evaluation.loss,
            "routing": evaluation.routing.summary(),
        }
    )


def export(work: Path, target: Path) -> None:
    """Write the checkpoint in `work` as a stock model in bfloat16, with its tokenizer."""
    state = torch.load(work / "checkpoint.pt", weights_only=True)
    model = Qwen3MoeForCausalLM(model_config())
    model.load_state_dict(state["model"])
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(work / "tokenizer.json"),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(target)
    # Names that transformers before version 5, and engines built on it, look for.
    amend_json(target / "config.json", num_experts=model.config.num_experts)
    amend_json(target / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    (target / "model.safetensors").chmod(0o644)
    print(f"wrote {target}: {state['progress']['tokens']} tokens seen")


def amend_json(path: Path, **entries: object) -> None:
    """Set entries of a JSON object in a file."""
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Parse the command line and run what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for data and checkpoint")
    parser.add_argument("--minutes", type=float, default=70.0, help="training time in all")
    parser.add_argument("--export", type=Path, metavar="DIR", help="write the model and stop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="its peak")
    parser.add_argument(
        "--balance", type=float, default=3e-4, help="weight of the load-balancing loss"
    )
    parser.add_argument("--save-minutes", type=float, default=4.0, help="time between checkpoints")
    parser.add_argument(
        "--no-compile",
        dest="compile",
        action="store_false",
        help="do without torch.compile, which needs a C++ compiler",
    )
    add_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.export:
        export(arguments.work, arguments.export)
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not (arguments.work / "heldout.npz").exists():
        prepare(arguments.work, arguments.root, arguments.max_megabytes)
    train(arguments)


if __name__ == "__main__":
    main()
