"""Files that gere wrote, as damage or a stranger may leave them: each is read right or refused by name."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import transformers
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save, save_file
from test_cache import ToyModel, plan_of, toy_rows
from transformers import Trainer

from gere import GeReConfig
from gere._files import canonical_json, sha256
from gere.cache import Anchor, build_anchor, open_named, open_or_build
from gere.cache.fingerprint import architecture_digest, config_digest, key_of
from gere.cache.gc import collect
from gere.cache.store import read_manifest
from gere.cli.main import main
from gere.cli.settings import read_kwargs
from gere.continual import read_sequence
from gere.continual.answers import Scores
from gere.continual.folder import Matrix, RunFolder, read_matrix
from gere.errors import (
    CacheCorruptError,
    CacheError,
    CacheFolderError,
    ConfigError,
    GeReError,
    NonFiniteStateError,
    brief,
)
from gere.losses.strategy import make_strategy
from gere.losses.weighting import AutoWeight
from gere.replay.kept import read_kept, write_kept
from gere.report import make_report
from gere.session.checkpoint import keys_in_runs, read_key, read_weight

# Values that JSON can hold and that no field of gere has.
STRANGE = [
    *(None, True, False, -1, 2**63, 10**40, 10**3000, 1e308, 5e-324, float("nan"), float("inf"), 0.5, "", "x", "\x00"),
    *(
        "..",
        "../x",
        "/dev/zero",
        "a" * 5000,
        "\ud800",
        "\u2028",
        "NaN",
        [],
        {},
        [[]],
        {"a": {}},
        [1] * 3,
        [None],
        {"rows": 1},
    ),
]
BROKEN = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"1",
    b"\xff\xfe",
    b"NaN",
    b"\x00",
    b"[" * 100_000,
    b'{"a":' * 990 + b"1" + b"}" * 990,
]
TASKS = ["one", "two"]
MATRIX = {
    "format": 1,
    "tasks": TASKS,
    "accuracy": [[0.5, 0.5]],
    "invalid": [[0.0, 0.0]],
    "before": [0.1, 0.1],
    "before_invalid": [0.0, 0.0],
    "general": [{"general/loss": 3.0}, {"general/loss": None}],
}
STATE = {"global_step": 2, "max_steps": 5, "log_history": [{"step": 1, "loss": 1.0}], "epoch": 1.0}


def changed(content, rng):
    """Change, drop or add a field at any depth."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.randrange(1, 3)):
        inner = content
        while (
            isinstance(inner, dict) and rng.random() < 0.5 and any(isinstance(value, dict) for value in inner.values())
        ):
            inner = rng.choice([value for value in inner.values() if isinstance(value, dict)])
        name = rng.choice([*inner, "extra"])
        if rng.random() < 0.3:
            inner.pop(name, None)
        else:
            inner[name] = rng.choice(STRANGE)
    return content


def sealed(content):
    content.pop("sha256", None)
    return canonical_json({**content, "sha256": sha256(canonical_json(content))})


@pytest.fixture
def built(tmp_path):
    fields = {"weights": "w", "texts": "t"}
    root = tmp_path / "saving"
    return open_or_build(root, fields, builder(fields), reuse=True)


def builder(fields, model=None):
    def build(folder, leads):
        build_anchor(folder, plan_of(toy_rows(), fields=fields), model or ToyModel(), progress=False)

    return build


def use_anchor(folder):
    anchor = Anchor(folder)
    return anchor.base_ce, anchor.heldout_ce, anchor.constants, [anchor.targets(row) for row in range(12)]


def use_weight(folder):
    weight = AutoWeight(make_strategy("tm", {}, depth=1, live=False, half=False))
    weight.load_state_dict(read_weight(folder), folder)
    assert weight(torch.ones(3), torch.ones(3)).isfinite().all()
    weight.end_step(4, lambda values: torch.tensor([2.0, 4.0]))
    canonical_json(weight.state_dict())


def use_run(out):
    folder = RunFolder(out, TASKS)
    matrix = read_matrix(out)
    folder.begin({"name": "a", "seed": 0})
    folder.checkpoint(0)
    folder.write_logs(0)
    if matrix is not None:
        matrix.add([Scores(0.5, 0.0)] * 2, {"general/loss": float("nan")})
        matrix.write(out)


