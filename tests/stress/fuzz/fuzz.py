"""Fuzz what reads files and texts from outside, guided by coverage (atheris, libFuzzer).

    pip install atheris                                   # part of the dev extra where there is a wheel
    python tests/stress/fuzz/fuzz.py profile --seconds 900
    python tests/stress/fuzz/fuzz.py trace crash-1234     # one input again

Each target is a function of bytes that raises for a failure only: an exception other than the documented one, or a
broken promise about what was read. The seeds are made here, from the library's own writers where there is one. It ends
with libFuzzer's counts; how many inputs were accepted and refused is said on the way. The status is 0 if none failed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import atheris  # type: ignore[import-not-found, unused-ignore]
import attrs

with atheris.instrument_imports(include=["sponge"]):
    from sponge.core.latency import LatencyModel
    from sponge.errors import TraceError
    from sponge.integrations.oip.http import parse_request
    from sponge.integrations.outcomes import InvalidRequest
    from sponge.live.cache import CacheDirectory
    from sponge.live.cgroup.hierarchy import find_cpu_mount, parse_memberships, parse_mounts
    from sponge.live.model_file import MANIFEST_NAME, MODEL_NAME, external_locations, find_saved
    from sponge.profile import Cell, Profile
    from sponge.workload import load_bandwidth

FORMATS = ("auto", "ghent", "mahimahi", "csv")
MOST_CELLS_FITTED = 8
"""Fitting takes milliseconds for each cell; the parser is what is tested."""

counts: Counter[str] = Counter()
folder = Path(tempfile.mkdtemp(prefix="sponge-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def refused(message: str, beginning: str) -> None:
    """Look at the message of an error: it names the file and does not repeat it."""
    assert message.startswith(beginning)
    assert len(message) < 1_000
    counts["refused"] += 1


def profile(data: bytes) -> None:
    """A profile is read in full or refused by a ValueError; what was read can be saved, read again and fitted."""
    path = folder / "profile.json"
    path.write_bytes(data)
    try:
        read = Profile.load(path)
    except ValueError as error:
        refused(str(error), f"{path} is not a usable profile")
        return
    counts["accepted"] += 1
    again = folder / "again.json"
    read.save(again)
    assert Profile.load(again) == read
    if len(read.cells) <= MOST_CELLS_FITTED:
        try:
            model = LatencyModel.fit(read)
        except ValueError:
            counts["not fitted"] += 1
        else:
            assert model.latency_s(1, 1.0) >= 0


def trace(data: bytes) -> None:
    """A log is read in full or refused by a TraceError that names it; uploads over it have a length."""
    path = folder / "log"
    path.write_bytes(data[1:])
    try:
        read = load_bandwidth(path, FORMATS[data[0] % len(FORMATS)] if data else "auto")  # type: ignore[arg-type]
    except TraceError as error:
        refused(str(error), str(path))
        return
    counts["accepted"] += 1
    assert 0 < read.mean_bytes_per_s < math.inf
    assert read.upload_time_s([0.0, read.end_s / 2], [1e3, 1e6]).min() >= 0


def manifest(data: bytes) -> None:
    """The list of files of a saved model: taken, or the model is saved anew."""
    saved = folder / "models" / "key"
    saved.mkdir(parents=True, exist_ok=True)
    for name in (MODEL_NAME, "weights.bin"):
        (saved / name).write_bytes(b"12345")
    (saved / MANIFEST_NAME).write_bytes(data)
    found = find_saved(CacheDirectory(path=folder), "key")
    assert found in (None, saved / MODEL_NAME)
    counts["refused" if found is None else "accepted"] += 1


def groups(data: bytes) -> None:
    """What /proc says of control groups never leads out of what is mounted."""
    memberships, _, mounts = data.decode("utf-8", "surrogateescape").partition("\0")
    location, reason = find_cpu_mount(parse_memberships(memberships), parse_mounts(mounts))
    assert (location is None) == bool(reason)
    counts["refused" if location is None else "accepted"] += 1
    if location is not None:
        top = location.mount.mount_point.rstrip("/")
        assert location.directory == top or location.directory.startswith(top + "/")
        assert ".." not in location.directory[len(top) :].split("/")


def weights(data: bytes) -> None:
    """Names of external weights in a model are bounded texts."""
    names = external_locations(data)
    assert all(0 < len(name) <= 4096 and "\0" not in name for name in names)
    counts["accepted" if names else "refused"] += 1


def fields(data: bytes) -> None:
    """As *profile*, with values of any kind in some places of a good one: deeper than bytes get by themselves."""
    source = atheris.FuzzedDataProvider(data)
    document = json.loads(_profile_seeds()[source.ConsumeIntInRange(0, 1)])
    for _ in range(source.ConsumeIntInRange(0, 3)):
        holder = document
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = source.PickValueInList(keys)
            if not isinstance(holder[key], (dict, list)) or source.ConsumeBool():
                holder[key] = _value(source, 3)
                break
            holder = holder[key]
    profile(json.dumps(document).encode())


def _value(source: atheris.FuzzedDataProvider, depth: int) -> object:
    kind = source.ConsumeIntInRange(0, 8 if depth else 6)
    if kind < 3:
        return (None, True, False)[kind]
    if kind == 3:
        return source.ConsumeInt(source.ConsumeIntInRange(0, 9))
    if kind == 4:
        return source.ConsumeFloat()
    if kind == 5:
        return source.ConsumeUnicode(20)
    if kind == 6:
        return source.PickValueInList([0, 1, -1, 2**20, 2**40, 2**63, 10**10, 1e-320, 1e300, "", "sponge-profile"])
    items = [_value(source, depth - 1) for _ in range(source.ConsumeIntInRange(0, 4))]
    return items if kind == 7 else {source.ConsumeUnicode(5): item for item in items}


def request(data: bytes) -> None:
    """The body of an inference request by HTTP: the one document that comes from clients."""
    body = data[1:]
    length = len(body) - data[0] if data and data[0] <= len(body) else len(body)  # what follows are tensors
    try:
        call, _ = parse_request(body, length, "model", "1")
    except InvalidRequest as error:
        refused(str(error), "")
        return
    counts["accepted"] += 1
    assert all(array.size <= max(1, len(body)) for array in call.inputs.values())


def _request_seeds() -> list[bytes]:
    plain = (
        b'{"id":"7","inputs":[{"name":"x","datatype":"FP32","shape":[1,2],"data":[1.5,2]}],"outputs":[{"name":"y"}]}'
    )
    text = b'{"inputs":[{"name":"s","datatype":"BYTES","shape":[2],"data":["a","b"]}],"parameters":{"timeout":5}}'
    parameters = b'"parameters":{"binary_data_size":8}'
    raw = b'{"inputs":[{"name":"x","datatype":"INT32","shape":[2],' + parameters + b"}]}" + bytes(8)
    return [b"\0" + plain, b"\0" + text, b"\x08" + raw, b'\0{"inputs":[{"name":"x","shape":' + b"[" * 900 + b"]" * 900]


def _profile_seeds() -> list[bytes]:
    cells = [
        Cell.of(batch_size=b, cores=float(c), lanes=n, threads=c, samples_s=[1e-3 * (b + i % 7) / c for i in range(20)])
        for b in (1, 2)
        for c in (1, 2)
        for n in (1, 2)
    ]
    texts = {"machine": {"cpu": "x"}, "versions": {"onnxruntime": "1"}, "notes": ("a",), "cpu_control": "threads"}
    whole = Profile(cells=cells, model_hash="00", model_name="m", input_shapes={"x": (1, 4)}, **texts)  # type: ignore[arg-type]
    one = attrs.evolve(whole, cells=cells[:1])
    deep = b'{"format":' + b"[" * 950 + b"]" * 950 + b"}"
    return [*(json.dumps(each.to_dict()).encode() for each in (whole, one)), deep, b'{"format":NaN}', b'{"a":1,"a":1}']


def _trace_seeds() -> list[bytes]:
    ghent = b"1453121790686 0 51.03 3.71 0 1000\n1453121791686 1000 51.03 3.71 300000 1000\n"
    csv = b"time_s,mbps\n0,5\n1,2.5\n2,0\n"
    mahimahi = b"1\n1\n2\n10\n"
    quoted = b'\xef\xbb\xbf"time_ms";"bytes_per_s"\r\n0;5e3\r\n'
    return [*(b"\0" + text for text in (ghent, csv, mahimahi, quoted)), b"\1" + ghent, b"\2" + mahimahi, b"\3" + csv]


def _group_seeds() -> list[bytes]:
    one = b"2:cpu,cpuacct:/docker/4f\n0::/\n\0"
    one += b"31 24 0:27 /docker/4f /sys/fs/cgroup/cpu rw,nosuid - cgroup cgroup rw,cpu,cpuacct\n"
    two = b"0::/user.slice/a\\040b\n\0" + b"30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n"
    above = b"0::/../x\n\0" + b"30 23 0:26 /.. /mnt/a\\011b ro shared:1 - cgroup2 none ro\n"
    return [one, two, above]


@attrs.frozen
class Target:
    """What is run, from which seeds, with which words."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    words: tuple[str, ...]
    longest: int = 4096


