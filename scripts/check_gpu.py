"""Run what only GPUs can show, each part within a limit of its own, and write report.md and report.json.

Parts are tests of this repository, on another device. scripts/check_gpu.sh calls this with the right Python.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
EXIT_FAILED, EXIT_NO_GPU = 1, 3
AT_ONCE = max(1, min(4, (os.cpu_count() or 1) // 4))
"""Parts at a time: most of a test is the start of its ranks."""
WORKERS = max(1, min(3, (os.cpu_count() or 1) // 5))
"""Tests of a part at a time, likewise."""
PASSED, FAILED, NOT_POSSIBLE = "passed", "failed", "not possible here"


@dataclass(frozen=True)
class Part:
    """``tests`` are arguments of pytest, ``device`` is one of tests/devices.py; it may take ``limit`` seconds.

    With fewer than ``gpus`` GPUs, ranks of NCCL share one, and say that they are on different hosts.
    """

    name: str
    shows: str
    limit: float
    tests: tuple[str, ...]
    device: str = "nccl"
    gpus: int = 2


@dataclass
class Item:
    """What became of one test, or of a part as a whole; ``figures`` are what it recorded."""

    part: str
    name: str
    result: str
    seconds: float = 0.0
    reason: str = ""
    figures: dict[str, str] = field(default_factory=dict)


def named(file: str, *tests: str) -> tuple[str, ...]:
    """Tests of a file, as pytest takes them."""
    return tuple(f"{file}::{test}" for test in tests)


def resumed(file: str, *cases: str) -> tuple[str, ...]:
    return named(file, *(f"test_resumed_run_equals_the_one_that_went_on[{case}]" for case in cases))


DEEPSPEED, MEGATRON, GPU = "tests/deepspeed", "tests/megatron", "tests/gpu"
# Where norms decide, no masters in flat buffers beside the oracle: a GPU adds up a tensor in an order that depends on
# where it begins, so that they may differ by a rounding.
PARTS = (
    Part("live-update", "delayed gradients use the new weights", 60, (f"{GPU}/test_live_update.py",), "cuda", 1),
    Part("device", "the oracle on CUDA is that on the CPU, to rounding", 120, (f"{GPU}/test_one_device.py",),
         "cuda", 1),
    Part(
        "staged", "ranks on one device, over gloo, equal the oracle, late ranks and poisoned buffers included", 240,
        (f"{GPU}/test_staged.py",), "cuda", 1,
    ),
    Part("nccl", "what a wait does; ranks over NCCL equal the oracle, synchronized at every action", 300,
         (f"{GPU}/test_nccl.py", f"{GPU}/test_staged.py")),
    Part(
        "nccl-killed", "a killed rank ends the others with PipelineStallError", 120,
        ("tests/runtime/test_channels.py::test_a_killed_rank_stops_all_others",), gpus=3,
    ),
    Part("synchronizations", "hosts wait for their devices at most once a window more than stock", 300,
         (f"{GPU}/test_synchronizations.py",)),
    Part("memory", "activations in flight are those of the plan", 120, (f"{GPU}/test_memory.py",), gpus=4),
    Part("throughput", "stock, paci and amdp with a GPT that fills the GPUs", 540, (f"{GPU}/test_throughput.py",)),
    Part("jobs", "both hosts' scripts under torchrun: 1f1b prints what stock prints, others learn", 600,
         (f"{GPU}/test_jobs.py",), gpus=4),
    Part(
        "deepspeed-stock", "1f1b is stock DeepSpeed: bf16, ZeRO-1, recomputation", 300,
        (f"{DEEPSPEED}/test_stock.py", "-k", "stock and not replicas"),
    ),
    Part(
        "deepspeed-fp16", "one loss scale for all stages, that meet or are told; all skip what is broken on one", 180,
        named(
            f"{DEEPSPEED}/test_meeting.py", "test_fp16_under_1f1b_is_stock", "test_all_stages_skip_a_step_together",
            "test_all_stages_skip_a_step_without_a_meeting", "test_an_overflow_on_one_stage_is_one_of_all[1]",
            "test_a_window_that_is_broken_on_one_stage_is_skipped_by_all[latest-1]",
            "test_a_window_that_is_broken_on_one_stage_is_skipped_by_all[relayed-1]",
        ), gpus=4,
    ),
    Part(
        "deepspeed-oracle", "paci and amdp are the oracle", 240,
        named(
            f"{DEEPSPEED}/test_oracle.py", "test_paci[2-1]", "test_paci[3-4]", "test_paci[4-2]", "test_flushed[3-4]",
            "test_tuples_and_recomputation[tuples-tuples-config1]",
            "test_tuples_and_recomputation[masked-masked, recomputed-config5]",
            "test_tuples_and_recomputation[masked-masked, recomputed-config6]",
            "test_bf16_with_sums_and_masters_in_fp32[paci-sgd]", "test_bf16_reduces_in_bf16_unless_told",
            "test_zero_1[adamw]", "test_amdp[2-2-options0]", "test_amdp[4-4-options3]",
            "test_amdp_with_recomputation_by_deepspeed[config0]", "test_amdp_with_zero_1",
            "test_amdp_in_bf16_with_sums_and_masters_in_fp32",
        ), gpus=4,
    ),
    Part(
        "deepspeed-late", "so are decisions, error feedback, other weights and tied weights", 240,
        (
            *named(
                f"{DEEPSPEED}/test_oracle.py", "test_clipping_by_what_is_known_of_all_stages[paci-3-2]",
                "test_clipping_by_what_is_known_of_all_stages[amdp-4-8]", "test_clipping_by_relayed_decisions[4-4]",
                "test_relayed_decisions_and_other_options[options2-2]", "test_error_feedback[3-2]",
                "test_error_feedback_under_amdp[bf16]",
            ),
            *named(
                f"{DEEPSPEED}/test_other_weights.py", "test_versions_of_weights[pipedream-2bw-4-4-masked]",
                "test_extrapolated_weights[sgd-schedule1-3-2-recomputed]",
                "test_extrapolated_masters[pipemare-bf16-1]", "test_extrapolated_masters[xpipe-bf16-1]",
            ),
            *named(
                f"{DEEPSPEED}/test_tied.py", "test_paci[3-2]", "test_masters[2-1-ZeRO-1]",
                "test_relayed_decisions[3-1-fp32]", "test_relayed_decisions_about_nothing[more0]",
                "test_error_feedback[bf16]",
                "test_an_evaluation_sees_one_weight_and_changes_nothing[fp32]",
            ),
        ), gpus=4,
    ),
    Part(
        "deepspeed-resume", "resumed and evaluated runs go on as if nothing had been", 300,
        (
            *resumed(
                f"{DEEPSPEED}/test_checkpoints.py", "paci", "paci, recomputation", "paci, buffers", "paci, bf16",
                "1f1b", "amdp", "amdp, bf16", "error feedback, amdp, bf16", "flushed first, saved before", "latest",
                "relayed", "relayed, bf16", "pipemare", "xpipe",
            ),
            *named(f"{DEEPSPEED}/test_checkpoints.py", "test_evaluation_changes_nothing[paci]",
                   "test_evaluation_changes_nothing[error feedback, amdp]"),
        ), gpus=4,
    ),
    Part(
        "megatron-stock", "1f1b is stock Megatron: bf16, fp16, recomputation", 300,
        (f"{MEGATRON}/test_stock.py", "-k", "stock and not parallel and not data"), gpus=4,
    ),
    Part(
        "megatron-oracle", "paci and amdp are the oracle", 180,
        named(
            f"{MEGATRON}/test_oracle.py", "test_paci[2-1]", "test_paci[3-3]", "test_paci[4-2]", "test_paci[4-6]",
            "test_amdp[2-2-options0]", "test_amdp[4-2-options2]", "test_amdp[4-4-options3]", "test_amdp[4-8-options4]",
        ), gpus=4,
    ),
    Part(
        "megatron-late", "so are decisions, error feedback, other weights and tied weights", 240,
        (
            *named(
                f"{MEGATRON}/test_oracle.py", "test_clipping[paci-latest-nothing]",
                "test_clipping[paci-relayed-nothing]", "test_relayed_decisions[3-3]",
                "test_relayed_decisions_with_masters_and_parts[distributed optimizer-bf16]", "test_error_feedback[3-2]",
                "test_error_feedback_with_masters_and_parts[amdp-4-1--bf16]",
            ),
            *named(
                f"{MEGATRON}/test_other_weights.py", "test_versions_of_weights[pipedream-2bw-3-2]",
                "test_extrapolated_weights[schedule1-3-2]", "test_extrapolated_masters_and_parts[xpipe-3-1--bf16]",
            ),
            *named(
                f"{MEGATRON}/test_tied.py", "test_paci[3-3]", "test_bf16_with_sums_and_masters_in_fp32[1-]",
                "test_relayed_decisions[3-2]", "test_an_evaluation_sees_one_weight_and_changes_nothing",
            ),
        ), gpus=4,
    ),
    Part(
        "megatron-resume", "resumed and evaluated runs go on as if nothing had been; one loss scale", 300,
        (
            *resumed(
                f"{MEGATRON}/test_checkpoints.py", "paci-torch", "amdp-torch", "paci, bf16-torch",
                "error feedback, bf16-torch", "pipemare-torch", "xpipe-torch",
            ),
            *named(f"{MEGATRON}/test_checkpoints.py",
                   "test_evaluations_see_the_plain_iterate_and_change_nothing[paci]",
                   "test_evaluations_see_the_plain_iterate_and_change_nothing[amdp, bf16]"),
            *named(
                f"{MEGATRON}/test_loss_scale.py", "test_all_stages_skip_and_rescale_together[amdp, four stages]",
                "test_all_stages_skip_and_rescale_together[amdp, distributed optimizer]",
                "test_all_stages_skip_and_rescale_without_a_meeting[2-2]",
                "test_all_stages_skip_and_rescale_without_a_meeting[3-4, tied]",
                "test_all_stages_skip_and_rescale_without_a_meeting[3-4, distributed]",
            ),
        ), gpus=4,
    ),
)  # fmt: skip


def run_part(part: Part, out: Path, gpus: int) -> list[Item]:
    """The items of ``part``; its output is kept in ``out``."""
    device = "nccl-shared" if part.device == "nccl" and gpus < part.gpus else part.device
    results, log = out / f"{part.name}.xml", out / f"{part.name}.log"
    results.unlink(missing_ok=True)  # of an earlier run
    command = [sys.executable, "-m", "pytest", "-v", "-n", str(WORKERS), "-p", "no:cacheprovider",
               f"--junitxml={results}", *part.tests]  # fmt: skip
    began = time.monotonic()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "AMDP_TEST_DEVICE": device}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(part.limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its ranks, too
            process.wait()
            reason = f"did not end within its limit of {part.limit:g} s; see {log.name}"
            return [*read_log(part.name, log), Item(part.name, part.name, FAILED, time.monotonic() - began, reason)]
    items = read_results(part.name, results) if results.exists() else []
    if not items or (code and all(item.result != FAILED for item in items)):
        reason = f"pytest ended with {code} and {len(items)} results; see {log.name}"
        items.append(Item(part.name, part.name, FAILED, time.monotonic() - began, reason))
    return items


def read_log(part: str, log: Path) -> list[Item]:
    """What pytest has said of tests, where it did not come to its report."""
    told = re.findall(r"^\[gw\d+\] \[ *\d+%\] ([A-Z]+) \S+::(.+?) *$", log.read_text(), re.MULTILINE)
    results = {"PASSED": PASSED, "SKIPPED": NOT_POSSIBLE}
    return [Item(part, name, results.get(result, FAILED), reason=f"see {log.name}") for result, name in told]


def read_results(part: str, results: Path) -> list[Item]:
    """What pytest's report (JUnit XML) says of every test."""
    items = []
    for case in ElementTree.parse(results).iter("testcase"):
        item = Item(part, str(case.get("name")), PASSED, float(case.get("time", 0)))
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                item.result = NOT_POSSIBLE if child.tag == "skipped" else FAILED
                item.reason = str(child.get("message", ""))
        item.figures = {str(each.get("name")): str(each.get("value")) for each in case.iter("property")}
        items.append(item)
    return items


