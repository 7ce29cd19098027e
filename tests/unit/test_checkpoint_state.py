"""How far a run is, kept in a checkpoint, the same on all ranks; the weights that a run begins with."""

from __future__ import annotations

import hashlib
import pickle
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.optim.lamb import Lamb
from torchvision import models

from dist_train.checkpoint.files import write_checkpoint
from dist_train.checkpoint.state import (
    Progress,
    find_initial,
    load_model,
    read_initial,
    restored_progress,
)
from dist_train.cluster.communicator import Communicator, broadcast_value
from dist_train.config import AveragingSettings, NoiseSettings, parse_config
from dist_train.models import build_model
from dist_train.optim.averaging import Averaging
from dist_train.optim.flat_weights import FlatWeights
from dist_train.optim.noise import build_noise
from dist_train.optim.optimizers import packed_numbers, set_numbers
from dist_train.outcome import PeerFailedError, UsageError
from dist_train.rundir.paths import RunDirectory
from tests.raising import raises
from tests.unit.checkpoint_files import contents
from tests.unit.simulated_ranks import on_ranks, results
from tests.unit.small_trainers import state_of


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
    shared = results(3, lambda each: broadcast_value(each, Progress() if each.rank else progress, "progress"))
    assert shared == [progress] * 3


def state_on(comm: Communicator) -> dict[str, torch.Tensor]:
    """Return what a run holds after rank 0's state was sent to all ranks: a model with a frozen layer and buffers of
    its own, an average, and what the noise keeps.
    """
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)).requires_grad_(True)
    network[0].requires_grad_(False)
    for number, dtype in enumerate((torch.int16, torch.bool, torch.complex64, torch.float64)):
        network.register_buffer(f"buffer{number}", torch.zeros(3, dtype=dtype))
    with torch.no_grad():
        for value in network.state_dict().values():
            value.fill_(1 + comm.rank)
    weights = FlatWeights(network)
    averaging = Averaging(AveragingSettings(kind="lawa", last=2), weights, 1)
    noise = build_noise(NoiseSettings(method="ivon"), weights, seed=0, total_steps=1, rank=comm.rank)
    for kept in (averaging.kept, *noise.kept.values()):
        kept.fill_(1 + comm.rank)
    plain = state_of(network, weights, torch.optim.SGD(weights.parameters))
    replace(plain, averaging=averaging, noise=noise).broadcast(comm)
    return {**network.state_dict(), "average": averaging.kept, **noise.kept}


def test_every_rank_gets_averages_noise_frozen_parameters_and_buffers_of_any_type() -> None:
    first, second = results(2, state_on)
    assert [name for name in first if not torch.equal(first[name], torch.ones_like(first[name]))] == []
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_every_rank_gets_the_numbers_of_an_optimizer_with_their_types() -> None:
    def job(comm: Communicator) -> tuple[dict[str, Any], dict[Any, Any]]:
        network = torch.nn.Linear(2, 3)
        weights = FlatWeights(network)
        optimizer = torch.optim.SGD(weights.parameters)
        group: dict[str, Any] = optimizer.param_groups[0]
        state: dict[Any, Any] = optimizer.state[network.weight]
        state["step"] = 0
        every: dict[Any, Any] = optimizer.state
        if comm.rank == 1:
            every["updates"] = 7
            group.update(k=3, d=1e-6, betas=(0.9, 0.99), decays=None, kind="a")
            state.update(step=7, factors=[torch.ones(2)])
            state[0] = 8
        state_of(network, weights, optimizer).broadcast(comm, root=1)
        assert all(mine is its for mine, its in zip(group["params"], weights.parameters, strict=True))
        assert every["updates"] == 7
        return {name: value for name, value in group.items() if name != "params"}, dict(state)

    (group, state), sent = results(2, job)
    assert (group, repr(state)) == (sent[0], repr(sent[1]))
    assert (group["k"], group["d"], group["betas"], state["step"], state[0]) == (3, 1e-6, (0.9, 0.99), 7, 8)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, Lamb])  # of which the latter creates a tensor in its groups
