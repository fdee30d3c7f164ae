"""Train a byte-level GPT with megatron-core, which pip installs; Megatron-LM is not needed.

    torchrun --nproc-per-node 2 scripts/train_gpt_megatron.py --pipeline-schedule paci

Model, data, optimizer and checkpoints are Megatron's; so is the schedule, unless --pipeline-schedule names another.
On GPUs the processes talk by NCCL; without any it runs on the CPU. A run is a function of its command line.
"""

import argparse
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import megatron_on_cpu
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron_checkpoint import Beside, load, save
from megatron_data import build_datasets, cache_folder, training_micro_batches, validation_micro_batches
from megatron_model import RECOMPUTE, forward_step, make_config, make_trained, provide_stage
from seeds import derive_seed
from text_data import VOCABULARY
from torch import Tensor
from training_run import (
    Report,
    add_model_arguments,
    add_run_arguments,
    check_least,
    check_run_arguments,
    is_due,
    share_cores,
)

from amdp_plugin.megatron import forward_backward_func
from amdp_plugin.megatron.arguments import add_flags, read_flags
from amdp_plugin.megatron.random_state import GENERATORS


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--tie-embeddings", action="store_true", help="one matrix for the embedding and the output")
    parallel = parser.add_argument_group("parallelism")
    parallel.add_argument("--tensor-parallel", type=int, default=1, help="ranks that share a layer (%(default)s)")
    parallel.add_argument("--pipeline-parallel", type=int, help="pipeline stages (default: as many as processes allow)")
    parallel.add_argument("--recompute", choices=RECOMPUTE, default="none", help="activations not kept (%(default)s)")
    optimizer = parser.add_argument_group("optimizer")
    optimizer.add_argument("--micro-batches", type=int, default=4, help="of a step and replica (%(default)s)")
    optimizer.add_argument("--micro-batch-size", type=int, default=4, help="samples (%(default)s)")
    optimizer.add_argument("--learning-rate", type=float, default=1e-3, help="of AdamW, after warm-up (%(default)s)")
    optimizer.add_argument("--warmup-steps", type=int, default=50, help="of the learning rate (%(default)s)")
    optimizer.add_argument("--weight-decay", type=float, default=0.1, help="(%(default)s)")
    optimizer.add_argument("--clip-grad", type=float, default=1.0, help="largest norm; 0: any (%(default)s)")
    optimizer.add_argument("--bf16", action="store_true", help="compute in bfloat16, with weights in float32 beside")
    optimizer.add_argument("--distributed-optimizer", action="store_true", help="spread its state over the replicas")
    add_run_arguments(parser)
    parser.add_argument("--data-cache", type=Path, default=cache_folder(), metavar="DIR", help="(%(default)s)")
    arguments = add_flags(parser).parse_args()
    check_run_arguments(arguments)
    check_least(
        arguments, layers=1, tensor_parallel=1, micro_batches=1, micro_batch_size=1, warmup_steps=0, save_every=0
    )
    arguments.pipeline_parallel = stages(arguments, int(os.environ["WORLD_SIZE"]))
    return arguments


