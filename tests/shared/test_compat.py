"""What the package relies on without a promise: each is still there, and all of it is listed."""

import ast
import functools
import importlib
import inspect
import re
import textwrap
import types
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments

import fedbiot_trainer
from fedbiot_trainer.client.trainer import ClientSFTTrainer
from fedbiot_trainer.server.alignment import EmulatorAlignmentTrainer
from fedbiot_trainer.shared.compat import (
    DIFFERENCES,
    Difference,
    add_fused_lm_head,
    attention_flops,
    children,
    copy_module,
    cpu_has_bf16,
    has_forward_hooks,
    ignore_in_ddp,
    loss_is_scaled,
    set_rates,
    storage_key,
)
from fedbiot_trainer.shared.lora_layers import FusedLoraLinear
from fedbiot_trainer.shared.round_trainer import RoundTrainer
from fedbiot_trainer.shared.upstream import SOURCES, USES


PACKAGE = Path(fedbiot_trainer.__file__).parent
ROOT = PACKAGE.parent
LISTED = {use.name.rpartition(".")[2] for use in USES}
TRAINERS = (RoundTrainer, ClientSFTTrainer, EmulatorAlignmentTrainer)


def resolve(path: str):
    """The module, class or namespace at a dotted path."""
    module, names = path, []
    while True:
        try:
            found = importlib.import_module(module)
        except ImportError:
            module, _, name = module.rpartition(".")
            names.insert(0, name)
            if not module:
                raise
        else:
            return functools.reduce(getattr, names, found)


@functools.cache
def set_somewhere(owner) -> set[str]:
    """Names that the source of a class and its bases, or of a module, gives to attributes of objects."""
    parts = [owner] if isinstance(owner, types.ModuleType) else [c for c in owner.__mro__ if c is not object]
    found = set()
    for part in parts:
        try:
            source = textwrap.dedent(inspect.getsource(part))
        except (OSError, TypeError):  # it is not written in Python
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
                found.add(getattr(node.args[1], "value", None))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
    return found


def is_there(owner, name: str) -> bool:
    return hasattr(owner, name) or name in set_somewhere(owner)


@pytest.mark.parametrize("use", USES, ids=lambda use: f"{use.module}.{use.name}")
def test_what_is_used_exists_upstream(use):
    pytest.importorskip(use.library)
    if use.but is not None and use.but.applies:
        pytest.skip(f"{use.but.library} before {use.but.before}: {use.but.why}")
    owner, _, name = f"{use.module}.{use.name}".rpartition(".")
    owner = resolve(owner)
    assert is_there(owner, name), f"{use.library} has no `{use.name}` any more ({use.why}). It was in {use.link}"
    if use.parameters is not None:
        parameters = tuple(inspect.signature(getattr(owner, name)).parameters)
        assert parameters[parameters[:1] == ("self",) :] == use.parameters, (
            f"`{use.name}` has other parameters: {use.link}"
        )


def test_a_name_that_is_gone_is_noticed():
    owner = resolve("transformers.trainer.Trainer")
    assert is_there(owner, "_get_num_items_in_batch") and is_there(owner, "_created_lr_scheduler")
    assert not is_there(owner, "_get_number_of_items_in_batch") and not is_there(owner, "_made_lr_scheduler")


def test_versions_are_those_that_are_tested():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    assert {library: version for library, (version, _) in SOURCES.items()} == {name: pinned[name] for name in SOURCES}
    assert {use.library for use in USES} <= SOURCES.keys()
    for version, link in SOURCES.values():
        assert version in link


def test_the_test_of_each_use_exists():
    tests = set(
        re.findall(r"def (test_\w+)", "".join(file.read_text() for file in Path(__file__).parents[1].rglob("*.py")))
    )
    assert {entry.test for entry in (*USES, *DIFFERENCES)} <= tests


# ---------------------------------------------------------------------------------------------------------------------


def test_differences_are_of_versions_that_setup_allows():
    ranges = dict(re.findall(r'"(\w+)>=([\d.]+),<\d+"', (ROOT / "setup.py").read_text()))
    oldest = dict(line.split("==") for line in (ROOT / "constraints-oldest.txt").read_text().splitlines())
    for library, least in ranges.items():
        assert oldest[library].startswith(least), library
    for difference in DIFFERENCES:
        assert difference.library in ranges and f"/v{difference.before}" in difference.link
        assert Difference(difference.library, "0", "", "", "").applies is False
        assert Difference(difference.library, "99", "", "", "").applies is True
    # Entries that no version needs any more are to go.
    assert all(
        [int(n) for n in ranges[difference.library].split(".")] < [int(n) for n in difference.before.split(".")]
        for difference in DIFFERENCES
    )


def test_nothing_else_compares_versions():
    imports = {
        file.name
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("packaging")
    }
    assert imports == {"compat.py"}


@pytest.fixture(params=["installed", "older"])
def versions(request, monkeypatch):
    """What is installed, and as if it were older than each difference."""
    if request.param == "older":
        monkeypatch.setattr(Difference, "applies", True)


def test_fused_head_gives_log_probabilities(versions):
    model, ids = tiny_model(), torch.arange(3, 43).view(2, 20)
    expected = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    add_fused_lm_head(model, ("log_probs",))
    torch.testing.assert_close(model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs, expected)


