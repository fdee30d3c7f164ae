"""The schedules in DeepSpeed: a ``PipelineEngine`` that runs programs, and the key that selects it."""
