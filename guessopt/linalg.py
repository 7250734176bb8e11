"""Linear algebra on the weights: truncated right singular bases.

Index letters: b block (convolution group), o output row, i input column, k basis vector.
"""

from __future__ import annotations

import torch
from torch import Tensor


def right_singular_basis(w: Tensor, k: int, *, smallest: bool = False) -> Tensor:
    """The ``k`` right singular vectors of the largest (or smallest) singular values, as rows.

    Args:
        w: ``[b, o, i]``, any floating dtype; worked on in float32 at least.
        k: clipped to ``min(o, i)`` for the largest; for the smallest, to ``i``: the null space of a wide ``w`` counts,
            with singular value 0 (Wang 4.2's control).

    Returns:
        ``[b, k, i]``, rows orthonormal, dtype of ``w``.

    >>> w = torch.diag(torch.tensor([3.0, 2.0, 1.0]))[None]
    >>> right_singular_basis(w, 1).abs()
    tensor([[[1., 0., 0.]]])
    """
    o, i = w.shape[-2:]
    work = w if w.dtype in (torch.float32, torch.float64) else w.float()
    if smallest:
        _, _, vh = torch.linalg.svd(work, full_matrices=True)
        return vh[..., -min(k, i) :, :].to(w.dtype)
    k = min(k, o, i)
    # The Gram matrix of the smaller side: an eigenproblem of half the cost and a fraction of the memory of an SVD. It
    # squares the condition number, which matters only to directions near the smallest singular values.
    if i <= o:
        _, vectors = torch.linalg.eigh(work.mT @ work)
        return vectors[..., -k:].flip(-1).mT.contiguous().to(w.dtype)
    _, vectors = torch.linalg.eigh(work @ work.mT)
    v = work.mT @ vectors[..., -k:].flip(-1)
    # V S = W^T U: orthonormalise rather than divide by S, so that a rank-deficient W still gives an orthonormal basis.
    q, _ = torch.linalg.qr(v)
    return q.mT.contiguous().to(w.dtype)


def refined_right_basis(w: Tensor, rows: Tensor, iterations: int = 3) -> Tensor:
    """A right singular basis brought up to date with weights that have moved a little: subspace iteration from the old
    basis, then Rayleigh-Ritz within it. A fraction of a decomposition's cost; held to the energy captured, not to
    angles, which mean nothing where singular values almost coincide.

    Args:
        w: ``[b, o, i]``.
        rows: ``[b, k, i]``, orthonormal, of the weights as they were; more rows than are used make it converge faster.

    Returns:
        ``[b, k, i]``, orthonormal rows, in falling order of singular values.

    >>> w = torch.diag(torch.tensor([3.0, 2.0, 1.0]))[None]
    >>> refined_right_basis(w, right_singular_basis(w, 2)).abs()
    tensor([[[1., 0., 0.],
             [0., 1., 0.]]])
    """
    work = w if w.dtype in (torch.float32, torch.float64) else w.float()
    q = rows.mT.to(work.dtype)
    for _ in range(iterations):
        q, _ = torch.linalg.qr(work.mT @ (work @ q))
    image = work @ q
    _, rotation = torch.linalg.eigh(image.mT @ image)
    return (q @ rotation.flip(-1)).mT.contiguous().to(w.dtype)
