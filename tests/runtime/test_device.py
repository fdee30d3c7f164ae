"""The host goes on before a device is done, but not far, not for ever, and asks it nothing that waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor

from amdp_plugin.plan.action import Action
from amdp_plugin.plan.costs import CostModel
from amdp_plugin.plan.devices import HOST_AHEAD
from amdp_plugin.plan.planner import Planner
from amdp_plugin.plan.schedules import make
from amdp_plugin.runtime.device import DEVICE_CLOCK, Host
from amdp_plugin.runtime.executor import Executor
from amdp_plugin.runtime.plain import PlainWorker
from amdp_plugin.runtime.timeline import RUN, WAIT, Event, Timeline
from amdp_plugin.runtime.watch import FIRST_WINDOW, InStream, PipelineStallError, Watch
from tests.late_device import LateDevice, counting_waits
from tests.processes import run_ranks

from .pipelines import Case, make_executor


class SlowDevice:
    """Work is numbered as it is given; ``done`` says how far the device is. Every look lets it do ``pace`` more."""

    clock, runs_ahead = DEVICE_CLOCK, True

    def __init__(self, pace: int = 0) -> None:
        self.given = self.done = self.most_behind = 0
        self.pace, self.fetched = pace, 0

    def mark(self) -> int:
        self.given += 1
        self.most_behind = max(self.most_behind, self.given - self.done)
        return self.given

    def is_done(self, mark: int) -> bool:
        done = mark <= self.done
        self.done = min(self.given, self.done + self.pace)
        return done

    def seconds(self, mark: int) -> float:
        assert mark <= self.done, "CUDA refuses the time of an event that is not done"
        return float(mark)

    def to_host(self, tensor: Tensor) -> Any:
        self.fetched += 1
        device, mark = self, self.mark()

        class Copy:
            def is_done(self) -> bool:
                return mark <= device.done

            def values(self) -> Tensor:
                assert self.is_done(), "read before it is there"
                return tensor

        return Copy()

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor


class BareWork:
    """What NCCL's work does in a bare wait; with a timeout it would block the host."""

    def __init__(self) -> None:
        self.waits, self.failed = 0, False

    def is_completed(self) -> bool:
        return self.failed

    def wait(self) -> bool:
        self.waits += 1
        if self.failed:
            raise torch.distributed.DistBackendError("NCCL error: remote process exited")
        return True


def watch_on(device: SlowDevice, timeout_seconds: float = 0.02) -> Watch:
    watch = Watch(3, timeout_seconds, Timeline(device=device))
    watch.in_first_window = False
    return watch


def test_times_are_read_when_the_device_is_through() -> None:
    device = SlowDevice()
    timeline = Timeline(device=device)
    for name in ("0F0", "0F1"):
        with timeline.span(name):
            pass
    assert not timeline.events and timeline.totals.run == 0
    device.done = 3  # the second span has begun
    timeline.settle()
    assert list(timeline.events) == [Event("0F0", RUN, 1.0, 2.0)]
    device.done = 4
    timeline.settle()
    assert [event.name for event in timeline.events] == ["0F0", "0F1"] and timeline.totals.run == 2.0


def test_a_span_within_another_cuts_it_in_pieces() -> None:
    """What is waited for within an update is no part of what it ran."""
    device = SlowDevice()
    timeline = Timeline(device=device)
    with timeline.span("1U0"):
        for name in ("a sum", "another"):
            with timeline.span(name, WAIT):
                pass
    device.done = 99
    timeline.settle()
    assert list(timeline.events) == [
        Event("1U0", RUN, 1.0, 2.0), Event("a sum", WAIT, 2.0, 3.0), Event("1U0", RUN, 3.0, 4.0),
        Event("another", WAIT, 4.0, 5.0), Event("1U0", RUN, 5.0, 6.0),
    ]  # fmt: skip
    assert (timeline.totals.run, timeline.totals.wait) == (3.0, 2.0)


def test_the_host_is_at_most_two_actions_ahead() -> None:
    device = SlowDevice()
    watch = watch_on(device)
    for micro_batch in range(HOST_AHEAD):
        watch.keep_pace()
        watch.given(Action(0, "F", micro_batch))
    with pytest.raises(PipelineStallError, match=r"stage 0, at 0F0: computing did not complete within 0.02 s"):
        watch.keep_pace()
    device.done = 1
    watch.keep_pace()
    with pytest.raises(PipelineStallError, match="at 0F1"):
        watch.keep_pace(0)


