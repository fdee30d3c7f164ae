"""What a rank does when the executor says so (``runtime.worker.StagesWorker``), on chunks of a Megatron model.

Forwards, backwards and steps are Megatron's own (``forward_step``, ``backward_step``, its optimizer), so that timers,
recomputation, tensor and sequence parallelism, bf16 and the distributed optimizer go on as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_model_config, get_model_type
from torch import Tensor, nn

from ..plan.action import Action
from ..runtime.channels import Tensors
from ..runtime.pipeline import Pipeline
from ..runtime.stage import input_leaf
from ..runtime.weights import live_update
from ..runtime.worker import StagesWorker
from .optimizer import OptimizerSteps, reduce_gradients
from .stage_view import accepted, acting_as, bare
from .tensor_ranks import TensorRanks


@dataclass
class Call:
    """What the training loop gave its latest call of the schedule.

    Args:
        forward_step_func: ``(data_iterator, model) -> (output, loss function)``, the job's.
        data_iterator: its micro-batches, in the order of all directions; ``None`` where this rank reads none.
        collect_non_loss_data: what Megatron's schedules do with it.
        reduction: ``pg_collection`` and ``force_all_reduce``, for the reduction of gradients.
    """

    forward_step_func: Callable[..., Any]
    data_iterator: Iterator[Any] | None
    collect_non_loss_data: bool
    reduction: Mapping[str, Any]

    def pull(self) -> Any:
        """The next micro-batch. Raises ``StopIteration`` where the data ends."""
        if self.data_iterator is None:
            raise ValueError(
                "forward_step_func reads data on a rank whose data_iterator is None: every rank that runs a first or "
                "last stage needs one (under amdp these are several)"
            )
        return next(self.data_iterator)


class ChunksWorker(StagesWorker):
    """The chunks of one rank.

    Args:
        pipeline: what runs the program.
        chunks: by stage: the home under Megatron's DDP, guests beside it.
        home: the stage of this rank.
        steps: the optimizer of the home.
        call: the loop's latest call.
        report: takes (window, direction) when the last backward of a last stage here is done.
        tensor_ranks: of the home.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        chunks: Mapping[int, nn.Module],
        home: int,
        steps: OptimizerSteps,
        call: Callable[[], Call],
        report: Callable[[int, int], None],
        tensor_ranks: TensorRanks,
    ) -> None:
        super().__init__(pipeline.schedule, pipeline.feed, pipeline.random_streams, pipeline.losses, pipeline.replicas)
        self._pipeline = pipeline
        self._chunks, self._home, self._steps, self._call, self._report = chunks, home, steps, call, report
        self._config, self._feedback = get_model_config(chunks[home]), pipeline.feedback
        self._tensor_ranks = tensor_ranks
        self._in_flight: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self._backward_step = partial(
            schedules.backward_step, **accepted(schedules.backward_step, model_type=get_model_type(chunks[home]))
        )

    def module(self, stage: int) -> nn.Module:
        return bare(self._chunks[stage])

    def has_window(self, window: int) -> bool:
        """Whether there is data for the whole window. Of tensor-parallel ranks the first one knows: in Megatron the
        others have no iterator, or read the same."""
        ranks = self._tensor_ranks
        reads = ranks.leads or self._call().data_iterator is not None
        return ranks.first_says(reads and super().has_window(window))

    def run_forward(self, action: Action, inputs: Tensors | None) -> Tensors | None:
        stage, _, micro_batch = action
        call, size = self._call(), self.schedule.micro_batches
        if self.schedule.relays:
            self._steps.parking.forward(micro_batch)
        received = None if inputs is None else input_leaf(inputs[0])
        reported: list[Any] = []
        with acting_as(stage):
            output, _ = schedules.forward_step(
                call.forward_step_func,
                MicroBatchIterator(partial(self.take, micro_batch)),
                self._chunks[stage],
                size,
                received,
                reported,
                self._config,
                **accepted(
                    schedules.forward_step,
                    cp_group_size=parallel_state.get_context_parallel_world_size(),
                    collect_non_loss_data=call.collect_non_loss_data,
                    is_first_microbatch=micro_batch % size == 0,
                    current_microbatch=micro_batch % size,
                    is_last_stage=stage == self.last_stage,
                ),
            )
        self._in_flight[stage, micro_batch] = received, output
        if stage == self.last_stage:
            self.losses.add(micro_batch, reported[0] if reported else None)
            return None
        sent = output.detach()  # keeps the memory that Megatron lets go of, until it has been sent
        schedules.deallocate_output_tensor(output, self._config.deallocate_pipeline_outputs)
        return (sent,)

    def run_backward(self, action: Action, gradients: Tensors | None) -> Tensors:
        stage, _, micro_batch = action
        if self.schedule.relays:
            self._steps.backward(micro_batch)
        received, output = self._in_flight.pop((stage, micro_batch))
        gradient = None if gradients is None else gradients[0]
        with acting_as(stage), self._synchronization(action):
            self._backward_step(received, output, gradient, config=self._config)
        return () if received is None else (received,)

    def end_of_backwards(self, window: int, direction: int) -> None:
        self._report(window, direction)

    def forget(self, action: Action) -> None:
        del self._in_flight[action.stage, action.index]
        if self.schedule.relays:
            self._steps.parking.forget(action.index)

    def close(self, update: Action) -> None:
        decisions = self._pipeline.decisions
        tell = None if decisions is None else partial(decisions.tell, update)
        self._steps.close(self._reduction(), tell)

    def drop(self, update: Action) -> None:
        with self._deciding(update):
            self._steps.parking.drop()

    def parked(self) -> Iterable[Tensor]:
        return self._steps.parking.tensors()

    def update(self, action: Action) -> None:
        deciding, stepping = self._deciding(action), self._feedback.stepping(self.runs_freely(action))
        with live_update(self._chunks[self._home].parameters()), self.keeping_tied(), stepping:
            if self.schedule.relays:
                self._steps.run_closed(deciding)
            else:
                self._steps.run(self._reduction(), deciding)

    def _reduction(self) -> Callable[[], None]:
        """Of a window's gradients, over the replicas of the job."""
        kinds = not (self.replicas or self.schedule.relays), bool(self.schedule.tied)
        return partial(reduce_gradients, self._config, self._chunks[self._home], *kinds, **self._call().reduction)

    def _deciding(self, update: Action) -> AbstractContextManager[Any]:
        """This update goes by the norm, and the overflow, that the schedule's decisions say."""
        decisions = self._pipeline.decisions
        return nullcontext() if decisions is None else self._steps.decided_by(decisions.update(update))

    def _synchronization(self, action: Action) -> Any:
        """Reductions over data-parallel replicas may begin within a window's last backward, where the job overlaps
        them, and neither gradients of guests are still to come, or to go, nor what is reduced is put aside."""
        size, apart = self.schedule.micro_batches, self.replicas or self.schedule.relays
        last = self.directions == 1 and not apart and action.index % size == size - 1
        if action.stage != self._home or last or self._config.no_sync_func is None:
            return nullcontext()
        return self._config.no_sync_func()


class MicroBatchIterator:
    """An iterator over one micro-batch, which the job's ``forward_step_func`` takes from it.

    A forward that is cancelled finds its micro-batch again.
    """

    def __init__(self, take: Callable[[], Any]) -> None:
        self._take = take

    def __iter__(self) -> MicroBatchIterator:
        return self

    def __next__(self) -> Any:
        return self._take()
