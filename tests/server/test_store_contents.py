import pytest
import torch
from conftest import sums, tiny_model
from peft import LoraConfig

from fedbiot_trainer import EmulatorAlignmentTrainer
from fedbiot_trainer.server.hidden_states import HiddenStateStore, model_digest, store_folder


MOE = {
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "head_dim": 8,
}


@pytest.fixture
def aligned(make_args, tokenizer):
    def align(model, **changes):
        args = make_args(initial_alignment_steps=1, **changes)
        lora = LoraConfig(r=4, target_modules=["o_proj"])
        trainer = EmulatorAlignmentTrainer(model, args, sums(20, 30), lora, processing_class=tokenizer)
        trainer.take_steps(1)
        return trainer

    return align


def mixture(bias):
    model = tiny_model("glm4_moe", **MOE, first_k_dense_replace=1, n_group=1, topk_group=1)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.copy_(torch.tensor(bias))  # a buffer, as checkpoints have it
    return model


def test_models_that_differ_in_a_buffer_have_stores_of_their_own(aligned, tmp_path):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    first = aligned(mixture([0.0, 0, 0, 0]), teacher_cache_dir=one)
    second = aligned(mixture([9.0, 0, 0, 0]), teacher_cache_dir=one)
    alone = aligned(mixture([9.0, 0, 0, 0]), teacher_cache_dir=two)
    assert first.teacher.store.folder.name != second.teacher.store.folder.name == alone.teacher.store.folder.name
    assert (
        second.step_metrics["alignment_l2"] == alone.step_metrics["alignment_l2"] != first.step_metrics["alignment_l2"]
    )


def test_digest_knows_parameters_and_buffers_by_name_and_value():
    digest = model_digest(tiny_model())
    assert digest == model_digest(tiny_model())
    changed = tiny_model()
    changed.model.norm.weight.data[0] += 1
    assert model_digest(changed) != digest
    changed = tiny_model()
    changed.model.rotary_emb.inv_freq[0] += 1
    assert model_digest(changed) != digest


def test_attention_is_part_of_the_key(aligned):
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    assert aligned(tiny_model()).teacher.store.folder != aligned(eager).teacher.store.folder


@pytest.fixture
def store(tmp_path, monkeypatch):
    # Two texts of 10 tokens to a shard of float32, written in bfloat16.
    monkeypatch.setattr("fedbiot_trainer.server.hidden_states.SHARD_BYTES", 20 * 8 * 4)
    return HiddenStateStore(store_folder(str(tmp_path), content=1), [10] * 6, 8, torch.bfloat16)


def test_whole_shards_are_counted(store):
    shard = 20 * 8 * 2
    assert [store.num_bytes(n) for n in range(1, 7)] == [shard, shard, 2 * shard, 2 * shard, 3 * shard, 3 * shard]


def test_disk_is_asked_for_what_will_be_written(store, monkeypatch):
    free = [0]
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free[0]}))
    shard = 20 * 8 * 2
    store.write(2, torch.zeros(20, 8))  # of texts that are not asked for: makes no room for others
    free[0] = 2 * shard - 1
    with pytest.raises(OSError, match="take 6.4e-07 GB, but only 6.4e-07 GB are free in `teacher_cache_dir`"):
        store.make_room(3, 1e12)
    free[0] = 2 * shard
    store.make_room(3, 1e12)
    store.write(0, torch.zeros(20, 8))
    (file,) = store.folder.glob("00000-*")
    file.write_bytes(file.read_bytes()[:-1])  # damaged: to be written again
    free[0] = 2 * shard - 1
    with pytest.raises(OSError, match="take 6.4e-07 GB"):
        store.make_room(3, 1e12)
    store.write(0, torch.zeros(20, 8))
    free[0] = shard
    store.make_room(3, 1e12)


def other_store(store, content):
    folder = store_folder(str(store.folder.parent), content=content)
    other = HiddenStateStore(folder, store.lengths, 8, torch.bfloat16)
    other.write(0, torch.zeros(20, 8))
    return other


def test_a_store_that_a_run_uses_is_not_deleted(store):
    used, left = other_store(store, 2), other_store(store, 3)
    with used.in_use():
        used.missing(2)
        store.make_room(2, 0)
        assert used.folder.exists() and not left.folder.exists()
    store.make_room(2, 0)
    assert [folder.name for folder in store.folder.parent.iterdir()] == [store.folder.name]
    assert used[0].shape == (10, 8)  # it is open


def test_other_runs_write_and_delete_meanwhile(store, monkeypatch):
    other = other_store(store, 2)
    (other.folder / "00001-gone.safetensors").symlink_to("nowhere")  # listed, and deleted before it was looked at
    store.make_room(2, 1e9)
    assert other.folder.exists()
