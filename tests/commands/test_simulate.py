"""``sponge simulate``: the answer, what it counts, and what it says to wrong input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from sponge.commands.app import app
from sponge.commands.policies import POLICIES
from sponge.commands.simulate import run_simulations
from sponge.commands.simulate_input import SimulateSettings, parse_cores, parse_slos
from sponge.core.latency import LatencyModel
from sponge.profile import Cell, Profile
from sponge.workload import SloClass

runner = CliRunner()
MODEL = ["--model", "0.14,-0.05,0.025,0.022"]
SHORT = ["--duration", "20", "--seeds", "1"]


def simulate(*arguments: str) -> Result:
    return runner.invoke(app, ["simulate", *arguments])


def answer(*arguments: str) -> dict[str, Any]:
    result = simulate(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_model_alone_is_enough() -> None:
    """The first thing that a newcomer types: a table, and the answer in a sentence."""
    result = simulate(*MODEL, *SHORT)
    assert result.exit_code == 0, result.stderr
    assert "20 requests/s (poisson), 300 kB each over a generated LTE-like network" in result.stdout
    assert "deadlines met" in result.stdout
    assert "cores are enough for 99.9 % of the deadlines" in result.stdout
    assert "One miss of" in result.stdout


def test_search_ends_at_the_fewest_cores_that_are_enough() -> None:
    """One core less was tried and fell short: the answer is exact, not a power of two."""
    found = answer(*MODEL, *SHORT)
    needed = found["max_cores_needed"]["sponge"]
    by_cores = {row["max_cores"]: row["met_pct"] for row in found["rows"]}
    assert by_cores[needed] >= 99.9
    assert needed > 1
    assert by_cores[needed - 1] < 99.9
    assert list(by_cores) == sorted(by_cores)


def test_no_lane_of_one_core_can_serve_more_than_its_time() -> None:
    """A check by hand: 0.137 s a request on one core, a request each 0.1 s, so one core is never enough, two are.

    Without a network, at equal distances and with a second to spare, two cores meet everything, and are busy for at
    least what the requests cost.
    """
    arguments = ["--payload-kb", "0", "--arrivals", "constant", "--rate", "10", "--max-batch-size", "1", *SHORT]
    found = answer(*MODEL, *arguments, "--max-cores", "1,2")
    one, two = found["rows"]
    assert one["met_pct"] < 100 / 1.37 + 5
    assert two["met_pct"] == 100.0
    assert 1.37 * 0.98 <= two["mean_cores"] <= 2.0
    assert one["peak_cores"] == 1.0
    assert found["max_cores_needed"] == {"sponge": 2}


def test_rows_of_all_policies_meet_the_same_requests() -> None:
    """Every name works, one after the other, and the picture can be drawn of all of them."""
    arguments = [argument for name in POLICIES for argument in ("--policy", name)]
    found = answer(*MODEL, "--duration", "10", "--seeds", "2", "--max-cores", "4", *arguments)
    assert [row["policy"] for row in found["rows"]] == list(POLICIES)
    assert len({row["requests"] for row in found["rows"]}) == 1
    for row in found["rows"]:
        assert 0 <= row["met_pct_worst_seed"] <= row["met_pct"] <= 100
        assert 0 < row["mean_cores"] <= row["peak_cores"] <= 4.0
    static = {row["policy"]: row["mean_cores"] for row in found["rows"]}
    assert static["static"] == static["fifo"] == 4.0


def test_requests_lost_at_arrival_are_told_and_not_counted(tmp_path: Path) -> None:
    """A second of outage loses what is sent just before; no allocation is to blame for it."""
    log = tmp_path / "log.csv"
    log.write_text("time_s,mbps\n0,80\n3,0\n5,80\n", encoding="utf-8")
    arguments = [*MODEL, "--trace", str(log), "--rate", "10", "--duration", "12", "--seeds", "2"]
    found = answer(*arguments)
    row = found["rows"][-1]
    assert 0 < row["lost_at_arrival"] < row["requests"] / 2
    assert found["settings"]["network"] == "log.csv"
    assert found["max_cores_needed"]["sponge"] is not None
    assert row["met_pct"] == pytest.approx(100 * (1 - row["missed"] / (row["requests"] - row["lost_at_arrival"])))
    said = simulate(*arguments).stdout
    assert f"{row['lost_at_arrival']} of them" in said
    assert "they are lost whatever is done" in said


def test_when_all_are_lost_no_core_count_is_an_answer() -> None:
    """An SLO below the model's own time on any number of cores: say so, and do not search."""
    found = answer(*MODEL, "--slo", "0.03", *SHORT)
    assert found["max_cores_needed"] == {"sponge": None}
    assert [row["met_pct"] for row in found["rows"]] == [None]
    assert "every request is lost before it arrives" in simulate(*MODEL, "--slo", "0.03", *SHORT).stdout


