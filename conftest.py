"""Runs every Python block of the README and the documentation: what people copy has to work.

The blocks of a document share their names and run in an empty folder. What a block takes for given (a model, a trace)
is made by an invisible block before it, an HTML comment. Where a block of text
follows, that is what it prints.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import io
import os
import tempfile
from pathlib import Path
from typing import Any

from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, SkipParser


class _Python(CodeBlockParser):
    language = "python"

    def evaluate(self, example: Example) -> None:
        """Run a block; ``await`` is allowed, as in a notebook."""
        source = "\n" * (example.line + example.parsed.line_offset) + str(example.parsed)
        code = compile(source, example.path, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            result: Any = eval(code, example.namespace)
            if inspect.iscoroutine(result):
                asyncio.run(result)
        example.namespace["_printed"] = printed.getvalue()


class _Printed(CodeBlockParser):
    language = "text"

    def evaluate(self, example: Example) -> None:
        """Compare with what the block before has printed."""
        printed = example.namespace.pop("_printed", "")
        assert str(example.parsed).strip() == printed.strip(), f"the block before prints:\n{printed}"


def _enter(namespace: dict[str, Any]) -> None:
    folder = tempfile.TemporaryDirectory()
    namespace.update({"_folder": folder, "_came_from": os.getcwd(), "_cache": os.environ.get("SPONGE_CACHE_DIR")})
    os.environ["SPONGE_CACHE_DIR"] = str(Path(folder.name) / "cache")
    os.chdir(folder.name)


def _leave(namespace: dict[str, Any]) -> None:
    os.chdir(namespace["_came_from"])
    if namespace["_cache"] is None:
        del os.environ["SPONGE_CACHE_DIR"]
    else:
        os.environ["SPONGE_CACHE_DIR"] = namespace["_cache"]
    namespace["_folder"].cleanup()


pytest_collect_file = Sybil(
    parsers=[_Python(), _Printed(), SkipParser()],
    patterns=["README.md", "docs/*.md"],
    setup=_enter,
    teardown=_leave,
).pytest()