def test_a_message_that_does_not_come_is_named_and_the_host_does_not_block_on_it() -> None:
    device, work = SlowDevice(), BareWork()
    watch = watch_on(device)
    watch.wait(InStream(work), "receiving", Action(1, "F", 7), 2)  # type: ignore[arg-type]
    assert work.waits == 1
    watch.given(Action(1, "F", 7))
    watch.given(Action(1, "F", 8))
    with pytest.raises(PipelineStallError, match=r"rank 3, stage 1, at 1F7: receiving with rank 2 did not complete"):
        watch.keep_pace()


def test_a_message_that_was_given_up_is_an_error_though_the_device_goes_on() -> None:
    device, work = SlowDevice(), BareWork()
    watch = watch_on(device, timeout_seconds=60)
    watch.wait(InStream(work), "receiving", Action(1, "F", 7), 2)  # type: ignore[arg-type]
    work.failed, device.done = True, device.given
    with pytest.raises(PipelineStallError, match=r"at 1F7: receiving with rank 2 failed: the peer is gone"):
        watch.keep_pace(0)


def test_work_of_other_backends_is_waited_for_with_the_whole_timeout() -> None:
    given = []

    class Work:
        def wait(self, timeout: timedelta) -> bool:
            given.append(timeout)
            return True

    watch = watch_on(SlowDevice(), timeout_seconds=7)
    watch.wait(Work(), "receiving", None, 0)
    assert given == [timedelta(seconds=7)]


def test_the_limit_counts_from_the_wait_and_the_first_window_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("amdp_plugin.runtime.watch.time.monotonic", lambda: now[0])
    monkeypatch.setattr("amdp_plugin.runtime.watch.time.sleep", lambda seconds: now.__setitem__(0, now[0] + 1))
    watch = Watch(0, 10, Timeline(device=SlowDevice()))
    watch.given(Action(0, "F", 0))
    for first, limit in ((True, 10 * FIRST_WINDOW), (False, 10)):
        now[0] += 1000  # given long ago: that does not count
        watch.in_first_window, since = first, now[0]
        with pytest.raises(PipelineStallError, match=f"timed out after {limit:g} s"):
            watch.keep_pace(0)
        assert now[0] - since == limit + 1


def test_a_value_is_fetched_when_it_is_there_or_not_at_all() -> None:
    patient = watch_on(SlowDevice(pace=1), timeout_seconds=60)
    assert float(patient.fetch(torch.tensor(3.0), "reporting")) == 3
    with pytest.raises(PipelineStallError, match="reporting did not complete"):
        watch_on(SlowDevice()).fetch(torch.tensor(3.0), "reporting")


def endless() -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield torch.ones(2, 3), torch.zeros(2, 3)


