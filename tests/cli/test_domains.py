"""`meristem domains`: a new domain works as written, and the contract catches one that does not."""

import dataclasses
import importlib
import itertools
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from meristem import contract
from meristem.cli.main import main
from meristem.contract import BrokenContract, run_contract
from meristem.data.reading.reader import Reader
from meristem.data.similarity import Similarity
from meristem.data.views import Views
from meristem.domain import Domain, domain_of_model, load_domain
from meristem.errors import ConfigError
from meristem.objectives.masked import MaskedTokens
from meristem.objectives.next_token import NextToken
from meristem.objectives.supervised import Supervised, Target
from meristem.scaffold import write_domain
from meristem.scoring.scorer import Scorer

STAGES = list(contract.STAGES)


@pytest.fixture
def lab_rna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Domain:
    """The domain that `domains new lab_rna` writes, importable as if it were installed."""
    folder = write_domain("lab_rna", tmp_path)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "lab_rna", raising=False)
    return load_domain("lab_rna:domain")


def broken(lab_rna: Domain, monkeypatch: pytest.MonkeyPatch, **changes: object) -> str:
    """Path of a domain that differs from a good one in `changes`."""
    module = importlib.import_module("lab_rna")
    monkeypatch.setattr(module, "mutant", dataclasses.replace(lab_rna, **changes), raising=False)  # type: ignore[arg-type]
    return "lab_rna:mutant"