def test_attention_with_grouped_heads_is_counted(versions):
    query = torch.empty(2, 4, 6, 8, device="meta", requires_grad=True)
    key, value = (torch.empty(2, 2, 10, 8, device="meta", requires_grad=True) for _ in range(2))
    with FlopCounterMode(display=False, custom_mapping=attention_flops()) as counter:
        torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)[0].sum().backward()
    products, one = 2 + 5, 2 * (2 * 4) * (6 * 10) * 8  # forward and backward; batch and heads, lengths, size of a head
    assert counter.get_total_flops() == products * one


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the CPU is asked through Linux")
def test_instructions_for_bfloat16_are_found(versions):
    flags = re.search(r"^(?:flags|Features)\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split()
    assert cpu_has_bf16() == any("bf16" in flag for flag in flags)


def test_loss_of_a_trainers_own_is_not_divided_again(versions, tmp_path):
    class Own(Trainer):
        loss_is_scaled_for_ga = True

        def compute_loss(self, model, inputs, *args, **kwargs):
            return model(inputs["x"]).sum()

    args = TrainingArguments(tmp_path, use_cpu=True, report_to="none", gradient_accumulation_steps=4)
    trainer = Own(nn.Linear(2, 1, bias=False), args)
    loss_is_scaled(trainer)
    trainer.current_gradient_accumulation_steps = 4
    trainer.training_step(trainer.model, {"x": torch.ones(1, 2)})
    assert trainer.model.weight.grad.tolist() == [[1.0, 1.0]]


def is_private(name) -> bool:
    return (
        isinstance(name, str)
        and name.isidentifier()
        and name.startswith("_")
        and not name.startswith("__")
        and name != "_"
    )


TREES = {file: ast.parse(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}


def own_names() -> set[str]:
    """Private names that this package gives to its own functions, classes, attributes and globals."""
    found = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                found.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
    return found


def foreign_bases(cls) -> list[type]:
    return [base for base in cls.__mro__ if not base.__module__.startswith("fedbiot_trainer") and base is not object]


def private_uses() -> set[tuple[str, str]]:
    """Each private name of an object that is not ours, with the place where it is used."""
    own, found = own_names(), set()
    theirs = {c.__name__: set_somewhere(foreign_bases(c)[0]) | set(dir(foreign_bases(c)[0])) for c in TRAINERS}
    for file, tree in TREES.items():
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        inside = {id(node): cls.name for cls in classes for node in ast.walk(cls)}
        in_text = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
        for node in ast.walk(tree):
            place = f"{file.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) != "os":
                of_self = ast.unparse(node.value) in ("self", "cls", "super()")
                if node.attr in theirs.get(inside.get(id(node)), ()) if of_self else node.attr not in own:
                    found.add((node.attr, place))
            elif isinstance(node, ast.Constant) and is_private(node.value) and id(node) not in in_text:
                found.add((node.value, place))
            elif isinstance(node, ast.ImportFrom) and not node.level:
                private = [*node.module.split("."), *(alias.name for alias in node.names)]
                found |= {(name, place) for name in private if is_private(name)}
    return found


def test_everything_private_that_is_used_is_listed():
    used = private_uses()
    assert len(used) > 10
    unlisted = sorted((place, name) for name, place in used if name not in LISTED and name != "_hooks")
    assert not unlisted, "these are private to a library: see `fedbiot_trainer/shared/upstream.py`"


@pytest.mark.parametrize("cls", [*TRAINERS, FusedLoraLinear])
def test_every_private_override_is_listed_and_all_have_the_parameters_of_what_they_override(cls):
    overrides = {name: next((b for b in foreign_bases(cls) if name in vars(b)), None) for name in vars(cls)}
    overrides = {
        name: base for name, base in overrides.items() if base and not name.startswith("__") and name != "_abc_impl"
    }
    assert overrides
    for name, base in overrides.items():
        assert not is_private(name) or name in LISTED
        ours, theirs = vars(cls)[name], getattr(base, name)
        if inspect.isfunction(ours):
            ours, theirs = (list(inspect.signature(method).parameters) for method in (ours, theirs))
            assert ours == theirs or {"args", "kwargs"} <= set(ours), f"{cls.__name__}.{name}"


def test_dataset_is_prepared_by_keyword():
    call = next(
        node
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "_prepare_dataset"
    )
    assert not call.args and len(call.keywords) == 6


# ---------------------------------------------------------------------------------------------------------------------


def test_copied_module_has_the_same_tensors_and_hooks_of_its_own():
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    module.register_buffer("kept_out", torch.ones(1), persistent=False)
    module.register_forward_hook(lambda *_: None)
    module.register_module("nothing", None)
    new = copy_module(module)
    assert type(new) is nn.Sequential and not has_forward_hooks(new) and has_forward_hooks(module)
    assert children(new) == children(module) and "nothing" in children(new)
    assert new.state_dict().keys() == module.state_dict().keys()
    assert [p.data_ptr() for p in new.parameters()] == [p.data_ptr() for p in module.parameters()]
    children(new)["2"], new.bias_of_mine = nn.Identity(), nn.Parameter(torch.zeros(1))
    assert "2" not in children(module) and not hasattr(module, "bias_of_mine")


def test_storages_are_told_apart_without_memory():
    tensor, other = torch.empty(4, device="meta"), torch.empty(4, device="meta")
    assert storage_key(tensor) == storage_key(tensor[1:]) != storage_key(other)


def test_rates_are_the_optimizers_and_the_schedulers():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    set_rates(scheduler, [0.25])
    assert scheduler.get_last_lr() == [0.25] and optimizer.param_groups[0]["lr"] == 0.25


def test_ddp_is_told_what_to_leave_out():
    model = nn.Linear(2, 2)
    ignore_in_ddp(model, iter(["weight"]))
    source = inspect.getsource(nn.parallel.DistributedDataParallel.__init__)
    assert "_ddp_params_and_buffers_to_ignore" in source
    assert list(model._ddp_params_and_buffers_to_ignore) == ["weight"]