def test_too_few_cores_are_said_to_be_that() -> None:
    """With the best that was reached, and what else would help."""
    result = simulate(*MODEL, *SHORT, "--max-cores", "1,2")
    assert "up to 2 cores are not enough for 99.9 % of the deadlines (at best" in result.stdout
    assert "--slo" in result.stdout
    assert answer(*MODEL, *SHORT, "--max-cores", "2", "--max-cores", "1")["max_cores_needed"] == {"sponge": None}


def test_rounding_never_claims_that_all_were_met() -> None:
    """With 2 misses of 100,000, "100.00 %" would be a lie."""
    settings = SimulateSettings(latency=LatencyModel(0.0, 0.0, 0.0, 0.001), duration_s=2.0, seeds=1, max_cores=(1,))
    row = run_simulations(settings).rows[0]
    assert row.met == "100.00 %"
    attributes = {
        name: getattr(row, name) for name in ("policy", "max_cores", "requests", "requests_per_s", "lost_at_arrival")
    }
    nearly = type(row)(
        **attributes,
        missed=2,
        met_pct=99.998,
        met_pct_worst_seed=99.998,
        mean_cores=1.0,
        peak_cores=1.0,
        response_s_p99=0.1,
        first=row.first,
    )
    assert nearly.met == "> 99.99 %"


def test_profile_is_simulated_with_its_samples(tmp_path: Path) -> None:
    """What was measured decides, also how large a batch may be; beyond the measured cores it says so."""
    rng = np.random.default_rng(0)
    path = tmp_path / "profile.json"
    cells = [
        Cell.of(
            batch_size=b, cores=c, lanes=1, threads=int(c), samples_s=(0.05 * b / c + 0.01) * rng.lognormal(0, 0.05, 40)
        )
        for b in (1, 2, 4)
        for c in (1.0, 2.0)
    ]
    Profile(cells=cells, model_name="m.onnx").save(path)
    found = answer(str(path), *SHORT, "--rate", "30")
    assert found["settings"]["max_batch_size"] == 4
    assert found["max_cores_needed"]["sponge"] in (2, 3)
    assert "measured on up to 2 cores" in simulate(str(path), *SHORT, "--max-cores", "2,3").stdout
    assert "measured on up to" not in simulate(str(path), *SHORT, "--max-cores", "2").stdout


def test_mixed_slos_noise_and_surges_are_taken(tmp_path: Path) -> None:
    """The options that make a workload real; the tight class needs more cores than the wide one alone."""
    surges = [*MODEL, "--duration", "60", "--seeds", "1", "--arrivals", "surges"]
    wide = answer(*surges, "--slo", "2")["max_cores_needed"]["sponge"]
    mixed = answer(*surges, "--slo", "0.3", "--slo", "2:3")
    assert [slo["weight"] for slo in mixed["settings"]["slos"]] == [1.0, 3.0]
    assert mixed["max_cores_needed"]["sponge"] > wide
    picture = tmp_path / "cores.png"
    noisy = [
        "--noise",
        "0.1",
        "--stragglers",
        "0.01",
        "--interference",
        "0.03",
        "--resize-delay",
        "0.05",
        "--payload-cv",
        "0.5",
    ]
    result = simulate(*MODEL, *SHORT, *noisy, "--max-cores", "8", "--slo", "0.5", "--slo", "1:3", "--out", str(picture))
    assert result.exit_code == 0, result.stderr
    assert "answer due 0.5 s or 1 s (weights 1 : 3) after sending" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_clients_that_wait_are_served_and_ask_for_more_the_faster_they_are() -> None:
    """The rate follows from the service, and never exceeds what Little's law allows to answers on all cores."""
    arguments = [*MODEL, *SHORT, "--clients", "20", "--think", "0.5", "--max-cores", "1,2,4", "--policy", "sponge"]
    found = answer(*arguments, "--policy", "fifo")
    assert (found["settings"]["clients"], found["settings"]["think_s"], found["settings"]["rate_rps"]) == (
        20,
        0.5,
        None,
    )
    for policy in ("sponge", "fifo"):
        rates = [row["requests_per_s"] for row in found["rows"] if row["policy"] == policy]
        assert rates == sorted(rates)
        assert rates[0] > 5
        assert rates[-1] <= 20 / (0.5 + found["settings"]["lost_below_s"]) * 1.2  # think times are random
    said = simulate(*arguments).stdout
    assert "20 clients, each again 0.5 s after its answer" in said
    assert "requests/s" in said


