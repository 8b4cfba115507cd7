"""What a queue of budgets asks of a batch, when batches run in waves.

With ``k`` lanes running batches of ``b`` side by side, request ``i`` is finished at the end of wave
``⌊i / (b·k)⌋ + 1``. In deadline order the first request of a wave is its tightest, so the whole queue asks one number
of a choice (b, k), and it depends on the product ``p = b·k`` only: ``min over waves w of s[(w − 1)·p] / w``.

`Waves` is exact and reads the whole queue; the solver needs that. `WaveSample` reads a number of deadlines that grows
with the logarithm of the queue, and errs by a few percent on the safe side far down a long one; a decision that is
taken anew at every dispatch needs no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]

IntArray: TypeAlias = npt.NDArray[np.intp]

_EXACT_WAVES = 32
"""Waves of each product that a sample reads one by one; from there on they are read in steps of 1/32, so that what is
asked of a latency is at most 3 % too strict."""
_KEPT_QUEUE = 1 << 16
"""Layouts for longer queues are made anew each time, so that one burst does not hold memory for good."""


class Waves:
    """Tightest latency per wave, and deadlines met, for a fixed set of products.

    Layouts are made when a queue of about their length is first seen, and kept: 16 bytes for each wave of each
    product, a few kilobytes for 100 requests and 16 products.

    Parameters
    ----------
    products
        Values of ``batch size · lanes``, each >= 1.
    """

    __slots__ = ("_layouts", "_products")

    def __init__(self, products: Sequence[int]) -> None:
        self._products = np.array(products, dtype=np.intp)
        self._layouts: dict[int, _Layout] = {}

    def tightest_s(self, budgets_s: FloatArray) -> FloatArray:
        """Return ``min over w of s[(w − 1)·p] / w`` for each product p [s]; ``inf`` for an empty queue.

        Parameters
        ----------
        budgets_s
            Remaining times in deadline order [s], shape ``(n,)``. Costs ``O(n · sum of 1/p)``.
        """
        count = len(budgets_s)
        return self._layout(count).tightest_s(budgets_s) if count else np.full(len(self._products), np.inf)

    def deadlines_met(self, budgets_s: FloatArray, latency_s: FloatArray) -> IntArray:
        """Count, for each product, the requests that are finished in time: ``w·l <= s``.

        Parameters
        ----------
        budgets_s
            As for `tightest_s`. Costs ``O(n · log n · sum of 1/p)``.
        latency_s
            Latency l of a wave for each product [s], shape ``(products,)``.
        """
        count = len(budgets_s)
        if not count:
            return np.zeros(len(self._products), dtype=np.intp)
        return self._layout(count).deadlines_met(budgets_s, latency_s)

    def _layout(self, count: int) -> _Layout:
        """Layout for queues of about this length: four sizes an octave, so that there are few of them."""
        shift = max(count.bit_length() - 3, 2)
        size = ((count - 1 >> shift) + 1) << shift
        layout = self._layouts.get(size)
        if layout is None:
            layout = _Layout(size, self._products)
            if size <= _KEPT_QUEUE:
                self._layouts[size] = layout
        return layout


class _Layout:
    """Where the first request of each wave stands, for all products at once, in queues of at most ``size``.

    One gather, one division and one segmented minimum then replace a Python loop over products: 3 µs against 15 for
    100 requests and 16 products.
    """

    __slots__ = ("_firsts", "_lengths", "_padding", "_products", "_starts", "_waves")

    def __init__(self, size: int, products: IntArray) -> None:
        firsts = [np.arange(0, size, product) for product in products.tolist()]
        self._products = products
        self._lengths = np.array([len(first) for first in firsts])
        self._padding = np.full(size, np.inf)
        self._firsts = np.concatenate(firsts).astype(np.intp)
        self._waves = np.concatenate([np.arange(1.0, len(first) + 1.0) for first in firsts])
        self._starts = np.concatenate(([0], np.cumsum(self._lengths)[:-1])).astype(np.intp)

    def tightest_s(self, budgets_s: FloatArray) -> FloatArray:
        padded = self._padding.copy()
        padded[: len(budgets_s)] = budgets_s
        allowed_s = padded.take(self._firsts)
        allowed_s /= self._waves
        return np.minimum.reduceat(allowed_s, self._starts)

    def deadlines_met(self, budgets_s: FloatArray, latency_s: FloatArray) -> IntArray:
        """Within a wave the deadlines ascend, so that those who meet theirs are the last ones of it."""
        late_before = budgets_s.searchsorted(np.repeat(latency_s, self._lengths) * self._waves)
        ends = np.minimum(self._firsts + np.repeat(self._products, self._lengths), len(budgets_s))
        met = np.maximum(ends - np.maximum(late_before, self._firsts), 0)
        return np.add.reduceat(met, self._starts)


class WaveSample:
    """As `Waves.tightest_s`, from ``O(log n)`` deadlines for each product.

    The first waves are read one by one. Beyond, one deadline stands for a span of waves: the earliest of the span, for
    the last wave of it, which is stricter than any of them.

    Parameters
    ----------
    products
        Values of ``batch size · lanes``, each >= 1.
    """

    __slots__ = ("_layouts", "_products")

    def __init__(self, products: Sequence[int]) -> None:
        self._products = tuple(products)
        self._layouts: dict[int, tuple[IntArray, FloatArray, IntArray]] = {}

    def tightest_s(self, deadlines: FloatArray, now: float) -> FloatArray:
        """Return the latency that a wave of each product may take [s], shape ``(products,)``.

        Parameters
        ----------
        deadlines
            Of all waiting rows in order [s], and ``inf`` as the last entry, which stands for everybody beyond; shape
            ``(rows + 1,)``.
        now
            From when on they are served [s].
        """
        firsts, waves, starts = self._layout(len(deadlines) - 1)
        allowed_s = deadlines.take(firsts, mode="clip")
        allowed_s -= now
        allowed_s /= waves
        return np.minimum.reduceat(allowed_s, starts)

    def _layout(self, count: int) -> tuple[IntArray, FloatArray, IntArray]:
        """Where to read and by how many waves to divide, in queues of up to twice the length."""
        octave = max(count, 1).bit_length()
        if octave not in self._layouts:
            spans = [_spans(-(-(1 << octave) // product)) for product in self._products]
            firsts = [(waves - 1) * product for (waves, _), product in zip(spans, self._products, strict=True)]
            starts = np.cumsum([0, *(len(first) for first in firsts[:-1])])
            lasts = np.concatenate([last for _, last in spans]).astype(np.float64)
            self._layouts[octave] = np.concatenate(firsts).astype(np.intp), lasts, starts.astype(np.intp)
        return self._layouts[octave]


def _spans(waves: int) -> tuple[IntArray, IntArray]:
    """Divide waves 1 to *waves* into spans; return the first and the last wave of each."""
    firsts = list(range(1, min(waves, _EXACT_WAVES) + 1))
    while firsts[-1] < waves and firsts[-1] >= _EXACT_WAVES:
        firsts.append(firsts[-1] + max(1, firsts[-1] // _EXACT_WAVES))
    lasts = [first - 1 for first in firsts[1:]] + [firsts[-1] + max(0, firsts[-1] // _EXACT_WAVES - 1)]
    return np.array(firsts), np.array(lasts)
