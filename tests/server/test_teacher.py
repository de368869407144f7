import copy
import json

import pytest
import torch
from conftest import HALF_THE_DIGITS, LORA, assert_as_exact, randomize, sums, tiny_model
from datasets import Dataset
from peft import LoraConfig

from fedbiot_trainer import EmulatorAlignmentTrainer
from fedbiot_trainer.server.capture import OutputHead, run_adapter_layers, run_full_model
from fedbiot_trainer.server.hidden_states import HiddenStateStore, store_folder
from fedbiot_trainer.server.split_model import SplitModel
from fedbiot_trainer.server.teachers import PLACE
from fedbiot_trainer.shared.lora_state import get_lora_state


FLOAT32 = torch.finfo(torch.float32).eps


@pytest.fixture
def make_trainer(make_args, tokenizer):
    def make(model=None, dataset=None, **changes):
        return EmulatorAlignmentTrainer(
            tiny_model() if model is None else model,
            make_args(num_rounds=1, **changes),
            sums(40, 50) if dataset is None else dataset,
            LORA,
            processing_class=tokenizer,
        )

    return make


def shards(tmp_path):
    return sorted((tmp_path / "cache").glob("*/*.safetensors"))


def test_adapter_layers_alone_are_the_full_model(any_model, batch):
    any_model.double()
    models = SplitModel(any_model, 2, 0.5, LORA)
    models.plug_in(*randomize(models.adap_emu, "client"))
    models.adap_emu.eval()
    expected = run_full_model(models, batch)
    states = run_adapter_layers(models, batch, expected.entering)
    mask = batch["attention_mask"].bool()
    assert torch.allclose(states.last[mask], expected.last[mask], rtol=0, atol=HALF_THE_DIGITS)
    assert torch.equal(states.entering, expected.entering)
    with OutputHead(any_model).whole() as logits:
        expected = models.adap_fu(**batch).logits[mask].float()  # which the head returns
        assert torch.allclose(logits(states.last)[mask], expected, rtol=2 * FLOAT32, atol=HALF_THE_DIGITS)
    # The emulator is itself again.
    assert not torch.allclose(models.adap_emu(**batch).logits[mask].float(), expected, atol=1e-3)


def test_unknown_scaling_of_logits_is_refused(make_trainer):
    model = tiny_model("hyperclovax", logits_scaling=0.1)  # it multiplies by what others divide by
    with pytest.raises(ValueError, match="The logits of HyperCLOVAXForCausalLM are more than its output head"):
        make_trainer(model)
    make_trainer(tiny_model("hyperclovax", logits_scaling=0.1), alignment_kl_weight=0)


@pytest.mark.parametrize(
    "model_type, changes",
    [
        ("granite", {"logits_scaling": 7.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("falcon_h1", {"lm_head_multiplier": 0.1}),
        ("recurrent_gemma", {"logits_soft_cap": 1.0}),
        ("gemma2", {"final_logit_softcapping": 1.0}),
    ],
)
def test_scaled_and_capped_logits(model_type, changes):
    model = tiny_model(model_type, **changes)
    models = SplitModel(model, 2, 0.5, LoraConfig(target_modules=["down_proj"]))
    OutputHead(model).check(models, torch.device("cpu"))
    [name] = changes
    other = tiny_model(model_type, **{name: 3.0})
    with pytest.raises(ValueError, match="are more than its output head"):
        OutputHead(other).check(models, torch.device("cpu"))


def test_alignment_loss_is_the_formula_in_every_architecture(any_model, make_trainer, batch):
    trainer = make_trainer(any_model.double(), alignment_kl_weight=0.7)
    trainer.models.plug_in(*randomize(trainer.model, "client"))
    full, student, mask = trainer.models.adap_fu.eval(), trainer.model.eval(), batch["attention_mask"].bool()
    with torch.no_grad():
        states = [model(**batch, output_hidden_states=True) for model in (student, full)]
        h_s, h_t = states[0].hidden_states[3][mask], states[1].hidden_states[6][mask]
        log_q, log_p = (state.logits[mask].log_softmax(-1) for state in states)
        l2 = ((h_t - h_s).pow(2).mean(-1) / h_t.pow(2).mean(-1)).mean()
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        loss = trainer.compute_loss(student, dict(batch))
    assert loss.item() == pytest.approx((l2 + 0.7 * kl).item(), rel=4 * FLOAT32)  # in which the terms are summed


def test_nothing_is_left_on_the_model_after_an_error(model, batch):
    models = SplitModel(model, 2, 0.5, LORA)
    before = models.adap_emu(**batch).logits
    with pytest.raises(RuntimeError):
        run_adapter_layers(models, batch, torch.zeros(1, 2, 7))
    assert torch.equal(models.adap_emu(**batch).logits, before)


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"alignment_kl_weight": 0.0}], ids=["fp32", "bf16", "no-kl"])
def test_cached_and_online_give_the_same(make_trainer, settings):
    """In float64, where sums of other batches do not show; the losses are recorded in float32. In bf16, its rounding."""
    results, precise = {}, "bf16" not in settings
    for teacher in ("online", "cached"):
        model = tiny_model(dtype=torch.float64 if precise else torch.float32)
        trainer = make_trainer(
            model, teacher=teacher, initial_alignment_steps=8, **settings
        )  # the text and some again
        trainer.models.plug_in(*randomize(trainer.model, "client"))
        trainer.train()
        results[teacher] = dict(trainer.step_metrics), get_lora_state(trainer.model, "emulator")
    (online, online_lora), (cached, cached_lora) = results["online"], results["cached"]
    bf16 = 3 * torch.finfo(torch.bfloat16).eps
    for name, values in online.items():
        assert len(values) == 8
        assert cached[name] == pytest.approx(values, rel=4 * FLOAT32 if precise else bf16)
    for key, tensor in online_lora.items():
        assert torch.allclose(cached_lora[key], tensor, rtol=0, atol=HALF_THE_DIGITS if precise else bf16)


