"""What `import meristem` offers: load a model and use it, embed files, read vectors back."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meristem.data.records import ReadOptions
from meristem.data.tokenizer import RefusedSymbol
from meristem.errors import ConfigError, DataError
from meristem.generation.text import Generator, check_options
from meristem.inference.chunks import CHUNK_RECORDS, CHUNK_SYMBOLS
from meristem.inference.embed import EmbedOptions, default_pool, embed_files
from meristem.inference.engine import PRECISIONS, Embedder, NotFinite, TrunkRunner, best_device, best_precision
from meristem.inference.formats import Embeddings, read_embeddings
from meristem.inference.predictor import Prediction, Predictor
from meristem.inference.run import Report
from meristem.model.model import Model
from meristem.model_directory import ModelCard, load_any
from meristem.types import TokenColumn

FILES_AHEAD = 256
"""Payloads other than texts that are held in memory at once."""

__all__ = ["Embeddings", "LoadedModel", "embed", "generate", "load", "read_embeddings"]


class LoadedModel:
    """A model that is ready for sequences; `meristem.load` makes it.

    Attributes:
        card: architecture, tokenizer, labels.
        model: the torch module.
    """

    def __init__(self, card: ModelCard, model: Model, device: str):
        self.card, self.model, self.device = card, model, device

    def embed(
        self,
        sequences: Iterable[Any],
        pool: str | None = None,
        layer: int = -1,
        tokens_per_batch: int | None = None,
        precision: str = "auto",
    ) -> "np.ndarray | list[np.ndarray]":
        """Vectors of sequences, in their order.

        Args:
            sequences: payloads, as the tokenizer of the model's domain takes them from a program
                (`Tokenizer.encode_values`): texts, or paths, encoded files and arrays.
            pool: mean, cls, max, own (the model's); `none` for one vector a token; None for own, else mean.
            layer: 0 is the embedding, -1 the last.

        Returns:
            `[N, D]` float32; with `pool="none"` a list of `[n, D]`.

        Raises:
            ConfigError: a pooling or layer that the model does not have.
            DataError: a sequence that is empty or has a symbol the model does not know.

        Example:
            >>> meristem.load("runs/sample").embed(["MKTAYIAKQR", "GSHMLEDP"]).shape
        """
        pool = default_pool(self.card) if pool is None else pool
        embedder = Embedder(self._trunk(layer, tokens_per_batch, precision), pool)
        pieces: list[np.ndarray] = []
        for first, column in self._columns(sequences):
            with _naming(first):
                values = embedder.embed(column)
            pieces += np.split(values, np.cumsum(embedder.num_vectors(column))[:-1]) if pool == "none" else [values]
        if pool == "none":
            return pieces
        return np.concatenate(pieces) if pieces else np.zeros((0, embedder.width), np.float32)

    def predict(
        self, sequences: Iterable[Any], tokens_per_batch: int | None = None, precision: str = "auto"
    ) -> dict[str, Prediction]:
        """What the model's labels are for sequences (as those of `embed`), by the label's name.

        Raises:
            ConfigError: the model predicts no label.
            DataError: a sequence that is empty or has a symbol the model does not know.

        Example:
            >>> meristem.load("runs/localization").predict(["MKTAYIAKQR"])["location"].classes
        """
        predictor = Predictor(self._trunk(-1, tokens_per_batch, precision))
        pieces: dict[str, list[Prediction]] = {readout.name: [] for readout in predictor.readouts}
        for first, column in self._columns(sequences):
            with _naming(first):
                for name, piece in predictor.predict(column).items():
                    pieces[name].append(piece)
        return {
            name: Prediction(
                parts[0].readout,
                np.concatenate([part.values for part in parts]),
                np.concatenate([part.lengths for part in parts]),
            )
            for name, parts in pieces.items()
            if parts
        }

    def generate(self, prompts: Iterable[str], **options: Any) -> "list[str] | list[list[str]]":
        """Texts that go on from prompts, in their order, without the prompts.

        Args:
            options: fields of `meristem.generation.options.GenerateOptions`: max_new_tokens, temperature, top_k,
                top_p, num_beams, num_samples, stop, seed ...

        Returns:
            A text for each prompt; with `num_samples` above 1 a list of them.

        Raises:
            ConfigError: options that cannot work, or a model that cannot generate.
            DataError: a prompt that is too long or that the tokenizer refuses.

        Example:
            >>> meristem.load("runs/decoder").generate(["MKT"], max_new_tokens=20, temperature=0)
        """
        if isinstance(prompts, str):
            raise ConfigError("prompts must be a list of strings; got one string: put it in a list")
        chosen = check_options(**options)
        generator = Generator(self.model.to(self.device).eval(), self.card.tokenizer)
        made = [[sample.text for sample in samples] for samples in generator.generate(prompts, chosen)]
        return made if chosen.num_samples > 1 else [texts[0] for texts in made]

    def _trunk(self, layer: int, tokens_per_batch: int | None, precision: str) -> TrunkRunner:
        precision = best_precision(precision, self.device)
        if precision not in PRECISIONS:
            raise ConfigError(f"precision must be one of auto, {', '.join(PRECISIONS)}; got {precision!r}")
        return TrunkRunner(self.model, layer, tokens_per_batch, PRECISIONS[precision], self.device)

    def _columns(self, sequences: Iterable[Any]) -> Iterator[tuple[int, TokenColumn]]:
        one = {str: "one string", bytes: "one payload", Path: "one path"}
        for kind, name in one.items():
            if isinstance(sequences, kind):
                raise ConfigError(f"sequences must be a list; got {name}: put it in a list")
        held: list[Any] = []
        first = size = 0
        for sequence in sequences:
            if isinstance(sequence, str | bytes) and not sequence:
                raise DataError(f"sequence {first + len(held)}: empty")
            held.append(sequence)
            size += len(sequence) if isinstance(sequence, str) else CHUNK_SYMBOLS // FILES_AHEAD
            if len(held) == CHUNK_RECORDS or size >= CHUNK_SYMBOLS:
                yield first, self._encode(first, held)
                first, held, size = first + len(held), [], 0
        if held:
            yield first, self._encode(first, held)

    def _encode(self, first: int, sequences: Sequence[Any]) -> TokenColumn:
        try:
            return self.card.tokenizer.encode_values(sequences)
        except RefusedSymbol as error:
            raise DataError(f"sequence {first + error.row}: {error}") from error


class _naming:
    """Counts the sequence that an error speaks of from the first of all."""

    def __init__(self, first: int):
        self._first = first

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, NotFinite):
            raise DataError(f"sequence {self._first + error.row}: the result is not finite") from error


def load(path: Path | str, device: str | None = None, tokenizer: Mapping[str, Any] | None = None) -> LoadedModel:
    """Read a run directory, a model directory or one of another library.

    Args:
        device: cpu or cuda; None for a GPU where there is one.
        tokenizer: options of the domain's tokenizer, where they are to differ from those that the model was trained
            with. If they change the grid of positions, the model's table of positions is resampled.

    Raises:
        CheckpointError: no model, or not exactly what its config says.
        ConfigError: tokenizer options that the model cannot be used with.

    Example:
        >>> model = meristem.load("runs/sample")
        >>> model = meristem.load("runs/sample", tokenizer={"nonstandard": "x"})
    """
    return LoadedModel(*load_any(path, tokenizer), device or best_device())


def generate(model: Path | str, prompts: Iterable[str], **options: Any) -> "list[str] | list[list[str]]":
    """Texts that go on from prompts; as `load(model).generate(prompts, **options)`.

    Raises:
        UserError: as the command would.

    Example:
        >>> meristem.generate("runs/decoder", ["MKT"], max_new_tokens=20, temperature=0)
    """
    return load(model).generate(prompts, **options)


def embed(
    model: Path | str,
    inputs: "str | Path | Sequence[str | Path]",
    output: Path | str,
    *,
    on_error: str = "refuse",
    column: "str | Mapping[str, str]" = "",
    id_column: str = "",
    report: Report | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Embed files into a directory, as `meristem embed` does, and return its manifest.

    Args:
        inputs: one file or several; `-` is standard input.
        output: a directory; a run that was stopped there goes on.
        on_error: refuse, or skip records that cannot be used.
        column: column of a table that holds the payloads, or a mapping of inputs to columns.
        id_column: column of a table that holds the ids.
        options: fields of `meristem.inference.embed.EmbedOptions`: pool, layer, format, precision ...

    Raises:
        UserError: as the command would.

    Example:
        >>> meristem.embed("runs/sample", "records.csv", "vectors", pool="mean")["records"]
    """
    if on_error not in ("refuse", "skip"):
        raise ConfigError(f"on_error must be refuse or skip; got {on_error!r}")
    files = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    try:
        chosen = EmbedOptions(
            is_skipping=on_error == "skip",
            column=column,
            read=ReadOptions(id_column=id_column),
            **options,
        )
    except TypeError as error:
        raise ConfigError(f"embed: {error}") from error
    return embed_files(model, [str(file) for file in files], output, chosen, report)
