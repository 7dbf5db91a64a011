"""`cprec`: the console command."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import shlex
import sys
from collections.abc import Sequence
from typing import Any
from urllib.error import URLError

from cprec_recbole.config import CompressionError

COMMANDS = ("compare", "report", "train", "compress", "export", "recommend")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `cprec`; returns the exit status. Errors of the user's are one line on standard error."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options, rest = _parser(argv).parse_known_args(argv)
        return options.run(options, recbole_options(rest), shlex.join(["cprec", *argv]))
    except CompressionError as error:
        problem = str(error)
    except URLError as error:  # of RecBole, which downloads data sets whose names it knows
        problem = (
            "Expected `data_path` to have a folder of the name of `dataset`, but there is none, "
            f"and RecBole could not download the data ({error.reason})."
        )
    except BrokenPipeError:
        if not _nobody_reads():
            raise  # another pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno is None:
            raise  # not of the system's
        where = "" if error.filename is None else f" ({error.filename})"
        problem = f"a file cannot be read or written: {error.strerror}{where}"
    except KeyboardInterrupt:
        print("cprec: stopped", file=sys.stderr)
        return 130
    print(f"cprec: {problem}", file=sys.stderr)
    return 2


def _nobody_reads() -> bool:
    """Whether whoever read the answers has had enough."""
    try:
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in output.poll(0))
    except AttributeError:  # no poll on Windows
        return True
    except (OSError, ValueError):  # it has no pipe
        return False


def recbole_options(arguments: Sequence[str]) -> dict[str, Any]:
    """RecBole options off a command line, `--name=value` or `--name value`, values as YAML; a dash
    in a name is an underscore."""
    if not arguments:
        return {}
    from cprec_recbole.commands.common import TEXTS, plain_text, value

    options: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not name:
            raise CompressionError(f"Expected options as --name=value, but got {argument!r}.")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise CompressionError(f"Expected a value for --{name}, but got none.")
            text = rest.pop(0)
        name = name.replace("-", "_")
        options[name] = plain_text(text) if name in TEXTS else value(text)
    return options


def _parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of the command that is called, or of all where it is none of them: to import what
    trains takes seconds."""
    description = "CpRec for RecBole: small and fast sequential recommenders."
    parser = argparse.ArgumentParser("cprec", description=description, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    called = [name for name in COMMANDS if name in argv[:1]]
    for name in called or COMMANDS:
        module = importlib.import_module(f"cprec_recbole.commands.{name}")
        module.add_parser(commands)
        commands.choices[name].set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
