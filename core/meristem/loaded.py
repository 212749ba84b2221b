"""A model that is ready for sequences in memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from meristem.data.tokenizer import RefusedSymbol
from meristem.domain import GROUP, domain_of_model
from meristem.errors import ConfigError, DataError
from meristem.generation.options import GenerateOptions
from meristem.generation.text import Generator
from meristem.inference.chunks import CHUNK_RECORDS, CHUNK_SYMBOLS
from meristem.inference.embed import default_pool
from meristem.inference.encoding import Reading
from meristem.inference.engine import Embedder, NotFinite, best_device
from meristem.inference.job import JobOptions, too_long
from meristem.inference.predictor import Prediction, Predictor
from meristem.inference.score import RunningScore, Score
from meristem.interop.directory import write_directory
from meristem.model.model import SYMBOLS, Model
from meristem.model.transformer import EncoderDecoder
from meristem.model_directory import ModelCard, load_any
from meristem.registry import installed
from meristem.scoring.running import RunningModel
from meristem.types import TokenColumn

Result = TypeVar("Result")

FILES_AHEAD = 256
"""Payloads other than texts that are held in memory at once."""


class LoadedModel:
    """A model that is ready for sequences; `meristem.load` makes it.

    Sequences are given as a list, another iterable, or a mapping of ids to sequences, of what the tokenizer of the
    model's domain takes from a program (`Tokenizer.encode_values`): texts and objects of other libraries that hold one,
    or paths, encoded files, arrays and tensors. Where the model reads several inputs of a record, each is a mapping of
    their names to such values. Results are in their order. Where the model's domain is installed and has views of
    records for verbs such as embed, `embed`, `predict` and `score` average over the views of each sequence.

    Attributes:
        card: architecture, tokenizer, labels.
    """

    def __init__(self, card: ModelCard, model: Model, device: str):
        self.card, self.model, self.device = card, model, device

    def __repr__(self) -> str:
        config, trunk = self.card.architecture, type(self.model.trunk).__name__
        labels = [f"{one.name} ({', '.join(one.classes) or one.task})" for one in self.card.readouts]
        parts = [
            f"{trunk} of {config.total_layers} layers, width {config.width}, {config.attention.num_heads} heads",
            f"{sum(p.numel() for p in self.model.parameters()):,} parameters",
            f"domain {self.card.domain or 'none'}",
            f"labels {', '.join(labels) or 'none'}",
        ]
        return f"LoadedModel({'; '.join(parts)}; on {self.device})"

    def embed(
        self,
        sequences: Iterable[Any],
        pool: str | None = None,
        layer: int | Sequence[int] = -1,
        tokens_per_batch: int | None = None,
        precision: str = "auto",
    ) -> Any:
        """Vectors of sequences.

        Args:
            pool: mean, cls, max, own (the model's); `none` for one vector a token; None for own, else mean.
            layer: 0 is the embedding, -1 the last; several for the vectors of each.

        Returns:
            `[N, D]` float32; with `pool="none"` a list of `[n, D]`; with several layers a list of these, one a layer.

        Raises:
            ConfigError: a pooling or layer that the model does not have.
            DataError: a sequence that is empty or has a symbol the model does not know.

        Example:
            >>> model = meristem.load("runs/sample")
            >>> model.embed(["MKTAYIAKQR", "GSHMLEDP"]).shape
            >>> first, last = model.embed({"P1": "MKTAYIAKQR"}, layer=[0, -1])
        """
        pool = default_pool(self.card) if pool is None else pool
        layers = [layer] if isinstance(layer, int) else list(layer)
        options = JobOptions(tokens_per_batch=tokens_per_batch, precision=precision)
        embedders = [Embedder(options.trunk(self.model, self.device, one), pool) for one in layers]

        def vectors(column: TokenColumn) -> list[Any]:
            made = [embedder.embed(column) for embedder in embedders]
            cuts = np.cumsum(column.payload_lengths)[:-1]
            return [np.split(values, cuts) for values in made] if pool == "none" else made

        pieces = list(self._each(sequences, self._viewed(Reading.of(self.card)), vectors))
        made: list[Any] = []
        for place, embedder in enumerate(embedders):
            found = [piece[place] for piece in pieces]
            nothing = np.zeros((0, embedder.width), np.float32)
            made.append(list(chain(*found)) if pool == "none" else np.concatenate([nothing, *found]))
        return made[0] if isinstance(layer, int) else made

    def predict(
        self, sequences: Iterable[Any], tokens_per_batch: int | None = None, precision: str = "auto"
    ) -> dict[str, Prediction]:
        """What the model's labels are for sequences, by the label's name.

        Raises:
            ConfigError: the model predicts no label.
            DataError: as `embed`.

        Example:
            >>> meristem.load("runs/localization").predict(["MKTAYIAKQR"])["location"].classes
        """
        options = JobOptions(tokens_per_batch=tokens_per_batch, precision=precision)
        predictor = Predictor(options.trunk(self.model, self.device))
        pieces = list(self._each(sequences, self._viewed(Reading.of(self.card)), predictor.predict))
        return {
            readout.name: Prediction(
                readout,
                np.concatenate([piece[readout.name].values for piece in pieces]),
                np.concatenate([piece[readout.name].lengths for piece in pieces]),
            )
            for readout in (predictor.readouts if pieces else ())
        }

    def score(
        self,
        sequences: Iterable[Any],
        scorer: str = "likelihood",
        tokens_per_batch: int | None = None,
        precision: str = "auto",
        **options: Any,
    ) -> list[Any]:
        """What a scorer says of each sequence: a mapping of columns to values, or an array.

        Args:
            scorer: `likelihood`, or one of the model's domain.
            options: of the scorer, by name.

        Raises:
            ConfigError: a scorer or an option that is not there, or a model that cannot be scored so.
            DataError: as `embed`, or a sequence longer than the model's positions allow.

        Example:
            >>> meristem.load("runs/sample").score(["MKTAYIAKQR"])[0]["log_likelihood"]
        """
        domain = self.card.domain if self.card.domain in installed(GROUP) else ""
        chosen = options_by_name("the scorer", Score(scorer=scorer, domain=domain).find().options, options)
        job = Score(
            scorer=scorer, scorer_options=chosen, domain=domain, tokens_per_batch=tokens_per_batch, precision=precision
        )
        running = RunningScore(job, self.card, self.model, self.device)
        results = self._each(
            sequences, self._viewed(running.reading), lambda column: list(running.results(column)), running.unfit
        )
        return list(chain(*results))

    def logits(
        self, sequences: Iterable[Any], tokens_per_batch: int | None = None, precision: str = "auto"
    ) -> list[np.ndarray]:
        """Logits of every symbol (`card.tokenizer.vocab`) at each token of each sequence.

        Of a bidirectional model they speak of the token itself, which it sees; of a decoder, of the next one.

        Returns:
            A list of `[n, V]` float32, without the special tokens.

        Raises:
            ConfigError: the model predicts no symbols, or is an encoder-decoder.
            DataError: as `score`.

        Example:
            >>> meristem.load("runs/sample").logits(["MKTAYIAKQR"])[0].shape
        """
        self.model.head(SYMBOLS)
        if isinstance(self.model.trunk, EncoderDecoder):
            raise ConfigError("logits are those of a model of one stack; score an encoder-decoder, or generate with it")
        trunk = JobOptions(tokens_per_batch=tokens_per_batch, precision=precision).trunk(self.model, self.device)
        running = RunningModel(trunk.runnable, self.card.tokenizer, trunk.budget)
        unfit = partial(too_long, limit=self.model.config.max_length)
        return list(chain(*self._each(sequences, Reading.of(self.card), running.logits, unfit)))

    def export(self, out: Path | str, to: str = "hf") -> list[str]:
        """Write the model as a directory that another library loads.

        Args:
            out: must be new or empty.
            to: the library: `hf`, or another that is installed (entry points `meristem.libraries`).

        Returns:
            Notes: what the other library has no place for.

        Raises:
            ConfigError: no such library, or none of its families can say the architecture.
            CheckpointError: the place is taken.

        Example:
            >>> meristem.load("runs/sample").export("exported")
        """
        return write_directory(Path(out), self.card.architecture, self.card.tokenizer, self.model, to)

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
        chosen = options_by_name("generate", GenerateOptions, options)
        generator = Generator(self.model.to(self.device).eval(), self.card.tokenizer)
        made = [[sample.text for sample in samples] for samples in generator.generate(prompts, chosen)]
        return made if chosen.num_samples > 1 else [texts[0] for texts in made]

    def _viewed(self, reading: Reading) -> Reading:
        """A reading with the views that verbs run in the place of a record."""
        if self.card.domain not in installed(GROUP):
            return reading
        domain = domain_of_model("", self.card.domain)
        return replace(reading, views=domain.build_verb_views(self.card.tokenizer))

    def _each(
        self,
        sequences: Iterable[Any],
        reading: Reading,
        work: Callable[[TokenColumn], Result],
        unfit: Callable[[TokenColumn], Mapping[int, str]] = lambda column: {},
    ) -> Iterator[Result]:
        """What `work` gives for columns of the sequences; errors name a sequence by its number, also an unfit one."""
        is_one = isinstance(sequences, str) or hasattr(sequences, "__bytes__") or hasattr(sequences, "seq")
        if is_one or not isinstance(sequences, Iterable):
            got = "a single one: put it in a list" if is_one else type(sequences).__name__
            raise ConfigError(f"sequences must be a list, or a mapping of ids to sequences; got {got}")
        first = 0
        for held in _chunks(sequences.values() if isinstance(sequences, Mapping) else sequences):
            try:
                column = reading.values(held)
            except RefusedSymbol as error:
                raise DataError(f"sequence {first + error.row}: {error}") from error
            for row, reason in unfit(column).items():
                raise DataError(f"sequence {first + row}: {reason}")
            try:
                result = work(column)
            except NotFinite as error:
                raise DataError(f"sequence {first + error.row}: the result is not finite") from error
            yield result
            first += len(held)


def _chunks(sequences: Iterable[Any]) -> Iterator[list[Any]]:
    held: list[Any] = []
    size = 0
    for sequence in sequences:
        held.append(sequence)
        size += len(sequence) if isinstance(sequence, str) else CHUNK_SYMBOLS // FILES_AHEAD
        if len(held) == CHUNK_RECORDS or size >= CHUNK_SYMBOLS:
            yield held
            held, size = [], 0
    if held:
        yield held


def load(path: Path | str, device: str | None = None, tokenizer: Mapping[str, Any] | None = None) -> LoadedModel:
    """Read a run directory, a model directory or one of another library.

    Args:
        device: `cpu`, `cuda` or one of several GPUs (`cuda:1`); None for a GPU where there is one.
        tokenizer: options of the domain's tokenizer, where they are to differ from those that the model was trained
            with. If they change the grid of positions, the model's table of positions is resampled.

    Raises:
        CheckpointError: no model, or not exactly what its config says.
        ConfigError: tokenizer options that the model cannot be used with, or a device that is not there.

    Example:
        >>> model = meristem.load("runs/sample")
        >>> model = meristem.load("runs/sample", tokenizer={"nonstandard": "x"})
    """
    device = best_device() if device is None else device
    there = ["cpu", *(["cuda", *(f"cuda:{i}" for i in range(num))] if (num := torch.cuda.device_count()) else [])]
    if device not in there:
        raise ConfigError(f"device must be one of {', '.join(there)} on this machine; got {device!r}")
    card, model = load_any(path, tokenizer)
    return LoadedModel(card, model, device)


def options_by_name(owner: str, kind: type, given: Mapping[str, Any]) -> Any:
    """Options as a program gives them by name.

    Args:
        owner: whose options they are, as messages call it.
        kind: dataclass of the options.

    Raises:
        ConfigError: one that is not there, or that cannot work.
    """
    known = [one.name for one in fields(kind)]
    for name in given:
        if name not in known:
            raise ConfigError(f"options of {owner} are {', '.join(known) or 'none'}; got {name!r}")
    try:
        return kind(**given)
    except TypeError as error:
        raise ConfigError(f"options of {owner}: {error}") from error