TARGETS = {
    "profile": Target(
        profile,
        _profile_seeds,
        (
            *('"format"', '"sponge-profile"', '"version"', '"model"', '"name"', '"hash"', '"input_shapes"'),
            *('"machine"', '"versions"', '"cpu_control"', '"measured_at"', '"notes"', '"cells"', '"batch_size"'),
            *('"cores"', '"lanes"', '"threads"', '"runs"', '"settled"', '"samples_us"', "true", "null", "NaN"),
            *("-Infinity", "1e999", "1e-320", "-0.0", "\\ud800", "[[[[", '{"":', "9007199254740993"),
        ),
        longest=16_384,
    ),
    "fields": Target(fields, lambda: [bytes(range(256)), bytes(64), b"\xff" * 64], ("x",), longest=512),
    "trace": Target(
        trace,
        _trace_seeds,
        (
            *("time_s", "time_ms", "bytes_per_s", "bits_per_s", "kbps", "mbps", "nan", "inf", "1e308", "1e-308"),
            *("-0", "1_0", "9999999999999", "٣", "\r\n", "\t", "#"),
        ),
    ),
    "manifest": Target(
        manifest,
        lambda: [b'{"model.onnx":5,"weights.bin":5}', b"[]", b'{"../../key/model.onnx":5}', b'{"model.onnx":1e999}'],
        ('"model.onnx"', '"weights.bin"', "../", "/", "\\u0000", "[[[[", "5", "NaN"),
    ),
    "request": Target(
        request,
        _request_seeds,
        (
            *(
                '"inputs"',
                '"outputs"',
                '"name"',
                '"datatype"',
                '"shape"',
                '"data"',
                '"parameters"',
                '"id"',
                '"timeout"',
            ),
            *('"binary_data_size"', '"binary_data"', '"binary_data_output"', '"FP32"', '"INT64"', '"BYTES"', '"BOOL"'),
            *('"FP16"', '"UINT8"', "NaN", "1e999", "-1", "9007199254740993", "true", "null", "[[[["),
        ),
    ),
    "groups": Target(groups, _group_seeds, ("cpu", "cgroup2", "cgroup", " - ", "/..", "\\040", "\\057", "::", "ro,")),
    "weights": Target(
        weights,
        lambda: [
            b"\x0a\x08location\x12\x09a/b.bin\0\0\x0a\x08location\x12\x03abc",
            b"\x0a\x08location\x12\xff\xff\x03",
        ],
        ("location", "\\x0a\\x08location\\x12"),
    ),
}


