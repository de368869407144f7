import copy
import json
from contextlib import nullcontext

import pytest
import torch
from conftest import sums, tiny_model
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
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
from fedbiot_trainer.server import alignment
from fedbiot_trainer.server.capture import run_full_model
from fedbiot_trainer.shared.lora_layers import folded_loras
from fedbiot_trainer.shared.lora_state import get_lora_state, lora_factors, set_lora_state, set_trainable_lora
from fedbiot_trainer.shared.losses import hidden_state_loss
from fedbiot_trainer.shared.round_trainer import StepSampler
from fedbiot_trainer.wire.messages import LocalWork, RoundStart


LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


@pytest.fixture
def make_alignment(make_args, tokenizer, model):
    def make(dataset=None, **changes):
        dataset = sums(40, 60) if dataset is None else dataset
        return EmulatorAlignmentTrainer(
            model, make_args(**changes), dataset, peft_config=LORA, processing_class=tokenizer
        )

    return make


@pytest.fixture
def package(make_alignment, tmp_path):
    trainer = make_alignment()
    trainer.train()
    trainer.save_model(tmp_path / "package")
    return str(tmp_path / "package")


def base_tensors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}


def changed(before, model):
    return [name for name, p in model.named_parameters() if name in before and not torch.equal(before[name], p)]


def logged(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# ---- where in the data a round is


@pytest.mark.parametrize("num_examples, batch_size", [(10, 4), (8, 4), (3, 5)])
def test_rounds_continue_one_another(num_examples, batch_size):
    whole = list(StepSampler(num_examples, batch_size, seed=0, start=0, stop=12))
    parts = [
        batch for start in range(0, 12, 3) for batch in StepSampler(num_examples, batch_size, 0, start, start + 3)
    ]
    assert parts == whole
    per_epoch = -(-num_examples // batch_size)
    for epoch in range(12 // per_epoch):
        seen = sum(whole[epoch * per_epoch : (epoch + 1) * per_epoch], [])
        assert sorted(seen) == list(range(num_examples))


def test_dropping_the_last_batch_of_everything():
    assert len(list(StepSampler(10, 4, 0, 0, 5, drop_last=True))[2]) == 4
    with pytest.raises(ValueError, match="`per_device_train_batch_size` is 4, but there are only 3 examples"):
        StepSampler(3, 4, 0, 0, 5, drop_last=True)


# ---- client


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2}, {"lr_scheduler_type": "linear", "warmup_steps": 2}],
    ids=["plain", "accumulation", "schedule"],
)
def test_one_client_without_proximal_term_is_plain_sft(make_args, make_alignment, tokenizer, tmp_path, settings):
    models = make_alignment(emulator_drop_ratio=0.0).models
    torch.manual_seed(3)
    start = {key: torch.randn_like(t) * 0.1 for key, t in get_lora_state(models.adap_emu, "client").items()}
    shared = {"logging_steps": 1} | settings

    set_lora_state(models.adap_emu, "client", start)
    args = make_args(num_rounds=1, local_steps=9, proximal_weight=0.0, **shared)
    ours = ClientSFTTrainer(models.adap_emu, args, sums(0, 8), processing_class=tokenizer)
    ours.train()

    config = copy.deepcopy(models.adap_fu.peft_config["client"])
    plain_model = get_peft_model(tiny_model(), config)
    set_lora_state(plain_model, "default", start)
    plain_args = SFTConfig(
        str(tmp_path), max_steps=9, per_device_train_batch_size=4, learning_rate=1e-2, adam_beta2=0.95, bf16=False,
        use_cpu=True, report_to="none", disable_tqdm=True, activation_checkpointing=False,
        **{"lr_scheduler_type": "constant", **shared},
    )  # fmt: skip
    plain = SFTTrainer(plain_model, plain_args, train_dataset=sums(0, 8), processing_class=tokenizer)
    plain.train()

    assert len(logged(plain)) == 9
    assert logged(ours) == pytest.approx(logged(plain), abs=1e-6)
    assert logged(ours, "learning_rate") == logged(plain, "learning_rate")
    ours_state, plain_state = get_lora_state(models.adap_emu, "client"), get_lora_state(plain_model, "default")
    assert all(torch.allclose(ours_state[key], plain_state[key], atol=1e-6) for key in start)
    assert any(not torch.allclose(ours_state[key], start[key], atol=1e-3) for key in start)


