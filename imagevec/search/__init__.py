"""Neighbours and near-duplicates of feature vectors."""

from typing import Literal, get_args

Method = Literal["exact", "clustered"]
METHODS: tuple[str, ...] = get_args(Method)
