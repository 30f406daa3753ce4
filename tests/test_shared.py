"""The repository's own layout: one order in every script, what focal_pp.py adds to focal.py, and how long files are."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.layout
SCRIPTS = ["focal.py", "focal_pp.py", "smac.py", "merpo.py"]
BANNERS = ["arguments", "networks", "task encoder", "losses", "update", "data and evaluation", "main"]
LINES = {"focal.py": 571, "focal_pp.py": 623, "smac.py": 626, "merpo.py": 731, "data.py": 1_656, "envs.py": 999}


def source(script):
    return (ROOT / script).read_text()


def imported(script):
    """Names of the modules that a file imports, at its top or anywhere."""
    nodes = list(ast.walk(ast.parse(source(script))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("script", SCRIPTS)
def test_banners_and_imports(script):
    text = source(script)
    assert re.findall(r"^# ={50,} (\d\. .*)$", text, re.M) == [f"{i}. {name}" for i, name in enumerate(BANNERS, 1)]
    allowed = {"data", "envs", "numpy", "torch", *sys.stdlib_module_names}
    assert {"data", "envs"} <= imported(script) <= allowed
    assert len(re.match(r'""".*?"""', text, re.S)[0].splitlines()) <= 45  # the first screen
    for node in ast.walk(ast.parse(text)):
        assert not isinstance(node, ast.FunctionDef) or node.end_lineno - node.lineno < 40, node.name


def test_what_all_scripts_share_knows_none_of_them():
    for name in ("focal", "smac", "merpo"):
        assert name not in source("data.py") + source("envs.py")
    assert "data" not in imported("envs.py")


def test_focal_pp_is_focal_with_attention_and_contrast():
    shown = subprocess.run(["diff", "focal.py", "focal_pp.py"], cwd=ROOT, capture_output=True, text=True).stdout
    assert 0 < sum(line[0] in "<>" for line in shown.splitlines()) <= 120
    starts = [i for i, line in enumerate(source("focal.py").splitlines(), 1) if line.startswith("# =====")]
    places = [int(line) for line in re.findall(r"^(\d+)(?:,\d+)?[acd]", shown, re.M)]
    parts = ["docstring", *BANNERS]
    touched = {parts[sum(start <= place for start in starts)] for place in places}
    assert touched == {"docstring", "arguments", "task encoder", "losses", "update"}


def functions(script):
    """{name: source} of every function and method, without comments."""
    found = {}
    for node in ast.parse(source(script)).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        names = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        found |= {names + part.name: ast.unparse(part) for part in inside if isinstance(part, ast.FunctionDef)}
    return found


def test_what_focal_pp_shares_with_focal_is_the_same():
    """So focal.py's tests hold for both."""
    ours, theirs = functions("focal_pp.py"), functions("focal.py")
    assert {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]} == {
        "Args.complete", "Encoder.__init__", "Encoder.forward", "Agent.__init__", "Agent.embed", "Agent.update",
    }  # fmt: skip
    assert ours.keys() - theirs.keys() == {
        "Encoder.transitions", "Block.__init__", "Block.forward", "contrast_loss",
    }  # fmt: skip


@pytest.mark.parametrize("script", list(LINES))
def test_files_stay_short(script):
    assert len(source(script).splitlines()) <= LINES[script]