@pytest.mark.parametrize("batch_size, accumulation", [(4, 1), (2, 2), (1, 4)])
def test_client_gets_the_same_from_batch_times_accumulation(make_args, package, tokenizer, batch_size, accumulation):
    def run(batch_size, accumulation):
        args = make_args(
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, local_steps=6,
            proximal_weight=0.5, logging_steps=1,
        )  # fmt: skip
        trainer = ClientSFTTrainer(package, args, sums(0, 8), processing_class=tokenizer)
        trainer.train()
        return logged(trainer), get_lora_state(trainer.model, "client")

    (losses, state), (expected_losses, expected) = run(batch_size, accumulation), run(4, 1)
    # Float32 sums in another order, through six AdamW steps.
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert all(torch.allclose(state[key], expected[key], atol=1e-4) for key in state)


def test_client_step_trains_the_client_lora_alone(make_args, package, tokenizer):
    trainer = ClientSFTTrainer(package, make_args(), sums(0, 8), processing_class=tokenizer)
    base, emulator = base_tensors(trainer.model), get_lora_state(trainer.model, "emulator")
    client = get_lora_state(trainer.model, "client")
    for _ in range(3):
        trainer.train()
    assert changed(base, trainer.model) == []
    after = get_lora_state(trainer.model, "emulator")
    assert all(torch.equal(after[key], emulator[key]) for key in emulator)
    after = get_lora_state(trainer.model, "client")
    assert all(not torch.equal(after[key], client[key]) for key in client)


def test_proximal_term_holds_the_client_near_its_start(make_args, package, tokenizer):
    distances = {}
    for weight in (0.0, 1.0, 100.0):
        args = make_args(proximal_weight=weight, local_steps=20)
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
    assert total == pytest.approx([s + 0.25 * d for s, d in zip(sft, distance, strict=True)], abs=1e-6)


def test_client_evaluates_without_the_proximal_term(make_args, package, tokenizer):
    trainer = ClientSFTTrainer(package, make_args(proximal_weight=1e6), sums(0, 8), processing_class=tokenizer)
    trainer.train()
    assert trainer.evaluate(sums(8, 10))["eval_loss"] < 100


def test_client_alone(package, make_args, tokenizer, tmp_path, batch):
    args = make_args(local_steps=20)
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
    expected = trainer.model.eval()(**batch).logits
    assert torch.allclose(emulator.eval()(**batch).logits, expected, atol=1e-5)


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


# ---- alignment


def test_alignment_trains_the_emulator_lora_alone(make_alignment, model):
    trainer = make_alignment()
    full, base = base_tensors(model), base_tensors(trainer.model)
    client, emulator = (get_lora_state(trainer.model, name) for name in ("client", "emulator"))
    for _ in range(3):
        trainer.train()
    assert changed(full, model) == []
    assert changed(base, trainer.model) == []
    after = get_lora_state(trainer.model, "client")
    assert all(torch.equal(after[key], client[key]) for key in client)
    after = get_lora_state(trainer.model, "emulator")
    assert all(not torch.equal(after[key], emulator[key]) for key in emulator)


def test_alignment_brings_the_emulator_closer(make_alignment):
    trainer = make_alignment(initial_alignment_steps=60)
    trainer.train()
    for name in ("alignment_l2", "alignment_kl"):
        values = trainer.step_metrics[name]
        assert sum(values[-5:]) < 0.8 * sum(values[:5])


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_alignment_loss_is_the_formula(make_alignment, batch, weight):
    trainer = make_alignment(alignment_kl_weight=weight)
    trainer.train()
    full, student, mask = trainer.models.adap_fu.eval(), trainer.model.eval(), batch["attention_mask"]
    with torch.no_grad():
        h_t = full(**batch, output_hidden_states=True).hidden_states[6]
        h_s = student(**batch, output_hidden_states=True).hidden_states[3]
        expected = hidden_state_loss(h_s, h_t, mask)
        log_student, log_teacher = (F.log_softmax(model(**batch).logits, -1) for model in (student, full))
        kl = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
        expected += weight * kl[mask.bool()].sum()
        loss = trainer.compute_loss(student, dict(batch))
    assert loss.item() == pytest.approx((expected / mask.sum()).item(), rel=1e-5)


