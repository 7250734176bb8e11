"""Linear algebra on the weights: truncated right singular bases, of one matrix or of one for each example.

Letters: b block (convolution group), o output row, i input column, k basis vector, n example.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def wide(t: Tensor) -> Tensor:
    """In single precision at least."""
    if t.dtype is torch.complex32:
        return t.to(torch.complex64)
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def right_singular_basis(w: Tensor, k: int, *, smallest: bool = False) -> Tensor:
    """The ``k`` right singular vectors of the largest (or smallest) singular values, as rows.

    The largest come from an eigendecomposition of the Gram matrix of the smaller side: half the cost and a fraction of
    the memory of an SVD. It squares the condition number, which matters only near the smallest singular values. The
    smallest come from an SVD.

    Args:
        w: ``[b, o, i]``, any floating dtype; the arithmetic is in float32 at least.
        k: clipped to ``min(o, i)`` for the largest. For the smallest it is clipped to ``i``: the null space of a wide
            ``w`` counts, with singular value 0 (the control of Wang 4.2).

    Returns:
        ``[b, k, i]``, rows orthonormal, dtype of ``w``.

    >>> w = torch.diag(torch.tensor([3.0, 2.0, 1.0]))[None]
    >>> right_singular_basis(w, 1).abs()
    tensor([[[1., 0., 0.]]])
    """
    o, i = w.shape[-2:]
    work = wide(w)
    if smallest:
        _, _, vh = torch.linalg.svd(work, full_matrices=True)
        result: Tensor = vh[..., -min(k, i) :, :].to(w.dtype)
        return result
    k = min(k, o, i)
    if i <= o:
        _, vectors = torch.linalg.eigh(work.mT @ work)
        result = vectors[..., -k:].flip(-1).mT.contiguous().to(w.dtype)
        return result
    _, vectors = torch.linalg.eigh(work @ work.mT)
    v = work.mT @ vectors[..., -k:].flip(-1)
    # V S = W^T U: orthonormalise rather than divide by S, so that a rank-deficient W still gives an orthonormal basis.
    q, _ = torch.linalg.qr(v)
    result = q.mT.contiguous().to(w.dtype)
    return result


def refined_right_basis(w: Tensor, rows: Tensor, iterations: int = 3) -> Tensor:
    """A right singular basis, updated for weights that have moved a little: subspace iteration from the old basis, then
    Rayleigh-Ritz within it.

    It costs a fraction of a decomposition. Its quality is measured by the captured energy ``||W V||^2``, not by angles:
    these mean nothing where singular values almost coincide.

    Args:
        w: ``[b, o, i]``.
        rows: the old basis, ``[b, k, i]``, orthonormal. More rows than are used make the iteration converge faster.

    Returns:
        ``[b, k, i]``, orthonormal rows, in falling order of singular values.

    >>> w = torch.diag(torch.tensor([3.0, 2.0, 1.0]))[None]
    >>> refined_right_basis(w, right_singular_basis(w, 2)).abs()
    tensor([[[1., 0., 0.],
             [0., 1., 0.]]])
    """
    if not bool(torch.isfinite(rows).all()):  # the weights were not finite for a while
        return right_singular_basis(w, rows.shape[-2])
    work = wide(w)
    q = rows.mT.to(work.dtype)
    for _ in range(iterations):
        q, _ = torch.linalg.qr(work.mT @ (work @ q))
    image = work @ q
    _, rotation = torch.linalg.eigh(image.mT @ image)
    result: Tensor = (q @ rotation.flip(-1)).mT.contiguous().to(w.dtype)
    return result


def of_singular_values(w: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """``U f(S) V^T``: the matrix with other singular values; ``[b, o, i]`` as ``w``.

    >>> of_singular_values(torch.diag(torch.tensor([3.0, 2.0]))[None], lambda s: s**2)[0].diagonal()
    tensor([9., 4.])
    """
    work = wide(w)
    u, s, vh = torch.linalg.svd(work, full_matrices=False)
    result: Tensor = ((u * f(s)[..., None, :]) @ vh).to(w.dtype)
    return result


#: Largest smaller side of ``W`` for which each example's Gram matrix is decomposed exactly.
MAX_EXACT_SIDE = 32

#: Basis vectors beyond k in the block: in products with the active units alone, and with all units. The second
#: converge slower.
EXTRA_SPARSE, EXTRA_DENSE = 6, 10

#: Degrees of the Chebyshev filters. On a steep spectrum a higher degree turns the whole block onto its first vector.
FILTER_DEGREES = (2, 2, 2)

#: Least ratio of the filtered range's end to the largest eigenvalue. Below it, single precision keeps only the largest.
MIN_FILTER_END = 3e-3

#: Largest share of active units (``M`` not 0) for which an example's own part of ``W^T W`` is copied out.
MAX_SPARSE_SHARE = 0.75

#: Entries of the largest tensor that is formed at once: on the CPU it stays in the cache, on a GPU in memory.
MAX_ENTRIES_CPU, MAX_ENTRIES_GPU = 2**20, 2**26


def masked_right_basis(w: Tensor, m: Tensor, start: Tensor, k: int) -> Tensor:
    """The top ``k`` right singular vectors of ``W M_n``, for every example n (Wang 3.1), as rows.

    Chebyshev filters of ``M W^T W M`` act on a block of a few more than ``k`` vectors, which begins at the basis of
    ``W`` itself; Rayleigh-Ritz follows within the block. Nothing of a size that grows with ``W`` is decomposed for each
    example: products with ``W^T W`` suffice. All examples share ``W^T W``; on the CPU, and where many units are
    inactive, each example takes its rows and columns of the active units.

    The captured energy ``||W M V||^2`` is within 5e-3 of that of the exact top k. Angles mean nothing where the
    spectrum has no gap (near initialisation). The result is exact where the smaller side of ``W`` is at most 32 or, on
    the CPU, the active units are at most ``2 (k + 6)``.

    Args:
        w: ``[o, i]``.
        m: ``[n, i]``, the diagonals of ``M``.
        start: ``[k', i]``, the top right singular vectors of ``W``, best a few more than k.

    Returns:
        ``[n, k, i]``: rows orthonormal, or zero beyond the rank of ``W M_n``; in falling order of singular values.

    >>> w = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> masked_right_basis(w, torch.tensor([[0.0, 1.0, 1.0]]), torch.eye(3), 1).abs()
    tensor([[[0., 1., 0.]]])
    """
    o, i = w.shape
    k = min(k, o, i)
    work = wide(w)
    mask, start = m.to(work.dtype), start.to(work.dtype)
    most = (MAX_ENTRIES_GPU if w.is_cuda else MAX_ENTRIES_CPU) // i
    if min(o, i) <= MAX_EXACT_SIDE:
        found = [_exact_masked(work, part, k) for part in mask.split(max(1, most // min(o, i)))]
    else:
        gram, block = work.T @ work, start[: k + EXTRA_DENSE]
        size = max(1, most // max(len(block), i // 8))
        found = [_filtered_masked(gram, part, block, k) for part in mask.split(size)]
    return torch.cat(found).to(w.dtype)


def _exact_masked(w: Tensor, m: Tensor, k: int) -> Tensor:
    """``masked_right_basis`` by an eigendecomposition for each example."""
    o, i = w.shape
    wm = w * m[:, None]  # n o i
    if o > i:
        values, vectors = torch.linalg.eigh(wm.mT @ wm)
        rows = vectors[..., -k:].flip(-1).mT
        result: Tensor = rows * _is_positive(values)[..., -k:].flip(-1)[..., None]
        return result
    values, vectors = torch.linalg.eigh(wm @ wm.mT)
    scale = torch.where(_is_positive(values), values.clamp_min(torch.finfo(w.dtype).tiny).rsqrt(), 0.0)
    result = (vectors * scale[:, None])[..., -k:].flip(-1).mT @ wm
    return result


def _is_positive(values: Tensor) -> Tensor:
    """Whether each eigenvalue (rising) of a Gram matrix is above rounding."""
    return values > values[..., -1:] * 10 * values.shape[-1] * torch.finfo(values.dtype).eps


def _filtered_masked(gram: Tensor, m: Tensor, block: Tensor, k: int) -> Tensor:
    """``masked_right_basis`` by filters; ``gram``: ``W^T W``, ``block``: the vectors to begin at, ``[r, i]``."""
    n, i = m.shape
    active = m != 0
    most = i if m.is_cuda else max(k, int(active.sum(1).max()))  # on a GPU the host would wait for the count
    exact = most <= 2 * (k + EXTRA_SPARSE)
    if most > MAX_SPARSE_SHARE * i and not exact:
        return _filtered(gram, m[:, None], block * active[:, None], k, FILTER_DEGREES)
    units = active.byte().topk(most).indices  # n a: the active ones, and others up to an equal number
    m = m.gather(1, units)[:, None]
    own = gram.new_empty(n, most, most)
    for part, chosen in zip(own, units, strict=True):
        torch.index_select(gram.index_select(0, chosen), 1, chosen, out=part)
    y = torch.eye(most, dtype=m.dtype, device=m.device) if exact else block[: k + EXTRA_SPARSE, units].transpose(0, 1)
    rows = _filtered(own, m, y * (m != 0), k, () if exact else FILTER_DEGREES)
    return rows.new_zeros(n, k, i).scatter_(2, units[:, None].expand(-1, k, -1), rows)


def _filtered(gram: Tensor, m: Tensor, y: Tensor, k: int, degrees: tuple[int, ...]) -> Tensor:
    """The top ``k`` vectors after Chebyshev filters ``T_d(2 A / c - 1)`` of ``A = M gram M`` on the block ``y``
    ``[n, r, i]``.

    ``c`` lies between the k largest eigenvalues and the rest, as Rayleigh-Ritz in the block finds them before each
    filter. The last filter acts on the ``k`` largest alone."""

    def apply(y: Tensor) -> Tensor:
        return ((y * m) @ gram).mul_(m)

    y, ay, values = _rayleigh_ritz(y, apply)
    for stage, degree in enumerate(degrees, 1):
        c = torch.maximum(values[:, -1], 0.3 * values[:, k - 1])
        c = torch.maximum(c, MIN_FILTER_END * values[:, 0])
        scale = torch.where(c > 0, 2 / c, 0.0)[:, None, None]
        if stage == len(degrees):  # the others are no longer needed
            y, ay = y[:, :k], ay[:, :k]
        before, now = y, (scale * ay).sub_(y)
        for _ in range(degree - 1):
            before, now = now, apply(now).mul_(2 * scale).sub_(2 * now).sub_(before)
        y, ay, values = _rayleigh_ritz(now, apply) if stage < len(degrees) else (now, ay, values)
    y = _unit(y[:, :k])
    for _ in range(2):  # once leaves an error of eps times the squared condition number
        y = _whitening(y @ y.mT) @ y
        y = _unit(y * (y.norm(dim=-1, keepdim=True) > 0.5))  # shorter rows are beyond the rank
    return y


def _rayleigh_ritz(y: Tensor, apply: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The Ritz vectors of ``A`` in the span of the rows of ``y``, these times ``A``, and the Ritz values, falling."""
    y = _unit(y)
    ay, gram = apply(y), y @ y.mT
    inner = y @ ay.mT
    # A + shift: otherwise the directions that the block lacks would mix with those that A maps to 0.
    shift = inner.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None] + torch.finfo(y.dtype).tiny
    white = _whitening(gram)
    values, vectors = torch.linalg.eigh(white @ (inner + shift * gram) @ white.mT)
    turn = vectors.flip(-1).mT @ white
    return turn @ y, turn @ ay, values.flip(-1) - shift[..., 0]


