import copy

import pytest
import torch
from conftest import (
    CHECKPOINTING,
    LORA,
    assert_as_exact,
    assert_same_model,
    base_tensors,
    changed,
    logged,
    randomize,
    sums,
    tiny_model,
)
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from fedbiot_trainer import (
    ClientSFTTrainer,
    EmulatorAlignmentTrainer,
    EmulatorPackage,
    FedBiOTConfig,
    FederatedClient,
    FederatedServer,
)
from fedbiot_trainer.server.split_model import SplitModel
from fedbiot_trainer.shared.compat import FUSED_HEAD
from fedbiot_trainer.shared.lora_state import get_lora_state, lora_factors, set_lora_state, set_trainable_lora
from fedbiot_trainer.wire.messages import LocalWork, RoundStart


@pytest.fixture(scope="module")
def package(tmp_path_factory, tokenizer):
    """One of a short alignment. Clients only read it."""
    folder = tmp_path_factory.mktemp("package")
    args = FedBiOTConfig(
        str(folder / "run"), initial_alignment_steps=3, alignment_batch_size=4, alignment_learning_rate=1e-2,
        teacher_cache_dir=str(folder / "cache"), report_to="none", disable_tqdm=True, log_level="error", use_cpu=True,
    )  # fmt: skip
    trainer = EmulatorAlignmentTrainer(tiny_model(), args, sums(40, 60), peft_config=LORA, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(folder / "package")
    return str(folder / "package")


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2}, {"lr_scheduler_type": "linear", "warmup_steps": 2}],
    ids=["plain", "accumulation", "schedule"],
)
def test_one_client_without_proximal_term_is_plain_sft(make_args, make_alignment, tokenizer, tmp_path, settings):
    models = make_alignment(emulator_drop_ratio=0.0).models
    [start] = randomize(models.adap_emu, "client")
    shared = {"logging_steps": 1} | settings

    args = make_args(num_rounds=1, local_steps=9, proximal_weight=0.0, **shared)
    ours = ClientSFTTrainer(models.adap_emu, args, sums(0, 8), processing_class=tokenizer)
    ours.train()

    config = copy.deepcopy(models.adap_fu.peft_config["client"])
    plain_args = SFTConfig(
        str(tmp_path), max_steps=9, per_device_train_batch_size=4, learning_rate=1e-2, adam_beta2=0.95, bf16=False,
        use_cpu=True, report_to="none", disable_tqdm=True,
        **{CHECKPOINTING: False, "lr_scheduler_type": "constant", **shared},
    )  # fmt: skip
    losses, states = [logged(ours)], [get_lora_state(models.adap_emu, "client")]
    for dtype in (torch.float32, torch.float64):
        plain_model = get_peft_model(tiny_model(), config).to(dtype)
        set_lora_state(plain_model, "default", start)
        plain = SFTTrainer(plain_model, plain_args, train_dataset=sums(0, 8), processing_class=tokenizer)
        plain.train()
        assert logged(ours, "learning_rate") == logged(plain, "learning_rate")
        losses.append(logged(plain))
        states.append(get_lora_state(plain_model, "default"))

    assert len(losses[0]) == 9
    assert_as_exact(*(torch.tensor(run, dtype=torch.float64) for run in losses))
    assert_as_exact(*(torch.cat([state[key].flatten() for key in start]) for state in states))
    assert any(not torch.allclose(states[0][key], start[key], atol=1e-3) for key in start)


@pytest.mark.skipif(FUSED_HEAD.applies, reason="this version of TRL makes the logits of all positions")
def test_positions_without_a_label_are_not_scored(make_args, package, tokenizer):
    class Products(TorchDispatchMode):
        """Numbers of rows in all products of the size of the vocabulary."""

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                left, right = [value for value in args if isinstance(value, torch.Tensor)][-2:]
                if right.shape[1] == vocab_size:
                    rows.append(len(left))
            return function(*args, **(kwargs or {}))

    text = Dataset.from_dict({"prompt": ["1+2=3;" * n for n in (1, 2, 3)], "completion": ["4"] * 3})
    trainer = ClientSFTTrainer(package, make_args(proximal_weight=0), text, processing_class=tokenizer)
    vocab_size, rows = trainer.model.config.vocab_size, []
    set_trainable_lora(trainer.model, "client")
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    scored = batch["labels"][:, 1:]
    labels = (scored != -100).sum().item()
    assert 0 < labels < scored.numel() / 3
    with Products():
        trainer.compute_loss(trainer.model, batch).backward()
    assert labels in rows and scored.numel() not in rows


def test_client_gets_the_same_from_batch_times_accumulation(make_args, package, tokenizer):
    def run(batch_size, accumulation):
        args = make_args(
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, local_steps=6,
            proximal_weight=0.5, logging_steps=1,
        )  # fmt: skip
        trainer = ClientSFTTrainer(package, args, sums(0, 8), processing_class=tokenizer)
        trainer.train()
        return logged(trainer), get_lora_state(trainer.model, "client")

    expected_losses, expected = run(4, 1)
    assert len(expected_losses) == 6
    for batch_size, accumulation in ((2, 2), (1, 4)):
        losses, state = run(batch_size, accumulation)
        # Float32 sums in another order, through six AdamW steps.
        assert losses == pytest.approx(expected_losses, rel=1e-4)
        assert all(torch.allclose(state[key], expected[key], atol=1e-4) for key in state)


