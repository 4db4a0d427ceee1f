"""Training the module on a toy denoiser: losses, gradients, captions' rows, resume."""

import pytest
import torch
from toy_training import SMALL, loss_of_batch, one_step, small_training

from controlnext_core.families import FAMILIES
from controlnext_core.features import add_features, control_features
from controlnext_core.module import new_module
from controlnext_core.training import STATE, Training, draw_rows, drop_captions, faulty_entry, select_weights


def test_a_zero_convolution_starts_as_the_denoiser_alone_and_learns():
    training = small_training(zero_convolution=True)
    h, parts = torch.randn(1, 12, 4, 4), [training.module.image_part(torch.rand(1, 3, 32, 32), 1, False)]
    features = control_features(training.module, FAMILIES["sdxl"], parts, torch.ones(1), (4, 4), True)
    assert torch.equal(add_features(h, features, 1.0, True), h)
    one_step(training, True)
    assert training.module.mid_convs[1].weight.any()


def test_a_batch_is_of_one_bucket_without_repeats_and_buckets_come_by_their_share():
    generator = torch.Generator().manual_seed(8)
    buckets = [[0, 1, 2, 3, 4, 5], [6, 7]]
    batches = [draw_rows(buckets, 3, generator) for _ in range(400)]
    assert all(len(set(rows)) == len(rows) == (2 if rows[0] > 5 else 3) for rows in batches)
    assert all(len({row > 5 for row in rows}) == 1 for rows in batches)
    assert sum(rows[0] > 5 for rows in batches) == pytest.approx(100, abs=30)
    assert {row for rows in batches for row in rows} == set(range(8))


def test_captions_are_dropped_by_their_share():
    generator = torch.Generator().manual_seed(9)
    assert sum(drop_captions(4000, 0.2, generator)) == pytest.approx(800, abs=100)
    assert not any(drop_captions(100, 0.0, generator)) and all(drop_captions(100, 1.0, generator))


def test_weights_are_chosen_by_their_diffusers_names():
    names = {"down_blocks.0.attn1.to_out.0.weight": "a", "mid_block.attn2.to_out.0.bias": "b", "conv_in.weight": "c"}
    assert list(select_weights(names, "attn2.*to_out").values()) == ["b"]
    assert list(select_weights(names, "to_out").values()) == ["a", "b"]


@pytest.mark.parametrize("settings", [{}, {"ema": 0.9}, {"warmup_steps": 5, "accumulation": 2},
                                      {"ema": 0.9, "scale": 1.0}])
def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(tmp_path, settings):
    whole, first = small_training(**settings), small_training(**settings)
    for _ in range(6):
        one_step(whole)
    for _ in range(3):
        one_step(first)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = small_training(**settings)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(3):
        one_step(second)
    assert second.losses == whole.losses and second.step == 6
    for ours, expected in zip(second.weights(), whole.weights(), strict=True):
        assert ours.keys() == expected.keys() and all(torch.equal(ours[key], expected[key]) for key in ours)