def write_report(out: Path, machine: str, items: Sequence[Item]) -> None:
    """After every part, so that a machine that is taken away leaves what was found."""
    (out / "report.json").write_text(json.dumps({"machine": machine, "items": list(map(asdict, items))}, indent=2))
    head = "| part | item | result | s | figures, or why |"
    lines = ["# Checked on GPUs", "", machine, "", head, "|---|---|---|---|---|"]
    for item in items:
        figures = ", ".join(f"{name} {value}" for name, value in item.figures.items())
        remark = " ".join(f"{figures} {item.reason}".split()).replace("|", "/")[:300]
        lines.append(f"| {item.part} | {item.name.replace('|', '/')} | {item.result} | {item.seconds:.1f} | {remark} |")
    (out / "report.md").write_text("\n".join(lines) + "\n")


def run_all(parts: Sequence[Part], out: Path, machine: str, gpus: int, at_once: int = 1) -> int:
    """Run ``parts``, ``at_once`` at a time; the exit code is not 0 where an item failed."""
    out.mkdir(parents=True, exist_ok=True)
    items: list[Item] = []

    def run(part: Part) -> tuple[Part, list[Item]]:
        print(f"check_gpu: {part.name} (at most {part.limit:g} s): {part.shows}", flush=True)
        return part, run_part(part, out, gpus)

    with ThreadPoolExecutor(at_once) as pool:
        for done in as_completed([pool.submit(run, part) for part in parts]):
            part, found = done.result()
            items += found
            counts = Counter(item.result for item in found)
            summary = ", ".join(f"{count} {result}" for result, count in counts.items())
            print(f"check_gpu: {part.name}: {summary}", flush=True)
            write_report(out, machine, items)
    print(f"check_gpu: {out / 'report.md'}")
    return EXIT_FAILED if any(item.result == FAILED for item in items) else 0


