"""Train a byte-level GPT as a DeepSpeed pipeline.

    torchrun --nproc-per-node 2 scripts/train_gpt.py --deepspeed_config ds_configs/1f1b.json

Batch sizes, optimizer, learning rate, precision, ZeRO, clipping and monitors come from the DeepSpeed JSON; the size of
the model, the text and the length of the run come from the command line. A run is a function of both and of --seed.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import deepspeed
import torch
from deepspeed import comm
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.engine import PipelineEngine
from gpt_model import ModelSettings, TransformerBlock, cross_entropy, derive_seed, gpt_layers
from text_data import VOCABULARY, load_text, split_text, training_micro_batches, validation_micro_batches
from tqdm import tqdm


def parse_arguments() -> argparse.Namespace:
    """The command line; ``--deepspeed_config`` is DeepSpeed's own option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--layers", type=int, default=8, help="transformer blocks (%(default)s)")
    model.add_argument("--hidden", type=int, default=192, help="width of the model (%(default)s)")
    model.add_argument("--heads", type=int, default=6, help="attention heads; must divide hidden (%(default)s)")
    model.add_argument("--sequence-length", type=int, default=128, help="bytes in a sample (%(default)s)")
    model.add_argument("--dropout", type=float, default=0.0, help="probability of dropping a value (%(default)s)")

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

    run = parser.add_argument_group("run")
    run.add_argument("--steps", type=int, default=200, help="optimizer steps, those before --resume too (%(default)s)")
    run.add_argument("--seed", type=int, default=1234, help="seed of weights, data order and dropout (%(default)s)")
    run.add_argument(
        "--data", type=Path, nargs="+", metavar="FILE", help="text to learn (default: Python's standard library)"
    )
    run.add_argument(
        "--validate-every", type=int, default=50, metavar="STEPS", help="0: never; else also at the end (%(default)s)"
    )
    run.add_argument(
        "--validation-batches", type=int, default=8, help="micro-batches per validation and replica (%(default)s)"
    )
    run.add_argument("--checkpoint-dir", type=Path, help="where checkpoints go and --resume looks")
    run.add_argument("--save-every", type=int, default=0, metavar="STEPS", help="0: never (%(default)s)")
    run.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in --checkpoint-dir")
    run.add_argument("--log-every", type=int, default=10, metavar="STEPS", help="steps per printed line (%(default)s)")
    run.add_argument("--progress", action="store_true", help="draw a progress bar even if stderr is not a terminal")
    run.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    deepspeed.add_config_arguments(parser)
    arguments = parser.parse_args()
    check_arguments(arguments)
    return arguments


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what could only fail later, or pass for something else."""
    if arguments.deepspeed_config is None:
        raise ValueError("--deepspeed_config is missing: for example --deepspeed_config ds_configs/1f1b.json")
    if (arguments.save_every or arguments.resume) and arguments.checkpoint_dir is None:
        raise ValueError("--save-every and --resume need --checkpoint-dir")
    for name, least in (("steps", 1), ("log_every", 1), ("validation_batches", 1), ("validate_every", 0)):
        if getattr(arguments, name) < least:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} must be at least {least}, got {getattr(arguments, name)}")
    if "RANK" not in os.environ:
        raise ValueError(f"no launcher: start this as 'torchrun --nproc-per-node 2 {sys.argv[0]} ...'")


def share_cores() -> None:
    """Give each process on this machine its part of the cores, unless the user has chosen a number of threads."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    # torchrun and DeepSpeed's launcher name the number of local processes differently.
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_processes))


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


class Report:
    """What rank 0 tells the user: a progress bar on stderr, or lines on stdout. Other ranks are silent."""

    def __init__(self, arguments: argparse.Namespace, tokens_per_step: int, first_step: int) -> None:
        self.enabled = comm.get_rank() == 0
        self.log_every = arguments.log_every
        self.last_step = arguments.steps
        self.tokens_per_step = tokens_per_step
        self.training_loss = self.validation_loss = float("nan")
        self.seconds: list[float] = []
        draw = self.enabled and (arguments.progress or sys.stderr.isatty())
        self.bar = tqdm(total=arguments.steps, initial=first_step, unit="step", disable=not draw)

    def step(self, step: int, loss: float, learning_rate: float, seconds: float) -> None:
        """One optimizer step has taken ``seconds``."""
        self.training_loss = loss
        self.seconds.append(seconds)
        self.bar.set_postfix_str(f"loss {loss:.4f}, {self.tokens_per_step / seconds:,.0f} tokens/s", refresh=False)
        self.bar.update()
        if self.bar.disable and (step % self.log_every == 0 or step == self.last_step):
            speed = self.speed(self.seconds[-self.log_every :])
            self.write(f"step {step}: loss {loss:.6f}, learning rate {learning_rate:.2e}, {speed:,.0f} tokens/s")

    def validation(self, step: int, loss: float) -> None:
        """The loss over the fixed validation micro-batches after ``step`` optimizer steps."""
        self.validation_loss = loss
        self.write(f"step {step}: validation loss {loss:.6f}")

    def summary(self, step: int) -> None:
        """One line at the end. The first step is left out of the speed: it pays for set-up."""
        self.bar.close()
        self.write(
            f"finished {step} steps: training loss {self.training_loss:.6f}, validation loss "
            f"{self.validation_loss:.6f}, {self.speed(self.seconds[1:] or self.seconds):,.0f} tokens/s"
        )

    def speed(self, seconds: list[float]) -> float:
        """Tokens a second over some steps."""
        return self.tokens_per_step * len(seconds) / sum(seconds) if seconds else float("nan")

    def write(self, line: str) -> None:
        """Print a line at once, above the progress bar if there is one."""
        if self.enabled:
            self.bar.write(line)
            sys.stdout.flush()


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
    report = Report(arguments, batch_size * micro_batches * replicas * length, engine.global_steps)
    seed_dropout(engine, settings.seed)

    while engine.global_steps < arguments.steps:
        started = time.perf_counter()
        loss = float(engine.train_batch(data_iter=training))
        step = engine.global_steps
        report.step(step, loss, engine.get_lr()[0], time.perf_counter() - started)
        last = step == arguments.steps
        if arguments.validate_every and (last or step % arguments.validate_every == 0):
            loss = float(engine.eval_batch(data_iter=iter(validation), num_micro_batches=len(validation)))
            report.validation(step, loss)
        if arguments.save_every and (last or step % arguments.save_every == 0):
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
