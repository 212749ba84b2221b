"""Likelihoods of every kind of model equal those computed one sequence and one token at a time."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_scored import KINDS, by_brute_force, draw_column, draw_model, draw_tokenizer, ids_of, redrawn, small_config

from meristem.data.budget import Budget
from meristem.data.tokenizer import AlphabetTokenizer
from meristem.errors import ConfigError
from meristem.model.config import (
    Attention,
    Causal,
    Embedding,
    TokenHead,
)
from meristem.model.model import Model
from meristem.scoring import likelihood
from meristem.scoring.likelihood import LikelihoodOptions, ScoredRows, score_column, token_log_likelihoods
from meristem.scoring.running import ROWS_PER_CALL, RunningModel
from meristem.types import IGNORE, Hidden, PackedBatch
from model_runs import specs


class Case:
    """A random model, random sequences, options that suit its kind, and what brute force says of them."""

    def __init__(self, kind: str, rng: np.random.Generator, num_special: tuple[int, int] | None = None, **options: Any):
        self.kind, self.options = kind, dict(options)
        self.tokenizer = draw_tokenizer(rng, num_special)
        # in double precision: what a mutant changes stands out, and rounding does not
        self.model = draw_model(kind, self.tokenizer, rng).double()
        self.column = draw_column(self.tokenizer, rng)
        if kind == "encoder-decoder":
            self.column = replace(self.column, source=draw_column(self.tokenizer, rng))
        if kind == "prefix":
            self.options.setdefault("prefix_tokens", int(rng.integers(4)))
        if kind == "encoder-decoder":
            self.options.setdefault("start_id", int(rng.integers(len(self.tokenizer.vocab))))

    def wanted(self) -> list[list[float]]:
        source = self.column.source
        sources = [None if source is None else ids_of(source, row) for row in range(len(self.column))]
        return [
            by_brute_force(self.kind, self.model, self.tokenizer, ids_of(self.column, row), source, **self.options)
            for row, source in enumerate(sources)
        ]

    def running(self, tokens_per_batch: int = 100) -> RunningModel:
        return RunningModel(self.model, self.tokenizer, Budget(tokens_per_batch))

    def rows(self, tokens_per_batch: int = 100) -> list[dict[str, Any]]:
        options = LikelihoodOptions(**self.options)
        return list(score_column(self.running(tokens_per_batch), self.column, options))

    def check(self) -> None:
        name = "pseudo_perplexity" if self.kind == "masked" else "perplexity"
        before, behind = self.tokenizer.num_special
        for row, wanted, length in zip(self.rows(), self.wanted(), self.column.lengths, strict=True):
            assert row["length"] == length - before - behind
            assert row["num_scored"] == len(wanted)
            assert row["log_likelihood"] == pytest.approx(sum(wanted), rel=1e-6)
            if wanted:
                assert row[name] == pytest.approx(np.exp(-np.mean(wanted)), rel=1e-6)
            else:
                assert row[name] is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("repeat", range(6))
def test_a_likelihood_is_that_of_one_token_at_a_time(kind: str, repeat: int, rng: np.random.Generator) -> None:
    Case(kind, rng).check()


@pytest.mark.parametrize("repeat", range(3))
def test_one_pass_is_the_probability_of_each_token_given_the_whole_sequence(
    repeat: int, rng: np.random.Generator
) -> None:
    case = Case("masked", rng, one_pass=True)
    case.check()
    assert sum(map(sum, case.wanted())) != pytest.approx(sum(map(sum, Case.wanted(_without(case, "one_pass")))))


@pytest.mark.parametrize("kind", ["causal", "prefix", "encoder-decoder"])
@pytest.mark.parametrize("num_special", [(0, 1), (1, 1), (2, 2)])
def test_closing_scores_the_special_tokens_behind_the_payload(
    kind: str, num_special: tuple[int, int], rng: np.random.Generator
) -> None:
    case = Case(kind, rng, num_special, closing=True, **({"prefix_tokens": 1} if kind == "prefix" else {}))
    case.check()
    without = _without(case, "closing").rows()
    for row, other in zip(case.rows(), without):
        assert row["num_scored"] == other["num_scored"] + num_special[1]
        assert row["length"] == other["length"]


@pytest.mark.parametrize("num_before", [0, 1, 2])
def test_the_first_token_of_a_causal_model_is_scored_where_a_special_token_stands_before_it(
    num_before: int, rng: np.random.Generator
) -> None:
    for row in Case("causal", rng, (num_before, 1)).rows():
        assert row["num_scored"] == row["length"] - (num_before == 0)


def test_a_record_within_the_prefix_has_nothing_to_score(rng: np.random.Generator) -> None:
    case = Case("prefix", rng, prefix_tokens=10)
    case.column = case.tokenizer.encode_values(["ACDEF", "ACDEFGHIKLMN", "ACDEFGHIKL"])
    case.check()
    assert [row["num_scored"] for row in case.rows()] == [0, 2, 0]


def test_a_decoder_starts_as_in_training_where_nothing_else_is_said(rng: np.random.Generator) -> None:
    case = Case("encoder-decoder", rng, start_id=0)  # an alphabet has no padding symbol
    assert [row["log_likelihood"] for row in case.rows()] == [
        row["log_likelihood"] for row in _without(case, "start_id").rows()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_likelihoods_do_not_depend_on_the_token_budget(kind: str, rng: np.random.Generator) -> None:
    case = Case(kind, rng)
    case.model.float()
    wanted = case.rows(1)
    for tokens_per_batch in (64, 4096):
        assert case.rows(tokens_per_batch) == wanted
    order = rng.permutation(len(case.column))
    mixed = list(score_column(case.running(), case.column.take(order), LikelihoodOptions(**case.options)))
    assert mixed == [wanted[row] for row in order]


def test_more_rows_than_the_head_takes_at_once_are_scored(rng: np.random.Generator) -> None:
    case = Case("causal", rng)
    case.column = case.tokenizer.encode_values(["".join(rng.choice(list("ACDE"), 40)) for _ in range(9)])
    assert case.column.lengths.sum() > 2 * ROWS_PER_CALL
    case.model.float()
    wanted = case.rows(1)
    assert case.rows(100_000) == wanted
    case.model.double()
    case.check()


@pytest.mark.parametrize("kind", KINDS)
def test_progress_counts_every_token_that_is_run(kind: str, rng: np.random.Generator) -> None:
    case = Case(kind, rng)
    seen: list[int] = []
    running = replace(case.running(30), advance=seen.append)
    options = LikelihoodOptions(**case.options)
    list(score_column(running, case.column, options))
    work = likelihood.scored_rows(running, case.column, options).work
    assert sum(seen) == work.sum()
    if kind == "masked":
        payload = case.column.lengths - sum(case.tokenizer.num_special)
        assert (work == payload * case.column.lengths).all()
        assert len(seen) > 1


def _without(case: Case, option: str) -> Case:
    other = Case.__new__(Case)
    other.__dict__ = {**vars(case), "options": {k: v for k, v in case.options.items() if k != option}}
    return other


# ---- mutants: each is a way in which likelihoods have been computed wrongly ----


def off_by_one(read: Callable[..., ScoredRows]) -> Callable[..., ScoredRows]:
    def mutant(*args: Any) -> ScoredRows:
        reading = read(*args)
        return replace(reading, targets=np.roll(reading.targets, 1))

    return mutant


def drop_bos(read: Callable[..., ScoredRows]) -> Callable[..., ScoredRows]:
    """The first token is left out although something stands before it."""

    def mutant(*args: Any) -> ScoredRows:
        reading = read(*args)
        targets = reading.targets.copy()
        for start, stop in zip(reading.column.offsets, reading.column.offsets[1:]):
            scored = start + np.flatnonzero(targets[start:stop] != IGNORE)
            targets[scored[:1]] = IGNORE
        return replace(reading, targets=targets)

    return mutant


def leave_mask_in(read: Callable[..., ScoredRows]) -> Callable[..., ScoredRows]:
    """Every scored token is hidden at once, and stays so."""

    def mutant(*args: Any) -> ScoredRows:
        reading = read(*args)
        ids = reading.column.ids.copy()
        ids[reading.targets != IGNORE] = reading.mask_id or 0
        return replace(reading, column=replace(reading.column, ids=ids), mask_id=None)

    return mutant


def hide_nothing(read: Callable[..., ScoredRows]) -> Callable[..., ScoredRows]:
    return lambda *args: replace(read(*args), mask_id=None)


def count_closing(read: Callable[..., ScoredRows]) -> Callable[..., ScoredRows]:
    return lambda *args: read(*args[:-1], replace(args[-1], closing=True))


def score_as_if_masked(read: Callable[..., ScoredRows]) -> Callable[..., ScoredRows]:
    """A causal model scored like a bidirectional one, since its alphabet has a mask."""

    def mutant(*args: Any) -> ScoredRows:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(likelihood, "kind_of", lambda *_: "masked")
            return read(*args)

    return mutant


def forget_prefix(read: Callable[..., ScoredRows]) -> Callable[..., ScoredRows]:
    return lambda *args: replace(read(*args), prefix_lengths=None)


def swap_sides(read: Callable[..., ScoredRows]) -> Callable[..., ScoredRows]:
    return lambda running, column, options: read(
        running, replace(column.source, source=replace(column, source=None)), options
    )


def start_from_another(read: Callable[..., ScoredRows]) -> Callable[..., ScoredRows]:
    return lambda running, column, options: read(
        running, column, replace(options, start_id=(options.start_id + 1) % len(running.tokenizer.vocab))
    )


@pytest.mark.parametrize(
    ("kind", "mutate"),
    [
        ("masked", off_by_one),
        ("masked", leave_mask_in),
        ("masked", hide_nothing),
        ("causal", off_by_one),
        ("causal", drop_bos),
        ("causal", count_closing),
        ("causal", score_as_if_masked),
        ("prefix", off_by_one),
        ("prefix", drop_bos),
        ("prefix", forget_prefix),
        ("encoder-decoder", off_by_one),
        ("encoder-decoder", drop_bos),
        ("encoder-decoder", count_closing),
        ("encoder-decoder", swap_sides),
        ("encoder-decoder", start_from_another),
    ],
)
def test_a_wrong_reading_is_caught(
    kind: str, mutate: Callable[..., Any], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(kind, rng, (1, 1), **({"prefix_tokens": 3} if kind == "prefix" else {}))
    case.check()
    monkeypatch.setattr(likelihood, "scored_rows", mutate(likelihood.scored_rows))
    with pytest.raises(AssertionError):
        case.check()


def test_spare_rows_that_are_scored_are_caught(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: the rows that fill up a small pack count as tokens."""
    case = Case("causal", rng, (1, 1))
    case.column = case.tokenizer.encode_values(["ACD"])
    case.check()
    real = likelihood.pack

    def mutant(*args: Any) -> Any:
        batch = real(*args)
        targets = batch.targets["tokens"].clone()
        assert batch.layout.num_spare
        targets[batch.layout.num_tokens :] = 0
        return replace(batch, targets={"tokens": targets})

    monkeypatch.setattr(likelihood, "pack", mutant)
    with pytest.raises((AssertionError, ValueError)):
        case.check()


