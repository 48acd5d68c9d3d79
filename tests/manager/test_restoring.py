"""Restoring straight into live tensors: the same bits as by `load_state_dict`, and never a damaged one."""

from __future__ import annotations

import copy
import ctypes
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from resumable_trainer import (
    DamagedSnapshotError,
    NoValidSnapshotError,
    Run,
    SnapshotWriteError,
    StateManager,
    StateMismatchError,
    UsageError,
)
from resumable_trainer.durable.digest import digest_file
from resumable_trainer.durable.files import Files, NewFile
from resumable_trainer.snapshot import in_place, opened
from resumable_trainer.snapshot.tensors import TensorFile, write_tensors
from resumable_trainer.state import filling
from resumable_trainer.state.compare import differences

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

Parts = dict[str, Any]


class Odd(nn.Module):
    """Tensors of every kind that a module can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.halves = nn.Parameter(torch.randn(3, 4).half())
        self.brain = nn.Parameter(torch.randn(5).bfloat16())
        self.doubles = nn.Parameter(torch.randn(2, 2, dtype=torch.float64))
        self.complex = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.wide = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))
        self.turned = nn.Parameter(torch.randn(6, 5).t())
        self.register_buffer("wide_turned", torch.randn(4, 3, dtype=torch.complex128).t())
        self.register_buffer("number", torch.tensor(7.5))
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("counts", torch.arange(5))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("octets", torch.arange(7, dtype=torch.uint8))
        self.register_buffer("eighth", torch.randn(5).to(torch.float8_e4m3fn))
        self.register_buffer("special", torch.tensor([float("nan"), -0.0, float("inf")]))
        self.register_buffer("not_saved", torch.zeros(2), persistent=False)
        self.register_buffer("none", None)


class Large(nn.Module):
    """Above the size at which tensors are read alone, in pieces, and by two threads."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(3_000_001))
        self.turned = nn.Parameter(torch.randn(700, 600).t())
        self.more = nn.Parameter(torch.randn(2200, 3000))
        self.small = nn.ParameterList(torch.randn(1000) for _ in range(300))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3))


def channels_last() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)


def flat_views() -> nn.Module:
    """Parameters that are pieces of one storage."""
    flat = torch.randn(40)
    module = nn.Module()
    module.a, module.b = nn.Parameter(flat[:24].view(4, 6)), nn.Parameter(flat[24:])
    return module


def some(optimizer: Callable[..., torch.optim.Optimizer], **settings: Any) -> Callable[[], Parts]:
    def make() -> Parts:
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        return {"model": model, "optimizer": optimizer(model.parameters(), lr=0.01, **settings)}

    return make


def alone(module: Callable[[], nn.Module]) -> Callable[[], Parts]:
    return lambda: {"model": module()}


def with_channels_last() -> Parts:
    model = channels_last()
    return {"model": model, "optimizer": torch.optim.Adam(model.parameters())}


def with_groups() -> Parts:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    groups = [{"params": list(model[0].parameters()), "lr": 0.1}, {"params": list(model[1].parameters())}]
    return {"model": model, "optimizer": torch.optim.AdamW(groups, betas=(0.5, 0.6), amsgrad=True)}


def brain() -> Parts:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).bfloat16()
    return {"model": model, "optimizer": torch.optim.Adam(model.parameters())}


def with_tensor_lr() -> Parts:
    model = nn.Linear(3, 4)
    return {"model": model, "optimizer": torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01))}


def averaged() -> Parts:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    return {"average": average, "scheduler": scheduler, "model": model, "optimizer": optimizer}


