"""`gere blend`: points of the line bit for bit, a budget that holds, and a folder that is whole or absent."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import DATA, TINY, load_tiny, read_jsonl
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import gere.blend.folder
from gere import general_loss
from gere.cli.main import main
from gere.evaluation.examples import example_losses, read_examples
from gere.evaluation.general import change_of, text_losses

LOST = {"optimizer.pt", "training_args.bin", "trainer_state.json", "checkpoint-3", "runs", "gere_saving"}
TEXTS, TASK = DATA / "heldout.jsonl", DATA / "task.jsonl"


def moved(model, scale=0.02, seed=0):
    """A tuned model: each weight off by noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.add_(scale * torch.randn(tensor.shape, generator=generator).to(tensor))
    return model


@pytest.fixture
def save(tmp_path, tokenizer):
    """Save a model with its tokenizer, as a trainer does."""

    def save(model, name="tuned", **settings):
        folder = tmp_path / name
        model.save_pretrained(folder, **settings)
        tokenizer.save_pretrained(folder)
        (folder / "gere_anchor.json").write_text('{"format_version": 1, "anchor": "0"}')
        for lost in ("optimizer.pt", "training_args.bin", "trainer_state.json"):
            (folder / lost).write_text("of the training")
        for lost in ("checkpoint-3", "runs"):
            (folder / lost).mkdir()
            (folder / lost / "config.json").write_text("{}")
        (folder / "gere_saving" / "anchor-0").mkdir(parents=True)
        (folder / "gere_saving" / "replay-0.jsonl").write_text("{}")
        (folder / "more").mkdir()
        (folder / "more" / "chat.jinja").write_text("{{ messages }}")
        return folder

    return save


@pytest.fixture
def blend(tmp_path, capsys):
    """Call the command, and return the folder and what was shown."""

    def blend(*words, out="out", fails=False):
        place = tmp_path / out if out else None
        words = [*map(str, words), *(["--out", str(place)] if out else [])]
        status = main(["blend", *words])
        shown = capsys.readouterr()
        assert status == int(fails), shown.err
        return shown.err if fails else (place, shown.out)

    return blend


