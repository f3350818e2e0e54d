"""Every strategy in training: nothing at the first step, its own anchor, its own name in the log; layers and bands."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
import torch
from conftest import load_tiny
from safetensors.torch import load_file
from test_imitation import oracle_difference, oracle_kl
from test_losses import oracle_ce, oracle_margin
from test_objective import drifted
from transformers import AutoModelForCausalLM
from watching import Watch

from gere.cache import Anchor, MeanStd, Moments, Quantiles, regions, unpack
from gere.config import parse_layers
from gere.errors import CacheMismatchError, ConfigError
from gere.model.probe import find_layout
from gere.model.states import StateReader

DISTANCES = ("tm", "kl", "l1", "l2")
FIELDS = {
    "tm": "regions of the last layer",
    "ce": "losses only",
    "kl": "top 64 logits at temperature 2",
    "l1": "states of the last layer",
    "l2": "states of the last layer",
}


def logs_of(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize("strategy", DISTANCES)
def test_first_step_is_zero_then_the_distance_grows(make_trainer, strategy):
    trainer = make_trainer(w="1", config={"replay_strategy": strategy})
    trainer.train()
    first, *_, last = logs_of(trainer)
    assert first[f"gere/{strategy}"] == 0 and first["gere/weight"] == 0
    assert first["gere/forgetting"] == pytest.approx(0, abs=1e-6)
    assert last[f"gere/{strategy}"] > 0 and last["gere/weight"] == 1
    assert ("gere/violations" in last) == (strategy == "tm")
    assert {key for key in last if key.startswith("gere/")} <= {
        *("gere/task_loss", "gere/ce", "gere/replay_change", "gere/forgetting", "gere/weight", "gere/violations"),
        f"gere/{strategy}",
    }  # fmt: skip


@pytest.mark.parametrize(("strategy", "bound"), [("tm", 0.0), ("kl", 1e-5), ("l1", 1e-3), ("l2", 1e-5)])
def test_first_step_in_bf16_is_within_a_bound(make_trainer, arguments, strategy, bound):
    """The state of the tiny model has elements around 1; bfloat16 rounds them by up to 0.004."""
    trainer = make_trainer(w="1", args=arguments(bf16=True), config={"replay_strategy": strategy})
    trainer.train()
    first, *_, last = logs_of(trainer)
    assert 0 <= first[f"gere/{strategy}"] <= bound < last[f"gere/{strategy}"]


def one_step_far_from_the_base(make_trainer, arguments, general, config, w):
    """The log of one step of a drifted model with replay rows alone but for one, and what it was called on."""
    anchor = make_trainer(config=config, w=w)
    anchor.train()
    model = drifted()
    args = arguments(max_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    trainer = make_trainer(
        model=model, args=args, replay=4, w=w, config={**config, "anchor": anchor.replay.anchor.key}
    )
    watch = Watch(trainer, general)
    trainer.train()
    batch = trainer.processing_class.pad({"input_ids": [list(row) for row in watch.replay(0)]}, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        now, base = (m.eval()(ids, mask, output_hidden_states=True) for m in (drifted(), load_tiny()))
    constants = {name: values.double().numpy() for name, values in trainer.replay.anchor.constants.items()}
    return logs_of(trainer)[0], ids.numpy(), mask.bool().numpy(), now, base, constants


@pytest.mark.parametrize("strategy", DISTANCES)
def test_loss_is_the_formula(make_trainer, arguments, general, strategy):
    """The replay rows of a step against NumPy, from the base model itself and not from the file."""
    config = {"replay_strategy": strategy, "kl_top_k": 5}
    log, ids, mask, now, base, constants = one_step_far_from_the_base(make_trainer, arguments, general, config, "3")
    states = [result.hidden_states[-1].double().numpy() for result in (now, base)]
    logits = [result.logits.double().numpy() for result in (now, base)]
    expected = {
        "tm": lambda: oracle_margin(states[1], states[0], constants["lower"], constants["upper"], mask, "violations"),
        "kl": lambda: oracle_kl(*logits, mask, 5, 2.0),
        "l1": lambda: oracle_difference(*states, mask, 1),
        "l2": lambda: oracle_difference(*states, mask, 2),
    }[strategy]()
    # Stored states are rounded to bfloat16, and a divergence of a token below 1e-6 nats counts as 0.
    rel = {"tm": 1e-4, "kl": 1e-3}.get(strategy, 2e-3)
    assert log[f"gere/{strategy}"] == pytest.approx(expected.mean(), rel=rel)
    ce = oracle_ce(logits[0], ids, mask)
    total = (4 * log["gere/task_loss"] + np.sum(ce + 3.0 * expected)) / 8
    assert log["loss"] == pytest.approx(total, rel=2e-3 if strategy in ("l1", "l2") else 1e-4)


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(("tm", "ce", "kl", "l2"), 2)))
def test_an_anchor_of_one_strategy_is_refused_by_another_by_name(make_trainer, first, second):
    trainer = make_trainer(config={"replay_strategy": first})
    trainer.train()
    with pytest.raises(CacheMismatchError, match="other strategy") as caught:
        make_trainer(config={"replay_strategy": second, "anchor": trainer.replay.anchor.key}).train()
    assert caught.value.fields[0] == "strategy"
    assert FIELDS[first] in str(caught.value) and FIELDS[second] in str(caught.value)


def test_l1_and_l2_share_an_anchor(make_trainer):
    one, two = (make_trainer(config={"replay_strategy": strategy}) for strategy in ("l1", "l2"))
    one.train()
    two.train()
    assert one.replay.anchor.key == two.replay.anchor.key


@pytest.mark.parametrize(
    ("strategy", "shapes"),
    [
        ("kl", {"ids": (torch.int32, (7,)), "log_probs": (torch.float32, (7,)), "rest": (torch.float32, ())}),
        ("l2", {"state": (torch.bfloat16, (64,))}),
        ("tm", {"codes": (torch.uint8, (16,))}),
        ("ce", {}),
    ],
)
def test_nothing_is_stored_that_the_strategy_does_not_use(make_trainer, strategy, shapes):
    trainer = make_trainer(config={"replay_strategy": strategy, "kl_top_k": 7})
    trainer.train()
    anchor = Anchor(trainer.replay.anchor.folder)
    targets = anchor.targets(2)
    tokens = anchor.tokens(2)
    assert {n: (v.dtype, tuple(v.shape)) for n, v in targets.items()} == {
        name: (dtype, (tokens, *rest)) for name, (dtype, rest) in shapes.items()
    }
    stored = {name for path in anchor.folder.glob("*-0*.safetensors") for name in load_file(path)}
    assert stored == set(shapes)
    assert set(anchor.constants) == ({"lower", "upper", "tolerance"} if strategy == "tm" else set())


@pytest.mark.parametrize("layers", ["2", [2], "last", "every 2", "every 5", (2,)])
def test_the_last_layer_listed_is_the_default_bit_for_bit(make_trainer, layers):
    """The tiny model has two layers."""
    plain, listed = make_trainer(), make_trainer(config={"layers": layers})
    plain.train()
    listed.train()
    assert plain.replay.anchor.key == listed.replay.anchor.key
    other = listed.model.state_dict()
    assert all(torch.equal(values, other[name]) for name, values in plain.model.state_dict().items())
    drop = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    left, right = (
        [{k: v for k, v in log.items() if k not in drop} for log in t.state.log_history] for t in (plain, listed)
    )
    assert left == right


def test_several_layers_are_held_each_in_its_own_bands(make_trainer, arguments, tokenizer, general):
    config = {"layers": [1, 2], "lower_quantile": 0.1, "upper_quantile": 0.8}
    trainer = make_trainer(config=config, w="2")
    trainer.train()
    anchor = trainer.replay.anchor
    assert anchor.fields["strategy"] == "regions of layers 1, 2 of 2"
    assert anchor.fields["bands"] == "quantiles 0.1 and 0.8; last layer: mean +- 1 std, floor 0.001"
    assert logs_of(trainer)[0]["gere/tm"] == 0 < logs_of(trainer)[-1]["gere/tm"]
    base = load_tiny().eval()
    rows = [tokenizer(text)["input_ids"][:48] for text in general]
    states = []
    for row in rows:
        with torch.no_grad():
            hidden = base(torch.tensor([row]), output_hidden_states=True).hidden_states
        states.append(torch.stack([hidden[1][0], hidden[2][0]], dim=1))
    everything = torch.cat(states)
    code = torch.cat([unpack(anchor.targets(row)["codes"], 64) for row in range(len(rows))])
    shares = [(code[:, 0] == side).float().mean(0) for side in (-1, 1)]
    tokens = len(everything)
    ties = len(rows) + 1  # every row begins with the same token, and so with the same state
    torch.testing.assert_close(shares[0], torch.full((64,), round(0.1 * tokens) / tokens), atol=ties / tokens, rtol=0)
    torch.testing.assert_close(shares[1], torch.full((64,), round(0.2 * tokens) / tokens), atol=ties / tokens, rtol=0)
    moments = Moments.of(everything[:, 1])
    torch.testing.assert_close(anchor.constants["lower"][1], (moments.mean - moments.std).float())
    log, _, mask, now, then, constants = one_step_far_from_the_base(make_trainer, arguments, general, config, "2")
    lower, upper = constants["lower"], constants["upper"]
    margins = [
        oracle_margin(
            *(r.hidden_states[i + 1].double().numpy() for r in (then, now)), lower[i], upper[i], mask, "violations"
        )
        for i in (0, 1)
    ]
    assert log["gere/tm"] == pytest.approx(np.mean(margins[0] + margins[1]) / 2, rel=1e-3)


@pytest.mark.parametrize("bands", [{"bands": "quantile"}, {"bands": "quantile", "lower_quantile": 0.3}])
def test_quantile_bands_train_and_are_another_anchor(make_trainer, bands):
    trainer = make_trainer(config=bands)
    trainer.train()
    assert trainer.replay.anchor.fields["bands"].startswith("quantiles 0.")
    with pytest.raises(CacheMismatchError, match="other bands"):
        make_trainer(config={"anchor": trainer.replay.anchor.key}).train()


@pytest.mark.parametrize(("lower", "upper"), [(0.16, 0.84), (0.05, 0.5), (0.4, 0.6)])
def test_quantile_bands_give_the_shares_that_they_name_whatever_the_outliers(lower, upper):
    state = torch.randn(1000, 7, generator=torch.Generator().manual_seed(0))
    state[::50] *= 1e4  # as the inner layers have them
    rule = Quantiles(lower, upper)
    bands = rule.bands([rule.summary(state[:300], 1.0, 0), rule.summary(state[300:], 1.0, 300)], torch.zeros(7))
    code = regions(state, bands.lower, bands.upper)
    assert (code == -1).sum(0).tolist() == [round(1000 * lower)] * 7
    assert (code == 1).sum(0).tolist() == [round(1000 * (1 - upper))] * 7
    expected = np.quantile(state.numpy(), [lower, upper], axis=0)
    np.testing.assert_allclose(bands.lower, expected[0], atol=0.05)
    wide = MeanStd(1.0, 1e-3)
    outside = regions(state, *wide.bands([wide.summary(state, 1.0, 0)], torch.zeros(7))[:2]).abs().float().mean()
    assert outside < 0.03  # mean and deviation belong to the outliers


def test_a_share_of_the_tokens_fixes_the_quantiles(tmp_path):
    state = torch.randn(60000, 3, generator=torch.Generator().manual_seed(0))
    rule = Quantiles(0.16, 0.84)
    part = rule.summary(state, 0.25, 0)
    assert len(part) == pytest.approx(15000, rel=0.02)
    parts = [rule.summary(state[i : i + 50], 0.25, i) for i in range(0, len(state), 50)]
    assert torch.equal(torch.cat(parts), part), "the same tokens, however they are parted"
    places = torch.cat([rule.summary(torch.arange(i, i + 50)[:, None], 0.25, i) for i in range(0, len(state), 50)])
    assert torch.bincount(places.flatten().int() % 50, minlength=50).min() > 200, "no place in a row is preferred"
    bands = rule.bands([part], torch.zeros(3))
    code = regions(state, bands.lower, bands.upper)
    assert (code == -1).float().mean(0).tolist() == pytest.approx([0.16] * 3, abs=0.01)


@pytest.mark.parametrize(
    ("width", "neutral"), [(0.5, 0.383), (1.0, 0.683), (1.5, 0.866), (2.0, 0.954)]
)  # the table of MeanStd
def test_documented_shares_of_the_regions(width, neutral):
    state = torch.randn(40000, 4, generator=torch.Generator().manual_seed(0))
    rule = MeanStd(width, 1e-3)
    code = regions(state, *rule.bands([rule.summary(state, 1.0, 0)], torch.zeros(4))[:2])
    assert (code == 0).float().mean().item() == pytest.approx(neutral, abs=0.004)
    assert f"{100 * neutral:.1f} %" in MeanStd.__doc__


@pytest.mark.parametrize("strategy", ["ce", *DISTANCES])
def test_a_live_base_needs_no_targets_on_disk_and_trains_alike(make_trainer, arguments, strategy):
    def train(**config):
        torch.manual_seed(0)
        model = with_lora(load_tiny())
        args = arguments(learning_rate=0.03, max_steps=5)  # far enough that rounding of what is stored does not count
        trainer = make_trainer(model=model, w="0.01", args=args, config={"replay_strategy": strategy, **config})
        trainer.train()
        return trainer

    stored = train()
    shutil.rmtree(stored.replay.folder)
    live = train(anchor="live")
    assert live.replay.anchor.fields["strategy"] == f"{FIELDS[strategy]}, live" and not live.replay.anchor.dim
    files = {path.name for path in live.replay.anchor.folder.iterdir()} - {"manifest.json", "rows.safetensors"}
    assert files == {"sample.safetensors"} | ({"bands.safetensors"} if strategy == "tm" else set())
    for one, two in zip(logs_of(stored), logs_of(live), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
        if strategy != "ce":
            assert one[f"gere/{strategy}"] == pytest.approx(two[f"gere/{strategy}"], rel=0.01)
    if strategy != "ce":
        assert one[f"gere/{strategy}"] > {"tm": 0.05, "kl": 1e-5, "l1": 0.05, "l2": 0.01}[strategy]
    assert live.model.training and all(p.requires_grad for n, p in live.model.named_parameters() if "lora_" in n)


def test_a_live_base_that_is_trained_itself_is_refused(make_trainer):
    model = with_lora(load_tiny())
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"training of model\.norm\.weight"):
        make_trainer(model=model, config={"anchor": "live"}).train()


def test_a_merged_adapter_is_no_live_base(make_trainer, tmp_path):
    first = make_trainer(model=with_lora(load_tiny()), config={"anchor": "live"}, w="1")
    first.train()
    first.save_model(str(tmp_path / "tuned"))
    merged = first.model.merge_and_unload()
    merged.save_pretrained(tmp_path / "tuned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    with pytest.raises(CacheMismatchError, match="other weights"):
        make_trainer(model=with_lora(again), config={"anchor": "live"}).train()


def test_a_live_base_without_an_adapter_is_refused(make_trainer):
    with pytest.raises(ConfigError, match='a PEFT model for "live"'):
        make_trainer(config={"anchor": "live"}).train()


@pytest.mark.parametrize(
    ("layers", "depth", "found"),
    [
        ("last", 12, (12,)), ("every 4", 12, (4, 8, 12)), ("every 5", 12, (2, 7, 12)), ("6,12", 12, (6, 12)),
        ("12, 6", 12, (6, 12)), ([3, 3, 1], 4, (1, 3)), ("every 20", 12, (12,)), (7, 12, (7,)), ("last", None, ()),
    ],
)  # fmt: skip
def test_layers(layers, depth, found):
    assert parse_layers(layers, depth) == found


@pytest.mark.parametrize(
    "layers", ["", [], None, "²", "first", "every", "every 0", "every 2 3", "0", [-1], [1.5], "1 x", [13]]
)
def test_bad_layers_are_refused(layers):
    with pytest.raises(ConfigError, match=r"gere_config\.layers"):
        parse_layers(layers, 12)


def test_states_of_inner_layers_keep_their_graph_under_checkpointing(model):
    ids = torch.arange(3, 20)[None]
    expected = model(ids, output_hidden_states=True).hidden_states
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    reader = StateReader(find_layout(model, ids.tolist(), ids.device), [1, 2])
    with reader.reading(ids.shape):
        model(ids)
        first, last = reader.states
    torch.testing.assert_close(first, expected[1])
    torch.testing.assert_close(last, expected[2])
    first.sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
