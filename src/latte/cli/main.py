# SPDX-License-Identifier: Apache-2.0
"""The program ``latte``: one file per command, and the one place where an error becomes a line on stderr and an exit code.

0 done, 1 failed while running, 2 wrong usage or input, 130 / 143 interrupted. Torch is imported by the commands, not by their help.
"""

import logging
import sys
import traceback
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from latte import __version__
from latte.checks import InputError, RunError
from latte.cli import ablate, config, convert, data, demo, doctor, evaluate, plan, sample, train
from latte.cli.options import DEBUG


class Guarded(TyperGroup):
    """The top group: errors of any command end here, in one line each and without a traceback unless ``--debug`` asks for it."""

    def invoke(self, ctx: typer.Context) -> Any:
        """Run the command; every exception but typer's own becomes typer.Exit."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *where: _say(f"warning: {message}")
                return super().invoke(ctx)
        except KeyboardInterrupt:
            _say("interrupted")
            raise typer.Exit(130) from None
        except (InputError, RunError, OSError) as error:
            self.explain(ctx, str(error))
            raise typer.Exit(2 if isinstance(error, InputError) else 1) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if type(error).__module__.startswith(("click", "typer")):
                raise  # wrong usage: typer prints it and exits with 2
            self.explain(
                ctx,
                f"{type(error).__name__}: {error or 'no message'} (this should not happen; --debug shows where)",
            )
            raise typer.Exit(1) from None

    @staticmethod
    def explain(ctx: typer.Context, message: str) -> None:
        """The traceback if asked for, then the message, every line of it an error of its own."""
        if ctx.meta.get(DEBUG):
            traceback.print_exc()
        for line in message.splitlines() or [""]:
            _say(f"error: {line}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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
    """The options before a command."""
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # diffusers imports it wherever it is installed, and it tells what it lacks


app.command("demo")(demo.demo)
app.command("train", context_settings=train.OVERRIDABLE)(train.train)
app.command("sample")(sample.sample)
app.command("evaluate")(evaluate.evaluate)
app.command("plan", context_settings=plan.OVERRIDABLE)(plan.plan)
app.command("convert")(convert.convert)
app.command("ablate", context_settings=ablate.OVERRIDABLE)(ablate.ablate)
app.add_typer(data.app, name="data")
app.add_typer(config.app, name="config")
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Entry point of the program."""
    app(prog_name="latte")
