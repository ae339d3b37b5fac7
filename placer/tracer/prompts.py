"""Prompts that a model is traced on, read from a file.

`.txt`: a prompt on each line; empty lines are skipped. `.jsonl`: an object on each line with
`prompt` (or `text`), or with `messages` for the model's chat template; and, if wanted, `label` (the
prompt's domain or workload) and `request` (its request id; the number of the prompt by default).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from placer.errors import BadFileError, PlacerError, UsageError
from placer.files import nothing_at


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: the text; None for a chat.
        label: domain or workload.
        request: its request id; None to number prompts in their order.
        messages: the turns of a chat, dictionaries with `role` and `content`; None for a text.
    """

    text: str | None
    label: str | None = None
    request: int | None = None
    messages: tuple[dict[str, Any], ...] | None = None


def read_prompts(path: Path | str) -> list[Prompt]:
    """The prompts in a .txt or .jsonl file.

    Raises:
        BadFileError: the file is missing, of another kind, empty, or wrong at a line that is named.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise BadFileError(
            f"{path} is neither a .txt nor a .jsonl file",
            "give a .txt with a prompt on each line, or a .jsonl with an object on each line: "
            '{"prompt": "...", "label": "code"}',
        )
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise nothing_at(path) from None
    except UnicodeDecodeError as error:
        raise BadFileError(f"{path} is not UTF-8: byte {error.start} is wrong") from None
    except OSError as error:
        raise BadFileError(f"{path} cannot be read: {error.strerror}") from None
    read = _read_json if path.suffix == ".jsonl" else _read_text
    lines = enumerate(content.removeprefix("\ufeff").split("\n"), start=1)
    prompts = [
        (number, read(line, f"{path}, line {number}")) for number, line in lines if line.strip()
    ]
    if not prompts:
        raise BadFileError(f"{path} holds no prompts", "put a prompt on each line")
    _check_requests(prompts, path)
    return [prompt for _, prompt in prompts]


def prompt_tokens(prompt: Prompt, tokenizer: Any, i: int) -> list[int]:
    """Token ids of a prompt, number `i` counting from 0.

    Raises:
        PlacerError: the tokenizer's chat template fails.
        UsageError: the prompt has no tokens.
    """
    if prompt.messages is not None:
        try:
            text = tokenizer.apply_chat_template(
                list(prompt.messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program, and may raise anything
            raise PlacerError(
                f"the chat template cannot be applied to prompt {i + 1}: {error}",
                "give prompts as plain text, or a tokenizer with a chat template",
            ) from error
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        tokens = tokenizer(prompt.text)["input_ids"]
    if not tokens:
        raise UsageError(f"prompt {i + 1} has no tokens", "leave it out")
    return list(tokens)


def _read_text(line: str, where: str) -> Prompt:
    return Prompt(line.rstrip("\r"))


def _read_json(line: str, where: str) -> Prompt:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadFileError(
            f"{where}: not valid JSON: {error.msg} at column {error.colno}"
        ) from None
    if not isinstance(found, dict):
        raise BadFileError(f"{where}: a {type(found).__name__}, expected an object with `prompt`")
    given = [name for name in ("prompt", "text", "messages") if found.get(name) is not None]
    if len(given) != 1:
        has = " and ".join(given) if given else f"none of them, but {sorted(found)}"
        raise BadFileError(f"{where}: expected one of prompt, text and messages, found {has}")
    label, request = found.get("label"), found.get("request")
    if label is not None and not isinstance(label, str):
        raise BadFileError(f"{where}: label is {label!r}, expected a string")
    is_id = isinstance(request, int) and not isinstance(request, bool) and request >= 0
    if request is not None and not is_id:
        raise BadFileError(f"{where}: request is {request!r}, expected an integer of 0 or more")
    if given == ["messages"]:
        return Prompt(None, label, request, _read_messages(found["messages"], where))
    text = found[given[0]]
    if not isinstance(text, str) or not text:
        raise BadFileError(f"{where}: {given[0]} is {text!r}, expected a text that is not empty")
    return Prompt(text, label, request)


def _read_messages(messages: Any, where: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise BadFileError(f"{where}: messages is {messages!r}, expected a list of turns")
    for turn in messages:
        if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
            raise BadFileError(f"{where}: the turn {turn!r} has no role or no content")
    return tuple(messages)


def _check_requests(prompts: list[tuple[int, Prompt]], path: Path) -> None:
    seen: dict[int, int] = {}
    for number, prompt in prompts:
        if (prompt.request is None) != (prompts[0][1].request is None):
            raise BadFileError(
                f"{path}, line {number}: request ids stand on some lines and not on others",
                "give every prompt a request id, or none",
            )
        if prompt.request is not None:
            if prompt.request in seen:
                raise BadFileError(
                    f"{path}, line {number}: request {prompt.request} stands on line "
                    f"{seen[prompt.request]} already"
                )
            seen[prompt.request] = number
