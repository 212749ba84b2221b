"""The contract that every domain keeps, as stages that can be run and as a pytest plugin.

    sample -> records -> tokens -> the same payload -> pack -> three training steps -> embed -> file

pytest loads this module at every start, so nothing heavy is imported at the top.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from meristem.errors import UserError

NUM_TRAINED = 16
"""Records of the sample that the training steps see."""

NUM_STEPS = 3

LABEL = "every second"
"""Name of a label that is made up, for records that have no symbol to mask."""


class BrokenContract(UserError):
    """A domain does not do what every domain must; the message names the stage."""


@dataclass(frozen=True)
class Stage:
    """One stage of the contract that was kept.

    Attributes:
        name: of the stage.
        detail: what was counted.
        seconds: it took.
    """

    name: str
    detail: str
    seconds: float


@pytest.fixture
def check_domain() -> Callable[[str], list[Stage]]:
    """Runs the contract on a domain by name or dotted path; the test fails with the stage that is broken.

    Example:
        def test_my_domain_keeps_the_contract(check_domain):
            check_domain("my_lab.rna")
    """
    return lambda name: list(run_contract(name))


def run_contract(name: str) -> Iterator[Stage]:
    """Run a domain through the contract; each stage is yielded when it has passed.

    Args:
        name: of an installed domain, or a dotted path.

    Raises:
        ConfigError: no such domain.
        BrokenContract: a stage failed; later ones are not run.
    """
    from meristem.domain import load_domain

    contract = _Contract(name, load_domain(name))
    for stage in (
        contract.sample,
        contract.records,
        contract.tokens,
        contract.decode,
        contract.presets,
        contract.pack,
        contract.train,
        contract.embed,
    ):
        began = time.perf_counter()
        try:
            detail = stage()
        except Exception as error:
            # a domain's own code may raise anything; the stage says where, the cause is kept for --debug
            reason = str(error) if isinstance(error, UserError | AssertionError) else f"{type(error).__name__}: {error}"
            raise BrokenContract(f"domain {name}: {stage.__name__}: {reason}") from error
        yield Stage(stage.__name__, detail, time.perf_counter() - began)


def _require(condition: bool, rule: str, got: object) -> None:
    if not condition:
        raise BrokenContract(f"{rule}; got {got}")


def _differing(some: Any, others: Any) -> str:
    """The first field in which two sequences of tokens differ by more than rounding; empty for none."""
    import numpy as np

    for name in ("ids", "positions", "features"):
        one, other = getattr(some, name), getattr(others, name)
        if (one is None) != (other is None) or np.shape(one) != np.shape(other):
            return name
        if one is not None and not np.allclose(one, other, rtol=0, atol=1e-4):
            return name
    return ""


class _Contract:
    """The stages in order; each takes what the ones before it have found."""

    def __init__(self, name: str, domain: Any):
        self.name, self.domain = name, domain
        self.rows: list[Any] = []
        self.payloads: list[Any] = []
        self.encoded: list[Any] = []
        self.model: Any = None

    def tokenizer(self) -> Any:
        """The domain's tokenizer, as it suits the sample."""
        return self.domain.tokenizer(**self.domain.sample_tokenizer)

    def sample(self) -> str:
        """The sample is a file with something in it."""
        path = Path(self.domain.sample)
        _require(path.is_file(), "sample must be a file that ships with the domain", path)
        _require(path.stat().st_size > 0, "sample must not be empty", f"0 bytes in {path}")
        return f"{path.name}, {path.stat().st_size:,} bytes"

    def records(self) -> str:
        """Reading gives columns of the schema, the same ones each time."""
        from meristem.data.records import SCHEMA, ReadOptions, Source, record_at

        batches = [list(self.domain.read(Source(str(self.domain.sample)), ReadOptions())) for _ in range(2)]
        for batch in batches[0]:
            names = batch.schema.names[: len(SCHEMA)]
            _require(names == SCHEMA.names, f"a batch must begin with the columns {SCHEMA.names}", names)
            for column in SCHEMA.names:
                _require(not batch.column(column).null_count, f"column {column} must have no missing value", "some")
        self.rows = [record_at(batch, row) for batch in batches[0] for row in range(batch.num_rows)]
        self.payloads = [row.payload for row in self.rows]
        again = [record_at(batch, row) for batch in batches[1] for row in range(batch.num_rows)]
        _require(len(self.rows) >= 8, "the sample must hold 8 records or more", len(self.rows))
        _require(self.rows == again, "reading twice must give the same records", "others")
        _require(
            all(row.id and row.payload for row in self.rows), "every record needs an id and a payload", "an empty one"
        )
        return f"{len(self.rows):,} records"

    def tokens(self) -> str:
        """Encoding keeps order and spans, and the tokenizer survives being written."""
        import numpy as np
        import pyarrow as pa

        tokenizer = self.tokenizer()
        self.encoded = [tokenizer.encode(payload) for payload in self.payloads]
        for payload, tokens in zip(self.payloads, self.encoded):
            lengths = {len(tokens.ids), len(tokens.positions), *(() if tokens.spans is None else [len(tokens.spans)])}
            _require(len(lengths) == 1, "ids, positions and spans must have one row a token", sorted(lengths))
            if tokens.spans is not None:
                covered = np.zeros(len(payload), bool)
                for start, stop in tokens.spans:
                    covered[start:stop] = True
                _require(bool(covered.all()), "every part of a payload must be in the span of a token", "gaps")
        column = tokenizer.encode_column(pa.array(self.payloads))
        for row, tokens in enumerate(self.encoded):
            ids = column.ids[column.offsets[row] : column.offsets[row + 1]]
            is_same = np.array_equal(ids, tokens.ids)
            _require(is_same, "encode_column must give what encode gives", f"others in record {row + 1}")
            same = _differing(tokenizer.tokens_at(column, row), tokens)
            _require(not same, "tokens_at must give what encode gives", f"other {same} in record {row + 1}")
        written = type(tokenizer).from_json(tokenizer.to_json())
        _require(written.fingerprint == tokenizer.fingerprint, "from_json must undo to_json", "another fingerprint")
        return f"{sum(map(len, self.encoded)):,} tokens, {len(tokenizer.vocab)} symbols"

    def decode(self) -> str:
        """Tokens lead back to the same payload; of an encoded file, to what gives the same tokens."""
        tokenizer = self.tokenizer()
        for row, payload, tokens in zip(self.rows, self.payloads, self.encoded):
            back = tokenizer.decode(tokens)
            if isinstance(payload, bytes) and not isinstance(back, bytes):
                differing = _differing(tokenizer.encode(back), tokens)
                rule = f"what decoding gives must have the tokens of {row.source} again"
                _require(not differing, rule, f"other {differing}")
            else:
                _require(back == payload, f"decoding must give the payload of {row.source} again", f"{back[:40]!r}")
        return f"{len(self.payloads):,} payloads come back"

    def presets(self) -> str:
        """Every preset can be built, and knows every symbol."""
        import torch

        from meristem.model.transformer import Encoder

        num_symbols = len(self.tokenizer().vocab)
        _require(len(self.domain.presets) > 0, "a domain needs a preset", "none")
        for name, config in self.domain.presets.items():
            got = config.embedding.vocab_size
            _require(got >= num_symbols, f"preset {name} needs embedding.vocab_size of {num_symbols} or more", got)
            with torch.device("meta"):
                Encoder(config)
        return ", ".join(self.domain.presets)

    def pack(self) -> str:
        """Sequences lie end to end, and none is lost."""
        from meristem.data.pack import pack

        batch = pack(self.encoded, range(len(self.encoded)))
        wanted = sorted(len(tokens) for tokens in self.encoded)
        _require(sorted(batch.layout.lengths) == wanted, "a pack must hold every sequence whole", "other lengths")
        return f"{batch.layout.num_rows:,} rows in one pack"

    def train(self) -> str:
        """Three steps on the same masked tokens, or on labels of patches: the loss is finite and falls."""
        import numpy as np
        import torch

        from meristem.data.pack import pack
        from meristem.data.parts import Part, RunData
        from meristem.objectives.masked import Masked
        from meristem.objectives.objective import Objective
        from meristem.objectives.supervised import Supervised, Target

        chosen = range(min(NUM_TRAINED, len(self.rows)))
        rows = list(self.rows)
        objective: Objective = Masked()
        if self.tokenizer().num_features:  # no symbol can be masked: tell every second record from the others
            objective = Supervised([Target(name=LABEL)])
            rows = [replace(rows[i], labels={LABEL: str(i % 2)}) for i in chosen]
        objective.bind(RunData(self.tokenizer(), {"train": Part.of(rows)}))
        prepared = [objective.prepare(rows[i], (self.encoded[i],), np.random.default_rng(i)) for i in chosen]
        batch = pack([tokens for views in prepared for tokens in views], [i for i in chosen for _ in prepared[i]])
        counts = objective.counts(batch)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = self._tiny_card(objective.heads, objective.readouts).build()
            extra = objective.build(self.model.config)
        parameters = [*self.model.parameters(), *extra.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        losses = []
        for _ in range(NUM_STEPS):
            terms = objective.loss_of(self.model, extra, batch).terms
            got = {name: float(term.count) for name, term in terms.items()}
            _require(got == counts, f"the counts of the loss must be those announced, {counts}", got)
            loss = torch.stack([term.weight * term.sum / term.count for term in terms.values()]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            objective.after_step(self.model, extra)
            losses.append(loss.item())
        falls = all(np.isfinite(losses)) and losses[-1] < losses[0]
        shown = " > ".join(f"{loss:.3f}" for loss in losses)
        _require(bool(falls), "the loss must be finite and fall", shown)
        return f"loss {shown}"

    def _tiny_card(self, heads: tuple[str, ...], readouts: tuple[Any, ...]) -> Any:
        """A model of a domain's own symbols and patches that costs nothing."""
        from meristem.model.config import Attention, Embedding, FeedForward, Rotary, TokenHead, TransformerConfig
        from meristem.model_directory import ModelCard

        tokenizer = self.tokenizer()
        config = TransformerConfig(
            width=32,
            num_layers=2,
            embedding=Embedding(vocab_size=len(tokenizer.vocab), patch_features=tokenizer.num_features),
            position=Rotary(num_axes=tokenizer.num_axes),
            attention=Attention(num_heads=4),
            feedforward=FeedForward(width=64),
            head=TokenHead() if heads else None,
        )
        return ModelCard(config, tokenizer, heads=heads, readouts=readouts, domain=self.domain.name)

    def embed(self) -> str:
        """A vector for each record of the sample, through files and back, whatever it is packed with."""
        import numpy as np

        from meristem.inference.embed import EmbedOptions, embed_files
        from meristem.inference.formats import read_embeddings
        from meristem.model_directory import save_model

        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            readouts = self.model.readouts
            heads = tuple(name for name in self.model.heads if name not in {readout.name for readout in readouts})
            save_model(model, self._tiny_card(heads, readouts), self.model)
            found = []
            for name, budget in (("packed", None), ("alone", 1)):
                options = EmbedOptions(domain=self.name, precision="fp32", pool="mean", tokens_per_batch=budget)
                embed_files(model, [str(self.domain.sample)], Path(folder) / name, options)
                found.append(read_embeddings(Path(folder) / name))
        packed, alone = (np.asarray(embeddings.values) for embeddings in found)
        _require(
            list(found[0].ids) == [row.id for row in self.rows], "ids must be those of the sample, in order", "others"
        )
        _require(bool(np.isfinite(packed).all()), "vectors must be finite", "some that are not")
        # looser than what core promises: here a leak between records is to be seen, not rounding on some device
        error = float(np.abs(packed - alone).max() / np.sqrt((alone**2).mean()))
        _require(error < 1e-4, "a vector must not depend on its batch mates", f"a difference of {error:.1e}")
        return f"{packed.shape[0]:,} vectors of {packed.shape[1]}, in files and back"
