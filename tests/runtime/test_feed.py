"""Micro-batches by number."""

from __future__ import annotations

import pytest

from amdp_plugin.runtime.feed import Feed


def test_what_other_ranks_use_is_let_go() -> None:
    """Every micro-batch is pulled, so that their numbers are those of 1F1B; only the wanted ones are kept."""
    feed = Feed(iter("abcdefgh").__next__, lambda number: number % 4 in (0, 1))
    assert feed.has(7)
    assert [feed.take(number) for number in (0, 1, 4, 5)] == ["a", "b", "e", "f"]
    assert sorted(feed._kept) == [0, 1, 4, 5]
    feed.release(1)
    assert sorted(feed._kept) == [0, 4, 5]
    with pytest.raises(KeyError):
        feed.take(2)


def test_numbers_move_with_the_windows() -> None:
    """After two windows of 4, micro-batch 8 is number 4 when they have been windows of 2."""
    feed = Feed(iter(range(100)).__next__)
    assert feed.has(10)
    for number in range(8):
        feed.release(number)
    feed.renumber(8, 4)
    assert [feed.take(number) for number in (4, 5, 6, 7)] == [8, 9, 10, 11]
