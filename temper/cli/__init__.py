"""The command line. Every command imports what it needs when it runs, so that `temper --help` is quick."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import typer

from temper.cli import config, data, judge, release, run, serving, template

INTERRUPTED = 130
INTERRUPT_HINT = "interrupted: the same command goes on from the last checkpoint"
UNTIL_STOPPED = ("serve", "chat")  # commands that end by being interrupted

app = typer.Typer(
    name="temper",
    help="From a base model to an assistant that can be released, and back.",
    epilog="Example: temper run configs/finops.yaml --dry-run",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
run.add_to(app)
judge.add_to(app)
serving.add_to(app)
app.add_typer(release.app, name="releases")
app.add_typer(data.app, name="data")
app.add_typer(template.app, name="template")
app.add_typer(config.app, name="config")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 2 bad input (said on stderr, without a traceback), 130 interrupted.

    A programming error keeps its traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    hint = "stopped" if given[:1] and given[0] in UNTIL_STOPPED else INTERRUPT_HINT
    try:
        app(given)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            print(hint, file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print(hint, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        told = explain(error)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        sys.exit(2)


def explain(error: Exception) -> str | None:
    """What to tell a user of an error that they can mend; None of a programming error."""
    from temper.core.errors import TemperError

    if isinstance(error, TemperError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] != "temper":
        package = error.name.partition(".")[0]
        return f"this command needs the package {package!r}, which is not installed\n  do:  pip install -c constraints.txt {package}"
    if any(getattr(error, "errno", None) == number or os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
        return (
            f"the disk is full\n  why: {error}\n  do:  free some space and run the same command again; it goes on from the last checkpoint"
        )
    return None
