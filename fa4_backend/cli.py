"""The `fa4` command. A verb's module is imported only when that verb runs, so that `fa4 doctor` needs no compiler."""

from __future__ import annotations

import importlib
import sys

import typer

# A verb and what it does. Its module in fa4_backend.commands and the function there have its name; a typer.Typer is a group of verbs.
VERBS: dict[str, str] = {
    "doctor": "what is installed, what would run on this machine, and why not",
    "features": "which chip serves what, found by asking the code that refuses",
    "plan": "the kernels that a model needs on a chip, or why it is not served",
    "compile": "compile kernels into the cache on disk, for any chip, without a GPU",
    "bench": "measure beside every peer that is installed; needs a GPU",
    "emulate": "run a case on the emulator, without a GPU: result, races, instructions",
    "model": "modelled time of a step on a chip, with every constant and its source",
}


def _usage() -> str:
    verbs = "\n".join(f"  {verb:10}{what}" for verb, what in VERBS.items())
    return f"usage: fa4 VERB [options]\n       fa4 --version\n\n{verbs}\n\n`fa4 VERB --help` lists a verb's options; every verb has --json."


def main(arguments: list[str] | None = None) -> None:
    """Run one verb; exits with its status (2: the command line is wrong)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        raise SystemExit(0 if arguments else 2)
    verb = arguments[0]
    if verb == "--version":
        from fa4_backend import __version__

        print(f"fa4-backend {__version__}")
        return
    if verb not in VERBS:
        print(f"fa4: expected a verb of {', '.join(VERBS)}, got {verb!r}", file=sys.stderr)
        raise SystemExit(2)
    module = importlib.import_module(f"fa4_backend.commands.{verb}")
    command = getattr(module, verb)
    if isinstance(command, typer.Typer):
        app = command
    else:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(name=verb)(command)
    app(args=arguments[1:], prog_name=f"fa4 {verb}")


if __name__ == "__main__":
    main()
