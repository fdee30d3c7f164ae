"""``amdp plan`` as users run it."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from amdp_plugin.cli import main
from amdp_plugin.plan import schedules

ROOT = Path(__file__).parents[2]
PACI = ["plan", "--schedule", "paci", "--stages", "4", "--micro-batches", "4"]
ONE_F_ONE_B = [*PACI, "--schedule", "1f1b"]


def amdp(*arguments: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "amdp_plugin.cli", *arguments]
    return subprocess.run(command, capture_output=True, env=environment, check=False, **options)


def test_text_by_default():
    done = amdp(*PACI, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("paci: 4 stages on 4 ranks, 1 direction, windows of 4 micro-batches")
    assert "rank 3  .    .    .    3F0  3B0  -" in done.stdout


def test_stages_of_different_weight():
    """The heavy one is the bottleneck: 4 x 3 of work every 2 x 3."""
    heavy = [*PACI, "--micro-batches", "16", "--stage-costs", "1,1,1,2", "--format", "json"]
    assert json.loads(amdp(*heavy, text=True).stdout)["utilization"] == pytest.approx(5 / 8, abs=0.01)


def test_tied_weights():
    """Units of their own, numbered after the stages; again for a further one."""
    tied = [*PACI, "--tied", "0,3", "--tied", "1,2"]
    last = amdp(*tied, "--format", "csv", text=True).stdout.splitlines()[3]
    assert last.startswith("3F0,3B0,3F1,3B1,3F2,3B2,3F3,3B3,4R0,3U0,")
    found = json.loads(amdp(*tied, "--format", "json", text=True).stdout)["tied"]
    assert [(each["unit"], each["stages"]) for each in found] == [(4, [0, 3]), (5, [1, 2])]
    assert "'0-3'" in amdp(*PACI, "--tied", "0-3", text=True).stderr


@pytest.mark.parametrize(
    "format,start",
    [("json", b"{\n"), ("csv", b"0F0,0F1,0F2,0F3,0B0,"), ("png", b"\x89PNG"), ("trace", b'{"displayTimeUnit"')],
)
def test_standard_output_holds_the_result_only(format, start, tmp_path):
    done = amdp(*PACI, "--format", format)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(start)
    out = tmp_path / "out"
    quiet = amdp(*PACI, "--format", format, "--out", str(out))
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, b"", b"")
    assert out.read_bytes() == done.stdout


def test_json_is_what_was_asked_for(capfdbinary):
    arguments = ["plan", "--schedule", "paci", "--stages", "8", "--micro-batches", "4", "--windows", "3"]
    arguments += ["--backward-ratio", "1.5", "--link-cost", "0.5", "--option", "extra_in_flight=8", "--format", "json"]
    assert main(arguments) == 0
    found = json.loads(capfdbinary.readouterr().out)
    assert (found["schedule"], found["stages"], found["micro_batches"], found["windows"]) == ("paci", 8, 4, 3)
    assert found["options"] == {"extra_in_flight": 8}
    assert found["max_version_gap"] == 4
    assert found["forwards_per_window"] == pytest.approx(4 * 2.5)


def test_compensation(capfdbinary):
    arguments = ["plan", "--schedule", "paci", "--stages", "8", "--micro-batches", "4", "--format", "json"]
    assert main([*arguments, "--compensation", "error_feedback", "--strength", "0.5"]) == 0
    found = json.loads(capfdbinary.readouterr().out)
    assert found["options"] == {"extra_in_flight": 0, "compensation": "error_feedback", "strength": 0.5}
    assert (found["compensation"], found["coefficient"]) == ("error_feedback", 0.5 * 7 / 4)
    assert found["mean_staleness_by_stage"] == [(7 - stage) / 4 for stage in range(8)]


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "Missing command"),
        (["plan"], "Missing option '--schedule'"),
        (["plam"], "No such command 'plam'"),
        ([*PACI, "--bogus", "1"], "No such option: --bogus"),
        ([*PACI, "--stages", "four"], "Invalid value for '--stages'"),
        ([*PACI, "--schedule", "pac"], "unknown schedule 'pac'; the known ones are 1f1b, "),
        ([*PACI, "--stages", "0"], "at least one stage, got 0"),
        ([*PACI, "--micro-batches", "0"], "at least one micro-batch, got 0"),
        ([*PACI, "--windows", "0"], "--windows is at least 1, got 0"),
        ([*PACI, "--backward-ratio", "0"], "--backward-ratio is above 0, got 0"),
        ([*PACI, "--backward-ratio", "inf"], "--backward-ratio is above 0, got inf"),
        ([*PACI, "--link-cost", "-1"], "--link-cost is at least 0, got -1"),
        ([*PACI, "--stage-costs", "1,1,x,1"], "--stage-costs wants numbers, as in 1,1,1,1.5, got '1,1,x,1'"),
        ([*PACI, "--stage-costs", "1,1"], "stage costs need one entry for each of 4 stages, got 2"),
        ([*PACI, "--stage-costs", "1,1,0,1"], "stage costs are numbers above 0; that of stage 2 is 0"),
        ([*PACI, "--stage-costs", "1,1,1,-1"], "stage costs are numbers above 0; that of stage 3 is -1"),
        ([*PACI, "--stage-costs", "1,nan,1,1"], "stage costs are numbers above 0; that of stage 1 is nan"),
        ([*PACI, "--backward-ratio", "1e300"], "a backward takes from 1e-09 to 1e+09"),
        ([*PACI, "--backward-ratio", "1e-12"], "a backward takes from 1e-09 to 1e+09"),
        ([*PACI, "--link-cost", "1e300"], "a message takes at most 1e+09, got 1e+300"),
        ([*PACI, "--flush-first", "-1"], "flush_first cannot be -1; it counts windows, at least 0"),
        ([*ONE_F_ONE_B, "--flush-first", "3"], "it flushes at every window anyway: leave it out"),
        ([*ONE_F_ONE_B, "--decisions", "latest"], 'all stages decide together anyway; leave out "decisions": "latest"'),
        ([*PACI, "--schedule", "PACI"], "xpipe; did you mean 'paci'?"),
        ([*PACI, "--schedule", "pipedream", "--decisions", "relayed"], "its weights are 'stashed': use "),
        ([*PACI, "--schedule", "amdp", "--tied", "0,3"], "not in 2; use a schedule whose updates meet"),
        ([*PACI, "--schedule", "chimera", "--tied", "0,3"], "the host sums the gradients of tied weights"),
        ([*PACI, "--link-cost", "nan"], "--link-cost is at least 0, got nan"),
        ([*PACI, "--format", "gif"], "'gif' is not one of"),
        ([*PACI, "--option", "extra_in_flight"], "--option wants key=value, got 'extra_in_flight'"),
        ([*PACI, "--option", "depth=3"], "has no option depth; it has extra_in_flight"),
        ([*PACI, "--option", "extra_in_flight=x"], "is a whole number, got 'x'"),
        ([*PACI, "--option", "extra_in_flight=-1"], "cannot be negative, got -1"),
        ([*PACI, "--compensation", "x"], "compensation is none or error_feedback, got 'x'"),
        ([*PACI, "--strength", "0.5"], "strength 0.5 is of \"compensation\": \"error_feedback\", which was not asked"),
        ([*PACI, "--compensation", "error_feedback", "--strength", "0"], "strength is a number above 0, got 0.0"),
        ([*PACI, "--compensation", "error_feedback", "--strength", "nan"], "strength is a number above 0, got nan"),
        ([*PACI, "--schedule", "1f1b", "--compensation", "error_feedback"], "no gradient is late (staleness 0)"),
        ([*PACI, "--out", "/nowhere/at/all.txt"], "cannot write /nowhere/at/all.txt: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(arguments, message, capfd):
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("amdp: error: ") and err.count("\n") == 1
    assert message in err


def test_a_schedule_that_breaks_its_own_bound_is_refused(capfd, monkeypatch):
    liar = replace(schedules.make("paci", 4, 4), max_gap=(0, 0, 0, 0))
    monkeypatch.setattr("amdp_plugin.plan.command.schedules.make", lambda *_, **__: liar)
    assert main(PACI) == 2
    assert "paci breaks law 5" in capfd.readouterr().err


def test_help_names_every_option(capfd):
    assert main(["plan", "--help"]) == 0
    out = capfd.readouterr().out
    options = "schedule stages micro-batches windows backward-ratio link-cost stage-costs format out"
    for option in [*options.split(), "compensation", "strength"]:
        assert f"--{option}" in out


def test_a_reader_that_stops_early_causes_no_complaint():
    command = f"{sys.executable} -m amdp_plugin.cli plan --schedule paci --stages 32 --micro-batches 64 --format csv"
    shell = f"{command} --windows 40 | head -c 10"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=environment, check=True)
    assert (done.stdout, done.stderr) == ("0F0,0F1,0F", "")


def test_a_large_grid_is_cut_with_a_hint(capfd):
    assert main(["plan", "--schedule", "paci", "--stages", "32", "--micro-batches", "32", "--windows", "4"]) == 0
    assert "more lines: see fewer --windows" in capfd.readouterr().out.splitlines()[-1]


def test_planning_needs_neither_torch_nor_matplotlib():
    code = (
        "import sys; from amdp_plugin.cli import main; main(sys.argv[1:]); "
        "heavy = {'torch', 'deepspeed', 'megatron', 'matplotlib', 'numpy'} & sys.modules.keys(); "
        "print(sorted(heavy), file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *PACI]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stderr == "[]\n"


def test_the_plan_package_imports_nothing_of_the_runtime():
    """Read from the sources, so that lazy imports count too."""
    for source in (ROOT / "amdp_plugin" / "plan").rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.split(".")[0] for name in names} & {"torch", "deepspeed", "megatron", "numpy"}, source
