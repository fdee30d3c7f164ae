"""Which weights the delayed backward uses on Megatron's own layers: the latest, and not those of its forward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from tests.processes import run_ranks

from .jobs import DISTRIBUTED, VOCABULARY, Job
from .oracle import assert_equals_oracle, make_adam, oracle
from .test_stock import FULL
from .training import Trainer, assert_same, copies

WIDTH, STEPS = 16, 5


def keep_what_is_saved() -> AbstractContextManager[Any]:
    """Stashing: a graph keeps the values that its forward has seen."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda tensor: tensor)


class Layers(MegatronModule):
    """Two stages without anything that is not linear, so that their gradients can be written down: an embedding, a
    column-parallel and a row-parallel matrix; and a matrix whose outputs' squares are the loss of a token."""

    def __init__(self, config: Any, first: bool) -> None:
        super().__init__(config)
        self.model_type, self.share_embeddings_and_output_weights = ModelType.encoder_or_decoder, False
        settings = {"config": config, "init_method": config.init_method}
        matrix: Any = {**settings, "bias": False, "skip_bias_add": False}
        self.pre_process, self.input_tensor = first, None
        if first:
            self.embedding = tensor_parallel.VocabParallelEmbedding(VOCABULARY, WIDTH, **settings)
            self.column = tensor_parallel.ColumnParallelLinear(WIDTH, 2 * WIDTH, **matrix)
            self.row = tensor_parallel.RowParallelLinear(2 * WIDTH, WIDTH, input_is_parallel=True, **matrix)
        else:
            self.out = tensor_parallel.ColumnParallelLinear(WIDTH, VOCABULARY, gather_output=True, **matrix)

    def set_input_tensor(self, tensors: list[Tensor]) -> None:
        self.input_tensor = tensors[0]

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.pre_process:
            output = self.row(self.column(self.embedding(tokens))[0])[0]
            return make_viewless_tensor(output, requires_grad=True, keep_graph=True)
        return self.out(self.input_tensor)[0].float().pow(2).sum(-1)


@dataclass(frozen=True)
class LayersJob(Job):
    """The same job on :class:`Layers`."""

    def provider(self, pre_process: bool, post_process: bool, **others: Any) -> Any:
        torch.manual_seed(5)
        return Layers(others.get("config") or self.config(), pre_process)


class Weights(NamedTuple):
    """Of both stages, [outputs, inputs] but for the embedding [tokens, width]."""

    embedding: Tensor
    column: Tensor
    row: Tensor
    out: Tensor


def gradients(seen: Weights, now: Weights, out: Tensor, tokens: Tensor) -> Weights:
    """Of a micro-batch that was forwarded with ``seen`` and is backwarded with ``now``."""
    tokens = tokens.view(-1)
    embedded = seen.embedding[tokens]
    hidden = embedded @ seen.column.T
    result = hidden @ seen.row.T
    of_outputs = (2 * (result @ out.T).float() / len(tokens)).to(out.dtype)
    of_result = of_outputs @ out
    of_hidden = of_result @ now.row
    of_embedded = of_hidden @ now.column
    of_embedding = torch.zeros_like(now.embedding).index_add_(0, tokens, of_embedded)
    return Weights(of_embedding, of_hidden.T @ embedded, of_result.T @ hidden, of_outputs.T @ result)


def by_hand(first: Weights, job: Job, latest: bool) -> Weights:
    """``STEPS`` updates of paci with two stages and windows of one: the first stage forwards micro-batch ``m`` with
    version ``max(0, m - 1)``, and backwards it when it has version ``m``."""
    masters = [torch.nn.Parameter(weight.float().clone()) for weight in first]
    adam = make_adam(job, masters)
    versions = [first]
    for m, (tokens, _) in enumerate(islice(job.batches(), STEPS)):
        seen, now = versions[max(0, m - 1)], versions[m]
        for master, gradient in zip(masters, gradients(seen, now if latest else seen, now.out, tokens), strict=True):
            master.grad = gradient.float()
        adam.step()
        versions.append(Weights(*(master.detach().to(first.out.dtype, copy=True) for master in masters)))
    return versions[STEPS]


