"""Tests of the project's form: equations, imports, order of definitions, settings."""
import ast
import inspect
import re
import tokenize
from dataclasses import fields
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import acp
import alqa
import data
import evaluate
import icd
import model
import train
from plumbing import settings
from tests.helpers import ROOT

CORE = ("data", "model", "alqa", "icd", "acp", "evaluate", "train")
PLUMBING = tuple(sorted(f"plumbing/{path.stem}" for path in (ROOT / "plumbing").glob("*.py")))
EXTRAS = tuple(sorted(f"extras/{path.stem}" for path in (ROOT / "extras").glob("*.py")))
TESTS = ("test_apl", *sorted(f"tests/{path.stem}" for path in (ROOT / "tests").glob("*.py")))
NAMES = (*CORE, *PLUMBING, *EXTRAS)  # all but the tests

# Which files of the core each may import; plumbing is below all of them, extras above.
IMPORTS = {
    "data": set(),
    "model": set(),
    "icd": {"data"},
    "acp": {"model"},
    "alqa": {"data", "model"},
    "evaluate": {"alqa", "data", "model"},
    "train": {"acp", "alqa", "data", "evaluate", "icd", "model"},
}
MOST_TOKENS = 20_500  # of the core, whatever is added: a feature's home is plumbing or extras


def tree_of(name):
    """The syntax tree of a file of ours."""
    return ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))


def imported(name):
    """The names of all modules that a file of ours imports, anywhere in it: "plumbing/words"."""
    found = set()
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
            if node.module in ("plumbing", "extras", "tests"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {module.replace(".", "/") for module in found} - {"plumbing", "extras", "tests"}


def count_tokens(name):
    """The tokens of a file without comments and docstrings."""
    docstrings = set()
    for node in ast.walk(tree_of(name)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node):
            text = node.body[0]
            docstrings |= set(range(text.lineno, text.end_lineno + 1))
    kinds = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
    with open(ROOT / f"{name}.py", "rb") as file:
        return sum(token.type in kinds and token.start[0] not in docstrings
                   for token in tokenize.tokenize(file.readline))


# ---- Equations ----------------------------------------------------------------------------------

def equation_homes():
    """{number: ["file `name`"]} of the tags "Eq. (n)" that begin the docstrings."""
    homes = {}
    for name in NAMES:
        for node in ast.walk(tree_of(name)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                first_line = (ast.get_docstring(node) or "").split("\n")[0]
                for number in re.findall(r"Eq\. \((\d+)\)", first_line):
                    homes.setdefault(int(number), []).append(f"{name}.py `{node.name}`")
    return homes


def test_every_equation_has_one_home():
    homes = equation_homes()
    assert {number: len(found) for number, found in homes.items()} == dict.fromkeys(range(1, 13), 1)


def test_the_readme_names_the_home_of_every_equation():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| Eq\. \((\d+)\) \| [^|]* \| ([^|]*) \|$", text, flags=re.MULTILINE)
    homes = {number: found[0] for number, found in equation_homes().items()}
    assert {int(number): home for number, home in rows} == homes
    assert len(rows) == len(homes)


# ---- Imports and order --------------------------------------------------------------------------

def test_every_file_is_known():
    files = {str(path.relative_to(ROOT).with_suffix("")) for path in ROOT.glob("*.py")}
    assert files == {*CORE, "test_apl"}
    for name in CORE:
        assert Path(inspect.getfile(globals()[name])) == ROOT / f"{name}.py"


@pytest.mark.parametrize("name", NAMES)
def test_imports_run_one_way(name):
    ours = {module for module in imported(name) if module in (*NAMES, *TESTS)}
    below = set(PLUMBING)
    if name in CORE:
        below |= IMPORTS[name]
    if name in EXTRAS:
        below |= {*CORE, *EXTRAS}
    assert ours <= below - {name}


@pytest.mark.parametrize("floor", [PLUMBING, EXTRAS])
def test_no_file_imports_itself_by_a_way_round(floor):
    graph = {name: imported(name) & set(floor) for name in floor}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_nothing_imports_an_extra():
    for name in (*CORE, *PLUMBING):
        assert not imported(name) & set(EXTRAS)


def test_the_core_stays_as_small_as_its_idea():
    assert sum(map(count_tokens, CORE)) <= MOST_TOKENS
    for name in NAMES:
        lines = (ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()
        assert max(map(len, lines), default=0) <= 100, name


@pytest.mark.parametrize("name", [*NAMES, *TESTS])
def test_importing_does_nothing(name):
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AugAssign)
    for node in tree_of(name).body:
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        command = isinstance(node, ast.If) and "__main__" in ast.dump(node.test)
        threads = ast.unparse(node).startswith("os.environ.setdefault('OMP_WAIT_POLICY'")
        assert isinstance(node, kinds) or text or command or threads, (name, node.lineno)


@pytest.mark.parametrize("name", [*NAMES, *TESTS])
def test_nothing_refers_to_what_is_defined_below_it(name):
    body = tree_of(name).body
    defined = (ast.FunctionDef, ast.ClassDef)
    line = {node.name: node.lineno for node in body if isinstance(node, defined)}
    for node in body:
        if isinstance(node, ast.If):
            continue
        names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
        own = {n.id for n in names if isinstance(n.ctx, ast.Store)}
        own |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        for used in {n.id for n in names} & set(line) - own:
            assert line[used] <= node.lineno, (used, node.lineno)


# ---- Settings -----------------------------------------------------------------------------------

def names_of(kind):
    """The names of the settings of a class, inherited ones included."""
    return {f.name for f in fields(kind)}


def test_each_settings_class_adds_to_those_below():
    of_data, of_detector = names_of(data.DataSettings), names_of(model.DetectorSettings)
    of_detection, everything = names_of(evaluate.DetectionSettings), names_of(train.Settings)
    assert not of_data & of_detector
    assert of_data | of_detector < of_detection < everything
    inherited = {f.name: (f.type, f.default, f.metadata) for f in fields(train.Settings)}
    for parent in (data.DataSettings, model.DetectorSettings, evaluate.DetectionSettings):
        for f in fields(parent):
            assert inherited[f.name] == (f.type, f.default, f.metadata)


def test_every_setting_is_commented_and_read_somewhere():
    names = (*CORE, *PLUMBING)
    source = "".join((ROOT / f"{name}.py").read_text(encoding="utf-8") for name in names)
    for f in fields(train.Settings):
        assert len(settings.comment_of(f)) > 1, f.name
        assert re.search(rf"\b(s|self|args)\.{f.name}\b", source), f.name


def test_every_setting_says_from_which_stage_on_it_matters():
    names = names_of(train.Settings)
    since = {name: settings.home_of(name, train.Settings).since for name in names}
    assert set(since.values()) == {*train.STAGES, "run"}
    stages = [set(settings.settings_of_stages(train.Settings, train.STAGES[:n])) for n in (1, 2, 3)]
    pretrain, supervised, joint = stages
    assert pretrain < supervised < joint
    assert joint == {name for name, stage in since.items() if stage != "run"}


def test_every_switch_has_its_choices_in_the_components():
    choices = {f.name: settings.choices_of(f) for f in fields(train.Settings)}
    assert choices["alqa"] == model.BRANCHES
    assert choices["soft_label"] == alqa.SOFT_LABELS
    assert choices["threshold"] == alqa.THRESHOLDS
    assert choices["scope"] == alqa.SCOPES
    assert choices["icd"] == icd.REFINEMENTS
    assert choices["icd_score"] == icd.SCORES
    assert choices["acp"] == acp.ACP
