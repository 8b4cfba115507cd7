"""The demo's model: the text detector that the packages of RapidOCR carry, and pages for it to read."""

from __future__ import annotations

from importlib import util
from pathlib import Path

import numpy as np
import numpy.typing as npt

INPUT_NAME = "x"
SIDE_PX = 320
PACKAGES = ("rapidocr-onnxruntime", "rapidocr")
_MODEL = "ch_PP-OCRv4_det_infer.onnx"


def detector_path() -> Path:
    """Return the path of the model, without importing the package (which would load OpenCV).

    Raises
    ------
    ImportError
        If the package is not installed, or holds no such model; says what to install.
    """
    for package in PACKAGES:
        spec = util.find_spec(package.replace("-", "_"))
        for folder in (spec.submodule_search_locations or []) if spec else []:
            path = Path(folder) / "models" / _MODEL
            if path.is_file():
                return path
    raise ImportError(
        f"the demo needs the text detector {_MODEL} of {' or '.join(PACKAGES)}, which is not installed: "
        'pip install "sponge-serving[demo]"'
    )


def pages(count: int, rng: np.random.Generator) -> list[npt.NDArray[np.float32]]:
    """Return small pages with dark lines of word-like blocks, as the detector wants them.

    Its run time does not depend on what is on the page, so that blocks do as well as letters.

    Parameters
    ----------
    count
        Number of pages.
    rng
        Where the words lie.

    Returns
    -------
    list of ndarray
        Each of shape ``(1, 3, 320, 320)``, normalised to [-1, 1].
    """
    return [_page(rng) for _ in range(count)]


def _page(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    grey = np.full((SIDE_PX, SIDE_PX), 235.0, dtype=np.float32)
    grey += rng.normal(0, 4, grey.shape).astype(np.float32)
    for top in range(16, SIDE_PX - 24, 24):
        left = 16 + int(rng.integers(0, 24))
        while left < SIDE_PX - 48:
            width = int(rng.integers(12, 48))
            strokes = rng.random((12, width)) < 0.45
            grey[top : top + 12, left : left + width][strokes] = 40.0
            left += width + int(rng.integers(6, 12))
    scaled = (grey / 255 - 0.5) / 0.5
    return np.ascontiguousarray(np.broadcast_to(scaled, (1, 3, SIDE_PX, SIDE_PX)))
