"""What `import meristem` offers beside training: each verb of the command line as a function, and loaded models."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from meristem.data.records import ReadOptions
from meristem.domain import load_domain
from meristem.errors import CheckpointError, ConfigError
from meristem.inference.embed import Embed
from meristem.inference.engine import best_device
from meristem.inference.formats import Embeddings, read_embeddings
from meristem.inference.job import Job
from meristem.inference.predict import Predict
from meristem.inference.run import Report, run_job
from meristem.inference.score import Score
from meristem.interop.library import FetchOptions, fetch_model, is_named
from meristem.loaded import LoadedModel, load, options_by_name
from meristem.model_directory import find_model, is_own, save_model, with_tokenizer_options
from meristem.model_directory import import_model as read_foreign

AnyJob = TypeVar("AnyJob", bound=Job)

__all__ = ["Embeddings", "LoadedModel", "load", "read_embeddings"]


def generate(model: Path | str, prompts: Iterable[str], **options: Any) -> "list[str] | list[list[str]]":
    """Texts that go on from prompts; as `load(model).generate(prompts, **options)`.

    Raises:
        UserError: as the command would.

    Example:
        >>> meristem.generate("runs/decoder", ["MKT"], max_new_tokens=20, temperature=0)
    """
    return load(model).generate(prompts, **options)


Files = str | Path | Sequence[str | Path]


def embed(
    model: Path | str, inputs: Files, output: Path | str, *, report: Report | None = None, **options: Any
) -> dict[str, Any]:
    """Embed files into a directory, as `meristem embed` does, and return its manifest.

    Args:
        inputs: one file or several; `-` is standard input.
        output: a directory; a run that was stopped there goes on.
        report: receives the progress.
        options: `on_error` (refuse, or skip records that cannot be used), `column` and `id_column` (of tables), and
            fields of `meristem.inference.embed.Embed`: pool, layer, format, precision ...

    Raises:
        UserError: as the command would.

    Example:
        >>> meristem.embed("runs/sample", "records.csv", "vectors", pool="mean")["records"]
    """
    return run_job(_job(Embed, options), model, _files(inputs), output, report)


def predict(
    model: Path | str, inputs: Files, output: Path | str, *, report: Report | None = None, **options: Any
) -> dict[str, Any]:
    """Label the records of files, as `meristem predict` does, and return the manifest of the table.

    Args:
        output: a .csv, .tsv or .parquet file.
        options: as of `embed`, with fields of `meristem.inference.predict.Predict`: labels, is_per_token ...

    Raises:
        UserError: as the command would.

    Example:
        >>> meristem.predict("runs/localization", "records.csv", "labels.csv")["records"]
    """
    return run_job(_job(Predict, options), model, _files(inputs), output, report)


def score(
    model: Path | str,
    inputs: Files,
    output: Path | str,
    scorer: str = "likelihood",
    *,
    scorer_options: Mapping[str, Any] | None = None,
    report: Report | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Score the records of files, as `meristem score` does, and return the manifest.

    Args:
        output: a .csv, .tsv or .parquet file; an .npz where the scorer gives arrays.
        scorer: `likelihood`, or one of a domain.
        scorer_options: options of the scorer, by name.
        options: as of `embed`, with `plots` (a folder).

    Raises:
        UserError: as the command would.

    Example:
        >>> meristem.score("runs/sample", "records.csv", "scores.csv", scorer_options={"one_pass": True})["summary"]
    """
    found = Score(scorer=scorer, domain=options.get("domain", "")).find()
    given = options_by_name("the scorer", found.options, scorer_options or {})
    job = _job(Score, {**options, "scorer": scorer, "scorer_options": given})
    return run_job(job, model, _files(inputs), output, report)


