"""What of Megatron is replaced by name. Knows no Megatron, so that it can be looked for where that is not installed."""

TARGETS = (
    ("megatron.core.pipeline_parallel.schedules", "get_forward_backward_func"),
    ("megatron.training.arguments", "add_megatron_arguments"),
    ("megatron.training.initialize", "validate_args"),
    ("megatron.training.training", "setup_model_and_optimizer"),
    ("megatron.training.training", "build_train_valid_test_data_iterators"),
    ("megatron.training.training", "save_checkpoint"),
    ("megatron.training.training", "logical_and_across_model_parallel_group"),
    ("megatron.training.training", "reduce_max_stat_across_model_parallel_group"),
)
"""Functions that are replaced, by the module that uses or defines them."""