def stages(arguments: argparse.Namespace, processes: int) -> int:
    """How many there are, which the processes and the layers must be divisible by."""
    number = arguments.pipeline_parallel or max(1, processes // arguments.tensor_parallel)
    if processes % (number * arguments.tensor_parallel):
        raise ValueError(
            f"{processes} processes cannot be divided into replicas of {number} stages x {arguments.tensor_parallel} "
            "tensor-parallel ranks: change --pipeline-parallel or --tensor-parallel"
        )
    if arguments.layers % number:
        raise ValueError(f"--layers must be a multiple of the {number} stages, got {arguments.layers}")
    if VOCABULARY % arguments.tensor_parallel or arguments.heads % arguments.tensor_parallel:
        raise ValueError(f"--tensor-parallel must divide {VOCABULARY} and --heads, got {arguments.tensor_parallel}")
    return number


def initialize(arguments: argparse.Namespace) -> torch.device:
    """Process groups, and generators seeded by the stage; returns where this rank computes."""
    on_cpu = megatron_on_cpu.install()
    device = torch.device("cpu") if on_cpu else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("gloo" if on_cpu else "nccl")
    parallel_state.initialize_model_parallel(arguments.tensor_parallel, arguments.pipeline_parallel)
    seed = derive_seed("stage", arguments.seed, parallel_state.get_pipeline_model_parallel_rank()) % 2**31
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return device


def mean_loss(reported: list[dict[str, Tensor]]) -> float:
    """Over micro-batches and replicas, on the last stage, which waits for no other; elsewhere not a number."""
    if not parallel_state.is_pipeline_last_stage():
        return float("nan")
    loss = torch.stack([each["loss"] for each in reported]).mean()
    replicas = parallel_state.get_data_parallel_group()
    dist.all_reduce(loss, group=replicas)
    return float(loss) / replicas.size()


def train(arguments: argparse.Namespace) -> None:
    """Build, perhaps resume, and run up to ``arguments.steps`` optimizer steps in all."""
    device = initialize(arguments)
    config = make_config(arguments)
    provider = partial(provide_stage, arguments, config)
    trained = make_trained(arguments, config, device)
    datasets = build_datasets(arguments.data, arguments.data_cache, arguments.sequence_length, arguments.seed)
    fresh: tuple[int, Beside] = (0, ([GENERATORS.get()], None, None))
    step, (random_states, ahead, means) = load(arguments.checkpoint_dir, trained) if arguments.resume else fresh
    GENERATORS.put(random_states[0])

    settings, scheduled = read_flags(arguments), None
    forward_backward = get_forward_backward_func()
    if settings is not None:
        forward_backward = scheduled = forward_backward_func(settings)
        size = arguments.micro_batches
        scheduled.attach([trained.model], trained.optimizer, provider, step, random_states, size, ahead, means)

    size, micro_batches = arguments.micro_batch_size, arguments.micro_batches
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    training = training_micro_batches(datasets[0], size, replica, replicas, step * micro_batches)
    validation = validation_micro_batches(datasets[1], size, replica, replicas, arguments.validation_batches)
    # The last stage knows the loss; asking another rank to tell it would make stages wait for each other.
    tells = dist.get_rank() == dist.get_world_size() - 1
    report = Report(arguments, tells, size * micro_batches * replicas * arguments.sequence_length, step)

    def run(batches: Iterator[dict[str, Tensor]], number: int, forward_only: bool = False) -> float:
        return mean_loss(
            forward_backward(
                forward_step_func=partial(forward_step, device),
                data_iterator=batches,
                model=[trained.model],
                num_microbatches=number,
                seq_length=arguments.sequence_length,
                micro_batch_size=size,
                forward_only=forward_only,
            )
        )

    while step < arguments.steps:
        started = time.perf_counter()
        trained.model.zero_grad_buffer()
        trained.optimizer.zero_grad()
        loss = run(training, micro_batches)
        learning_rate = trained.optimizer.param_groups[0]["lr"]
        trained.optimizer.step()
        trained.scheduler.step(increment=1)
        step += 1
        report.step(step, loss, learning_rate, time.perf_counter() - started)
        if is_due(step, arguments.validate_every, arguments.steps):
            trained.model.eval()
            report.validation(step, run(iter(validation), len(validation), forward_only=True))
            trained.model.train()
        if is_due(step, arguments.save_every, arguments.steps):
            beside: Beside = ([GENERATORS.get()], None, None)
            if scheduled is not None:
                scheduled.quiesce()
                beside = scheduled.random_states(), scheduled.ahead(), scheduled.means()
            save(arguments.checkpoint_dir, step, trained, beside)
    report.summary(step)


def main() -> None:
    """Parse, train, and leave nothing behind."""
    arguments = parse_arguments()
    share_cores()
    train(arguments)
    dist.barrier()
    # Without this, gloo's threads may abort the process at exit.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