def test_learning_rates_rise_in_the_warm_up():
    cold, warm = small_training(warmup_steps=4), small_training()
    one_step(cold), one_step(warm)
    assert torch.allclose(cold.differences["after"], warm.differences["after"] / 4, atol=1e-6)
    rates = []
    for _ in range(5):
        one_step(cold)
        rates.append(cold.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


def test_a_learned_scale_has_its_own_rate_and_is_given_back_by_its_name():
    training = small_training(scale=0.5, scale_learning_rate=1e-2)
    one_step(training)
    weights = training.weights()[0]
    assert abs(weights["scale"].item() - 0.5) == pytest.approx(1e-2, rel=1e-3)  # Adam's first step is its rate
    assert weights.keys() == training.module.state_dict().keys()
    assert all(torch.equal(value, weights[key]) for key, value in training.module.state_dict().items())


def test_accumulated_batches_are_one_step_down_their_mean_loss():
    accumulated, whole = small_training(accumulation=2), small_training()
    loss = one_step(accumulated)

    def both() -> torch.Tensor:
        return (loss_of_batch(whole) + loss_of_batch(whole)) / 2

    assert loss == pytest.approx(whole.update(both))
    assert accumulated.step == len(accumulated.losses) == 1
    for ours, expected in zip(accumulated.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(ours, expected, atol=1e-5)


def test_a_step_that_ends_amid_its_batches_leaves_no_trace():
    whole, stopped = small_training(accumulation=2), small_training(accumulation=2)
    batches = []

    def stop_at_the_second() -> torch.Tensor:
        batches.append(None)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return loss_of_batch(stopped)

    with pytest.raises(KeyboardInterrupt):
        stopped.update(stop_at_the_second)
    assert stopped.step == 0
    assert one_step(stopped) == one_step(whole)
    assert all(map(torch.equal, stopped.parameters(), whole.parameters()))


def test_the_moving_average_lags_behind_what_is_trained():
    training = small_training(ema=0.5)
    start = training.module.mid_convs[1].weight.detach().clone()
    one_step(training)
    now, average = training.module.mid_convs[1].weight.detach(), training.weights()[0]["mid_convs.1.weight"]
    assert torch.allclose(average, (start + now) / 2) and not torch.equal(start, now)


def test_a_state_of_another_training_is_refused():
    state = small_training().state_dict()
    with pytest.raises(ValueError, match="moving average"):
        small_training(ema=0.9).load_state_dict(state)
    with pytest.raises(ValueError, match="0 UNet weights"):
        small_training().load_state_dict({**state, "differences": {}})
    two = {name: torch.zeros(3) for name in ("one", "other")}
    with pytest.raises(ValueError, match="the same UNet weights in another order"):
        Training(new_module(FAMILIES["sdxl"], 3, **SMALL), dict(reversed(two.items()))).load_state_dict(
            Training(new_module(FAMILIES["sdxl"], 3, **SMALL), two).state_dict())
    with pytest.raises(ValueError, match="only one of them trains the scale"):
        small_training(scale=1.0).load_state_dict(state)


def test_a_loss_that_is_not_a_number_changes_nothing():
    training = small_training()
    before = training.state_dict()
    with pytest.raises(ValueError, match="learning_rate: the loss is nan after 0 steps"):
        training.update(lambda: sum(value.sum() for value in training.parameters()) * float("nan"))
    assert all(torch.equal(value, before["module"][key]) for key, value in training.module.state_dict().items())
    assert training.step == 0 and training.losses == []


def test_gradients_that_are_not_finite_change_nothing():
    training = small_training()
    before = training.state_dict()
    with pytest.raises(ValueError, match="learning_rate: the gradients' norm is nan after 0 steps"):
        training.update(lambda: sum((value * 0).sum().sqrt() for value in training.parameters()))
    after = training.state_dict()
    assert after["digest"] == before["digest"] and faulty_entry(after) is None


def test_weights_that_a_step_left_without_finite_numbers_are_not_given():
    training = small_training(ema=0.9)
    training.average[3] += float("inf")
    with pytest.raises(ValueError, match="learning_rate: what was trained is not finite after 0 steps"):
        training.weights()


@pytest.mark.parametrize("settings", [{}, {"ema": 0.9, "scale": 1.0}])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_state_is_whole_from_the_start_and_each_of_its_entries_is_needed(settings, steps):
    training = small_training(**settings)
    for _ in range(steps):
        one_step(training)
    state = training.state_dict()
    assert faulty_entry(state) is None
    for name in STATE:
        assert faulty_entry({key: value for key, value in state.items() if key != name}) == name
        assert faulty_entry({**state, name: "something else"}) == name


def test_a_parameter_that_no_step_has_reached_has_no_moments():
    training = Training(new_module(FAMILIES["sdxl"], 3, **SMALL), {"after": torch.zeros(4, 12, 3, 3),
                                                                   "unused": torch.zeros(3)})
    one_step(training)
    state = training.state_dict()
    assert len(state["optimizer"]["state"]) == len(training.parameters()) - 1 and faulty_entry(state) is None


@pytest.mark.parametrize("name", ["module", "differences", "average", "optimizer", "generator", "step", "losses"])
def test_the_digest_tells_a_number_that_is_another(name):
    training = small_training(ema=0.9)
    one_step(training)
    state = training.state_dict()
    tensors = {"module": state["module"]["mid_convs.1.bias"], "differences": state["differences"]["after"],
               "average": state["average"][0], "optimizer": state["optimizer"]["state"][0]["exp_avg"]}
    if name in tensors:
        tensors[name].view(-1)[0] += 1e-3
    elif name == "generator":
        state[name] = torch.Generator().manual_seed(7).get_state()
    else:
        state |= {"step": 2, "losses": [*state["losses"], 1.0]} if name == "step" else {"losses": [1.0]}
    assert faulty_entry(state) == "digest"
    del state["digest"]
    assert faulty_entry(state) is None


def test_a_state_that_is_gone_on_from_stays_as_it_is():
    first, second = small_training(), small_training()
    one_step(first)
    state = first.state_dict()
    second.load_state_dict(state)
    one_step(second)
    assert faulty_entry(state) is None
