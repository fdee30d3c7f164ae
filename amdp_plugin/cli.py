"""The command ``amdp``. Its commands import what they need when they run, so that it starts at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from .compare.command import CompareCommand, compare
from .compare.launching import EXIT_USAGE
from .doctor.command import doctor
from .plan.command import plan
from .study.command import StudyCommand, study

EXIT_FAILURE = 1

app = typer.Typer(
    help="Asynchronous pipeline schedules for DeepSpeed and Megatron.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command(short_help="Print or draw a schedule, and what it gives.")(plan)
app.command(cls=CompareCommand, short_help="Train one model in several ways, and compare.")(compare)
app.command(cls=StudyCommand, short_help="What schedules do to a loss, on one device.")(study)
app.command(short_help="Say what is installed, and what is missing.")(doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 used wrongly.

    What goes wrong is one line on standard error; standard output carries results only.
    """
    try:
        return app(arguments, prog_name="amdp", standalone_mode=False) or 0
    except BrokenPipeError:
        # The reader, `head` say, has seen enough. Python would complain once more when it flushes at exit.
        sys.stdout = None
        return EXIT_FAILURE
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except ValueError as error:
        return _fail(str(error), EXIT_USAGE)
    except OSError as error:
        return _fail(f"cannot write {error.filename}: {error.strerror}", EXIT_USAGE)
    except Exception as error:
        # Typer and click, whichever of them raised it, say what was wrong with the arguments through this method.
        if (format_message := getattr(error, "format_message", None)) is None:
            raise
        return _fail(" ".join(format_message().split()), EXIT_USAGE) if format_message() else EXIT_USAGE


def _fail(message: str, code: int) -> int:
    print(f"amdp: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
