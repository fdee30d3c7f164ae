"""How many backwards a schedule lets pass on a stage between the end of a window and its update."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .schedule import Schedule


def delays_of(schedule: Schedule) -> tuple[int, ...]:
    """For every stage: none, but where decisions are relayed. Those go down with gradients and up with activations, and
    a stage updates when the second reach it.

    Raises:
        ValueError: where they cannot be relayed.
    """
    if not schedule.relays:
        return (0,) * schedule.num_stages
    if schedule.placement.directions > 1:
        raise ValueError(
            f"{schedule.name}: decisions are relayed up and down one direction, it has "
            f'{schedule.placement.directions}; use "latest" or "meeting"'
        )
    if schedule.weights != "latest":
        raise ValueError(
            f"{schedule.name}: relayed decisions let updates come later, which needs stages that use their latest "
            f"weights (paci); its weights are {schedule.weights!r}: use \"decisions\": \"latest\", \"local\" or "
            '"meeting"'
        )
    # While a decision comes up, a stage backwards what stage 0 has admitted, but for what is between itself and the
    # end; before a flush, where nothing follows, all of it.
    first, stages = schedule.in_flight[0], range(1, schedule.num_stages)
    left = [1 if schedule.flush_every else min(schedule.in_flight[stage], stages.stop - stage) for stage in stages]
    return 0, *(max(0, first - below) for below in left)


def check_delays(schedule: Schedule) -> None:
    """Refuse delays that no program can have.

    Raises:
        ValueError: with the numbers.
    """
    name, delays = schedule.name, schedule.update_delay
    if len(delays) != schedule.num_stages:
        raise ValueError(f"{name}: update_delay needs one entry for each of {schedule.num_stages} stages, got {delays}")
    if min(delays) < 0:
        raise ValueError(f"{name}: update_delay counts backwards, at least 0; got {delays}")
    if schedule.flush_every and max(delays) and not schedule.relays:
        raise ValueError(f"{name}: an update cannot stand later than a flush that waits for it")
    late = [stages for stages in schedule.tied if delays[stages[0]]]
    if late:
        raise ValueError(
            f"{name}: a weight that stages share is stepped at its home at once, which is on the first of {late[0]}, "
            f'where updates stand {delays[late[0][0]]} backwards late; use "decisions": "latest", or keep it on stage 0'
        )
    per_direction = schedule.micro_batches // schedule.placement.directions
    if schedule.reduces and max(delays) > per_direction:
        raise ValueError(
            f"{name}: where ranks share stages an update stands at most one window late, so update_delay is at most "
            f"{per_direction}, got {max(delays)}"
        )
