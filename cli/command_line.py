"""What the four commands share: flags and their types, output, one-line errors, exit codes.

    parser = FlagParser(__file__, usage="%(prog)s CHECKPOINT [flags]")
    flags = parser.parse_args(argv)
    return exit_code_of(lambda: work(flags), expected=(OSError,), debug=flags.debug)

An error ends a command with one line that starts with `!` and contains the remedy, and with a code:
1 for a failure, 2 for wrong flags, 128 + signal for an interruption. --debug prints a traceback.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import errno
import io
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import textwrap
import traceback
from argparse import SUPPRESS
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TextIO, TypeVar

from cli.shortages import first_line, shortage
from cli.signals import code_of_interruption, signals_interrupt

EXIT_DONE, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
OPEN_FILES = 1024  # descriptors that serve every command well
HELP_WIDTH = 80  # columns of a terminal
RED = "\033[31m"
PLAIN = "\033[0m"
T = TypeVar("T")


class UsageError(ValueError):
    """Flags that do not fit together or do not fit what they name; ends with exit code 2."""


# --- flags ---------------------------------------------------------------------------------------


class FlagParser(argparse.ArgumentParser):
    """Flags by group, as wide as the terminal; multi-word ones are accepted with `-` and with `_`.

    The help begins with the first two paragraphs of the docstring of `path`, the command's file,
    and ends with its paragraph about exit codes. The docstring is read from the file because
    `python -OO` removes docstrings.
    """

    def __init__(self, path: str, usage: str) -> None:
        doc = ast.get_docstring(ast.parse(Path(path).read_text(encoding="utf-8"))) or ""
        what, commands, *rest = doc.split("\n\n")
        below = [part for part in rest if part.casefold().startswith("exit code")]
        width = help_width()
        super().__init__(
            description=f"{textwrap.fill(what, width)}\n\n{commands}",
            epilog=textwrap.fill("".join(below), width),
            usage=usage,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, after each flag's name has been brought to its declared spelling."""
        spelling = {s.replace("_", "-"): s for a in self._actions for s in a.option_strings}
        given: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            name, equals, value = word.partition("=")
            if word.startswith("--"):
                given.append(spelling.get(name.replace("_", "-"), name) + equals + value)
            elif re.match(r"-[\d.]", word) and given and given[-1] in spelling.values():
                given[-1] += f"={word}"  # argparse takes -1e-3 and -1,2 for flags
            else:
                given.append(word)
        return super().parse_known_args(given, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse; a flag that does not exist is answered with the nearest that does."""
        flags, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"{unknown[0]}: {self._instead_of(unknown[0])}")
        return flags

    def _instead_of(self, word: str) -> str:
        if not word.startswith("-"):
            return "belongs to no flag; put it behind one, a glob or a path with blanks in quotes"
        names = [s for a in self._actions for s in a.option_strings]
        near = difflib.get_close_matches(word.partition("=")[0], names, n=1)
        return f"no such flag; did you mean {near[0]}?" if near else "no such flag"

    def error(self, message: str) -> NoReturn:
        """End with one line and code 2."""
        message = re.sub("^argument ", "", message)
        message = message.replace("ignored explicit argument", "takes no value, found")
        problem(f"{message} (see {self.prog} --help)")
        raise SystemExit(EXIT_USAGE)


def help_width() -> int:
    """Columns of the terminal, 80 at most."""
    return min(HELP_WIDTH, max(20, shutil.get_terminal_size().columns))


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Defaults stand behind the help of flags that have one, `--[no-]flag` for a switch."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=help_width())

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if not has_default(action):
            return action.help
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"{action.help} (on)"
        return f"{action.help} (%(default)s)"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0].replace("--", "--[no-]", 1)
        return super()._format_action_invocation(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return getattr(action.type, "__name__", "TEXT")  # as the types below are named


def has_default(action: argparse.Action) -> bool:
    """Whether the help shows a flag's default."""
    default = action.default
    return (
        bool(action.option_strings) and default is not False and default not in (None, "", SUPPRESS)
    )


class Several(argparse.Action):
    """Action of a flag that takes several values and may stand several times: all count."""

    def __call__(self, _: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Add the values to those of earlier flags."""
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(before if isinstance(before, list) else ()), *values])


class Once(argparse.Action):
    """Action of a flag that must not be given twice with two values; argparse takes the last."""

    def __call__(self, _: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Store the value; raises ArgumentError where an earlier one was another."""
        before = getattr(namespace, self.dest)
        if isinstance(before, (str, list)) and before != values:
            raise argparse.ArgumentError(self, "is given twice, with other values; give it once")
        setattr(namespace, self.dest, values)


def file_path(text: str) -> str:
    """Argument type of everything that names a file, a folder or a glob: `~` and `~user` expanded.

    A shell leaves them alone behind `=` and in quotes. Names of the environment stay as they are.
    """
    if not text:  # of a shell's variable that was never set
        raise argparse.ArgumentTypeError("expected a path, found ''; name one or leave it out")
    path = os.path.expanduser(text)
    if path == text and text.startswith("~") and not os.path.lexists(text):
        raise argparse.ArgumentTypeError(
            f"expected a user with a home folder, found {text!r}; write ./{text} for that very name"
        )
    if path != text and os.path.lexists(text) and not os.path.lexists(path):
        raise argparse.ArgumentTypeError(
            f"expected {path}, found only ./{text}, as a version that left ~ alone made it; "
            f"move that there, or write ./{text}"
        )
    return path


def at_least(low: int, most: int | None = None) -> Callable[[str], int]:
    """Argument type: a whole number of at least `low`, and at most `most`."""
    wanted = f"a whole number >= {low}" if most is None else f"{low} to {most}"

    def whole_number(text: str) -> int:
        if re.fullmatch(r"-?\d{1,18}", text) and low <= int(text) <= (most or int(text)):
            return int(text)
        limit = " of at most 18 digits" if re.fullmatch(r"\d{19,}", text) else ""
        raise argparse.ArgumentTypeError(f"expected {wanted}{limit}, found {_shown(text)}")

    whole_number.__name__ = "N"
    return whole_number


def _shown(text: str) -> str:
    """A value in quotes, as far as a line holds."""
    return repr(text) if len(text) <= HELP_WIDTH else f"{text[:HELP_WIDTH]!r}..."


def or_auto(kind: Callable[[str], T]) -> Callable[[str], T | str]:
    """Argument type: as `kind`, or `auto`."""

    def parse(text: str) -> T | str:
        try:
            return text if text == "auto" else kind(text)
        except argparse.ArgumentTypeError as error:
            wanted = str(error).replace("expected", "expected auto or", 1)
            raise argparse.ArgumentTypeError(wanted) from error

    return parse


HUGE = 1e30  # a few such numbers multiplied pass what a float32 holds


def number(what: str, accepts: Callable[[float], bool]) -> Callable[[str], float]:
    """Argument type: a number below HUGE that `accepts` takes, in words `what`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        wanted = what if not accepts(value) else f"a number < {HUGE:g}" if value >= HUGE else None
        if wanted is not None:
            raise argparse.ArgumentTypeError(f"expected {wanted}, found {_shown(text)}")
        return value

    parse.__name__ = "X"
    return parse


positive = number("a number > 0", lambda x: 0 < x < math.inf)
not_negative = number("a number >= 0", lambda x: 0 <= x < math.inf)
fraction = number("a number >= 0 and < 1", lambda x: 0 <= x < 1)
fraction_or_one = number("a number > 0 and <= 1", lambda x: 0 < x <= 1)


def list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Argument type: one value or a comma list of them."""

    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = f"{kind.__name__},..."
    return parse


# --- output --------------------------------------------------------------------------------------


def say(text: str, stream: TextIO | None = None) -> None:
    """Print and flush. Where the reader has closed the pipe (`| head`), the line is lost."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if error.errno != errno.ENOSPC:  # a pipe without a reader, a terminal that was closed
            _let_go(stream)


def print_result(text: str) -> None:
    """Print the result of a command: other than with `say`, a full disk is an error.

    Raises:
        OSError: standard output cannot take it.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        _let_go(sys.stdout)
        if error.errno != errno.EPIPE:
            raise OSError(error.errno, error.strerror, "standard output") from error


def _let_go(stream: TextIO) -> None:
    """Redirect a stream to nowhere, with its buffer: else the exit of Python fails on it."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def printable(text: str) -> str:
    """Text on one line, with control, direction and surrogate characters as escapes."""
    if text.isprintable():  # nearly always, and 30 times as fast
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def shell_line(words: Iterable[str]) -> str:
    """A command to copy; a word that cannot be printed stands as $'\\x0a', for bash and zsh."""
    return " ".join(map(_as_typed, words))


def _as_typed(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    plain = (
        chr(b) if 32 <= b < 127 and b not in b"'\\" else f"\\x{b:02x}" for b in os.fsencode(word)
    )
    return f"$'{''.join(plain)}'"


def figure(value: float | None, form: str = ".4g") -> str:
    """A number; `-` for None and NaN, `inf` beyond floats."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def problem(text: str) -> None:
    """Print on standard error what failed or was refused."""
    mark = f"{RED}!{PLAIN}" if has_colour(sys.stderr) else "!"
    say(f"{mark} {text}", sys.stderr)


def has_colour(stream: TextIO | None) -> bool:
    """Whether to colour: on a terminal, unless NO_COLOR is set (no-color.org) or it is dumb."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and stream is not None and stream.isatty()


# --- ends ----------------------------------------------------------------------------------------


def report_import_errors() -> None:
    """Before the imports of a command, which take seconds: Ctrl-C and failures give one line.

    Sets the excepthook of the process and, until `begin_work`, its handler of SIGINT.
    """
    sys.excepthook = _tell_failed_start
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is to be ignored
        signal.signal(signal.SIGINT, _leave_imports)


def _tell_failed_start(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if (said := known_cause(error)) is not None:
        problem(said)
    else:
        sys.__excepthook__(kind, error, trace)


def _leave_imports(*_: object) -> None:
    # Not an exception: an import that it interrupts may report a broken package.
    os.write(2, b"! interrupted before anything was done; the same command starts again\n")
    os._exit(128 + signal.SIGINT)


def begin_work() -> None:
    """Let Ctrl-C raise KeyboardInterrupt from here on, and allow enough open files.

    Progress bars get no monitor thread: Python waits forever for a thread that fails at its start
    for want of memory.
    """
    from tqdm import tqdm  # not above: `report_import_errors` runs where no package is

    tqdm.monitor_interval = 0
    if signal.getsignal(signal.SIGINT) is _leave_imports:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES:  # a process may raise the soft limit of its shell (`ulimit -Sn`)
        wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


REMEDIES = {
    errno.EACCES: "name another place, or get the right to use this one",
    errno.EPERM: "name another place, or get the right to use this one",
    errno.EROFS: "name a place that can be written",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EEXIST: "expected a folder or nothing there; name another place",
    errno.EISDIR: "expected a file; name another path, or move the folder away",
    errno.ENAMETOOLONG: "name a shorter one",
    errno.ENOSPC: "free some, or name a place on another disk",
    errno.EDQUOT: "free some, or name a place on another disk",
    errno.EFBIG: "raise `ulimit -f`, or name a place on another disk",
    errno.EMFILE: "raise `ulimit -n`",
    errno.ENFILE: "close other programs, or raise the sysctl fs.file-max",
    errno.EIO: "check the disk, or the network folder's server",
    errno.ESTALE: "the network folder changed on its server; mount it anew",
    errno.ETIMEDOUT: "check the network folder's server",
    errno.EAGAIN: "end other programs, or raise `ulimit -u`",
    errno.ENOMEM: "free some memory, ask for less, or raise `ulimit -v`",
}


def in_words(error: BaseException) -> str:
    """The message of an error; for an error of the system its path, reason and remedy."""
    if ";" not in str(error) and (said := shortage(error)) is not None:
        return said
    if not isinstance(error, OSError) or error.errno is None:
        return str(error) or type(error).__name__
    where = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
    where += f" -> {os.fsdecode(error.filename2)}" if error.filename2 else ""
    reason = f"{where}: {error.strerror}" if where else str(error.strerror)
    remedy = REMEDIES.get(error.errno)
    return reason if remedy is None or ";" in reason else f"{reason}; {remedy}"


def exit_code_of(
    work: Callable[[], int],
    *,
    expected: tuple[type[Exception], ...],
    debug: bool,
    interrupted: str = "interrupted",
    failed: int = EXIT_FAILED,
    explain: Callable[[BaseException], str] | None = None,
    report: Callable[[int, str], int] | None = None,
) -> int:
    """Run a command's work and return its exit code; an error becomes one line and a code.

    The code is `failed`, or 2 for wrong usage. The message of an `expected` error contains its own
    remedy; `explain` makes the message of another, by default with its type and how to find the
    place. `report` is called with code and line and returns the code; without it the line is
    printed.
    """
    begin_work()
    try:
        with tolerate_broken_streams(), signals_interrupt():
            return work()
    except UsageError as error:
        code, message = EXIT_USAGE, str(error)
    except KeyboardInterrupt as error:
        code, message = code_of_interruption(error), interrupted
    except SystemExit:
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if debug:
            traceback.print_exc()
        code = failed
        message = in_words(error) if isinstance(error, expected) else (explain or unexpected)(error)
    if report is not None:
        return report(code, message)
    problem(message)
    return code


@contextlib.contextmanager
def tolerate_broken_streams() -> Iterator[None]:
    """Let no text that cannot be encoded, and no closed or broken stream, end a command."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # a closed stream: else a checkpoint would get its number, and printed text
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # Python's value for a closed one; libraries need a file
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - to the process's end
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")  # a file name need not be text
    try:
        yield
    finally:
        for stream in streams:
            try:
                stream.flush()
            except OSError:
                _let_go(stream)


def unexpected(error: BaseException, where: str = "--debug shows where") -> str:
    """The message of an unexpected error, in one line."""
    if (said := known_cause(error)) is not None:
        return said
    told = f"{type(error).__name__}: {first_line(error) or 'no message'}"
    return f"{told}; a fault of the program ({where}), please report it"


def known_cause(error: BaseException) -> str | None:
    """The message of an error of this machine or its set-up; None: perhaps one of the program."""
    if isinstance(error, ModuleNotFoundError):
        return (
            f"the package {error.name!r} is not installed for {sys.executable}; use an environment "
            "that has it (`. .venv/bin/activate`), or `pip install -r requirements.txt`"
        )
    is_of_system = isinstance(error, OSError) and error.errno is not None
    return in_words(error) if is_of_system else shortage(error)


def raise_known_cause(error: BaseException) -> None:
    """In a handler that blames a file or a flag: raise an error of the machine again."""
    if known_cause(error) is not None:
        raise error
