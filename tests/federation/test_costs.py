import dataclasses
import io
import json
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel
from trl import SFTTrainer

from fedbiot_trainer import (
    ClientSFTTrainer,
    ClientUpdate,
    EmulatorAlignmentTrainer,
    FedBiOTConfig,
    RoundStart,
)
from fedbiot_trainer.cli.plan import main, plan_tables
from fedbiot_trainer.federation.costs import plan
from fedbiot_trainer.server.plug_in import PlugInTrainer
from fedbiot_trainer.server.split_model import SplitModel
from fedbiot_trainer.shared.lora_state import get_lora_state
from fedbiot_trainer.wire.messages import LocalWork


MODELS = {
    "llama": {},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "dtype": torch.bfloat16},
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "sliding_window": 6},  # with eager attention
    "gpt2": {"model_type": "gpt2", "attn_implementation": "eager"},
}
LENGTH, EXAMPLES = 32, 8
SETTINGS = {
    "num_adapter_layers": 1,
    "max_length": LENGTH,
    "per_device_train_batch_size": 2,
    "local_steps": 1,
    "initial_alignment_steps": 1,
    "alignment_steps": 3,
    "alignment_batch_size": 4,
    "num_rounds": 2,
}
# What torch does not count: products that only a CPU takes, and the experts of a mixture.
ATEN = torch.ops.aten
UNCOUNTED = {
    ATEN.addmm_: lambda c, a, b, **kwargs: 2 * a[0] * a[1] * b[1],
    ATEN._grouped_mm: lambda a, b, *args, **kwargs: 2 * a[0] * a[1] * b[-1],
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: 4 * q.numel() * k[2],
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, q, k, *args, **kwargs: 10 * q.numel() * k[2],
}


def lora():
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def flops_of(run):
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        run()
    return counter.get_total_flops()


def num_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.fixture
def args(make_args, tmp_path):
    return lambda **changes: make_args(**{**SETTINGS, "teacher_cache_dir": str(tmp_path / "teacher"), **changes})


@pytest.fixture
def texts():
    """Texts that fill `max_length`."""
    return Dataset.from_dict({"input_ids": [list(range(3, 3 + LENGTH))] * EXAMPLES})


@pytest.fixture
def make_client(args, texts, tokenizer):
    def make(model, **changes):
        models = SplitModel.from_config(model, args(**changes), lora())
        return ClientSFTTrainer(models.adap_emu, args(**changes), texts, processing_class=tokenizer)

    return make


@pytest.fixture
def make_baseline(args, texts, tokenizer):
    def make(model, peft_config):
        settings = args().client_arguments()
        return SFTTrainer(model, settings, train_dataset=texts, processing_class=tokenizer, peft_config=peft_config)

    return make


@pytest.fixture
def make_alignment(args, texts, tokenizer):
    def make(model, **changes):
        return EmulatorAlignmentTrainer(model, args(**changes), texts, peft_config=lora(), processing_class=tokenizer)

    return make


@cache
def planned(name):
    """What makes a model, and its plan."""

    def build():
        return tiny_model(num_hidden_layers=4, **MODELS[name])

    costs = plan(build(), FedBiOTConfig(use_cpu=True, **SETTINGS), lora(), public_examples=EXAMPLES)
    return SimpleNamespace(build=build, **costs)


def small(**changes):
    """A model of three layers."""
    return tiny_model(num_hidden_layers=3, **changes)


# ---- against the real thing


@pytest.mark.parametrize("name", MODELS)
def test_parameters(args, name):
    case = planned(name)
    models = SplitModel.from_config(case.build(), args(), lora())
    counts = models.count_parameters()
    assert case.parameters == dataclasses.asdict(counts) | {"client_share": counts.client_share}
    held = sum(parameter.numel() for parameter in models.adap_emu.parameters())
    assert case.clients["fedbiot"]["parameters"] == held
    assert case.clients["fedbiot"]["trainable_parameters"] == case.parameters["trainable_client"]


