"""The rows of a result, and the figures derived from their seconds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BASELINE = "broadcast row-wise UDF"


@dataclass
class Row:
    """One approach on one image set with one model.

    Attributes:
        stage: ``<model>, <image set>``. Rows are compared within a stage.
        approach: Name of the approach.
        precision: Precision of the forward pass.
        workers: Number of Python worker processes.
        images: Images in one timed run.
        seconds: Duration of the timed run in each round.
        lowest_cosine: Lowest cosine to the baseline's vectors over the image set; ``None`` for rows
            that measure only the forward pass.
        lowest_centred_cosine: The same after the mean vector of the set, which all vectors share,
            is subtracted. It distinguishes images better than the plain cosine.
        batch_size: Batch size of rows that measure only the forward pass.
        required_cosine: Required minimum of ``lowest_cosine``.
        start_seconds: Seconds until the workers had loaded the model, not part of ``seconds``; only
            for peers.
    """

    stage: str
    approach: str
    precision: str
    workers: int
    images: int
    seconds: list[float] = field(default_factory=list)
    lowest_cosine: float | None = None
    lowest_centred_cosine: float | None = None
    batch_size: int | None = None
    required_cosine: float | None = None
    start_seconds: list[float] | None = None

    @property
    def is_ceiling(self) -> bool:
        return self.lowest_cosine is None

    @property
    def failure(self) -> str | None:
        """The problem with its vectors, if any."""
        if self.lowest_cosine is None or self.lowest_cosine >= (self.required_cosine or 0):
            return None
        return (
            f"{self.stage}: the lowest cosine of {self.approach!r} to {BASELINE!r} "
            f"is {self.lowest_cosine:.5f}, below {self.required_cosine}"
        )

    def compare(self, vectors: np.ndarray, reference: np.ndarray) -> None:
        """Records the cosines of its vectors to the baseline's, both ``(N, D)``."""
        mean = reference.mean(axis=0)
        self.lowest_cosine = _lowest_cosine(vectors, reference)
        self.lowest_centred_cosine = _lowest_cosine(vectors - mean, reference - mean)

    @property
    def rates(self) -> list[float]:
        """images/s in each round."""
        return [self.images / seconds for seconds in self.seconds]

    @property
    def images_per_second(self) -> float:
        return statistics.median(self.rates)


# A row, and a function that runs the approach once and returns the seconds.
Contestant = tuple[Row, Callable[[], float]]


def take_turns(contestants: list[Contestant], rounds: int) -> None:
    """Times each contestant once per round; each round starts at another one."""
    for number in range(rounds):
        print(f" round {number + 1}", flush=True)
        turn = number * len(contestants) // rounds
        for row, run in contestants[turn:] + contestants[:turn]:
            row.seconds.append(run())
            print(f"  {row.approach}, {row.workers} workers: {row.rates[-1]:.1f}/s", flush=True)


def derived(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Returns the rows with derived figures for each round; a ratio never mixes two rounds.

    ``ratio_to_baseline`` compares with the broadcast row-wise UDF, ``fraction_of_ceiling`` with the
    fastest forward pass of the same precision, and ``scaling`` with one worker.
    """
    rows = list(rows)
    return [_derived(row, [other for other in rows if other.stage == row.stage]) for row in rows]


def _derived(row: Row, stage: list[Row]) -> dict[str, Any]:
    figures: dict[str, Any] = {**vars(row), "images_per_second": row.images_per_second}
    baseline = [other for other in stage if other.approach == BASELINE]
    if baseline and row.workers == baseline[0].workers:
        figures["ratio_to_baseline"] = _ratios(row.rates, baseline[0].rates)
    alone = [
        other.rates
        for other in stage
        if other.is_ceiling and (other.precision, other.workers) == (row.precision, row.workers)
    ]
    if alone and not row.is_ceiling:
        fastest = [max(rates) for rates in zip(*alone, strict=True)]
        figures["fraction_of_ceiling"] = _ratios(row.rates, fastest)
    single = [other for other in stage if other.approach == row.approach and other.workers == 1]
    if single and row.workers > 1:
        figures["scaling"] = _ratios(row.rates, single[0].rates)
    return figures


def _ratios(rates: list[float], others: list[float]) -> list[float]:
    return [rate / other for rate, other in zip(rates, others, strict=True)]


def _lowest_cosine(vectors: np.ndarray, reference: np.ndarray) -> float:
    products = (vectors.astype(np.float64) * reference).sum(axis=1)
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(reference, axis=1)
    return float((products / norms).min())