def _write_dictionary(path: Path, words: tuple[str, ...]) -> None:
    """Write words in libFuzzer's form: in quotes, everything but plain letters as ``\\xNN``."""
    escaped = ("".join(f"\\x{byte:02x}" for byte in word.encode()) for word in words)
    path.write_text("".join(f'"{word}"\n' for word in escaped))


def main() -> None:
    """Fuzz one target, or run one input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("inputs", nargs="*", help="files to run instead of fuzzing")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    options = parser.parse_args()
    target = TARGETS[options.target]
    if options.inputs:
        for name in options.inputs:
            target.run(Path(name).read_bytes())
        return
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    _write_dictionary(folder / "words", target.words)
    limits = ["-timeout=20", "-rss_limit_mb=1024", f"-max_len={target.longest}", f"-max_total_time={options.seconds}"]
    shown = [f"-dict={folder / 'words'}", f"-seed={options.seed}", "-print_final_stats=1", "-verbosity=0"]

    def run(data: bytes) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # as services may have it
            target.run(data)
        counts["inputs"] += 1
        if counts["inputs"] & (counts["inputs"] - 1) == 0:  # libFuzzer leaves without a goodbye
            print(f"{options.target}: {dict(counts)}", flush=True)

    atheris.Setup([sys.argv[0], *limits, *shown, str(corpus)], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
