"""`run_multi_gpu.sh` starts the demo on several processes, by the files of `examples/accelerate`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT


@pytest.mark.slow
def test_run_multi_gpu_on_two_processes_of_a_cpu(tmp_path):
    command = ["bash", str(ROOT / "run_multi_gpu.sh"), "--nproc", "2", "--cpu", "--", "--out", str(tmp_path / "out")]
    small = ["--steps=6", "--warm-up-steps=0", "--task-rows=40", "--task-dev-rows=8", "--replay-rows=20"]
    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([*command, *small], capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 process(es)" in done.stdout and done.stdout.count("GeReTrainer replays") == 1
    assert list((tmp_path / "out" / "gere_saving").glob("anchor-*"))


def test_run_multi_gpu_says_how_it_is_called():
    done = subprocess.run(["bash", str(ROOT / "run_multi_gpu.sh"), "--steps", "6"], capture_output=True, text=True)
    assert done.returncode == 2 and "--strategy ddp|zero2|zero3|fsdp2" in done.stderr


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ddp", "MULTI_GPU"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED"), ("fsdp2", "FSDP"), ("cpu2", "MULTI_GPU")],
)
def test_accelerate_reads_its_files(name, kind):
    """Each names what is spread over the processes, and leaves the precision to the script."""
    config = load_config_from_file(str(ROOT / "examples" / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type == kind and config.num_processes == 2 and config.mixed_precision == "no"
    stages = {"zero2": 2, "zero3": 3}
    assert config.deepspeed_config.get("zero_stage") == stages.get(name)
    assert config.fsdp_config.get("fsdp_version") == {"fsdp2": 2}.get(name)
