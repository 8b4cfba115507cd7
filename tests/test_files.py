"""Files as data: bounded, regular, private, whole; and nothing in the package that would run what it reads."""

from __future__ import annotations

import ast
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import sponge
from sponge.files import read_data, write_data

RUNS_WHAT_IT_READS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml"}
BUILT_IN = {"eval", "exec", "compile", "__import__"}
LOADERS = {("np", "load"), ("numpy", "load"), ("np", "fromfile"), ("runpy", "run_path")}


@pytest.mark.parametrize("path", sorted(Path(sponge.__file__).parent.rglob("*.py")), ids=lambda path: path.name)
def test_no_module_runs_what_it_reads(path: Path) -> None:
    """A profile, a log, a cache entry or a model from elsewhere may be wrong; it must not be able to be a program."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & RUNS_WHAT_IT_READS
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in RUNS_WHAT_IT_READS
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in BUILT_IN
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in LOADERS


def test_what_is_written_is_private_whole_and_leaves_nothing_beside(tmp_path: Path) -> None:
    """Whatever the umask is, and if the disk is full."""
    old = os.umask(0)
    try:
        write_data(tmp_path / "a", b"one")
        write_data(tmp_path / "a", b"two")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert read_data(tmp_path / "a", 3) == b"two"
    with pytest.raises(IsADirectoryError):
        write_data(tmp_path, b"three")
    assert os.listdir(tmp_path) == ["a"]
    assert [path.name for path in tmp_path.parent.iterdir() if path.name.startswith(".sponge-")] == []


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path: Path) -> None:
    """Else who may put a link there chooses which of our files is overwritten."""
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "a").symlink_to(tmp_path / "precious")
    (tmp_path / "b").hardlink_to(tmp_path / "precious")
    for name in "ab":
        write_data(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path) -> None:
    """A pipe would block the service at its start, and a device never end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(11))
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match="not a regular file"):
            read_data(path, 10)
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        read_data(tmp_path / "large", 10)
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="not a regular file"):
        read_data("/dev/zero", 10)
    assert len(os.listdir("/proc/self/fd")) == files


LOAD = """
import resource, sys
{imports}
def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak_mib()
try:
    {load}(sys.argv[1])
except {error} as error:
    assert len(str(error)) < 1_000, len(str(error))
print(peak_mib() - before)
"""
PROFILE = {"imports": "from sponge.profile import Profile", "load": "Profile.load", "error": "ValueError"}
TRACE = {
    "imports": "from sponge.workload import load_bandwidth; from sponge.errors import TraceError",
    "load": "load_bandwidth",
    "error": "TraceError",
}


@pytest.mark.parametrize(
    ("how", "unit", "size"),
    [
        (PROFILE, b"[],", 2**24 - 100),
        (PROFILE, b"[],", 2**27),
        (TRACE, b"\n", 2**27),
        (TRACE, b"\n", 2**22),
        (TRACE, b"1 ", 2**26),
        (TRACE, b"1 1 1 1 1 1\n", 2**22),
        (TRACE, b"1\n", 2**22),
    ],
    ids=range(7),
)
def test_a_large_file_takes_a_bounded_amount_of_memory(
    tmp_path: Path, how: dict[str, str], unit: bytes, size: int
) -> None:
    """Small values are where text becomes large: an empty list of three bytes takes twenty times as many."""
    path = tmp_path / "file"
    beginning = b'{"format":[' if how is PROFILE else b""
    path.write_bytes(beginning + unit * (size // len(unit)) + (b"1]}" if beginning else b""))
    done = subprocess.run(
        [sys.executable, "-c", LOAD.format(**how), str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 600