def probe(
    model: Path | str, inputs: Files, output: Path | str, label: str, tests: Files = (), **options: Any
) -> dict[str, Any]:
    """Measure what the vectors of a model tell about a label, as `meristem probe` does.

    Args:
        output: folder of `metrics.json`, `predictions.csv` and a figure.
        label: column of the label: classes or numbers.
        tests: files of test records; then all of `inputs` is for training.
        options: fields of `meristem.probing.options.ProbeOptions`: method, task, k, split ...; others as of `embed`.

    Returns:
        The content of `metrics.json`.

    Raises:
        UserError: as the command would.

    Example:
        >>> meristem.probe("runs/sample", "records.csv", "probe", label="kind", method="knn")["knn"]["accuracy"]
    """
    from meristem.probing.options import ProbeOptions
    from meristem.probing.run import probe_files

    own = {one.name for one in fields(ProbeOptions)}
    rest = {name: value for name, value in options.items() if name not in own}
    chosen = {name: value for name, value in options.items() if name in own}
    how = ProbeOptions(label=label, embed=_job(Embed, rest), **chosen)
    return probe_files(model, _files(inputs), output, how, _files(tests))


def export(model: Path | str, out: Path | str, to: str = "hf") -> list[str]:
    """Write a model as a directory that another library loads; as `load(model).export(out, to)`.

    Example:
        >>> meristem.export("runs/sample", "exported")
    """
    return load(model).export(out, to)


def import_model(
    source: Path | str,
    out: Path | str,
    *,
    domain: str = "",
    random_weights: bool = False,
    seed: int | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    inspect: Callable[[LoadedModel, Path, list[str]], None] | None = None,
) -> LoadedModel:
    """Turn a model of another library into a model directory.

    Args:
        source: a directory of another library, or `LIBRARY:MODEL`.
        out: must be new or empty.
        domain: that reads its inputs; the family's own where empty.
        random_weights: with LIBRARY:MODEL: draw the weights; otherwise they must be on this machine.
        seed: random seed of these weights; 0 where none is given.
        tokenizer: options of the domain's tokenizer that are to differ from the model's.
        inspect: is given the model as it was read, the directory of the other library that it was read from, which may
            be gone afterwards, and notes for the user.

    Raises:
        CheckpointError: a place that is taken, or a source of no supported family.
        ConfigError: options that do not go together.

    Example:
        >>> meristem.import_model("path/to/esm2_t6_8M_UR50D", "esm2_8m")
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} must be new or an empty folder; it holds something else")
    if domain:
        load_domain(domain)  # a domain that is not there is said before anything is read
    if seed is not None and not random_weights:
        raise ConfigError("--seed needs --random-weights: nothing else is drawn")
    with TemporaryDirectory() as temporary:
        notes: list[str] = []
        if is_named(str(source)):
            folder = Path(temporary) / str(source).partition(":")[2].replace("/", "_")
            notes = fetch_model(str(source), folder, FetchOptions(random_weights, seed or 0))
        elif random_weights:
            raise ConfigError(f"--random-weights needs LIBRARY:MODEL as SOURCE; got {source}")
        else:
            folder = find_model(source)
        if is_own(folder):
            raise CheckpointError(f"{source} is a model directory already; SOURCE must be a foreign one")
        card, model, imported = read_foreign(folder, domain)
        if notes:
            card = replace(card, facts={**card.facts, "weights": "; ".join(notes)})
        if inspect is not None:  # at the size that the source is for
            inspect(LoadedModel(card, model, "cpu"), folder, [*notes, *imported.notes])
        card, model = with_tokenizer_options(card, model, tokenizer or {})
        save_model(out, card, model)
    return LoadedModel(card, model, best_device())


def _files(inputs: Files) -> list[str]:
    return [str(file) for file in ([inputs] if isinstance(inputs, str | Path) else inputs)]


def _job(kind: type[AnyJob], options: Mapping[str, Any]) -> AnyJob:
    """A job with options as a program gives them."""
    given = dict(options)
    on_error, column, ids = (given.pop(name, "") for name in ("on_error", "column", "id_column"))
    if on_error not in ("", "refuse", "skip"):
        raise ConfigError(f"on_error must be refuse or skip; got {on_error!r}")
    given |= {"is_skipping": on_error == "skip", "column": column, "read": ReadOptions(id_column=ids)}
    made: AnyJob = options_by_name(kind.__name__, kind, given)
    return made
