"""The `n2uq` command: chooses a sub-command, and turns a user's mistake into one line and exit code 2.

Nothing heavy is imported here, so that `n2uq --help` and the light sub-commands answer at once.
"""

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

from lightning_n2uq._version import __version__
from lightning_n2uq.cli.commands import COMMANDS, TRAINING_COMMANDS, usage
from lightning_n2uq.cli.processes import watch_launcher

DEBUG_FLAG, DEBUG_VARIABLE = "--debug", "N2UQ_DEBUG"

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command.

    Args:
        argv: Arguments after the program's name; those of the process if None.

    Returns:
        0 when done, 2 for a mistake in the command, a config or a file it names, 3 where another rank or the
        link to it was lost, 128 and the signal's number when a signal stopped it. Other failures keep their
        traceback, and so do all of them with `--debug` or `N2UQ_DEBUG=1`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = DEBUG_FLAG in arguments or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")
    arguments = [argument for argument in arguments if argument != DEBUG_FLAG]
    if not debug:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's C++ warns of lost ranks page by page
    # Threads of OpenMP that wait for others give their core away. Read once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode must not end a run
            stream.reconfigure(errors="backslashreplace")
    watch_launcher()
    try:
        return _dispatch(arguments)
    except SystemExit as stop:  # argparse's way out of --help and --print_config
        if type(stop).__name__ == "SIGTERMException":  # Lightning's, which has no code
            return 128 + signal.SIGTERM
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes at its end
        return 0
    except Exception as error:
        from lightning_n2uq.cli.errors import is_user_error, one_line

        if debug or not is_user_error(error):
            raise
        print(f"n2uq: error: {one_line(error)}", file=sys.stderr)
        return int(getattr(error, "exit_code", 2))


@contextlib.contextmanager
def _interrupts_end_imports() -> Iterator[None]:
    """Lets Ctrl-C end the process: an exception amid an import of C code is swallowed, and fails later."""
    before = signal.getsignal(signal.SIGINT)
    alone = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if alone:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if alone:
            signal.signal(signal.SIGINT, before)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        print(f"n2uq {__version__}")
        return 0
    if name == "predict" and any(text.partition("=")[0] == "--images" for text in rest):
        with _interrupts_end_imports():
            from lightning_n2uq.cli.image_predictions import main as predict_images
        return predict_images(rest)
    if name in TRAINING_COMMANDS:
        from lightning_n2uq.cli import help_pages, quick_checks
        from lightning_n2uq.cli.shorthands import long_names

        rest = long_names(rest)
        if (topic := help_pages.topic(rest)) is not None and topic != help_pages.ALL:
            print(help_pages.page(name, topic))
            return 0
        rest = ["--help"] if topic == help_pages.ALL else rest
        quick_checks.check(name, rest)
        with _interrupts_end_imports():
            from lightning_n2uq.cli.training import run_training_command

        return run_training_command(name, rest)
    if name in COMMANDS:
        return COMMANDS[name].run(rest)
    raise ValueError(f"command: got {name!r}, allowed are {', '.join([*TRAINING_COMMANDS, *COMMANDS])}")
