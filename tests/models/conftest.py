from __future__ import annotations

import pytest

from imagevec import Preprocessing, register_model
from tests.helpers.factories import tiny_swin, tiny_vit


@pytest.fixture(scope="session", autouse=True)
def registered() -> None:
    """Models of 32x32 pixels; a name is registered once in a process."""
    for name, factory in (("tiny_vit", tiny_vit), ("tiny_swin", tiny_swin)):
        register_model(name, factory, preprocessing=Preprocessing(resize_size=36, crop_size=32))