def _unit(y: Tensor) -> Tensor:
    """Rows scaled to length 1, or left zero."""
    result: Tensor = y / y.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(y.dtype).tiny)
    return result


def _whitening(gram: Tensor) -> Tensor:
    """``L^-1`` with ``L L^T`` the Gram matrix of unit rows. Times the rows it makes them orthonormal, in their order.

    It costs a fraction of an eigendecomposition. Rows that depend on earlier ones stay short, by a ridge just above
    rounding."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, _ = torch.linalg.cholesky_ex(gram + 50 * torch.finfo(gram.dtype).eps * eye)
    result: Tensor = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
    return result


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], y: Tensor, total: Callable[[Tensor], Tensor], iterations: int = 100
) -> Tensor:
    """``A^+ y`` for a positive semi-definite ``A`` with ``y`` in its range; many systems at once.

    A direction ``p`` in which ``A`` is zero up to rounding, ``p^T A p <= 100 eps lambda p^T p`` with ``lambda`` the
    largest such quotient so far, ends the iteration: what is left of ``y`` there is rounding.

    Args:
        apply: ``v -> A v``.
        y: ``[*]``, all systems together.
        total: sums a tensor ``[*]`` over the entries of each system; the result broadcasts against ``[*]``.
        iterations: at most.

    >>> a = torch.diag(torch.tensor([4.0, 2.0, 0.0]))
    >>> conjugate_gradients(lambda v: v @ a, torch.tensor([[4.0, 4.0, 0.0]]), lambda t: t.sum(-1, keepdim=True))
    tensor([[1., 2., 0.]])
    """
    eps = torch.finfo(y.dtype).eps
    u, r = torch.zeros_like(y), y
    p, rr = r, total(y * y)
    enough = rr * (10 * eps) ** 2
    largest = torch.zeros_like(rr)
    for _ in range(iterations):
        active = rr > enough
        if not bool(active.any()):
            break
        ap, pp = apply(p), total(p * p)
        curvature = total(p * ap)
        largest = torch.where(active, torch.maximum(largest, curvature / pp), largest)
        active = active & (curvature > 100 * eps * largest * pp)
        alpha = torch.where(active, rr / curvature, 0.0)
        u, r = u + alpha * p, r - alpha * ap
        new = total(r * r)
        p = torch.where(active, r + new / rr * p, 0.0)
        rr = torch.where(active, new, 0.0)
    return u


def size_of(tangent: Tensor) -> Tensor:
    """Absolute values; entries that are not finite count as zero."""
    return tangent.abs().nan_to_num_(0.0, 0.0, 0.0)


def rounding_of(tangent: Tensor) -> float:
    """The relative size below which a tangent's entry is rounding."""
    return min(1e-5, 1e3 * torch.finfo(tangent.dtype).eps)
