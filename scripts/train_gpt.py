"""Train a byte-level GPT as a DeepSpeed pipeline.

    torchrun --nproc-per-node 2 scripts/train_gpt.py --deepspeed_config ds_configs/1f1b.json

Batch sizes, optimizer, learning rate, precision, ZeRO, clipping and monitors come from the DeepSpeed JSON; the size of
the model, the text and the length of the run come from the command line. A run is a function of both and of --seed.
"""

import argparse
import time
from pathlib import Path

import deepspeed
import torch
from deepspeed import comm
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.engine import PipelineEngine
from gpt_model import ModelSettings, TransformerBlock, cross_entropy, gpt_layers
from seeds import derive_seed
from text_data import VOCABULARY, load_text, split_text, training_micro_batches, validation_micro_batches
from training_run import Report, add_model_arguments, add_run_arguments, check_run_arguments, is_due, share_cores


def parse_arguments() -> argparse.Namespace:
    """The command line; ``--deepspeed_config`` is DeepSpeed's own option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    pipeline = parser.add_argument_group("pipeline")
    pipeline.add_argument("--stages", type=int, help="pipeline stages (default: the number of processes)")
    pipeline.add_argument(
        "--partition-method",
        default=f"type:{TransformerBlock.__name__}",
        help="how DeepSpeed cuts the model: 'type:<class>', 'parameters' or 'uniform' (%(default)s)",
    )
    pipeline.add_argument(
        "--activation-checkpoint-interval",
        type=int,
        default=0,
        help="recompute blocks in the backward pass, in groups of this many; 0: keep all activations (%(default)s)",
    )
    add_run_arguments(parser)
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    deepspeed.add_config_arguments(parser)
    arguments = parser.parse_args()
    if arguments.deepspeed_config is None:
        raise ValueError("--deepspeed_config is missing: for example --deepspeed_config ds_configs/1f1b.json")
    check_run_arguments(arguments)
    return arguments


def build_model(arguments: argparse.Namespace, settings: ModelSettings) -> PipelineModule:
    """This process's stage of the model."""
    processes = comm.get_world_size()
    stages = processes if arguments.stages is None else arguments.stages
    if stages < 1 or processes % stages:
        raise ValueError(f"--stages must divide the number of processes: got {stages} stages, {processes} processes")
    if settings.layers < stages:
        raise ValueError(f"{stages} stages need at least as many --layers, got {settings.layers}")
    return PipelineModule(
        layers=gpt_layers(settings),
        num_stages=stages,
        loss_fn=cross_entropy,
        # The layers seed themselves; DeepSpeed's seed_layers would also reseed dropout at every forward.
        seed_layers=False,
        partition_method=arguments.partition_method,
        activation_checkpoint_interval=arguments.activation_checkpoint_interval,
        # Not the embedding: recomputation needs an input that takes a gradient, and token identifiers take none.
        checkpointable_layers=[TransformerBlock.__name__],
    )


def seed_dropout(engine: PipelineEngine, seed: int) -> None:
    """Seed this process by (seed, stage, replica, step).

    Called at the start, and after each save as after each load: a resumed run then drops what the run that wrote the
    checkpoint goes on to drop.
    """
    torch.manual_seed(derive_seed("dropout", seed, engine.stage_id, engine.grid.data_parallel_id, engine.global_steps))


def resume(engine: PipelineEngine, checkpoint_dir: Path) -> None:
    """Load the latest checkpoint into the engine."""
    path, _ = engine.load_checkpoint(str(checkpoint_dir))
    if path is None:
        raise ValueError(f"--resume: no checkpoint in {checkpoint_dir}")


def train(engine: PipelineEngine, arguments: argparse.Namespace, settings: ModelSettings) -> None:
    """Run up to ``arguments.steps`` optimizer steps in all, from where the engine stands."""
    batch_size = engine.train_micro_batch_size_per_gpu()
    micro_batches = engine.gradient_accumulation_steps()
    replica, replicas = engine.grid.data_parallel_id, engine.grid.data_parallel_size
    length = settings.sequence_length
    training_text, validation_text = split_text(load_text(arguments.data), length)
    # Where the data stands follows from the step: nothing of it has to be in the checkpoint.
    position = engine.global_steps * micro_batches
    training = training_micro_batches(training_text, batch_size, length, settings.seed, replica, position)
    validation = validation_micro_batches(
        validation_text, batch_size, length, replica, replicas, arguments.validation_batches
    )
    tokens_per_step = batch_size * micro_batches * replicas * length
    report = Report(arguments, comm.get_rank() == 0, tokens_per_step, engine.global_steps)
    seed_dropout(engine, settings.seed)

    while engine.global_steps < arguments.steps:
        started = time.perf_counter()
        loss = float(engine.train_batch(data_iter=training))
        step = engine.global_steps
        report.step(step, loss, engine.get_lr()[0], time.perf_counter() - started)
        if is_due(step, arguments.validate_every, arguments.steps):
            loss = float(engine.eval_batch(data_iter=iter(validation), num_micro_batches=len(validation)))
            report.validation(step, loss)
        if is_due(step, arguments.save_every, arguments.steps):
            engine.save_checkpoint(str(arguments.checkpoint_dir))
            seed_dropout(engine, settings.seed)
    report.summary(engine.global_steps)


def main() -> None:
    """Build, perhaps resume, train."""
    arguments = parse_arguments()
    share_cores()
    settings = ModelSettings(
        vocabulary=VOCABULARY,
        layers=arguments.layers,
        hidden=arguments.hidden,
        heads=arguments.heads,
        sequence_length=arguments.sequence_length,
        dropout=arguments.dropout,
        seed=arguments.seed,
    )
    deepspeed.init_distributed()
    model = build_model(arguments, settings)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(args=arguments, model=model, model_parameters=parameters)
    if arguments.resume:
        resume(engine, arguments.checkpoint_dir)
    train(engine, arguments, settings)
    # Without this, gloo's threads may abort the process at exit.
    comm.destroy_process_group()


if __name__ == "__main__":
    main()
