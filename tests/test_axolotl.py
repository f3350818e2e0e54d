"""The plugin for Axolotl.

Against Axolotl itself where it is installed (written for 0.19.0), else against `axolotl_stand_in.py`, which follows
its published interface. The last tests run Axolotl's command line and are left out without it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import axolotl_stand_in as stand_in
import pytest
from conftest import DATA, ROOT, TINY, load_tiny, read_jsonl
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer
from watching import Watch

from gere.errors import ConfigError, UnsupportedSettingError
from gere.trainer import GeReMixin

REAL = importlib.util.find_spec("axolotl") is not None
NAME = "gere.integrations.axolotl.GeRePlugin"
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")


@pytest.fixture
def manager(monkeypatch):
    """Axolotl's plugin manager, as fresh as at the start of a process; the stand-in's without Axolotl."""
    if not REAL:
        for name, module in stand_in.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
        if importlib.util.find_spec("pydantic") is None:
            monkeypatch.setitem(sys.modules, "pydantic", SimpleNamespace(BaseModel=object))
    monkeypatch.delitem(sys.modules, "gere.integrations.axolotl", raising=False)
    manager = importlib.import_module("axolotl.integrations.base").PluginManager.get_instance()
    monkeypatch.setattr(manager, "plugins", {})
    yield manager
    sys.modules.pop("gere.integrations.axolotl", None)


def config(section=(("num_interpolate_per_batch", 3),), **changes):
    return {"plugins": [NAME], "gere": dict(section), **changes}


def chosen(manager, cfg):
    manager.register(NAME)
    manager.plugins[NAME].register(cfg)
    return manager.get_trainer_cls(cfg)


def test_gives_axolotls_trainer_replay(manager):
    cls = chosen(manager, config())
    base = importlib.import_module("axolotl.core.trainers.base").AxolotlTrainer
    assert issubclass(cls, GeReMixin) and issubclass(cls, base)
    assert cls.__name__ == "GeReAxolotlTrainer"


class Theirs(Trainer):
    """A trainer of somebody else."""


@pytest.mark.parametrize("first", [True, False])
def test_wraps_the_trainer_of_another_plugin(manager, first):
    other = SimpleNamespace(get_trainer_cls=lambda cfg: Theirs)
    if not first:
        manager.plugins["other"] = other
    manager.register(NAME)
    if first:
        manager.plugins["other"] = other
    cls, cfg = manager.get_trainer_cls(config()), config()
    assert issubclass(cls, Theirs) and issubclass(cls, GeReMixin) == first
    if not first:
        with pytest.raises(UnsupportedSettingError, match=r"Put it first"):
            manager.plugins[NAME].add_callbacks_post_trainer(cfg, Theirs.__new__(Theirs))


def test_wraps_the_trainer_that_the_config_names(manager):
    cls = chosen(manager, config(trainer_cls="transformers.Seq2SeqTrainer"))
    assert [base.__name__ for base in cls.__mro__[1:4]] == ["GeReSeq2SeqTrainer", "GeReMixin", "Seq2SeqTrainer"]


def test_a_later_config_of_the_process_has_no_replay(manager):
    assert chosen(manager, config())
    later = {"plugins": ["another.Plugin"], "gere": {"nonsense": 1}}
    plugin = manager.plugins[NAME]
    plugin.register(later)
    assert plugin.get_trainer_cls(later) is None and plugin.add_callbacks_post_trainer(later, None) == []


@pytest.mark.parametrize(
    ("cfg", "error", "parts"),
    [
        ({"plugins": [NAME]}, ConfigError, ["no key gere", "gere: {}"]),
        (config([("replay_datset", "a")]), ConfigError, ["'replay_datset'", "Did you mean replay_dataset?"]),
        (config([("max_length", 0)]), ConfigError, ["gere_config.max_length"]),
        ({"plugins": [NAME], "gere": "general.jsonl"}, ConfigError, ["no mapping", "'general.jsonl'"]),
        (config(rl="dpo"), UnsupportedSettingError, ["where:    rl", "'dpo'"]),
        (config(reward_model=True), UnsupportedSettingError, ["where:    reward_model"]),
        (config(model_config_type="mamba"), UnsupportedSettingError, ["where:    model_config_type", "mamba"]),
    ],
)
def test_refused_before_anything_is_loaded(manager, cfg, error, parts):
    with pytest.raises(error) as caught:
        chosen(manager, cfg)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(("section", "tasks"), [({}, 8), ({"replay_mode": "replace"}, 5)])
def test_rows_are_added_unless_the_section_says_otherwise(
    manager, section, tasks, tmp_path, tokenizer, general, task, arguments, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    section = {"num_interpolate_per_batch": 3, "replay_dataset": general, "max_length": 48, **section}
    cls = chosen(manager, config(section, trainer_cls="transformers.Trainer"))
    collator = DataCollatorForSeq2Seq(tokenizer)
    given = {"model": load_tiny(), "args": arguments(max_steps=1), "train_dataset": task, "data_collator": collator}
    trainer = cls(processing_class=tokenizer, **given)
    watch = Watch(trainer, general)
    trainer.train()
    assert trainer.replay.rows_per_step == 3 and watch.counts == [(tasks, 3)]


@pytest.fixture(autouse=True)
def own_logger():
    """The plugin sets up the logger of the library for the whole process."""
    logger = logging.getLogger("gere")
    level, handlers = logger.level, [*logger.handlers]
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


def test_lines_are_seen_where_axolotl_drops_what_is_not_its_own(
    manager, tmp_path, tokenizer, general, task, arguments, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "axolotl")
    seen = []

    class Console(logging.Handler):
        def emit(self, record):
            if record.name.startswith("axolotl") or record.levelno >= logging.WARNING:
                seen.append(record.getMessage())

    monkeypatch.setattr(logging.root, "handlers", [Console()])
    cls = chosen(manager, config({"replay_dataset": general, "max_length": 48}, trainer_cls="transformers.Trainer"))
    given = {"model": load_tiny(), "args": arguments(max_steps=1), "train_dataset": task}
    trainer = cls(processing_class=tokenizer, data_collator=DataCollatorForSeq2Seq(tokenizer), **given)
    trainer.train()
    lines = [line for line in seen if line.startswith("gere: ")]
    assert len(lines) == 2 and lines[1].endswith(trainer.replay.summary())


@pytest.mark.skipif(REAL, reason="the command line of Axolotl itself is run below")
@pytest.mark.parametrize("packing", [False, True])
def test_trains_with_the_stand_in(manager, tmp_path, tokenizer, general, task, arguments, packing):
    section = {"num_interpolate_per_batch": 3, "gere_hidden_state_saving_dir": str(tmp_path / "saving")}
    section |= {"replay_dataset": general, "max_length": 48, "w_strategy": "dy"}
    cfg = config(section)
    manager.register(NAME)
    args = arguments(max_steps=12)
    args.sample_packing = packing
    collator = DataCollatorForSeq2Seq(tokenizer)
    given = {"model": load_tiny(), "args": args, "train_dataset": Dataset.from_list(task), "data_collator": collator}
    trainer = stand_in.build_trainer(manager, cfg, processing_class=tokenizer, **given)
    trainer.train()
    check_logs(trainer.state.log_history, steps=12, epochs=2)
    assert json.loads((tmp_path / "out" / "gere_anchor.json").read_text())["anchor"] == trainer.replay.anchor.key


def check_logs(history, steps, epochs):
    logs = [log for log in history if "loss" in log]
    assert len(logs) == steps and logs[-1]["epoch"] == epochs
    assert logs[0]["gere/tm"] == 0.0 and abs(logs[0]["gere/forgetting"]) < 1e-5 and logs[-1]["gere/tm"] > 0


def test_without_axolotl_the_plugin_says_so():
    script = (
        "import sys; sys.modules['axolotl'] = None; import gere.integrations.axolotl as module\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "try: module.GeRePlugin()\n"
        "except module.GeReError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Axolotl cannot be imported" in done.stdout and "Install Axolotl" in done.stdout


SECTION = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "axolotl.md").read_text(encoding="utf-8"), re.DOTALL)[1]
BASE = """
base_model: {model}
datasets:
  - path: task.jsonl
    ds_type: json
    type: alpaca
