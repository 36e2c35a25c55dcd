"""How a command ends: what went wrong in one line for people, and the exit code of the contract."""

import contextlib
import errno
import itertools
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from cifar100cli import completion, console, interrupts, ranks
from cifar100cli.catalog import DATASETS, FOLDERS
from cifar100cli.errors import (
    ChangedWeights,
    CifarError,
    DataError,
    DivergedError,
    DownloadInterrupted,
    FolderError,
    RunInterrupted,
    UsageError,
    exit_code_of,
    nearest,
)
from cifar100cli.wording import argument

ClickUsageError: Any = typer.BadParameter.__mro__[1]  # Typer carries its own copy of Click and does not export it


class _Stopped(Exception):  # noqa: N818
    """A KeyboardInterrupt on its way past Typer, which would make a plain exit of it."""

    def __init__(self, cause: KeyboardInterrupt) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Commands(TyperGroup):
    """The commands, past which Ctrl-C gets as it is.

    Typer converts each value with pydantic, whose import takes longer than all of `--help`: options that stand before
    a command are looked at only where there are any.
    """

    _has_options = True

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Part the program's own options from the command and what follows it."""
        self._has_options = not args or args[0].startswith("-")
        try:
            return super().parse_args(ctx, args)
        finally:
            self._has_options = True

    def get_params(self, ctx: Any) -> Any:
        """The program's own options; none while a command line is parsed that begins with a command."""
        return super().get_params(ctx) if self._has_options else []

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise _Stopped(stop) from None
        except ClickUsageError as error:
            if error.ctx is None and ctx.invoked_subcommand is not None:  # an option at the end that lacks its value
                error.command = f"cifar100 {ctx.invoked_subcommand}"
            raise


def leave_with(app: typer.Typer) -> NoReturn:
    """Run the command line and leave with the exit code of the contract."""
    console.use_safe_streams()
    console.set_verbosity(console.NORMAL)
    try:
        ranks.count(), ranks.rank(), ranks.local_rank()
    except UsageError as error:  # whatever is done asks for them, and so does telling what went wrong
        console.error(str(error))
        sys.exit(error.exit_code)
    grace = interrupts.GRACE if ranks.launch() else 0.0
    with interrupts.orderly(console.last_word, grace=grace):
        try:
            with _own_warnings_in_lines():
                code = _run(app)
            if ranks.count() > 1:
                for number in interrupts.SIGNALS:  # torchrun sends them to ranks that are on their way out
                    signal.signal(number, signal.SIG_IGN)
            if not code:
                ranks.leave()
        except KeyboardInterrupt as stop:
            code = _report_stop(stop)
    sys.exit(code)


@contextlib.contextmanager
def _own_warnings_in_lines() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("default", ChangedWeights)
        others, shown = warnings.showwarning, set()

        def show(message: Warning | str, category: type[Warning], *about: Any, **more: Any) -> None:
            if issubclass(category, ChangedWeights):
                if str(message) not in shown:  # a file may be read more than once
                    console.warn(str(message))
                shown.add(str(message))
            else:
                others(message, category, *about, **more)

        warnings.showwarning = show
        yield