def tensors(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def names(folder):
    return {path.name for path in folder.iterdir()}


def same(a, b):
    assert a.keys() == b.keys()
    return all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


# The weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_ends_are_the_models_bit_for_bit(save, blend, dtype):
    model = moved(load_tiny())
    with torch.no_grad():
        # base + (tuned - base) is not tuned here.
        model.model.norm.weight.mul_(1e-5)
    tuned = save(model.to(dtype))
    assert same(tensors(blend(tuned, "--base", TINY, "--share", 1, out="one")[0]), tensors(tuned))
    base = {name: tensor.to(dtype) for name, tensor in tensors(TINY).items()}
    zero, _ = blend(tuned, "--base", TINY, "--share", 0, out="zero")
    assert same(tensors(zero), base) and not same(tensors(zero), tensors(tuned))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_point_is_that_of_float64(save, blend, dtype):
    tuned = save(moved(load_tiny()).to(dtype))
    out, _ = blend(tuned, "--base", TINY, "--share", 0.3)
    base, full = tensors(TINY), tensors(tuned)
    for name, tensor in tensors(out).items():
        start, end = (one[name].double().numpy() for one in (base, full))
        expected = torch.from_numpy(start + 0.3 * (end - start))
        # The nearest number of the dtype; float32 has rounded once or twice on the way.
        room = torch.finfo(dtype).eps * expected.abs() + 1e-8
        assert tensor.dtype == dtype and ((tensor.double() - expected).abs() <= room).all(), name
        assert np.abs(tensor.double().numpy() - end).max() > 1e-3, "it moved"


def test_what_training_left_alone_does_not_move(save, blend):
    """The base is in float32, the tuned weights in bfloat16: rounding is no training."""
    tuned = save(load_tiny().bfloat16())
    assert same(tensors(blend(tuned, "--base", TINY, "--share", 0.37)[0]), tensors(tuned))


def test_shards_stay_as_they_are(save, blend):
    model = moved(load_tiny())
    whole, parts = save(model, "whole"), save(model, "parts", max_shard_size="100KB")
    one, _ = blend(whole, "--base", TINY, "--share", 0.6, out="one")
    many, _ = blend(parts, "--base", TINY, "--share", 0.6, out="many")
    assert same(tensors(one), tensors(many)) and len(list(many.glob("*.safetensors"))) > 3
    for file in parts.glob("*.safetensors"):
        assert load_file(file).keys() == load_file(many / file.name).keys()
    index = "model.safetensors.index.json"
    assert (many / index).read_bytes() == (parts / index).read_bytes()
    # A base in shards gives the same.
    base = save(load_tiny(), "base", max_shard_size="50KB")
    assert same(tensors(blend(whole, "--base", base, "--share", 0.6, out="again")[0]), tensors(one))


def test_a_folder_that_loads(save, blend, tokenizer):
    tuned = save(moved(load_tiny()))
    out, shown = blend(tuned, "--base", TINY, "--share", 0.5)
    assert names(out) == (names(tuned) | {"gere_blend.json"}) - LOST
    assert (out / "more" / "chat.jinja").read_text() == "{{ messages }}"
    assert json.loads((out / "gere_blend.json").read_text()) == {"format_version": 1, "share": 0.5, "base": str(TINY)}
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tokenizer.get_vocab()
    model, ends = AutoModelForCausalLM.from_pretrained(out), (load_tiny(), AutoModelForCausalLM.from_pretrained(tuned))
    for name, tensor in model.named_parameters():
        low, high = (end.get_parameter(name) for end in ends)
        torch.testing.assert_close(tensor, (low + high) / 2)
    assert shown == f"wrote share 0.5 to {out}\n"


def test_no_model_is_loaded_for_a_share(save, blend, monkeypatch):
    tuned = save(moved(load_tiny()))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    blend(tuned, "--base", TINY, "--share", 0.5)


def test_a_head_that_was_untied_goes_back_to_the_embeddings(save, blend):
    model = load_tiny()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    tuned = save(moved(model))
    assert "lm_head.weight" in tensors(tuned) and "lm_head.weight" not in tensors(TINY)
    out = tensors(blend(tuned, "--base", TINY, "--share", 0, out="zero")[0])
    embeddings = tensors(TINY)["model.embed_tokens.weight"]
    assert torch.equal(out["lm_head.weight"], embeddings) and torch.equal(out["model.embed_tokens.weight"], embeddings)


def test_a_tied_head_that_the_base_saved(save, blend, tmp_path):
    tuned = save(moved(load_tiny()))
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    content = tensors(TINY)
    save_file({**content, "lm_head.weight": content["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    assert same(tensors(blend(tuned, "--base", base, "--share", 0)[0]), content)
    # A head of its own is another matter.
    save_file({**content, "lm_head.weight": content["model.embed_tokens.weight"] + 1}, base / "model.safetensors")
    error = blend(tuned, "--base", base, "--share", 0.5, "--force", fails=True)
    assert "lm_head.weight of the base, which TUNED lacks" in error


def test_rows_of_new_tokens_stay_as_tuned(save, blend):
    model = load_tiny()
    model.resize_token_embeddings(771, mean_resizing=False)
    tuned = save(moved(model))
    out, shown = blend(tuned, "--base", TINY, "--share", 0, out="zero")
    name = "model.embed_tokens.weight"
    assert f"{name}, now of 771 rows: those that the base lacks stay as tuned." in shown
    assert torch.equal(tensors(out)[name][:768], tensors(TINY)[name])
    assert torch.equal(tensors(out)[name][768:], tensors(tuned)[name][768:])
    _, shown = blend(tuned, "--base", TINY, "--texts", TEXTS, "--points", 2, out=None)
    assert "+0.0000 ± 0.0000" in shown


def test_names_without_the_outer_module(save, blend, tmp_path):
    """Such as gpt2 on the hub."""
    tuned, base = save(moved(load_tiny())), tmp_path / "base"
    shutil.copytree(TINY, base)
    save_file({name.removeprefix("model."): one for name, one in tensors(TINY).items()}, base / "model.safetensors")
    assert same(tensors(blend(tuned, "--base", base, "--share", 0)[0]), tensors(TINY))


# LoRA


def adapter(**settings):
    config = LoraConfig(r=4, lora_alpha=12, **{"target_modules": ["q_proj", "down_proj"], **settings})
    return moved(get_peft_model(load_tiny(), config), 0.1)


def merged(folder):
    return PeftModel.from_pretrained(load_tiny(), folder).merge_and_unload().state_dict()


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}, {"modules_to_save": ["norm"]}]
)
def test_lora_is_on_the_line_of_the_merged_weights(save, blend, settings):
    tuned = save(adapter(**settings))
    out, _ = blend(tuned, "--share", 0.7)
    base, full, point = load_tiny().state_dict(), merged(tuned), merged(out)
    moves = [name for name in base if not torch.equal(base[name], full[name])]
    # Each norm is a module whose name ends so.
    assert len(moves) == 4 + (5 if "modules_to_save" in settings else 0)
    for name in base:
        torch.testing.assert_close(point[name], base[name] + 0.7 * (full[name] - base[name]), rtol=0, atol=1e-6)
    assert names(out) >= {"adapter_config.json", "tokenizer.json", "gere_anchor.json"}


def test_the_ends_of_an_adapter(save, blend):
    tuned = save(adapter(modules_to_save=["lm_head", "norm"]))
    assert same(tensors(blend(tuned, "--share", 1, out="one")[0]), tensors(tuned))
    out, _ = blend(tuned, "--share", 0, out="zero")
    model, base = PeftModel.from_pretrained(load_tiny(), out), load_tiny()
    saved = tensors(out)
    assert torch.equal(saved["base_model.model.lm_head.weight"], base.lm_head.weight), "tied, so that no file has it"
    assert torch.equal(saved["base_model.model.model.norm.weight"], base.model.norm.weight)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(model.eval()(ids).logits, base.eval()(ids).logits)


def test_an_adapter_of_embeddings(save, blend):
    tuned = save(moved(get_peft_model(load_tiny(), LoraConfig(r=2, target_modules=["embed_tokens"])), 0.1))
    out, _ = blend(tuned, "--share", 0.5)
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    before, after = tensors(tuned), tensors(out)
    assert torch.equal(after[f"{name}A"], before[f"{name}A"])
    torch.testing.assert_close(after[f"{name}B"], before[f"{name}B"] / 2)


def test_lora_alone_needs_no_base(save, blend):
    tuned = save(adapter())
    config = tuned / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    blend(tuned, "--share", 0.5)
    assert "The base model is not known" in blend(tuned, "--texts", TEXTS, out=None, fails=True)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "peft_type 'IA3'"),
        (LoraConfig(target_modules=["q_proj"], use_dora=True), "use_dora"),
        (LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3]), "trainable_token_indices"),
    ],
)
def test_other_adapters_are_refused(save, blend, config, said):
    error = blend(save(get_peft_model(load_tiny(), config)), "--share", 0.5, fails=True)
    assert said in error and "merge_and_unload" in error


