"""Error feedback (DESIGN.md, section 3): an optimizer goes on from its plain iterate, its stage computes ahead of it.

What the optimizer has made is ``z``; the stage computes with ``x = z + coefficient * (z - z_before)``. Where the host
steps a master copy, that is ``z``, and the weights are ``x``: nothing more is kept. Where it steps the weights
themselves, ``z`` is one more copy of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .weights import live_update


class ErrorFeedback:
    """The weights of a stage at its home, and the plain iterate behind them.

    Args:
        parameters: of the stage.
        optimizers: those that step them, or master copies or shards of either.
        refresh: writes into the parameters what was stepped, where that is not the parameters themselves.
        coefficient: see :meth:`begin`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        optimizers: Iterable[torch.optim.Optimizer],
        refresh: Callable[[], None] = lambda: None,
        coefficient: float | None = None,
    ) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.optimizers, self.refresh = list(optimizers), refresh
        self._storages = {_storage(parameter) for parameter in self.parameters}
        self._plain: dict[Tensor, Tensor] = {}
        """``z`` of what is stepped and holds ``x``; within a step, ``z_before`` until it is made."""
        self._ahead: list[Tensor] | None = None
        """``x``, while the parameters hold ``z``."""
        self.begin(coefficient)

    def begin(self, coefficient: float | None) -> None:
        """Compute with :func:`.plan.staleness.coefficient` from the next step on; with ``None`` do nothing, ever.

        Raises:
            ValueError: where nothing can be done before and after the step of an optimizer.
        """
        for optimizer in () if coefficient is None else self.optimizers:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise ValueError(
                    f"compensation 'error_feedback' cannot be used with the optimizer {type(optimizer).__name__}, "
                    "before and after whose step nothing can be done: use one that is a torch.optim.Optimizer, or "
                    '"compensation": "none"'
                )
        self.coefficient = coefficient

    @contextmanager
    def stepping(self, late: bool = True) -> Iterator[None]:
        """Within it the host makes a step, in place: from ``z``, and what it copies into weights is ``x``.

        Args:
            late: whether gradients are; before a pipeline runs freely, ``x`` is ``z``.
        """
        if self.coefficient is None or not late:
            self._plain.clear()  # a checkpoint's, which is what the weights are
            yield
            return
        with ExitStack() as hooks:
            for optimizer in self.optimizers:
                hooks.callback(optimizer.register_step_pre_hook(self._before_step).remove)
                hooks.callback(optimizer.register_step_post_hook(self._after_step).remove)
            yield
        with torch.no_grad():
            for master in [tensor for tensor in self._plain if not self._is_weight(tensor)]:
                master.copy_(self._plain.pop(master))

    def put_plain(self) -> None:
        """Let the parameters hold ``z``, for a checkpoint or an evaluation, until :meth:`put_ahead`."""
        if self.coefficient is None or self._ahead is not None:
            return
        with live_update(self.parameters), torch.no_grad():
            self._ahead = [parameter.detach().clone() for parameter in self.parameters]
            for weight, plain in self._plain.items():
                weight.copy_(plain)
            self.refresh()

    def put_ahead(self) -> None:
        """Let the parameters hold ``x`` again."""
        if self._ahead is not None:
            self._write(self._ahead)
            self._ahead = None

    def ahead(self) -> list[Tensor] | None:
        """What the stage computes with, for a checkpoint; ``None`` without error feedback."""
        if self.coefficient is None:
            return None
        return [parameter.detach() for parameter in self.parameters] if self._ahead is None else self._ahead

    def restart(self, ahead: Sequence[Tensor] | None) -> None:
        """The parameters, and master copies of them, hold the ``z`` of a checkpoint.

        Args:
            ahead: what :meth:`ahead` returned when it was written. Without it the first window computes with ``z``.

        Raises:
            ValueError: where it is of other parameters.
        """
        self._plain.clear()
        self._ahead = None
        if self.coefficient is None or ahead is None:
            return
        if [value.shape for value in ahead] != [parameter.shape for parameter in self.parameters]:
            raise ValueError(
                "the weights that error feedback computed with are of another stage: load the checkpoint with as many "
                "stages as wrote it, or without the files that hold them"
            )
        self._plain = {weight: weight.detach().clone() for weight in self._stepped_weights()}
        self._write(ahead)

    @property
    def has_masters(self) -> bool:
        """Whether master copies are stepped, and no weights of the stage themselves."""
        return not self._stepped_weights()

    def kept(self) -> list[Tensor]:
        """What lies in memory beside the host's own, from one step to the next."""
        return [plain for weight, plain in self._plain.items() if self._is_weight(weight)]

    def bytes_kept(self) -> int:
        """What that comes to, from the first step on."""
        weights = () if self.coefficient is None else self._stepped_weights()
        return sum(weight.numel() * weight.element_size() for weight in weights)

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for tensor in _stepped(optimizer):
            if tensor in self._plain:
                tensor.copy_(self._plain[tensor])
            else:
                self._plain[tensor] = tensor.detach().clone()

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        assert self.coefficient is not None
        for tensor in _stepped(optimizer):
            if tensor in self._plain:
                difference = self._plain.pop(tensor).neg_().add_(tensor)
                self._plain[tensor] = tensor.detach().clone()
                tensor.add_(difference.mul_(self.coefficient))

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        with live_update(self.parameters):
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)

    def _stepped_weights(self) -> list[Tensor]:
        stepped = [tensor for optimizer in self.optimizers for tensor in _stepped(optimizer)]
        return [tensor for tensor in stepped if self._is_weight(tensor)]

    def _is_weight(self, tensor: Tensor) -> bool:
        """Whether the stage computes with ``tensor`` itself, or with what it is a part of; else it is a master copy."""
        return _storage(tensor) in self._storages


def _stepped(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """At the time of a step: some hosts step one group after the other."""
    for group in optimizer.param_groups:
        yield from group["params"]


def _storage(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()
