"""The weight of the distance: fixed, dynamic, and `auto`, which must not depend on how the rows are split."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from gere import GeReConfig
from gere.errors import CacheCorruptError, ConfigError, UnsupportedSettingError
from gere.losses.objective import ReplayObjective
from gere.losses.strategy import Seen, make_strategy
from gere.losses.weighting import CALIBRATION_ROWS, AutoWeight, auto_nats, make_weight
from gere.session.checkpoint import WEIGHT_FILE, read_weight, write_weight

ORDERS = {"tm": 2, "kl": 2, "l2": 2, "l1": 1}
SQUARE = SimpleNamespace(order=2, name="a square", measures=True)
NATS = 100.0
CE = torch.tensor([2.0, 3.0], requires_grad=True)
SURE = CE + 1e6  # far from the cap
DISTANCE = torch.tensor([0.5, 0.0], requires_grad=True)


def alone(vector):
    return vector


def seen(unrelated, rows):
    return torch.tensor(unrelated), torch.tensor(float(rows))


def logs_of(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


def test_fixed_and_dynamic_weights():
    assert make_weight(7.0, SQUARE)(CE, DISTANCE).tolist() == [7.0, 7.0]
    dynamic = make_weight("dy", SQUARE)(CE, DISTANCE)
    assert dynamic[0].item() == pytest.approx(4.0) and not dynamic.requires_grad
    assert dynamic[1].item() == pytest.approx(3e8, rel=1e-6)
    assert not make_weight("dy", SQUARE).calibrating and make_weight(1.0, SQUARE).state_dict() == {}


def test_auto_is_a_hundred_nats_over_the_mean_distance_to_unrelated_text():
    weight = make_weight("auto", SQUARE)
    assert weight(CE, DISTANCE).tolist() == [0.0, 0.0] and weight.state_dict() == {}
    weight.observe(*seen(6.0, 3))
    assert weight(CE, DISTANCE).tolist() == [0.0, 0.0]  # the rows of a step do not know each other
    weight.observe(*seen(2.0, 1))
    weight.end_step(4, alone)
    found = weight(SURE, DISTANCE)
    assert found.tolist() == [NATS / 2] * 2 and not found.requires_grad
    weight.observe(*seen(24.0, 4))
    weight.end_step(4, alone)
    assert weight(SURE, DISTANCE).tolist() == [NATS / 4] * 2


def test_auto_stays_once_enough_rows_are_known():
    weight, joined = AutoWeight(SQUARE), []

    def join(vector):
        joined.append(vector)
        return vector

    for _ in range(CALIBRATION_ROWS // 4):
        assert weight.calibrating
        weight.observe(*seen(8.0, 4))
        weight.end_step(4, join)
    assert not weight.calibrating
    weight.observe(*seen(800.0, 4))
    weight.end_step(4, join)
    assert weight(SURE, DISTANCE)[0].item() == NATS / 2 and len(joined) == CALIBRATION_ROWS // 4


def test_auto_counts_at_most_three_times_the_cross_entropy():
    """min(nats / unrelated, 3 CE / D), row by row: near the base a number, far from it thrice `dy`."""
    weight = AutoWeight(SimpleNamespace(order=1, name="a distance"))
    weight.observe(*seen(8.0, 4))
    weight.end_step(4, alone)  # 20 nats / 2
    ce, distance = torch.tensor([3.0, 3.0, 3.0]), torch.tensor([0.0, 0.5, 1.5], requires_grad=True)
    found = weight(ce, distance)
    assert found.tolist() == pytest.approx([10.0, 10.0, 6.0]) and not found.requires_grad
    assert weight.capped(found).tolist() == [0, 0, 1] and weight.has_cap
    assert not make_weight("dy", SQUARE).has_cap


def test_the_share_of_rows_at_the_cap_is_logged(make_trainer, arguments, monkeypatch):
    """A model that runs away is held by the cap: no distance counts more than three times its cross-entropy."""
    shares = []
    weigh = AutoWeight.__call__

    def watched(self, ce, distance):
        found = weigh(self, ce, distance)
        shares.append((found * distance / ce).detach())
        return found

    monkeypatch.setattr(AutoWeight, "__call__", watched)
    trainer = make_trainer(w="auto", args=arguments(max_steps=8, learning_rate=0.5))
    trainer.train()
    logs = logs_of(trainer)
    assert logs[-1]["gere/capped"] > 0.5
    assert torch.cat(shares).max() == pytest.approx(3.0, rel=1e-4), "rows are at the cap, and none is beyond"
    trainer = make_trainer(w="dy")
    trainer.train()
    assert not any("gere/capped" in log for log in logs_of(trainer))


def test_a_step_without_replay_rows_asks_no_rank():
    weight = AutoWeight(SQUARE)
    weight.end_step(0, lambda vector: pytest.fail("no step without rows may wait for others"))
    assert weight.calibrating


def test_auto_goes_on_from_its_state():
    first, second = AutoWeight(SQUARE), AutoWeight(SQUARE)
    for weight in (first, second):
        weight.observe(*seen(8.0, 4))
        weight.end_step(4, alone)
    resumed = AutoWeight(SQUARE)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for weight in (second, resumed):
        weight.observe(*seen(1.0, 2))
        weight.end_step(2, alone)
    assert resumed.state_dict() == second.state_dict()
    assert torch.equal(resumed(CE, DISTANCE), second(CE, DISTANCE))


def test_orders_pull_alike_a_tenth_of_the_way():
    for order in (1, 2):
        slope = order * auto_nats(order) * 0.1 ** (order - 1)
        assert slope == pytest.approx(20.0)


def test_more_ranks_count_their_rows_alike():
    """A mean over ranks is what `join` gives; after a resume their number may be another."""
    weight = AutoWeight(SQUARE)
    weight.observe(*seen(16.0, 4))
    weight.end_step(8, alone)  # two ranks with 4 rows each
    weight.observe(*seen(4.0, 4))
    weight.end_step(4, alone)  # one rank
    assert weight(SURE, DISTANCE)[0].item() == pytest.approx(NATS / 3)


def test_a_distance_that_holds_nothing_is_refused(make_trainer, arguments):
    """Bands so wide that no element of any text leaves its region."""
    trainer = make_trainer(w="auto", config={"band_width": 50.0}, args=arguments(max_steps=20))
    with pytest.raises(UnsupportedSettingError, match="unrelated text"):
        trainer.train()
    logs = logs_of(trainer)
    assert logs and all(log["gere/weight"] == 0 and log["grad_norm"] > 0 for log in logs)


def test_another_distance_is_measured_anew(caplog):
    weight = AutoWeight(SimpleNamespace(order=1, name="l1"))
    weight.load_state_dict({"distance": "l2", "unrelated": 8.0, "number": 4.0, "rows": 4})
    assert weight.state_dict() == {} and "l2" in caplog.text


def test_label_fitting_has_no_weight(make_trainer, arguments, tmp_path):
    trainer = make_trainer(
        w="auto", config={"replay_strategy": "ce"}, args=arguments(save_strategy="steps", save_steps=1)
    )
    trainer.train()
    assert not any("gere/weight" in log or "gere/unrelated" in log for log in logs_of(trainer))
    assert not list((tmp_path / "out").rglob(WEIGHT_FILE))
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


@pytest.mark.parametrize("strategy", ["tm", "kl", "l1", "l2"])
def test_auto_in_training(make_trainer, strategy):
    trainer = make_trainer(w="auto", config={"replay_strategy": strategy})
    trainer.train()
    first, *later = logs_of(trainer)
    assert first["gere/weight"] == 0 and first[f"gere/{strategy}"] == 0
    assert all(
        log["gere/weight"] * log["gere/unrelated"] == pytest.approx(auto_nats(ORDERS[strategy]), rel=0.2)
        for log in later
    )


@pytest.mark.parametrize("name", ["tm", "kl", "l1", "l2"])
def test_unrelated_text_is_the_row_itself_moved_by_half(model, name):
    """The first step logs the distance of each row to its own targets, half a row farther."""
    torch.manual_seed(0)
    ids, lengths = torch.randint(3, 500, (3, 20)), torch.tensor([20, 11, 6])
    mask = (torch.arange(20) < lengths[:, None]).long()
    with torch.no_grad():
        outputs = model.eval()(ids, mask, output_hidden_states=True)
    strategy = make_strategy(name, {"normalization": "elements", "kl_top_k": 5}, depth=2, live=False, half=False)
    seen = Seen([outputs.hidden_states[-1]], outputs.logits, ids, mask)
    kept = strategy.keep(seen.states, seen.logits)
    constants = {}
    if name == "tm":
        flat = kept["state"][mask.bool()]
        constants = strategy.constants([strategy.summary({"state": flat}, len(flat), 0)], torch.zeros(64))
    targets = strategy.encode(kept, constants)
    turned = {key: values.clone() for key, values in targets.items()}
    for row, length in enumerate(lengths.tolist()):
        for key in targets:
            turned[key][row, :length] = targets[key][row, :length].roll(-(length // 2), 0)
    objective = ReplayObjective(strategy, constants, make_weight("auto", strategy))
    _, plain = objective(seen, torch.zeros(3), targets)
    _, other = objective(seen, torch.zeros(3), turned)
    assert plain.unrelated.item() == pytest.approx(other.distance.item(), rel=1e-5)
    assert plain.distance == 0 < plain.unrelated and plain.calibrated == 3


def test_auto_does_not_depend_on_how_the_rows_are_split(make_trainer, arguments):
    kinds = [(8, 1, 3), (4, 2, 3), (2, 4, 3)]
    runs = []
    for rows, accumulation, replay in kinds:
        args = arguments(
            per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation, max_steps=5, save_strategy="no"
        )
        trainer = make_trainer(args=args, w="auto", replay=replay)
        trainer.train()
        runs.append(logs_of(trainer))
    for other in runs[1:]:
        for one, two in zip(runs[0], other, strict=True):
            for key in ("loss", "grad_norm", "gere/tm", "gere/weight", "gere/unrelated"):
                assert one.get(key) == pytest.approx(two.get(key), rel=2e-4, abs=1e-6), key


def test_resume_keeps_the_weight(make_trainer, arguments, tmp_path):
    """Stopped in the middle of the calibration."""
    args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(args=arguments(**args), w="auto")
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-3"
    assert read_weight(checkpoint)["rows"] == 12
    resumed = make_trainer(args=arguments(**args, output_dir=str(tmp_path / "again")), w="auto")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for one, two in zip(logs_of(whole)[3:], logs_of(resumed)[3:], strict=True):
        assert one["gere/weight"] == pytest.approx(two["gere/weight"], rel=1e-6)
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    states = [read_weight(tmp_path / folder / "checkpoint-6") for folder in ("again", "out")]
    assert states[0].pop("distance") == states[1].pop("distance") == "tm over elements"
    assert states[0] == pytest.approx(states[1])


def test_a_fixed_weight_leaves_no_file(make_trainer, tmp_path):
    trainer = make_trainer(w="1")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / WEIGHT_FILE).exists() and read_weight(tmp_path / "saved") == {}


@pytest.mark.parametrize(
    "content", ["", "[]", '{"unrelated": 1}', '{"unrelated": "NaN", "number": 1, "rows": 1}',
                '{"unrelated": 0, "number": 1, "rows": 1}']
)  # fmt: skip
def test_a_damaged_state_is_refused(tmp_path, content):
    state = {"distance": "l2", "unrelated": 8.0, "number": 4.0, "rows": 4}
    write_weight(tmp_path, state)
    assert read_weight(tmp_path).items() >= state.items()
    (tmp_path / WEIGHT_FILE).write_text(content)
    with pytest.raises(CacheCorruptError, match=WEIGHT_FILE) as caught:
        AutoWeight(SQUARE).load_state_dict(read_weight(tmp_path), tmp_path / WEIGHT_FILE)
    assert "next:" in str(caught.value)


@pytest.mark.parametrize(("w", "normalization"), [("auto", "elements"), ("dy", "violations"), (100.0, "violations")])
def test_the_normalization_fits_the_weight(w, normalization):
    """Numbers and `dy` are the official ones, and so is what they weigh."""
    assert GeReConfig().normalization_for(w) == normalization
    assert GeReConfig(normalization="elements").normalization_for(w) == "elements"


@pytest.mark.parametrize("w", ["Auto", "", "-1", True, None, "nan"])
def test_bad_weights_are_refused(make_trainer, w):
    with pytest.raises(ConfigError, match="w_strategy"):
        make_trainer(w=w)


def test_inner_layers_need_checkpointing_that_lets_the_gradient_through(make_trainer, arguments, tmp_path):
    def train(reentrant, layers):
        args = arguments(
            gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}, max_steps=2
        )
        folder = tmp_path / f"layers-{layers}"
        trainer = make_trainer(args=args, config={"layers": layers}, gere_hidden_state_saving_dir=folder)
        trainer.train()
        return trainer

    with pytest.raises(UnsupportedSettingError, match="inner layers"):
        train(True, [1, 2])
    assert logs_of(train(False, [1, 2]))[-1]["gere/tm"] > 0
    train(True, "last")