KINDS: dict[str, Callable[[], Parts]] = {
    "odd": alone(Odd),
    "large": alone(Large),
    "tied": alone(Tied),
    "channels last": with_channels_last,
    "views of one storage": alone(flat_views),
    "groups": with_groups,
    "bfloat16": brain,
    "averaged": averaged,
    "transformer": alone(lambda: nn.TransformerEncoderLayer(8, 2, 16)),
    "recurrent": alone(lambda: nn.LSTM(3, 4, 2)),
    "parametrized": alone(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))),
    "SGD": some(torch.optim.SGD),
    "momentum": some(torch.optim.SGD, momentum=0.9, nesterov=True),
    "Adam": some(torch.optim.Adam),
    "Adam, fused": some(torch.optim.Adam, fused=True),
    "NAdam": some(torch.optim.NAdam),
    "Adafactor": some(torch.optim.Adafactor),
    "amsgrad": some(torch.optim.AdamW, amsgrad=True, maximize=True),
    "RMSprop": some(torch.optim.RMSprop, momentum=0.5, centered=True),
    "Adagrad": some(torch.optim.Adagrad),
    "Adadelta": some(torch.optim.Adadelta),
    "Adamax": some(torch.optim.Adamax),
    "RAdam": some(torch.optim.RAdam),
    "ASGD": some(torch.optim.ASGD),
    "Rprop": some(torch.optim.Rprop),
    "LBFGS": some(torch.optim.LBFGS),
    "lr is a tensor": with_tensor_lr,
}
BY_LOAD_STATE_DICT = {("LBFGS", "optimizer"), ("averaged", "scheduler"), ("lr is a tensor", "optimizer")}


def trained(make: Callable[[], Parts], seed: int, *, steps: int = 2) -> Parts:
    """The parts of a kind, with values that only this seed gives."""
    torch.manual_seed(seed)
    parts = make()
    for part in parts.values():
        if isinstance(part, nn.Module):
            with torch.no_grad():
                for tensor in part.state_dict().values():
                    if tensor.dtype not in (torch.float8_e4m3fn, torch.bool):
                        tensor.add_(seed)
    for optimizer in [part for part in parts.values() if isinstance(part, torch.optim.Optimizer)]:
        for _ in range(steps):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.randn_like(parameter)
            optimizer.step(lambda: torch.tensor(1.0)) if isinstance(optimizer, torch.optim.LBFGS) else optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["weight_decay"] = seed / 16
    return parts


def state_of(parts: Parts) -> dict[str, Any]:
    return {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}


def strides_of(tree: object) -> Any:
    """How every tensor lies in memory, and of which class it is."""
    if isinstance(tree, torch.Tensor):
        return tree.stride(), type(tree), tree.device, tree.requires_grad
    if isinstance(tree, dict):
        return {key: strides_of(value) for key, value in tree.items()}
    return [strides_of(value) for value in tree] if isinstance(tree, list | tuple) else type(tree)


def save(directory: Path, *states: Parts) -> None:
    for number, parts in enumerate(states, start=1):
        with StateManager(directory, state=parts) as manager:
            manager.snapshot(epoch=0, batch=number, step=number, background=False)


def restore(directory: Path, parts: Parts) -> tuple[str | None, tuple[str, ...]]:
    with StateManager(directory, state=parts) as manager:
        report = manager.restore()
    return report.snapshot, report.notes


def by_load_state_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "plan", lambda section, part, outline: None)