def test_teacher_is_the_full_model_with_the_current_client_lora(make_alignment, batch):
    trainer = make_alignment()
    models = trainer.models
    before = trainer.compute_loss(trainer.model.eval(), dict(batch))
    states = run_full_model(models, batch)
    state = get_lora_state(models.adap_emu, "client")
    models.plug_in({key: torch.randn_like(tensor) for key, tensor in state.items()})
    after = run_full_model(models, batch)
    assert torch.equal(states.entering, after.entering)
    assert not torch.allclose(states.last, after.last, atol=1e-2)
    assert trainer.compute_loss(trainer.model.eval(), dict(batch)) != before


@pytest.mark.parametrize(("teacher", "num_models"), [("cached", 1), ("online", 2)])
def test_alignment_with_a_folded_client_lora(make_alignment, monkeypatch, teacher, num_models):
    def train(fold):
        models = []
        monkeypatch.setattr(alignment, "folded_loras", lambda *args: models.append(args) or fold(*args))
        torch.manual_seed(0)
        trainer = make_alignment(teacher=teacher)
        state = get_lora_state(trainer.model, "client")
        state = {
            key: torch.randn(t.shape, generator=torch.Generator().manual_seed(0)) / 10 for key, t in state.items()
        }
        set_lora_state(trainer.model, "client", state)
        trainer.models.plug_in(state)
        trainer.train()
        assert len(models) == num_models
        return trainer.step_metrics, get_lora_state(trainer.model, "emulator")

    (metrics, lora), (expected_metrics, expected) = train(folded_loras), train(lambda *args: nullcontext())
    for name, values in expected_metrics.items():
        assert metrics[name] == pytest.approx(values, rel=1e-4)
    for name, tensor in expected.items():
        torch.testing.assert_close(lora[name], tensor, rtol=0, atol=1e-4)


def test_no_emulator_to_align(make_alignment):
    with pytest.raises(
        ValueError, match="`num_adapter_layers` is -1, which takes all layers, so there is no emulator"
    ):
        make_alignment(num_adapter_layers=-1)


def test_nothing_to_align_when_nothing_is_dropped(make_alignment, batch):
    trainer = make_alignment(emulator_drop_ratio=0.0)
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == 0


def test_teacher_and_student_have_the_same_precision(make_alignment):
    trainer = make_alignment(emulator_drop_ratio=0.0, bf16=True, initial_alignment_steps=1)
    trainer.train()
    assert trainer.step_metrics["alignment_l2"] == [0.0]
    assert trainer.step_metrics["alignment_kl"] == [0.0]


def test_no_dropout_in_alignment(make_args, tokenizer, batch):
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear")
    trainer = EmulatorAlignmentTrainer(model, make_args(), sums(0, 8), config, processing_class=tokenizer)
    trainer.train()
    trainer.model.train()
    losses = {trainer.compute_loss(trainer.model, dict(batch)).item() for _ in range(3)}
    assert len(losses) == 1
    assert trainer.model.training