output_dir: out
sequence_len: 1024
micro_batch_size: 2
gradient_accumulation_steps: 2
num_epochs: 2
learning_rate: 1e-2
optimizer: adamw_torch
logging_steps: 1
val_set_size: 0
bf16: false
fp16: false
attn_implementation: sdpa
{more}
"""
LORA = """
adapter: lora
lora_r: 4
lora_alpha: 8
lora_target_linear: true
lora_mlp_kernel: false
lora_qkv_kernel: false
lora_o_kernel: false
"""


def axolotl_train(folder, more, section=SECTION):
    """Run Axolotl's command line on the recipe of the document, in a folder with its files."""
    rows = [json.dumps(row) for row in read_jsonl(DATA / "task.jsonl", 40)]
    (folder / "task.jsonl").write_text("\n".join(rows), encoding="utf-8")
    texts = [json.dumps(row) for row in read_jsonl(DATA / "general.jsonl", 24)]
    (folder / "general.jsonl").write_text("\n".join(texts), encoding="utf-8")
    (folder / "config.yaml").write_text(BASE.format(model=TINY, more=more) + section, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "axolotl.cli.train", "config.yaml"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280)


@pytest.mark.skipif(not REAL, reason="needs Axolotl")
@pytest.mark.parametrize(
    ("more", "steps", "epochs"),
    [("", 20, 2), ("sample_packing: true", 2, 1), (LORA, 20, 2)],  # Axolotl leaves out a part of a packed epoch
    ids=["full", "packing", "lora"],
)
def test_the_recipe_trains_by_axolotls_command_line(tmp_path, more, steps, epochs):
    done = axolotl_train(tmp_path, more)
    assert done.returncode == 0, done.stderr[-3000:]
    last = max((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    state = json.loads((last / "trainer_state.json").read_text())
    check_logs(state["log_history"], steps, epochs)
    named = [json.loads((folder / "gere_anchor.json").read_text())["anchor"] for folder in (last, last.parent)]
    assert [f"anchor-{name}" for name in named] == 2 * [
        path.name for path in (tmp_path / "gere_saving").glob("anchor-*")
    ]


@pytest.mark.skipif(not REAL, reason="needs Axolotl")
def test_axolotl_stops_at_a_wrong_name(tmp_path):
    done = axolotl_train(tmp_path, "", SECTION + "  replay_colum: text\n")
    assert done.returncode != 0 and "Did you mean replay_column?" in done.stderr
    assert not (tmp_path / "out").exists()
