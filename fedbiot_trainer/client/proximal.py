"""The proximal term of a client's loss."""

from collections.abc import Iterable

import torch


def proximal_term(
    lora: Iterable[tuple[torch.Tensor, torch.Tensor]],
    reference: Iterable[tuple[torch.Tensor, torch.Tensor]],
    scalings: Iterable[float],
) -> torch.Tensor:
    r"""
    `sum over matrices of ||s B A - s B_t A_t||_F^2`, the squared distance of the weight updates from the reference.

    With `B A - B_t A_t = U V` for `U = [B - B_t, B_t]` and `V = [A; A - A_t]`, the norm is the inner product of the
    Gram matrices `U^T U` and `V V^T`, both `2r x 2r`: no product of the weight's size is made. The factors hold
    differences, so nothing cancels when a client is still near its starting point.

    Args:
        lora (iterable of `(A, B)`): Trained factors, `(r, in_features)` and `(out_features, r)`.
        reference (iterable of `(A_t, B_t)`): The factors as received, in the same order.
        scalings (iterable of `float`): LoRA scaling `s` of each matrix.

    Returns:
        `torch.Tensor`: A float32 scalar with a gradient to every `A` and `B`.
    """
    total = torch.zeros(())
    for (a, b), (a_t, b_t), scaling in zip(lora, reference, scalings, strict=True):
        a, b, a_t, b_t = a.float(), b.float(), a_t.float(), b_t.float()
        u = torch.cat([b - b_t, b_t], dim=1)
        v = torch.cat([a, a - a_t], dim=0)
        total = total.to(a.device) + scaling**2 * ((u.mT @ u) * (v @ v.mT)).sum()
    return total
