"""Raising at a chosen instant of a call, as a signal handler of the main thread may."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import sponge

SOURCE = str(Path(sponge.__file__).parent)


def interrupted_at(step: int, call: Callable[[], object]) -> bool:
    """Run *call* and raise ``KeyboardInterrupt`` before the bytecode of sponge with this number; False if it has fewer.

    Python delivers signals between bytecodes of the main thread; a trace function raises at just such a place.
    """
    passed = 0

    def local(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal passed
        if event == "opcode":
            passed += 1
            if passed > step:
                sys.settrace(None)
                raise KeyboardInterrupt
        return local

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        frame.f_trace_opcodes = True
        return local

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False
