"""The training loop: updates, with records, evaluations, checkpoints and agreement checks between them."""

from __future__ import annotations

import logging
import math
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from torch import nn

from dist_train.checkpoint.files import Contents
from dist_train.checkpoint.state import Progress, TrainState
from dist_train.checkpoint.writer import CheckpointWriter, Saving
from dist_train.cluster.communicator import Communicator, RankLostError
from dist_train.config import Config
from dist_train.config.plugins import plugin_files
from dist_train.config.resuming import with_setting
from dist_train.data.loader import Splits
from dist_train.data.plan import BatchPlan
from dist_train.models.norms import norm_modules
from dist_train.monitoring.observers import Observers
from dist_train.optim.averaging import AveragedModel
from dist_train.optim.noise import Noise
from dist_train.optim.schedules import LearningRate
from dist_train.outcome import DisagreementError, DivergedError, OutOfMemoryError, StoppedError
from dist_train.rundir.epochs import Epochs
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import Detail, EvaluationRecord, EventRecord, Record, TrainRecord
from dist_train.rundir.status import StatusFields, StatusFile
from dist_train.training.compute import free_device_memory
from dist_train.training.consistency import verify_agreement
from dist_train.training.dealing import Batches
from dist_train.training.evaluation import Evaluation, evaluate, recompute_statistics, statistics_samples
from dist_train.training.measuring import Measuring, Profiler, WeightNorms
from dist_train.training.micro_batches import fewest_samples, halve, sum_for_sync_norm
from dist_train.training.reduction import set_up_reduction
from dist_train.training.step import TrainingStep
from dist_train.training.stopping import StopRequests, TimeLimit, note_evaluation, why_stop_early

_logger = logging.getLogger("dist_train.training")


@dataclass(frozen=True)
class LastUpdate:
    """The last update and its record; `progress` is a copy made right after it, before any evaluation."""

    record: TrainRecord
    stop_requested: bool
    repeats: int
    progress: Progress
    rendezvous_requested: bool = False
    """Whether ranks wait to join, in an elastic launch."""


