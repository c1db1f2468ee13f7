"""The `eesd` command. A command is a module here with `add_arguments(parser)` and `run(args)`.

Only the module of the command that is called is imported, and it imports torch in `run`, so that
help is quick.
"""

import argparse
import importlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence

COMMANDS = {
    "generate": "continue a prompt, drafting with the model's own first layers",
    "distill": "train an exit head for a model",
    "info": "show a model, its exit head and the kernels in use",
}
EPILOG = "`eesd COMMAND --help` shows a command's options."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 after an error, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in arguments
    warnings.showwarning = _show_warning
    try:
        args = _parse(arguments)
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        if show_traceback:
            traceback.print_exc()
        print("eesd: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader has gone: let the interpreter's last flush go nowhere too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        if show_traceback:
            traceback.print_exc()
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"eesd: error: {lines[0]}", file=sys.stderr)
        return 2


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"eesd: warning: {message}", file=sys.stderr)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="eesd",
        description="Early-exit speculative decoding: faster text, the same text.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")
    called = next((a for a in arguments if not a.startswith("-")), None)
    for name, line in COMMANDS.items():
        command = commands.add_parser(
            name, help=line, description=line[0].upper() + line[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        if name == called:
            module = importlib.import_module(f"eesd.cli.{name}")
            module.add_arguments(command)
            command.add_argument(
                "--traceback", action="store_true", help="show where an error came from"
            )
            command.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    if args.version:
        args.run = _version
    elif args.command is None:
        parser.error(f"expected a command: {', '.join(COMMANDS)}")
    return args


def _version(_: argparse.Namespace) -> int:
    from importlib.metadata import PackageNotFoundError, version

    try:
        print(f"eesd {version('eesd-kernels')}")
    except PackageNotFoundError:  # run from a source tree
        from eesd_kernels import __version__

        print(f"eesd {__version__}")
    return 0
