"""Two views of a picture: of its own seed, in range, and not the same."""

from dataclasses import replace

import pytest
import torch

from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.image.views import crops, distortions
from mmssl.types import Raw

PATCHES = Patches(dim=8, size=(4, 4))
PICTURES = Raw(
    torch.rand(3, 3, 12, 16, generator=torch.Generator().manual_seed(0)),
    torch.ones(3, dtype=torch.int64),
    ["a", "b", "c"],
    seeds=torch.tensor([5, 6, 7]),
)


@pytest.mark.parametrize("views", [crops, distortions])
def test_a_view_depends_on_the_seed_of_its_picture_alone(views) -> None:
    together, moved = views(PICTURES, PATCHES), views(replace(PICTURES, seeds=torch.tensor([8, 6, 9])), PATCHES)
    alone = views(PICTURES.part(slice(1, 2)), PATCHES)
    for view, other, one in zip(together, moved, alone, strict=True):
        assert view.data.shape == PICTURES.data.shape
        assert view.data.min() >= 0
        assert view.data.max() <= 1
        assert torch.equal(view.data[1], other.data[1])
        assert torch.equal(view.data[1:2], one.data)
        assert one.ids == ["b"]
    assert not torch.equal(together[1].data[0], moved[1].data[0])
    assert not torch.equal(together[0].data, together[1].data)
    assert not (together[1].data == PICTURES.data).all(3).all(2).all(1).any()


@pytest.mark.parametrize("views", [crops, distortions])
def test_pictures_without_seeds_are_refused(views) -> None:
    with pytest.raises(ValueError, match=f"{views.__name__}: the pictures have no seeds"):
        views(replace(PICTURES, seeds=None), PATCHES)
