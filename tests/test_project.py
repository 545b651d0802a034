"""Tests of the project's form: equations, imports, order of definitions, settings."""
import ast
import re
import tokenize
from dataclasses import fields
from graphlib import TopologicalSorter
from importlib import import_module
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

# Which files of the core each may import; plumbing is below all of them, extras above.
CORE = {
    "data": set(), "model": set(), "icd": {"data"}, "acp": {"model"}, "alqa": {"data", "model"},
    "evaluate": {"alqa", "data", "model"},
    "train": {"acp", "alqa", "data", "evaluate", "icd", "model"}}
PLUMBING, EXTRAS, TESTS = (
    sorted(f"{folder}/{path.stem}" for path in (ROOT / folder).glob("*.py"))
    for folder in ("plumbing", "extras", "tests"))
OURS = (*CORE, *PLUMBING, *EXTRAS)  # all but the tests
MOST_TOKENS = 20_500  # of the core, whatever is added: a feature's home is plumbing or extras


def text_of(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def nodes_of(name, *kinds):
    """The nodes of these kinds of a file's syntax tree, all by default."""
    return [n for n in ast.walk(ast.parse(text_of(name))) if isinstance(n, kinds or ast.AST)]


def imported(name):
    """The names of all modules that a file of ours imports, anywhere in it: "plumbing/words"."""
    found = set()
    for node in nodes_of(name, ast.Import, ast.ImportFrom):
        names = {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names = {node.module} | {f"{node.module}.{name}" for name in names}
        found |= {module.replace(".", "/") for module in names}
    return found


def count_tokens(name):
    """The tokens of a file without comments and docstrings."""
    docstrings = set()
    for node in nodes_of(name, ast.Module, ast.ClassDef, ast.FunctionDef):
        if ast.get_docstring(node):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    kinds = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
    with open(ROOT / f"{name}.py", "rb") as file:
        return sum(token.type in kinds and token.start[0] not in docstrings
                   for token in tokenize.tokenize(file.readline))


def test_every_equation_has_one_home_which_the_readme_names():
    homes = []  # (number, "file `name`") of the tags "Eq. (n)" that begin the docstrings
    for name in OURS:
        for node in nodes_of(name, ast.FunctionDef, ast.ClassDef):
            first_line = (ast.get_docstring(node) or "").split("\n")[0]
            numbers = re.findall(r"Eq\. \((\d+)\)", first_line)
            homes += [(int(number), f"{name}.py `{node.name}`") for number in numbers]
    assert sorted(number for number, _ in homes) == list(range(1, 13))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| Eq\. \((\d+)\) \| [^|]* \| ([^|]*) \|$", text, flags=re.MULTILINE)
    assert sorted((int(number), home) for number, home in rows) == sorted(homes)

def test_every_file_is_known_and_the_core_stays_as_small_as_its_idea():
    assert {path.stem for path in ROOT.glob("*.py")} == {*CORE, "test_apl"}
    for name in CORE:
        assert Path(import_module(name).__file__) == ROOT / f"{name}.py"
    assert sum(map(count_tokens, CORE)) <= MOST_TOKENS
    for name in OURS:
        assert max(map(len, text_of(name).splitlines()), default=0) <= 100, name


def test_imports_run_one_way_and_never_round():
    for name in OURS:
        below = {*PLUMBING, *CORE.get(name, ()), *([*CORE, *EXTRAS] if name in EXTRAS else ())}
        ours = imported(name) & {*OURS, *TESTS, "test_apl"}
        assert ours <= below - {name}, name
    for floor in (PLUMBING, EXTRAS):
        graph = {name: imported(name) & set(floor) for name in floor}
        TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("name", [*OURS, *TESTS, "test_apl"])
def test_importing_does_nothing_and_nothing_refers_to_what_is_defined_below_it(name):
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AugAssign)
    body = ast.parse(text_of(name)).body
    line = {node.name: node.lineno for node in body if isinstance(node, kinds[2:4])}
    for node in body:
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        command = isinstance(node, ast.If) and "__main__" in ast.dump(node.test)
        threads = ast.unparse(node).startswith("os.environ.setdefault('OMP_WAIT_POLICY'")
        assert isinstance(node, kinds) or text or command or threads, node.lineno
        names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
        own = {n.id for n in names if isinstance(n.ctx, ast.Store)}
        own |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        for used in {n.id for n in names} & set(line) - own:
            assert command or line[used] <= node.lineno, (used, node.lineno)

def test_each_settings_class_adds_to_those_below():
    kinds = (data.DataSettings, model.DetectorSettings, evaluate.DetectionSettings, train.Settings)
    of_data, of_detector, of_detection, everything = (
        {f.name: (f.type, f.default, f.metadata) for f in fields(kind)} for kind in kinds)
    assert not of_data.keys() & of_detector.keys()
    assert of_data.keys() | of_detector.keys() < of_detection.keys() < everything.keys()
    for below in (of_data, of_detector, of_detection):
        assert everything | below == everything


def test_every_setting_is_commented_read_somewhere_and_has_a_stage_and_its_choices():
    source = "".join(map(text_of, (*CORE, *PLUMBING)))
    since, choices = {}, {}
    for f in fields(train.Settings):
        assert len(settings.comment_of(f)) > 1, f.name
        assert re.search(rf"\b(s|self|args)\.{f.name}\b", source), f.name
        since[f.name] = settings.home_of(f.name, train.Settings).since
        choices[f.name] = settings.choices_of(f)
    assert set(since.values()) == {*train.STAGES, "run"}
    pretrain, supervised, joint = (set(settings.settings_of_stages(
        train.Settings, train.STAGES[:n])) for n in (1, 2, 3))
    assert pretrain < supervised < joint
    assert joint == {name for name, stage in since.items() if stage != "run"}
    assert choices | {
        "alqa": model.BRANCHES, "soft_label": alqa.SOFT_LABELS, "threshold": alqa.THRESHOLDS,
        "scope": alqa.SCOPES, "icd": icd.REFINEMENTS, "icd_score": icd.SCORES,
        "acp": acp.ACP} == choices