@pytest.mark.parametrize("device", [Host(), SlowDevice(pace=1)], ids=["host", "device"])
def test_windows_on_a_device_ask_for_values_once_a_window(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values read by the host are counted where all ways to read them lead; the executor asks for none itself."""
    asked = []
    for name in ("item", "tolist", "__float__", "cpu"):
        whole = getattr(Tensor, name)
        monkeypatch.setattr(
            Tensor, name, lambda self, *args, name=name, whole=whole: (asked.append(name), whole(self, *args))[1]
        )
    schedule = make("paci", 1, 4)
    module = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    loss = torch.nn.functional.mse_loss
    worker = PlainWorker(schedule, 0, {0: module}, {0: optimizer}, loss, endless())
    watch = Watch(0, 5, Timeline(device=device))
    executor = Executor(Planner(schedule, CostModel.relative(1)), 0, worker, None, watch)
    executor.run_window()
    asked.clear()
    for _ in range(3):
        executor.run_window()
    assert asked == ["tolist"] * 3
    if isinstance(device, SlowDevice):
        # An action's span has two instants, its end one more.
        assert 0 < device.most_behind <= 3 * (HOST_AHEAD + 1)


def pending_at_questions(rank: int, case: Case) -> dict[str, list[tuple[int, int]]]:
    """What the device has still to do when the worker is asked for what may need a norm, as a window closes, in its
    update, or in that which a quiet moment hastens: (messages, all)."""
    executor, worker = make_executor(rank, case)
    device, watch = LateDevice(), executor._watch
    found: dict[str, list[tuple[int, int]]] = {"close": [], "update": []}

    def noting(name: str, whole: Callable[[Action], None]) -> Callable[[Action], None]:
        def asked(action: Action) -> None:
            found[name].append((sum(given.work is not None for given in watch._given), len(watch._given)))
            whole(action)

        return asked

    for name in found:
        setattr(worker, name, noting(name, getattr(worker, name)))
    with device.in_use():
        watch.timeline = Timeline(device=device)
        for _ in range(4):
            executor.run_window()
        made = len(found["update"])
        executor.quiesce()
    assert rank == 0 or len(found["update"]) > made, "updates were still to come"
    return found


def test_a_question_about_gradients_does_not_stand_before_a_message() -> None:
    """The host waits, within the limit, until its device is past all messages, before it may ask without one; but not
    for what the device computes."""
    case = Case("paci", 3, 2, options=(("decisions", "relayed"),), clipping=0.05)
    for found in run_ranks(3, pending_at_questions, case):
        assert len(found["close"]) == len(found["update"]) == 4
        pending = found["close"] + found["update"]
        assert not any(messages for messages, _ in pending), found
        assert any(everything for _, everything in pending), "the device is late"


def test_what_has_no_limit_is_asked_when_the_device_is_past_all_messages() -> None:
    device, work = SlowDevice(), BareWork()
    watch = watch_on(device)
    watch.given(Action(1, "F", 6))
    watch.wait(InStream(work), "receiving", Action(1, "F", 7), 2)  # type: ignore[arg-type]
    watch.given(Action(1, "F", 7))
    with pytest.raises(PipelineStallError, match="at 1F6: computing"):
        watch.pass_messages()
    device.done = 1
    with pytest.raises(PipelineStallError, match="at 1F7: receiving with rank 2"):
        watch.pass_messages()
    device.done = device.given - 1
    watch.pass_messages()
    with pytest.raises(PipelineStallError, match="at 1F7: computing"):
        watch.keep_pace(0)


def test_what_is_brought_comes_while_the_host_keeps_pace() -> None:
    device, taken = LateDevice(), []
    watch = Watch(3, 60, Timeline(device=device))
    with device.in_use():
        watch.given(Action(0, "B", 0))
        watch.bring(torch.tensor(3.0), "reporting", taken.append)
        assert not taken, "the host goes on"
        for micro_batch in range(1, HOST_AHEAD + 2):
            watch.keep_pace()
            watch.given(Action(0, "B", micro_batch))
        assert taken == [3]
        watch.bring(torch.tensor(4.0), "reporting", taken.append)
        assert float(watch.fetch(torch.tensor(5.0), "a sum")) == 5
        assert taken == [3, 4], "one wait is enough for both"


class Noting:
    """Work whose wait is noted."""

    def __init__(self, done: list[Any]) -> None:
        self._done = done

    def wait(self, timeout: timedelta) -> bool:
        self._done.append("waited")
        return True


@pytest.mark.parametrize("block", ["wait", "hand_over"])
def test_what_is_brought_is_handed_over_before_the_host_waits_for_others(block: str) -> None:
    """They may wait for it. Who takes it sends it, and may come by a wait then."""
    device, done, waits = LateDevice(), [], []
    watch = Watch(3, 60, Timeline(device=device))

    def send(values: Tensor) -> None:
        done.append(float(values))
        watch.wait(Noting(done), "sending", None, 0)

    with counting_waits(lambda: waits.append(1)):
        for value in (1.0, 2.0):
            watch.bring(torch.tensor(value), "reporting", send)
        with device.pausing():
            if block == "wait":
                watch.wait(Noting(done), "receiving", None, 0)
            else:
                watch.hand_over()
    assert done == [1, "waited", 2, "waited", *(["waited"] if block == "wait" else [])], "in order"
    assert len(waits) == 1, "the device had come past both when the first was there"


@pytest.mark.parametrize("first", ["message", "values"])
def test_the_host_stops_for_values_no_longer_than_for_the_message_that_it_waits_for(first: str) -> None:
    device, done, waits = LateDevice(), [], []
    watch = Watch(3, 60, Timeline(device=device))
    watch.given(Action(0, "B", 0))
    watch.bring(torch.tensor(3.0), "reporting", lambda values: done.append(float(values)))
    with device.pausing(), counting_waits(lambda: waits.append(1)):
        watch.wait(Noting(done), "receiving a header", None, 0, has_come=lambda: first == "message")
    assert done == (["waited"] if first == "message" else [3, "waited"])
    assert not waits


def test_what_is_brought_and_does_not_come_is_named() -> None:
    watch = watch_on(SlowDevice())
    watch.bring(torch.tensor(3.0), "reporting the losses", lambda values: None)
    with pytest.raises(PipelineStallError, match=r"reporting the losses did not complete within 0.02 s"):
        watch.hand_over()