def choose(names: Sequence[str]) -> list[Part]:
    """The parts of these names, all by default.

    Raises:
        ValueError: naming those that do not exist.
    """
    unknown = sorted(set(names) - {part.name for part in PARTS})
    if unknown:
        known = ", ".join(part.name for part in PARTS)
        raise ValueError(f"--only: no part is named {', '.join(unknown)}; there are {known}")
    return [part for part in PARTS if not names or part.name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_report"), help="folder of the report (%(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these parts alone")
    parser.add_argument("--at-once", type=int, default=AT_ONCE, metavar="N", help="parts at a time (%(default)s)")
    parser.add_argument("--list", action="store_true", help="name all parts, and run none")
    chosen = parser.parse_args(arguments)
    try:
        parts = choose(chosen.only)
    except ValueError as error:
        parser.error(str(error))
    if chosen.list:
        for part in parts:
            print(f"{part.name:18} {part.gpus} GPU, {part.limit:4g} s  {part.shows}")
        return 0
    import torch

    gpus = torch.cuda.device_count()
    if not torch.cuda.is_available() or gpus == 0:
        print("check_gpu: torch sees no GPU on this machine, so nothing was checked", file=sys.stderr)
        return EXIT_NO_GPU
    version = ".".join(map(str, sys.version_info[:3]))
    machine = f"{gpus} x {torch.cuda.get_device_name(0)}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    return run_all(parts, chosen.out.resolve(), f"{machine}, Python {version}", gpus, chosen.at_once)


if __name__ == "__main__":
    sys.exit(main())
