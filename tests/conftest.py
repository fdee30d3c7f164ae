"""``--device``: where the tests compute."""

from __future__ import annotations

import pytest

from . import devices


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=devices.CHOICES,
        default=devices.chosen(),
        help="cuda: all ranks share one GPU, over gloo; nccl: a GPU for every rank; nccl-shared: one for all, "
        "over NCCL (default: cpu)",
    )


def pytest_configure(config: pytest.Config) -> None:
    devices.choose(config.getoption("--device"))
