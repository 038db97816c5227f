"""A few thousand damaged images; ``python -m tests.helpers.fuzz`` does as many as it is told."""

from __future__ import annotations

from imagevec.errors import IMAGE_ERROR_CODES
from tests.helpers.fuzz import damaged, outcomes, valid_images


def test_damaged_images_end_as_pixels_or_as_an_error():
    counts = outcomes(seed=0, numbers=range(2000))
    assert counts.total() == 2000
    assert set(counts) <= {"decoded", *IMAGE_ERROR_CODES}
    assert min(counts["decoded"], counts["truncated"], counts["corrupt"]) >= 50


def test_inputs_depend_on_the_seed_and_the_number():
    images = valid_images()
    assert damaged(images, 1, 2) == damaged(images, 1, 2)
    assert len({damaged(images, 1, number) for number in range(50)}) > 45
    assert damaged(images, 1, 2) != damaged(images, 2, 2)
