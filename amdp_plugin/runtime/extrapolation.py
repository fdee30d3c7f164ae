"""Weights that no update has made, for a forward or a backward; ``plan.extrapolation`` says how far from a stage's own.

They are written over the stage's weights, in place, under the graphs that are alive, and the stage's own are put back
afterwards: a backward therefore computes input gradients with what is there at that time, as under any schedule whose
updates are live (``runtime.weights``). Where the host steps master copies, those are moved and copied into the weights
as after a step, so that nothing is extrapolated in a low precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..plan.action import FORWARD, Action
from ..plan.extrapolation import Extrapolation
from .smooth_direction import check_optimizer, smooth_direction
from .weights import live_update


class ExtrapolatedWeights:
    """The weights of a stage at its home, where a schedule computes with others.

    Args:
        stage: which.
        parameters: of the stage.
        optimizers: those that step them, or master copies or shards of either.
        refresh: writes into the parameters what is stepped, where that is not the parameters themselves.
    """

    def __init__(
        self,
        stage: int,
        parameters: Iterable[nn.Parameter],
        optimizers: Iterable[torch.optim.Optimizer],
        refresh: Callable[[], None] = lambda: None,
    ) -> None:
        self._stage, self._refresh = stage, refresh
        self._parameters, self._optimizers = list(parameters), list(optimizers)
        self._planned: Extrapolation | None = None
        self._means: dict[Tensor, Tensor] = {}
        """Of what is stepped, the running mean of its updates."""
        self._before: dict[Tensor, Tensor] = {}
        self._own: list[Tensor] = []
        """What the parameters hold but while they hold others."""
        self._window: int | None = None
        self._predicted: list[Tensor] = []
        """What the forwards of that window compute with."""

    def begin(self, planned: Extrapolation | None) -> None:
        """Extrapolate like this from now on; with ``None`` do nothing, ever.

        Raises:
            ValueError: where the optimizers do not show what is needed.
        """
        self._planned = planned
        if planned is None:
            return
        for optimizer in self._optimizers:
            check_optimizer(optimizer, planned.predicts)

    @contextmanager
    def stepping(self, update: int) -> Iterator[None]:
        """Within it the host makes update number ``update`` of the job, in place: by a rescaled learning rate, and what
        it changes goes into the running mean. A step that is skipped leaves the mean as it is."""
        with ExitStack() as hooks:
            if self._planned is not None and not self._planned.predicts:
                rescaling = _Rescaling(self._planned.divisor(self._stage, update))
                for optimizer in self._optimizers:
                    for before, after in (
                        (rescaling.before_step, rescaling.after_step), (self._before_step, self._after_step)
                    ):  # fmt: skip
                        hooks.callback(optimizer.register_step_pre_hook(before).remove)
                        hooks.callback(optimizer.register_step_post_hook(after).remove)
            yield

    @contextmanager
    def using(self, action: Action, forward: int, version: int) -> Iterator[None]:
        """Let the parameters hold what ``action``, a forward or a backward, computes with.

        Args:
            forward: the version of the weights that its forward had, and
            version: that which they have now, both counted in updates.
        """
        planned, forwards = self._planned, action.kind == FORWARD
        window = 0 if planned is None else action.window(planned.micro_batches)
        if planned is None or window < planned.free_from:
            yield
            return
        if forwards:
            steps = planned.forward_steps(self._stage, window, version)
        else:
            steps = planned.backward_steps(self._stage, window, forward, version)
        if forwards and planned.weights == "predicted_by_window" and (steps or self._window == window):
            self._keep_own()
            self._write_of_window(window, steps)
        elif steps:
            self._keep_own()
            self._move(steps)
        else:
            yield
            return
        try:
            yield
        finally:
            _write(self._parameters, self._own)

    def clear(self) -> None:
        """Nothing is in flight."""
        self._window, self._predicted = None, []

    def means(self) -> list[Tensor] | None:
        """The running means of updates, for a checkpoint; ``None`` where there are none. They are of what is stepped
        here: data-parallel replicas may have other parts."""
        if self._planned is None or self._planned.decay(self._stage) is None:
            return None
        return [self._mean(tensor) for tensor in self._stepped()]

    def restart(self, means: Sequence[Tensor] | None) -> None:
        """Weights and optimizers are those of a checkpoint.

        Args:
            means: what :meth:`means` returned when it was written. Without it they begin at 0.

        Raises:
            ValueError: where it is of other parameters.
        """
        self.clear()
        self._means.clear()
        if means is None or self.means() is None:
            return
        stepped = list(self._stepped())
        if [value.shape for value in means] != [tensor.shape for tensor in stepped]:
            raise ValueError(
                "the running means of updates are of other weights: load the checkpoint with as many stages and "
                "replicas, and in the precision, as wrote it, or without the files that hold them"
            )
        self._means = {tensor: value.to(tensor, copy=True) for tensor, value in zip(stepped, means, strict=True)}

    def kept(self) -> list[Tensor]:
        """What lies in memory beside the host's own."""
        return [*self._means.values(), *self._own, *self._predicted]

    def bytes_kept(self) -> int:
        """What that comes to, once all of it is there."""
        if self._planned is None or not self._planned.copies(self._stage):
            return 0
        means = [] if self._planned.predicts else list(self._stepped())
        weights = self._parameters * (self._planned.copies(self._stage) - bool(means))
        return sum(tensor.numel() * tensor.element_size() for tensor in (*weights, *means))

    @torch.no_grad()
    def _keep_own(self) -> None:
        self._own = self._own or [torch.empty_like(parameter) for parameter in self._parameters]
        for own, parameter in zip(self._own, self._parameters, strict=True):
            own.copy_(parameter)

    def _write_of_window(self, window: int, steps: int) -> None:
        """What the first forward of ``window`` has predicted; this is the first where there is none yet."""
        if self._window == window:
            _write(self._parameters, self._predicted)
            return
        self._move(steps)
        self._window, self._predicted = window, [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def _move(self, steps: int) -> None:
        """Move the parameters by so many updates from what is stepped, which keeps its values, but for the parameters
        themselves."""
        assert self._planned is not None
        storages = {parameter.untyped_storage().data_ptr() for parameter in self._parameters}
        with live_update({*self._parameters, *self._stepped()}):  # an optimizer may have others, which it never steps
            masters = []
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    for tensor in group["params"]:
                        predicts = self._planned.predicts
                        move = smooth_direction(optimizer, group, tensor) if predicts else self._mean(tensor)
                        if tensor.untyped_storage().data_ptr() not in storages:
                            masters.append((tensor, tensor.detach().clone()))
                        tensor.add_(move * steps)
            self._refresh()
            for tensor, value in masters:
                tensor.copy_(value)

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        assert self._planned is not None
        if self._planned.decay(self._stage) is not None:
            for group in optimizer.param_groups:  # at the time of a step: some hosts step one group after the other
                self._before.update({tensor: tensor.detach().clone() for tensor in group["params"]})

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        assert self._planned is not None
        decay = self._planned.decay(self._stage)
        for tensor in [tensor for group in optimizer.param_groups for tensor in group["params"]]:
            if decay is not None and tensor in self._before:
                update = self._before.pop(tensor).neg_().add_(tensor)
                self._mean(tensor).mul_(decay).add_(update.mul_(1 - decay))

    def _mean(self, tensor: Tensor) -> Tensor:
        if tensor not in self._means:
            self._means[tensor] = torch.zeros_like(tensor, requires_grad=False)
        return self._means[tensor]

    def _stepped(self) -> Iterator[Tensor]:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]


class _Rescaling:
    """A learning rate that is divided for one step; a scheduler may set the next meanwhile."""

    def __init__(self, divisor: float) -> None:
        self._divisor = divisor
        self._rates: list[tuple[dict[str, Any], Any, Any]] = []

    def before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups if self._divisor != 1.0 else ():
            rate = group["lr"]
            group["lr"] = rate / self._divisor
            self._rates.append((group, rate, group["lr"]))

    def after_step(self, *_: Any) -> None:
        for group, rate, divided in self._rates:
            if group["lr"] is divided:
                group["lr"] = rate
        self._rates.clear()


@torch.no_grad()
def _write(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    with live_update(parameters):
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