def test_a_new_rank_gets_the_state_that_an_optimizer_creates_at_its_first_update(
    kind: Callable[..., torch.optim.Optimizer],
) -> None:
    def job(comm: Communicator) -> str:
        network = torch.nn.Linear(2, 3)
        weights = FlatWeights(network)
        optimizer = kind(weights.parameters)
        if comm.rank == 0:
            weights.gradients.fill_(0.5)
            optimizer.step()
        state_of(network, weights, optimizer).broadcast(comm)
        return repr(optimizer.state_dict())

    first, second = results(2, job)
    assert "exp_avg" in first
    assert first == second


class Drawing(torch.optim.SGD):
    """Keeps a generator, which it saves, and lists of tensors in another type than the weights, as timm's Kron does."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        super().__init__(parameters)
        self.rng = random.Random(7)
        self.source = torch.Generator()

    def step(self) -> None:  # type: ignore[override]  # no closure
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["Q"] = [torch.full((2,), self.rng.random(), dtype=torch.bfloat16)]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rng_state": self.rng.getstate(), "source": self.source.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        self.rng.setstate(state_dict["rng_state"])
        self.source.set_state(state_dict["source"])


def test_a_new_rank_gets_what_an_optimizer_saves_besides_its_state() -> None:
    def job(comm: Communicator) -> tuple[str, float]:
        network = torch.nn.Linear(2, 3)
        weights = FlatWeights(network)
        optimizer = Drawing(weights.parameters)
        if comm.rank == 0:
            optimizer.step()
        state_of(network, weights, optimizer).broadcast(comm)
        return repr(optimizer.state_dict()["state"]), optimizer.rng.random()

    first, second = results(2, job)
    assert "'Q': [tensor" in first[0]
    assert "bfloat16" in first[0]
    assert first == second


def test_the_state_of_an_optimizer_s_own_generator_stays_on_the_cpu() -> None:
    sender, receiver = (Drawing(torch.nn.Linear(2, 3).parameters()) for _ in range(2))
    torch.rand(5, generator=sender.source)
    set_numbers(receiver, packed_numbers(sender), torch.device("meta"))  # as a GPU, where no generator takes its state
    assert torch.equal(torch.rand(5, generator=receiver.source), torch.rand(5, generator=sender.source))


def test_a_state_that_only_other_ranks_have_is_refused_on_all() -> None:
    def job(comm: Communicator) -> None:
        network = torch.nn.Linear(2, 3)
        weights = FlatWeights(network)
        optimizer = torch.optim.RMSprop(weights.parameters)
        if comm.rank == 1:
            optimizer.state[network.weight]["square_avg"] = torch.ones(3, 2)
        state_of(network, weights, optimizer).broadcast(comm)

    first, second = on_ranks(2, job)
    assert isinstance(first, PeerFailedError)
    assert isinstance(second, UsageError)
    assert second.code == "plugin-result"


def test_the_best_checkpoint_is_the_best_of_those_saved_at_an_evaluation() -> None:
    progress = Progress()
    for step, accuracy, saved in ((1, 0.9, False), (2, 0.5, True), (3, 0.7, True), (4, None, True), (5, 0.7, True)):
        progress.step = step
        if accuracy is not None:
            progress.note_accuracy("test", accuracy)
        if saved:
            progress.note_saved()
    assert (progress.best_saved_step, progress.best_saved_accuracy) == (3, 0.7)


def test_an_accuracy_of_an_earlier_step_does_not_make_a_checkpoint_the_best() -> None:
    progress = Progress(step=1)
    progress.note_accuracy("test", 0.9)
    progress.step = 2
    progress.note_saved()
    assert (progress.best_saved_step, progress.best_saved_accuracy) == (None, None)


def test_a_checkpoint_whose_evaluation_is_not_finite_is_never_the_best() -> None:
    """The accuracy may be one: that of other splits, or of weights that no output shows."""
    progress = Progress(step=3)
    for split in ("train", "validation", "test"):
        progress.note_accuracy(split, 0.9)
    progress.note_non_finite()
    progress.note_saved()
    assert (progress.best_saved_step, progress.non_finite_step) == (None, 3)
    assert progress.train_accuracy is progress.validation_accuracy is progress.test_accuracy is None


def test_the_best_checkpoint_is_chosen_by_the_validation_split_if_there_is_one() -> None:
    progress = Progress()
    for step, validation, test in ((1, 0.6, 0.7), (2, 0.5, 0.9)):
        progress.step = step
        progress.note_accuracy("validation", validation)
        progress.note_accuracy("test", test)
        progress.note_saved()
    assert (progress.best_saved_step, progress.best_saved_accuracy, progress.best_accuracy) == (1, 0.6, 0.9)


NAME = "torchvision:shufflenet_v2_x0_5"


def model(classes: int, **settings: object) -> torch.nn.Module:
    data = {"name": "synthetic", "synthetic_shape": [3, 32, 32], "synthetic_classes": classes}
    return build_model(
        parse_config({"data": data, "model": {"name": NAME, "norm": "batch", **settings}}, source="test")
    )


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """A state dict such as torchvision publishes: 1000 classes, and counts that our norms do not keep."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = models.shufflenet_v2_x0_5()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.fill_(0.5)
    return dict(network.state_dict())


