"""What happens when: schedules as values. Pure Python; imports neither torch nor a host framework."""
