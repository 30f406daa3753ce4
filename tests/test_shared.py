"""What the scripts have in common is byte for byte alike, and stands in the same order under the same banners."""

import ast
import re
from pathlib import Path

import pytest

import focal

ROOT = Path(focal.__file__).resolve().parent
SCRIPTS = ["focal.py", "focal_pp.py", "smac.py", "merpo.py"]
# MerPO has no task embedding: policies and critics of many tasks at once, none of which sees one
OWN = {"merpo.py": ["Actor", "sample_tanh_gaussian", "Critic", "mlp", "gaussian_kl", "plot_embeddings"]}
OWN_FLAGS = {"merpo.py": ["--context-size", "--final-lr", "--reward-scale"]}
ALIKE = [
    "Parser",
    "fail",
    "natural",
    "whole",
    "positive",
    "share",
    "variant",
    "BatchedLinear",
    "mlp",
    "Actor",
    "sample_tanh_gaussian",
    "gaussian_kl",
    "Critic",
    "step_down",
    "capture",
    "standardisation",
    "check_finite",
    "unless_diverged",
    "write_text",
    "write_metrics",
    "plot_embeddings",
    "save",
    "settings",
    "resume",
    "prepare_run",
    "write_settings",
    "write_final",
    "main",
]
BANNERS = [
    "1. arguments",
    "2. networks",
    "3. task encoder",
    "4. losses",
    "5. update",
    "6. evaluate",
    "7. plots and files",
    "8. main",
]


def source(script):
    return (ROOT / script).read_text()


def definitions(script):
    text = source(script)
    return {node.name: ast.get_source_segment(text, node) for node in ast.parse(text).body if hasattr(node, "name")}


def flags(script):
    return re.findall(r'"(--[a-z-]+)"', definitions(script)["shared_arguments"])


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_shared_blocks_are_alike(script):
    here, there = definitions(SCRIPTS[0]), definitions(script)
    shared = [name for name in ALIKE if name not in OWN.get(script, [])]
    assert [name for name in shared if here[name] != there.get(name)] == []
    assert [name for name in there if name in shared] == [name for name in here if name in shared]


@pytest.mark.parametrize("script", SCRIPTS)
def test_banners_and_imports(script):
    text = source(script)
    banners = re.findall(r"^# ={50,} (\d\. .*)$", text, re.M)
    assert banners == BANNERS
    ours = {name.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for name in node.names}
    assert ours & {path.stem for path in ROOT.glob("*.py")} == {"envs", "data"}
    assert len(re.match(r'""".*?"""', text, re.S)[0].splitlines()) <= 45  # the first screen


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_shared_flags_come_first_and_are_the_same(script):
    assert flags(script) == [flag for flag in flags(SCRIPTS[0]) if flag not in OWN_FLAGS.get(script, [])]
    body = definitions(script)["parse_args"]
    assert body.index("shared_arguments(") < body.index("algorithm_arguments(")