# Measuring and choosing


def losses_at(tuned, share):
    """General and task losses of a point that this test forms itself."""
    model, other = load_tiny(), AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    with torch.no_grad():
        for weight, end in zip(model.parameters(), other.parameters(), strict=True):
            weight.copy_(weight + share * (end - weight))
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    texts = [row["text"] for row in read_jsonl(TEXTS, 1000)]
    return text_losses(model, tokenizer, texts), example_losses(model, tokenizer, read_examples(TASK))


def rows_of(shown):
    lines = [
        line.replace("±", "").split() for line in shown.splitlines() if line[:5].strip().replace(".", "").isdigit()
    ]
    return {float(line[0]): [float(value) for value in line[1:]] for line in lines}


def test_the_line_is_measured(save, blend, tmp_path):
    tuned = save(moved(load_tiny(), 0.1))
    plot = tmp_path / "new" / "line.svg"
    words = ["--base", TINY, "--texts", TEXTS, "--task-file", TASK, "--points", 3, "--plot", plot]
    _, shown = blend(tuned, *words, out=None)
    rows = rows_of(shown)
    assert list(rows) == [1.0, 0.5, 0.0] and rows[0.0][1:3] == [0.0, 0.0]
    base, _ = losses_at(tuned, 0)
    for share, row in rows.items():
        general, task = losses_at(tuned, share)
        change = change_of(general, base)
        assert row == pytest.approx([*change[:3], sum(task) / len(task)], abs=2e-4)
    assert rows[1.0][1] > 0.01 and "<svg" in plot.read_text()
    assert not (tmp_path / "out").exists()


