"""The command line, as users start it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sponge
from sponge.commands.app import app
from sponge.profile import Profile
from tests.live import models

runner = CliRunner()

UNPRIVILEGED_DOCTOR = """
import contextlib, io, os
from sponge.commands.app import app
with contextlib.redirect_stdout(io.StringIO()):
    app(["doctor"], standalone_mode=False)
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
app(["doctor", "--json"])
"""
"""The first time loads everything, as the interpreter may lie where only root can read."""


def test_version() -> None:
    """Asked for by every bug report."""
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.strip() == f"sponge {sponge.__version__}"


def test_python_m_sponge_lists_the_commands() -> None:
    """Also where the script's directory is not on the path."""
    result = subprocess.run([sys.executable, "-m", "sponge", "--help"], capture_output=True, text=True, check=True)
    for command in ("demo", "profile", "doctor"):
        assert command in result.stdout


def test_without_typer_it_says_what_to_install() -> None:
    """The command line is an extra; its absence is told in one line, not in a traceback."""
    code = "import sys; sys.modules['typer'] = None; from sponge.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert 'pip install "sponge-serving[cli]"' in result.stderr
    assert "Traceback" not in result.stderr


def test_doctor_explains_and_gives_json() -> None:
    """One for people, one for bug reports and scripts."""
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "onnxruntime" in result.stdout
    assert "sponge will limit" in result.stdout
    found = json.loads(runner.invoke(app, ["doctor", "--json"]).stdout)
    assert found["sponge"] == sponge.__version__
    assert found["packages"]["numpy"]
    assert found["cpu_control"]["uses"] in ("quota", "threads")


def test_doctor_runs_unprivileged() -> None:
    """A user who may set nothing is the one who needs the explanation."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/nonexistent"}
    command = [sys.executable, "-c", UNPRIVILEGED_DOCTOR]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    control = json.loads(result.stdout)["cpu_control"]
    assert control["user_id"] != 0
    if control["uses"] == "threads":
        assert control["reason"]
        assert control["advice"]


def test_profile_measures_saves_and_gives_json(tmp_path: Path) -> None:
    """What is printed, and what a scheduler can load later."""
    model = models.save(models.identity(), tmp_path / "identity.onnx")
    out = tmp_path / "profile.json"
    picture = tmp_path / "profile.png"
    arguments = ["profile", str(model), "--max-cores", "1", "--max-batch", "2", "--budget-s", "1"]
    result = runner.invoke(app, [*arguments, "--out", str(out), "--plot", str(picture), "--json"])
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert {cell["batch_size"] for cell in printed["cells"]} == {1, 2}
    assert all(cell["latency_s_p50"] > 0 for cell in printed["cells"])
    assert printed["latency_model"]["form"] in ("four-term", "table")
    assert Profile.load(out).model_name == "identity.onnx"
    assert picture.read_bytes().startswith(b"\x89PNG")
    plain = runner.invoke(app, arguments)
    assert plain.exit_code == 0
    assert "p99 ms" in plain.stdout
    assert "In short:\n- A request by itself takes" in plain.stdout
    assert "--out profile.json" in plain.stdout.splitlines()[-1]  # a minute of measuring is gone otherwise


def test_profile_says_what_to_do_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that it names runs as it is written."""
    monkeypatch.chdir(tmp_path)
    model = models.save(models.identity(), tmp_path / "identity.onnx")
    arguments = ["--max-cores", "1", "--max-batch", "2", "--budget-s", "1", "--out", "my profile.json"]
    said = runner.invoke(app, ["profile", str(model), *arguments]).stdout.splitlines()[-1]
    command = shlex.split(said.partition("you need: ")[2])
    assert command == ["sponge", "simulate", "my profile.json"]
    assert runner.invoke(app, [*command[1:], "--duration", "5"]).exit_code == 0


@pytest.mark.parametrize("option", ["--out", "--plot"])
def test_profile_that_could_not_be_saved_is_not_measured(tmp_path: Path, option: str) -> None:
    """After a minute of measuring it is late to hear that there is no such directory."""
    model = models.save(models.identity(), tmp_path / "identity.onnx")
    result = runner.invoke(app, ["profile", str(model), "--budget-s", "1", option, str(tmp_path / "none" / "p.json")])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert f"there is no directory {tmp_path / 'none'}" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["profile", "no-such-model.onnx"], "no-such-model.onnx"),
        (["profile", "model.onnx", "--shape", "x"], "images=1,3,640,640"),
        (["simulate", "no-such.json"], "sponge profile model.onnx --out no-such.json"),
        (["demo", "--trace", "no-such-log"], "no-such-log"),
        (["demo", "--arrivals", "random"], "arrivals"),
        (["demo", "--out", "none/p.png"], "there is no directory"),
        (["demo", "--report", "none/p.html", "--out", "p.png"], "there is no directory"),
        (["simulate", "--model", "0.14,-0.05,0.025,0.022", "--out", "none/p.png"], "there is no directory"),
        (["demo", "--slo", "-1"], "slo_s"),
    ],
)
def test_errors_are_told_in_one_line(arguments: list[str], word: str) -> None:
    """A wrong path or number is no reason for a traceback; the status tells scripts."""
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert word in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_demo_runs_from_end_to_end(tmp_path: Path) -> None:
    """The newcomer's first command: a real model, every policy, one table, one picture."""
    picture, page = tmp_path / "demo.png", tmp_path / "demo.html"
    trace = tmp_path / "log.csv"
    trace.write_text("time_s,mbps\n0,30\n1,4\n2,25\n", encoding="utf-8")
    arguments = ["demo", "--duration", "1", "--rate", "6", "--slo", "5", "--profile-s", "2", "--trace", str(trace)]
    result = runner.invoke(
        app, [*arguments, "--max-cores", "1", "--out", str(picture), "--report", str(page), "--json"]
    )
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed["settings"]["requests"] == 6
    assert printed["settings"]["network"] == "log.csv"
    names = [policy["policy"] for policy in printed["policies"]]
    assert names[0] == "static, FIFO, one by one"
    assert names[-1] == "sponge"
    for policy in printed["policies"]:
        assert policy["requests"] == 6
        ended = policy["deadlines_met"] + policy["late"] + policy["rejected"]
        assert ended == 6
        assert policy["failed"] == 0
        assert policy["core_seconds_allocated"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text(encoding="utf-8")
    assert all(f"<th>{name}</th>" in text for name in names)
    assert f"<tr><td>requests</td>{'<td>6</td>' * len(names)}</tr>" in text


def test_demo_prints_its_settings_and_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is hidden: what was chosen stands above what came of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["demo", "--duration", "1", "--rate", "3", "--slo", "5", "--profile-s", "2", "--max-cores", "1"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert "3 pages in 1 s" in result.stdout
    assert "core-seconds allocated" in result.stdout
    assert (tmp_path / "sponge-demo.png").is_file()
