"""`meristem VERB ...`: finds the verb, runs it, and turns what it raises into one line and an exit code."""

import argparse
import difflib
import errno
import importlib
import os
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from tempfile import NamedTemporaryFile
from types import FrameType
from typing import Any

from meristem import __version__
from meristem.cli.configs import shipped_configs
from meristem.cli.tokenizer_options import take_tokenizer_options
from meristem.errors import ConfigError, DataWarning, PackageWarning, UserError

DONE, FAULT, WRONG_INPUT, INTERRUPTED, PIPE_CLOSED, TERMINATED = 0, 1, 2, 130, 141, 143

REFUSALS = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
"""Errors of the operating system that the user can mend and we cannot, as is a full disk."""


TOKENIZER_HELP = """Options of the tokenizer of the model's domain are taken as well, where it is to be another
than the model's (see the documentation of the domain).

"""


HELP = """usage: meristem VERB ... [--debug]

One transformer core; every domain grows from it.

{}

  meristem VERB --help shows the arguments of a verb; --version the version;
  --debug keeps the traceback of an error on the screen.

exit codes: 0 done, 2 the input or the config is wrong, 1 a fault of ours, 130 Ctrl-C, 143 SIGTERM"""


class Parser(argparse.ArgumentParser):
    """Arguments that are wrong are a user's error like any other: one line."""

    def error(self, message: str) -> "None":  # type: ignore[override]
        raise ConfigError(f"{message} (see {self.prog} --help)")