def test_client_step_trains_the_client_lora_alone(make_args, package, tokenizer):
    trainer = ClientSFTTrainer(package, make_args(), sums(0, 8), processing_class=tokenizer)
    base, emulator = base_tensors(trainer.model), get_lora_state(trainer.model, "emulator")
    client = get_lora_state(trainer.model, "client")
    for _ in range(2):
        trainer.train()
    assert changed(base, trainer.model) == []
    after = get_lora_state(trainer.model, "emulator")
    assert all(torch.equal(after[key], emulator[key]) for key in emulator)
    after = get_lora_state(trainer.model, "client")
    assert all(not torch.equal(after[key], client[key]) for key in client)


def test_proximal_term_holds_the_client_near_its_start(make_args, package, tokenizer):
    distances = {}
    for weight in (0.0, 1.0, 100.0):
        args = make_args(proximal_weight=weight, local_steps=8)
        trainer = ClientSFTTrainer(package, args, sums(0, 8), processing_class=tokenizer)
        start = [b.detach() @ a.detach() for a, b in lora_factors(trainer.model, "client")[0]]
        trainer.train()
        factors, scalings = lora_factors(trainer.model, "client")
        moved = [s * (b @ a - w) for (a, b), s, w in zip(factors, scalings, start, strict=True)]
        distances[weight] = sum(m.pow(2).sum() for m in moved).item()
    assert distances[100.0] < 0.2 * distances[1.0] < 0.5 * distances[0.0]


def test_loss_holds_the_proximal_term(make_args, package, tokenizer):
    args = make_args(proximal_weight=0.5, local_steps=2, logging_steps=1)
    trainer = ClientSFTTrainer(package, args, sums(0, 8), processing_class=tokenizer)
    trainer.train()
    total, sft = logged(trainer), trainer.step_metrics["sft_loss"]
    distance = trainer.step_metrics["proximal_term"]
    assert distance[0] == 0
    assert distance[1] > 0
    # A product and a sum in float32 of positive numbers, each rounded by half of its epsilon.
    rounding = torch.finfo(torch.float32).eps
    assert total == pytest.approx([s + 0.25 * d for s, d in zip(sft, distance, strict=True)], rel=rounding)


def test_client_evaluates_without_the_proximal_term(make_args, package, tokenizer):
    trainer = ClientSFTTrainer(package, make_args(proximal_weight=1e6), sums(0, 8), processing_class=tokenizer)
    trainer.train()
    assert trainer.evaluate(sums(8, 10))["eval_loss"] < 100


def test_client_alone(package, make_args, tokenizer, tmp_path, batch):
    args = make_args(local_steps=8)
    trainer = ClientSFTTrainer(package, args, sums(0, 8), processing_class=tokenizer)
    before = trainer.evaluate(sums(0, 8))["eval_loss"]
    trainer.train()
    trainer.save_model(tmp_path / "mine")
    assert trainer.evaluate(sums(0, 8))["eval_loss"] < before
    emulator = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(package), package + "/emulator_lora", adapter_name="emulator"
    )
    emulator.load_adapter(tmp_path / "mine", adapter_name="client")
    emulator.base_model.set_adapter(["client", "emulator"])
    assert_same_model(trainer.model, emulator, batch)


@pytest.mark.parametrize("form", ["text", "conversational"])
def test_other_forms_of_data(package, make_args, tokenizer, form):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '.' }}{% endfor %}"
    if form == "text":
        dataset = Dataset.from_dict({"text": [f"{i}+1={i + 1}" for i in range(8)]})
    else:
        turns = [
            [{"role": "user", "content": f"{i}+1"}, {"role": "assistant", "content": f"{i + 1}"}] for i in range(8)
        ]
        dataset = Dataset.from_dict({"messages": turns})
    trainer = ClientSFTTrainer(package, make_args(local_steps=10), dataset, processing_class=tokenizer)
    trainer.train()
    assert trainer.step_metrics["sft_loss"][-1] < trainer.step_metrics["sft_loss"][0]


def test_schedule_runs_over_all_rounds(make_args, package, tokenizer):
    args = make_args(lr_scheduler_type="linear", num_rounds=3, local_steps=2, logging_steps=1, learning_rate=6e-3)
    trainer = ClientSFTTrainer(package, args, sums(0, 8), processing_class=tokenizer)
    rates = []
    for _ in range(3):
        trainer.train()
        rates += logged(trainer, "learning_rate")
    assert rates == pytest.approx([6e-3, 5e-3, 4e-3, 3e-3, 2e-3, 1e-3])


