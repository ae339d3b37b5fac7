"""Files of prompts, and what is wrong with some."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from placer.errors import BadFileError
from placer.tracer import Prompt, read_prompts


def test_text_has_a_prompt_on_each_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffone\r\n\n  two \n".encode())
    assert read_prompts(path) == [Prompt("one"), Prompt("  two ")]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "a", "label": "code", "request": 4}\n'
        "\n"
        '{"text": "b", "request": 2}\n'
        '{"messages": [{"role": "user", "content": "c"}], "request": 9}\n'
    )
    assert read_prompts(path) == [
        Prompt("a", "code", 4),
        Prompt("b", None, 2),
        Prompt(None, None, 9, ({"role": "user", "content": "c"},)),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": }', "line 2: not valid JSON"),
        ('{"prompt": "a"}\n["b"]', "line 2: a list"),
        ('{"label": "x"}', "line 1: expected one of prompt"),
        ('{"prompt": "a", "text": "b"}', "found prompt and text"),
        ('{"prompt": ""}', "not empty"),
        ('{"prompt": 3}', "expected a text"),
        ('{"prompt": "a", "label": 3}', "label is 3"),
        ('{"prompt": "a", "request": -1}', "request is -1"),
        ('{"prompt": "a", "request": true}', "request is True"),
        ('{"prompt": "a", "request": 1}\n{"prompt": "b"}', "line 2: request ids stand on some"),
        ('{"prompt": "a", "request": 1}\n\n{"text": "b", "request": 1}', "line 3: request 1"),
        ('{"messages": []}', "expected a list of turns"),
        ('{"messages": [{"role": "user"}]}', "no content"),
        ("\n \n", "holds no prompts"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(BadFileError) as caught:
        read_prompts(path)
    assert message in str(caught.value)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFileError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(BadFileError, match="neither"):
        read_prompts(tmp_path / "p.csv")
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(BadFileError, match="not UTF-8"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "d.txt").mkdir()
    with pytest.raises(BadFileError, match="cannot be read"):
        read_prompts(tmp_path / "d.txt")


def test_importing_the_tracer_loads_no_torch() -> None:
    code = (
        "import sys, placer.tracer; placer.tracer.read_prompts; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_torch_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import placer.tracer\n"
        "from placer.errors import MissingExtraError\n"
        "try: placer.tracer.capture\n"
        "except MissingExtraError as error: sys.exit('moe-placer[trace]' not in error.hint)\n"
        "sys.exit(1)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
