"""What can be planned and cannot be run."""

from __future__ import annotations

from ..plan.schedule import Schedule


def check_runnable(schedule: Schedule) -> None:
    """Refuse a schedule that says what neither the engines nor the serial pipeline do.

    Raises:
        ValueError: with the alternative.
    """
    if schedule.update_delay:
        raise ValueError(
            f"schedule {schedule.name!r} can be planned, not run: an engine applies every gradient before it sums the "
            f"next window's, so update_delay must be 0, it is {schedule.update_delay} (amdp: use "
            '"updates": "together")'
        )
    if schedule.weights != "latest":
        raise ValueError(
            f"schedule {schedule.name!r} can be planned, not run: a backward uses the latest weights, and no others "
            f"are kept; its weights are {schedule.weights!r}, use \"latest\""
        )


def check_homes(schedule: Schedule) -> None:
    """Refuse a placement whose homes are not where a host builds the stages: stage ``s`` on rank ``s``.

    Raises:
        ValueError: with the placement.
    """
    if any(schedule.placement.home(stage) != stage for stage in range(schedule.num_stages)):
        raise ValueError(
            f"schedule {schedule.name!r}: its first direction must place stage s on rank s, it places them on "
            f"{schedule.placement.ranks[0]}"
        )
