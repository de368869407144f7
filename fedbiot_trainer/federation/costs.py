"""What a run will cost, from the model's config alone: its steps run on the meta device, without weights or data."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..client.proximal import proximal_term
from ..config import FedBiOTConfig
from ..server.capture import capture, causal_lm, run_adapter_layers, run_full_model, wiring_of
from ..server.closed_form import PartialDecoder, candidates
from ..server.lora_placement import DEFAULT_LORA, place_lora
from ..server.split_model import SplitModel
from ..shared.compat import add_fused_lm_head, attention_flops, storage_key
from ..shared.lora_layers import folded_loras
from ..shared.lora_state import CLIENT, EMULATOR, get_lora_state, lora_factors, set_trainable_lora, traveling
from ..wire.messages import ClientUpdate, LocalWork, RoundStart


COLUMNS = {"fedbiot": "client", "full_lora": "full-model LoRA", "full_finetuning": "full fine-tuning"}
COLUMNS |= {"cached": "teacher cached", "online": "teacher online"}
SETTINGS: tuple[str, ...] = (
    "num_adapter_layers",
    "num_adapter_layers_bottom",
    "emulator_drop_ratio",
    "emulator_lora_r",
)
SETTINGS += ("num_clients", "fraction_train", "num_rounds", "local_steps", "proximal_weight", "max_length")
SETTINGS += ("per_device_train_batch_size", "gradient_accumulation_steps", "alignment_batch_size", "alignment_steps")
SETTINGS += ("initial_alignment_steps", "alignment_kl_weight", "plug_in_steps")
MORE_FLOPS = {torch.ops.aten.addmm_: lambda output, a, b, **kwargs: 2 * math.prod(a) * b[-1]}  # torch forgets it


def plan(
    model: str | PretrainedConfig | PreTrainedModel,
    args: FedBiOTConfig,
    peft_config: LoraConfig | None = None,
    emulator_peft_config: LoraConfig | None = None,
    public_examples: int = 52_000,
) -> dict[str, dict]:
    """
    Count what a FedBiOT run costs each side, next to LoRA on all layers and to training all weights.

    Every text is taken to fill `max_length`. FLOPs are those of matrix products and attention. Memory is that of
    training without checkpointing and autocast; with bf16 autocast, activations take less.

    Args:
        model (`str`, `PretrainedConfig` or `PreTrainedModel`): The full model. Only its config is read.
        args ([`FedBiOTConfig`]):
            Configuration. In `model_init_kwargs`, `dtype`, `revision` and `attn_implementation` count; whatever is not
            `"eager"` is taken for fused attention, which keeps no score for each pair of tokens.
        peft_config, emulator_peft_config ([`~peft.LoraConfig`], *optional*):
            The two LoRAs, as for [`FederatedRunner`]. The first is also put on all layers, for the comparison.
        public_examples (`int`, *optional*, defaults to `52_000`): Size of the public dataset.

    Returns:
        `dict`: What was planned in `"model"`, `"settings"` and `"parameters"` ([`ParameterCounts`]), and
        - `"clients"`, of one `"fedbiot"`, `"full_lora"` or `"full_finetuning"` client: `parameters` held,
          `trainable_parameters`, `weight_memory`, `optimizer_memory` (two moments and a gradient of each trained
          parameter, in its dtype: a LoRA's is float32), `activation_memory` (kept for the backward pass of one
          micro-batch) and their sum `total_memory` in bytes, `flops_per_step`, `flops_per_round`, `bytes_once` (the
          emulator package or the full model), `bytes_per_round_down` and `bytes_per_round_up`.
        - `"server"`, of alignment with a `"cached"` (if that can be) or an `"online"` teacher: `student_flops`, `teacher_flops`,
          `flops_per_step`, `flops_per_round`; at most, `store_bytes` of hidden states in the model's dtype and
          `flops_to_store` them; `flops_to_start`, the emulator LoRA's closed form, if it can be computed;
          `flops_to_plug_in`, of `plug_in_steps`; `flops_of_run`, with all of these and the initial alignment; the bytes of
          all clients.

    Raises:
        ValueError, OSError: If a setting or the model cannot work in a run, or the model cannot run without data.
    """
    sizes = {"max_length": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "public_examples": 1}
    for name, least in sizes.items():
        value = public_examples if name == "public_examples" else getattr(args, name)
        if (value or 0) < least:
            raise ValueError(f"`{name}` is {value}, but costs can only be counted for a number of at least {least}.")
    # Autocast does not know the meta device.
    with torch.device("meta"), _MetaRun(), mock.patch("torch.is_autocast_enabled", return_value=False):
        full = _build(model, args.init_kwargs())
        name, dtype = type(full).__name__, str(full.dtype).removeprefix("torch.")
        models = SplitModel.from_config(full, args, peft_config, emulator_peft_config, args.computes_start)
        split, layers = models.split, tuple(range(models.split.num_layers))
        states = [get_lora_state(models.adap_emu, lora_name) for lora_name in (CLIENT, EMULATOR)]
        weights, package_weights = _num_bytes(full.parameters()), _num_bytes(models.package_model.parameters())
        everywhere = place_lora(peft_config or LoraConfig(**DEFAULT_LORA), full, split, layers)
        try:
            server = _alignment_costs(models, args, public_examples)
            set_trainable_lora(models.adap_emu, CLIENT, args.freeze_a)
            fedbiot = _client_costs(models.adap_emu, args)
            full_finetuning = _client_costs(full.requires_grad_(True), args)
            full_lora = _client_costs(get_peft_model(full, everywhere.peft_config(full)), args)
        except RuntimeError as error:
            raise ValueError(f"`model` is {name}, which cannot run without data: {error}. Measure a run.") from error
    # As the server sends them, and as a client without a name and metrics answers.
    counts = models.count_parameters()
    states = [{key: torch.zeros(value.shape, dtype=value.dtype) for key, value in state.items()} for state in states]
    states[0] = traveling(states[0], args.freeze_a)
    work = LocalWork(args.local_steps, 2**20, 2**20, 2**20, args.proximal_weight, 2**31)
    down, up = (
        len(RoundStart(0, work, *states).to_bytes()),
        len(ClientUpdate(0, "", 1, {}, states[0]).to_bytes()),
    )
    once, lora_bytes = package_weights + down, full_lora["weight_memory"] - weights
    num_clients = args.num_sampled(args.num_clients)
    fedbiot |= {"bytes_once": once, "bytes_per_round_down": down, "bytes_per_round_up": up}
    full_lora |= {"bytes_once": weights, "bytes_per_round_down": lora_bytes, "bytes_per_round_up": lora_bytes}
    full_finetuning |= {"bytes_once": 0, "bytes_per_round_down": weights, "bytes_per_round_up": weights}
    for costs in server.values():
        costs |= {"bytes_once": args.num_clients * once}
        costs |= {"bytes_per_round_down": num_clients * down, "bytes_per_round_up": num_clients * up}
    return {
        "model": {"architecture": name, "dtype": dtype, **asdict(split)},
        "settings": {name: getattr(args, name) for name in SETTINGS} | {"public_examples": public_examples},
        "parameters": asdict(counts) | {"client_share": counts.client_share},
        "clients": {"fedbiot": fedbiot, "full_lora": full_lora, "full_finetuning": full_finetuning},
        "server": server,
    }


class _MetaRun(TorchFunctionMode):
    """Lets this library build its models on the meta device, and a model take a batch without padding there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.to and isinstance(args[-1], str):
            return args[0]
        if func is torch.Tensor.__bool__:
            # All that a causal LM asks its data is whether every token counts.
            return True
        if func is scaled_dot_product_attention:
            # For meta tensors, torch takes its unfused fallback.
            dropout = kwargs.get("dropout_p", 0.0)
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3], dropout, True)[0]
        if func is torch._grouped_mm:
            # Experts of a mixture: as costly as one of them for all tokens, which torch can count.
            return args[0] @ args[1][0]
        return func(*args, **kwargs)