def _run(app: typer.Typer) -> int:
    """Run the command; what went wrong is told in one line, and its exit code returned."""
    try:
        if ranks.rank() > 0:
            console.mute()
        _refuse_empty(sys.argv[1:])
        code = app(prog_name="cifar100", standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # Typer's word for Ctrl-C while it was still parsing
            console.error("interrupted")
    except _Stopped as stopped:
        raise stopped.cause from None
    except CifarError as error:
        # A loss that is no number is the same for all ranks; what is wrong with the command or the files, for all of a
        # machine.
        alike = ranks.rank() if isinstance(error, DivergedError) else ranks.local_rank()
        if alike == 0 or not isinstance(error, DivergedError | UsageError | DataError | FolderError):
            console.error(f"rank {ranks.rank()}: {error}" if ranks.rank() else str(error))
        code = error.exit_code
    except ClickUsageError as error:
        console.error(_usage_message(error))
        code = error.exit_code
    except typer.Abort:
        code = 130
    except BrokenPipeError:  # `cifar100 report | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        if console.verbosity() >= console.VERBOSE:
            raise
        console.error(_os_message(error))
        code = 1
    except ImportError as error:
        if not re.search("failed to map segment|cannot allocate memory", str(error), re.IGNORECASE):
            raise
        console.error(f"there is too little memory to load a library ({error}); look at `ulimit -v`")
        code = 1
    except (RuntimeError, MemoryError) as error:
        console.error(_torchs_message(error))
        code = 1
    return code or 0


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Raise `UsageError` for an empty word: a shell variable without a value must not be the current folder, say."""
    for before, word in itertools.pairwise(["", *arguments]):
        if not word or (word.startswith("--") and word.endswith("=") and word.count("=") == 1):
            option = word.rstrip("=") or (before if before.startswith("-") else "an argument")
            raise UsageError(f"{option} is empty: give it a value (a shell variable may be unset), or leave it out")


def _torchs_message(error: RuntimeError | MemoryError) -> str:
    """What users can do something about; everything else is a mistake of ours, and keeps its traceback."""
    from cifar100cli import devices

    if words := devices.in_words(error):
        return words
    if ranks.is_lost(error):
        return f"another rank failed, or could not be reached, so this one stops too ({ranks.words_of(error)})"
    if (failure := devices.failure(error)) and console.verbosity() < console.VERBOSE:
        return f"{failure}; start the command again, or use --device cpu"
    raise error


def _report_stop(stop: KeyboardInterrupt) -> int:
    if ranks.rank() > 0:  # rank 0 tells it
        return exit_code_of(stop)
    if isinstance(stop, RunInterrupted):
        if stop.run_dir is None:
            console.error("interrupted before the run began: start it again")
            return exit_code_of(stop)
        saved = f"{stop.finished} of {stop.epochs} epochs are done and saved" if stop.finished else "no epoch was done"
        from cifar100cli.runs import RunDir

        console.error(f"interrupted: {saved}; resume with: {RunDir(stop.run_dir).to_go_on()}")
        return exit_code_of(stop)
    told = f": {stop}" if isinstance(stop, DownloadInterrupted) else ""
    console.error(f"interrupted{told}")
    return exit_code_of(stop)


_IN_OUR_WORDS = {  # pydantic's, by which Typer converts an option's value
    "Value error, ": "",
    "Input should be a valid integer, unable to parse string as an integer": "must be a whole number",
    "Input should be a valid number, unable to parse string as a number": "must be a number",
    "Input should be greater than or equal to": "must be at least",
    "Input should be less than or equal to": "must be at most",
}


def _usage_message(error: Any) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else getattr(error, "command", "cifar100")
    option = getattr(error, "option_name", None)
    message = error.format_message()
    if option is not None and context is not None:
        message = f"No such option: {option}{_another_option(option, context)}"
    elif context is not None and (extra := re.search(r"unexpected extra argument\S* \((.*)\)", message)):
        message += _option_before(extra[1].partition(" ")[0], context)
    for theirs, ours in _IN_OUR_WORDS.items():
        message = message.replace(theirs, ours)
    return f"{message.rstrip('.')} (`{command} --help` lists what there is)"


def _options(command: Any) -> list[str]:
    return [name for one in command.params for name in (*one.opts, *one.secondary_opts) if name.startswith("--")]


def _option_before(word: str, context: Any) -> str:
    """The option that may have been forgotten before a word which the command does not take by itself."""
    known = _options(context.command)
    option_of: dict[str, str] = {}
    if "--preset" in known:
        option_of |= dict.fromkeys(completion.presets(), "--preset")
    if "--dataset" in known:
        option_of |= dict.fromkeys(FOLDERS if context.info_name == "download" else DATASETS, "--dataset")
    if "--preset" in known and word.lower().endswith((".yaml", ".yml")):
        option_of = {word: "--preset"}
    elif "--teacher" in known and word not in option_of and os.access(word, os.F_OK):
        option_of = {word: "--teacher"}
    near = nearest(word, option_of, cutoff=0.8)  # little is known of what was meant: only a slip counts
    return f"; did you mean {option_of[near]} {argument(near)}?" if near is not None else ""


def _another_option(option: str, context: Any) -> str:
    """What may have been meant by an unknown option: that of another command, or the nearest of this one."""
    commands = getattr(context.find_root().command, "commands", {})
    others = [name for name, other in commands.items() if option in _options(other)]
    if others:
        has = "has" if len(others) == 1 else "have"
        return f", which {' and '.join(f'`cifar100 {name}`' for name in others)} {has}"
    near = nearest(option.lstrip("-"), [name.lstrip("-") for name in _options(context.command)])
    return f"; did you mean --{near}?" if near is not None else ""


def _os_message(error: OSError) -> str:
    if error.errno == errno.ENOENT and not error.filename:  # of os.getcwd
        return "the folder that this command was called in is gone: change to another"
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}"
