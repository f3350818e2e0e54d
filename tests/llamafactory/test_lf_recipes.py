"""The patches of docs/llamafactory.md, applied to a copy of the installed package and run by its own command."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("llamafactory.cli")

from lf_helpers import GENERAL, KEYS, ROOT, STEPS, settings, start, train_logs

DOCUMENT = (ROOT / "docs" / "llamafactory.md").read_text(encoding="utf-8")
PATCHES = re.findall(r"```diff\n(.*?)```", DOCUMENT, flags=re.S)
SCRIPT = """
import json, lf_helpers, llamafactory
from gere.integrations.llamafactory_config import let_audio_wait
let_audio_wait()  # the environment of the tests has torch for CPUs, for which PyPI has no torchaudio
from llamafactory.cli import main

steps = lf_helpers.record()
main()
assert llamafactory.__file__.startswith({copy!r}), llamafactory.__file__
lf_helpers.require_rows(steps, 4, 4)
lf_helpers.require_order(steps)
"""


@pytest.mark.parametrize("patch", PATCHES, ids=["gere_trainer in the workflow", "class derived from ours"])
def test_patch_applies_and_replays(tmp_path, patch):
    source = Path(str(importlib.metadata.distribution("llamafactory").locate_file("llamafactory")))
    shutil.copytree(source, tmp_path / "src" / "llamafactory", ignore=shutil.ignore_patterns("__pycache__"))
    command = ["patch", "-p1", "--fuzz=0", "--directory", str(tmp_path)]
    done = subprocess.run(command, input=patch, text=True, capture_output=True, timeout=30)
    assert done.returncode == 0 and "offset" not in done.stdout, done.stdout + done.stderr
    shutil.copy(GENERAL, tmp_path / "general.jsonl")
    # What LLaMA-Factory's own sampler and own loss are for; the latter fails on anything but a batch of task rows.
    config = settings(tmp_path, disable_shuffling=True, use_asft_loss=True)
    config.pop("gere")
    (tmp_path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    (tmp_path / "script.py").write_text(SCRIPT.format(copy=str(tmp_path)))
    start(["script.py", "train", "config.yaml"], tmp_path, tmp_path / "src", Path(__file__).parent)
    logs = train_logs(tmp_path / "out")
    assert len(logs) == STEPS and all(set(log) >= KEYS for log in logs)
    assert logs[0]["gere/tm"] == 0.0 < logs[-1]["gere/tm"]