@dataclass(frozen=True)
class Verb:
    """A verb; `meristem.cli` says what its module defines.

    Attributes:
        module: imported when the verb is called, not before.
        help: one line.
        example: a command that works as typed, but for file names.
        reads_model: it takes options of the tokenizer of the model's domain as well.
    """

    module: str
    help: str
    example: str
    reads_model: bool = False

    def call(self, name: str, argv: list[str]) -> int:
        """Parse what stands behind the verb and run it."""
        module, parser = importlib.import_module(self.module), self.parser(name)
        if hasattr(module, "run_argv"):
            return int(module.run_argv(argv, parser))
        module.add_arguments(parser)
        if not self.reads_model:
            return int(module.run(parser.parse_args(argv)))
        argv, tokenizer = take_tokenizer_options(parser, argv)
        return int(module.run(parser.parse_args(argv, argparse.Namespace(tokenizer=tokenizer))))

    def parser(self, name: str) -> Parser:
        """A parser that has no arguments yet."""
        return Parser(
            prog=f"meristem {name}",
            description=self.help,
            epilog=f"{TOKENIZER_HELP if self.reads_model else ''}example:\n  {self.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )


SAMPLE = next((name for name in shipped_configs() if name.endswith("/sample")), "config.yaml")
"""A config that trains on the sample of its domain."""

VERBS: dict[str, Verb] = {
    "fit": Verb(
        "meristem.cli.fit",
        "train a model from a config, or go on where the run stopped",
        f"meristem fit --config {SAMPLE} --trainer.max_steps 200",
    ),
    "validate": Verb(
        "meristem.cli.fit",
        "measure a trained model on the validation part of its data",
        "meristem validate --config runs/sample/config.yaml",
    ),
    "test": Verb(
        "meristem.cli.fit",
        "measure a trained model on the test part of its data",
        "meristem test --config runs/tuned/config.yaml",
    ),
    "config": Verb(
        "meristem.cli.config",
        "list every key of a config with its type, its default and its meaning",
        f"meristem config --print --config {SAMPLE}",
    ),
    "embed": Verb(
        "meristem.cli.embed",
        "write one vector a record, or one a token, in input order",
        "meristem embed runs/sample/model records.csv --output vectors",
        reads_model=True,
    ),
    "predict": Verb(
        "meristem.cli.predict",
        "write labels, probabilities or values from a fine-tuned model",
        "meristem predict runs/tuned/model records.csv --output labels.csv",
        reads_model=True,
    ),
    "probe": Verb(
        "meristem.cli.probe",
        "measure what the vectors of a model tell about a label: linear map and nearest neighbours",
        "meristem probe runs/sample/model records.csv --label kind --output probe",
        reads_model=True,
    ),
    "generate": Verb(
        "meristem.cli.generate",
        "go on from prompts: greedy, drawn, or by beam search",
        "meristem generate runs/decoder/model --prompt MKT --temperature 0.8 --top-p 0.95",
        reads_model=True,
    ),
    "score": Verb(
        "meristem.cli.score",
        "write how likely records are, or what a scorer of a domain says of them",
        "meristem score runs/sample/model records.csv --output scores.csv",
        reads_model=True,
    ),
    "import": Verb(
        "meristem.cli.import_model",
        "turn a foreign checkpoint into a model directory, with a parity report",
        "meristem import path/to/esm2_t6_8M_UR50D esm2_8m",
        reads_model=True,
    ),
    "export": Verb(
        "meristem.cli.export_model",
        "turn a model directory into one that another library loads",
        "meristem export runs/sample/model exported --to hf",
    ),
    "inspect": Verb(
        "meristem.cli.inspect",
        "show architecture, parameters, FLOPs a token, memory and vocabulary",
        "meristem inspect runs/sample/model",
    ),
    "domains": Verb(
        "meristem.cli.domains",
        "list the installed domains, write a new one, or check one",
        "meristem domains new lab_rna && pip install -e lab_rna && meristem domains check lab_rna",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `meristem` with these arguments (those of the process by default) and return the exit code.

    0 done; 2 the input, the config or the arguments are wrong; 1 our fault; 130 Ctrl-C; 143 SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        with _terminate_as_exit(), _warnings_as_lines():
            code = _dispatch(arguments)
            sys.stdout.flush()
            return code
    except SystemExit as stop:  # argparse's --help, and SIGTERM
        return stop.code if isinstance(stop.code, int) else DONE if stop.code is None else FAULT
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and _is_reader_gone():
            # stdout at nothing, so that the interpreter's last flush does not complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return PIPE_CLOSED
        return _report(error, arguments, is_debug)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        verbs = "\n".join(f"  {name:<10}{verb.help}\n  {'':<10}  $ {verb.example}" for name, verb in VERBS.items())
        print(HELP.format(verbs), file=sys.stdout if arguments else sys.stderr)
        return DONE if arguments else WRONG_INPUT
    if arguments[0] == "--version":
        print(f"meristem {__version__}")
        return DONE
    name = arguments[0]
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"nearest: {near[0]}" if near else f"verbs: {', '.join(VERBS)}"
        raise ConfigError(f"no verb {name!r}; {hint} (see meristem --help)")
    return VERBS[name].call(name, arguments[1:])


def _report(error: BaseException, arguments: list[str], is_debug: bool) -> int:
    """One line on stderr; the traceback is shown or kept."""
    if is_debug:
        traceback.print_exception(error)
    if trouble := str(error) if isinstance(error, UserError) else _disk_trouble(error, arguments):
        _say(f"error: {trouble}")
        return WRONG_INPUT
    line = f"fault: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if not is_debug:
        line += "; run again with --debug for the traceback"
        # a run of days is not run again lightly
        with suppress(OSError), NamedTemporaryFile("w", prefix="meristem-fault-", suffix=".txt", delete=False) as file:
            traceback.print_exception(error, file=file)
            line += f" (kept in {file.name})"
    _say(line)
    return FAULT


def _disk_trouble(error: BaseException, arguments: list[str]) -> str:
    """What the operating system refused, with the file; empty where it refused nothing."""
    # writers in other languages (Arrow, HDF5, safetensors) hide the number in their text
    number = error.errno if isinstance(error, OSError) else None
    is_full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)
    if not (is_full or number in REFUSALS):
        return ""
    name = getattr(error, "filename", None)
    if name is None and "--output" in arguments[:-1]:
        name = arguments[arguments.index("--output") + 1]
    reason = getattr(error, "strerror", None) or ("No space left on device" if is_full else str(error))
    return f"{name or 'output'}: {reason}" + ("; free space or name another place" if is_full else "")


def _say(text: str) -> None:
    print(f"meristem: {' '.join(text.splitlines())}", file=sys.stderr)


@contextmanager
def _terminate_as_exit() -> Iterator[None]:
    """SIGTERM unwinds the stack like Ctrl-C does, so that verbs leave things resumable."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    old = None
    with suppress(ValueError):  # not the main thread, where handlers cannot be set
        old = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if old is not None:
            signal.signal(signal.SIGTERM, old)


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print each warning of our own as one line, without the place in the code that raised it."""
    show = warnings.showwarning

    def say(message: Warning | str, category: type[Warning], *args: Any, **options: Any) -> None:
        if issubclass(category, PackageWarning):
            _say(f"warning: {message}")
        elif issubclass(category, DataWarning):
            _say(f"note: {message}")
        else:
            show(message, category, *args, **options)

    with warnings.catch_warnings():
        warnings.showwarning = say
        yield


def _is_reader_gone() -> bool:
    """Whether stdout is a pipe that nobody reads any more (`meristem ... | head`)."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLERR)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False


if __name__ == "__main__":
    sys.exit(main())
