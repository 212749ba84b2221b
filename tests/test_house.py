"""The rules of the house that no linter knows: sizes, words, names, links, configs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from meristem.cli.configs import shipped_configs
from meristem.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[1]
NUM_CONFIGS = 17
FAMILIES = re.compile(
    r"esm|bert|gpt|llama|mistral|qwen|longformer|big_?bird|deit|dino|siglip|starcoder|codegen|switch|mosaic|\bt5|vit_",
    re.I,
)


def tracked(*patterns: str) -> list[Path]:
    """Files that git knows or would know, by pattern."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def test_no_file_of_code_is_longer_than_400_lines():
    files = tracked("*.py", "*.in")
    assert len(files) > 40
    too_long = {path.name: n for path in files if (n := len(path.read_text("utf-8").splitlines())) > 400}
    assert not too_long


def test_no_file_is_called_utils_or_common():
    assert not [path for path in tracked("*.py") if path.stem in ("utils", "util", "common", "helpers", "misc")]


def test_the_repository_names_no_machine():
    """Paths of a machine and addresses of registries mean nothing to a reader elsewhere."""
    machine = r"(?<![\w./~-])/(?:work|root|home)/\w|(?<![\w./~-])/tmp/\w"
    foreign = re.compile(rf"{machine}|index-url|https?://[^\s/]*pypi", re.I)
    found = []
    for path in tracked():
        if path == Path(__file__).resolve() or path.suffix in (".png", ".parquet", ".gz", ".npz"):
            continue
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
            if foreign.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}")
    assert not found


def test_the_model_holds_no_familys_name():
    """A family is a value; names of families are words of comments and docstrings alone."""
    found = []
    for path in tracked("core/meristem/model/*.py"):
        assert not FAMILIES.search(path.stem)
        found += [f"{path.name}: {name}" for name in _names(path) if FAMILIES.search(name)]
    assert not found


def test_a_familys_name_in_code_would_be_found(tmp_path):
    mutant = tmp_path / "attention.py"
    mutant.write_text('"""As in ESM-2."""\nclass EsmAttention:\n    pass\nkind = "llama"\n')
    assert [name for name in _names(mutant) if FAMILIES.search(name)] == ["EsmAttention", "llama"]


def _names(path: Path) -> list[str]:
    """Identifiers and strings of a module, docstrings left out."""
    import ast

    tree = ast.parse(path.read_text("utf-8"))
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.Name):
            names.append(node.id)
        elif isinstance(node, ast.Attribute):
            names.append(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            names.append(node.value)
    return names


OTHER_PROCESSES = re.compile(
    r"torch\.distributed|from torch import .*\bdistributed|all_reduce|all_gather|is_global_zero|global_rank|local_rank|"
    r"rank_zero_only|trainer\.(?:world_size|node_rank)|strategy\.(?:reduce|broadcast|barrier|all_gather)"
)
"""Words of code that asks for a rank, or speaks to another process."""


def names_other_processes(text: str) -> list[int]:
    return [number for number, line in enumerate(text.splitlines(), 1) if OTHER_PROCESSES.search(line)]


ROUNDING = re.compile(
    r"\brounds? (?:a |each |all )?(?:row |rows )?(?:otherwise|alike|by)\b|\brounded alike\b|MKL", re.I
)
"""Sentences that explain why a result depends, or does not, on what is computed beside it."""


def test_exact_results_are_explained_in_one_place():
    said = [
        path
        for path in tracked("core/**/*.py", "domains/**/*.py", "docs/design.md")
        if ROUNDING.search(path.read_text("utf-8"))
    ]
    assert {path.name for path in said} == {"exact.py", "reordered.py"}  # the second says what it is faster than


def test_a_second_explanation_of_exact_results_would_be_found():
    for mutant in ("a row would round by the number beside it", "MKL packs anew", "so that rows round alike"):
        assert ROUNDING.search(mutant)
    assert not ROUNDING.search("precision that the frequencies were rounded to")


def test_only_ranks_knows_of_other_processes():
    """What is collective must be called by all, which is easy to see in one module and nowhere else."""
    files = tracked("core/meristem/*.py", "domains/*.py")
    found = [path.relative_to(ROOT) for path in files if names_other_processes(path.read_text("utf-8"))]
    assert found == [Path("core/meristem/train/ranks.py")]
    # the mutants: what stood in trainer callbacks, and in a teacher
    assert names_other_processes("def f(trainer):\n    if trainer.is_global_zero:\n        pass") == [2]
    assert names_other_processes("torch.distributed.all_reduce(seen)\nrank = trainer.global_rank") == [1, 2]
    assert names_other_processes("packs = accumulate * trainer.world_size") == [1]


def test_every_config_is_shipped_and_has_its_header():
    files = tracked("configs/*.yaml")
    assert len(files) == len(shipped_configs()) == NUM_CONFIGS
    for path in files:
        text = path.read_text("utf-8")
        header = "\n".join(line for line in text.splitlines() if line.startswith("#")).lower()
        for word in ("meristem fit --config", "minutes", "expect"):
            assert word in header, f"{path.name}: the header must say the command, the minutes, what to expect"
        assert set(yaml.safe_load(text)) >= {"model", "data", "trainer"}


@pytest.mark.parametrize("path", [p.relative_to(ROOT).as_posix() for p in tracked("*.md")])
def test_links_of_the_documentation_lead_to_files(path: str):
    text = (ROOT / path).read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("#"):
            continue
        file, _, anchor = target.partition("#")
        linked = ((ROOT / path).parent / file).resolve()
        assert linked.exists(), f"{path}: {target}"
        if anchor:
            assert anchor in _anchors(linked), f"{path}: {target}"


def _anchors(path: Path) -> set[str]:
    """What headings are called in links."""
    headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_shows_every_verb_and_only_verbs_that_are_there():
    text = (ROOT / "README.md").read_text("utf-8")
    shown = set(re.findall(r"^\s*(?:\$ )?meristem ([a-z]+)", text, re.M))
    assert shown == set(VERBS)


def test_readme_tree_names_only_what_is_there():
    text = (ROOT / "README.md").read_text("utf-8")
    (tree,) = re.findall(r"```text\n(.*?)```", text, re.S)
    stack: list[str] = []
    count = 0
    for line in tree.splitlines():
        if not (found := re.match(r"(\s*)(\S+)  ", line + "  ")):
            continue
        depth, name = len(found[1]) // 2, found[2]
        stack = [*stack[:depth], name]
        assert (ROOT / "".join(stack)).exists(), "".join(stack)
        count += 1
    assert count > 20


def test_make_help_lists_each_target():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    assert phony
    assert re.findall(r"^  make (\w+) +\S", listed, re.M) == phony[1].split()


def test_constraints_are_plain_pins_of_what_is_needed():
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][\w.+]*", line) for line in lines)
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [item for items in project["optional-dependencies"].values() for item in items]
    needed = {re.split(r"[\[<>=!; ]", item)[0].lower() for item in [*project["dependencies"], *extras]}
    assert needed - {"meristem"} <= {line.partition("==")[0] for line in lines}


def test_importing_meristem_is_cheap():
    code = "import sys, meristem; print([name for name in ('torch', 'numpy', 'pyarrow') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
