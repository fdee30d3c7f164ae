"""Megatron's optimizer in the hands of a schedule: a stage steps where its program says, not where the loop does."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from ..runtime.decisions import Answers, answering
from ..runtime.parking import BufferSums, Parking
from .stage_view import accepted
from .tied import apart

StepResult = tuple[bool, float | None, int | None]
"""(whether the update was made, norm of the gradients, zeros among them), as Megatron's ``optimizer.step`` returns."""
NO_UPDATE: StepResult = (False, None, None)
OPERATIONS = dist.ReduceOp.SUM, dist.ReduceOp.MAX


class OptimizerSteps:
    """Takes over ``optimizer.step()`` and the zeroing of gradients, which the training loop goes on calling.

    The loop zeroes before a window and steps after it. A program steps within the window, or within a later one, and
    another window's gradients may be in the sums when the loop comes by. So the loop's calls do nothing but hand out
    results, one a call: those of updates in their order, and, before the first of them, that nothing was updated. The
    loop's learning rates then go on from update to update, whenever a stage makes them.

    Args:
        optimizer: a ``MegatronOptimizer``.
        chunk: the home chunk, under Megatron's DDP.

    Raises:
        ValueError: where another schedule has taken the optimizer, of which the steps would be nothing but results.
    """

    def __init__(self, optimizer: Any, chunk: Any) -> None:
        if isinstance(getattr(optimizer.step, "__self__", None), OptimizerSteps):
            raise ValueError("a schedule steps this optimizer already: detach() it before another is attached")
        self._optimizer, self._chunk = optimizer, chunk
        self._step, self._zero_grad, self._zero_buffer = optimizer.step, optimizer.zero_grad, chunk.zero_grad_buffer
        self._results: deque[StepResult] = deque()
        self._known_scale: tuple[Any, float] = (None, 1.0)
        buffers = [buffer.grad_data for buffer in gradient_buffers(chunk)]
        self.parking = Parking(BufferSums(buffers), self._loss_scale)
        """The gradients of windows that wait for their update."""
        optimizer.step = self._hand_out
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

    def _hand_out(self) -> StepResult:
        """The next result."""
        return self._results.popleft() if self._results else NO_UPDATE

    @property
    def decides(self) -> bool:
        """Whether there is something to decide in an update: a norm to clip by, or a loss scale."""
        return bool(self._optimizer.config.clip_grad > 0 or self._optimizer.config.fp16)

    def run(self, finalize: Callable[[], None], deciding: AbstractContextManager[Any]) -> None:
        """Step, within ``deciding``, with the gradients that ``finalize`` reduces over the replicas of the job; then
        begin a new sum."""
        finalize()
        self._step_within(deciding)

    def close(self, finalize: Callable[[], None], tell: Callable[[Tensor], None] | None) -> None:
        """A window has closed, whose update comes later.

        Args:
            finalize: reduces the gradients over the replicas of the job.
            tell: takes the sum of their squares over the stage.
        """
        finalize()
        if tell is not None:
            tell(self._squares())
        self.parking.close()

    def backward(self, micro_batch: int) -> None:
        """Before a backward: where the gradient of a window that waits for its update is put aside, begin a new sum."""
        if self.parking.backward(micro_batch):
            self._zero()

    def run_closed(self, deciding: AbstractContextManager[Any]) -> None:
        """Step, within ``deciding``, with the gradient of the window that was closed first."""
        with self.parking.oldest():
            self._step_within(deciding)

    def _step_within(self, deciding: AbstractContextManager[Any]) -> None:
        with deciding:
            self._results.append(self._step())
        self._loss_scale()  # known now, when the step has asked the device already, and not behind a message
        self._zero()

    def _squares(self) -> Tensor:
        """Of the stage's gradients, those that Megatron takes for the norm, with the loss scale in them. Megatron's own
        function would have the host wait for the number, and without fused kernels for that of every parameter."""
        gradients: list[Tensor] = []
        for each in members(self._optimizer):
            # Preparing them would unscale them, and decide about the scale.
            getattr(each, "_copy_model_grads_to_main_grads", each.prepare_grads)()
            gradients += each.get_main_grads_for_grad_norm()
        squares = nn.utils.get_total_norm(gradients).square().to(next(self._chunk.parameters()).device)
        dist.all_reduce(squares, group=self._norm_group)
        return squares

    def _loss_scale(self) -> float:
        """The present one; 1 without fp16. Megatron keeps it on the device, in a new tensor whenever it changes: only
        then the host waits for it."""
        if not self._optimizer.config.fp16:
            return 1.0
        present = self._optimizer.get_loss_scale()
        if present is not self._known_scale[0]:
            self._known_scale = present, float(present)
        return self._known_scale[1]

    @property
    def _norm_group(self) -> Any:
        return next(members(self._optimizer)).get_grad_stats_parallel_group()

    @contextmanager
    def decided_by(self, update: AbstractContextManager[Answers]) -> Iterator[None]:
        """Within it Megatron takes for the norm of the stage's gradients, and for their overflow, what ``update``
        answers."""
        scale = self._loss_scale()  # of the gradients of this window; a step changes it before it takes the norm
        with update as answers:

            def whole(own: Tensor) -> None:
                answers.whole(own)
                own.div_(scale**2)

            with answering(dist, self._norm_group, OPERATIONS, whole, answers.broken):
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


def gradient_buffers(chunk: Any) -> Iterator[Any]:
    """The buffers in which Megatron's DDP sums up the gradients of ``chunk``."""
    yield from chunk.buffers
    yield from chunk.expert_parallel_buffers


def members(optimizer: Any) -> Iterator[Any]:
    """The optimizers that a chained one is made of; else itself."""
    yield from getattr(optimizer, "chained_optimizers", None) or [optimizer]


def is_distributed(optimizer: Any) -> bool:
    """Whether its state is spread over the data-parallel ranks."""
    return bool(getattr(optimizer.config, "use_distributed_optimizer", False))


def reduce_gradients(config: Any, chunk: Any, within_backward: bool, tied_apart: bool, **given: Any) -> None:
    """What Megatron does with a window's gradients before the step: over data-parallel replicas, layer norms over
    tensor-parallel ranks, tied embeddings between the first and the last stage.

    Args:
        within_backward: reductions that overlap with a backward have begun in that of the window's last micro-batch.
        tied_apart: those of tied embeddings are in messages of their own.
        given: ``pg_collection`` and ``force_all_reduce`` of the call.
    """
    if not within_backward and chunk.ddp_config.overlap_grad_reduce:
        chunk.start_grad_sync()
    if config.finalize_model_grads_func is None:
        return
    with apart(chunk) if tied_apart else nullcontext():
        config.finalize_model_grads_func([chunk], None, **accepted(config.finalize_model_grads_func, **given))
