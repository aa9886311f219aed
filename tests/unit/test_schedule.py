"""The steps at which a run validates, saves and ends."""

from __future__ import annotations

from ds_kd.checkpoint.state import TrainState
from ds_kd.train.schedule import Schedule


def due(schedule, method):
    return [step for step in range(1, schedule.total_steps + 1) if getattr(schedule, method)(step)]


def test_steps_and_epochs_say_when_to_validate_and_save():
    schedule = Schedule(4, num_epochs=3, max_steps=10, val_every_steps=3, ckpt_every_steps="epoch")
    assert due(schedule, "validates") == [3, 6, 9, 10]
    assert due(schedule, "saves") == [4, 8, 10]
    assert due(Schedule(4, num_epochs=2, val_every_steps="epoch"), "validates") == [4, 8]
    assert due(Schedule(4, num_epochs=2), "saves") == [8]


def test_patience_counts_validations_that_lower_nothing():
    schedule, state = Schedule(4, patience=2), TrainState()
    seen = []
    for loss in (3.0, 2.0, 2.5, 1.9, 1.9, float("nan")):
        state.note_validation(loss)
        seen.append((state.not_lower, schedule.has_no_patience(state.not_lower)))
    assert seen == [(0, False), (0, False), (1, False), (0, False), (1, False), (2, True)]
    assert state.lowest_loss == 1.9
    begun_badly = TrainState()
    for loss in (float("nan"), 3.0, 2.0):
        begun_badly.note_validation(loss)
    assert (begun_badly.lowest_loss, begun_badly.not_lower) == (2.0, 0)
    assert not Schedule(4).has_no_patience(99)


def test_validations_of_other_data_are_not_compared_with_those_before():
    schedule, state = Schedule(4, patience=1), TrainState(step=3)
    for loss in (1.0, 1.5):
        state.note_validation(loss)
    assert schedule.has_no_patience(state.not_lower)
    state.forget_validations()
    state.note_validation(9.0)
    assert (state.lowest_loss, state.not_lower, state.validated) == (9.0, 0, 3)


def test_steps_that_the_epochs_do_not_reach_are_told_with_the_epochs_that_would():
    told = Schedule(3, num_epochs=1, max_steps=500).describe_unreached()
    assert "step_scheduler.max_steps: 500 is not reached" in told
    assert "num_epochs: 1 of 3 step(s) each ends the run after 3; num_epochs: 167 would" in told
    for most in (None, 0, 2, 3):
        assert Schedule(3, num_epochs=1, max_steps=most).describe_unreached() == ""


def test_a_run_that_is_done_names_the_key_that_lets_it_go_on():
    assert Schedule(3, num_epochs=1, max_steps=500).describe_longer(3) == "a larger num_epochs"
    assert Schedule(3, num_epochs=2).describe_longer(6) == "a larger num_epochs"
    assert Schedule(3, num_epochs=2, max_steps=4).describe_longer(4) == "a larger max_steps"
    both = "a larger max_steps and num_epochs"
    assert Schedule(3, num_epochs=2, max_steps=6).describe_longer(6) == both
    ended = Schedule(3, num_epochs=2, patience=1).describe_longer(2)
    assert ended == "a larger step_scheduler.patience"


def test_a_state_from_before_patience_is_read():
    state = TrainState()
    state.load_state_dict({"step": 3, "tokens": 5, "labels": 4, "skipped": 0})
    assert (state.step, state.validated, state.lowest_loss, state.not_lower) == (3, -1, None, 0)