def _build(model: str | PretrainedConfig | PreTrainedModel, kwargs: dict[str, Any]) -> PreTrainedModel:
    config = getattr(model, "config", model)
    if isinstance(config, str):
        remote = {name: kwargs[name] for name in ("revision", "token", "trust_remote_code") if name in kwargs}
        config = AutoConfig.from_pretrained(config, **remote)
    if kwargs.get("quantization_config") or getattr(config, "quantization_config", None):
        raise ValueError(
            "`quantization_config` is set (`load_in_4bit` and `load_in_8bit` do so too), but a plan is for weights that "
            "are not quantized. Leave it out, or name the unquantized model."
        )
    dtype = model.dtype if isinstance(model, PreTrainedModel) else kwargs.get("dtype", "auto")
    attention = kwargs.get("attn_implementation") or config._attn_implementation
    return AutoModelForCausalLM.from_config(
        config,
        dtype=config.dtype if dtype == "auto" else dtype,
        attn_implementation=attention if attention in (None, "eager") else "sdpa",
        trust_remote_code=kwargs["trust_remote_code"],
    )


def _batch(batch_size: int, length: int) -> dict[str, torch.Tensor]:
    return {name: torch.ones(batch_size, length, dtype=torch.long) for name in ("input_ids", "attention_mask")}


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _count_flops(run: Callable) -> int:
    with FlopCounterMode(display=False, custom_mapping=MORE_FLOPS | attention_flops()) as counter:
        run()
    return counter.get_total_flops()