def train(rank: int, job: Job, stash: bool) -> tuple[list[Tensor], dict[str, Any]]:
    """The weights of this rank at first, and how training ended; with ``stash``, a graph keeps what it has saved."""
    trainer = Trainer(rank, job)
    before = copies(trainer.bare)
    with keep_what_is_saved() if stash else nullcontext():
        trainer.train(STEPS)
    return before, trainer.result()


def joined(parts: list[list[Tensor]]) -> list[Tensor]:
    """A stage's weights of its tensor-parallel ranks' (all of them but the row-parallel one are cut along rows)."""
    return [
        torch.cat(each, dim=1 if number == 2 else 0) if len(parts) > 1 else each[0]
        for number, each in enumerate(zip(*parts, strict=True))
    ]


OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, distributed optimizer": DISTRIBUTED,
    "fp32, tensor parallel": {"tensor": 2},
    "bf16": {"bf16": True},
    "bf16, distributed optimizer": {"bf16": True, **DISTRIBUTED},
}


@pytest.mark.parametrize("stash", [False, True], ids=["latest", "stashed, to see that the form tells them apart"])
@pytest.mark.parametrize("case", OPTIONS)
def test_backward_of_linear_layers(case: str, stash: bool) -> None:
    """Compared with a closed form, which sums in another order than the layers."""
    options: dict[str, Any] = {"optimizer": {}, **OPTIONS[case]}
    options["optimizer"] = {**options["optimizer"], "adam_eps": 1e-3, "lr": 3e-2}
    job = LayersJob("paci", 2, 1, model={"init_method_std": 0.3}, **options)
    runs = run_ranks(job.world, train, job, stash)
    assert [result["gap"] for _, result in runs] == [1] * job.tensor + [0] * job.tensor
    stages = [runs[: job.tensor], runs[job.tensor :]]
    first = Weights(*(weight for ranks in stages for weight in joined([before for before, _ in ranks])))
    found = Weights(
        *(w for stage, ranks in enumerate(stages) for w in joined([result["weights"][stage] for _, result in ranks]))
    )
    expected, other = by_hand(first, job, not stash), by_hand(first, job, stash)
    for name in ("embedding", "column"):  # of these two the gradients depend on it
        value, right, wrong = (getattr(each, name).float() for each in (found, expected, other))
        near, far = (value - right).norm(), (value - wrong).norm()
        assert near < far / (20 if job.bf16 else 1000), f"{name}: {near} from one form, {far} from the other"
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if job.bf16 else {"rtol": 1e-4, "atol": 1e-5}
    for value, right in zip(found, expected, strict=True):
        torch.testing.assert_close(value, right, **tolerance)


@pytest.mark.parametrize("case", ["fp32", "fp32, distributed optimizer", "bf16", "bf16, distributed optimizer"])
def test_backward_of_whole_layers(case: str) -> None:
    """Attention, norms, MLP and loss, in the oracle of which the backward reads the new version; with what is saved
    kept, the very same run is another."""
    job = Job("paci", 2, 1, **OPTIONS[case])
    expected = oracle(job, STEPS)
    _, found = zip(*run_ranks(2, train, job, False), strict=True)
    assert_equals_oracle(list(found), expected)
    _, stashed = zip(*run_ranks(2, train, job, True), strict=True)
    with pytest.raises(AssertionError, match=r"rank 0, stage 0: parameter \d+ differs"):
        assert_equals_oracle(list(stashed), expected)


def test_recomputation_forgets_what_was_saved() -> None:
    """It runs the forward anew, with the new weights for all of it: keeping what is saved changes nothing then, and
    without recomputation the run is another."""
    job = Job("paci", 2, 1, model=FULL)
    found, kept, saved = (
        [result for _, result in run_ranks(2, train, *chosen)]
        for chosen in ((job, False), (job, True), (replace(job, model={}), False))
    )
    assert_same(found, kept)
    with pytest.raises(AssertionError, match="rank 0"):
        assert_same(found, saved)
