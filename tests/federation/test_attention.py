"""Attention implementations and batches without padding: the same run, computed in another way, in float64."""

import pytest
import torch
from conftest import slow, tiny_model
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, modeling_flash_attention_utils


DEFAULT_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@pytest.fixture
def flash_attn(monkeypatch):
    """
    `flash_attention_2` with the two functions of `flash_attn` in plain PyTorch, so that everything around its kernels
    runs without a GPU. Gives the set of the functions that were called.
    """
    called = set()

    def attend(q, k, v, softmax_scale, causal):
        heads_first = (x.transpose(-3, -2) for x in (q, k, v))
        mask = None
        if causal:  # the last query sees the last key
            mask = torch.ones(q.shape[-3], k.shape[-3], dtype=torch.bool).tril(k.shape[-3] - q.shape[-3])
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=softmax_scale, enable_gqa=True)
        return out.transpose(-3, -2)

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        """`(batch_size, sequence_length, num_heads, head_dim)`."""
        called.add("whole batches")
        return attend(q, k, v, softmax_scale, causal)

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
    ):
        """`(num_tokens, num_heads, head_dim)`: texts one after the other, which begin at `cu_seqlens`."""
        called.add("texts in a row")
        queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert (max(queries), max(keys)) == (max_seqlen_q, max_seqlen_k)
        texts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
        return torch.cat([attend(*text, softmax_scale, causal) for text in texts])

    utils = modeling_flash_attention_utils
    functions = flash_attn_func, flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input
    monkeypatch.setattr(utils, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *args, **kwargs: True)
    return called


def with_attention(implementation: str, model_type: str = "llama", **changes):
    model = tiny_model(model_type, dtype=torch.float64, **changes)
    model.set_attn_implementation(implementation)
    return model


def same_run(make_runner, tmp_path, one: dict, other: dict, kernels=(None, None)):
    """
    Check that two runs end with the same losses and the same client LoRA. Gives the second runner.

    Losses are summed in float32, so they may differ by its epsilon, and gradients by that share of themselves. With an
    epsilon of AdamW that does not blow up those near zero, a step of at most 1e-2 then differs by 1e-2 epsilons of
    float32: one epsilon is a hundred such steps.
    """
    summaries, loras = [], []
    for name, settings, kernel in (("one", one, kernels[0]), ("other", other, kernels[1])):
        runner = make_runner(
            output_dir=str(tmp_path / name),
            teacher_cache_dir=str(tmp_path / name),
            **{"num_rounds": 1, "adam_epsilon": 1e-3, **settings},
        )
        with sdpa_kernel(kernel or DEFAULT_KERNELS):
            summaries.append(runner.train())
        loras.append(runner.server.models.extract())
    rounding = torch.finfo(torch.float32).eps
    for name in ("adap_emu", "adap_fu"):
        expected = pytest.approx(getattr(summaries[0], name), rel=rounding)
        assert getattr(summaries[1], name) == expected
    assert loras[0].keys() == loras[1].keys()
    for key, tensor in loras[0].items():
        assert tensor.dtype == torch.float64
        assert torch.allclose(loras[1][key], tensor, rtol=0, atol=rounding), key
    attention = other["model"].config._attn_implementation
    for model in (runner.server.models.adap_emu, runner.server.models.adap_fu):
        assert model.config._attn_implementation == attention
    return runner


@pytest.mark.parametrize("model_type", ["llama", slow("qwen2"), slow("gpt_neox")])
def test_flash_attention(make_runner, tmp_path, flash_attn, model_type):
    generate = {"eval_metric": "exact_match", "eval_max_new_tokens": 3}
    one, other = (
        {"model": with_attention(implementation, model_type), **generate}
        for implementation in ("sdpa", "flash_attention_2")
    )
    same_run(make_runner, tmp_path, one, other)
    assert flash_attn == {"whole batches", "texts in a row"}  # without padding, and with it


@pytest.mark.parametrize("teacher", ["cached", slow("online")])
def test_flash_attention_in_the_alignment(make_runner, tmp_path, flash_attn, teacher):
    one, other = (
        {"model": with_attention(implementation), "teacher": teacher, "eval_drift": True}
        for implementation in ("sdpa", "flash_attention_2")
    )
    same_run(make_runner, tmp_path, one, other)
    assert flash_attn == {"whole batches", "texts in a row"}


@pytest.mark.slow
def test_flash_kernel_of_sdpa(make_runner, tmp_path):
    """The CPU's, which takes masks; CUDA's does not. It raises where it cannot be taken."""
    one, other = ({"model": with_attention("sdpa")} for _ in range(2))
    same_run(make_runner, tmp_path, one, other, (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION))


@pytest.mark.parametrize("implementation", [slow("sdpa"), "flash_attention_2"])
def test_padding_free(make_runner, tmp_path, flash_attn, implementation):
    one = {"model": with_attention("sdpa"), "max_length": None}
    other = {"model": with_attention(implementation), "max_length": None, "padding_free": True}
    runner = same_run(make_runner, tmp_path, one, other)
    clients = runner.clients["north"].train_dataset
    batch = runner.trainer.data_collator([clients[i] for i in range(3)])
    assert len(batch["input_ids"]) == 1 and (batch["position_ids"] == 0).sum() == 3 and "attention_mask" not in batch
    assert bool(flash_attn) == (implementation == "flash_attention_2")


@pytest.mark.slow
def test_packing_with_flash_attention(make_runner, tmp_path, flash_attn):
    one, other = (
        {"model": with_attention(implementation), "packing": True, "max_length": 32, "local_steps": 6}
        for implementation in ("sdpa", "flash_attention_2")
    )
    assert same_run(make_runner, tmp_path, one, other).trainer.padding_free
    assert flash_attn == {"whole batches", "texts in a row"}


def test_padding_free_needs_texts_that_are_short_enough(make_runner):
    with pytest.raises(ValueError, match="When `padding_free=True` without packing, `max_length` is not enforced"):
        make_runner(padding_free=True)
