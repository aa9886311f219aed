"""When a run validates, saves and ends."""

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


def test_a_state_from_before_patience_is_read():
    state = TrainState()
    state.load_state_dict({"step": 3, "tokens": 5, "labels": 4, "skipped": 0})
    assert (state.step, state.validated, state.lowest_loss, state.not_lower) == (3, -1, None, 0)
