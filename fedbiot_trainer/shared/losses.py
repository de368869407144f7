"""The two terms of the alignment loss, as pure functions of tensors."""

from collections.abc import Callable

import torch


def hidden_state_loss(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""
    Squared distance between hidden states, relative to the teacher's size, summed over tokens:
    `sum over tokens of mean over hidden units of ((h_T - h_S) / rms(h_T))^2`.

    `rms` is taken over the hidden units of each token, so that a few tokens with huge activations do not outweigh the
    rest and the value of a token does not depend on the batch it is in.

    Args:
        student (`torch.Tensor`): `(batch_size, sequence_length, hidden_size)`.
        teacher (`torch.Tensor`): The same shape.
        mask (`torch.Tensor`): `(batch_size, sequence_length)`, non-zero where a token is not padding.

    Returns:
        `torch.Tensor`: A float32 scalar. Divide by the number of tokens for the mean.
    """
    mask = mask.bool()
    student, teacher = student[mask].float(), teacher[mask].float()
    scale = teacher.pow(2).mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((teacher - student).pow(2).mean(-1) / scale).sum()


def masked_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor,
    logits: Callable[[torch.Tensor], torch.Tensor],
    chunk_size: int = 256,
    teacher_logits: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    `KL(softmax(teacher) || softmax(student))`, summed over the tokens that are not padding.

    Logits are made of the hidden states for a few tokens at a time, and the gradient along with the value, so that no
    logits of a whole batch are ever held.

    Args:
        student (`torch.Tensor`): Hidden states that enter the output head, `(batch_size, sequence_length,
            hidden_size)`.
        teacher (`torch.Tensor`): The same shape, without gradient.
        mask (`torch.Tensor`): `(batch_size, sequence_length)`, non-zero where a token is not padding.
        logits (callable): The output head, `(num_tokens, hidden_size) -> (num_tokens, vocab_size)`. Only the hidden
            states get a gradient.
        chunk_size (`int`, *optional*, defaults to `256`): Tokens at a time.
        teacher_logits (callable, *optional*): What makes the teacher's logits, if that is not the output head. `teacher` is
            what it takes then, of any last dimension.

    Returns:
        `torch.Tensor`: A float32 scalar in nats. Divide by the number of tokens for the mean.
    """
    mask = mask.bool()
    return _ChunkedKL.apply(student[mask], teacher[mask], logits, teacher_logits or logits, chunk_size)


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, logits, logits_of_teacher, chunk_size):
        total = torch.zeros((), device=student.device)
        gradient = torch.empty_like(student)
        for states, target, slot in zip(*(x.split(chunk_size) for x in (student, teacher, gradient)), strict=True):
            states = states.detach().requires_grad_()
            with torch.enable_grad():
                student_logits = logits(states)
            teacher_logits = logits_of_teacher(target)
            q, p = student_logits.detach().softmax(-1), teacher_logits.softmax(-1)
            log_z = _log_normalizer(student_logits.detach(), q) - _log_normalizer(teacher_logits, p)
            total += torch.dot(p.flatten(), teacher_logits.sub_(student_logits.detach()).flatten()) + log_z.sum()
            if ctx.needs_input_grad[0]:
                # d KL / d logits, exactly zero where both are equal.
                slot.copy_(torch.autograd.grad(student_logits, states, q.sub_(p))[0])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, grad_output):
        return ctx.saved_tensors[0] * grad_output, None, None, None, None


def _log_normalizer(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """`logsumexp(logits)` of each row, from the likeliest entry of the softmax that was taken already."""
    return logits.amax(-1) - probabilities.amax(-1).log()
