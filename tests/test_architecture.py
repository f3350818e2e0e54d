"""The shape of the package: imports point one way, nothing heavy is imported early, nothing dangerous at all."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gere

PACKAGE = Path(gere.__file__).parent
# A part may import those that stand before its line.
ORDER = (
    {"errors"},
    {"_log", "config", "_files", "ranks"},
    {"_records"},
    {"_compat", "losses", "sampler", "metrics"},
    {"model"},
    {"cache"},
    {"replay"},
    {"evaluation"},
    {"blend"},
    {"session"},
    {"ability"},
    {"trainer"},
    {"kif"},
    {"continual", "integrations", "report"},
    {"cli"},
    {"__main__"},
)
RANKS = {part: place for place, parts in enumerate(ORDER) for part in parts}
# What a part must not know.
FORBIDDEN = {
    "config": {"torch", "transformers", "pathlib"},
    "losses": {"transformers", "pathlib", "json", "gere.ranks", "gere._files", "gere._compat"},
    "sampler": {"datasets", "transformers", "pathlib"},
    "metrics": {"torch", "transformers", "pathlib"},
    "cache": {"transformers", "datasets"},
    "report": {"torch", "transformers"},
    "blend": {"datasets", "gere.losses"},
    "trainer": {"safetensors", "json", "gere.losses", "gere.cache.store", "gere.cache.build"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.name != "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_points_back(path):
    here = part_of(path)
    assert here in RANKS, f"give {here} a line of ORDER"
    targets = {name.split(".")[1] for name in imports(path) if name.startswith("gere.")} - {here}
    back = {target for target in targets if target in RANKS and RANKS[target] >= RANKS[here]}
    assert not back, f"{path.name} imports {back}"
    assert not imports(path) & FORBIDDEN.get(here, set())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_pickle_and_no_code_from_data(path):
    assert not {name.split(".")[0] for name in imports(path)} & {"pickle", "dill", "joblib"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "torch.load", "torch.save"}, called
            assert "trust_remote_code" not in {keyword.arg for keyword in node.keywords}


def test_every_rule_is_about_a_part_that_is_there():
    assert set(FORBIDDEN) <= set(RANKS) == {part_of(path) for path in FILES}


def test_the_top_level_is_one_screen():
    entries = [path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    assert len(entries) <= 25, sorted(path.name for path in entries)


def test_versions_are_compared_in_one_place():
    for path in FILES:
        if path.name != "_compat.py":
            text = path.read_text(encoding="utf-8")
            assert "__version__" not in text and "packaging" not in text, path


def test_public_names():
    assert len(gere.__all__) <= 15
    for name in gere.__all__:
        assert getattr(gere, name).__doc__, name
    assert set(gere.__all__) <= set(dir(gere))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gere.nothing  # noqa: B018


def test_import_is_light():
    script = "import sys, gere; print(*sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_trainer_brings_nothing_else_along():
    """What transformers' Trainer has loaded already is all that importing `GeReTrainer` may need."""
    script = (
        "import sys\nfrom transformers import Seq2SeqTrainer\nbefore = set(sys.modules)\n"
        "from gere import GeReTrainer\n"
        "names = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(names - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["gere"]
