"""Pipeline schedules without bubbles for DeepSpeed and Megatron, with a bounded and measured inconsistency."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "initialize", "install", "uninstall"]


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` that honours ``"pipeline": {"schedule": ...}`` in the DeepSpeed configuration.

    Takes the arguments of ``deepspeed.initialize`` and returns its (engine, optimizer, training_dataloader,
    lr_scheduler). Without the key it is ``deepspeed.initialize``.

    Raises:
        ValueError: when the schedule or its options are wrong, or cannot go with the rest of the
            configuration. Nothing has been made by then.
    """
    from .deepspeed.entry import initialize

    return initialize(*args, **kwargs)


def install() -> None:
    """Make ``deepspeed.initialize`` itself honour the key. May be called again; :func:`uninstall` undoes it.

    Call it before ``from deepspeed import initialize``, which would keep the function as it was.
    """
    from .deepspeed.entry import install

    install()


def uninstall() -> None:
    """Give ``deepspeed.initialize`` back as it was before :func:`install`."""
    from .deepspeed.entry import uninstall

    uninstall()
