"""`meristem generate MODEL --prompt TEXT | --prompts FILE`: go on from prompts."""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meristem.cli.jobs import MODEL_HELP, ProgressReport, add_engine_arguments, job_of, print_summary
from meristem.cli.options import add_options, options_of
from meristem.errors import ConfigError
from meristem.generation.options import GenerateOptions

if TYPE_CHECKING:  # importing torch takes seconds, and help needs none of it
    from meristem.inference.generate import Generate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="to go on from; may be repeated")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="a .txt file with one prompt a line, or - for standard input; another file is read as the model's domain "
        "reads records",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="a .jsonl file of all samples, which goes on where it was stopped; the terminal by default",
    )
    parser.add_argument(
        "--temperature", type=float, help="1 draws as the model says, 0 takes the likeliest token (1; 0 with --beams)"
    )
    parser.add_argument(
        "--beams", type=int, default=1, dest="num_beams", metavar="BEAMS", help="beams of a beam search; 1 for none"
    )
    parser.add_argument("--num-samples", "-n", type=int, default=1, help="texts for each prompt")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="a sample ends where this text comes; may be repeated",
    )
    own = ("temperature", "num_beams", "num_samples", "stop", "batch_size")
    add_options(parser, GenerateOptions, "how tokens are chosen", own)
    add_engine_arguments(parser, writes_file=True)
    parser.set_defaults(precision="fp32")


def run(args: argparse.Namespace) -> int:
    from meristem.inference.generate import GIVEN, Generate
    from meristem.inference.run import run_job

    if bool(args.prompt) == bool(args.prompts):
        raise ConfigError("one of --prompt TEXT and --prompts FILE must be given")
    if args.temperature is None:
        args.temperature = 1.0 if args.num_beams == 1 else 0.0
    args.stop, args.batch_size = tuple(args.stop), GenerateOptions.batch_size
    options = options_of(args, GenerateOptions)
    job = job_of(Generate, args, options=options, prompts=tuple(args.prompt))
    if not args.output and len(args.prompt) == options.num_sequences == 1 and sys.stdout.isatty():
        return _stream(args.model, job)
    inputs = [args.prompts or GIVEN]
    # without a file that was asked for, texts are shown when all are there
    with tempfile.TemporaryDirectory() if not args.output else nullcontext() as folder:
        output = Path(folder) / "texts.jsonl" if folder else Path(args.output)
        with ProgressReport("generate") as report:
            manifest = run_job(job, args.model, inputs, output, report)
        if folder:
            for row in _rows(output):
                print(f"{row['prompt']}{row['text']}", flush=True)
            return 0
    print_summary(manifest)
    tokens = sum(len(row["ids"]) for row in _rows(output))
    print(f"{manifest['rows']:,} texts of {tokens:,} tokens for {manifest['records']:,} prompts in {output}")
    return 0


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def _stream(path: str, job: "Generate") -> int:
    """Generate one text and print each token as soon as it is generated."""
    from meristem.inference.engine import best_device
    from meristem.inference.generate import RunningGenerate
    from meristem.model_directory import load_any

    [prompt] = job.prompts
    running = RunningGenerate(job, *load_any(path, job.tokenizer), best_device())
    print(prompt, end="", flush=True)
    say = lambda number, sample, piece: print(piece, end="", flush=True)  # noqa: E731
    list(running.generator.generate([prompt], job.options, say))
    print(flush=True)
    return 0
