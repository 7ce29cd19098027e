"""The rows of `python -m benchmarks`: both sides do the same work."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import data_preparation, evaluation, kernels, overlap, scaling_efficiency, start_up
from benchmarks.candidates import Candidate, Missing, from_environment
from benchmarks.launching import NotMeasuredError, measure, module, on_ranks
from benchmarks.noise_cost import SCALES
from benchmarks.peers.comparison import SMALL_8192, Peer
from benchmarks.peers.work import Work
from benchmarks.plain_evaluation import in_memory, through_loader
from benchmarks.process_memory import Memory, memory_in
from benchmarks.subject import settings
from dist_train.cluster.communicator import Communicator, SingleProcess
from dist_train.models import build_model
from dist_train.training.trainer import Trainer
from tests.unit.simulated_ranks import results
from tests.unit.small_trainers import build_trainer, small_config, state_bits


def test_what_a_program_tells_is_found_among_what_it_prints() -> None:
    program = [sys.executable, "-c", "from benchmarks.launching import tell; print('a line'); tell([1, 2.5])"]
    assert measure(program) == [1, 2.5]
    with pytest.raises(NotMeasuredError, match=r"exit code 3(.|\n)*the reason"):
        measure([sys.executable, "-c", "import sys; print('the reason', file=sys.stderr); sys.exit(3)"])


def test_variables_reach_the_program() -> None:
    program = [
        sys.executable,
        "-c",
        "import os; from benchmarks.launching import tell; tell([os.environ[n] for n in ('A', 'OMP_NUM_THREADS')])",
    ]
    assert measure(program, {"A": "b"}) == ["b", "1"]
    assert measure(program, {"A": "b", "OMP_NUM_THREADS": "2"}) == ["b", "2"]


def test_ranks_are_launched_by_what_carries_them() -> None:
    program = module("a.module", 1, 0.5)
    assert program == [sys.executable, "-m", "a.module", "1", "0.5"]
    assert on_ranks("alone", 1, program) == program
    for controller, launcher in (("mpi", "mpirun"), ("gloo", "horovodrun")):
        command = on_ranks(controller, 3, program)
        assert command[0].endswith(launcher)
        assert command[1:3] == ["-np", "3"]
        assert command[-5:] == program


def test_the_plain_evaluations_find_what_ours_finds() -> None:
    subject = replace(evaluation.make_subject(0.0625, 60), batch_size=25)
    model = build_model(settings(0.0625, 128))
    plain = [
        evaluate(model, subject.images, subject.labels, batch_size=25)() for evaluate in (through_loader, in_memory)
    ]
    assert plain[0] == pytest.approx(plain[1])
    rows = list(evaluation.rows_of(subject, 1))
    assert [row.theirs for row in rows] == ["DataLoader", "bare loop in memory"]
    assert all(row.images == 60 and row.median > 0 for row in rows)


def test_all_readings_of_the_data_give_the_same_images(tmp_path: Path) -> None:
    files = data_preparation.write_files(tmp_path, 50)
    first, later = data_preparation.prepare(files), data_preparation.prepare(files)
    theirs = data_preparation.read_by_torchvision(files)
    assert torch.equal(first.images, later.images)
    assert torch.equal(later.images[:, 0], theirs.data)
    assert torch.equal(later.labels, theirs.targets)
    assert [row.pairs for row in data_preparation.rows_of(files, 50, 2)] == [2, 2, 2]


@pytest.mark.parametrize("size", [1, 2])
def test_summing_after_the_backward_pass_gives_the_same_weights(tmp_path: Path, size: int) -> None:
    def train(comm: Communicator, prepare: Callable[[Trainer], None], name: str) -> dict[str, bytes]:
        trainer = build_trainer(small_config(), tmp_path / name, comm)
        prepare(trainer)
        times = [overlap.times_of(trainer) for _ in range(3)]
        assert all(0 <= each.wait < each.step for each in times)
        trainer.close()
        return state_bits(trainer.network)

    ours = results(size, lambda comm: train(comm, lambda trainer: None, "ours"))
    theirs = results(size, lambda comm: train(comm, overlap.summed_afterwards, "theirs"))
    assert ours == theirs


def test_the_share_of_the_wait_is_told_for_both_ways() -> None:
    rows = list(overlap.rows_on(SingleProcess(), 0.0625, 8, 2))
    assert [row.pairs for row in rows] == [2, 2, 2, 2]
    assert all(0 <= row.median < 1 for row in rows[2:])


def test_noise_adds_a_few_operators_whatever_the_number_of_tensors() -> None:
    plain = kernels.started_by_step(0.0625, "none", "absolute")
    added = {scale: kernels.started_by_step(0.0625, "smoothout", scale) - plain for scale in SCALES}
    assert plain > 100
    assert 0 < added["absolute"] <= 6
    assert added["absolute"] < added["weight"] < added["filter"] <= 28


def test_operators_that_call_others_do_not_count() -> None:
    values = torch.zeros(8, 8)
    assert kernels.started(lambda: values.add_(1.0)) == 1
    assert kernels.started(lambda: values.t().view(8, 8)[0].detach()) == 0


def test_memory_is_read_from_what_the_kernel_tells() -> None:
    rollup = "55d0-7ffe ---p 00000000 00:00 0 [rollup]\nRss:  300 kB\nPss:  200 kB\nPss_Anon:  150 kB\nPss_File:  50 kB"
    status = "Name:\tpython\nVmPeak:\t  900 kB\nVmHWM:\t  400 kB\n"
    assert memory_in(rollup, status) == Memory(200 * 1024, 150 * 1024, 400 * 1024)


def test_a_candidate_that_is_not_installed_is_told_of() -> None:
    bare = {entry.name: entry for entry in from_environment(lambda name: None)}
    assert isinstance(bare["jemalloc"], Missing)
    assert "libtcmalloc" in bare["tcmalloc"].reason if isinstance(bare["tcmalloc"], Missing) else False
    whole = {entry.name: entry for entry in from_environment(lambda name: f"lib{name}.so.1")}
    assert whole["jemalloc"] == Candidate("jemalloc", {"LD_PRELOAD": "libjemalloc.so.1"})
    assert {entry.ranks for entry in whole.values() if isinstance(entry, Candidate)} == {1, 2}


def test_efficiency_is_against_the_same_share_on_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(peer: Peer, work: Work) -> float:
        return work.batch / work.ranks * (1.1 if work.ranks > 1 else 1.0)

    monkeypatch.setattr(scaling_efficiency, "seconds_of", seconds)
    strong, weak = scaling_efficiency.efficiency_rows(SMALL_8192, 2)
    assert strong.median == pytest.approx(1.1)
    assert weak.median == pytest.approx(1.1)
    assert not strong.holds
    four, eight = scaling_efficiency.oversubscribed_rows(SMALL_8192, 1)
    assert (four.median, eight.median) == pytest.approx((0.5, 0.25))


def test_a_start_is_against_the_bare_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_up, "seconds_to_step", lambda step, *words, **names: 2.0 + step)
    monkeypatch.setattr(start_up, "bare_horovod", lambda controller: 2.5)
    row = start_up.start_row("gloo", 2)
    assert row.median == pytest.approx(1.2)
    assert row.bar == 1.3
    assert row.holds
    assert [each.median for each in start_up.resume_rows(2)] == pytest.approx([4 / 3, 4 / 3])