def test_numbers_of_the_model_in_milliseconds_are_suspected() -> None:
    """Then every request seems lost, for a reason that has nothing to do with cores."""
    hint = "Are the numbers of --model in seconds?"
    assert hint in simulate("--model", "140,-50,25,22", *SHORT).stdout
    assert hint not in simulate(*MODEL, "--payload-kb", "1e6", *SHORT).stdout


def test_same_command_gives_the_same_answer() -> None:
    """It is a simulation: no clock of this machine takes part."""
    arguments = [*MODEL, *SHORT, "--noise", "0.2", "--arrivals", "markov", "--max-cores", "4"]
    assert simulate(*arguments, "--json").stdout == simulate(*arguments, "--json").stdout


def test_high_rates_get_shorter_runs() -> None:
    """A question about 5,000 requests/s must not take minutes by default."""
    latency = LatencyModel(0.0, 0.0, 0.0, 0.0001)
    short = run_simulations(SimulateSettings(latency=latency, rate_rps=4000.0, seeds=1, max_cores=(1,)))
    assert short.duration_s == 10.0
    assert run_simulations(SimulateSettings(latency=latency, rate_rps=2.0, seeds=1, max_cores=(1,))).duration_s == 300.0


def test_typed_lists_are_read() -> None:
    """Repeated or separated by commas."""
    assert parse_cores(["2, 4", "8"]) == (2, 4, 8)
    assert parse_slos(["0.5", "1:3"]) == (SloClass(0.5, 1.0), SloClass(1.0, 3.0))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "--model 0.14"),
        (["profile.json", *MODEL], "either"),
        (["model.onnx"], "measure it first"),
        (["no-such-profile.json"], "no-such-profile.json"),
        (["--model", "0.1,0.2"], "four numbers"),
        (["--model", "a,b,c,d"], "four numbers"),
        (["--model", "-0.1,0,0,1"], "gamma_s"),
        ([*MODEL, "--trace", "no-such-log"], "no-such-log"),
        ([*MODEL, "--arrivals", "random"], "surges"),
        ([*MODEL, "--policy", "magic"], "static-lanes"),
        ([*MODEL, "--slo", "soon"], "seconds:weight"),
        ([*MODEL, "--slo", "1:0"], "seconds:weight"),
        ([*MODEL, "--rate", "-1"], "rate"),
        ([*MODEL, "--rate", "0"], "rate must be finite and above 0, got 0.0"),
        ([*MODEL, "--clients", "3", "--rate", "2"], "give clients (3) or rate 2.0"),
        ([*MODEL, "--clients", "3", "--arrivals", "bursts"], "give clients (3) or arrivals 'bursts'"),
        ([*MODEL, "--think", "2"], "--clients"),
        ([*MODEL, "--clients", "3", "--think", "-1"], "think must be finite and not negative, got -1.0"),
        ([*MODEL, "--clients", "1", "--think", "1e6", "--duration", "1"], "no request"),
        ([*MODEL, "--rate", "0.001", "--duration", "1"], "no request"),
        ([*MODEL, "--duration", "nan"], "duration"),
        ([*MODEL, "--max-cores", "two"], "whole numbers"),
        ([*MODEL, "--max-cores", "0"], "max_cores"),
        ([*MODEL, "--target", "101"], "target"),
        ([*MODEL, "--noise", "inf"], "noise"),
        ([*MODEL, "--payload-cv", "inf"], "cv"),
    ],
)
def test_wrong_input_is_told_in_one_line(arguments: list[str], word: str) -> None:
    """No traceback, nothing on standard output, status 1."""
    result = simulate(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert word in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_help_keeps_its_brackets() -> None:
    """Units and defaults are written in brackets, which a help formatter may take for markup."""
    text = " ".join(simulate("--help").stdout.split())
    assert "[s]" in text
    assert "a generated LTE-like one" in text


def test_json_has_no_value_that_json_does_not_know() -> None:
    """With nothing served there is no p99; null, not NaN."""
    row = answer(*MODEL, "--slo", "0.03", *SHORT)["rows"][0]
    assert row["response_s_p99"] is None
    assert all(value is None or isinstance(value, str) or math.isfinite(value) for value in row.values())


def test_report_shows_the_runs_with_enough_cores(tmp_path: Path) -> None:
    """The page that is passed on says what the terminal said, and how it came about."""
    page = tmp_path / "report.html"
    result = simulate(*MODEL, *SHORT, "--policy", "sponge", "--policy", "published", "--report", str(page))
    assert f"report: {page}" in result.stdout
    text = page.read_text(encoding="utf-8")
    assert "20 requests/s (poisson), 300 kB each over a generated LTE-like network" in text
    for line in result.stdout.splitlines():
        if line.startswith(("sponge:", "published:")):
            assert line in text
    assert text.count('Plotly.newPlot("plot-') == 6  # no measured over predicted: nothing was measured
    assert "published, " in text