def test_full_model_is_not_run_in_the_steps(make_trainer):
    trainer = make_trainer()
    trainer.prepare_teacher()
    models = trainer.models
    layers = models.adap_fu.get_base_model().model.layers
    for index in models.split.dropped:
        layers[index].register_forward_pre_hook(lambda *args: pytest.fail("a dropped layer was run"))
    trainer.train()
    assert len(trainer.step_metrics["alignment_kl"]) == 3


def test_store_is_used_again(make_trainer, tmp_path, monkeypatch):
    make_trainer().prepare_teacher()
    (before,) = shards(tmp_path)
    time = before.stat().st_mtime_ns
    trainer = make_trainer(emulator_drop_ratio=0.2)
    monkeypatch.setattr(trainer.teacher, "_compute", lambda rows: pytest.fail("computed again"))
    trainer.train()
    (after,) = shards(tmp_path)
    assert (after, after.stat().st_mtime_ns) == (before, time)


def test_other_content_is_another_store(make_trainer, tmp_path):
    others = {
        "nothing": {},
        "model": {"model": tiny_model(seed=1)},
        "text": {"dataset": sums(41, 51)},
        "layer": {"num_adapter_layers": 3},
        "precision": {"bf16": True},
        "truncation": {"max_length": 3},
    }
    for number, (what, changes) in enumerate(others.items(), start=1):
        make_trainer(**changes).prepare_teacher()
        assert len({shard.parent for shard in shards(tmp_path)}) == number, what


def test_longer_run_goes_on_with_the_store(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("fedbiot_trainer.server.hidden_states.SHARD_BYTES", 4 * 6 * 32 * 5)  # about five texts each
    settings = {"dataset": sums(20, 90), "alignment_steps": 0}
    make_trainer(initial_alignment_steps=4, **settings).prepare_teacher()
    first = shards(tmp_path)
    assert 3 <= len(first) < 10  # of 210 texts, 16 are seen
    trainer = make_trainer(initial_alignment_steps=8, **settings)
    trainer.train()
    assert set(first) < set(shards(tmp_path))
    written = len(shards(tmp_path))
    trainer.train()  # more steps than the arguments say
    assert len(shards(tmp_path)) > written


def test_damaged_file_is_made_again(make_trainer, tmp_path):
    make_trainer().prepare_teacher()
    (shard,) = shards(tmp_path)
    content = shard.read_bytes()
    damages = {
        "truncated": lambda: shard.write_bytes(content[:-10]),
        "altered": lambda: shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1])),
        "half-written": lambda: shard.rename(shard.with_name("00000.123.part")),
    }
    for what, damage in damages.items():
        damage()
        make_trainer().prepare_teacher()
        assert shard.read_bytes() == content, what