def test_a_new_domain_passes_every_stage_of_the_contract_as_written(lab_rna, capsys):
    assert main(["domains", "check", "lab_rna:domain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == STAGES
    assert all(line.endswith(" s") for line in lines[:-1])


def test_a_new_domain_comes_with_a_package_and_an_entry_point(tmp_path):
    import tomllib

    folder = write_domain("lab_rna", tmp_path)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["meristem.domains"] == {"lab_rna": "lab_rna:domain"}
    for path in folder.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert "meristem_domains" not in text
            assert "$" not in text


def test_a_new_domain_refuses_a_foreign_base_by_file_and_line(lab_rna, tmp_path):
    from meristem.data.records import PAYLOAD, ReadOptions, Source
    from meristem.errors import DataError

    path = tmp_path / "reads.fa"
    path.write_text(">a\nACGU\nAC\n>b\nAC7U\n>c\nGGG\n")
    with pytest.raises(DataError, match=r"reads\.fa:4: '7'"):
        list(lab_rna.reader.read(Source(str(path)), ReadOptions()))
    refused = []
    batches = list(lab_rna.reader.read(Source(str(path)), ReadOptions(on_error=refused.append)))
    assert pa.Table.from_batches(batches).column(PAYLOAD).to_pylist() == ["ACGUAC", "GGG"]
    assert [refusal.id for refusal in refused] == ["b"]


def test_a_new_domain_reads_labels_from_tables_and_refuses_by_their_lines(lab_rna, tmp_path):
    from meristem.data.records import LABEL_PREFIX, PAYLOAD, ReadOptions, Source
    from meristem.errors import DataError

    path = tmp_path / "reads.tsv"
    path.write_text("name\tseq\tkind\na\tacGU\t01\nb\tAC7U\t1\nc\t\t2\nd\tNN\t3\n")
    refused = []
    options = ReadOptions(label_columns=("kind",), id_column="name", on_error=refused.append)
    read = pa.Table.from_batches(lab_rna.reader.read(Source(str(path)), options))
    assert read.column(PAYLOAD).to_pylist() == ["acGU", "NN"]
    assert read.column(LABEL_PREFIX + "kind").to_pylist() == ["01", "3"]
    assert sorted((refusal.id, refusal.line) for refusal in refused) == [("b", 3), ("c", 4)]
    (tmp_path / "bare.txt").write_text("ACGU\nNN\n")
    with pytest.raises(DataError, match=r"bare\.txt.* only tables have columns of labels and splits"):
        list(lab_rna.reader.read(Source(str(tmp_path / "bare.txt")), ReadOptions(label_columns=("kind",))))


def test_a_sequence_of_a_new_domain_is_the_same_in_either_case(lab_rna):
    assert lab_rna.reader.canonical("acGU") == lab_rna.reader.canonical("ACgu") == b"ACGU"


@pytest.mark.parametrize("name", ["class", "lab-rna", "3d", "Lab", "", "json", "meristem", "../up"])
def test_a_name_that_is_no_module_name_is_refused(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["domains", "new", name]) == 2
    assert "NAME must" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_name_of_an_installed_domain_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["domains", "new", "protein"]) == 2
    assert "installed already" in capsys.readouterr().err


def test_an_existing_folder_is_left_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab_rna").mkdir()
    (tmp_path / "lab_rna" / "mine.txt").write_text("mine")
    assert main(["domains", "new", "lab_rna"]) == 2
    assert "must not exist" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["lab_rna", "mine.txt"]


def test_list_names_installed_domains_without_importing_them(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("meristem_domains")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["domains", "list"]) == 0
    listed = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert ["protein", "meristem_domains.protein:domain"] in listed
    assert not [name for name in sys.modules if name.startswith("meristem_domains.")]


def test_an_unknown_domain_ends_with_2_and_lists_the_installed(capsys):
    assert main(["domains", "check", "rnaa"]) == 2
    assert "installed: " in capsys.readouterr().err


def test_the_fixture_of_the_plugin_raises_what_is_broken(check_domain, lab_rna, monkeypatch, tmp_path):
    with pytest.raises(BrokenContract, match="sample: sample must be a file"):
        check_domain(broken(lab_rna, monkeypatch, sample=tmp_path / "absent.fa"))


def _reader(read):
    """A reader whose `read` is this."""
    return type("Mutant", (Reader,), {"read": lambda self, source, options: read(source, options)})()


def _lost_record(reader, good_reads):
    """A reader that gives a record less after so many calls: state leaks from one to the next."""
    calls = []

    def mutant(source, options):
        calls.append(1)
        for batch in reader.read(source, options):
            yield batch.slice(len(calls) > good_reads)

    return _reader(mutant)


def _with(tokenizer, **methods):
    """A tokenizer whose methods are replaced."""
    base = tokenizer()
    mutant = type("Mutant", (type(base),), methods)
    return lambda: mutant.from_json(base.to_json())


def _shifted(by):
    """An `encode` whose spans of payload symbols lie beside them."""

    def encode(self, payload):
        tokens = super(type(self), self).encode(payload)
        spans = tokens.spans + (by if by > 0 else np.array([0, by]))
        return dataclasses.replace(tokens, spans=np.sort(np.maximum(spans, 0)))

    return encode


def _turned(self, tokens):
    """A `decode` that gives the symbols in reverse."""
    return super(type(self), self).decode(tokens)[::-1]


def _reading(domain, **methods):
    """A reader whose methods are replaced."""
    return type("Mutant", (type(domain.reader),), methods)()


def _counted(self, payload, calls=itertools.count()):  # noqa: B008
    return f"{next(calls)}".encode()


class Turning(Views):
    """Turns a sequence round, every second time."""

    def __init__(self, tokenizer=None, num_views=1, is_training_only=False, turns_always=False):
        self.is_training_only, self.num_views, self.turns_always = is_training_only, num_views, turns_always

    def views(self, record, rng):
        if self.turns_always or (rng is not None and rng.random() < 0.5):
            return (record.with_payload(record.payload[::-1]),)
        return (record,)


class Unseeded(Turning):
    def views(self, record, rng):
        return super().views(record, np.random.default_rng())


class Blind(Turning):
    def views(self, record, rng):
        return () if rng is None else super().views(record, rng)


class Forgetful(Turning):
    def __getstate__(self):
        return {"num_views": 1, "turns_always": True}


class Foreign(Turning):
    def views(self, record, rng):
        return (record.with_payload("*"),)


def _with_symbols(config, num_symbols=9, **parts):
    return dataclasses.replace(config, embedding=dataclasses.replace(config.embedding, vocab_size=num_symbols, **parts))


class _Unlearned(MaskedTokens):
    def loss_of(self, model, extra, batch):
        out = super().loss_of(model, extra, batch)
        terms = {name: dataclasses.replace(term, sum=-term.sum) for name, term in out.terms.items()}
        return dataclasses.replace(out, terms={n: dataclasses.replace(t, sum=t.sum * 0 + 1) for n, t in terms.items()})


class _Miscounting(MaskedTokens):
    def counts(self, batch):
        return {name: count + 1 for name, count in super().counts(batch).items()}


def _truncated_column(self, payloads):
    column = super(type(self), self).encode_column(payloads)
    if len(payloads) > 1:  # `encode` goes through a column of one
        column.ids[column.offsets[1] - 2] = 4
        column.ids[0] = 5
    return column


MUTANTS = {
    "a reader that forgets": ("records", lambda d: {"reader": _lost_record(d.reader, 1)}),
    "a reader that forgets later": ("embed", lambda d: {"reader": _lost_record(d.reader, 2)}),
    "a reader that raises": ("records", lambda d: {"reader": _reader(lambda source, options: iter([1 / 0]))}),
    "all records similar": ("records", lambda d: {"similarity": Similarity(k=1, threshold=0.01)}),
    "a reader whose equals differ": ("records", lambda d: {"reader": _reading(d, canonical=_counted)}),
    "a reader to which all is equal": (
        "records",
        lambda d: {"reader": _reading(d, canonical=lambda self, payload: b"")},
    ),
    "a reader that names files of nowhere": (
        "records",
        lambda d: {"reader": _reading(d, files=lambda self, source, options: [Path("nowhere")])},
    ),
    "a column that differs": ("tokens", lambda d: {"tokenizer": _with(d.tokenizer, encode_column=_truncated_column)}),
    "spans beyond the payload": ("tokens", lambda d: {"tokenizer": _with(d.tokenizer, encode=_shifted(2))}),
    "a tokenizer of no installed kind": (
        "tokens",
        lambda d: {"tokenizer": _with(d.tokenizer, kind="mutant")},
    ),
    "a decoder that loses the end": (
        "decode",
        lambda d: {"tokenizer": _with(d.tokenizer, decode=lambda self, tokens: "ACGU")},
    ),
    "a decoder that drifts": ("decode", lambda d: {"tokenizer": _with(d.tokenizer, decode=_turned)}),
    "symbols in no span": ("decode", lambda d: {"tokenizer": _with(d.tokenizer, encode=_shifted(-1))}),
    "views drawn from elsewhere": ("views", lambda d: {"views": Unseeded}),
    "more views than promised": ("views", lambda d: {"views": lambda tokenizer: Turning(num_views=2)}),
    "no view in evaluation": ("views", lambda d: {"views": Blind}),
    "views that change evaluation and deny it": (
        "views",
        lambda d: {"views": lambda tokenizer: Turning(is_training_only=True, turns_always=True)},
    ),
    "views that forget who they are": ("views", lambda d: {"views": Forgetful}),
    "views that need options": ("views", lambda d: {"views": lambda tokenizer, rate: Turning()}),
    "views that the tokenizer refuses": ("views", lambda d: {"views": Foreign}),
    "a scorer that fails": ("scorers", lambda d: {"scorers": {"bad": Scorer(help="", describe=len, score=len)}}),
    "no preset": ("presets", lambda d: {"presets": {}}),
    "a preset of another vocabulary": (
        "presets",
        lambda d: {"presets": {"small": _with_symbols(d.presets["small"], 5)}},
    ),
    "a preset that reads patches": (
        "presets",
        lambda d: {"presets": {"small": _with_symbols(d.presets["small"], patch_features=4)}},
    ),
    "no mask": (
        "train",
        lambda d: {"tokenizer": lambda: dataclasses.replace(d.tokenizer(), mask="")},
    ),
    "options that a run does not take": ("sample", lambda d: {"sample_options": {"colour": "red"}}),
    "options that the tokenizer does not take": ("sample", lambda d: {"sample_options": {"tokenizer": {"k": 3}}}),
    "an objective that is none": ("sample", lambda d: {"sample_objective": lambda: "MaskedTokens"}),
    "an objective that cannot be made": ("sample", lambda d: {"sample_objective": lambda: MaskedTokens(rate=3)}),
    "an objective without its labels": (
        "records",
        lambda d: {"sample_objective": lambda: Supervised([Target(name="x")])},
    ),
    "an objective that the presets are not for": ("train", lambda d: {"sample_objective": NextToken}),
    "an objective that learns nothing": ("train", lambda d: {"sample_objective": _Unlearned}),
    "an objective that miscounts": ("train", lambda d: {"sample_objective": _Miscounting}),
    "symbols that the loss never sees right": (
        "train",
        lambda d: {"tokenizer": _with(d.tokenizer, random_ids=property(lambda self: np.array([99])))},
    ),
}


@pytest.mark.parametrize("what", MUTANTS)
def test_the_contract_catches(what, lab_rna, monkeypatch):
    stage, changes = MUTANTS[what]
    stages = run_contract(broken(lab_rna, monkeypatch, **changes(lab_rna)))
    passed: list[str] = []
    with pytest.raises(BrokenContract, match=f"domain lab_rna:mutant: {stage}: "):
        passed.extend(kept.name for kept in stages)  # keeps those before the one that raises
    assert passed == STAGES[: STAGES.index(stage)]


@pytest.mark.parametrize("name", ["lab_rna:domain", "lab_rna", "os:system", "json", ""])
def test_a_model_directory_finds_only_installed_domains(name, lab_rna):
    """Here `lab_rna` can be imported and is not installed; a user may ask for it by a dotted path."""
    with pytest.raises(ConfigError, match=r"no installed package offers|names no domain"):
        domain_of_model("", name)
    assert domain_of_model("lab_rna:domain", name) is lab_rna
    assert domain_of_model("", "protein") is load_domain("protein")


def test_views_are_seen_by_the_contract_and_by_its_training(lab_rna, monkeypatch):
    stages = {stage.name: stage.detail for stage in run_contract(broken(lab_rna, monkeypatch, views=Turning))}
    changed = int(stages["views"].split(", ")[1].split()[0])
    assert 0 < changed < 16


@pytest.mark.parametrize("name", ["protein"])
def test_every_built_in_domain_keeps_the_contract(name, check_domain):
    assert [stage.name for stage in check_domain(name)] == STAGES
