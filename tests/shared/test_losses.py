import pytest
import torch
import torch.nn.functional as F

from fedbiot_trainer.client.proximal import proximal_term
from fedbiot_trainer.shared.losses import hidden_state_loss, masked_kl


@pytest.fixture
def mask():
    return torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def test_hidden_state_loss_is_the_formula(mask):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    expected = 0.0
    for row in range(2):
        for column in range(4):
            if mask[row, column]:
                t, s = teacher[row, column], student[row, column]
                expected += (((t - s) / t.pow(2).mean().sqrt()) ** 2).mean()
    assert torch.allclose(hidden_state_loss(student, teacher, mask), expected)


def test_hidden_state_loss_does_not_depend_on_the_scale_of_the_model(mask):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    loss = hidden_state_loss(student, teacher, mask)
    assert torch.allclose(hidden_state_loss(1000 * student, 1000 * teacher, mask), loss)


HEAD = torch.randn(11, 8, generator=torch.Generator().manual_seed(5))


def softcapped(states):
    """An output head as Gemma's."""
    return 3.0 * torch.tanh(states @ HEAD.T / 3.0)


@pytest.mark.parametrize("chunk_size", [1, 4, 256])
def test_masked_kl_is_the_formula_and_so_is_its_gradient(mask, chunk_size):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 8, requires_grad=True), torch.randn(2, 4, 8)
    p, q = softcapped(teacher).softmax(-1), softcapped(student).softmax(-1)
    expected = ((p * (p / q).log()).sum(-1) * mask).sum()
    (expected_gradient,) = torch.autograd.grad(2 * expected, student)
    loss = masked_kl(student, teacher, mask, softcapped, chunk_size)
    (gradient,) = torch.autograd.grad(2 * loss, student)
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert torch.allclose(gradient, expected_gradient, atol=1e-5)
    assert (gradient[1, 2:] == 0).all()
    assert (gradient[0] != 0).all()


def test_masked_kl_of_equal_states_is_exactly_zero(mask):
    student = torch.randn(2, 4, 8, requires_grad=True)
    loss = masked_kl(student, student.detach(), mask, softcapped)
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


def test_padding_changes_nothing(mask):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    for loss in (hidden_state_loss, lambda *args: masked_kl(*args, softcapped)):
        before = loss(student, teacher, mask)
        changed = student.clone()
        changed[mask == 0] = 1e3
        assert torch.equal(loss(changed, teacher, mask), before)
        alone = loss(student[:1], teacher[:1], mask[:1]) + loss(student[1:, :2], teacher[1:, :2], mask[1:, :2])
        assert torch.allclose(alone, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("distance", [1.0, 1e-3], ids=["far", "near"])
def test_proximal_term_equals_the_dense_formula(dtype, distance):
    torch.manual_seed(0)
    shapes, scalings = [(4, 24, 16), (8, 16, 40)], [2.0, 0.5]
    reference = [(torch.randn(r, i).to(dtype), torch.randn(o, r).to(dtype)) for r, i, o in shapes]
    lora = [tuple((t + distance * torch.randn_like(t)).to(dtype).requires_grad_() for t in pair) for pair in reference]

    value = proximal_term(lora, reference, scalings)
    value.backward()
    gradients = [t.grad.clone() for pair in lora for t in pair]

    exact = [tuple(t.detach().double().requires_grad_() for t in pair) for pair in lora]
    dense = sum(
        F.mse_loss(s * b @ a, s * b_t.double() @ a_t.double(), reduction="sum")
        for (a, b), (a_t, b_t), s in zip(exact, reference, scalings, strict=True)
    )
    dense.backward()
    assert torch.allclose(value.double(), dense, rtol=1e-5)
    # The gradient is computed in float32; a bf16 parameter gets it rounded to bf16.
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    for gradient, pair_gradient in zip(gradients, [t.grad for pair in exact for t in pair], strict=True):
        assert gradient.dtype == dtype
        assert torch.allclose(
            gradient.double(), pair_gradient, rtol=tolerance, atol=tolerance * pair_gradient.abs().max()
        )


def test_proximal_term_at_the_reference_is_zero():
    a, b = torch.randn(4, 8), torch.randn(8, 4)
    assert proximal_term([(a, b)], [(a.clone(), b.clone())], [2.0]) == 0