def test_cache_is_bounded(make_trainer, tmp_path):
    text = sum(len(ids) for ids in make_trainer().train_dataset["input_ids"])
    gigabytes = text * 32 * 4 / 1e9
    with pytest.raises(ValueError, match=rf"`teacher_cache_max_gb` is .* of 30 public texts \({text} tokens x 32 x"):
        make_trainer(initial_alignment_steps=10, teacher_cache_max_gb=0.9 * gigabytes)
    folders = []
    for seed in (0, 1, 2, 2):
        make_trainer(
            tiny_model(seed=seed), initial_alignment_steps=10, teacher_cache_max_gb=2.5 * gigabytes
        ).prepare_teacher()
        folders.append({shard.parent for shard in shards(tmp_path)})
    assert [len(found) for found in folders] == [1, 2, 2, 2]
    assert not folders[0] & folders[2]  # the oldest gave way
    assert folders[2] == folders[3]


def test_online_teacher_under_zero3_is_refused(make_trainer, monkeypatch):
    monkeypatch.setattr("fedbiot_trainer.server.teachers.is_zero3", lambda accelerator: True)
    with pytest.raises(ValueError, match="`teacher` is 'online', but under DeepSpeed ZeRO-3"):
        make_trainer(teacher="online")


def test_store_does_not_depend_on_where_the_model_is(make_trainer, tmp_path):
    for folder in ("here", "there"):
        tiny_model().save_pretrained(tmp_path / folder)
        make_trainer(str(tmp_path / folder)).prepare_teacher()
    assert len(shards(tmp_path)) == 1


def test_full_disk(tmp_path, monkeypatch):
    folder = store_folder(str(tmp_path), content=1)
    store = HiddenStateStore(folder, [10, 20], 8, torch.float32)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100}))
    with pytest.raises(OSError, match="take 9.6e-07 GB, but only 1e-07 GB are free in `teacher_cache_dir`"):
        store.make_room(2, 1e12)


def test_store_says_what_it_holds(make_trainer, tmp_path):
    make_trainer().prepare_teacher()
    (file,) = (tmp_path / "cache").glob("*/store.json")
    content = json.loads(file.read_text())
    assert (content["layer"], content["dtype"]) == (6, "torch.float32")
    assert {"model", "texts", "mixed_precision", "config", "schema_version"} < content.keys()


def test_other_text_has_the_full_model_for_a_teacher(make_trainer):
    trainer = make_trainer(initial_alignment_steps=1)
    trainer.train()
    dataset, _ = trainer.prepare(sums(60, 62), "other")
    assert trainer.evaluate(dataset)["eval_alignment_l2"] > 0


def test_long_and_short_texts(make_trainer):
    texts = [str(10**i) for i in range(1, 20)]
    trainer = make_trainer(dataset=Dataset.from_dict({"text": texts}), alignment_batch_size=3)
    trainer.prepare_teacher()
    states, exact = {}, copy.deepcopy(trainer.models.adap_fu).double()
    for text in trainer.train_dataset:
        inputs = {"input_ids": torch.tensor([text["input_ids"]])}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            true = exact(**inputs, output_hidden_states=True).hidden_states[6]
        states[text[PLACE]] = run_full_model(trainer.models, inputs).entering[0], true[0]
    assert sorted(states) == list(range(19))
    for place, expected in states.items():
        assert_as_exact(trainer.teacher.store[place], *expected)


def test_store_that_cannot_be_read_after_it_was_written(make_trainer, monkeypatch):
    monkeypatch.setattr(HiddenStateStore, "write", lambda self, shard, states: None)
    with pytest.raises(OSError, match="1 of 1 files of hidden states cannot be read in .* after they were written"):
        make_trainer().prepare_teacher()


@pytest.mark.parametrize("offload", [True, False])
def test_dropped_layers_stay_off_the_device(make_trainer, monkeypatch, offload):
    models = make_trainer().models
    moved, to = set(), torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args: moved.add(self.data_ptr()) or to(self, *args))
    models.move(torch.device("cpu"), offload)
    layers = models.adap_fu.get_base_model().model.layers
    for index, layer in enumerate(layers):
        addresses = {parameter.data_ptr() for parameter in layer.parameters()}
        assert (addresses & moved == set()) if offload and index in models.split.dropped else addresses <= moved
    moved.clear()
    with models.whole_on(torch.device("cpu")):
        dropped = {p.data_ptr() for index in models.split.dropped for p in layers[index].parameters()}
        assert moved == (dropped if offload else set())
