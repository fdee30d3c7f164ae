"""Megatron's optimizer in the hands of a schedule: a stage steps where its program says, not where the loop does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from ..runtime.decisions import Whole, first_sum
from .stage_view import accepted
from .tied import apart

StepResult = tuple[bool, float | None, int | None]
"""(whether the update was made, norm of the gradients, zeros among them), as Megatron's ``optimizer.step`` returns."""


class OptimizerSteps:
    """Takes over ``optimizer.step()`` and the zeroing of gradients, which the training loop goes on calling.

    The loop zeroes before a window and steps after it. A program steps within the window, and another window's
    gradients may be in the sums when the loop comes by. So the loop's calls do nothing but hand out results.

    Args:
        optimizer: a ``MegatronOptimizer``.
        chunk: the home chunk, under Megatron's DDP.
    """

    def __init__(self, optimizer: Any, chunk: Any) -> None:
        self._optimizer, self._chunk = optimizer, chunk
        self._step, self._zero_grad, self._zero_buffer = optimizer.step, optimizer.zero_grad, chunk.zero_grad_buffer
        self.result: StepResult = (True, None, None)
        """Of the latest update."""
        optimizer.step = lambda: self.result
        optimizer.zero_grad = lambda set_to_none=True: None
        chunk.zero_grad_buffer = lambda: None
        self._zero()

    def release(self) -> None:
        """Give both back to the loop."""
        for owner, name in (
            (self._optimizer, "step"),
            (self._optimizer, "zero_grad"),
            (self._chunk, "zero_grad_buffer"),
        ):
            owner.__dict__.pop(name, None)

    def run(self, finalize: Callable[[], None], deciding: AbstractContextManager[Any]) -> None:
        """Step, within ``deciding``, with the gradients that ``finalize`` reduces over the replicas of the job; then
        begin a new sum."""
        finalize()
        with deciding:
            self.result = self._step()
        self._zero()

    @contextmanager
    def norm_by(self, update: AbstractContextManager[Whole]) -> Iterator[None]:
        """Within it gradients are clipped by the norm of the sum that ``update`` makes of their squares."""
        if self._optimizer.config.clip_grad <= 0:
            yield
            return
        group = next(members(self._optimizer)).get_grad_stats_parallel_group()
        with update as whole, first_sum(dist, group, dist.ReduceOp.SUM, whole):
            yield

    def _zero(self) -> None:
        self._zero_buffer()
        self._zero_grad()


@contextmanager
def stage_local(optimizer: Any) -> Iterator[None]:
    """Within it ``optimizer`` takes norms, overflows and counts of zeros within the stage, not over the pipeline.

    That is over the tensor-parallel ranks; with the distributed optimizer, whose ranks hold a part of the stage's
    gradients each, over the data-parallel ranks too.
    """
    tensor = parallel_state.get_tensor_model_parallel_group()
    tensor_and_data = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    before = [(each, each.get_grad_stats_parallel_group()) for each in members(optimizer)]
    for each, _ in before:
        each.grad_stats_parallel_group = tensor_and_data if is_distributed(each) else tensor
    yield
    for each, group in before:
        each.grad_stats_parallel_group = group


def members(optimizer: Any) -> Iterator[Any]:
    """The optimizers that a chained one is made of; else itself."""
    yield from getattr(optimizer, "chained_optimizers", None) or [optimizer]


def is_distributed(optimizer: Any) -> bool:
    """Whether its state is spread over the data-parallel ranks."""
    return bool(getattr(optimizer.config, "use_distributed_optimizer", False))


def reduce_gradients(config: Any, chunk: Any, has_guests: bool, tied_apart: bool, **given: Any) -> None:
    """What Megatron does with a window's gradients before the step: over data-parallel replicas, layer norms over
    tensor-parallel ranks, tied embeddings between the first and the last stage.

    Args:
        has_guests: gradients of other ranks have been added, or sent to them, so that no reduction can have begun in a
            backward.
        tied_apart: those of tied embeddings among them.
        given: ``pg_collection`` and ``force_all_reduce`` of the call.
    """
    if has_guests and chunk.ddp_config.overlap_grad_reduce:
        chunk.start_grad_sync()
    if config.finalize_model_grads_func is None:
        return
    with apart(chunk) if tied_apart else nullcontext():
        config.finalize_model_grads_func([chunk], None, **accepted(config.finalize_model_grads_func, **given))