@pytest.mark.parametrize("how", ["fresh", "trained"])
@pytest.mark.parametrize("kind", KINDS)
def test_filling_gives_the_bits_that_load_state_dict_gives(
    kind: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = KINDS[kind]
    source = trained(make, 1)
    save(tmp_path / "run", trained(make, 2), source)
    expected = state_of(source)
    filled: list[str] = []
    fill = opened.OpenSnapshot.fill
    with monkeypatch.context() as patch:
        patch.setattr(
            opened.OpenSnapshot, "fill", lambda self, name, targets: (filled.append(name), fill(self, name, targets))
        )
        quick = trained(make, 3, steps=0 if how == "fresh" else 3)
        found, notes = restore(tmp_path / "run", quick)
    assert found == "step-000000002"
    assert notes == ()
    assert set(filled) == {name for name in source if (kind, name) not in BY_LOAD_STATE_DICT}
    assert differences(expected, state_of(quick), place="state") == []

    by_load_state_dict(monkeypatch)
    classic = trained(make, 3, steps=0 if how == "fresh" else 3)
    assert restore(tmp_path / "run", classic) == (found, notes)
    assert differences(state_of(classic), state_of(quick), place="state") == []
    assert strides_of(state_of(quick)) == strides_of(state_of(classic))
    assert len(filled) == len(set(filled)), "and load_state_dict has filled nothing"


@pytest.mark.parametrize("kind", ["Adam", "odd", "channels last", "large", "averaged"])
def test_what_is_restored_lies_where_it_lay_before(kind: str, tmp_path: Path) -> None:
    save(tmp_path / "run", trained(KINDS[kind], 1), trained(KINDS[kind], 2))
    parts = trained(KINDS[kind], 3)

    def places() -> list[int]:
        models = [t.data_ptr() for p in parts.values() if isinstance(p, nn.Module) for t in p.state_dict().values()]
        states = [s for p in parts.values() if isinstance(p, torch.optim.Optimizer) for s in p.state.values()]
        return models + [t.data_ptr() for s in states for t in s.values() if isinstance(t, torch.Tensor)]

    before = places()
    restore(tmp_path / "run", parts)
    assert places() == before


def test_moments_of_another_dtype_than_their_parameter_come_back_as_they_were(tmp_path: Path) -> None:
    source = trained(KINDS["bfloat16"], 1)
    for state in source["optimizer"].state.values():
        state["exp_avg"] = torch.randn(state["exp_avg"].shape)
    save(tmp_path / "run", source)
    for steps in (0, 2):
        parts = trained(KINDS["bfloat16"], 2, steps=steps)
        assert restore(tmp_path / "run", parts)[1] == ()
        assert differences(state_of(source), state_of(parts), place="state") == []
        assert {state["exp_avg"].dtype for state in parts["optimizer"].state.values()} == {torch.float32}


# -- what is not filled -----------------------------------------------------------------------------


class Doubling(nn.Linear):
    """Saves another form than it holds."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {key: 2 * value for key, value in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict({key: value / 2 for key, value in state_dict.items()}, *args, **kwargs)


class WithExtra(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.extra = 0

    def get_extra_state(self) -> int:
        return self.extra

    def set_extra_state(self, state: int) -> None:
        self.extra = state


class OwnLoader(nn.Linear):
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.loaded = True
        super()._load_from_state_dict(state_dict, prefix, *args)


class Meaning(nn.Parameter):
    """A tensor that is more than its bytes."""


def hooked(register: Callable[[nn.Module], object]) -> nn.Module:
    module = nn.Linear(2, 2)
    register(module)
    return module


def shadowed() -> nn.Module:
    module = nn.Linear(2, 2)
    module.load_state_dict = lambda state: None  # type: ignore[method-assign, assignment, misc]
    return module


def expanded() -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(1).expand(4))
    return module


def gapped() -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(4, 4)[:, :2])
    return module


NOT_FILLED: dict[str, Callable[[], nn.Module]] = {
    "state_dict overridden": lambda: Doubling(2, 2),
    "in a child": lambda: nn.Sequential(Doubling(2, 2)),
    "extra state": WithExtra,
    "loader overridden": lambda: OwnLoader(2, 2),
    "method of the instance": shadowed,
    "saving hook": lambda: hooked(lambda m: m.register_state_dict_post_hook(lambda *_: None)),
    "hook before saving": lambda: hooked(lambda m: m.register_state_dict_pre_hook(lambda *_: None)),
    "hook before loading": lambda: hooked(lambda m: m.register_load_state_dict_pre_hook(lambda *_: None)),
    "hook after loading": lambda: hooked(lambda m: m.register_load_state_dict_post_hook(lambda *_: None)),
    "lazy": lambda: nn.LazyLinear(2),
    "weight_norm of old": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(2, 2))),
    "expanded": expanded,
    "with gaps": gapped,
    "no data": lambda: nn.Linear(2, 2, device="meta"),
}


@pytest.mark.parametrize("kind", NOT_FILLED)
def test_a_module_with_a_way_of_its_own_is_restored_in_that_way(kind: str) -> None:
    module = NOT_FILLED[kind]()
    outline = {
        key: filling.Stored("m", key, tuple(value.shape), value.dtype)
        for key, value in nn.Module.state_dict(module).items()
        if isinstance(value, torch.Tensor) and kind != "lazy"
    }
    assert filling.plan("m", module, outline) is None


def test_a_plain_module_is_filled_with_the_same_outline() -> None:
    module = nn.Linear(2, 2)
    outline = {k: filling.Stored("m", k, tuple(v.shape), v.dtype) for k, v in module.state_dict().items()}
    plan = filling.plan("m", module, outline)
    assert plan is not None
    assert plan.targets["weight"].data_ptr() == module.weight.data_ptr()
    assert filling.plan("m", module, {**outline, "more": outline["bias"]}) is None
    assert filling.plan("m", module, [outline]) is None
    assert filling.plan("m", module, {**outline, "bias": 3}) is None
    assert filling.plan("other", module, outline) is None, "a tensor that lies in another section's file"
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        assert filling.plan("m", module, outline) is None
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("kind", ["subclass", "inference", "conjugate"])
def test_a_tensor_whose_bytes_are_not_its_values_is_not_filled(kind: str) -> None:
    module = nn.Module()
    if kind == "subclass":
        module.weight = Meaning(torch.zeros(2))
    elif kind == "inference":
        with torch.inference_mode():
            module.register_buffer("weight", torch.zeros(2))
    else:
        module.register_buffer("weight", torch.zeros(2, dtype=torch.complex64).conj())
    outline = {"weight": filling.Stored("m", "weight", (2,), module.weight.dtype)}
    assert filling.plan("m", module, outline) is None


class Remembering(torch.optim.SGD):
    loaded = 0

    def load_state_dict(self, state_dict: Any) -> None:
        self.loaded += 1
        super().load_state_dict(state_dict)


class Unpacking(torch.optim.SGD):
    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.unpacked = len(self.state)


@pytest.mark.parametrize("kind", [Remembering, Unpacking, "before", "after", "state"])
def test_an_optimizer_with_a_way_of_its_own_is_restored_in_that_way(kind: Any, tmp_path: Path) -> None:
    def make() -> Parts:
        model = nn.Linear(2, 2)
        optimizer = (torch.optim.SGD if isinstance(kind, str) else kind)(model.parameters(), lr=0.1, momentum=0.9)
        seen: list[int] = []
        if kind == "before":
            optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(len(state["state"])))
        if kind == "after":
            optimizer.register_load_state_dict_post_hook(lambda each: seen.append(len(each.state)))
        if kind == "state":
            optimizer.register_state_dict_post_hook(lambda _, state: seen.append(len(state["state"])))
        optimizer.seen = seen
        return {"model": model, "optimizer": optimizer}

    source = trained(make, 1)
    save(tmp_path / "run", source)
    parts = trained(make, 2, steps=0)
    restore(tmp_path / "run", parts)
    assert differences(state_of(source), state_of(parts), place="state") == []
    optimizer = parts["optimizer"]
    if kind is Remembering:
        assert optimizer.loaded == 1
    elif kind is Unpacking:
        assert optimizer.unpacked == 2
    else:
        assert optimizer.seen[0] == 2, "hooks have seen the whole state"


class Holder:
    """Keeps what it is given."""

    def __init__(self, **values: Any) -> None:
        self.values: dict[str, Any] = values

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state


def test_a_tensor_that_an_optimizer_and_another_part_share_is_one_again(tmp_path: Path) -> None:
    def make() -> Parts:
        return {**some(torch.optim.SGD, momentum=0.9)(), "holder": Holder()}

    def shared(parts: Parts) -> torch.Tensor:
        return next(iter(parts["optimizer"].state.values()))["momentum_buffer"]

    for order in (1, -1):
        source = dict(list(trained(make, 1).items())[::order])
        source["holder"].values = {"momentum": shared(source)}
        save(tmp_path / str(order), source)
        parts = dict(list(trained(make, 2).items())[::order])
        restore(tmp_path / str(order), parts)
        assert torch.equal(shared(parts), shared(source))
        assert parts["holder"].values["momentum"] is shared(parts)


def test_what_was_saved_as_one_tensor_goes_into_both_that_the_script_has_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untied() -> Parts:
        model = Tied()
        model.head.weight = nn.Parameter(torch.zeros(5, 3))
        return {"model": model}

    save(tmp_path / "tied", trained(KINDS["tied"], 1))
    save(tmp_path / "untied", trained(untied, 1))
    found = []
    for classic in (False, True):
        if classic:
            by_load_state_dict(monkeypatch)
        apart, together = untied(), trained(KINDS["tied"], 2)
        found.append((restore(tmp_path / "tied", apart), restore(tmp_path / "untied", together)))
        found[-1] += (apart["model"].state_dict(), together["model"].state_dict())
        assert apart["model"].head.weight is not apart["model"].embedding.weight
        assert torch.equal(apart["model"].head.weight, apart["model"].embedding.weight)
    assert differences(found[1], found[0], place="found") == []
    assert "does not give back" in found[0][1][1][0], "two values have gone into one tensor"


def test_two_parts_with_the_same_memory_come_back_as_they_were(tmp_path: Path) -> None:
    def make() -> Parts:
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        return {"head": model[1], "model": model, "both": nn.ModuleList([model[0], model[0]])}

    source = trained(make, 1)
    save(tmp_path / "run", source)
    parts = trained(make, 2)
    assert restore(tmp_path / "run", parts)[1] == ()
    assert differences(state_of(source), state_of(parts), place="state") == []


@pytest.mark.parametrize("names", [["model", "optimizer"], ["optimizer"]])
def test_a_state_that_is_its_parameter_s_own_memory_is_not_filled(names: list[str], tmp_path: Path) -> None:
    source, parts = ({name: trained(KINDS["momentum"], seed)[name] for name in names} for seed in (1, 2))
    save(tmp_path / "run", source)
    live = [parameter for group in parts["optimizer"].param_groups for parameter in group["params"]]
    for parameter in live:
        parts["optimizer"].state[parameter]["momentum_buffer"] = parameter.detach()
    before = copy.deepcopy(live)
    assert restore(tmp_path / "run", parts)[1] == ()
    assert differences(state_of(source), state_of(parts), place="state") == []
    assert "model" in names or differences(before, live, place="parameters") == []


def test_autograd_knows_that_a_filled_tensor_has_changed(tmp_path: Path) -> None:
    parts = trained(alone(lambda: nn.Linear(300, 300)), 1)
    save(tmp_path / "run", parts)
    loss = parts["model"](torch.ones(1, 300, requires_grad=True)).sum()
    restore(tmp_path / "run", parts)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- damage -----------------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def damage(run: Path, snapshot: str, name: str, place: int = -1) -> None:
    flip(run / "snapshots" / snapshot / name, place)


@pytest.mark.parametrize("place", [-1, -5_000_000, 30])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "holder.safetensors", "state.json"])
def test_a_flipped_bit_is_found_and_the_older_snapshot_restored_exactly(name: str, place: int, tmp_path: Path) -> None:
    def make() -> Parts:
        model = Large()
        return {
            "model": model,
            "holder": Holder(values=torch.randn(3_000_000)),
            "optimizer": torch.optim.SGD([model.more], lr=0.1, momentum=0.9),
        }

    older, newer = trained(make, 1), trained(make, 2)
    save(tmp_path / "run", older, newer)
    damage(tmp_path / "run", "step-000000002", name, place if name != "state.json" else -abs(place) % 100 - 100)
    parts = trained(make, 3)
    with StateManager(tmp_path / "run", state=parts) as manager:
        report = manager.restore()
        assert report.snapshot == "step-000000001"
        assert list(report.quarantined) == ["step-000000002"]
        assert manager.store.names() == ["step-000000001"]
        assert differences(state_of(older), state_of(parts), place="state") == []
        manager.snapshot(epoch=0, batch=2, step=2, background=False)
    assert (tmp_path / "run" / "quarantine" / "step-000000002").is_dir()


def test_damage_that_looks_like_another_shape_is_taken_for_damage(tmp_path: Path) -> None:
    save(tmp_path / "run", trained(KINDS["Adam"], 1), trained(KINDS["Adam"], 2))
    path = tmp_path / "run" / "snapshots" / "step-000000002" / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"shape":[4,3]', b'"shape":[3,4]'))
    parts = trained(KINDS["Adam"], 3)
    assert restore(tmp_path / "run", parts) == ("step-000000001", ())
    assert differences(state_of(trained(KINDS["Adam"], 1)), state_of(parts), place="state") == []


def test_a_run_falls_back_too_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def train(epochs: int) -> Any:
        parts = trained(KINDS["Adam"], 1, steps=0)
        with Run(tmp_path / "run", state=parts, progress=None) as run:
            for _ in run.epochs(epochs):
                for row in run.batches([torch.full((1, 3), float(n)) for n in range(4)]):
                    parts["model"](row).sum().backward()
                    parts["optimizer"].step()
                    parts["optimizer"].zero_grad()
        return run.resumed_from, state_of(parts)

    train(3)
    shutil.copytree(tmp_path / "run", tmp_path / "sound")
    newest = sorted((tmp_path / "run" / "snapshots").iterdir())[-1]
    flip(newest / "optimizer.safetensors", -3)
    capsys.readouterr()
    resumed_from, state = train(5)
    said = capsys.readouterr()
    assert resumed_from == "step-000000008-epoch-000002"
    assert newest.name in said.out + said.err
    (tmp_path / "run").rename(tmp_path / "damaged")
    (tmp_path / "sound").rename(tmp_path / "run")
    assert train(5)[0] == newest.name
    assert differences(train(5)[1], state, place="state") == []


def test_a_single_damaged_snapshot_is_refused_and_nothing_touched(tmp_path: Path) -> None:
    save(tmp_path / "run", trained(KINDS["Adam"], 1))
    damage(tmp_path / "run", "step-000000001", "model.safetensors")
    parts = trained(KINDS["Adam"], 2)
    before = state_of(parts)
    with StateManager(tmp_path / "run", state=parts) as manager:
        with pytest.raises(NoValidSnapshotError):
            manager.restore()
        assert differences(before, state_of(parts), place="state") == []
        manager.snapshot(epoch=0, batch=2, step=2, background=False)


def test_a_damaged_one_that_was_asked_for_is_refused_and_nothing_touched(tmp_path: Path) -> None:
    save(tmp_path / "run", trained(KINDS["Adam"], 1), trained(KINDS["Adam"], 2))
    damage(tmp_path / "run", "step-000000002", "model.safetensors")
    parts = trained(KINDS["Adam"], 3)
    before = state_of(parts)
    with StateManager(tmp_path / "run", state=parts) as manager, pytest.raises(DamagedSnapshotError):
        manager.restore("2")
    assert differences(before, state_of(parts), place="state") == []


def test_what_is_left_when_all_are_damaged_is_not_saved(tmp_path: Path) -> None:
    save(tmp_path / "run", trained(KINDS["Adam"], 1), trained(KINDS["Adam"], 2))
    sound = tmp_path / "run" / "snapshots" / "step-000000001" / "optimizer.safetensors"
    data = sound.read_bytes()
    for snapshot in ("step-000000001", "step-000000002"):
        damage(tmp_path / "run", snapshot, "optimizer.safetensors")
    parts = trained(KINDS["Adam"], 3)
    with StateManager(tmp_path / "run", state=parts) as manager:
        with pytest.raises(NoValidSnapshotError):
            manager.restore()
        assert manager.store.names() == ["step-000000001", "step-000000002"], "nothing is moved away"
        with pytest.raises(UsageError, match="hold no state of the training"):
            manager.snapshot(epoch=0, batch=3, step=3)
        sound.write_bytes(data)
        assert manager.restore().snapshot == "step-000000001"
        manager.snapshot(epoch=0, batch=3, step=3, background=False)
    assert differences(state_of(trained(KINDS["Adam"], 1)), state_of(parts), place="state") == []


def test_a_disk_that_fails_while_it_is_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "run", trained(KINDS["Adam"], 1), trained(KINDS["Adam"], 2))

    read_at = TensorFile.read_at

    def fails(self: TensorFile, view: memoryview, offset: int) -> None:
        if self._path.name != "model.safetensors":
            return read_at(self, view, offset)
        raise OSError(5, "Input/output error")

    with StateManager(tmp_path / "run", state=trained(KINDS["Adam"], 3)) as manager:
        monkeypatch.setattr(TensorFile, "read_at", fails)
        with pytest.raises(SnapshotWriteError, match="Input/output error"):
            manager.restore()
        assert len(manager.store.names()) == 2


@pytest.mark.parametrize("kind", ["shape", "dtype", "missing", "unexpected", "groups"])
def test_what_does_not_fit_touches_nothing(kind: str, tmp_path: Path) -> None:
    save(tmp_path / "run", trained(KINDS["Adam"], 1), trained(KINDS["Adam"], 2))

    def make() -> Parts:
        width = 5 if kind == "shape" else 4
        layers = [nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1)]
        if kind == "unexpected":
            layers.pop()
        if kind == "missing":
            layers.append(nn.Linear(1, 1))
        model = nn.Sequential(*layers)
        if kind == "dtype":
            model.double()
        groups = [{"params": [each]} for each in model.parameters()] if kind == "groups" else model.parameters()
        # The optimizer comes first: it would be filled before the model is looked at.
        return {"optimizer": torch.optim.Adam(groups), "model": model}

    parts = trained(make, 3)
    before = state_of(parts)
    with StateManager(tmp_path / "run", state=parts) as manager, pytest.raises(StateMismatchError):
        manager.restore()
    assert differences(before, state_of(parts), place="state") == []


# -- reading in place -------------------------------------------------------------------------------


def test_every_byte_of_a_file_is_hashed_and_goes_where_it_belongs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_place, "_CHUNK_BYTES", 4096)
    monkeypatch.setattr(in_place, "_SMALL_BYTES", 600)
    monkeypatch.setattr(in_place, "_GATHER_BYTES", 2000)
    torch.manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]
    tensors = {
        f"t{n}": (torch.rand(n * 7 % 23 * (50 if n % 5 == 0 else 3)) * 100).to(dtypes[n // 3 % 5]) for n in range(200)
    }
    tensors["turned"] = torch.rand(40, 30)
    with NewFile(tmp_path / "f.safetensors", files=Files()) as file:
        write_tensors(file, tensors)
    for threads in (1, 2):
        monkeypatch.setattr(in_place, "_ALONE_BYTES", 0 if threads == 2 else 1 << 40)
        targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        targets["turned"] = torch.zeros(30, 40).t()
        with TensorFile(tmp_path / "f.safetensors") as opened_file:
            assert in_place.fill(opened_file, targets) == digest_file(tmp_path / "f.safetensors")
        assert differences(tensors, targets, place="targets") == []


def test_accelerators_are_at_rest_before_anything_is_read_into_their_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with NewFile(tmp_path / "f.safetensors", files=Files()) as file:
        write_tensors(file, {"t": torch.rand(10)})
    order: list[object] = []
    read = in_place._Line.work
    monkeypatch.setattr(torch.accelerator, "synchronize", order.append)
    monkeypatch.setattr(in_place._Line, "work", lambda line: (order.append("read"), read(line)))
    rest, gpu = in_place._rest, torch.device("cuda:1")
    monkeypatch.setattr(in_place, "_rest", lambda devices: rest([*devices, gpu]))
    with TensorFile(tmp_path / "f.safetensors") as opened_file:
        in_place.fill(opened_file, {"t": torch.zeros(10)})
    assert order == [gpu, "read"]


def test_what_goes_wrong_in_the_second_thread_is_raised_by_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_place, "_ALONE_BYTES", 0)
    monkeypatch.setattr(in_place, "_CHUNK_BYTES", 4096)
    with NewFile(tmp_path / "f.safetensors", files=Files()) as file:
        write_tensors(file, {"t": torch.rand(1_000_000)})
    with (tmp_path / "f.safetensors").open("r+b") as raw, TensorFile(tmp_path / "f.safetensors") as opened_file:
        raw.truncate(2_000_000)
        with pytest.raises(DamagedSnapshotError, match="ends too early"):
            in_place.fill(opened_file, {"t": torch.zeros(1_000_000)})


def test_restoring_needs_no_second_copy_of_the_state(tmp_path: Path) -> None:
    from benchmarks.snapshots import peak_of

    def make() -> Parts:
        model = nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(10)))
        return {"model": model, "optimizer": torch.optim.Adam(model.parameters())}

    source, parts = trained(make, 1), trained(make, 2)
    with StateManager(tmp_path / "run", state=source) as manager:
        manager.snapshot(epoch=0, batch=1, step=1, background=False)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    with StateManager(tmp_path / "run", state=parts) as manager:
        if trim is not None:
            trim(0)  # what was freed before must not serve as the second copy
        resident = peak_of(lambda: None)
        peak = peak_of(manager.restore)
    if trim is None or peak is None or resident is None:
        pytest.skip("this system has no peak of memory that can be reset")
    assert peak - resident < 120_000_000 // 4
    assert differences(state_of(source), state_of(parts), place="state") == []