def check_step(trainer, costs):
    """A training step: its FLOPs, what it keeps for its backward pass besides the weights, and what AdamW holds."""
    kept, compute_loss = [], trainer.compute_loss

    def watched(*args, **kwargs):
        with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
            return compute_loss(*args, **kwargs)

    trainer.compute_loss = watched
    assert flops_of(trainer.train) == costs["flops_per_step"]
    own = {tensor.untyped_storage().data_ptr() for tensor in (*trainer.model.parameters(), *trainer.model.buffers())}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    activation_memory = sum(size for address, size in storages.items() if address not in own)
    assert activation_memory == pytest.approx(costs["activation_memory"], rel=0.02)

    parameters = list(trainer.model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in parameters) == costs["parameters"]
    assert sum(parameter.numel() for parameter in trained) == costs["trainable_parameters"]
    assert num_bytes(parameters) == costs["weight_memory"]
    moments = [state[name] for state in trainer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert num_bytes([*moments, *trained]) == costs["optimizer_memory"]


@pytest.mark.parametrize("name", MODELS)
def test_local_step(make_client, name):
    case = planned(name)
    check_step(make_client(case.build()), case.clients["fedbiot"])


def test_local_step_of_full_model_lora(make_baseline):
    check_step(make_baseline(planned("qwen2").build(), lora()), planned("qwen2").clients["full_lora"])


def test_local_step_of_full_finetuning(make_baseline):
    check_step(make_baseline(planned("qwen2").build(), None), planned("qwen2").clients["full_finetuning"])


@pytest.mark.parametrize("name, teacher", [("qwen2", "cached"), ("gemma2", "online")])
def test_alignment_step(make_alignment, tmp_path, name, teacher):
    trainer, costs = make_alignment(planned(name).build(), teacher=teacher), planned(name).server[teacher]
    assert flops_of(trainer.prepare_teacher) == costs["flops_to_store"]
    assert flops_of(trainer.train) == pytest.approx(
        costs["flops_per_step"], rel=0.01
    )  # and the client LoRA is folded once
    on_disk = sum(file.stat().st_size for file in (tmp_path / "teacher").rglob("*.safetensors"))
    assert on_disk == pytest.approx(costs["store_bytes"], rel=0.02)


def test_closed_form_of_the_start(args, make_alignment):
    costs = plan(small(), args(alignment_init="closed_form"), lora(), public_examples=EXAMPLES)
    trainer = make_alignment(small(), alignment_init="closed_form")
    trainer.prepare_teacher()
    assert flops_of(trainer.initialize) == pytest.approx(costs["server"]["cached"]["flops_to_start"], rel=0.01)


@pytest.mark.parametrize(
    "settings, targets, computed",
    [
        ({}, "all-linear", True),
        ({}, ["up_proj"], True),
        ({"emulator_drop_ratio": 0.0}, "all-linear", False),
        ({"initial_alignment_steps": 0}, "all-linear", False),
        ({"alignment_init": "zero"}, "all-linear", False),
        ({"alignment_init": "closed_form", "initial_alignment_steps": 0}, ["up_proj"], True),
    ],
    ids=str,
)
def test_where_the_start_is_computed(args, settings, targets, computed):
    settings = args(**{"alignment_init": "auto", **settings})
    costs = plan(small(), settings, LoraConfig(target_modules=targets), public_examples=EXAMPLES)
    assert (costs["server"]["cached"]["flops_to_start"] > 0) == computed


@pytest.mark.parametrize(
    "places", [{}, {"num_adapter_layers": 1, "num_adapter_layers_bottom": 1}], ids=["top", "both ends"]
)
def test_steps_of_the_plug_in(args, texts, tokenizer, make_alignment, places):
    model, steps = tiny_model(num_hidden_layers=4), {"plug_in_steps": 2, **places}
    settings = args(**steps)
    costs = plan(model, settings, lora(), public_examples=EXAMPLES)["server"]["online"]
    trainer = PlugInTrainer(make_alignment(model, teacher="online", **steps), settings, texts, tokenizer)
    assert flops_of(lambda: trainer.take_steps(2)) == pytest.approx(costs["flops_to_plug_in"], rel=0.02)
    without = plan(model, args(**places), lora(), public_examples=EXAMPLES)["server"]["online"]
    assert without["flops_to_plug_in"] == 0
    assert costs["flops_of_run"] - without["flops_of_run"] == costs["flops_to_plug_in"] > 0


def test_settings_of_the_steps(args, make_client, make_alignment):
    changes = {"gradient_accumulation_steps": 2, "proximal_weight": 0.0, "alignment_kl_weight": 0.0}
    costs = plan(small(), args(**changes), lora())
    assert flops_of(make_client(small(), **changes).train) == costs["clients"]["fedbiot"]["flops_per_step"]
    trainer = make_alignment(small(), **changes)
    trainer.prepare_teacher()
    assert flops_of(trainer.train) == pytest.approx(
        costs["server"]["cached"]["flops_per_step"], rel=0.01
    )  # and the client LoRA is folded once


def test_mixture_of_experts(args, make_client):
    mixture = {"model_type": "mixtral", "num_local_experts": 4}
    costs = plan(small(**mixture), args(), lora())
    trainer = make_client(small(**mixture))
    assert flops_of(trainer.train) == costs["clients"]["fedbiot"]["flops_per_step"]


@pytest.mark.parametrize(
    "tied, dtype", [(False, torch.float32), (True, torch.bfloat16)], ids=["untied fp32", "tied bf16"]
)
def test_bytes(args, tmp_path, tied, dtype):
    model = small(dtype=dtype, tie_word_embeddings=tied, hidden_size=128, intermediate_size=256)
    settings = args(emulator_lora_r=3, num_clients=10, fraction_train=0.25)
    costs = plan(model, settings, lora())
    client, server = costs["clients"]["fedbiot"], costs["server"]["online"]

    models = SplitModel.from_config(model, settings, lora())
    states = [get_lora_state(models.adap_emu, adapter) for adapter in ("client", "emulator")]
    work = LocalWork(
        settings.local_steps, *[2**20] * 3, settings.proximal_weight, 2**31
    )  # as many digits as a long run has
    down, up = RoundStart(1, work, *states).to_bytes(), ClientUpdate(1, "", 7, {}, states[0]).to_bytes()
    assert (client["bytes_per_round_down"], client["bytes_per_round_up"]) == (len(down), len(up))
    assert (server["bytes_per_round_down"], server["bytes_per_round_up"]) == (3 * len(down), 3 * len(up))

    models.package(*states).save(tmp_path / "package")
    files = list((tmp_path / "package").rglob("*.safetensors"))
    assert len(files) == 3
    assert client["bytes_once"] == pytest.approx(sum(file.stat().st_size for file in files), rel=0.02)
    assert server["bytes_once"] == 10 * client["bytes_once"]
    tensors = [tensor for file in files for tensor in load_file(file).values()]
    assert client["parameters"] == sum(tensor.numel() for tensor in tensors)
    assert client["weight_memory"] == num_bytes(tensors)

    full, trained = num_bytes(model.parameters()), costs["clients"]["full_lora"]["trainable_parameters"]
    baselines = {"full_lora": (full, 4 * trained, 4 * trained), "full_finetuning": (0, full, full)}
    for name, expected in baselines.items():
        assert expected == tuple(
            costs["clients"][name][key] for key in ("bytes_once", "bytes_per_round_down", "bytes_per_round_up")
        )


# ---- what is planned


def test_nothing_is_dropped_and_the_model_left_alone(args):
    model = small()
    before = {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}
    costs = plan(model, args(emulator_drop_ratio=0.0), lora())
    assert before == {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}
    parameters = costs["parameters"]
    loras = parameters["trainable_client"] + parameters["trainable_server"]
    assert costs["clients"]["fedbiot"]["parameters"] == parameters["full"] + loras
    for server in costs["server"].values():
        assert server["flops_per_round"] == server["store_bytes"] == server["flops_to_store"] == 0


def test_rounds():
    case = planned("llama")
    for client in case.clients.values():
        assert client["flops_per_round"] == SETTINGS["local_steps"] * client["flops_per_step"]
        parts = (client["weight_memory"], client["optimizer_memory"], client["activation_memory"])
        assert client["total_memory"] == sum(parts)
    for server in case.server.values():
        assert server["flops_per_round"] == SETTINGS["alignment_steps"] * server["flops_per_step"]
        assert server["flops_per_step"] == server["student_flops"] + server["teacher_flops"]
        num_steps = SETTINGS["initial_alignment_steps"] + SETTINGS["num_rounds"] * SETTINGS["alignment_steps"]
        assert (
            server["flops_of_run"]
            == num_steps * server["flops_per_step"] + server["flops_to_store"] + server["flops_to_start"]
        )


def test_only_texts_that_a_run_sees_are_stored(args):
    settings = args(emulator_drop_ratio=0.9)
    costs = plan(small(), settings, lora(), public_examples=10_000)
    seen = (1 + 2 * 3) * 4
    assert costs["server"]["cached"]["store_bytes"] == seen * LENGTH * 32 * 4


def test_tables():
    case = planned("llama")
    console = Console(width=120, file=io.StringIO())
    for table in plan_tables(vars(case)):
        console.print(table)
    shown = console.file.getvalue()
    assert f"2 + 1 of 4 layers of {case.model['architecture']} in {case.model['dtype']}" in shown
    titles = " ".join(shown.split())  # they wrap
    assert "1 x 2 x 32 tokens a round" in titles
    assert "Server of 3 clients: 1 alignment steps, then 3 a round, x 4 x 32 tokens" in titles
    for name in ("parameters", "trainable_parameters"):
        [row] = [line for line in shown.splitlines() if line.startswith(f" {name.replace('_', ' ')} ")]
        cells = [cell.strip() for cell in row.split("│")[1:]]
        assert cells == [f"{client[name]:,}" for client in case.clients.values()]


@pytest.mark.trains
def test_command_line_with_seven_billion_parameters(tmp_path, capsys):
    LlamaConfig().save_pretrained(tmp_path)
    flags = ["--model", str(tmp_path / "config.json"), "--lora_r", "4", "--alignment_batch_size", "1"]
    main([*flags, "--lora_target_modules", "q_proj", "v_proj", "--json", str(tmp_path / "plan.json")])
    costs = json.loads((tmp_path / "plan.json").read_text())
    assert (costs["model"]["dtype"], costs["settings"]["per_device_train_batch_size"]) == ("bfloat16", 1)
    assert costs["parameters"]["full"] == 6_738_415_616
    assert costs["clients"]["full_lora"]["trainable_parameters"] == 32 * 2 * 4 * (4096 + 4096)
    weights = costs["parameters"]["full"] - 32_000 * 4096  # the embedding is looked up
    assert costs["server"]["online"]["teacher_flops"] == pytest.approx(2 * weights * 1024, rel=0.05)
    shown = capsys.readouterr().out
    assert "6,738,415,616" in shown and "13.5 GB" in shown


@pytest.mark.trains
def test_command_line_is_the_function(tmp_path):
    config = small().config
    config.save_pretrained(tmp_path)
    flags = ["--model", str(tmp_path), "--lora_target_modules", "all-linear", "--num_adapter_layers", "1"]
    main([*flags, "--emulator_lora_r", "2", "--dtype", "float16", "--json", str(tmp_path / "plan.json")])
    settings = FedBiOTConfig(num_adapter_layers=1, emulator_lora_r=2, per_device_train_batch_size=1, use_cpu=True)
    settings.model_init_kwargs = {"dtype": torch.float16}
    costs = plan(config, settings, LoraConfig(r=8, target_modules="all-linear"))
    assert json.loads((tmp_path / "plan.json").read_text()) == json.loads(json.dumps(costs))


# ---- what cannot be planned


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("max_length", None, "`max_length` is None, .* at least 2"),
        ("max_length", 1, "`max_length` is 1, .* at least 2"),
        ("per_device_train_batch_size", 0, "`per_device_train_batch_size` is 0, .* at least 1"),
        ("gradient_accumulation_steps", 0, "`gradient_accumulation_steps` is 0, .* at least 1"),
        ("num_adapter_layers", 8, "`num_adapter_layers` is 8, but .* at most 7"),
        ("model_init_kwargs", {"quantization_config": {"bits": 4}}, "`quantization_config` is set"),
    ],
)
def test_bad_settings(args, name, value, message):
    settings = args()
    setattr(settings, name, value)
    with pytest.raises(ValueError, match=message):
        plan(tiny_model(), settings, lora())


