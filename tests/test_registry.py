"""Pieces are found by name among installed packages; what is broken or ambiguous is named, and breaks nothing else."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from installing import write_package
from meristem import registry
from meristem.cli.main import main
from meristem.cli.run_config import parse, with_class_path
from meristem.domain import load_domain
from meristem.errors import CheckpointError, ConfigError, PackageWarning
from meristem.model.config import Attention, Embedding, FeedForward, TransformerConfig
from meristem.model_directory import ModelCard, load_card, save_model
from meristem.registry import GROUPS, find, find_all, installed
from meristem.train.spec import values_of

OBJECTIVES = "meristem.objectives"

OBJECTIVE = """
from meristem.objectives.masked import MaskedTokens

class HidesCodes(MaskedTokens):
    '''An objective whose registered name is not the name of its class.'''

    def __init__(self, rate: float = 0.3, inner: MaskedTokens | None = None):
        super().__init__(rate=rate)
        self.inner = inner
"""

CONFIG = """
model:
  architecture: {width: 32, num_layers: 1, attention: {num_heads: 4}, feedforward: {width: 64}}
  objective: OBJECTIVE
data: {domain: protein, sources: x.fasta}
"""

BROKEN = {
    "imports what is not there": "import no_such_library",
    "is no Python": "def",
    "raises at import": "raise RuntimeError('two\\nlines')",
    "exits at import": "value = 1 / 0",
    "lacks the attribute": "",
}


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder on `sys.path` for packages of the test."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def written_config(tmp_path: Path, objective: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.replace("OBJECTIVE", objective))
    return str(path)


@pytest.mark.parametrize("group", GROUPS)
def test_an_unknown_name_is_refused_and_the_known_ones_are_listed(group):
    with pytest.raises(ConfigError, match=f"{GROUPS[group]} 'no such' *; installed: .*{group}") as caught:
        find(group, "no such")
    for name in installed(group):
        assert name in str(caught.value)


def test_a_built_in_piece_is_found_under_its_name():
    from meristem.data.tokenizer import AlphabetTokenizer
    from meristem.objectives.masked import MaskedTokens

    assert find("meristem.tokenizers", "alphabet") is AlphabetTokenizer
    assert find_all(OBJECTIVES)["MaskedTokens"] is MaskedTokens
    assert set(installed("meristem.tokenizers")) >= {"alphabet", "patches", "subwords"}
    for name, kind in find_all("meristem.tokenizers").items():
        assert kind.kind == name


@pytest.mark.parametrize("what", BROKEN)
def test_a_package_that_cannot_be_imported_is_named_where_it_is_needed(what, site):
    write_package(site, "lab-broken", {OBJECTIVES: {"Hazy": "lab_broken:Hazy"}}, {"lab_broken": BROKEN[what]}, "2.5")
    with pytest.raises(
        ConfigError, match=r"objective 'Hazy' of the installed package lab-broken 2\.5 cannot be"
    ) as caught:
        find(OBJECTIVES, "Hazy")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", BROKEN)
def test_a_package_that_cannot_be_imported_leaves_the_others_working(what, site):
    group = "meristem.families"
    before = find_all(group)
    write_package(site, "lab-broken", {group: {"hazy": "lab_broken:HAZY"}}, {"lab_broken": BROKEN[what]})
    with pytest.warns(PackageWarning, match=r"lab-broken 1\.0 cannot be imported") as caught:
        assert find_all(group) == before
    assert len(caught) == 1


def two_packages_with_one_name(site: Path) -> None:
    """Check that neither is taken.

    Raises:
        Failed: one is.
    """
    source = "from meristem.objectives.masked import MaskedTokens as Piece"
    for package in ("lab-one", "lab-two"):
        module = package.replace("-", "_")
        write_package(site, package, {OBJECTIVES: {"Twice": f"{module}:Piece"}}, {module: source})
    with pytest.raises(ConfigError, match=r"'Twice' must come from one installed package; got lab-one 1.0 and lab-two"):
        find(OBJECTIVES, "Twice")
    with pytest.warns(PackageWarning, match="lab-one 1.0 and lab-two 1.0"):
        assert "Twice" not in find_all(OBJECTIVES)


def test_two_packages_with_one_name_are_both_named_and_neither_is_taken(site):
    two_packages_with_one_name(site)


def test_a_registry_that_takes_the_first_of_two_packages_would_be_found(site, monkeypatch):
    """The mutant: whichever package comes first by name wins."""
    monkeypatch.setattr(registry, "_load", lambda points: points[0].load())
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        two_packages_with_one_name(site)


def test_a_package_that_takes_a_built_in_name_is_named_beside_meristem(site, capsys):
    write_package(site, "lab-proteins", {"meristem.domains": {"protein": "lab_proteins:domain"}})
    with pytest.raises(ConfigError, match=r"domain 'protein' must come from one .* lab-proteins 1\.0 and meristem 0"):
        load_domain("protein")
    assert main(["domains", "list"]) == 0
    listed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in listed if line[0] == "protein"] == [
        "lab_proteins:domain",
        "meristem_domains.protein:domain",
    ]


@pytest.fixture
def tampered(tmp_path, site) -> Callable[[object], Path]:
    """Writes a model directory whose tokenizer is said to be of a kind."""
    (site / "lab_trace.py").write_text("from meristem.data.tokenizer import AlphabetTokenizer as Trace")
    tokenizer = load_domain("protein").tokenizer()
    config = TransformerConfig(
        width=8,
        num_layers=1,
        embedding=Embedding(vocab_size=len(tokenizer.vocab)),
        attention=Attention(num_heads=1),
        feedforward=FeedForward(width=8),
    )
    card = ModelCard(config, tokenizer, domain="protein")
    save_model(tmp_path / "model", card, card.build())
    path = tmp_path / "model" / "tokenizer.json"
    values = json.loads(path.read_text())

    def write(kind: object) -> Path:
        path.write_text(json.dumps(values | {"kind": kind}))
        return path.parent

    return write


@pytest.mark.parametrize(
    "kind", ["os:system", "lab_trace", "lab_trace:Trace", "meristem.data.tokenizer:AlphabetTokenizer", "", None, 3]
)
def test_a_model_directory_cannot_name_what_is_imported(tampered, kind):
    with pytest.raises(CheckpointError, match=f"kind of tokenizer '{kind}'; installed: alphabet"):
        load_card(tampered(kind))
    assert "lab_trace" not in sys.modules


class ByPath(dict):
    """A mutant of what is installed: a name that is an import path is a piece of its own."""

    def __contains__(self, name: object) -> bool:
        return ":" in str(name) or super().__contains__(name)

    def __missing__(self, name: str) -> tuple[EntryPoint, ...]:
        return (EntryPoint(name, name, "meristem.tokenizers"),)


def test_a_registry_that_imports_by_path_would_be_found(tampered, monkeypatch):
    """The mutant opens what no package offers, and leaves a trace."""
    monkeypatch.setattr(registry, "installed", lambda group: ByPath(installed(group)))
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_a_model_directory_cannot_name_what_is_imported(tampered, "lab_trace:Trace")
    assert "lab_trace" in sys.modules


@pytest.mark.parametrize(
    "said",
    ["codes", "{class_path: codes}", "{class_path: codes, init_args: {rate: 0.2, inner: {class_path: MaskedTokens}}}"],
)
def test_an_objective_is_configured_by_its_registered_name(said, site, tmp_path):
    write_package(site, "lab-codes", {OBJECTIVES: {"codes": "lab_codes:HidesCodes"}}, {"lab_codes": OBJECTIVE})
    path = written_config(tmp_path, said)
    objective = values_of(parse(["--config", path]))["model"]["objective"]
    assert objective["class_path"] == "lab_codes.HidesCodes"
    assert objective["init_args"]["rate"] == (0.2 if "rate" in said else 0.3)
    as_argument = parse(["--config", written_config(tmp_path, "MaskedTokens"), "--model.objective", said])
    assert values_of(as_argument)["model"]["objective"] == objective


def test_a_later_config_may_name_an_objective_as_the_resolved_one_of_an_earlier_run_does_not(site, tmp_path):
    write_package(site, "lab-codes", {OBJECTIVES: {"codes": "lab_codes:HidesCodes"}}, {"lab_codes": OBJECTIVE})
    path = written_config(tmp_path, "{class_path: lab_codes.HidesCodes, init_args: {rate: 0.2}}")
    (tmp_path / "over.yaml").write_text("model: {objective: {class_path: codes}}\n")
    values = values_of(parse(["--config", path, "--config", str(tmp_path / "over.yaml")]))
    assert values["model"]["objective"]["init_args"]["rate"] == 0.2


def test_only_the_class_path_of_an_objective_is_a_name():
    said = {"class_path": "a.Path", "init_args": {"name": "MaskedTokens"}}
    assert with_class_path(said) == said
    assert with_class_path("a.Path") == {"class_path": "a.Path"}


def test_training_is_not_touched_by_a_broken_package_that_it_does_not_need(site, tmp_path, capsys):
    source = "import no_such_library"
    write_package(site, "lab-broken", {OBJECTIVES: {"Hazy": "lab_broken:Hazy"}}, {"lab_broken": source})
    assert parse(["--config", written_config(tmp_path, "MaskedTokens")]) is not None
    path = written_config(tmp_path, "Hazy")
    with pytest.raises(ConfigError, match=r"run\.yaml:4: .*lab-broken 1\.0 cannot be imported: .*no_such_library"):
        parse(["--config", path])


def test_a_broken_package_is_one_line_of_a_verb_that_asks_for_all(site, tmp_path):
    source = "import no_such_library"
    write_package(site, "lab-broken", {OBJECTIVES: {"Hazy": "lab_broken:Hazy"}}, {"lab_broken": source})
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from meristem.cli.main import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, "fit", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("meristem: warning: the objective 'Hazy' of the installed package lab-broken 1.0 cannot be")
    assert "MaskedTokens" in done.stdout


def test_a_registered_name_that_is_no_objective_is_refused(site, tmp_path):
    write_package(site, "lab-odd", {OBJECTIVES: {"Odd": "lab_odd:Odd"}}, {"lab_odd": "class Odd: pass"})
    with pytest.raises(ConfigError, match=r"run\.yaml:4: objective 'Odd' must be a subclass of Objective"):
        parse(["--config", written_config(tmp_path, "Odd")])
