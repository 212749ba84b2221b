"""The contract that every domain keeps, as stages that can be run.

sample -> records -> tokens -> payloads again -> views -> presets -> pack -> three steps -> vectors -> scores
"""

import pickle
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from meristem.data.pack import pack
from meristem.data.pack_maker import PackMaker
from meristem.data.records import INPUT_PREFIX, SCHEMA, Source, record_at
from meristem.data.similarity import similarity_clusters
from meristem.data.store import RecordStore
from meristem.data.tokenizer import Tokenizer
from meristem.domain import Domain, load_domain
from meristem.errors import UserError, require
from meristem.inference.embed import Embed
from meristem.inference.formats import read_embeddings
from meristem.inference.run import run_job
from meristem.model.config import TransformerConfig
from meristem.model.model import Model
from meristem.model.transformer import build_trunk
from meristem.model_directory import ModelCard, save_model
from meristem.objectives.objective import Objective
from meristem.registry import find
from meristem.scoring.running import RunningModel
from meristem.train.architecture import resolve_architecture
from meristem.train.datamodule import SAMPLE, DataModule
from meristem.train.ranks import Ranks
from meristem.train.spec import DataSpec, ModelSpec
from meristem.train.task import Task
from meristem.types import INPUT, Record, Slice, Tokens

NUM_TRAINED, NUM_STEPS, MAX_TOKENS = 16, 3, 128
"""Size of the trial training: records of the sample, steps, and the tokens that longer records are cropped to."""

NUM_SCORED = 4
"""Records of the sample that each scorer scores."""

STAGES = ("sample", "records", "tokens", "decode", "views", "presets", "pack", "train", "embed", "scorers")
"""The stages in their order; each is a method of the contract."""


class BrokenContract(UserError):
    """A domain does not do what every domain must; the message names the stage."""


@dataclass(frozen=True)
class Stage:
    """A stage of the contract that has passed, with what it has found in words, and its duration."""

    name: str
    detail: str
    seconds: float


def run_contract(name: str) -> Iterator[Stage]:
    """Run a domain, by name or dotted path, through the contract; each stage is yielded when it has passed.

    Raises:
        ConfigError: there is no such domain.
        BrokenContract: a stage failed; later stages do not run.
    """
    domain = load_domain(name)
    with tempfile.TemporaryDirectory() as folder:
        contract = _Contract(name, domain, Path(folder))
        for stage in (getattr(contract, stage) for stage in STAGES):
            began = time.perf_counter()
            try:
                detail = stage()
            except Exception as error:
                # a domain's own code may raise anything; the stage says where, the cause is kept for --debug
                is_plain = isinstance(error, UserError | AssertionError)
                reason = str(error) if is_plain else f"{type(error).__name__}: {error}"
                raise BrokenContract(f"domain {name}: {stage.__name__}: {reason}") from error
            yield Stage(stage.__name__, detail, time.perf_counter() - began)


def _differing(some: Tokens, others: Tokens) -> str:
    """The first field in which two sequences of tokens differ by more than rounding; empty for none."""
    for name in ("ids", "positions", "features", "is_special"):
        one, other = getattr(some, name), getattr(others, name)
        if (one is None) != (other is None) or np.shape(one) != np.shape(other):
            return name
        if one is not None and not np.allclose(one, other, rtol=0, atol=1e-4):
            return name
    return ""


