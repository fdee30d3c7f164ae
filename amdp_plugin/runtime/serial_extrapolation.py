"""The oracle's own meaning of extrapolated weights and rescaled learning rates (``plan.extrapolation``), by formula."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..plan.extrapolation import Extrapolation
from .smooth_direction import check_optimizer


class SerialExtrapolation:
    """What the stages compute with, of the masters that their optimizers step.

    Args:
        masters: of every stage, and
        optimizers: what steps them.
    """

    def __init__(
        self, masters: Sequence[Sequence[nn.Parameter]], optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        self._masters, self._optimizers = masters, optimizers
        self._planned: Extrapolation | None = None
        self._extrapolates = False
        self._means: dict[int, list[Tensor]] = {}
        self._of_windows: dict[int, tuple[int, list[Tensor]]] = {}

    def begin(self, planned: Extrapolation | None) -> None:
        """Extrapolate like this from now on; with ``None`` do nothing.

        Raises:
            ValueError: where an optimizer does not show what is needed.
        """
        self._planned = planned
        if planned is not None:
            for optimizer in self._optimizers:
                check_optimizer(optimizer, planned.predicts)

    def restart(self, extrapolates: bool) -> None:
        """Nothing is in flight; what is played now extrapolates, or does not."""
        self._extrapolates = extrapolates
        self._of_windows.clear()

    def forward(self, stage: int, window: int, version: int) -> list[Tensor] | None:
        """The weights of a forward; ``None`` where they are those that the stage has."""
        if self._planned is None or not self._extrapolates:
            return None
        steps = self._planned.forward_steps(stage, window, version)
        if self._planned.weights != "predicted_by_window":
            return self._moved(stage, steps)
        if self._of_windows.get(stage, (-1,))[0] != window:
            self._of_windows[stage] = window, self._moved(stage, steps)
        return self._of_windows[stage][1]

    def backward(self, stage: int, window: int, forward: int, version: int) -> list[Tensor] | None:
        """Likewise of a backward, whose forward had weights of version ``forward``."""
        if self._planned is None or not self._extrapolates:
            return None
        return self._moved(stage, self._planned.backward_steps(stage, window, forward, version))

    @contextmanager
    def stepping(self, stage: int, update: int) -> Iterator[None]:
        """Within it the optimizer of ``stage`` steps, for the ``update``-th time."""
        if self._planned is None:
            yield
            return
        optimizer, divisor = self._optimizers[stage], self._planned.divisor(stage, update)
        before = [master.detach().clone() for master in self._masters[stage]]
        means = self._means.get(stage) or [torch.zeros_like(master) for master in before]
        rates = [(group, group["lr"]) for group in optimizer.param_groups]

        def divide(*_: object) -> None:
            rates[:] = [(group, group["lr"]) for group, _ in rates]
            for group, rate in rates:
                group["lr"] = rate / divisor

        hook = optimizer.register_step_pre_hook(divide)  # after those that set the rate of this step
        yield
        hook.remove()
        for group, rate in rates:
            if group["lr"] == rate / divisor:  # else a scheduler has set the next one meanwhile
                group["lr"] = rate
        decay = self._planned.decay(stage)
        if decay is not None:
            self._means[stage] = [
                decay * mean + (1 - decay) * (master.detach() - old)
                for mean, master, old in zip(means, self._masters[stage], before, strict=True)
            ]

    def _moved(self, stage: int, steps: int) -> list[Tensor]:
        masters = self._masters[stage]
        if self._planned is not None and self._planned.predicts:
            moves = [self._direction(self._optimizers[stage], master) for master in masters]
        else:
            moves = self._means.get(stage) or [torch.zeros_like(master) for master in masters]
        return [master.detach() + steps * move for master, move in zip(masters, moves, strict=True)]

    @staticmethod
    def _direction(optimizer: torch.optim.Optimizer, master: nn.Parameter) -> Tensor:
        """A step without the gradient of today: Adam's (arXiv 1412.6980, algorithm 1), or that of the momentum."""
        state = optimizer.state[master]
        (group,) = [group for group in optimizer.param_groups if any(each is master for each in group["params"])]
        if "exp_avg" in state:
            (first, second), steps = group["betas"], float(state["step"])
            mean, square = state["exp_avg"] / (1 - first**steps), state["exp_avg_sq"] / (1 - second**steps)
            return -group["lr"] * (mean / (square.sqrt() + group["eps"]))
        if state.get("momentum_buffer") is not None:
            return -group["lr"] * state["momentum_buffer"]
        return torch.zeros_like(master)