def sources(tmp_path):
    """Each format: its file, its content, and what reads it."""
    run, saving = tmp_path / "run", tmp_path / "texts"
    task = run / "task-01-one"
    (task / "checkpoint-2").mkdir(parents=True)
    for name, content in {"matrix.json": MATRIX, "sequence.json": {"format": 1, "name": "a", "seed": 0}}.items():
        (run / name).write_text(json.dumps(content))
    for folder in (task, task / "checkpoint-2"):
        (folder / "trainer_state.json").write_text(json.dumps(STATE))
    write_kept(saving / "replay-self-0.jsonl", [{"text": "a text"}], {"source": "self"})
    (tmp_path / "gere_anchor.json").write_text(json.dumps({"format_version": 1, "anchor": "a" * 32}))
    weight = {"format_version": 1, "distance": "tm over violations", "unrelated": 1.0, "number": 4.0, "rows": 4}
    (tmp_path / "gere_weight.json").write_text(json.dumps(weight))
    return {
        "anchor": (tmp_path / "gere_anchor.json", lambda: (read_key(tmp_path), keys_in_runs([tmp_path]))),
        "weight": (tmp_path / "gere_weight.json", lambda: use_weight(tmp_path)),
        "matrix": (run / "matrix.json", lambda: use_run(run)),
        "sequence": (run / "sequence.json", lambda: use_run(run)),
        "state": (task / "trainer_state.json", lambda: use_run(run)),
        "checkpoint": (task / "checkpoint-2" / "trainer_state.json", lambda: use_run(run)),
        "texts": (saving / "replay-self-0.jsonl", lambda: read_kept(saving / "replay-self-0.jsonl", 1, "")),
    }


@pytest.mark.parametrize("name", ["anchor", "weight", "matrix", "sequence", "state", "checkpoint", "texts"])
def test_whatever_a_file_holds_is_read_or_refused_by_name(name, tmp_path):
    path, read = sources(tmp_path)[name]
    good, rng, refused = json.loads(path.read_bytes()), random.Random(name), 0
    read()
    for raw in [*BROKEN, *(json.dumps(changed(good, rng)).encode() for _ in range(60))]:
        # A checkpoint that cannot be read is removed.
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(raw + b"\n" * (name == "texts"))
        try:
            read()
        except GeReError as error:
            refused += 1
            assert len(str(error)) < 6000, "a message shows the beginning of what it found"
            assert "where:" in str(error) and "expected:" in str(error) and "found:" in str(error)
    assert refused > 5 or name == "checkpoint"


def test_whatever_a_manifest_holds_is_opened_right_or_refused_by_name(built):
    path = built.folder / "manifest.json"
    good, rng, right = json.loads(path.read_bytes()), random.Random(0), use_anchor(built.folder)
    for number in range(len(BROKEN) + 100):
        content = changed(good, rng)
        raw = BROKEN[number] if number < len(BROKEN) else json.dumps(content).encode()
        if number % 2 and number >= len(BROKEN):
            try:
                raw = sealed(content)
            except ValueError:
                continue
        path.write_bytes(raw)
        try:
            found = use_anchor(built.folder)
        except CacheError:
            continue
        assert torch.equal(found[0], right[0]) and len(found[3]) == len(right[3])
        assert main(["cache", "info", str(built.folder.parent)]) in (0, 1)


@pytest.mark.parametrize(
    "name", ["/dev/zero", "../outside.safetensors", "pipe.safetensors", "link.safetensors", "\x00"]
)
def test_a_manifest_leads_to_no_file_outside_and_to_no_device(built, name):
    folder = built.folder
    (folder.parent / "outside.safetensors").write_bytes(b"secret")
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "link.safetensors").symlink_to(folder.parent / "outside.safetensors")
    content = json.loads((folder / "manifest.json").read_bytes())
    content["files"][name] = sha256(b"secret")
    (folder / "manifest.json").write_bytes(sealed(content))
    with pytest.raises(CacheCorruptError):
        Anchor(folder)


def test_a_device_in_place_of_a_file_is_refused(built, tmp_path):
    (built.folder / "manifest.json").unlink()
    (built.folder / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(CacheCorruptError, match="no regular file"):
        read_manifest(built.folder)
    (tmp_path / "c.yaml").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="more than"):
        read_sequence(tmp_path / "c.yaml")


