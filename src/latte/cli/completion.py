# SPDX-License-Identifier: Apache-2.0
"""``latte completion``: the script that completes commands, options, recipes and names in a shell.

The scripts are of our own, because shtab and argcomplete read argparse parsers, which typer's are not, and
typer's own completion starts Python at every press of the key. They hold all words, so that completing starts
no Python; after an upgrade the script is made again.
"""

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from latte import __version__
from latte.checks import choose
from latte.cli.options import TABLES, Debug

Shell = Annotated[
    str, typer.Argument(metavar="SHELL", help="bash, zsh or fish.", show_default=False, case_sensitive=False)
]


@dataclass
class Words:
    """What may follow a command: subcommands, options with the names of their values, other arguments."""

    about: str
    subcommands: dict[str, str] = field(default_factory=dict)  # name -> its help
    options: dict[str, tuple[str, list[str]]] = field(default_factory=dict)  # option -> (help, values)
    arguments: list[str] = field(default_factory=list)


def completion(context: typer.Context, shell: Shell, debug: Debug = False) -> None:
    """Print the script that completes commands, options, recipes, samplers and other names in a shell.

    bash: put eval "$(latte completion bash)" into ~/.bashrc. zsh: the same with zsh into ~/.zshrc. fish:
    latte completion fish > ~/.config/fish/completions/latte.fish
    """
    write = choose("SHELL", shell, SHELLS)
    print(write(dict(walk(context.find_root().command))), end="")


def walk(command: Any, path: str = "") -> Iterator[tuple[str, Words]]:
    """Yield (path, words) of a command and all below it; the path of ``latte data scan`` is 'data scan'."""
    words = Words(summary(command))
    for parameter in command.params:
        values = values_of(parameter)
        if parameter.param_type_name == "argument":
            words.arguments += values
            continue
        about = (getattr(parameter, "help", "") or "").partition(".")[0]
        for option in (*parameter.opts, *parameter.secondary_opts):
            words.options[option] = (re.sub(r"[:;,]? *\{\w+\}.*", "", about), values)
    words.options["--help"] = ("Show the help and exit", [])
    below = getattr(command, "commands", {})
    words.subcommands = {name: summary(each) for name, each in below.items()}
    yield path, words
    for name, each in below.items():
        yield from walk(each, f"{path} {name}".strip())


def summary(command: Any) -> str:
    """Return the first sentence of a command's help."""
    text = " ".join((command.help or "").partition("\n\n")[0].split())
    return re.split(r"[.:;]( |$)", text)[0]


def values_of(parameter: Any) -> list[str]:
    """Return the names that a parameter takes: the entries of the tables that its help mentions; recipes for
    a RUN, keys for KEY=VALUE.
    """
    from latte.config.run import HINTS, recipes

    names = re.findall(r"\{(\w+)\}", getattr(parameter, "help", "") or "")
    found = [str(entry) for name in names for entry in TABLES[name]()]
    if parameter.name == "run" or parameter.metavar == "SOURCE":
        found += recipes()
    if parameter.name == "overrides":
        found += [f"{key}=" for key in HINTS]
    return found


def bash(commands: dict[str, Words]) -> str:
    """Return the function for bash and the line that registers it."""
    paths = "|".join(shlex.quote(path) for path in commands if path)
    values = []
    others = []
    for path, words in commands.items():
        for option, (_, names) in words.options.items():
            if names:
                values.append(f"        {shlex.quote(f'{path}:{option}')}) words={joined(names)} ;;")
        listed = [*words.subcommands, *words.arguments, *words.options]
        others.append(f"        {shlex.quote(f'{path}:')}*) words={joined(listed)} ;;")
    return "\n".join(
        [
            f"# bash completion of latte {__version__}, made by: latte completion bash",
            "_latte() {",
            '    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}"',
            "    local command= words= word",
            '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
            '        case "${command:+$command }$word" in',
            f'        {paths}) command="${{command:+$command }}$word" ;;',
            "        esac",
            "    done",
            '    case "$command:$previous" in',
            *values,
            *others,
            "    esac",
            '    COMPREPLY=($(compgen -W "$words" -- "$current"))',
            '    if [[ "${COMPREPLY[0]-}" == *= ]]; then compopt -o nospace 2> /dev/null; fi',
            "}",
            "complete -o bashdefault -o default -F _latte latte",
            "",
        ]
    )


def zsh(commands: dict[str, Words]) -> str:
    """Return the bash function for zsh, which runs such functions after ``bashcompinit``."""
    start = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
    return start + bash(commands).replace("completion bash", "completion zsh").replace("# bash", "# zsh")


def fish(commands: dict[str, Words]) -> str:
    """Return the lines for fish, with what each word means."""
    lines = [f"# fish completion of latte {__version__}, made by: latte completion fish"]
    for path, words in commands.items():
        place = "; and ".join(f"__fish_seen_subcommand_from {name}" for name in path.split())
        here = f"complete -c latte -n {shlex.quote(place or '__fish_use_subcommand')}"
        before = here
        if path and words.subcommands:
            not_below = f"{place}; and not __fish_seen_subcommand_from {' '.join(words.subcommands)}"
            before = f"complete -c latte -n {shlex.quote(not_below)}"
        for name, about in words.subcommands.items():
            lines.append(f"{before} -f -a {name} -d {shlex.quote(about)}")
        if words.arguments:
            lines.append(f"{here} -a {joined(words.arguments)}")
        for option, (about, names) in words.options.items():
            takes = f" -x -a {joined(names)}" if names else ""
            lines.append(f"{here} -l {option.removeprefix('--')}{takes} -d {shlex.quote(about)}")
    return "\n".join([*lines, ""])


def joined(words: list[str]) -> str:
    """Return words as one quoted word of a shell."""
    return shlex.quote(" ".join(words))


SHELLS: dict[str, Callable[[dict[str, Words]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
