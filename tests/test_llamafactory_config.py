"""What `gere.integrations.llamafactory` refuses before it imports LLaMA-Factory, and how it would start processes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

from gere.errors import ConfigError, GeReError, UnsupportedSettingError
from gere.integrations.llamafactory import run, torchrun_options, worker_environment
from gere.integrations.llamafactory_config import let_audio_wait, split_config

SECTION = {"replay_strategy": "ce"}


@pytest.mark.parametrize(
    ("config", "error", "parts"),
    [
        ({"stage": "sft"}, ConfigError, ["no key gere", "num_interpolate_per_batch: 4", "llamafactory-cli"]),
        ({"gere": None}, ConfigError, ["no mapping", "None"]),
        ({"gere": {"replay_datset": "a"}}, ConfigError, ["'replay_datset'", "Did you mean replay_dataset?"]),
        ({"gere": {"max_length": 0}}, ConfigError, ["gere_config.max_length", "found:    0"]),
        ({"gere": {"w_strategy": "dynamic"}}, ConfigError, ["w_strategy", "'dynamic'"]),
        ({"stage": "dpo", "gere": SECTION}, UnsupportedSettingError, ["where:    stage", "sft or pt", "'dpo'"]),
        ({"use_hyper_parallel": True, "gere": SECTION}, UnsupportedSettingError, ["where:    use_hyper_parallel"]),
    ],
)
def test_a_config_that_cannot_be_run(config, error, parts):
    with pytest.raises(error) as failed:
        run(config)
    assert all(part in str(failed.value) for part in parts), failed.value


@pytest.mark.parametrize("name", ["USE_RAY", "USE_MCA", "USE_V1"])
def test_ways_around_the_trainer_are_refused(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(UnsupportedSettingError, match=name):
        run({"gere": SECTION})


def test_without_llamafactory_it_says_so():
    try:
        importlib.metadata.version("llamafactory")
    except importlib.metadata.PackageNotFoundError:
        with pytest.raises(GeReError, match="pip install llamafactory"):
            run({"gere": SECTION})
    else:
        pytest.skip("LLaMA-Factory is installed")


@pytest.mark.parametrize(
    ("environ", "devices", "expected"),
    [
        ({}, 2, "--nproc_per_node=2 --nnodes=1 --master_addr=127.0.0.1 --master_port=5 --node_rank=0"),
        (
            {"NPROC_PER_NODE": "4", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "99"},
            8,
            "--nproc_per_node=4 --nnodes=2 --master_addr=host --master_port=99 --node_rank=1",
        ),
        (
            {"RDZV_ID": "job", "MIN_NNODES": "1", "MAX_NNODES": "3", "MAX_RESTARTS": "2", "MASTER_ADDR": "host"},
            0,
            "--nproc_per_node=1 --nnodes=1:3 --rdzv_backend=c10d --rdzv_id=job "
            "--rdzv_endpoint=host:5 --max_restarts=2",
        ),
    ],
)
def test_processes_are_started_by_the_same_variables(environ, devices, expected):
    options = torchrun_options(environ, devices, free_port=5)
    assert options == expected.split()
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args([*options, "-m", "some.module"])
    assert parsed.module and parsed.training_script == "some.module"


@pytest.mark.parametrize(("optim_torch", "added"), [(None, True), ("1", True), ("0", False)])
def test_environment_of_the_workers(monkeypatch, optim_torch, added):
    monkeypatch.delenv("OPTIM_TORCH", raising=False)
    if optim_torch is not None:
        monkeypatch.setenv("OPTIM_TORCH", optim_torch)
    made = worker_environment({"HOME": "here"})
    assert made["HOME"] == "here" and ("TORCH_NCCL_AVOID_RECORD_STREAMS" in made) == added


@pytest.mark.parametrize("content", [None, "raise OSError('libc10_cuda.so: cannot open shared object file')"])
def test_torchaudio_is_asked_for_where_audio_is_read(tmp_path, monkeypatch, caplog, content):
    """It is missing, or made for another torch: LLaMA-Factory imports it at once, and text never uses it."""
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    monkeypatch.delitem(sys.modules, "torchaudio")
    if content is not None:
        (tmp_path / "torchaudio.py").write_text(content)
    elif importlib.util.find_spec("torchaudio") is not None:
        pytest.skip("torchaudio is installed")
    monkeypatch.syspath_prepend(tmp_path)
    let_audio_wait()
    assert "torchaudio" in caplog.text
    assert importlib.util.find_spec("torchaudio") is not None
    with pytest.raises(GeReError, match=r"torchaudio\.load[\s\S]*pip install torchaudio"):
        importlib.import_module("torchaudio").load("a.wav")


def test_torchaudio_that_works_is_left_alone(tmp_path, monkeypatch, caplog):
    (tmp_path / "torchaudio.py").write_text("load = 1")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    monkeypatch.delitem(sys.modules, "torchaudio")
    let_audio_wait()
    assert importlib.import_module("torchaudio").load == 1 and not caplog.text


def test_importing_it_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'llamafactory', 'omegaconf'}"
    script = f"import sys, gere.integrations.llamafactory; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""


def test_the_section_of_the_document_is_one():
    document = (ROOT / "docs" / "llamafactory.md").read_text(encoding="utf-8")
    block = yaml.safe_load(document.split("```yaml\n")[1].split("```")[0])
    _, stage, kwargs = split_config({**block, "stage": "pt"}, "the document")
    assert stage == "pt" and kwargs["num_interpolate_per_batch"] == 4 and "w_strategy" not in kwargs
    assert kwargs["gere_config"].replay_dataset == "general.jsonl"
