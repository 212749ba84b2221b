"""Arguments, progress and summary that verbs share which run a model over files of records."""

import argparse
import sys
import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # importing torch takes seconds, and help needs none of it
    from meristem.inference.job import Job

AnyJob = TypeVar("AnyJob", bound="Job")

MODEL_HELP = "a run directory, a model directory or one of another library"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """With what, and of what."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="files of records; - for standard input")


def add_engine_arguments(parser: argparse.ArgumentParser, writes_file: bool = False) -> None:
    """How records are read and the model is run; and whether a file may be replaced, for verbs that write one."""
    parser.add_argument(
        "--tokens-per-batch",
        type=int,
        help="tokens run at once; by default 4096 on a CPU and 65536 on a GPU, fewer where memory is short",
    )
    parser.add_argument(
        "--precision", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 on a GPU, fp32 on a CPU"
    )
    parser.add_argument("--devices", type=int, default=1, help="GPUs (processes on a CPU) that share the work")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that read encoded files, where reading them takes long (0)"
    )
    parser.add_argument(
        "--compile",
        dest="is_compiled",
        action="store_true",
        help="let torch compile the blocks (a minute at the start; worth it on a GPU and long inputs), where it can",
    )
    parser.add_argument("--domain", default="", help="domain that reads the inputs; the model's own by default")
    parser.add_argument(
        "--on-error",
        default="refuse",
        choices=["refuse", "skip"],
        help="a record that cannot be used: refuse everything, or leave it out, name it and count it",
    )
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="COLUMN",
        help="column of a table that holds the payloads; where records have several inputs, INPUT=COLUMN for each",
    )
    parser.add_argument(
        "--id-column", default="", help="column of a table that holds the ids (id, entry, accession, mutant)"
    )
    if writes_file:
        overwrite = "replace the output file where there is one"
        parser.add_argument("--overwrite", dest="is_overwriting", action="store_true", help=overwrite)


def job_of(kind: type[AnyJob], args: argparse.Namespace, **more: Any) -> AnyJob:
    """The job that arguments say: those of `add_engine_arguments`, others that are named like a field, and `more`."""
    from meristem.data.records import ReadOptions

    given = {one.name: getattr(args, one.name) for one in fields(kind) if one.name in args}
    read = {"is_skipping": args.on_error == "skip", "read": ReadOptions(id_column=args.id_column)}
    return kind(**given | read | more)


def run_shown(kind: "type[Job]", args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Run the job of `job_of` over the inputs of a verb; shows its progress and a summary, and gives the manifest."""
    from meristem.inference.run import run_job

    with ProgressReport(kind.verb) as report:
        manifest = run_job(job_of(kind, args, **more), args.model, args.inputs, args.output, report)
    print_summary(manifest)
    return manifest


def print_summary(manifest: dict[str, Any]) -> None:
    """What was replaced, cut into windows or refused: nothing happens in silence."""
    from meristem.data.records import Refusal

    if manifest["replaced"]:
        listed = ", ".join(f"{what} {count:,}" for what, count in manifest["replaced"].items())
        print(f"replaced: {listed}")
    if manifest["windowed"]["records"]:
        print(f"longer than the model's positions, averaged over windows: {manifest['windowed']['records']:,} records")
    refused = manifest["refused"]
    for refusal in refused["records"][:5]:
        print(f"refused {Refusal(**refusal)}", file=sys.stderr)
    if refused["count"]:
        print(f"refused records: {refused['count']:,} (named in the manifest)")


def describe_engine(device: str, threads: int, precision: str, tokens_per_batch: int) -> str:
    """What was chosen, for people."""
    where = f"{threads} CPU threads" if device == "cpu" else device
    return f"on {where}, {precision}, {tokens_per_batch:,} tokens at once"


class ProgressReport:
    """Shows progress in tokens, which is what work goes by, with records beside it."""

    def __init__(self, title: str):
        self._title = title
        self._bar: Any = None
        self._records, self._began = 0, time.monotonic()

    def __enter__(self) -> "ProgressReport":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.__exit__(*error)

    def chose(self, device: str, precision: str, tokens_per_batch: int) -> None:
        import torch

        print(describe_engine(device, torch.get_num_threads(), precision, tokens_per_batch), file=sys.stderr)

    def found(self, records: int | None, tokens: int | None) -> None:
        from meristem.progress import Progress

        if records is not None:
            print(f"{records:,} records, {tokens:,} tokens", file=sys.stderr)
        self._bar = Progress(tokens, "tokens", title=self._title).__enter__()
        self._began = time.monotonic()

    def skipped(self, records: int, tokens: int) -> None:
        self._bar.skip(tokens)

    def advance(self, records: int, tokens: int) -> None:
        self._records += records
        rate = self._records / max(time.monotonic() - self._began, 1e-6)
        self._bar.advance(tokens, note=f"{rate:,.0f} records/s" if rate >= 10 else f"{rate:.2g} records/s")
