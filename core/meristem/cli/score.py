"""`meristem score MODEL INPUT... --output FILE`: how likely tokens are, which touch, or where a model looks."""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meristem.model.model import Model
    from meristem.model_directory import ModelCard
    from meristem.types import TokenColumn

    Scored = tuple[str, TokenColumn]
    """The id of a record, and its tokens as a column of one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to score, with what, and where to."""
    parser.add_argument("model", metavar="MODEL", help="a run directory, a model directory or one of another library")
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="files of records; - for standard input")
    parser.add_argument(
        "--output",
        required=True,
        help="with --contacts or --attention an .npz, one array a record by its id; else a .csv or .parquet, one row a "
        "record",
    )
    parser.add_argument("--contacts", action="store_true", help="score which tokens touch, from attention maps")
    parser.add_argument(
        "--attention", action="store_true", help="attention over the patches of each image, [heads, rows, columns]"
    )
    parser.add_argument("--layer", type=int, help="with --attention: the block, 0 is the first; the last by default")
    parser.add_argument(
        "--query",
        choices=["class", "mean"],
        help="with --attention: who looks, the class row or the mean of the patches; class where there is one",
    )
    parser.add_argument(
        "--one-pass",
        action="store_true",
        help="for bidirectional models: one run a record without masks, an approximation (wild-type marginal)",
    )
    parser.add_argument(
        "--closing", action="store_true", help="for causal models: score the special tokens behind a record too"
    )
    parser.add_argument(
        "--prefix-tokens", type=int, help="for prefix language models: tokens of the prefix, which are not scored"
    )
    parser.add_argument("--plots", metavar="FOLDER", help="with arrays: one PNG a record, in this folder")
    parser.add_argument("--domain", default="", help="domain that reads the input; the model's own by default")
    parser.add_argument("--tokens-per-batch", type=int, default=8192, help="tokens that a pack holds at most")


def run(args: argparse.Namespace) -> int:
    """Score every record, then put the output in its place."""
    import torch

    from meristem.errors import ConfigError
    from meristem.model_directory import load_any

    output = Path(args.output)
    has_arrays = args.contacts or args.attention
    kinds = [".npz"] if has_arrays else [".csv", ".parquet"]
    if output.suffix not in kinds:
        raise ConfigError(f"--output must end in {' or '.join(kinds)}; got {args.output}")
    if args.contacts and args.attention:
        raise ConfigError("--contacts and --attention are arrays of two kinds; give one of them")
    if args.plots and not has_arrays:
        raise ConfigError("--plots has no effect without --contacts or --attention; give both or none")
    if not args.attention and (args.layer is not None or args.query is not None):
        raise ConfigError("--layer and --query have no effect without --attention; leave them out")
    if args.tokens_per_batch < 1:
        raise ConfigError(f"--tokens-per-batch must be 1 or more; got {args.tokens_per_batch}")
    card, model = load_any(args.model, args.tokenizer)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    part = output.with_name(output.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    replaced: Counter[str] = Counter()
    records = _records(args, card, model, replaced)
    try:
        write = _write_contacts if args.contacts else _write_attention if args.attention else _write_likelihoods
        write(args, card, model, records, part)
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)
    if replaced:
        print(f"replaced: {', '.join(f'{what} {count:,}' for what, count in replaced.items())}")
    print(f"wrote {output}")
    return 0


def _write_contacts(
    args: argparse.Namespace, card: "ModelCard", model: "Model", records: Iterator["Scored"], part: Path
) -> None:
    from meristem.scoring.contacts import contact_maps, has_contact_weights

    is_probability = has_contact_weights(model)
    _write_arrays(
        args,
        records,
        part,
        lambda column: next(contact_maps(model, column, card.tokenizer.num_special)),
        lambda path, name, column, values: _plot_contacts(path, name, values, is_probability),
    )
    print(
        "probabilities of contact, by the model's own logistic regression"
        if is_probability
        else "scores that rank, not probabilities: the model has no weights for contacts, so they are the mean of its "
        "attention maps, made symmetric and corrected for the average product"
    )
    if args.plots:
        print(f"plots in {args.plots}")


def _write_attention(
    args: argparse.Namespace, card: "ModelCard", model: "Model", records: Iterator["Scored"], part: Path
) -> None:
    from meristem.scoring.attention_maps import attention_maps, draw_attention

    layer = -1 if args.layer is None else args.layer

    def draw(path: Path, name: str, column: "TokenColumn", values: Any) -> None:
        image = card.tokenizer.decode(card.tokenizer.tokens_at(column, 0))
        draw_attention(path, values, image, name)

    _write_arrays(args, records, part, lambda column: next(attention_maps(model, column, layer, args.query)), draw)
    if args.plots:
        print(f"plots in {args.plots}")


