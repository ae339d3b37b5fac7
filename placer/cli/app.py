"""The command `placer`: one module per command; errors are turned into exit codes here."""

from __future__ import annotations

import inspect
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from placer import __version__
from placer.errors import PlacerError, UsageError


class _Group(TyperGroup):
    """Shows placer's own errors as a line and a hint, and exits with their code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PlacerError as error:
            from placer.report.console import show_error

            hint = error.hint
            if hint == UsageError.usual_hint:
                hint = f"placer {ctx.invoked_subcommand} {hint}"
            show_error(error.message, hint)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            from placer.report.console import show_error

            show_error("interrupted", "")
            raise typer.Exit(1) from None
        except BrokenPipeError:
            sys.stderr.close()
            raise typer.Exit(1) from None
        except OSError as error:  # what the file system says of an odd path, a full disk
            from placer.report.console import show_error

            show_error(str(error), "")
            raise typer.Exit(1) from None


app = typer.Typer(
    name="placer",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Expert placement and scheduling for Mixture-of-Experts inference.",
)


def _print_version(value: bool) -> None:
    if value:
        print(f"placer {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Expert placement and scheduling for Mixture-of-Experts inference.

    trace a running model -> analyze its routing -> solve for a placement -> evaluate it on
    held-out tokens -> a plan file that serving engines load.
    """


def unwrapped(docstring: str) -> str:
    """Each paragraph on one line: the terminal's width breaks it, not that of the source."""
    paragraphs = docstring.split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _register() -> None:
    from placer.cli import (
        analyze,
        applying,
        benching,
        calibrate,
        certify,
        compare,
        demo,
        doctor,
        evaluate,
        exporting,
        importing,
        inspecting,
        model,
        reporting,
        solve,
        sweep,
        tracing,
    )

    for module in (
        demo, tracing, importing, inspecting, analyze, solve, evaluate, certify, compare, sweep,
        reporting, exporting, applying, benching, model, calibrate, doctor,
    ):  # fmt: skip
        module.register(app)
    for command in app.registered_commands:
        assert command.callback is not None
        command.help = unwrapped(inspect.getdoc(command.callback) or "")


_register()


def main() -> None:
    """Entry point of the console script; what nobody expected is shown as a defect of placer."""
    try:
        app()
    except Exception as error:
        from placer.report.console import show_error

        traceback.print_exc()
        show_error(
            f"internal error: {type(error).__name__}: {error}",
            "this is a defect of placer, not of what you asked for: please report it, with the "
            "lines above",
        )
        sys.exit(1)