def test_the_budget_is_kept_on_the_texts(save, blend, tokenizer):
    tuned = save(moved(load_tiny(), 0.1))
    base, _ = losses_at(tuned, 0)
    full = change_of(losses_at(tuned, 1)[0], base)
    budget = 0.3 * (full.change + full.interval)
    out, shown = blend(tuned, "--base", TINY, "--texts", TEXTS, "--budget", budget)
    about = json.loads((out / "gere_blend.json").read_text())
    share, general = about["share"], about["general"]
    assert 0 < share < 1 and share * 10 % 1 > 1e-6, "finer than the grid"
    found = text_losses(
        AutoModelForCausalLM.from_pretrained(out), tokenizer, [r["text"] for r in read_jsonl(TEXTS, 999)]
    )
    change = change_of(found, base)
    assert [general[key] for key in ("loss", "change", "interval", "texts")] == pytest.approx(list(change), abs=1e-5)
    assert change.change + change.interval <= budget + 1e-6
    more = change_of(losses_at(tuned, share + 0.0101)[0], base)
    assert more.change + more.interval > budget
    assert about["budget"] == budget and f"share {share:g}, general change" in shown and "within the budget" in shown


def test_a_wide_budget_takes_the_tuned_model(save, blend):
    tuned = save(moved(load_tiny()))
    out, _ = blend(tuned, "--base", TINY, "--texts", TEXTS, "--budget", 9, "--points", 2)
    assert same(tensors(out), tensors(tuned))


def test_the_best_share_for_the_task(save, blend, tmp_path):
    """Share 0.5 of a model that was tuned twice too far."""
    model, task = load_tiny(), tmp_path / "task.jsonl"
    row = read_jsonl(TASK, 1)[0]
    task.write_text(json.dumps(row))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = torch.tensor([tokenizer(f"{row['instruction']}{row['input']} {row['output']}")["input_ids"]])
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    start = load_tiny()
    with torch.no_grad():
        for weight, base in zip(model.parameters(), start.parameters(), strict=True):
            weight.add_(20 * (weight - base))
    tuned = save(model)
    words = ["--base", TINY, "--task-file", task, "--points", 5]
    rows = rows_of(blend(tuned, *words, out=None)[1])
    best = min(rows, key=lambda share: rows[share][-1])
    assert 0 < best < 1, rows
    out, _ = blend(tuned, *words, "--best")
    about = json.loads((out / "gere_blend.json").read_text())
    assert about["share"] == best and about["task_loss"] == pytest.approx(rows[best][-1], abs=1e-4)
    # Within a budget that no other share keeps.
    out, _ = blend(tuned, *words, "--best", "--texts", TEXTS, "--budget", 0, out="strict")
    assert json.loads((out / "gere_blend.json").read_text())["share"] == 0


@pytest.mark.parametrize(
    "settings",
    [{}, {"modules_to_save": ["norm", "lm_head"]}, {"target_modules": ["embed_tokens", "q_proj"]}],
    ids=["lora", "modules", "embeddings"],
)
def test_an_adapter_is_measured(save, blend, tokenizer, settings):
    tuned = save(adapter(**settings))
    out, shown = blend(tuned, "--texts", TEXTS, "--share", 0.6, "--points", 3)
    rows, texts = rows_of(shown), [row["text"] for row in read_jsonl(TEXTS, 999)]
    ends = {0.0: load_tiny(), 1.0: PeftModel.from_pretrained(load_tiny(), tuned)}
    for share, model in {**ends, 0.6: PeftModel.from_pretrained(load_tiny(), out)}.items():
        assert rows[share][0] == pytest.approx(general_loss(model, tokenizer, texts), abs=1e-4), share
    assert abs(rows[1.0][1]) > 1e-3


def test_an_adapter_with_new_tokens_is_measured(save, blend, tokenizer):
    model = load_tiny()
    model.resize_token_embeddings(770, mean_resizing=False)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    tuned = save(moved(get_peft_model(model, config), 0.1))
    out, shown = blend(tuned, "--texts", TEXTS, "--share", 0, "--points", 2)
    assert "now of 770 rows" in shown
    grown = load_tiny()
    grown.resize_token_embeddings(770, mean_resizing=False)
    rows, texts = rows_of(shown), [row["text"] for row in read_jsonl(TEXTS, 999)]
    again = PeftModel.from_pretrained(grown, out)
    assert rows[0.0][0] == pytest.approx(general_loss(again, tokenizer, texts), abs=1e-4)
    assert abs(rows[1.0][1]) > 1e-3


def test_bfloat16_is_measured_in_float32(save, blend, tokenizer):
    tuned = save(moved(load_tiny(), 0.1).bfloat16())
    rows = rows_of(blend(tuned, "--base", TINY, "--texts", TEXTS, "--points", 2, out=None)[1])
    model = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    texts = [row["text"] for row in read_jsonl(TEXTS, 999)]
    assert rows[1.0][0] == pytest.approx(general_loss(model, tokenizer, texts), abs=1e-4)