def test_no_public_examples(args):
    with pytest.raises(ValueError, match="`public_examples` is 0, .* at least 1"):
        plan(tiny_model(), args(), lora(), public_examples=0)


def test_model_that_needs_data(args, monkeypatch):
    monkeypatch.setattr(LlamaModel, "forward", lambda self, input_ids, **kwargs: input_ids.sum().item())
    with pytest.raises(ValueError, match="`model` is LlamaForCausalLM, which cannot run without data: .*item"):
        plan(tiny_model(), args(), lora())


@pytest.mark.parametrize(
    "config, flags, message",
    [
        (None, [], "no-such-folder"),
        (LlamaConfig(), ["--emulator_drop_ratio", "1"], "`emulator_drop_ratio` is 1.0, but"),
        (LlamaConfig(), ["--num_adapter_layers", "32"], "`num_adapter_layers` is 32, but .* at most 31"),
        (LlamaConfig(), ["--lora_r", "0"], "`r` should be a positive integer"),
        (LlamaConfig(), ["--lora_target_modules", "query"], r"`target_modules` is \['query'\], which matches no"),
    ],
    ids=["no such model", "drop ratio", "adapter layers", "rank", "targets"],
)
def test_command_line_errors(tmp_path, config, flags, message):
    path = tmp_path / "no-such-folder"
    if config is not None:
        config.save_pretrained(path)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main(["--model", str(path), *flags])
