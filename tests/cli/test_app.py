"""What all commands have in common."""

from __future__ import annotations

import inspect

import pytest
import typer.main

from placer import __version__
from placer.cli.app import app

from .running import run, succeeds, usage_error

COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_and_speaks_json(name):
    command = COMMANDS[name]
    assert command.help
    assert "--json" in {flag for option in command.params for flag in option.opts}
    for option in command.params:
        if option.param_type_name == "option":
            assert option.help, f"{name} {option.name}"
    assert succeeds(name, "--help").stderr == ""


@pytest.mark.parametrize("name", ["analyze", "demo", "import", "solve", "trace"])
def test_every_command_that_writes_can_be_forced(name):
    assert "--force" in {flag for option in COMMANDS[name].params for flag in option.opts}


def test_the_version_is_printed():
    assert succeeds("--version").stdout == f"placer {__version__}\n"


def test_no_command_shows_the_help(tmp_path):
    assert "solve" in run().stdout + run().stderr
    usage_error(tmp_path, "no-such-command")


def test_the_commands_of_the_design_are_there():
    expected = {
        "analyze", "compare", "demo", "doctor", "evaluate", "import", "inspect", "solve", "trace",
    }  # fmt: skip
    assert expected <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_wrapped_by_the_terminal_not_by_the_source(name):
    written = inspect.getdoc(COMMANDS[name].callback).split("\n\n")
    assert COMMANDS[name].help.split("\n\n") == [" ".join(text.split()) for text in written]