def _write_arrays(
    args: argparse.Namespace,
    records: Iterator["Scored"],
    part: Path,
    make: Callable[["TokenColumn"], Any],
    draw: Callable[[Path, str, "TokenColumn", Any], None],
) -> None:
    """An array a record by its id, and its picture where they are asked for."""
    import zipfile

    import numpy as np

    from meristem.progress import Progress

    seen: Counter[str] = Counter()
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as file, Progress(None, "records", title="score") as bar:
        for name, column in records:
            values = make(column)
            seen[name] += 1
            key = name if seen[name] == 1 else f"{name}#{seen[name]}"
            with file.open(f"{key}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, values)
            if args.plots:
                draw(_picture(Path(args.plots), sum(seen.values()), key), key, column, values)
            bar.advance()
    repeated = sum(count - 1 for count in seen.values())
    print(f"{sum(seen.values())} maps" + (f"; {repeated} repeated ids end in #2, #3 ..." if repeated else ""))


def _write_likelihoods(
    args: argparse.Namespace, card: "ModelCard", model: "Model", records: Iterator["Scored"], part: Path
) -> None:
    import math

    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet
    import torch

    from meristem.errors import DataError
    from meristem.inference.trunks import runnable_trunk
    from meristem.progress import Progress
    from meristem.scoring.likelihood import LikelihoodOptions, score_column
    from meristem.scoring.running import RunningModel

    options = LikelihoodOptions(one_pass=args.one_pass, closing=args.closing, prefix_tokens=args.prefix_tokens)
    trunk = runnable_trunk(model, torch.float32)
    rows = []
    with Progress(None, "tokens", title="score") as bar:
        running = RunningModel(model.over(trunk), card.tokenizer, args.tokens_per_batch, bar.advance)
        for name, column in records:
            [row] = score_column(running, column, options)
            if not math.isfinite(row["log_likelihood"]):
                raise DataError(f"record {name!r}: its likelihood is not finite; the model is damaged")
            rows.append({"id": name, **row})
    table = pa.Table.from_pylist(rows)
    if part.suffixes[-2] == ".csv":
        pa.csv.write_csv(table, part)
    else:
        pa.parquet.write_table(table, part)
    print(f"{len(table)} records; log_likelihood in nats")


def _records(
    args: argparse.Namespace, card: "ModelCard", model: "Model", replaced: "Counter[str]"
) -> Iterator["Scored"]:
    """Each record of the inputs, and in `replaced` a count of what was."""
    from meristem.data.records import PAYLOAD, ReadOptions, Source, place_of
    from meristem.data.tokenizer import RefusedSymbol
    from meristem.domain import load_domain
    from meristem.errors import ConfigError, DataError

    name = args.domain or card.domain
    if not name:
        raise ConfigError("the model names no domain; say which one reads the input with --domain")
    domain = load_domain(name)
    limit = model.config.max_length
    for source in args.inputs:
        for batch in domain.reader.read(Source(source), ReadOptions()):
            for row in range(len(batch)):
                where = place_of(*(batch.column(name)[row].as_py() for name in ("file", "line", "id")))
                try:
                    column = card.tokenizer.encode_column(batch.column(PAYLOAD).slice(row, 1))
                except RefusedSymbol as error:
                    raise DataError(f"{where}: {error}") from error
                if limit is not None and len(column.ids) > limit:
                    allowed = limit - sum(card.tokenizer.num_special)
                    got = len(column.ids) - sum(card.tokenizer.num_special)
                    raise DataError(f"{where}: a record must be {allowed} tokens or fewer for this model; got {got}")
                replaced.update(column.replaced)
                yield batch.column("id")[row].as_py(), column


def _picture(folder: Path, number: int, name: str) -> Path:
    """Where the picture of a record goes."""
    import re

    folder.mkdir(parents=True, exist_ok=True)
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:80]
    return folder / f"{number:05}_{safe}.png"


def _plot_contacts(path: Path, name: str, values: Any, is_probability: bool) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    end = len(values) + 0.5
    top = 1.0 if is_probability else None
    image = axes.imshow(
        values,
        cmap="Blues",
        origin="lower",
        extent=(0.5, end, 0.5, end),
        vmin=0.0 if is_probability else None,
        vmax=top,
    )
    figure.colorbar(image, label="probability of contact" if is_probability else "mean APC-corrected attention")
    axes.set(title=name, xlabel="token", ylabel="token")
    figure.savefig(path, dpi=120)