def test_a_head_that_gets_as_many_rows_as_a_pack_has_would_be_seen(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: a product that rounds by how many rows there are, as those of some CPUs do."""
    case = Case("causal", rng)
    case.model.float()
    monkeypatch.setattr(RunningModel, "symbol_logits", _rounded_by_rows)
    assert case.rows(1) == case.rows(64) == case.rows(4096)
    monkeypatch.setattr("torch.nn.functional.pad", lambda rows, _: rows)
    assert case.rows(1) != case.rows(4096)


SYMBOL_LOGITS = RunningModel.symbol_logits


def _rounded_by_rows(self: RunningModel, batch: PackedBatch, hidden: Hidden, rows: torch.Tensor) -> torch.Tensor:
    return SYMBOL_LOGITS(self, batch, hidden, rows) * (1 + 1e-5 * len(rows))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("causal", {"one_pass": True}, "one_pass has no effect on a model of kind causal"),
        ("masked", {"closing": True}, "closing has no effect on a bidirectional model"),
        ("masked", {"prefix_tokens": 1}, "prefix_tokens has no effect"),
        ("causal", {"start_id": 1}, "start_id has no effect"),
        ("prefix", {}, "prefix_tokens must say how many tokens"),
        ("prefix", {"prefix_tokens": -1}, "0 or more; got -1"),
        ("encoder-decoder", {"start_id": 26}, "start_id must be the id of a symbol, 0 to 25; got 26"),
        ("encoder-decoder", {"one_pass": True}, "one_pass has no effect"),
    ],
)
def test_an_option_without_an_effect_is_refused(
    kind: str, options: dict[str, Any], message: str, rng: np.random.Generator
) -> None:
    case = Case(kind, rng, (1, 1))
    case.options = options
    with pytest.raises(ConfigError, match=message):
        case.rows()


def test_closing_needs_a_special_token_behind(rng: np.random.Generator) -> None:
    with pytest.raises(ConfigError, match="this tokenizer puts none there"):
        Case("causal", rng, (1, 0), closing=True).rows()


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_inputs_as_the_model_has_sides(kind: str, rng: np.random.Generator) -> None:
    case = Case(kind, rng)
    case.column = replace(case.column, source=case.column if case.column.source is None else None)
    with pytest.raises(ConfigError, match="two inputs"):
        case.rows()


def test_logits_of_zero_give_a_perplexity_of_the_vocabulary(rng: np.random.Generator) -> None:
    tokenizer = AlphabetTokenizer(vocab=("<b>", *"ACGT"), prefix=("<b>",))
    config = small_config(
        embedding=Embedding(vocab_size=5),
        attention=Attention(num_heads=2, pattern=Causal()),
        head=TokenHead(is_tied=False, activation=None),
    )
    model = redrawn(Model(config, specs(("tokens",))))
    for parameter in model.heads["tokens"].parameters():
        torch.nn.init.zeros_(parameter)
    running = RunningModel(model, tokenizer)
    rows = likelihood.scored_rows(running, tokenizer.encode_values(["ACGTTT"]), LikelihoodOptions())
    [scores] = token_log_likelihoods(running, rows)
    np.testing.assert_allclose(np.exp(-scores), 5.0)


def test_special_rows_are_those_of_each_record(rng: np.random.Generator) -> None:
    """A column may hold sequences that another number of special rows frames, such as texts that end at once."""
    for kind in KINDS[:3]:
        case = Case(kind, rng, (2, 1), **({"prefix_tokens": 2} if kind == "prefix" else {}))
        whole = case.rows()
        bare = case.column.take(np.arange(1))
        bare = replace(bare, is_special=np.where(np.arange(len(bare.ids)) == 1, False, bare.is_special))
        options = LikelihoodOptions(**case.options)
        [row] = score_column(case.running(), bare, options)
        assert row["length"] == whole[0]["length"] + 1
        is_all_prefix = kind == "prefix" and row["length"] <= 2  # of which nothing is scored
        assert row["num_scored"] == whole[0]["num_scored"] + (not is_all_prefix)


@pytest.mark.parametrize("kind", KINDS)
def test_packs_that_do_not_fit_are_halved_and_nothing_is_lost(
    kind: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(kind, rng)
    case.model.float()
    wanted, running = case.rows(1), case.running(10_000)
    real, refused = RunningModel.symbol_log_probabilities, []

    def tight(self: RunningModel, batch: PackedBatch, *args: Any) -> torch.Tensor:
        if len(batch.records) > 2:
            refused.append(len(batch.records))
            raise torch.OutOfMemoryError("no memory")
        return real(self, batch, *args)

    monkeypatch.setattr(RunningModel, "symbol_log_probabilities", tight)
    assert list(score_column(running, case.column, LikelihoodOptions(**case.options))) == wanted
    assert refused
    assert running.budget.tokens < 10_000, "what was learned of the memory is kept"
