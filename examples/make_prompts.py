"""Writes examples/prompts: short passages of held-out documents, one JSON Lines file per workload.

    python examples/make_prompts.py --tokenizer examples/model --output examples/prompts

Each line is ``{"prompt": text, "label": workload}``. Only documents whose licence is plain from
where they lie are quoted (`QUOTABLE`), and no passage with an e-mail address or a licence notice.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

from corpus import Document, add_arguments, collect
from transformers import AutoTokenizer, PreTrainedTokenizerBase

MIN_TOKENS, MAX_TOKENS = 60, 200
PASSAGES_PER_DOCUMENT = 8

# Paths of documents that may be quoted; prompts/README.md names their licences.
QUOTABLE = {
    "python": r"",
    "c": r"usr/include/(llvm-|linux/|asm-generic/|c\+\+/|python3|x86_64-linux-gnu/)",
    "perl": r"usr/((share|lib/[^/]+)/perl(-base)?/|share/perl5/(Debconf|Debian|Dpkg|Git))",
    "english": r"usr/share/perl/|.*/man\d/(perl|git|systemd|[^/]*\.3perl)",
    "german": r"",
    "french": r"",
    "spanish": r"",
}


def passages(
    document: Document, tokenizer: PreTrainedTokenizerBase, generator: random.Random
) -> list[str]:
    """Passages of MIN_TOKENS to MAX_TOKENS tokens that begin at a line of the document."""
    starts = [m.end() for m in re.finditer(r"^|\n+", document.text)]
    generator.shuffle(starts)
    found: list[tuple[int, str]] = []
    for start in starts:
        window = document.text[start : start + 8 * MAX_TOKENS]
        length = generator.randint(MIN_TOKENS, MAX_TOKENS)
        ids = tokenizer(window, truncation=True, max_length=length).input_ids
        text = tokenizer.decode(ids).rstrip()
        overlaps = any(abs(start - other) < 8 * MAX_TOKENS for other, _ in found)
        if len(ids) == length and not overlaps and is_quotable(text):
            found.append((start, text))
        if len(found) == PASSAGES_PER_DOCUMENT:
            break
    return [text for _, text in found]


def is_quotable(text: str) -> bool:
    """Whether the text is whole characters, mostly letters, without addresses and licences."""
    letters = sum(c.isalpha() or c.isspace() for c in text)
    unwanted = re.search(r"\ufffd|\S@\S+\.\w|copyright|licen[cs]|lizenz|warrant", text, re.I)
    return unwanted is None and letters > 0.7 * len(text)


def choose(
    documents: list[Document],
    pattern: str,
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    generator: random.Random,
) -> tuple[list[str], list[str]]:
    """At most `count` passages, taken from the held-out documents in turn, and the paths used."""
    heldout = [d for d in documents if d.heldout and re.match(pattern, d.path)]
    by_document = [(d.path, passages(d, tokenizer, generator)) for d in heldout]
    rounds = [
        (path, texts[turn])
        for turn in range(PASSAGES_PER_DOCUMENT)
        for path, texts in by_document
        if turn < len(texts)
    ][:count]
    return [text for _, text in rounds], sorted({path for path, _ in rounds})


def main() -> None:
    """Write the prompt files, and print the documents that each quotes."""
    parser = argparse.ArgumentParser(description="Write prompts from held-out documents.")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the model")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=80, help="prompts per workload at most")
    parser.add_argument("--seed", type=int, default=0)
    add_arguments(parser)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for workload, documents in collect(arguments.root, arguments.max_megabytes).items():
        generator = random.Random(arguments.seed)
        prompts, paths = choose(
            documents, QUOTABLE[workload], arguments.count, tokenizer, generator
        )
        lines = [json.dumps({"prompt": p, "label": workload}, ensure_ascii=False) for p in prompts]
        (arguments.output / f"{workload}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{workload}: {len(prompts)} prompts from {len(paths)} documents")
        for path in paths:
            print(f"  {path}")


if __name__ == "__main__":
    main()
