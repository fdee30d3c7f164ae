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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First those that wait longest, so that no process waits for them at the end."""
    items.sort(key=lambda item: "test_check_gpu" not in item.nodeid)
