"""What the training scripts of both hosts share: their options, the processor's cores, and what they print."""

import argparse
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The size of the model."""
    model = parser.add_argument_group("model")
    model.add_argument("--layers", type=int, default=8, help="transformer blocks (%(default)s)")
    model.add_argument("--hidden", type=int, default=192, help="width of the model (%(default)s)")
    model.add_argument("--heads", type=int, default=6, help="attention heads; must divide hidden (%(default)s)")
    model.add_argument("--sequence-length", type=int, default=128, help="bytes in a sample (%(default)s)")
    model.add_argument("--dropout", type=float, default=0.0, help="probability of dropping a value (%(default)s)")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """How long the run is, on what text, and what it writes."""
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


def check_run_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what could only fail later, or pass for something else."""
    if (arguments.save_every or arguments.resume) and arguments.checkpoint_dir is None:
        raise ValueError("--save-every and --resume need --checkpoint-dir")
    check_least(arguments, steps=1, log_every=1, validation_batches=1, validate_every=0)
    if "RANK" not in os.environ:
        raise ValueError(f"no launcher: start this as 'torchrun --nproc-per-node 2 {sys.argv[0]} ...'")


def check_least(arguments: argparse.Namespace, **least: int) -> None:
    """Refuse options below the number that is named with them."""
    for name, number in least.items():
        if getattr(arguments, name) < number:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} must be at least {number}, got {getattr(arguments, name)}")


def is_due(step: int, every: int, last: int) -> bool:
    """Whether what happens ``every`` so many steps (0: never) and after the ``last`` one happens after ``step``."""
    return bool(every) and (step == last or step % every == 0)


def share_cores() -> None:
    """Give each process on this machine its part of the cores, unless the user has chosen a number of threads."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    # torchrun and DeepSpeed's launcher name the number of local processes differently.
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_processes))


class Report:
    """What one rank tells the user: a progress bar on stderr, or lines on stdout. Other ranks are silent.

    Args:
        arguments: the command line.
        tells: whether this is that rank.
        tokens_per_step: of all data-parallel replicas.
        first_step: steps that were made before this run.
    """

    def __init__(self, arguments: argparse.Namespace, tells: bool, tokens_per_step: int, first_step: int) -> None:
        self.enabled = tells
        self.log_every = arguments.log_every
        self.last_step = arguments.steps
        self.tokens_per_step = tokens_per_step
        self.training_loss = float("nan")
        self.validation_loss: float | None = None
        self.seconds: list[float] = []
        draw = self.enabled and (arguments.progress or sys.stderr.isatty())
        self.bar = tqdm(total=arguments.steps, initial=first_step, unit="step", disable=not draw)

    def step(self, step: int, loss: float, learning_rate: float, seconds: float) -> None:
        """One optimizer step has taken ``seconds``."""
        self.training_loss = loss
        self.seconds.append(seconds)
        self.bar.set_postfix_str(f"loss {loss:.4f}, {self.tokens_per_step / seconds:,.0f} tokens/s", refresh=False)
        self.bar.update()
        if self.bar.disable and is_due(step, self.log_every, self.last_step):
            speed = self.speed(self.seconds[-self.log_every :])
            self.write(f"step {step}: loss {loss:.6f}, learning rate {learning_rate:.2e}, {speed:,.0f} tokens/s")

    def validation(self, step: int, loss: float) -> None:
        """The loss over the fixed validation micro-batches after ``step`` optimizer steps."""
        self.validation_loss = loss
        self.write(f"step {step}: validation loss {loss:.6f}")

    def summary(self, step: int) -> None:
        """One line at the end. The first step is left out of the speed: it pays for set-up."""
        self.bar.close()
        validated = "" if self.validation_loss is None else f"validation loss {self.validation_loss:.6f}, "
        self.write(
            f"finished {step} steps: training loss {self.training_loss:.6f}, {validated}"
            f"{self.speed(self.seconds[1:] or self.seconds):,.0f} tokens/s"
        )

    def speed(self, seconds: list[float]) -> float:
        """Tokens a second over some steps."""
        return self.tokens_per_step * len(seconds) / sum(seconds) if seconds else float("nan")

    def write(self, line: str) -> None:
        """Print a line at once, above the progress bar if there is one."""
        if self.enabled:
            self.bar.write(line)
            sys.stdout.flush()
