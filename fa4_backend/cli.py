"""The `fa4` command. A verb's module is imported only when that verb runs, so that `fa4 doctor` needs no compiler."""

from __future__ import annotations

import importlib
import sys

import typer

# verb -> its module in fa4_backend.commands; the function has the module's name, a typer.Typer is a group of verbs.
VERBS: dict[str, str] = {
    "doctor": "doctor",
    "features": "features",
    "plan": "plan",
    "compile": "compile",
    "bench": "bench",
    "emulate": "emulate",
    "model": "model",
}


def _usage() -> str:
    return f"usage: fa4 VERB [options]\n\nverbs: {', '.join(VERBS)}\n\n`fa4 VERB --help` lists a verb's options; every verb has --json."


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
    module = importlib.import_module(f"fa4_backend.commands.{VERBS[verb]}")
    command = getattr(module, VERBS[verb])
    if isinstance(command, typer.Typer):
        app = command
    else:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(name=verb)(command)
    app(args=arguments[1:], prog_name=f"fa4 {verb}")


if __name__ == "__main__":
    main()
