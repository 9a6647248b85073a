# SPDX-License-Identifier: Apache-2.0
"""The program ``latte``: one file per command, and the one place where errors become lines and exit codes.

0 done, 1 failed while running, 2 wrong usage or input, 130 / 143 interrupted. Only the commands import torch.
Printing never ends a command: what an encoding lacks is escaped, and after a closed pipe nothing is printed.
"""

import errno
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TextIO

import typer

from latte import __version__
from latte.checks import InputError, RunError
from latte.cli import (
    ablate,
    bench,
    completion,
    config,
    convert,
    data,
    demo,
    distill,
    doctor,
    evaluate,
    launch,
    plan,
    report,
    sample,
    train,
    ui,
)
from latte.cli.options import DEBUG, OVERRIDABLE, Command, Group, print_note
from latte.runtime import limit_threads, rank, world_size

ADVICE = {
    errno.ENOSPC: "make room there, then run the same command again",
    errno.EDQUOT: "make room there, then run the same command again",
    errno.EROFS: "give a folder that can be written",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENAMETOOLONG: "give a shorter name",
}


class Nowhere(io.TextIOBase):
    """A text stream that drops everything."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        """Drop ``text``."""
        return len(text)


class SafeStream:
    """A text stream that never raises: it escapes what its encoding lacks, and drops what cannot be written.

    ``error`` is the first failure other than a closed pipe, None without one.
    """

    def __init__(self, stream: TextIO | Nowhere | None):
        self.stream = stream or Nowhere()
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write ``text`` as far as possible."""
        try:
            return self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding or "ascii"
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:
            self.drop(error)
            return len(text)

    def flush(self) -> None:
        """Flush as far as possible."""
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self.drop(error)

    def drop(self, error: OSError | ValueError) -> None:
        """Send all that follows, and what is buffered, to nowhere."""
        if isinstance(error, OSError) and error.errno != errno.EPIPE:
            self.error = self.error or error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, self.stream.fileno())
        except (OSError, ValueError):
            self.stream = Nowhere()
        finally:
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def safe_output() -> Iterator[None]:
    """Replace stdout and stderr by SafeStreams; SystemExit(1) when the result could not be written."""
    for handle in range(3):  # a closed one would be given to the next file that is opened
        try:
            os.fstat(handle)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    out = SafeStream(sys.stdout)
    sys.stdout, sys.stderr = out, SafeStream(sys.stderr)  # type: ignore[assignment]
    try:
        yield
    except SystemExit as leaving:
        out.flush()
        if out.error is None or leaving.code:
            raise
        print_note(f"error: could not write to stdout: {reason_of(out.error)}")
        raise SystemExit(1) from None
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def reason_of(error: OSError) -> str:
    """Return what the system reports, about which file, and what to do about it."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is not None:
        reason = f"{os.fsdecode(error.filename)}: {reason}"
    advice = ADVICE.get(error.errno or 0)
    return f"{reason}; {advice}" if advice else reason


def describe(error: Exception) -> tuple[str, int]:
    """Return (message, exit code) of what a command raised."""
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, RunError):
        return str(error), 1
    if isinstance(error, OSError):
        return reason_of(error), 1
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return f"{error.object!a:.200} is not valid UTF-8; rename the file or folder, or give another name", 2
    text = str(error).strip()
    first_line = text.partition("\n")[0] or "no message"
    memory_errors = ("can't allocate memory", "not enough memory", "out of memory")
    if isinstance(error, MemoryError) or any(words in text for words in memory_errors):
        return (
            f"not enough memory ({first_line}); use a smaller batch, model or resolution (see latte plan)",
            1,
        )
    if type(error).__name__ == "SafetensorError":
        return f"a weights file could not be read or written: {first_line}", 1
    return f"{type(error).__name__}: {text or 'no message'} (this should not happen; --debug shows where)", 1


class Guarded(Group):
    """The top group: errors of every command end here, a line each, with a traceback only for ``--debug``."""

    def main(self, *arguments: Any, **settings: Any) -> Any:
        """Run the program with output that never raises."""
        with safe_output():
            return super().main(*arguments, **settings)

    def invoke(self, ctx: typer.Context) -> Any:
        """Run the command; every exception but those of typer becomes a message and typer.Exit."""
        try:
            with warnings.catch_warnings():
                if rank() == 0:
                    warnings.showwarning = lambda message, *where: print_note(f"warning: {message}")
                else:
                    warnings.showwarning = lambda *message: None
                return super().invoke(ctx)
        except KeyboardInterrupt:
            print_note("interrupted")
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if type(error).__module__.startswith(("click", "typer")):
                raise  # wrong usage: typer prints it and exits with 2
            if ctx.meta.get(DEBUG):
                traceback.print_exc()
            message, code = describe(error)
            if getattr(error, "of_rank0", False):  # which prints it
                raise typer.Exit(code) from None
            place = ""
            if world_size() > 1:
                place = f"rank {rank()}: "
            for line in message.splitlines() or [""]:
                print_note(f"error: {place}{line}")
            raise typer.Exit(code) from None


app = typer.Typer(
    cls=Guarded,
    help="Latte: latent diffusion transformer for video generation. Start with: latte demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        print(f"latte {__version__}")
        raise typer.Exit()


@app.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Set up what every command needs."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs what it lacks whenever it is imported


app.command("demo", cls=Command)(demo.demo)
app.command("train", cls=Command, context_settings=OVERRIDABLE)(train.train)
app.command("launch", cls=Command, context_settings=OVERRIDABLE)(launch.launch)
app.command("sample", cls=Command)(sample.sample)
app.command("distill", cls=Command)(distill.distill)
app.command("evaluate", cls=Command)(evaluate.evaluate)
app.command("plan", cls=Command, context_settings=OVERRIDABLE)(plan.plan)
app.command("convert", cls=Command)(convert.convert)
app.command("ablate", cls=Command, context_settings=OVERRIDABLE)(ablate.ablate)
app.command("report", cls=Command)(report.report)
app.command("ui", cls=Command)(ui.ui)
app.add_typer(data.app, name="data")
app.add_typer(config.app, name="config")
app.command("bench", cls=Command, context_settings=OVERRIDABLE)(bench.bench)
app.command("doctor", cls=Command)(doctor.doctor)
app.command("completion", cls=Command)(completion.completion)


def main() -> None:
    """Entry point of the program."""
    limit_threads()
    app(prog_name="latte")
