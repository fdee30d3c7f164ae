"""Seconds per step of stock DeepSpeed 1F1B and of this package's schedules, in turn, in one run.

    python scripts/bench_pipeline.py --compute real --stages 2 --micro-batches 2
    python scripts/bench_pipeline.py --compute sleep --stages 8 --micro-batches 8 --forward-milliseconds 20

``real`` computes matrix products, one thread a rank. ``sleep`` emulates devices: forwards and backwards only take
their time, engines and messages are real, so that there can be more stages than cores. All engines live in the same
processes and take turns, repetition after repetition; every figure is the median over the repetitions.
"""

import argparse
import itertools
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from bench_layers import BATCH, HIDDEN, TINY, MatmulLayers, SleepLayer, layers_for, mean_square
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

import amdp_plugin
from amdp_plugin.compare.machine import cores, describe, others_seconds
from amdp_plugin.compare.measured import Run
from amdp_plugin.compare.recording import STOCK, RankRecord, read_records
from amdp_plugin.compare.table import by_rank
from amdp_plugin.deepspeed.record import Recorder
from amdp_plugin.plan import schedules

GROUP_TIMEOUT = timedelta(minutes=5)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compute", choices=("real", "sleep"), default="real", help="what a stage does (%(default)s)")
    parser.add_argument("--stages", type=int, default=2, help="stages, one process each (%(default)s)")
    parser.add_argument("--micro-batches", type=int, default=4, help="micro-batches of a step (%(default)s)")
    parser.add_argument(
        "--forward-milliseconds", type=float, default=20.0, help="of one stage and micro-batch (%(default)s)"
    )
    parser.add_argument(
        "--backward-ratio", type=float, default=2.0, help="with sleep: time of a backward, in forwards (%(default)s)"
    )
    parser.add_argument(
        "--last-stage", type=float, default=1.0, metavar="FACTOR", help="weight of the last stage (%(default)s)"
    )
    parser.add_argument(
        "--gradient-clipping", type=float, default=0.0, metavar="NORM", help="to clip by; 0 for none (%(default)s)"
    )
    parser.add_argument(
        "--decisions", default="auto", help="of schedules that run freely: auto, local, latest, relayed or meeting"
    )
    parser.add_argument("--tied", action="store_true", help="let the first and the last stage share a weight")
    parser.add_argument(
        "--engines",
        nargs="+",
        default=[STOCK, "1f1b", "paci"],
        help=f"{STOCK}, and names of schedules; the first is what the others are compared with (%(default)s)",
    )
    parser.add_argument("--steps", type=int, default=15, help="steps of one engine's turn (%(default)s)")
    parser.add_argument("--repetitions", type=int, default=5, help="turns of every engine (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    arguments = parser.parse_args()
    for name, least in (("stages", 2), ("micro_batches", 1), ("steps", 6), ("repetitions", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')} is at least {least}, got {getattr(arguments, name)}")
    if min(arguments.forward_milliseconds, arguments.backward_ratio, arguments.last_stage) <= 0:
        parser.error("--forward-milliseconds, --backward-ratio and --last-stage are above 0")
    return arguments


def layer_specs(arguments: argparse.Namespace, layers_per_stage: int) -> list[LayerSpec]:
    """One a stage; all of equal weight, but for the last."""
    factors = [1.0] * (arguments.stages - 1) + [arguments.last_stage]
    real = arguments.compute == "real"

    def spec(stage: int, *sizes: float) -> LayerSpec:
        kind = MatmulLayers if real else SleepLayer
        if arguments.tied and stage in (0, arguments.stages - 1):
            return TiedLayerSpec("ends", kind, *sizes, tied_weight_attr="0.linear.weight" if real else "weight")
        return LayerSpec(kind, *sizes)

    if real:
        return [spec(stage, round(layers_per_stage * factor)) for stage, factor in enumerate(factors)]
    seconds = [arguments.forward_milliseconds / 1e3 * factor for factor in factors]
    return [spec(stage, forward, forward * arguments.backward_ratio) for stage, forward in enumerate(seconds)]


def make_engine(name: str, arguments: argparse.Namespace, layers_per_stage: int) -> Any:
    """This rank's stage of stock DeepSpeed, or of the schedule ``name``."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": arguments.micro_batches,
        "gradient_clipping": arguments.gradient_clipping,  # the exact norm is one more place where stock stages meet
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 1e-4}},
    }
    if name != STOCK:
        weights = [1.0] * (arguments.stages - 1) + [arguments.last_stage]
        config["pipeline"] = {"schedule": {"name": name, "stage_costs": weights}}
        if not schedules.make(name, arguments.stages, arguments.micro_batches).flush:
            config["pipeline"]["schedule"]["decisions"] = arguments.decisions
    model = PipelineModule(
        layer_specs(arguments, layers_per_stage),
        num_stages=arguments.stages,
        loss_fn=mean_square,
        partition_method="uniform",
    )
    return amdp_plugin.initialize(model=model, config=config, model_parameters=list(model.parameters()))[0]


def micro_batches(arguments: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """The same micro-batch for ever."""
    shape = (BATCH, HIDDEN) if arguments.compute == "real" else (1, TINY)
    return itertools.repeat((torch.randn(shape), torch.zeros(shape)))


def run_rank(rank: int, arguments: argparse.Namespace, layers_per_stage: int, directory: Path) -> None:
    """All engines in turn, on one rank. Writes a record for each."""
    log = os.open(directory / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT, 0o666)
    os.dup2(log, sys.stdout.fileno())
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(arguments.stages))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=arguments.stages,
        timeout=GROUP_TIMEOUT,
    )
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    recorders = {}
    for name in arguments.engines:
        torch.manual_seed(rank)
        engine = make_engine(name, arguments, layers_per_stage)
        engine.set_dataiterator(micro_batches(arguments))
        recorders[name] = engine, Recorder(engine)
    for _ in range(arguments.repetitions):
        for engine, recorder in recorders.values():
            dist.barrier()
            for _ in range(arguments.steps):
                recorder.call("train_batch", engine.train_batch)
    for name, (_, recorder) in recorders.items():
        recorder.record().write(directory / name)
    dist.barrier()


def turns(name: str, records: list[RankRecord], arguments: argparse.Namespace) -> list[Run]:
    """One run for every turn of an engine."""
    firsts = range(0, arguments.repetitions * arguments.steps, arguments.steps)
    return [
        Run(name, [replace(record, steps=record.steps[first : first + arguments.steps]) for record in records])
        for first in firsts
    ]


def figures(runs: dict[str, list[Run]]) -> list[dict[str, Any]]:
    """For every engine, the medians over its turns. Ratios are taken within a repetition."""
    baseline = next(iter(runs.values()))
    costs = [turn.costs() for turn in baseline]
    found = []
    for name, own in runs.items():
        seconds = [turn.seconds_per_step for turn in own]
        predicted = [turn.predicted_seconds(cost) for turn, cost in zip(own, costs, strict=True)]
        ratios = {f"{name} / {other}": speed(own, turns) for other, turns in runs.items() if other != name}
        found.append(
            {
                "engine": name,
                "seconds_per_step": median(seconds),
                "seconds_per_step_by_repetition": seconds,
                "predicted_seconds_per_step": median(predicted),
                "predicted_by_measured": median(p / s for p, s in zip(predicted, seconds, strict=True)),
                "speed": ratios,
                "waiting_share_by_rank": by_rank([turn.waiting_share_by_rank for turn in own]),
                "running_share_by_rank": by_rank([turn.running_share_by_rank for turn in own]),
                "peak_in_flight_by_rank": own[-1].peak_in_flight_by_rank,
                "largest_gap": own[-1].largest_gap,
                "costs_milliseconds": costs_of(own),
            }
        )
    return found


def speed(own: list[Run], others: list[Run]) -> float:
    """How many times as fast as another engine; the median over the repetitions."""
    return median(other.seconds_per_step / mine.seconds_per_step for mine, other in zip(own, others, strict=True))


def costs_of(turns_of_engine: list[Run]) -> dict[str, float]:
    """Milliseconds of a forward, backward, update (mean of the stages) and message, as this engine took them."""
    all_costs = [turn.costs() for turn in turns_of_engine]

    def mean_median(kind: str) -> float:
        return 1e3 * median(sum(getattr(costs, kind)) / costs.num_stages for costs in all_costs)

    found = {kind: mean_median(kind) for kind in ("forward", "backward", "update")}
    return {**found, "message": 1e3 * median(costs.link_latency for costs in all_costs)}


def show(found: list[dict[str, Any]]) -> None:
    """Print the figures."""
    titles = f"{'engine':<8} {'s/step':>8} {'min':>8} {'max':>8} {'predicted':>10} {'pred/meas':>10}"
    print(f"{titles}  forward backward update message [ms]")
    for row in found:
        every, costs = row["seconds_per_step_by_repetition"], row["costs_milliseconds"]
        print(
            f"{row['engine']:<8} {row['seconds_per_step']:8.4f} {min(every):8.4f} {max(every):8.4f} "
            f"{row['predicted_seconds_per_step']:10.4f} {row['predicted_by_measured']:10.3f}  "
            f"{costs['forward']:7.2f} {costs['backward']:8.2f} {costs['update']:6.2f} {costs['message']:7.2f}"
        )
    print()
    for row in found:
        print("   ".join(f"{pair}: {ratio:.3f}" for pair, ratio in row["speed"].items()))
    print()
    for row in found:
        waiting = " ".join(f"{share:.1%}" for share in row["waiting_share_by_rank"])
        in_flight = " ".join(map(str, row["peak_in_flight_by_rank"]))
        print(f"{row['engine']:<8} waiting {waiting}   in flight {in_flight}   largest gap {row['largest_gap']}")


def main() -> None:
    """Fork the ranks from a parent that has imported everything and stays single-threaded."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    layers = layers_for(arguments.forward_milliseconds / 1e3) if arguments.compute == "real" else 1
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for engine in arguments.engines:
            (directory / engine).mkdir()
        started, others = time.monotonic(), others_seconds()
        start_processes(run_rank, (arguments, layers, directory), arguments.stages, start_method="fork")
        after, seconds = others_seconds(), time.monotonic() - started
        runs = {engine: turns(engine, read_records(directory / engine), arguments) for engine in arguments.engines}
    print(
        f"{arguments.compute}: {arguments.stages} stages, {arguments.micro_batches} micro-batches, "
        f"{arguments.repetitions} repetitions of {arguments.steps} steps"
    )
    busy = None if others is None or after is None else max(0.0, after - others) / seconds
    print(f"cores that other work kept busy meanwhile: {'unknown' if busy is None else f'{busy:.2f}'} of {cores()}\n")
    found = figures(runs)
    show(found)
    if arguments.json:
        result = {"arguments": vars(arguments), "machine": describe(), "others_cores": busy, "engines": found}
        arguments.json.write_text(json.dumps(result, indent=2, default=str))


if __name__ == "__main__":
    main()