def test_a_base_whose_loss_is_not_finite(save, blend, tmp_path):
    model = load_tiny()
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    base = save(model, "base")
    error = blend(save(load_tiny()), "--base", base, "--texts", TEXTS, "--budget", 1, fails=True)
    assert "share 0, the base model" in error and not (tmp_path / "out").exists()


def test_a_plot_needs_matplotlib(save, blend, monkeypatch, tmp_path):
    tuned, words = save(moved(load_tiny())), ["--base", TINY, "--task-file", TASK, "--points", 2, "--plot"]
    blend(tuned, *words, tmp_path / "line.png", out=None)
    assert (tmp_path / "line.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert 'pip install "gere[report]"' in blend(tuned, *words, tmp_path / "line.png", out=None, fails=True)


def test_the_loss_of_an_output(model, tokenizer, tmp_path):
    """That of labels on the output and the end of the text, as a trainer computes it."""
    task = tmp_path / "task.jsonl"
    task.write_text(
        '{"instruction": "Say ", "input": "it:", "output": "good"}\n{"input": "Two. ", "output": "bad day"}'
    )
    expected = []
    for prompt, output in (("Say it:", " good"), ("Two. ", "bad day")):
        start = tokenizer(prompt)["input_ids"]
        end = [*tokenizer(output, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(start) + end])
        expected.append(float(model(torch.tensor([start + end]), labels=labels).loss))
    examples = read_examples(task)
    assert example_losses(model, tokenizer, examples) == pytest.approx(expected, abs=1e-5)
    assert all(map(math.isfinite, example_losses(model, tokenizer, examples, max_length=2)))


# The folder


CRASH = """
import os, sys
import gere.blend.folder as folder
from gere.cli.main import main
first = folder.save_file
def save_file(*args, **keywords):
    first(*args, **keywords)
    os._exit(9)
folder.save_file = save_file
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("before", [False, True])
def test_a_killed_run_leaves_the_folder_absent_or_as_it_was(save, blend, tmp_path, before):
    tuned = save(moved(load_tiny()), max_shard_size="100KB")
    out, old = tmp_path / "out", None
    if before:
        old = tensors(blend(tuned, "--base", TINY, "--share", 1)[0])
    words = ["blend", tuned, "--base", TINY, "--share", "0.5", "--out", out, "--force"]
    done = subprocess.run([sys.executable, "-c", CRASH, *map(str, words)], timeout=120)
    assert done.returncode == 9 and out.exists() == before
    if before:
        assert same(tensors(out), old)
    half, _ = blend(tuned, "--base", TINY, "--share", 0.5, "--force")
    assert not same(tensors(half), tensors(tuned)) and names(half) == (names(tuned) | {"gere_blend.json"}) - LOST


def test_a_full_disk_leaves_nothing(save, blend, monkeypatch, tmp_path):
    tuned = save(moved(load_tiny()))

    def full(*args, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gere.blend.folder, "save_file", full)
    error = blend(tuned, "--base", TINY, "--share", 0.5, fails=True)
    assert "The blend cannot be written" in error and "No space left" in error
    assert names(tmp_path) == {"tuned"}


def test_a_folder_that_is_in_use_is_refused(save, blend, tmp_path):
    tuned = save(moved(load_tiny()))
    words = [tuned, "--base", TINY, "--share", 0.5]
    blend(*words)
    assert "add --force" in blend(*words, fails=True)
    blend(*words, "--force")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    assert "something else" in blend(*words, "--force", out="mine", fails=True)
    assert "one of them" in blend(*words, "--force", out="tuned", fails=True)
    assert "folder around them" in blend(*words, "--force", out=".", fails=True)
    assert (mine / "thesis.txt").read_text() == "all of it" and names(tmp_path) == {"tuned", "mine", "out"}


# What is refused


def test_another_architecture_is_refused(save, blend, tmp_path):
    config = load_tiny().config
    config.num_hidden_layers, config.intermediate_size = 3, 180
    other = save(AutoModelForCausalLM.from_config(config), "other")
    tuned = save(moved(load_tiny()))
    error = blend(tuned, "--base", other, "--share", 0.5, fails=True)
    assert "mlp.down_proj.weight [64, 176], in the base [64, 180]" in error and "more" in error
    config.intermediate_size = 176
    error = blend(tuned, "--base", save(AutoModelForCausalLM.from_config(config), "deep"), "--share", 0.5, fails=True)
    assert "model.layers.2" in error and "of the base, which TUNED lacks" in error
    error = blend(tmp_path / "deep", "--base", tuned, "--share", 0.5, fails=True)
    assert "model.layers.2" in error and "which the base lacks" in error


def test_a_tensor_that_the_base_lacks_is_named(save, blend):
    tuned = save(load_tiny())
    save_file({**tensors(tuned), "score.weight": torch.ones(2, 64)}, tuned / "model.safetensors")
    assert "score.weight, which the base lacks" in blend(tuned, "--base", TINY, "--share", 0.5, fails=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(save, blend, value):
    model = load_tiny()
    with torch.no_grad():
        model.model.norm.weight[3] = value
    error = blend(save(model), "--base", TINY, "--share", 0.5, fails=True)
    assert "model.norm.weight, share 0.5" in error and "1 of 64" in error


def test_weights_that_cannot_be_read_are_refused(save, blend, tmp_path):
    tuned = save(load_tiny())
    assert "no folder" in blend(tmp_path / "nothing", "--share", 0.5, fails=True)
    for lost in ("model.safetensors", "config.json"):
        (tuned / lost).rename(tuned / f"other-{lost}")
    words = [tuned, "--base", TINY, "--share", 0.5]
    assert "no such file" in blend(*words, fails=True)
    (tuned / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin, which is pickled" in blend(*words, fails=True)
    (tuned / "model.safetensors").write_bytes(b"12345678901234")
    assert "cannot be read" in blend(*words, fails=True)


def test_quantized_weights_are_refused(save, blend, tmp_path):
    tuned, base = save(moved(load_tiny())), tmp_path / "base"
    shutil.copytree(TINY, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    assert "bitsandbytes" in blend(tuned, "--base", base, "--share", 0.5, fails=True)
    # LoRA beside it is in full precision.
    blend(save(adapter(), "lora"), "--base", base, "--share", 0.5)


def test_the_base_that_a_model_names(save, blend, tmp_path):
    tuned = save(moved(load_tiny()))
    assert "Give --base" in blend(tuned, "--share", 0.5, fails=True)
    assert "the tuned model itself" in blend(tuned, "--base", tuned, "--share", 0.5, fails=True)
    path = tuned / "config.json"
    for name, works in ((str(TINY), True), (str(tuned), False), ("somebody/model", False)):
        path.write_text(json.dumps({**json.loads(path.read_text()), "_name_or_path": name}))
        blend(tuned, "--share", 0.5, "--force", fails=not works)
    assert "no such file" in blend(tuned, "--base", "somebody/model", "--share", 0.5, "--force", fails=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--share 0.5 --best --task-file t --out o", "one of --share"),
        ("", "to measure the line"),
        ("--budget 0.1 --out o", "--texts F beside it"),
        ("--best --out o", "--task-file F beside it"),
        ("--share 0.5", "--out OUT together"),
        ("--texts t --out o", "--out OUT together"),
        ("--share 1.5 --out o", "from 0, the base"),
        ("--share nan --out o", "from 0, the base"),
        ("--budget -1 --texts t --out o", "0 or more"),
        ("--texts t --points 1", "at least 2"),
        ("--texts t --plot line.pdf", ".svg or .png"),
        ("--share 0.5 --out o --plot line.svg", "beside it"),
    ],
)
def test_options_that_do_not_go_together(blend, words, said):
    error = blend(TINY, *words.split(), out=None, fails=True)
    assert said in error and "next:" in error


def test_texts_and_rows_that_cannot_be_used(save, blend, tmp_path):
    tuned, rows = save(moved(load_tiny())), tmp_path / "rows.jsonl"
    words = [tuned, "--base", TINY]
    rows.write_text('{"text": "One text alone."}')
    assert "two texts or more" in blend(*words, "--texts", rows, "--budget", 0.1, fails=True)
    said = blend(*words, "--texts", tmp_path / "none.jsonl", out=None, fails=True)
    assert "where:    --texts" in said and "FileNotFoundError" in said and "replay" not in said
    for row, fault in (
        ('{"input": "a"}', "output is"),
        ('{"output": "a"}', "instruction or input is"),
        ("3", "no record"),
    ):
        rows.write_text(row)
        said = blend(*words, "--task-file", rows, out=None, fails=True)
        assert "rows.jsonl, line 1" in said and fault in said


def test_help_imports_nothing_heavy():
    script = (
        "import sys\nfrom gere.cli.main import main\ntry:\n    main(['blend', '--help'])\nexcept SystemExit:\n"
        "    sys.stderr.write(' '.join({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == "" and "--budget" in done.stdout