def test_alignment_alone_from_a_model_by_name(make_args, model, tokenizer, tmp_path, batch):
    model.save_pretrained(tmp_path / "full")
    tokenizer.save_pretrained(tmp_path / "full")
    trainer = EmulatorAlignmentTrainer(
        str(tmp_path / "full"), make_args(), train_dataset=sums(40, 50), processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model(tmp_path / "package")
    loaded = EmulatorPackage.load(tmp_path / "package").peft_model().eval()
    assert torch.allclose(loaded(**batch).logits, trainer.model.eval()(**batch).logits, atol=1e-6)


def test_alignment_alone_counts_its_own_steps(make_args, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("fedbiot_trainer.server.hidden_states.SHARD_BYTES", 1)  # a file for each text
    args = make_args(num_rounds=100, alignment_lr_scheduler_type="linear", logging_steps=1, save_steps=1)
    trainer = EmulatorAlignmentTrainer(tiny_model(), args, sums(0, 50), processing_class=tokenizer)
    progress = []
    trainer.prepare_teacher(lambda *numbers: progress.append(numbers))
    assert progress[-1] == (12, 12)  # 3 steps of 4 texts
    trainer.train()
    assert logged(trainer, "learning_rate") == pytest.approx([1e-2, 2e-2 / 3, 1e-2 / 3])
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_code_from_the_hub_needs_a_yes(make_args, tokenizer, monkeypatch, tmp_path):
    loaded = []

    def load(*args, **kwargs):
        loaded.append(kwargs)
        raise OSError("enough")

    monkeypatch.setattr("fedbiot_trainer.wire.package.AutoModelForCausalLM.from_pretrained", load)
    (tmp_path / "fedbiot.json").write_text('{"schema_version": 1}')
    for trainer, model in ((EmulatorAlignmentTrainer, "owner/model"), (ClientSFTTrainer, str(tmp_path))):
        with pytest.raises(OSError, match="enough"):
            trainer(model, make_args(trust_remote_code=True), sums(0, 8), processing_class=tokenizer)
    assert [kwargs["trust_remote_code"] for kwargs in loaded] == [True, True]


def test_dropped_layers_are_not_in_the_package(package, make_args, tokenizer, tmp_path):
    model = tiny_model()
    dropped = [1, 2, 4]
    content = b"".join(file.read_bytes() for file in (tmp_path / "package").rglob("*") if file.is_file())
    for index, layer in enumerate(model.model.layers):
        for name, parameter in layer.named_parameters():
            if "norm" in name:  # all ones in every layer
                continue
            inside = parameter.detach().numpy().tobytes() in content
            assert inside == (index not in dropped), (index, name)
    config = json.loads((tmp_path / "package" / "config.json").read_text())
    assert config["num_hidden_layers"] == 5


# ---- alone and interrupted


@pytest.mark.parametrize("party", ["client", "emulator"])
def test_resume_from_a_checkpoint(make_args, tokenizer, tmp_path, party):
    def make():
        settings = {"save_strategy": "steps", "save_steps": 3, "local_steps": 6, "initial_alignment_steps": 6}
        alignment = EmulatorAlignmentTrainer(
            tiny_model(), make_args(**settings), sums(0, 8), LORA, processing_class=tokenizer
        )
        if party == "emulator":
            return alignment
        return ClientSFTTrainer(
            alignment.models.adap_emu, make_args(**settings), sums(0, 8), processing_class=tokenizer
        )

    whole, resumed = make(), make()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    expected, state = get_lora_state(whole.model, party), get_lora_state(resumed.model, party)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert resumed.state.global_step == 6


# ---- what cannot work


def test_streams_are_refused(package, make_args, tokenizer):
    with pytest.raises(TypeError, match="`train_dataset` must be a `datasets.Dataset`, got IterableDataset"):
        ClientSFTTrainer(package, make_args(), sums(0, 8).to_iterable_dataset(), processing_class=tokenizer)


def test_loras_of_a_split_model_are_settled(make_alignment, make_args, tokenizer):
    models = make_alignment().models
    with pytest.raises(ValueError, match="`peft_config` was passed with a `SplitModel`, which has its LoRAs"):
        EmulatorAlignmentTrainer(models, make_args(), sums(0, 8), peft_config=LORA, processing_class=tokenizer)


def test_optimizers_are_refused(package, make_args, tokenizer):
    with pytest.raises(ValueError, match="`optimizers` cannot be passed"):
        ClientSFTTrainer(package, make_args(), sums(0, 8), processing_class=tokenizer, optimizers=(object(), None))


def test_tokenizer_larger_than_the_embedding(make_alignment, make_args, package, tokenizer):
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens([f"<extra-{i}>" for i in range(20)])
    with pytest.raises(ValueError, match="`processing_class` has a vocabulary of 65 tokens, .* has 48 rows"):
        ClientSFTTrainer(package, make_args(), sums(0, 8), processing_class=larger)


def test_config_defaults_work_for_both_trainers(tmp_path, model, tokenizer):
    args = FedBiOTConfig(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = EmulatorAlignmentTrainer(model, args, sums(0, 4), processing_class=tokenizer)
    assert (trainer.args.max_steps, trainer.total_steps) == (500, 500)


# ---- memory


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
