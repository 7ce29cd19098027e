"""How far a run is: kept in a checkpoint, the same on all ranks."""

from __future__ import annotations

from dist_train.checkpoint.state import Progress, restored_progress, shared_progress
from tests.unit.checkpoint_files import contents
from tests.unit.simulated_ranks import results


def test_the_best_is_the_first_of_the_highest_test_accuracies() -> None:
    progress = Progress()
    for step, accuracy in ((1, 0.5), (2, 0.8), (3, 0.8), (4, 0.7)):
        progress.step = step
        progress.note_accuracy("train", 0.5 + step / 8)
        progress.note_accuracy("test", accuracy)
    assert progress.best_accuracy == 0.8
    assert (progress.test_accuracy, progress.train_accuracy) == (0.7, 1.0)


def test_an_accuracy_of_zero_is_an_accuracy() -> None:
    progress = Progress(step=1)
    progress.note_accuracy("test", 0.0)
    assert progress.best_accuracy == 0.0


def test_it_comes_back_from_a_checkpoint() -> None:
    progress = Progress(7, 0.8, 5, 5, 0.7, 0.7, 0.9)
    assert restored_progress(contents(7, metrics=progress.metrics())) == progress
    assert restored_progress(contents(7, metrics={})) == Progress(7)


def test_every_rank_has_rank_0_s() -> None:
    progress = Progress(7, 0.8, 5, None, None, None, 0.9)
    shared = results(3, lambda each: shared_progress(each, Progress() if each.rank else progress))
    assert shared == [progress] * 3


def test_the_best_checkpoint_is_the_best_of_those_saved_at_an_evaluation() -> None:
    progress = Progress()
    for step, accuracy, saved in ((1, 0.9, False), (2, 0.5, True), (3, 0.7, True), (4, None, True), (5, 0.7, True)):
        progress.step = step
        if accuracy is not None:
            progress.note_accuracy("test", accuracy)
        if saved:
            progress.note_saved()
    assert (progress.best_saved_step, progress.best_saved_accuracy) == (3, 0.7)