class _Contract:
    """Runs the stages of the contract in order; later stages use the results of earlier ones."""

    def __init__(self, name: str, domain: Domain, folder: Path):
        self.name, self.domain, self.folder = name, domain, folder
        self.data: DataModule
        self.tokenizer: Tokenizer
        self.objective: Objective
        self.rows: list[Record] = []
        self.payloads: list[tuple[str, Any]] = []
        self.encoded: list[Tokens] = []
        self.model: Model
        self.architecture: TransformerConfig
        self.card: ModelCard

    def sample(self) -> str:
        """The sample is a file with something in it; its options and its objective can be made."""
        path = Path(self.domain.sample)
        require(path.is_file() and path.stat().st_size > 0, "sample must be a file with something in it", path)
        options = {"cache_dir": str(self.folder), **self.domain.sample_options}
        self.data = DataModule(DataSpec(domain=self.name, sources=SAMPLE, **options))
        self.tokenizer = self.data.tokenizer
        self.objective = self.domain.sample_objective()
        require(isinstance(self.objective, Objective), "sample_objective must make an objective", self.objective)
        return f"{path.name}, {path.stat().st_size:,} bytes, for {type(self.objective).__name__}"

    def records(self) -> str:
        """Reading gives the inputs and labels that the objective reads, the same ones each time."""
        rows, again = self._read(), self._read()
        require(len(rows) >= 8, "the sample must hold 8 records or more", len(rows))
        require(rows == again, "reading twice must give the same records", "others")
        self.rows, reader = rows, self.domain.reader
        self.payloads, copies = (
            [(f"{row.source}, {name}", payload) for row in some for name, payload in row.inputs.items()]
            for some in (rows, again)
        )
        is_filled = all(row.id for row in rows) and all(payload for _, payload in self.payloads)
        require(is_filled, "every record needs an id and payloads", "an empty one")
        known: set[bytes] = set()
        for (where, payload), (_, copy) in zip(self.payloads, copies):
            one, other = (reader.canonical(each) for each in (payload, copy))  # type: ignore[arg-type]
            require(isinstance(one, bytes), "canonical must give bytes", type(one).__name__)
            require(one == other, "canonical must give equal bytes for equal payloads", f"others for {where}")
            known.add(one)
        require(len(known) > 1, "canonical must tell payloads apart", "one value for all of the sample")
        if self.domain.similarity is not None:
            clusters = similarity_clusters(RecordStore.of(rows, reader), self.domain.similarity)
            require(len(np.unique(clusters)) > 1, "similarity must tell records of the sample apart", "one cluster")
        return f"{len(rows):,} records of {', '.join(self.objective.inputs)}"

    def _read(self) -> list[Record]:
        """The sample's records; payloads that are slices of files are replaced by their content."""
        source, options = Source(str(self.domain.sample)), self.data.read_options(self.objective)
        for file in self.domain.reader.files(source, options):
            require(Path(file).exists(), "files must name files that are there", file)
        rows = []
        for batch in self.domain.reader.read(source, options):
            names = batch.schema.names
            wanted = [*SCHEMA.names, *(INPUT_PREFIX + name for name in self.objective.inputs)]
            require(not set(wanted) - set(names), f"a batch must have the columns {wanted}", names)
            for column in wanted:
                require(not batch.column(column).null_count, f"column {column} must have no missing value", "some")
            for row in range(batch.num_rows):
                record = record_at(batch, row)
                inputs: dict[str, Any] = dict(record.inputs)
                for name, payload in inputs.items():
                    if isinstance(payload, Slice):
                        [inputs[name]] = self.domain.reader.fetch([payload]).to_pylist()
                        got = len(inputs[name])
                        require(got == len(payload), f"fetch must give the {len(payload)} symbols of a slice", got)
                rows.append(replace(record, inputs=inputs))
        return rows

    def tokens(self) -> str:
        """Encoding keeps order and spans, and the tokenizer survives being written."""
        tokenizer = self.tokenizer
        self.encoded = [tokenizer.encode(payload) for _, payload in self.payloads]
        for (_, payload), tokens in zip(self.payloads, self.encoded):
            lengths = {len(tokens.ids), len(tokens.positions), *(() if tokens.spans is None else [len(tokens.spans)])}
            require(len(lengths) == 1, "ids, positions and spans must have one row a token", sorted(lengths))
            wanted = tokenizer.num_special
            got = (0, 0) if tokens.is_special is None else tokens.frame
            require(got == wanted, f"is_special must mark {wanted} rows around a payload, as num_special says", got)
            if tokens.spans is not None:
                spans = np.asarray(tokens.spans)
                is_within = (spans >= 0).all() and (spans <= len(payload)).all() and (spans[:, 0] <= spans[:, 1]).all()
                require(bool(is_within), "spans must be parts of the payload", f"others, of {len(payload)} symbols")
        column = tokenizer.encode_column(pa.array([payload for _, payload in self.payloads]))
        for row, ((where, _), tokens) in enumerate(zip(self.payloads, self.encoded)):
            is_same = np.array_equal(column.ids[column.offsets[row] : column.offsets[row + 1]], tokens.ids)
            require(is_same, "encode_column must give what encode gives", f"others for {where}")
            other = _differing(tokenizer.tokens_at(column, row), tokens)
            require(not other, "tokens_at must give what encode gives", f"other {other} for {where}")
        written = find("meristem.tokenizers", tokenizer.kind).from_json(tokenizer.to_json())
        require(written.fingerprint == tokenizer.fingerprint, "from_json must undo to_json", "another fingerprint")
        return f"{sum(map(len, self.encoded)):,} tokens, {len(tokenizer.vocab)} symbols"

    def decode(self) -> str:
        """Tokens lead back to the payload, or where the tokenizer is lossy to one that has the same tokens."""
        tokenizer, num_changed = self.tokenizer, 0
        for (where, payload), tokens in zip(self.payloads, self.encoded):
            back = tokenizer.decode(tokens)
            if isinstance(back, str | bytes) and back == payload:
                if tokens.spans is None:
                    continue
                covered = np.zeros(len(payload), bool)
                for start, stop in tokens.spans:
                    covered[start:stop] = True
                rule = f"every part of {where}, which comes back whole, must be in the span of a token"
                require(bool(covered.all()), rule, f"{int((~covered).sum())} symbols in none")
                continue
            num_changed += 1
            other = _differing(tokenizer.encode(back), tokens)
            rule = f"what decoding gives must be the payload of {where}, or have the same tokens"
            require(not other, rule, f"other {other}: {str(back)[:40]!r}")
        if not num_changed:
            return f"{len(self.payloads):,} payloads come back"
        return f"lossy: {num_changed:,} of {len(self.payloads):,} payloads come back changed, with the same tokens"

    def views(self) -> str:
        """Views of a record are a function of the record and the generator, and travel to other processes."""
        if self.domain.views is None:
            return "none"
        views = self.data.views or self.domain.build_views(self.tokenizer)
        copies = (views, pickle.loads(pickle.dumps(views)))
        num_changed = 0
        for row, record in enumerate(self.rows[:NUM_TRAINED]):
            seen = [one.views(record, np.random.default_rng(row)) for one in copies]
            require(len(seen[0]) == views.num_views, f"views must be {views.num_views} a record", len(seen[0]))
            alone = [one.views(record, None) for one in copies]
            require(len(alone[0]) > 0, "without a generator there must be a view or more", "none")
            drawn, whole = ([self._tokens_of(some) for some in both] for both in (seen, alone))
            for first, again in (drawn, whole):
                differing = [name for one, other in zip(first, again) if (name := _differing(one, other))]
                require(not differing, f"views of {record.source} must be the same twice", f"other {differing}")
            plain = self._tokens_of((record,))
            if views.is_training_only:
                is_same = not any(map(_differing, whole[0], plain))
                require(is_same, "without a generator, views for training only must be the record", "another")
            num_changed += any(_differing(one, own) for one, own in zip(drawn[0], plain * views.num_views))
        return f"{views.num_views} a record, {num_changed} of {row + 1} records changed"

    def _tokens_of(self, records: tuple[Record, ...]) -> list[Tokens]:
        """Tokens of all inputs of records, as packs have them."""
        column = self.tokenizer.encode_values([payload for record in records for payload in record.inputs.values()])
        return [self.tokenizer.tokens_at(column, row) for row in range(len(column))]

    def presets(self) -> str:
        """Every preset can be built, and fits the tokenizer; the smallest is trained."""
        require(len(self.domain.presets) > 0, "a domain needs a preset", "none")
        sizes = {}
        for name in self.domain.presets:
            config = resolve_architecture({"preset": name}, self.domain, self.tokenizer)
            with torch.device("meta"):
                sizes[name] = sum(parameter.numel() for parameter in build_trunk(config).parameters()), config
        smallest, (_, self.architecture) = min(sizes.items(), key=lambda item: item[1][0])
        return f"{', '.join(sizes)}; the smallest: {smallest}"

    def pack(self) -> str:
        """Sequences lie end to end, and none is lost."""
        batch = pack(self.encoded, range(len(self.encoded)))
        wanted = sorted(len(tokens) for tokens in self.encoded)
        require(sorted(batch.layout.lengths) == wanted, "a pack must hold every sequence whole", "other lengths")
        return f"{batch.layout.num_rows:,} rows in one pack"

    def train(self) -> str:
        """Three steps of the sample's objective on the same pack: the loss is finite and falls."""
        task, objective = Task(ModelSpec(architecture=self.architecture, objective=self.objective)), self.objective
        self.data.bind(task)
        train, most = self.data.parts["train"], self.data.max_tokens_per_record
        maker = PackMaker(
            train.store,
            train.rows[:NUM_TRAINED],
            self.tokenizer,
            objective,
            seed=0,
            max_tokens_per_record=most and min(most, MAX_TOKENS),
            views=self.data.views,
            others=self.data.others,
        )
        batch = maker.make(0, np.arange(len(maker.rows)))
        counts = objective.counts(batch)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.card = ModelCard(task.architecture, self.tokenizer, objective.heads, domain=self.domain.name)
            self.model = self.card.build()
            extra = objective.build(task.architecture)
            objective.start(self.model, extra, NUM_STEPS)
            optimizer = torch.optim.AdamW([*self.model.parameters(), *extra.parameters()], lr=1e-4)
            losses = []
            for _ in range(NUM_STEPS):
                torch.manual_seed(0)  # the same dropout in each step
                terms = objective.loss_of(self.model, extra, batch).terms
                got = {name: float(term.count) for name, term in terms.items()}
                require(got == counts, f"the counts of the loss must be those announced, {counts}", got)
                known = [term.weight * term.sum / term.count for term in terms.values() if term.count]
                require(bool(known), "the objective must score something of the sample", "no target")
                loss = torch.stack(known).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                objective.after_step(self.model, extra, Ranks())
                losses.append(loss.item())
        shown = " > ".join(f"{loss:.3f}" for loss in losses)
        require(all(np.isfinite(losses)) and losses[-1] < losses[0], "the loss must be finite and fall", shown)
        return f"loss {shown}"

    def embed(self) -> str:
        """A vector for each record of the sample, through files and back, whatever it is packed with."""
        model, found = self.folder / "model", []
        save_model(model, self.card, self.model)
        read = self.data.read_options(self.objective)  # a verb reads one input, here the first
        column = read.columns[read.main] or (read.main if read.main != INPUT else "")
        read = replace(read, columns={INPUT: column}, label_columns=(), group_column="")
        for name, budget in (("packed", None), ("alone", 1)):
            job = Embed(domain=self.name, precision="fp32", pool="mean", tokens_per_batch=budget, read=read)
            run_job(job, model, [str(self.domain.sample)], self.folder / name)
            found.append(read_embeddings(self.folder / name))
        packed, alone = (np.asarray(embeddings.values) for embeddings in found)
        ids = [row.id for row in self.rows]
        require(list(found[0].ids) == ids, "ids must be those of the sample, in order", "others")
        require(bool(np.isfinite(packed).all()), "vectors must be finite", "some that are not")
        # looser than what core promises: here a leak between records is to be seen, not rounding on some device
        error = float(np.abs(packed - alone).max() / np.sqrt((alone**2).mean()))
        require(error < 1e-4, "a vector must not depend on its batch mates", f"a difference of {error:.1e}")
        return f"{packed.shape[0]:,} vectors of {packed.shape[1]}, in files and back"

    def scorers(self) -> str:
        """Each scorer gives a result for every record, with the options that it has by default."""
        running = RunningModel(self.model.eval(), self.tokenizer)
        column = self.tokenizer.encode_values([next(iter(row.inputs.values())) for row in self.rows[:NUM_SCORED]])
        for name, scorer in self.domain.scorers.items():
            options = scorer.options()
            scorer.describe(running, options)
            got = len(list(scorer.score(running, column, options)))
            require(got == len(column), f"scorer {name} must give a result for each of {len(column)} records", got)
        return ", ".join(self.domain.scorers) or "none"