def _client_costs(model: PreTrainedModel | PeftModel, args: FedBiOTConfig) -> dict[str, int]:
    """What one client holds and does for local steps on the parameters of `model` that have gradients."""
    base = causal_lm(model) if isinstance(model, PeftModel) else model
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    batch = _batch(args.per_device_train_batch_size, args.max_length)
    factors, scalings = lora_factors(model, CLIENT)
    own = {storage_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: list[torch.Tensor] = []

    def step():
        with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
            loss = -base(**batch, labels=batch["input_ids"], fused_lm_head=True).log_probs.sum()
            if args.proximal_weight > 0:
                loss = loss + proximal_term(factors, [(a.detach(), b.detach()) for a, b in factors], scalings)
        loss.backward()

    model.train()
    flops_per_step = _count_flops(step) * args.gradient_accumulation_steps
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    storages = {storage_key(tensor): tensor.untyped_storage() for tensor in kept}
    memory = {
        "weight_memory": _num_bytes(model.parameters()),
        "optimizer_memory": 3 * _num_bytes(trained),
        "activation_memory": sum(storage.nbytes() for key, storage in storages.items() if key not in own),
    }
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable_parameters": sum(parameter.numel() for parameter in trained),
        **memory,
        "total_memory": sum(memory.values()),
        "flops_per_step": flops_per_step,
        "flops_per_round": flops_per_step * args.local_steps,
    }


