"""What is refused on megatron-core itself, with the reason and the alternative, before anything is made."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from amdp_plugin.megatron import forward_backward_func
from amdp_plugin.megatron.refusals import OPTIONS
from tests.processes import run_ranks

from .jobs import Job
from .training import Trainer

CONFIGURATIONS = {
    "config": TransformerConfig, "ddp_config": DistributedDataParallelConfig, "optimizer": OptimizerConfig
}  # fmt: skip
HERE = {
    (place, each.name)
    for place, configuration in CONFIGURATIONS.items()
    for each in fields(configuration)
    if any(each.name in refused.names for refused in OPTIONS)
}
"""Refused options that one of Megatron's own configurations has; the others are Megatron-LM's arguments."""


COMPENSATED = {"name": "paci", "compensation": "error_feedback"}
WITH_FEEDBACK = {name for refused in OPTIONS if refused.compensated for name in refused.names}
"""Refused by error feedback alone."""


def used(name: str) -> Any:
    """A value with which the option is used."""
    return {"cuda_graph_impl": "local", "fp8": "hybrid", "fp4": "nvfp4"}.get(name, 2)


def process_groups() -> int:
    return len(dist.distributed_c10d._world.pg_map)


def attempt(trainer: Trainer, schedule: Any, **more: Any) -> str:
    """The refusal of this schedule, of which nothing may have come."""
    step, groups = trainer.optimizer.step, process_groups()
    hook = forward_backward_func(schedule)
    arguments = dict(model=[trainer.chunk], optimizer=trainer.optimizer, model_provider=trainer.job.provider)
    with pytest.raises(ValueError) as refusal:
        hook.attach(**{**arguments, "num_microbatches": 4, **more})
    assert trainer.optimizer.step == step and process_groups() == groups
    assert not hook.guests and not hasattr(hook, "pipeline")
    return str(refusal.value)


def attempt_all_options(rank: int, job: Job) -> dict[str, str]:
    """All refusals, and then a hook that works all the same."""
    trainer = Trainer(rank, job.stock)
    places = {
        "config": trainer.config, "ddp_config": trainer.chunk.ddp_config, "optimizer": trainer.optimizer.config
    }  # fmt: skip
    messages = {}
    for place, name in HERE:
        before = getattr(places[place], name)
        setattr(places[place], name, used(name))
        messages[f"{place} {name}"] = attempt(trainer, COMPENSATED if name in WITH_FEEDBACK else "paci")
        if name in WITH_FEEDBACK:
            hook = forward_backward_func("paci")
            hook.attach([trainer.chunk], trainer.optimizer, None, num_microbatches=4)
            hook.detach()
        setattr(places[place], name, before)
    trainer.attach("paci")
    trainer.train(1)
    return messages


@pytest.fixture(scope="module")
def refused_options() -> list[dict[str, str]]:
    return run_ranks(2, attempt_all_options, Job("paci"))


@pytest.mark.parametrize(("place", "name"), sorted(HERE))
def test_option_is_refused(place: str, name: str, refused_options: list[dict[str, str]]) -> None:
    (refused,) = [refused for refused in OPTIONS if name in refused.names]
    flag = f"--{name.replace('_', '-')} {used(name)}"
    for messages in refused_options:
        message = messages[f"{place} {name}"]
        assert message == f"schedule 'paci' cannot be used with {flag}: {refused.why}; {refused.instead}"


def test_refused_options_exist() -> None:
    """Nearly all of them where this looks; the rest are flags of Megatron-LM's alone, of this or another release."""
    assert len({name for _, name in HERE}) >= 15


