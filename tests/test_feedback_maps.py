"""The products with a feedback matrix, in every shape that it may have."""

import pytest
import torch

from guessopt.feedback.maps import FeedbackMap, Form, Output
from guessopt.layout import Layout


@pytest.mark.parametrize("structure", ["auto", "position", "shared"])
@pytest.mark.parametrize("entries", [None, 20])
@pytest.mark.parametrize(
    ("shape", "maps", "positions"),
    [((5, 3, 6, 7), True, 1), ((5, 6, 4), False, 6), ((5, 4), False, 3), ((5, 9), False, 1)],
)
def test_what_b_predicts_is_what_it_foresees(
    shape: tuple[int, ...], maps: bool, positions: int, structure: str, entries: int | None
) -> None:
    """``<B e, t> = <e, B^T t>``, whatever the positions share and the output's mixtures leave out."""
    output = Output([(0, Layout.BATCH_FIRST, (5, positions, 4))], 5)
    place = FeedbackMap(Layout.BATCH_FIRST, shape, maps, output, Form(structure, entries))
    assert entries is None or place.b_shape[0] * place.b_shape[1] <= max(entries, place.b_shape[0])
    b, e, t = torch.randn(place.b_shape), torch.randn(5, positions, 4), torch.randn(shape)
    r = place.unfold(t)
    torch.testing.assert_close((place.predict(e, b) * t).sum(), (e * place.predict_tangent(r, b)).sum())
    d = torch.randn(5, positions, 4)  # and the step of B is the gradient of how well it foresees
    b.requires_grad_()
    (slope,) = torch.autograd.grad((place.predict_tangent(r, b).expand_as(d) * d).sum(), b)
    scale = 1 if place.matched else positions
    torch.testing.assert_close(place.outer(r, d) * scale, slope)


def test_cells_of_a_feature_map() -> None:
    output = Output([(0, Layout.BATCH_FIRST, (5, 10))], 5)
    shapes = {
        structure: FeedbackMap(Layout.BATCH_FIRST, (5, 3, 8, 6), True, output, Form(structure, None)).b_shape
        for structure in ("auto", "position", "shared")
    }
    assert shapes == {"auto": (4 * 4 * 3, 10), "position": (48 * 3, 10), "shared": (3, 10)}


def test_the_mean_of_a_cell() -> None:
    """What ``B e`` puts at every position of a cell is that cell's mean, however large the cell is."""
    output = Output([(0, Layout.BATCH_FIRST, (5, 10))], 5)
    for structure, shape in (("auto", (5, 3, 7, 6)), ("shared", (5, 3, 7, 6)), ("position", (5, 3, 3, 2))):
        place = FeedbackMap(Layout.BATCH_FIRST, shape, True, output, Form(structure, None))
        b, e = torch.randn(place.b_shape), torch.randn(5, 1, 10)
        torch.testing.assert_close(place.cell_means(place.predict(e, b))[:, 0], e[:, 0] @ b.T)