def _alignment_costs(models: SplitModel, args: FedBiOTConfig, public_examples: int) -> dict[str, dict[str, int]]:
    batch, with_kl = _batch(args.alignment_batch_size, args.max_length), args.alignment_kl_weight > 0
    adap_emu, split = models.adap_emu.eval(), models.split
    if not split.kept:
        return {}
    set_trainable_lora(adap_emu, EMULATOR)
    base, head = causal_lm(adap_emu), adap_emu.get_output_embeddings()
    wiring_of(models, batch)  # not counted: seen once in a run
    with (
        folded_loras(adap_emu, CLIENT),
        folded_loras(models.adap_fu, CLIENT),
        capture(adap_emu, split.layers_name, split.top_position) as seen,
    ):

        def step():
            base.base_model(**batch, use_cache=False)
            (head(seen.last) if with_kl else seen.entering).sum().backward()

        student = _count_flops(step)
        whole = _count_flops(lambda: run_full_model(models, batch))
        logits = _count_flops(lambda: head(seen.last)) if with_kl else 0
        cached = with_kl and not split.num_adapter_layers_bottom
        adapter_layers = _count_flops(lambda: run_adapter_layers(models, batch, seen.entering)) if cached else 0
    # An emulator that drops nothing is not aligned.
    round_steps, first_steps = (args.alignment_steps, args.initial_alignment_steps) if split.dropped else (0, 0)
    all_steps = first_steps + args.num_rounds * round_steps
    stored = min(public_examples, all_steps * args.alignment_batch_size)
    state_bytes = models.adap_fu.config.get_text_config().hidden_size * models.adap_fu.dtype.itemsize
    start_flops, plug_in_flops = (
        _start_flops(models, args, batch, public_examples),
        _plug_in_flops(models, args, batch),
    )
    costs = {}
    for name, teacher, examples in (("cached", adapter_layers, stored), ("online", whole, 0)):
        if name == "online" or not split.num_adapter_layers_bottom:
            per_step, to_store = student + teacher + logits, examples * whole // args.alignment_batch_size
            costs[name] = {
                "student_flops": student,
                "teacher_flops": teacher + logits,
                "flops_per_step": per_step,
                "flops_per_round": per_step * round_steps,
                "store_bytes": examples * args.max_length * state_bytes,
                "flops_to_store": to_store,
                "flops_to_start": start_flops,
                "flops_to_plug_in": plug_in_flops,
                "flops_of_run": per_step * all_steps + to_store + start_flops + plug_in_flops,
            }
    return costs


def _plug_in_flops(models: SplitModel, args: FedBiOTConfig, batch: dict[str, torch.Tensor]) -> int:
    """Of the steps of [`PlugInTrainer`]: three teachers, the emulator as two of them, and the full model as the student."""
    if args.plug_in_steps == 0 or not models.split.dropped:
        return 0
    full, emulator = causal_lm(models.adap_fu), causal_lm(models.adap_emu)
    head = full.get_output_embeddings()
    set_trainable_lora(models.adap_fu, CLIENT)

    def step():
        with torch.no_grad():
            for teacher in (full, emulator, emulator):
                head(teacher.base_model(**batch, use_cache=False)[0])
        head(full.base_model(**batch, use_cache=False)[0]).sum().backward()

    return args.plug_in_steps * _count_flops(step)


def _start_flops(models: SplitModel, args: FedBiOTConfig, batch: dict[str, torch.Tensor], public_examples: int) -> int:
    """Of the emulator LoRA's closed form, if each layer has a linear for it: all layers run once, the emulator's again."""
    split, hidden_size = models.split, models.adap_emu.config.get_text_config().hidden_size
    names = (f"{split.layers_name}.{position}" for position in split.emulator_positions)
    layers = [causal_lm(models.adap_emu).get_submodule(name) for name in names]
    linears = [linear for layer in layers for linear in candidates(layer, hidden_size)[:1]]
    if not args.computes_start or not split.dropped or not linears:
        return 0
    full, emulator = (
        PartialDecoder(model, split.layers_name, wiring_of(models, batch))
        for model in (models.adap_fu, models.adap_emu)
    )
    examples = min(public_examples, math.ceil(args.alignment_init_tokens / args.max_length))
    passes = _count_flops(lambda: full.run(0, split.top_index, batch, None))
    passes += 2 * _count_flops(lambda: emulator.run(0, split.top_position, batch, None))
    regressions = 0
    for linear in linears:
        rows, rank = linear.in_features, linear.r[EMULATOR]
        regressions += 2 * examples * args.max_length * rows * (rows + hidden_size)
        regressions += 2 * hidden_size * rows * (rows + hidden_size + rank)
    return passes * examples // args.alignment_batch_size + regressions