def attempt_the_rest(rank: int, job: Job) -> dict[str, str]:
    trainer = Trainer(rank, job.stock)
    tied = Trainer(rank, replace(job.stock, tied=True))
    other = Trainer(rank, job.stock)
    messages = {
        "chunks": attempt(trainer, "paci", model=[trainer.chunk, other.chunk]),
        "without DDP": attempt(trainer, "paci", model=trainer.bare),
        "window": attempt(trainer, "amdp", num_microbatches=3),
        "tied": attempt(tied, "pipedream-2bw"),
        "tied, independent": attempt(tied, {"name": "amdp", "decisions": "local"}),
        "parked": attempt(trainer, {"name": "amdp", "parked": True}),
        "costs": attempt(trainer, {"name": "paci", "stage_costs": [1.0, 1.0]}),
        "compensation of nothing": attempt(trainer, {"name": "1f1b", "compensation": "error_feedback"}),
        "loss scale": attempt_with_fp16(trainer),
    }
    hook = forward_backward_func("paci")
    trainer.function = hook
    messages["not attached"] = call(trainer)
    trainer.attach("paci")
    messages["attached twice"] = attempt(trainer, "amdp")
    messages["other model"] = call(trainer, model=other.chunk)
    messages["iterators"] = call(trainer, data_iterator=[trainer.data, trainer.data])
    messages["shapes"] = call(trainer, adjust_tensor_shapes_fn=lambda *shapes: shapes)
    return messages


def attempt_with_fp16(trainer: Trainer) -> str:
    trainer.config.fp16 = True
    message = attempt(trainer, {"name": "paci", "decisions": "local"})
    trainer.config.fp16 = False
    return message


def call(trainer: Trainer, **more: Any) -> str:
    with pytest.raises(ValueError) as refusal:
        trainer.run(**more)
    return str(refusal.value)


MESSAGES = {
    "chunks": ["each rank has one model chunk, got 2", "interleaved virtual stages are not supported"],
    "without DDP": ["must be under Megatron's DistributedDataParallel"],
    "window": ["3 micro-batches do not divide over 2 directions", "use 2 or 4"],
    "tied": ["tied embeddings", "--untie-embeddings-and-output-weights", "whose updates meet", "1f1b"],
    "tied, independent": ["tied embeddings", "amdp with decisions in a meeting"],
    "parked": ['leave out "parked"'],
    "costs": ["stage costs need one entry for each of 4 stages, got 2"],
    "compensation of nothing": ["1f1b: compensation 'error_feedback' means nothing", "(staleness 0)"],
    "loss scale": ["--fp16", "all stages must decide together", "--bf16"],
    "not attached": ["attach(model, optimizer) comes before the first call"],
    "attached twice": ["a schedule steps this optimizer already", "detach()"],
    "other model": ["another model than the one that attach() was given"],
    "iterators": ["each rank has one data iterator, got 2"],
    "shapes": ["adjust_tensor_shapes_fn cannot be used"],
}


@pytest.fixture(scope="module")
def refusals() -> list[dict[str, str]]:
    return run_ranks(4, attempt_the_rest, Job("paci", 4))


@pytest.mark.parametrize("case", MESSAGES)
def test_refused(case: str, refusals: list[dict[str, str]]) -> None:
    for messages in refusals:
        for part in MESSAGES[case]:
            assert part in messages[case]


def test_unknown_schedules_and_options_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"unknown schedule 'pacy'.*1f1b.*paci"):
        forward_backward_func("pacy")
    with pytest.raises(ValueError, match=r"'paci' has no option 'in_flight'.*extra_in_flight"):
        forward_backward_func({"name": "paci", "in_flight": 3})


def attempt_without_a_provider(rank: int, job: Job) -> str:
    trainer = Trainer(rank, job.stock)
    trainer.function = forward_backward_func(job.schedule)
    trainer.function.attach(trainer.chunk, trainer.optimizer)
    return call(trainer)


def test_guests_need_a_provider() -> None:
    for rank, message in enumerate(run_ranks(4, attempt_without_a_provider, Job("amdp", 4))):
        assert f"pipeline rank {rank} also holds the stages [{3 - rank}]" in message
        assert "attach() needs the model_provider" in message


def attempt_different_programs(rank: int) -> str:
    trainer = Trainer(rank, Job({"name": "paci", "extra_in_flight": rank % 2}, 3, 2))
    return call(trainer)


def test_different_schedules_on_the_ranks_are_refused() -> None:
    """On all of them, and at once: they would wait for each other."""
    for rank, message in enumerate(run_ranks(3, attempt_different_programs)):
        assert f"different programs, rank {rank} for ('paci', {{'extra_in_flight': {rank % 2}}}, 3, 2" in message