def test_schedule_follows_the_rounds_that_a_client_is_not_in(make_args, package, tokenizer):
    args = make_args(lr_scheduler_type="linear", num_rounds=4, local_steps=2, logging_steps=1, learning_rate=8e-3)
    trainer = ClientSFTTrainer(package, args, sums(0, 8), processing_class=tokenizer)
    client = FederatedClient("a", trainer, sums(0, 8))
    work = LocalWork(local_steps=2, first_step=0, schedule_step=6, schedule_length=8, proximal_weight=0.0, seed=0)
    loras = get_lora_state(trainer.model, "client"), get_lora_state(trainer.model, "emulator")
    client.fit(RoundStart(4, work, *loras).to_bytes())
    assert logged(trainer, "learning_rate") == pytest.approx([2e-3, 1e-3])
    assert trainer.steps_done == 2


def test_mixed_precision_does_not_pile_up(make_args, package, tokenizer):
    trainer = ClientSFTTrainer(package, make_args(bf16=True, local_steps=1), sums(0, 8), processing_class=tokenizer)
    forward = trainer.model.forward
    for _ in range(3):
        trainer.train()
    assert trainer.model.forward == forward


def test_streams_are_refused(package, make_args, tokenizer):
    with pytest.raises(TypeError, match="`train_dataset` must be a `datasets.Dataset`, got IterableDataset"):
        ClientSFTTrainer(package, make_args(), sums(0, 8).to_iterable_dataset(), processing_class=tokenizer)


def test_tokenizer_larger_than_the_embedding(make_alignment, make_args, package, tokenizer):
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens([f"<extra-{i}>" for i in range(20)])
    with pytest.raises(ValueError, match="`processing_class` has a vocabulary of 65 tokens, .* has 48 rows"):
        ClientSFTTrainer(package, make_args(), sums(0, 8), processing_class=larger)


def kept_for_backward(trainer):
    """Bytes of the activations that a client's step keeps for its backward pass."""
    parameters = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    set_trainable_lora(trainer.model, trainer.lora_name)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trainer.compute_loss(trainer.model, dict(batch))
        # All are alive here, so that no two of them had the same address.
        assert loss.requires_grad
    return sum(kept.values())


def test_client_keeps_no_activations_of_the_emulator(make_args, tokenizer):
    kept = {}
    for num_layers, drop_ratio in ((4, 0.0), (12, 0.5), (12, 0.0)):
        args = make_args(
            emulator_drop_ratio=drop_ratio, initial_alignment_steps=0, alignment_steps=0, proximal_weight=0.0
        )
        models = FederatedServer(tiny_model(num_hidden_layers=num_layers), args, None, tokenizer, LORA).models
        trainer = ClientSFTTrainer(models.adap_emu, args, sums(0, 8), processing_class=tokenizer)
        kept[len(models.split.full_indices)] = kept_for_backward(trainer)
    assert set(kept) == {4, 7, 12}
    assert len(set(kept.values())) == 1
    assert kept[4] > 0


def test_two_trainers_on_one_package(package, make_args, tokenizer):
    """The second would take the first one's LoRA."""
    loaded = EmulatorPackage.load(package)
    trainer = ClientSFTTrainer(loaded, make_args(), sums(0, 8), processing_class=tokenizer)
    trainer.train()
    trained = get_lora_state(trainer.model, "client")
    with pytest.raises(ValueError, match="has put the LoRAs on this package's model already"):
        ClientSFTTrainer(loaded, make_args(), sums(8, 16), processing_class=tokenizer)
    assert all(torch.equal(tensor, trained[key]) for key, tensor in get_lora_state(trainer.model, "client").items())


def test_a_lora_on_modules_by_their_full_names(make_args, tokenizer, tmp_path):
    names = ["model.layers.6.mlp.up_proj", "model.layers.7.self_attn.q_proj"]
    models = SplitModel(tiny_model(), 2, 0.5, LoraConfig(r=2, target_modules=names), LORA)
    trainer = ClientSFTTrainer(models.adap_emu, make_args(), sums(0, 8), processing_class=tokenizer)
    trainer.save_model(tmp_path / "mine")
    assert "3, 4" in (tmp_path / "mine" / "README.md").read_text()


def test_the_main_process_writes(package, make_args, tokenizer, tmp_path, monkeypatch):
    trainer = ClientSFTTrainer(package, make_args(), sums(0, 8), processing_class=tokenizer)
    monkeypatch.setattr(type(trainer.args), "should_save", False)
    trainer.save_model(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_the_loss_scale_is_not_another_training_s(package, make_args, tokenizer):
    trainer = ClientSFTTrainer(package, make_args(), sums(0, 8), processing_class=tokenizer)
    scaler = torch.amp.GradScaler("cpu")
    trainer.accelerator.scaler, trainer._first_scale = scaler, scaler.state_dict()
    scaler.load_state_dict({**scaler.state_dict(), "scale": 8.0})
    trainer.train()
    assert scaler.get_scale() == 65536
    trainer.accelerator.scaler = None
