"""
Which architectures can be split: a tiny random model of every causal LM that transformers knows goes through what a run
does with it, and docs/architectures.md says what came out.

    make architectures                                    # all, about 20 minutes on one core
    python benchmarks/architectures.py --only llama bamba # some, to the console
"""

import argparse
import copy
import math
import re
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from fedbiot_trainer import FedBiOTConfig, FederatedRunner
from fedbiot_trainer.server.split_check import check_split
from fedbiot_trainer.server.split_model import SplitModel
from fedbiot_trainer.shared.lora_state import get_lora_state
from fedbiot_trainer.wire.package import EmulatorPackage


TABLE = Path(__file__).parent.parent / "docs" / "architectures.md"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .:+=?"

# Sizes under the names that configurations have for them. Only those that a configuration has are set.
SIZES = {
    **{"vocab_size": 48, "vocab_size_per_layer_input": 48, "max_position_embeddings": 128, "n_positions": 128},
    **{"hidden_size": 32, "d_model": 32, "embedding_size": 32, "word_embed_proj_dim": 32, "attention_hidden_size": 32},
    **{"intermediate_size": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "ffn_dim": 48, "ffn_hidden_size": 48},
    **{"d_ff": 48, "expert_ffn_hidden_size": 16, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    **{"num_hidden_layers": 8, "decoder_layers": 8, "encoder_layers": 2, "num_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"n_shared_experts": 1, "num_shared_experts": 1, "zero_expert_num": 2, "n_group": 1, "topk_group": 1},
    **{"first_k_dense_replace": 0, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
    **{"v_head_dim": 8, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "rotary_dim": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_head_dim": 8, "linear_num_heads": 4, "sliding_window": 6, "image_size": 16, "patch_size": 4},
    **{"is_decoder": True},
}
TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "decoder_start_token_id": 1}
OFTEN_NONE = (
    *("head_dim", "num_key_value_heads", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok"),
    *("n_shared_experts", "n_group", "topk_group"),
)
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 16}
# What an architecture needs beside them.
OWN = {
    "bamba": {**MAMBA, "attn_layer_indices": [2, 5]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    **dict.fromkeys(("dots3_note", "dots3_note_text"), {"use_sliding_window": False}),
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    **dict.fromkeys(
        ("qwen4_exp_text",),
        {
            **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8},
            **{"indexer_compress_ratio": 2, "ngram_vocab_size_base": 64, "split_ngram_parts": 1, "hc_lowrank": 8},
        },
    ),
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "mamba_n_groups": 1},
    "gpt_neo": {"num_layers": 8, "num_heads": 4, "attention_types": [[["global", "local"], 4]]},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"] * 4},
    "kimi_linear": {"layer_types": ["full_attention", "linear_attention"] * 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 1},
    "reformer": {
        **{"attention_head_size": 8, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [4, 32]},
        **{"attn_layers": ["local", "lsh"] * 4, "feed_forward_size": 48, "num_buckets": 2},
    },
    "xlnet": {"n_head": 4, "d_head": 8, "d_inner": 48},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "attn_layer_period": 4, "attn_layer_offset": 2},
    "zamba2": {
        **{"attention_hidden_size": 64, "attention_head_dim": 16},
        **{
            "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention"] * 2,
            "mamba_headdim": 8,
            "n_mamba_heads": 8,
        },
        **{"mamba_d_state": 16, "chunk_size": 16},
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The configuration of `model_type` with 8 layers of 32 hidden units."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**{**_small(kind()), **OWN.get(model_type, {})})


def _small(config: PreTrainedConfig) -> dict:
    known = {*config.to_dict(), *config.attribute_map}
    own = vars(config)
    has = lambda name: own.get(config.attribute_map.get(name, name)) is not None  # noqa: E731
    changes = {name: size for name, size in SIZES.items() if name in known and (has(name) or name in OFTEN_NONE)}
    if "kv_lora_rank" in known:
        changes["num_key_value_heads"] = SIZES["num_attention_heads"]
    if "qk_head_dim" in known:
        changes["qk_head_dim"] = 16
    nested = {name: _small(value) for name, value in own.items() if isinstance(value, PreTrainedConfig)}
    return {**changes, **TOKENS, **nested}


def tiny_model(model_type: str) -> PreTrainedModel:
    """A random model of `model_type`, in evaluation mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32).eval()
    for parameter in model.parameters():  # what starts as zero would hide much
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@dataclass
class Outcome:
    """What became of an architecture: class, `supported` or why not, the LoRA's target modules, teachers, and start."""

    kind: str
    verdict: str
    targets: str = ""
    teachers: str = ""
    start: str = ""


def try_architecture(model_type: str, folder: Path) -> Outcome:
    """Take a tiny model of `model_type` through what a run does with one."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    try:
        own = _forward(tiny_model(model_type))
    except Exception as error:
        return Outcome(kind, f"not tried: transformers makes no tiny model of it ({_short(error)})")
    try:
        targets = _check_models(tiny_model(model_type), own, folder)
    except ValueError as error:
        return Outcome(kind, f"refused: {_short(error)}")
    teachers, reasons, with_kl, start = [], [], True, ""
    for teacher in ("cached", "online"):
        try:
            with_kl, start = _check_teacher(model_type, teacher, folder / teacher)
            teachers.append(teacher)
        except ValueError as error:
            reasons.append(_short(error))
    verdict = "supported" if "online" in teachers else f"refused: {reasons[-1]}"
    return Outcome(
        kind, verdict, targets, " and ".join(teachers) + ("" if with_kl else ", `alignment_kl_weight=0`"), start
    )


def _short(error: Exception) -> str:
    return re.sub(r"\s+", " ", f"{error}").replace("|", "/")[:300]


def _forward(model) -> torch.Tensor:
    tokens = (3 + 7 * torch.arange(20).view(2, 10)) % 48
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


def _expect(holds: bool, what: str):
    if not holds:
        raise AssertionError(what)


def _check_models(model: PreTrainedModel, own: torch.Tensor, folder: Path) -> str:
    """Split, beta = 0, plug in and extract, the package, generation. Returns the LoRA's target modules."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = SplitModel(copy.deepcopy(model), 2, 0.0, LoraConfig(r=2))
    _expect(torch.allclose(_forward(whole.package_model), own, atol=1e-4), "beta = 0 is not the full model")
    split = SplitModel(model, 2, 0.5, LoraConfig(r=2))
    check_split(split, torch.device("cpu"), cached=False)
    states = [
        {key: torch.randn_like(tensor) / 10 for key, tensor in get_lora_state(split.adap_emu, lora).items()}
        for lora in ("client", "emulator")
    ]
    split.package(*states).save(folder / "package")
    split.plug_in(states[0])
    _expect(all(map(torch.equal, split.extract().values(), states[0].values())), "extract is not plug in's inverse")
    package = EmulatorPackage.load(folder / "package")
    _expect(torch.allclose(_forward(package.model.eval()), _forward(split.package_model.eval()), atol=1e-4), "package")
    adap_emu = package.peft_model().eval()
    _expect(_forward(adap_emu).isfinite().all(), "AdapEmu gives numbers that are not finite")
    prompt = torch.tensor([[5, 6, 7]])
    new = adap_emu.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False
    )
    _expect(new.shape[1] > 3, "generation")
    _expect(all(torch.equal(t, before[name]) for name, t in model.state_dict().items()), "the full model has changed")
    names = {re.sub(r"^.*?\.\d+\.", "", key).split(".lora_")[0] for key in states[0]}
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


def _check_teacher(model_type: str, teacher: str, folder: Path) -> tuple[bool, str]:
    """
    The emulator LoRA's start and an alignment step, with a cached or an online teacher, a whole round with the cached one.
    Whether there was KL, and which start.
    """
    rows = [{"prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(16)]
    args = FedBiOTConfig(
        output_dir=str(folder / "run"),
        **{"num_rounds": 1, "local_steps": 1, "initial_alignment_steps": 1, "alignment_steps": 1, "teacher": teacher},
        **{"per_device_train_batch_size": 2, "alignment_batch_size": 2, "teacher_cache_dir": str(folder / "cache")},
        **{"report_to": "none", "disable_tqdm": True, "use_cpu": True, "log_level": "error", "max_length": 32},
    )

    def make():
        return FederatedRunner(
            tiny_model(model_type),
            args,
            client_datasets={"a": Dataset.from_list(rows[:8])},
            public_dataset=Dataset.from_list(rows[8:]),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(r=2),
        )

    try:
        runner = make()
    except ValueError as error:
        if "alignment_kl_weight=0" not in str(error):
            raise
        args.alignment_kl_weight = 0.0
        runner = make()
    with_kl = args.alignment_kl_weight > 0
    start = "closed form" if runner.server.trainer.added_linears else "zero"
    if teacher == "online":
        report = runner.server.initialize_alignment()
        _expect(math.isfinite(report.get("closed_form_l2", 0.0)), "the closed form")
        _expect(runner.server.align(1)["alignment_l2"] > 0, "alignment")
        return with_kl, start
    runner.train()
    runner.server.install_loras()
    plain = PeftModel.from_pretrained(tiny_model(model_type), runner.folder.client_lora).eval()
    own = runner.server.models.adap_fu.eval()
    _expect(torch.allclose(_forward(plain), _forward(own), atol=1e-3), "PEFT reads another LoRA")
    return with_kl, start


def write_table(outcomes: dict[str, Outcome]):
    """Write docs/architectures.md."""
    groups = {
        "supported": [name for name, outcome in outcomes.items() if outcome.verdict == "supported"],
        "refused": [name for name, outcome in outcomes.items() if outcome.verdict.startswith("refused")],
        "failing": [name for name, outcome in outcomes.items() if outcome.verdict.startswith("fails")],
        "not tried": [name for name, outcome in outcomes.items() if outcome.verdict.startswith("not tried")],
    }
    counts = ", ".join(f"{len(names)} {group}" for group, names in groups.items() if names)
    lines = [
        "# Architectures",
        "",
        f"Every causal LM that transformers {transformers.__version__} knows, as a random model of 8 layers: {counts}.",
        "`make architectures` makes this table with PEFT "
        + f"{peft.__version__}"
        + " (on a CPU; `--only NAME` tries one).",
        "",
        "An architecture is *supported* if a model of it went through the split, beta = 0 giving the full model's logits,",
        "the emulator package and back, generation, an alignment step with each teacher, a round of a client, and the",
        "result loaded on the full model by PEFT alone. The targets are those of `LoraConfig()` without `target_modules`.",
        "The start of the emulator LoRA can be computed (`alignment_init`) where a layer adds a linear's output to its own.",
        "Experts of mixtures stay frozen: two LoRAs of one model cannot be on the experts of different layers in PEFT. What",
        "is *refused* is refused before any work, with the reason given here. It is no statement about quality.",
        "",
        "## Supported",
        "",
        "| model type | class | default targets | teacher | start |",
        "|---|---|---|---|---|",
    ]
    for name in groups["supported"]:
        outcome = outcomes[name]
        lines.append(f"| {name} | {outcome.kind} | {outcome.targets} | {outcome.teachers} | {outcome.start} |")
    for title, group in (("Refused", "refused"), ("Failing", "failing"), ("Not tried", "not tried")):
        if groups[group]:
            lines += ["", f"## {title}", "", "| model type | class | because |", "|---|---|---|"]
        for name in groups[group]:
            reason = outcomes[name].verdict.partition(": ")[2]
            lines.append(f"| {name} | {outcomes[name].kind} | {reason} |")
    TABLE.write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="Model types to try, without writing the table.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    outcomes = {}
    for model_type in given.only or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        folder = Path(tempfile.mkdtemp())
        try:
            outcomes[model_type] = try_architecture(model_type, folder)
        except Exception as error:
            kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
            outcomes[model_type] = Outcome(kind, f"fails: {type(error).__name__}: {_short(error)}")
        finally:
            shutil.rmtree(folder)
        print(f"{model_type}: {outcomes[model_type]}", flush=True)
    if given.only is None:
        write_table(outcomes)


if __name__ == "__main__":
    main()