@dataclass
class Trainer:
    """Trains to the end of a run. `launching/assembly.py` builds it; elastic launches: `recovery.ElasticTrainer`."""

    config: Config
    comm: Communicator
    splits: Splits
    state: TrainState
    training_step: TrainingStep
    """Changes `state`; it may use a compiled network with the same weights."""
    directory: RunDirectory
    learning_rate: LearningRate
    epochs: Epochs
    """The passes over the data, and the size of the global batch in each."""
    observers: Observers
    stop: StopRequests
    progress: Progress
    profiler: Profiler | None = None
    measuring: Measuring | None = None  # on all ranks or on none
    may_shrink: bool = False  # whether the micro-batch size may be halved when memory runs out

    def __post_init__(self) -> None:
        assert self.config.batch.micro_size != "auto", "decided when the run starts"
        self.total_steps = self.learning_rate.calendar.steps(self.config.run.epochs)  # updates that the schedules span
        self.last_step = min(self.total_steps, self.config.run.max_steps or self.total_steps)
        """Number of updates after which the run ends."""
        self._batches = Batches(self.config, self.epochs, len(self.splits.train), self.last_step)
        self._batches.deal(self.config.batch.micro_size, self.comm)
        self._statistics_step: int | None = None
        self._verified_step: int | None = None
        self._averaged = AveragedModel(self.network, self.training_step.averaging, self._recompute_statistics)
        self.plugins = plugin_files(self.config.model_dump(mode="json"))
        self.status: StatusFile | None = None
        self.time_limit = TimeLimit(None)
        self.saving = Saving(self.comm, self.event)
        self._busy_seconds = 0.0
        self._samples_done = 0

    def become_writer(
        self,
        observers: Observers,
        status: StatusFile | None,
        writer: CheckpointWriter,
        time_limit: TimeLimit,
        norms: WeightNorms | None,
    ) -> None:
        """Write records, status and checkpoints from now on, and watch the time limit, as rank 0 does."""
        time_limit.take_over(self.time_limit)
        self.observers, self.status, self.time_limit = observers, status, time_limit
        self.saving = Saving(self.comm, self.event, writer, time_limit.note_saved)
        self.training_step.wait_for_checkpoint_copy = writer.wait_until_copied
        if self.measuring:
            self.measuring.norms = norms

    @property
    def network(self) -> nn.Module:
        """The model, not compiled."""
        return self.state.network

    @property
    def epoch(self) -> float:
        """Epochs completed."""
        return self.epochs.done(self.progress.step)

    @property
    def plan(self) -> BatchPlan:
        """The micro-batches of the next update, or of the last one at the end of the run."""
        return self._batches.plan(min(self.progress.step, self.last_step - 1))

    @property
    def samples_per_second(self) -> float | None:
        """Training samples per second, over the updates of this launch."""
        return self._samples_done / self._busy_seconds if self._busy_seconds else None

    def status_fields(self) -> StatusFields:
        """Return how far the run is, for its status."""
        last_step = max(self.last_step, self.progress.step)  # a resumed run may have done more than `run.max_steps`
        return {
            "step": self.progress.step,
            "epoch": self.epoch,
            "total_steps": last_step,
            "total_epochs": self.epochs.done(last_step),
            "best_accuracy": self.progress.best_accuracy,
            "samples_per_second": self.samples_per_second,
        }

    def run(self) -> None:
        """Train to the end, with the evaluations and checkpoints that are due.

        Raises:
            StoppedError: a stop was requested; the checkpoint is saved.
            DivergedError: the loss, the gradient or the last evaluation is not finite.
            DisagreementError: ranks hold different weights or noise.
            OutOfMemoryError: a step or an evaluation does not fit the device of some rank.
            FaultError: the last checkpoint could not be written, or a rank was lost.
        """
        try:
            self._train()
        except (DivergedError, DisagreementError, OutOfMemoryError):  # on all ranks
            with suppress(RankLostError):
                self.saving.wait()
            raise

    def _train(self) -> None:
        while self.has_work:
            self.advance()
        self._publish_measurement()
        self._finish_saving()
        if self.progress.non_finite_step == self.progress.step:
            raise DivergedError(
                f"the last evaluation, after step {self.progress.step}, is not finite", code="evaluation-not-finite"
            )

    @property
    def has_work(self) -> bool:
        """Whether there are updates to make."""
        return self.progress.step < self.last_step and not self.stopped_early

    @property
    def stopped_early(self) -> str:
        """Why early stopping ends the run before its last step; empty if it does not."""
        return why_stop_early(self.config, self.progress) if self.progress.step < self.last_step else ""

    def close(self) -> None:
        """Wait for the checkpoint being written, ignoring failures, and close the data."""
        if self.profiler:
            self.profiler.close()
        self.splits.close()
        self.saving.close()

    def advance(self) -> None:
        """Make one update, then the records, evaluation and checkpoint due after it; raises what `run` raises.

        If memory runs out and `may_shrink` is set, the micro-batch size is halved and no update is made.
        """
        if (update := self._make_update()) is not None:
            self._complete_step(update)

    def _make_update(self) -> LastUpdate | None:
        """Make one update; return None if the micro-batch size was halved instead."""
        step = self.progress.step
        begun = time.perf_counter()
        self.splits.train.prefetch(self._batches.requests(step))
        try:
            update = self.training_step(self._batches.batch(step), self.learning_rate.at(step), self.stop.requested)
        except OutOfMemoryError:
            if not self.may_shrink:
                raise
            self._shrink()  # the error holds no tensors of the failed passes: see `runs_in_memory`
            return None
        seconds, total = time.perf_counter() - begun, update.total
        size = self._batches.plan(step).global_size
        if shares := self._batches.dealing(step).note(step, update.times, total.paces):
            self.event("dealing", step + 1, shares=" ".join(map(str, shares)))
        self.progress.step += 1
        record = TrainRecord(
            step=step + 1,
            epoch=self.epoch,
            loss=total.loss,
            accuracy=total.accuracy,
            learning_rate=self.learning_rate.at(step),
            noise_amplitude=float(self.training_step.noise.amplitude(step)),  # a plug-in's may be NumPy's or a tensor
            gradient_norm=total.gradient_norm,
            step_seconds=seconds,
            samples_per_second=size / seconds,
            time=time.time(),
        )
        if self.profiler:
            self.profiler.after_update(self.progress.step)
        self._busy_seconds += seconds
        self._samples_done += size
        return LastUpdate(record, total.stop > 0, update.repeats, replace(self.progress), total.rendezvous > 0)

    def _shrink(self) -> None:
        sizes = [size for _, size in self.config.batch.sizes]
        smaller = halve(self.plan.micro_size, sizes, fewest_samples(self.config.model, self.comm.most_ranks))
        self.event("micro_size", before=self.plan.micro_size, now=smaller, reason="out of memory")
        self._divide_work(smaller)
        free_device_memory()
        if self.comm.rank == 0:
            self.directory.update_config(self.config)

    def _divide_work(self, micro_size: int) -> None:
        """Divide batches into micro-batches of `micro_size`, and these over the present ranks."""
        self.config = with_setting(self.config, "batch.micro_size", micro_size)
        self._batches.deal(micro_size, self.comm)
        step = self.training_step
        step.reduction.close()
        # The reduction gets new buffers, since a broken group may still write to the old ones.
        self.training_step = replace(
            step,
            reduction=set_up_reduction(self.config, step.weights, step.noise, self.comm, self.progress),
            sum_over_ranks=sum_for_sync_norm(self.config.model, self.comm, step.clock),
        )

    def _complete_step(self, update: LastUpdate) -> None:
        """Do the work due after the last update."""
        step = self.progress.step
        self._publish_measurement()
        if (size_before := self._batches.changed(step - 1)) is not None:
            self.event("batch_size", before=size_before, now=self._batches.plan(step - 1).global_size)
        if update.repeats:
            self.event("gradient_repeated", times=update.repeats)
        if step % self.config.metrics.every_steps == 0 or step == self.last_step:
            self._record(update.record)
            if self.measuring:
                self.measuring.start(step, update.record.step_seconds, self.training_step.clock.times())
        every = self.config.comm.verify_every
        if every and step % every == 0:
            self._verify(self.training_step.noise)
        if self._is_due(self.config.evaluation.every_epochs):
            self._evaluate()
        every_steps = self.config.checkpoint.every_steps
        is_due = self._is_due(self.config.checkpoint.every_epochs) or (every_steps and step % every_steps == 0)
        if is_due or self.stopped_early:
            self._save()
        self.saving.report()
        self._note_progress()
        if self.time_limit.check(time.time(), time.monotonic()):
            self.stop.request("time limit")
        if update.stop_requested and step < self.last_step and not self.stopped_early:
            self._stop()

    def _verify(self, noise: Noise | None) -> None:
        """Check, once per step, that all ranks agree; `noise` is that of the last update, if they still hold it."""
        step = self.progress.step
        if self.config.comm.verify_every and self._verified_step != step:
            verify_agreement(self.comm, self.training_step.weights, noise, step - 1, self.training_step.averaging)
            self._verified_step = step

    def _note_progress(self) -> None:
        """Show observers and readers of the status that the run has just done something."""
        self.observers.progress(self.progress.step)
        if self.status:
            self.status.progress(**self.status_fields())

    def _publish_measurement(self) -> None:
        """Give observers the measurement that was started after an earlier update, if any."""
        if self.measuring and (measurement := self.measuring.result()):
            self.observers.measurement(measurement)

    def _is_due(self, every_epochs: int) -> bool:
        """Whether work that is done every `every_epochs` epochs, and at the end of the run, is due now."""
        return self.progress.step == self.last_step or self._ends_epochs(every_epochs)

    def _ends_epochs(self, number: int) -> bool:
        """Whether a multiple of `number` epochs has just ended; never for 0."""
        epoch, index = self.epochs.place(self.progress.step)
        return number > 0 and index == 0 and epoch % number == 0

    def _evaluate(self) -> None:
        self._update_clean_statistics()
        results = self._evaluate_splits("")
        if self._averaged:
            with self._averaged.in_force(self.progress.step):
                results |= self._evaluate_splits("-averaged")
        not_finite = [] if bool(self.training_step.weights.values.isfinite().all()) else ["weights"]
        for split, result in results.items():
            if not math.isfinite(result.loss):
                not_finite.append(f"{split} loss")
            else:
                self.progress.note_accuracy(split, result.accuracy)
        if not_finite:
            self.progress.note_non_finite()
            self.event("non_finite_evaluation", what=", ".join(not_finite))
        # Early stopping ignores an extra evaluation at `run.max_steps`: a longer run would not have it.
        if self._ends_epochs(self.config.evaluation.every_epochs):
            values = {f"{split}.accuracy": result.accuracy for split, result in results.items()}
            values |= {f"{split}.loss": result.loss for split, result in results.items()}
            note_evaluation(self.config, self.progress, values)
        if self.stopped_early:
            # the event's name and step say the rest
            self.event("stopped_early", reason=self.stopped_early.partition(": ")[2])

    def _evaluate_splits(self, suffix: str) -> dict[str, Evaluation]:
        """Evaluate the network on every split; record and return the results by the split's name plus `suffix`."""
        results, settings = {}, self.config.evaluation
        for split, samples in self.splits.present.items():
            count = min(settings.train_samples, len(samples)) if split == "train" else len(samples)
            if count > 0:
                result = results[f"{split}{suffix}"] = evaluate(
                    self.network,
                    samples,
                    count,
                    batch_size=settings.batch_size,
                    compute=self.training_step.compute,
                    comm=self.comm,
                    after_batch=self._note_progress,
                )
                measured = result.loss, result.accuracy, result.samples, time.time()
                self._record(EvaluationRecord(self.progress.step, self.epoch, f"{split}{suffix}", *measured))
        return results

    def _update_clean_statistics(self) -> None:
        """Recompute the norm statistics at the clean weights if the settings ask for it, at most once per step."""
        if self.config.recomputes_statistics and self._statistics_step != self.progress.step:
            self._recompute_statistics()
            self._statistics_step = self.progress.step

    def _recompute_statistics(self) -> None:
        """Recompute the norm statistics, if there are norms, at the weights that the network currently uses."""
        if not norm_modules(self.network):
            return
        count, micro_size = len(self.splits.train), self.plan.micro_size
        recompute_statistics(
            self.network,
            self.splits.train,
            statistics_samples(count, self.config.model.norm_samples, micro_size, self.config.run.seed),
            micro_size=micro_size,
            compute=self.training_step.compute,
            comm=self.comm,
            after_batch=self._note_progress,
        )

    def _save(self) -> None:
        self._verify(self.training_step.noise)  # otherwise a checkpoint could hold weights on which the ranks differ
        self._update_clean_statistics()
        self.progress.note_saved()
        average = self._averaged.contents(self.progress.step)
        best = self.progress.best_saved_step if self.config.checkpoint.keep_best else None
        stall = self.saving.save(self.progress.step, lambda: replace(self.contents(), average=average), best)
        if self.measuring:
            self.measuring.note_stall(stall)

    def contents(self) -> Contents:
        """Return the contents of a checkpoint of the current state, without averaged weights."""
        contents = self.state.contents(self.progress, self.epoch, self.config, self.plugins)
        statistics = self.splits.normalization
        normalization = {name: [*values] for name, values in asdict(statistics).items()} if statistics else {}
        names = [*self.splits.class_names]
        return replace(contents, data=self.splits.identity, normalization=normalization, class_names=names)

    def _finish_saving(self) -> None:
        """Wait for the last checkpoint; raises what that raises."""
        self.saving.finish()

    def _stop(self) -> None:
        if self.status:
            self.status.change("stopping")
        self._publish_measurement()
        self.event("signal", signal=self.stop.reason or "on another rank")
        self._save()
        self._finish_saving()
        raise StoppedError(
            f"asked to stop after step {self.progress.step}, checkpoint saved: the same command resumes the run"
        )

    def event(self, name: str, step: int | None = None, /, **details: Detail) -> None:
        """Record an event of `step`, by default the last update."""
        self._record(EventRecord(self.progress.step if step is None else step, name, time.time(), details))

    def _record(self, record: Record) -> None:
        """Record on rank 0."""
        if self.comm.rank == 0:
            self.observers.record(record)
