"""The data of a run: from the user's files to the packs of each step."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning as L
import numpy as np

from meristem.data.loader import EvalLoader, TrainLoader
from meristem.data.pack_maker import PackMaker
from meristem.data.parts import Part, RunData
from meristem.data.records import ReadOptions, Refusal, Source, columns_of
from meristem.data.split import require_whole_groups, split_by_column, split_by_hash, split_by_similarity
from meristem.data.store import RecordStore
from meristem.data.tokenizer import Tokenizer
from meristem.data.views import Views
from meristem.domain import Domain, load_domain
from meristem.errors import ConfigError, DataError, require
from meristem.model.grid import with_grid
from meristem.model_directory import InputCard
from meristem.objectives.objective import Objective
from meristem.train.ranks import Ranks
from meristem.train.spec import DataSpec
from meristem.train.task import Task

SAMPLE = "@sample"


class DataModule(L.LightningDataModule):
    """Reads the records, deals them to parts, and makes packs; `seed` is that of their order and corruption."""

    def __init__(self, spec: DataSpec, seed: int = 0):
        super().__init__()
        self.spec, self.seed = spec, seed
        self.domain: Domain = load_domain(spec.domain)
        self.sources = [str(self.domain.sample) if path == SAMPLE else path for path in _listed(spec.sources)]
        self.tokenizer: Tokenizer = self.domain.build_tokenizer(**(spec.tokenizer or {}))
        self.inputs = spec.inputs or {}
        self.owners = {name: load_domain(one.domain or spec.domain) for name, one in self.inputs.items()}
        self.input_cards = {
            name: InputCard(owner.name, owner.build_tokenizer(**(self.inputs[name].tokenizer or {})))
            for name, owner in self.owners.items()
        }
        self.views: Views | None = self._build_views()
        if spec.split.method == "similarity":  # what cannot be compared is refused before anything is read
            self.similarity = self.domain.similarity_with(spec.split.k, spec.split.threshold)
        self.max_tokens_per_record = spec.max_tokens_per_record
        self.remarks: list[str] = []
        self.refused: list[Refusal] = []
        self.parts: dict[str, Part] = {}
        self.limits: dict[str, int | float] = {}
        self.build_progress: Callable[[int, int], None] | None = None
        if not self.sources:
            raise ConfigError("data.sources must be set: one file or more (--data.sources FILE, or in the config)")
        if (weights := spec.weights) is not None:
            are_right = len(weights) == len(self.sources) and all(0 < one < np.inf for one in weights)
            rule = "data.weights must be one finite number above 0 for each of data.sources"
            require(are_right, f"{rule} ({len(self.sources)})", weights)

    def _build_views(self) -> Views | None:
        options = self.spec.views
        return None if options is None else self.domain.build_views(self.tokenizer, **options)

    def bind(self, task: Task) -> None:
        """Read and deal the records, and bind the task's objective to them: before anything is written.

        Raises:
            DataError: by file and line.
            ConfigError: data and model do not fit.
        """
        objective, given = task.objective, task.init_card
        self.objective: Objective = objective
        rule = "data.inputs must name inputs of the objective behind its first one, which data.tokenizer reads"
        known, rows = objective.inputs[1:], task.architecture.embedding.vocab_size
        for name in self.inputs:
            require(name in known, f"{rule}: {', '.join(known) or 'none'}", repr(name))
        for name, tokenizer in self.others.items():
            if (needed := len(tokenizer.vocab)) > rows:
                raise ConfigError(
                    f"the input {name!r} has {needed} symbols, and the model rows for {rows}; "
                    f"set model.architecture.embedding.vocab_size to {needed} or more"
                )
        if given is not None:
            self.tokenizer = given.tokenizer.adapted(self.domain.build_tokenizer, self.spec.tokenizer or {})
            task.architecture = with_grid(task.architecture, self.tokenizer.grid)
            for name, one in given.inputs.items():
                if name in self.inputs:
                    build, options = self.owners[name].build_tokenizer, self.inputs[name].tokenizer or {}
                    own = given.tokenizer_of(name).adapted(build, options)
                    self.input_cards[name] = InputCard(self.owners[name].name, own)
                elif one.tokenizer is not None and name in objective.inputs[1:]:
                    self.input_cards[name] = one
            self.views = self._build_views()
        store = self._store(self.sources, self.read_options(objective, self.spec.split.column))
        parts = {name: Part(store, rows) for name, rows in self._deal(store).items()}
        if more := _listed(self.spec.validation_sources):
            other = self._store(more, self.read_options(objective))
            parts["validation"] = Part(other, np.arange(len(other)))
            require_whole_groups([(name, part.store, part.rows) for name, part in parts.items()])
        parts = {name: Part(part.store, self._usable(part.store, part.rows)) for name, part in parts.items()}
        self.parts = {name: part for name, part in parts.items() if len(part)}
        if "train" not in self.parts:
            raise DataError(f"{', '.join(self.sources)}: no record is left for training; see data.split")
        objective.bind_model(task.architecture)
        missing = tuple(self.spec.missing_labels or ())
        objective.bind(RunData(self.tokenizer, self.parts, missing, self.others, self._skip))
        self._require_sources(store)
        if self.refused:
            listed = f"{len(self.refused):,} record(s) refused and left out, listed in refused.csv"
            self.remarks.append(f"{listed}, the first: {self.refused[0]}")
        self.remarks += objective.remarks
        self._position_limit = task.architecture.max_length
        # a window of the rows of patches would not be a grid
        wanted = None if self.tokenizer.num_features else self.max_tokens_per_record
        self.max_tokens_per_record = min((one for one in (wanted, self._position_limit) if one), default=None)
        self.remarks.append(self._summary())

    @property
    def _skip(self) -> Callable[[Refusal], None] | None:
        """Takes the records that cannot be used; None where one is an error."""
        return self.refused.append if self.spec.on_error == "skip" else None

    @property
    def others(self) -> dict[str, Tokenizer]:
        """Tokenizers of the inputs that have one of their own."""
        return {name: one.tokenizer for name, one in self.input_cards.items() if one.tokenizer is not None}

    def read_options(self, objective: Objective, split_column: str = "") -> ReadOptions:
        """How the sources are read for an objective; `split_column` names the part of each record, or is empty."""
        return ReadOptions(
            columns=columns_of(self.spec.column, objective.inputs),
            foreign=tuple(name for name, one in self.input_cards.items() if one.domain != self.domain.name),
            id_column=self.spec.id_column,
            label_columns=objective.label_columns,
            split_column=split_column,
            group_column=self.spec.group_column,
            on_error=self._skip,
        )

    def _store(self, sources: list[str], options: ReadOptions) -> RecordStore:
        return RecordStore.build(
            self.domain.reader,
            [Source(path) for path in sources],
            options,
            name=self.domain.name,
            cache_dir=self.spec.cache_dir,
            progress=self.build_progress,
        )

    def _usable(self, store: RecordStore, rows: np.ndarray) -> np.ndarray:
        """The rows whose inputs their tokenizers take; one that is not taken is an error, unless it may be skipped."""
        for name in store.inputs:
            lengths = store.token_lengths(self.others.get(name, self.tokenizer), rows, self._skip, name)
            rows = rows[np.asarray(lengths) >= 0]
        return rows

    def _deal(self, store: RecordStore) -> dict[str, np.ndarray]:
        """Rows of each part."""
        split = self.spec.split
        if split.method == "column":
            parts = split_by_column(store)
        else:
            validation = 0.0 if self.spec.validation_sources else split.validation_frac
            fractions = {"validation": validation, "test": split.test_frac}
            fractions["train"] = 1 - sum(fractions.values())
            if split.method == "hash":
                parts = split_by_hash(store, fractions, split.seed)
            else:
                parts = split_by_similarity(store, fractions, split.seed, self.similarity, self.build_progress)
        return {name: rows for name, rows in parts.items() if len(rows)}

    def _require_sources(self, store: RecordStore) -> None:
        """See that each source that has a weight has a record to train on."""
        counts = np.bincount(store.source_of(self.parts["train"].rows), minlength=len(self.sources))
        if self.spec.weights is not None and not counts.all():
            name = self.sources[int(np.argmin(counts))]
            raise DataError(
                f"{name}: no record of this source is left for training, and it has a weight; see data.split"
            )

    def _summary(self) -> str:
        parts = []
        for part_name, part in self.parts.items():
            num_tokens = sum(
                int(part.store.token_lengths(self.others.get(name, self.tokenizer), part.rows, name=name).sum())
                for name in part.store.inputs
            )
            parts.append(f"{part_name} {len(part):,} records ({num_tokens:,} tokens)")
        train, limit = self.parts["train"], self.max_tokens_per_record
        lengths = train.store.token_lengths(self.tokenizer, train.rows, name=train.store.inputs[0])
        num_cropped = int((lengths > limit).sum()) if limit else 0
        crops = f"; {num_cropped:,} are longer than {limit} tokens and trained on in random windows"
        weights = self.spec.weights or ()
        shares = ", ".join(f"{name} {one / sum(weights):.1%}" for name, one in zip(self.sources, weights))
        mixed = f"; tokens of {shares}" if shares else ""
        return f"data: {', '.join(parts)}{crops if num_cropped else ''}{mixed}"

    def train_dataloader(self) -> TrainLoader:
        trainer = self.trainer
        assert trainer is not None
        ranks = Ranks.of(trainer)
        return TrainLoader(
            self._maker("train", self.max_tokens_per_record),
            tokens_per_batch=self.spec.tokens_per_batch,
            packs_per_step=trainer.accumulate_grad_batches * ranks.count,
            rank=ranks.number,
            world_size=ranks.count,
            workers=self.spec.workers,
            weights=self.spec.weights,
            start_step=self.first_step,
        )

    def _maker(self, part: str, max_tokens_per_record: int | None) -> PackMaker:
        records = self.parts[part]
        return PackMaker(
            records.store,
            records.rows,
            self.tokenizer,
            self.objective,
            self.seed,
            max_tokens_per_record,
            self.views,
            is_training=part == "train",
            others=self.others,
        )

    def first_step(self) -> int:
        """The optimiser step that training begins with: where to go on is computed, not replayed."""
        assert self.trainer is not None
        return self.trainer.global_step

    def val_dataloader(self) -> EvalLoader | list[Any]:
        return self._eval_loader("validation") if "validation" in self.parts else []

    def test_dataloader(self) -> EvalLoader:
        if "test" not in self.parts:
            raise DataError("there is no test part; set data.split.test_frac, or a column that names one")
        return self._eval_loader("test")

    def _eval_loader(self, part: Literal["validation", "test"]) -> EvalLoader:
        assert self.trainer is not None
        ranks = Ranks.of(self.trainer)
        return EvalLoader(
            # an evaluation takes whole records wherever the model can
            self._maker(part, self._position_limit),
            tokens_per_batch=self.spec.tokens_per_batch,
            rank=ranks.number,
            world_size=ranks.count,
            workers=self.spec.workers,
            limit=self.limits.get(part, 1.0),
        )


def _listed(paths: Sequence[str] | str | None) -> list[str]:
    return [paths] * bool(paths) if isinstance(paths, str) else list(paths or ())