@pytest.mark.parametrize("place", ["shard", "start", "tokens", "base_ce", "codes"])
def test_tensors_that_do_not_fit_are_refused_by_name(built, place):
    """Sealed anew, as a hand that can write the folder could."""
    name = "regions-00000.safetensors" if place == "codes" else "rows.safetensors"
    tensors = load_file(built.folder / name)
    for raw in (
        save({**tensors, place: tensors[place][:-1].clone()}),
        save({**tensors, place: tensors[place].to(torch.float64)})
        if place != "codes"
        else save({"x": tensors[place]}),
        save({key: values for key, values in tensors.items() if key != place}),
        b"\x08\x00\x00\x00\x00\x00\x00\x00notjson!",
    ):
        (built.folder / name).write_bytes(raw)
        content = json.loads((built.folder / "manifest.json").read_bytes())
        content["files"][name] = sha256(raw)
        (built.folder / "manifest.json").write_bytes(sealed(content))
        with pytest.raises(CacheCorruptError, match=r"(rows|regions-00000)\.safetensors"):
            use_anchor(built.folder)


def test_a_shard_that_is_removed_while_a_training_reads_has_a_name(built):
    (built.folder / "regions-00000.safetensors").unlink()
    with pytest.raises(CacheCorruptError, match="regions-00000"):
        built.targets(0)


# What settings may stand for

BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]\n", "[" * 1000, "a: !!python/name:os.system", "a: [1"])
def test_settings_that_stand_for_too_much_are_refused_without_being_shown(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    for read in (lambda: read_sequence(file), lambda: read_kwargs(file, [])):
        started = time.monotonic()
        with pytest.raises(ConfigError) as caught:
            read()
        assert len(str(caught.value)) < 6000 and time.monotonic() - started < 20
    file.write_text("model: m\ntasks: [a]\nout: o\n")
    with pytest.raises(ConfigError):
        read_sequence(file, ["tasks=[a"])


def test_aliases_of_ordinary_settings_are_read(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\ntasks: [a]\nout: o\ntraining: &t {max_steps: 2}\ngere: {<<: *t}\ntrainer: gere\n")
    assert read_sequence(file).gere == {"max_steps": 2}


def test_a_message_shows_a_value_in_bounds():
    value = ["x"]
    for _ in range(30):
        value = [value] * 10
    for found in (value, 10**5000, {"a": value}, "x" * 10**6):
        assert len(brief(found)) < 3000
        with pytest.raises(ConfigError) as caught:
            GeReConfig(band_width=found)
        assert len(str(caught.value)) < 6000
    assert brief({"a": [1, "b"]}) == "{'a': [1, 'b']}"


@pytest.mark.parametrize("name", ["band_width", "std_floor", "layers", "replay_size"])
def test_numbers_that_no_float_holds_are_refused_by_name(name):
    for value in (10**400, "9" * 5000):
        with pytest.raises(ConfigError, match=name):
            GeReConfig(
                **{name: value, **({"replay_dataset": ["a"]} if name == "replay_size" and value == 10**400 else {})}
            )
            raise ConfigError(f"{name} is taken as it is")  # a number of texts has no upper end


# Clean-up beside other runs


def test_gc_asks_what_runs_need_while_no_run_can_begin(built):
    def find():
        with pytest.raises(Timeout):
            FileLock(built.folder.parent / ".lock").acquire(timeout=0)
        return {built.key}

    assert collect(built.folder.parent, find, delete=True) == [] and built.folder.exists()


def test_gc_spares_texts_that_a_start_has_just_written_or_read(built):
    root = built.folder.parent
    path = root / "replay-self-0.jsonl"
    write_kept(path, [{"text": "a text"}], {"source": "self"})
    assert collect(root, None, delete=False) == []
    os.utime(path, (0, 0))
    assert [item.path for item in collect(root, None, delete=False)] == [path]
    read_kept(path, 1, "")
    assert collect(root, None, delete=True) == [] and path.exists()


def test_an_anchor_is_named_before_another_run_could_take_it(tmp_path):
    fields = {"weights": "w", "texts": "t"}
    named = []

    def claim(key):
        named.append(key)
        # The first time it is built, and no clean-up can come; then it is opened, and one comes just before.
        if len(named) == 1:
            with pytest.raises(Timeout):
                FileLock(tmp_path / ".lock").acquire(timeout=0)
        if len(named) == 2:
            shutil.rmtree(tmp_path / f"anchor-{key}")

    for _ in range(2):
        anchor = open_or_build(tmp_path, fields, builder(fields), reuse=True, claim=claim)
        use_anchor(anchor.folder)
    assert named == [key_of(fields)] * 3


def test_the_last_steps_of_a_build_have_names_for_errors_of_the_disk(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    for step in ("unlink", "iterdir", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, step, fail)
            with pytest.raises(CacheFolderError, match="full"):
                build_anchor(tmp_path / "anchor-a", plan_of(toy_rows()), ToyModel(), progress=False)
    (tmp_path / "anchor-a.partial" / "a folder" / "below").mkdir(parents=True)
    build_anchor(tmp_path / "anchor-a", plan_of(toy_rows()), ToyModel(), progress=False)
    use_anchor(tmp_path / "anchor-a")


# What the key of an anchor depends on


HEADS = {"num_key_value_heads": 2, "head_dim": 8}


def tiny(name, **settings):
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = getattr(transformers, f"{name}Config")(
        **sizes, intermediate_size=32, max_position_embeddings=64, **settings
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("GPTNeoX", {"use_parallel_residual": True}, {"use_parallel_residual": False}),
        ("Gemma2", {"hidden_activation": "gelu_pytorch_tanh", **HEADS}, {"hidden_activation": "silu", **HEADS}),
        ("Llama", {"attention_dropout": 0.0}, {"pad_token_id": 0, "attention_dropout": 0.1, "use_cache": False}),
    ],
)
def test_a_setting_is_in_the_key_if_the_model_says_something_else(name, one, other, tmp_path):
    first, second = tiny(name, **one), tiny(name, **other)
    second.load_state_dict(first.state_dict())
    ids = torch.arange(10)[None]
    same = torch.equal(first(ids).logits, second(ids).logits)
    digests = [(architecture_digest(model), config_digest(model)) for model in (first, second)]
    assert (digests[0] == digests[1]) is same
    first.save_pretrained(tmp_path)
    again = getattr(transformers, f"{name}ForCausalLM").from_pretrained(tmp_path)
    assert config_digest(again) == config_digest(first)


def test_a_run_of_an_older_version_goes_on_with_its_anchor(tmp_path):
    old = {"weights": "w", "texts": "t"}
    key = open_or_build(tmp_path, old, builder(old), reuse=True).key
    assert open_named(tmp_path, key, {"texts": "t", "config": "c"}).key == key
    new = {**old, "config": "c"}
    anchor = open_or_build(tmp_path, new, builder(new), reuse=True)
    assert anchor.key != key and len(list(tmp_path.glob("anchor-*"))) == 2
    with pytest.raises(CacheError, match="config"):
        open_named(tmp_path, anchor.key, {"texts": "t", "config": "d"})


# Run folders


def test_a_model_that_diverged_leaves_null_and_the_report_shows_it(tmp_path):
    nan = {"general/loss": float("nan")}
    RunFolder(tmp_path, TASKS).begin({"name": "a", "seed": 0, "tasks": TASKS, "settings": {}})
    matrix = Matrix(TASKS)
    matrix.begin([Scores(0.5, 0.0)] * 2, {"general/loss": 3.0})
    matrix.add([Scores(0.0, 1.0)] * 2, nan)
    matrix.write(tmp_path)
    assert read_matrix(tmp_path) == matrix and matrix.general[1] == {"general/loss": None}
    assert "1 of 2 tasks" in make_report([tmp_path]).markdown


def test_names_of_a_task_folder(tmp_path):
    folder = RunFolder(tmp_path / "run", ["n" * 250])
    task = folder.task(0)
    (task / "checkpoint-best").mkdir(parents=True)
    (task / "checkpoint-8").write_text("a file")
    (tmp_path / "elsewhere").mkdir()
    (task / "checkpoint-9").symlink_to(tmp_path / "elsewhere")
    (task / "checkpoint-3").mkdir()
    (task / "checkpoint-3" / "trainer_state.json").write_text(json.dumps(STATE))
    save_file({"weight": torch.zeros(1)}, task / "checkpoint-3" / "model.safetensors")
    assert folder.checkpoint(0) == task / "checkpoint-3"
    assert (tmp_path / "elsewhere").is_dir() and (task / "checkpoint-best").is_dir()


def saved(arguments, steps=4):
    return arguments(save_strategy="steps", save_steps=2, max_steps=steps)


def test_resume_true_goes_past_a_torn_checkpoint(make_trainer, arguments, tmp_path):
    whole = make_trainer(args=saved(arguments))
    whole.train()
    (tmp_path / "out" / "checkpoint-4" / "trainer_state.json").unlink()
    again = make_trainer(args=saved(arguments))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    for one, other in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_run_that_was_killed_after_its_last_checkpoint_takes_no_further_step(make_trainer, arguments):
    whole = make_trainer(args=saved(arguments))
    whole.train()
    again = make_trainer(args=saved(arguments))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    for one, other in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


# A training that diverges


class Break(transformers.TrainerCallback):
    """Changes the model before a step."""

    def __init__(self, step, change):
        self.step, self.change = step, change

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step - 1:
            with torch.no_grad():
                self.change(model)


@pytest.mark.parametrize(("w", "value"), [("auto", 1e38), ("dy", float("nan"))])
def test_a_training_that_diverges_says_so_at_that_step(make_trainer, arguments, w, value):
    trainer = make_trainer(args=saved(arguments), w=w)
    trainer.add_callback(Break(2, lambda model: model.model.norm.weight.fill_(value)))
    with pytest.raises(NonFiniteStateError, match="step 2"):
        trainer.train()
    assert trainer.state.global_step == 1


class NanTask(Trainer):
    """Its task loss is NaN in the second step, with or without a gradient that is."""

    harmless = False

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.state.global_step != 1:
            return loss
        return loss * 0 + float("nan") if self.harmless else loss * float("nan")


@pytest.mark.parametrize("harmless", [False, True])
def test_a_task_loss_that_is_nan_ends_the_training_if_it_harms_the_weights(
    make_trainer, arguments, monkeypatch, caplog, harmless
):
    from gere import gere_trainer

    monkeypatch.setattr(NanTask, "harmless", harmless)
    cls = gere_trainer(NanTask)
    like = make_trainer(args=arguments())
    trainer = cls(
        like.model,
        like.args,
        like.data_collator,
        like.train_dataset,
        processing_class=like.processing_class,
        gere_hidden_state_saving_dir=like._gere.folder,
        num_interpolate_per_batch=4,
        gere_config=like._gere.config,
    )
    if harmless:
        trainer.train()
        assert "task loss of step 2" in caplog.text
        return
    with pytest.raises(NonFiniteStateError, match="step 2, the task rows"):
        trainer.train()
    assert all(bool(tensor.isfinite().all()) for tensor in trainer.model.state_dict().values())


# Commands


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    RunFolder(tmp_path / "run", TASKS).begin({"name": "a", "seed": 0, "tasks": TASKS, "settings": {}})
    page = tmp_path / "page.html"
    page.write_text("the page of before")

    def fail(*_):
        raise OSError(28, "No space left on device")

    words = ["report", str(tmp_path / "run"), "--out", str(page)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        assert main(words) == 1
    assert page.read_text() == "the page of before" and "No space left" in capsys.readouterr().err
    assert main(words) == 0 and page.read_text().startswith("<!")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_command_with_one_line(number, monkeypatch, tmp_path, capsys):
    left = []

    def work(*_):
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            left.append(folder)
            os.kill(os.getpid(), number)
            time.sleep(5)

    monkeypatch.setattr("gere.report.make_report", work)
    if number == signal.SIGINT:
        # A shell starts what runs in the background without it.
        signal.signal(number, signal.default_int_handler)
    before = signal.getsignal(number)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 128 + number
    said = capsys.readouterr().err.strip()
    assert said == f"gere: stopped by {signal.Signals(number).name}" and list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) is before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_of_a_command_behind(number, tmp_path):
    (tmp_path / "tmp").mkdir()
    model = Path(__file__).parents[1] / "base_llms" / "llama-tiny-random"
    words = f"replay --source self=2000 --model {model} --out {tmp_path / 'out.jsonl'}".split()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "HF_HUB_OFFLINE": "1"}
    started = subprocess.Popen(
        [sys.executable, "-m", "gere", *words], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not any((tmp_path / "tmp").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    started.send_signal(number)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 128 + number and "Traceback" not in said
    assert said.strip().splitlines()[-1] == f"gere: stopped by {signal.Signals(number).name}"
    assert list((tmp_path / "tmp").iterdir()) == [] and not (tmp_path / "out.jsonl").exists()