def loaded(path: Path, network: torch.nn.Module, classes: int) -> list[str]:
    """Load the file at `path` as a run does, and return what it leaves to the seed."""
    initial = read_initial(path, NAME)
    own = network.state_dict()
    heads = list(initial.other_heads(own, classes))
    load_model(initial.fitted(own, classes), network, str(path))
    return heads


@pytest.mark.parametrize(
    "form", ["plain.pth", "wrapped.pth", "parallel.bin", "plain.pt", "lightning.ckpt", "plain.safetensors"]
)
def test_weights_are_taken_and_a_head_of_other_classes_is_the_seeds(
    form: str, published: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / form
    if path.suffix == ".safetensors":
        save_file(published, path)
    else:
        parallel = {f"module._orig_mod.{name}": tensor for name, tensor in published.items()}
        contents: dict[str, Any] = {
            "plain": published,
            "wrapped": {"epoch": 3, "state_dict": published},
            "parallel": {"model": parallel},
            "lightning": {"state_dict": {f"net.{name}": tensor for name, tensor in published.items()}},
        }
        torch.save(contents[path.stem], path)
    assert read_initial(path, NAME).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    network = model(1000)
    assert loaded(path, network, 1000) == []
    assert all(torch.equal(tensor, published[name]) for name, tensor in network.state_dict().items())
    five, seeded = model(5), model(5).state_dict()
    assert loaded(path, five, 5) == ["fc.weight", "fc.bias"]
    for name, tensor in five.state_dict().items():
        assert torch.equal(tensor, seeded[name] if name.startswith("fc.") else published[name])


def test_a_run_of_other_classes_gives_all_but_the_head(tmp_path: Path) -> None:
    directory, five, three, seeded = RunDirectory(tmp_path), model(5), model(3), model(3).state_dict()
    directory.create()
    write_checkpoint(directory.checkpoints, contents(2, model=five.state_dict()), lambda: None)
    assert loaded(tmp_path, three, 3) == ["fc.weight", "fc.bias"]
    for name, tensor in three.state_dict().items():
        assert torch.equal(tensor, (seeded if name.startswith("fc.") else five.state_dict())[name])


@pytest.mark.parametrize("prefix", ["model._orig_mod.", "model.module.", "_orig_mod.module.", "module."])
def test_weights_are_found_below_the_attributes_that_hold_the_network(
    prefix: str, published: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    others = {"n_averaged": torch.tensor(7), "loss.weight": torch.ones(3)}  # of torch's AveragedModel, of a loss
    saved = {f"{prefix}{name}": tensor for name, tensor in published.items()}
    torch.save({**others, **saved}, tmp_path / "weights.pth")
    network = model(1000)
    assert loaded(tmp_path / "weights.pth", network, 1000) == []
    assert all(torch.equal(tensor, published[name]) for name, tensor in network.state_dict().items())
    torch.save(saved | {f"teacher.{name}": tensor for name, tensor in published.items()}, tmp_path / "two.pth")
    with raises(UsageError, "checkpoint-of-another-model"):
        loaded(tmp_path / "two.pth", network, 1000)


def test_weights_of_a_network_whose_attribute_has_a_wrappers_name_are_taken(tmp_path: Path) -> None:
    network = torch.nn.Module()
    network.module = torch.nn.Linear(3, 2)
    saved = {name: torch.full_like(tensor, 4.0) for name, tensor in network.state_dict().items()}
    torch.save(saved, tmp_path / "weights.pth")
    assert loaded(tmp_path / "weights.pth", network, 2) == []
    assert torch.equal(network.module.weight, saved["module.weight"])


@pytest.mark.parametrize("kept", ["first.weight", "second.weight"])
def test_a_file_may_hold_a_tied_parameter_by_one_of_its_names(kept: str, tmp_path: Path) -> None:
    """As `save_model` of safetensors and `save_pretrained` of Hugging Face write it."""
    first, second, head = (torch.nn.Linear(3, 3) for _ in range(3))
    second.weight = first.weight
    network = torch.nn.ModuleDict({"first": first, "second": second, "head": head})
    FlatWeights(network)
    saved = {name: torch.full_like(tensor, 4.0) for name, tensor in network.state_dict().items()}
    left_out = {"first.weight", "second.weight"} - {kept}
    save_file({name: tensor for name, tensor in saved.items() if name not in left_out}, tmp_path / "tied.safetensors")
    assert loaded(tmp_path / "tied.safetensors", network, 2) == []
    assert all(bool((tensor == 4.0).all()) for tensor in network.state_dict().values())
    save_file({kept: saved[kept]}, tmp_path / "part.safetensors")
    with raises(UsageError, "checkpoint-of-another-model"):
        loaded(tmp_path / "part.safetensors", network, 2)


def test_another_programs_file_may_have_a_json_file_beside_it(
    published: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save(published, tmp_path / "net.pt")
    (tmp_path / "net.json").write_text('{"accuracy": 0.5}')
    assert loaded(tmp_path / "net.pt", model(1000), 1000) == []
    (tmp_path / "net.json").write_text('{"sha256": ')
    with raises(UsageError, "checkpoint-record"):
        read_initial(tmp_path / "net.pt", NAME)


def test_averages_are_left_out_where_the_norm_keeps_none(published: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(published, tmp_path / "weights.pth")
    assert loaded(tmp_path / "weights.pth", model(1000, norm="group"), 1000) == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"conv1.0.weight": torch.zeros(24, 3, 1, 1)}, "checkpoint-of-another-model"),
        ({"layer9.weight": torch.zeros(3)}, "checkpoint-of-another-model"),
        ({"fc.weight": torch.zeros(10, 256)}, "checkpoint-of-another-model"),
        ({"model": torch.zeros(3)}, "checkpoint-of-another-model"),
        ({"conv1.1.weight": None}, "weights-unreadable"),
    ],
)
def test_what_does_not_fit_is_one_message(
    change: dict[str, Any], code: str, published: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save({**published, **change}, tmp_path / "weights.pth")
    with raises(UsageError, code):
        loaded(tmp_path / "weights.pth", model(5), 5)


def test_what_holds_no_weights_by_name_is_refused_and_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"net": {"weight": torch.zeros(2)}}, tmp_path / "nested.pth")
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"weight": print}))
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    (tmp_path / "text.safetensors").write_text("no tensors")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pth.tar")
    for name in ("code.pth", "module.pth", "nested.pth", "text.safetensors", "weights.pth.tar"):
        with raises(UsageError, "weights-unreadable"):
            read_initial(tmp_path / name, NAME)


@pytest.mark.parametrize("content", [torch.ones(3), torch.tensor(1), [torch.ones(2)], "w"])
def test_a_file_without_tensors_by_name_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with raises(UsageError, "weights-unreadable"):
        read_initial(tmp_path / "weights.pth", NAME)


def test_torchvisions_weights_are_found_in_the_cache_of_torch_hub(
    published: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source = Path("torchvision:IMAGENET1K_V1")
    with raises(UsageError, "weights-missing") as missing:
        read_initial(source, NAME)
    file = Path(str(missing.value).split()[-1])
    assert file.name.startswith("shufflenetv2_x0.5-")
    file.parent.mkdir(parents=True)
    torch.save(published, file)
    assert find_initial(source, NAME) == find_initial(source, "shufflenet_v2_x0_5") == file
    with raises(UsageError, "weights-unreadable"):  # its name says another digest
        read_initial(source, NAME)
    for name, weights in ((NAME, "torchvision:IMAGENET1K_V9"), ("vgg9", str(source))):
        with raises(UsageError, "weights-missing"):
            find_initial(Path(weights), name)
