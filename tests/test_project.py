"""Tests of the project's form: equations, imports, order of definitions, settings."""
import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

import acp
import alqa
import data
import evaluate
import icd
import model
import train
from tests.helpers import ROOT

CORE = ("data", "model", "alqa", "icd", "acp", "evaluate", "train")
EXTRAS = tuple(sorted(path.stem for path in (ROOT / "extras").glob("*.py")))
TESTS = ("test_apl", *sorted(f"tests/{path.stem}" for path in (ROOT / "tests").glob("*.py")))
NAMES = (*CORE, *(f"extras/{name}" for name in EXTRAS))  # all but the tests

# Which of our files each may import.
IMPORTS = {
    "data": set(),
    "model": {"data"},
    "icd": {"data"},
    "acp": {"data"},
    "alqa": {"data", "model"},
    "evaluate": {"alqa", "data", "model"},
    "train": {"acp", "alqa", "data", "evaluate", "icd", "model"},
}
IMPORTS |= {f"extras/{name}": set(CORE) for name in EXTRAS}
# Both know the other detector.
IMPORTS |= {f"extras/{name}": {*CORE, "extras"} for name in ("bench", "tables")}


def tree_of(name):
    """The syntax tree of a file of ours."""
    return ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))


def imported(name):
    """The top names of all modules that a file of ours imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {module.split(".")[0] for module in found}


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
    ours = {*CORE, "extras", "tests", "test_apl"}
    assert imported(name) & ours <= IMPORTS[name]


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
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        for used in names & set(line):
            assert line[used] <= node.lineno, (used, node.lineno)


# ---- Settings -----------------------------------------------------------------------------------

def names_of(settings):
    """The names of the settings of a class, inherited ones included."""
    return {f.name for f in fields(settings)}


def test_each_settings_class_adds_to_those_below():
    assert issubclass(evaluate.DetectionSettings, data.DataSettings)
    assert issubclass(evaluate.DetectionSettings, model.DetectorSettings)
    assert issubclass(train.Settings, evaluate.DetectionSettings)
    of_data, of_detector = names_of(data.DataSettings), names_of(model.DetectorSettings)
    of_detection, everything = names_of(evaluate.DetectionSettings), names_of(train.Settings)
    assert not of_data & of_detector
    assert of_data | of_detector < of_detection < everything
    for parent in (data.DataSettings, model.DetectorSettings, evaluate.DetectionSettings):
        inherited = {f.name: (f.default, f.metadata) for f in fields(train.Settings)}
        for f in fields(parent):
            assert inherited[f.name] == (f.default, f.metadata)


def test_every_setting_is_commented_and_read_somewhere():
    source = "".join((ROOT / f"{name}.py").read_text(encoding="utf-8") for name in CORE)
    classes = (
        data.DataSettings, model.DetectorSettings, evaluate.DetectionSettings, train.Settings)
    methods = "".join(inspect.getsource(settings) for settings in classes)
    for f in fields(train.Settings):
        assert len(f.metadata["comment"]) > 1, f.name
        read = re.search(rf"\bs\.{f.name}\b", source)
        assert read or re.search(rf"\bself\.{f.name}\b", methods), f.name


def test_every_setting_says_from_which_stage_on_it_matters():
    stages = {f.name: f.metadata["stage"] for f in fields(train.Settings)}
    assert set(stages.values()) == {*train.STAGES, "run"}
    pretrain, supervised, joint = (set(train.settings_until(stage)) for stage in train.STAGES)
    assert pretrain < supervised < joint
    assert joint == {name for name, stage in stages.items() if stage != "run"}


def test_every_switch_has_its_choices_in_the_components():
    choices = {f.name: f.metadata["allowed"] for f in fields(train.Settings)}
    assert choices["alqa"] is model.BRANCHES
    assert choices["soft_label"] is alqa.SOFT_LABELS
    assert choices["threshold"] is alqa.THRESHOLDS
    assert choices["scope"] is alqa.SCOPES
    assert choices["icd"] is icd.REFINEMENTS
    assert choices["icd_score"] is icd.SCORES
    assert choices["acp"] is acp.ACP
    assert choices["acp_after"] is train.AFTER
