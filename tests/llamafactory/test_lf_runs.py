"""LLaMA-Factory's own training with replay, in this process."""

from __future__ import annotations

import importlib
import json

import pytest

pytest.importorskip("llamafactory.cli")

from lf_helpers import KEYS, LORA, REPLAY, STEPS, record, require_order, require_rows, settings, train_logs

from gere import GeReMixin
from gere.errors import ConfigError
from gere.integrations.llamafactory import run
from gere.integrations.llamafactory_config import STAGES, let_audio_wait
from gere.model.states import is_reentrant

EVALUATED = {"val_size": 16, "do_eval": True, "eval_strategy": "steps", "eval_steps": 10}
GENERATED = {"predict_with_generate": True, "max_new_tokens": 3, "per_device_eval_batch_size": 4}


@pytest.fixture
def steps(monkeypatch):
    monkeypatch.setattr(GeReMixin, "get_batch_samples", GeReMixin.get_batch_samples)  # put back after the test
    return record()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="full, checkpointing as LLaMA-Factory has it"),
        pytest.param({"disable_gradient_checkpointing": True}, id="full, no checkpointing"),
        pytest.param(LORA, id="lora"),
        pytest.param({"packing": True}, id="packing"),
        pytest.param({"neat_packing": True}, id="neat packing"),
        pytest.param({"use_dft_loss": True}, id="dft loss"),
        pytest.param({"use_asft_loss": True}, id="asft loss"),
        pytest.param({"stage": "pt", "template": None, "cutoff_len": 32}, id="pre-training"),
        pytest.param(EVALUATED, id="evaluation"),
        pytest.param({**EVALUATED, **GENERATED}, id="generation"),
    ],
)
def test_replay_in_every_step(tmp_path, steps, changes):
    run(settings(tmp_path, **changes))
    require_rows(steps, 8 - REPLAY, REPLAY)
    assert is_reentrant(steps[0]["trainer"].model) == ("disable_gradient_checkpointing" not in changes)
    logs = train_logs(tmp_path / "out")
    assert len(logs) == STEPS and all(set(log) >= KEYS for log in logs)
    assert logs[0]["gere/tm"] == logs[0]["gere/violations"] == 0.0 < logs[-1]["gere/tm"]
    if not {"use_dft_loss", "use_asft_loss"} & set(changes):  # those losses do not fall at first
        assert sum(log["gere/task_loss"] for log in logs[-5:]) < sum(log["gere/task_loss"] for log in logs[:5])
    assert (tmp_path / "out" / "gere_anchor.json").is_file()
    if "val_size" in changes:
        results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
        assert ("eval_rouge-l" if "predict_with_generate" in changes else "eval_loss") in results
        history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
        assert len([log for log in history if "eval_runtime" in log]) == 2


def test_rows_come_in_the_order_of_the_file(tmp_path, steps):
    run(settings(tmp_path, disable_shuffling=True))
    require_rows(steps, 8 - REPLAY, REPLAY)
    require_order(steps)


@pytest.mark.parametrize(
    ("gere", "changes"),
    [({"replay_mode": "add"}, {}), ({}, {"streaming": True, "dataloader_num_workers": 1})],
    ids=["asked for", "streaming"],
)
def test_rows_are_added(tmp_path, steps, gere, changes):
    run(settings(tmp_path, gere=gere, **changes))
    require_rows(steps, 8, REPLAY)
    assert train_logs(tmp_path / "out")[0]["gere/tm"] == 0.0


def test_without_replay_it_is_llamafactory_bit_for_bit(tmp_path):
    let_audio_wait()
    from llamafactory.train.tuner import run_exp

    plain = settings(tmp_path / "plain")
    plain.pop("gere")
    run_exp(plain)
    run(settings(tmp_path / "none", gere={"replay_strategy": "none"}))
    plain, none = train_logs(tmp_path / "plain" / "out"), train_logs(tmp_path / "none" / "out")
    assert plain == none and len(none) == STEPS
    weights = [(tmp_path / name / "out" / "model.safetensors").read_bytes() for name in ("plain", "none")]
    assert weights[0] == weights[1]


def test_resume_goes_on_with_the_same_rows(tmp_path, steps):
    run(settings(tmp_path, save_strategy="steps", save_steps=10))
    whole, rows = train_logs(tmp_path / "out"), [step["tokens"] for step in steps]
    steps.clear()
    checkpoint = str(tmp_path / "out" / "checkpoint-10")
    run(settings(tmp_path, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=checkpoint))
    assert [step["tokens"] for step in steps] == rows[10:]
    for ours, theirs in zip(train_logs(tmp_path / "resumed")[10:], whole[10:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_llamafactory_is_as_it_was_afterwards(tmp_path):
    def classes():
        return [getattr(importlib.import_module(module), name) for module, name in STAGES.values()]

    before = classes()
    for changes, error in (({"max_steps": 1}, None), ({"dataset": "nowhere"}, ValueError)):
        if error is None:
            run(settings(tmp_path, **changes))
        else:
            with pytest.raises(error):
                run(settings(tmp_path, **changes))
        assert classes() == before
    with pytest.raises(ConfigError, match="num_interpolate_per_batch"):
        run(settings(tmp_path, gere={"num_interpolate_per_batsch": 3}))
    assert classes() == before
