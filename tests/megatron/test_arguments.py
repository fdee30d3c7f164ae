"""The flags of a Megatron-LM job: what they ask for, and what is refused before any process group is made."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import pytest

from amdp_plugin.megatron.arguments import add_flags, check_arguments, read_flags
from amdp_plugin.megatron.refusals import OPTIONS
from amdp_plugin.settings import read_schedule


def parse(*words: str) -> Namespace:
    return add_flags(ArgumentParser()).parse_args(words)


def arguments(**values: Any) -> Namespace:
    """Those of a Megatron-LM job, as far as they are looked at."""
    usual = dict(
        pipeline_model_parallel_size=4, data_parallel_size=1, global_batch_size=16, micro_batch_size=2, clip_grad=1.0,
        fp16=False, untie_embeddings_and_output_weights=True, rampup_batch_size=None, rerun_mode="validate_results",
        barrier_with_L1_time=True,
    )  # fmt: skip
    return Namespace(**{**usual, **values})


def test_stock_is_the_default() -> None:
    assert read_flags(parse()) is None
    assert read_flags(parse("--pipeline-schedule", "stock")) is None


def test_a_schedule_and_its_options(tmp_path: Path) -> None:
    path = tmp_path / "options.json"
    path.write_text('{"extra_in_flight": 2, "timeout_seconds": 60, "compensation": "error_feedback", "strength": 0.5}')
    settings = read_flags(parse("--pipeline-schedule", "paci", "--pipeline-schedule-options", str(path)))
    assert settings is not None
    assert (settings.name, settings.timeout_seconds) == ("paci", 60)
    made = settings.make(4, 8)
    assert made.in_flight == (6, 5, 4, 3)
    assert (made.compensation, made.strength) == ("error_feedback", 0.5)


@pytest.mark.parametrize(
    ("schedule", "text", "message"),
    [
        ("paci", '{"extra": 1}', "schedule 'paci' has no option 'extra'.*; its options are .*extra_in_flight"),
        ("paci", '{"decision": 1, "b": 2}', "no option 'decision' [(]did you mean 'decisions'[?][)], 'b'; its options"),
        ("paci", '{"extra_in_flight": "many"}', "option 'extra_in_flight' of schedule 'paci' is 'many'"),
        ("paci", "{", "is not JSON"),
        ("paci", "[]", "must hold an object with options alone"),
        ("paci", '{"name": "amdp"}', "must hold an object with options alone; --pipeline-schedule names the schedule"),
        ("stock", "{}", "needs a schedule: --pipeline-schedule .*paci"),
        ("pacy", "{}", "unknown schedule 'pacy'"),
    ],
)
def test_what_the_flags_refuse(schedule: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "options.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_flags(parse("--pipeline-schedule", schedule, "--pipeline-schedule-options", str(path)))


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"--pipeline-schedule-options nowhere\.json: No such file"):
        read_flags(parse("--pipeline-schedule", "paci", "--pipeline-schedule-options", "nowhere.json"))


def test_what_is_turned_off_is_said() -> None:
    given = arguments()
    said = check_arguments(given, read_schedule("paci", "here"))
    assert (given.rerun_mode, given.barrier_with_L1_time) == ("disabled", False)
    assert [line.split(":")[0] for line in said] == ["--rerun-mode disabled", "--no-barrier-with-level-1-timing"]


def test_a_flush_keeps_the_barriers_of_timers() -> None:
    given = arguments()
    check_arguments(given, read_schedule("1f1b", "here"))
    assert (given.rerun_mode, given.barrier_with_L1_time) == ("disabled", True)


USED = {"context_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "num_distributed_optimizer_instances": 2,
        "fp8": "hybrid", "cuda_graph_impl": "local", "iterations_to_skip": [3]}  # fmt: skip


@pytest.mark.parametrize("name", [name for refused in OPTIONS for name in refused.names])
def test_every_refused_option_is_named_with_a_reason_and_an_alternative(name: str) -> None:
    (refused,) = [refused for refused in OPTIONS if name in refused.names]
    value, given = USED.get(name, True), {"name": "paci"}
    if refused.compensated:
        check_arguments(arguments(**{name: value}), read_schedule(given, "here"))
        given["compensation"] = "error_feedback"
    with pytest.raises(ValueError) as error:
        check_arguments(arguments(**{name: value}), read_schedule(given, "here"))
    flag = "--" + name.replace("_", "-")
    wanted = f"schedule 'paci' cannot be used with {flag} {value}: {refused.why}; {refused.instead}"
    assert str(error.value) == wanted


@pytest.mark.parametrize("name", [name for refused in OPTIONS for name in refused.names])
def test_an_option_that_is_off_is_not_refused(name: str) -> None:
    off = 1 if name.endswith(("_size", "_instances")) else "none" if name == "cuda_graph_impl" else None
    for section in ("paci", {"name": "paci", "compensation": "error_feedback"}):
        check_arguments(arguments(**{name: off}), read_schedule(section, "here"))


def test_decisions_common_to_all_stages_are_refused_where_they_do_not_meet() -> None:
    tied, scaled = arguments(untie_embeddings_and_output_weights=False), arguments(fp16=True)
    with pytest.raises(ValueError, match=r"'pipedream-2bw' cannot be used with tied embeddings: .*--untie-embeddings"):
        check_arguments(tied, read_schedule("pipedream-2bw", "here"))
    check_arguments(tied, read_schedule("paci", "here"))  # it is a unit of its own there
    with pytest.raises(ValueError, match=r"'paci' cannot be used with --fp16, which scales the loss: .*--bf16"):
        check_arguments(scaled, read_schedule({"name": "paci", "decisions": "latest"}, "here"))
    for schedule in ("amdp", "1f1b", "chimera"):  # amdp: its updates then meet by themselves
        check_arguments(tied, read_schedule(schedule, "here"))
    for schedule in ("paci", "amdp", "1f1b", "chimera"):
        check_arguments(scaled, read_schedule(schedule, "here"))
    with pytest.raises(ValueError, match="tied embeddings"):
        check_arguments(tied, read_schedule({"name": "amdp", "decisions": "local"}, "here"))


def test_windows_that_a_schedule_cannot_have() -> None:
    with pytest.raises(ValueError, match=r"amdp: 7 micro-batches do not divide over 2 directions; use 6 or 8"):
        check_arguments(arguments(global_batch_size=14), read_schedule("amdp", "here"))



def test_windows_that_a_growing_batch_comes_to_are_checked_at_the_start() -> None:
    amdp = read_schedule("amdp", "here")
    with pytest.raises(ValueError, match=r"amdp: 5 micro-batches do not divide over 2 directions; use 4 or 6"):
        check_arguments(arguments(rampup_batch_size=["8", "2", "100"]), amdp)
    with pytest.raises(ValueError, match=r"amdp: 7 micro-batches do not divide"):
        check_arguments(arguments(global_batch_size=14, rampup_batch_size=[8, 8, 100]), amdp)
    check_arguments(arguments(rampup_batch_size=[8, 4, 100]), amdp)
