"""The Megatron-LM jobs in ``scripts/``, by the command that they would run, and the patch in ``patches/``."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from tests.megatron.bert_data import standard_library_documents, write_bert_data

ROOT = Path(__file__).parents[2]
SCRIPTS, PATCH = ROOT / "scripts", ROOT / "patches" / "megatron_lm.patch"
ENTRIES = ("pretrain_bert.py", "pretrain_gpt.py")
CHECKOUT = os.environ.get("MEGATRON_LM_PATH")
needs_megatron_lm = pytest.mark.skipif(
    CHECKOUT is None, reason="set MEGATRON_LM_PATH to a checkout of Megatron-LM (core_v0.16.1)"
)

GPT, BERT = "pretrain_gpt_megatron.sh", "pretrain_bert_megatron.sh"


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """Variables of a job whose files are all there, and empty."""
    names = (*ENTRIES, "sentences.idx", "sentences.bin", "vocabulary", "merges")
    for name in names:
        (tmp_path / name).touch()
    return {
        "MEGATRON_LM_PATH": str(tmp_path),
        "DATA_PATH": str(tmp_path / "sentences"),
        "VOCAB_FILE": str(tmp_path / "vocabulary"),
        "MERGE_FILE": str(tmp_path / "merges"),
    }


def run(
    command: Iterable[str | Path], variables: dict[str, str], cwd: Path = ROOT, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """With nothing of this process's environment but PATH: jobs listen to many variables."""
    environment = {"PATH": os.environ["PATH"], **variables}
    words = [*map(str, command)]
    return subprocess.run(words, env=environment, cwd=cwd, text=True, capture_output=True, timeout=timeout)


def dry_run(script: str, variables: dict[str, str], *arguments: str) -> list[str]:
    """The words of the command that the job would run."""
    done = run(["bash", SCRIPTS / script, *arguments], {"DRY_RUN": "1", **variables})
    assert done.returncode == 0, done.stderr
    return words(done.stdout)


def words(printed: str) -> list[str]:
    return shlex.split(printed.replace("\\\n", " "))


def refusal(script: str, variables: dict[str, str]) -> str:
    """What the job says when it refuses to start."""
    done = run(["bash", SCRIPTS / script], {"DRY_RUN": "1", **variables})
    assert done.returncode == 1 and not done.stdout, done
    return done.stderr


def value(command: list[str], flag: str) -> str:
    """What follows the flag, which must be there once."""
    (place,) = (place for place, word in enumerate(command) if word == flag)
    return command[place + 1]


def megatron_arguments(command: list[str]) -> list[str]:
    """What stands behind Megatron-LM's own script."""
    (place,) = (place for place, word in enumerate(command) if word.endswith(ENTRIES))
    return command[place + 1 :]


@pytest.mark.parametrize(
    ("script", "model", "parameters", "vocabulary"),
    [(GPT, "345m", 345e6, 50257), (GPT, "1.3b", 1.3e9, 50257), (BERT, "bert-large", 340e6, 30522)],
)
def test_a_preset_is_as_large_as_its_name_says(
    data: dict[str, str], script: str, model: str, parameters: float, vocabulary: int
) -> None:
    command = dry_run(script, {**data, "MODEL": model})
    layers, hidden, heads, positions = (
        int(value(command, flag))
        for flag in ("--num-layers", "--hidden-size", "--num-attention-heads", "--max-position-embeddings")
    )
    assert 12 * layers * hidden**2 + (vocabulary + positions) * hidden == pytest.approx(parameters, rel=0.05)
    assert hidden % heads == 0 and value(command, "--seq-length") == str(positions)


def test_mock_data_has_the_tokens_of_gpt_2_and_needs_no_file(tmp_path: Path, data: dict[str, str]) -> None:
    command = dry_run(GPT, {"MEGATRON_LM_PATH": str(tmp_path), "MOCK_DATA": "1"})
    assert "--mock-data" in command and value(command, "--vocab-size") == "50256"
    assert not {"--data-path", "--vocab-file", "--merge-file"} & set(command)
    assert "MOCK_DATA=1 and DATA_PATH are both set" in refusal(GPT, {**data, "MOCK_DATA": "1"})


@pytest.mark.parametrize(
    ("schedule", "free"), [("stock", False), ("1f1b", False), ("paci", True), ("amdp", True)]
)
def test_what_a_schedule_changes_in_a_gpt_job(data: dict[str, str], schedule: str, free: bool) -> None:
    command = dry_run(GPT, {**data, "SCHEDULE": schedule})
    stock = dry_run(GPT, data)
    changed = ["--pipeline-schedule", schedule]
    changed += ["--rerun-mode", "disabled"] * free
    place = stock.index("--pipeline-schedule")
    assert command == [*stock[:place], *changed, *stock[place + 2 :]]
    assert command[place - 3 : place] == ["-m", "amdp_plugin.megatron", f"{data['MEGATRON_LM_PATH']}/pretrain_gpt.py"]


def test_bert_trains_the_same_model_under_every_schedule(data: dict[str, str]) -> None:
    assert "no mock data for BERT" in refusal(BERT, {**data, "MOCK_DATA": "1"})
    for schedule in ("stock", "1f1b", "paci", "amdp"):
        command = dry_run(BERT, {**data, "SCHEDULE": schedule})
        assert value(command, "--pipeline-schedule") == schedule
        assert "--untie-embeddings-and-output-weights" not in command
    untied = dry_run(BERT, {**data, "SCHEDULE": "paci", "UNTIE_EMBEDDINGS": "1"})
    assert "--untie-embeddings-and-output-weights" in untied


def test_the_grid_of_ranks(data: dict[str, str]) -> None:
    grid = {"NODES": "4", "GPUS_PER_NODE": "8", "TENSOR_PARALLEL": "2", "PIPELINE_PARALLEL": "8"}
    done = run(
        ["bash", SCRIPTS / GPT],
        {**data, **grid, "GLOBAL_BATCH_SIZE": "64", "MASTER_ADDR": "first", "JOB_ID": "7", "DRY_RUN": "1"},
    )
    assert "8 stages x 2 tensor ranks x 2 replicas, 8 micro-batches of 4" in done.stderr
    command = words(done.stdout)
    assert [value(command, f"--{flag}-model-parallel-size") for flag in ("tensor", "pipeline")] == ["2", "8"]
    assert [value(command, flag) for flag in ("--nnodes", "--nproc-per-node")] == ["4", "8"]
    assert [value(command, flag) for flag in ("--rdzv-endpoint", "--rdzv-id")] == ["first:29500", "7"]
    assert "--standalone" not in command
    assert "--sequence-parallel" in command and "CUDA_DEVICE_MAX_CONNECTIONS=1" in command

    local = dry_run(GPT, {**data, **grid, "MASTER_ADDR": "first", "LOCAL_LAYERS": "1"})
    assert "--sequence-parallel" not in local  # Megatron's own layers cannot

    alone = dry_run(GPT, data)
    assert value(alone, "--pipeline-model-parallel-size") == "8" and "--standalone" in alone
    assert not {"--sequence-parallel", "CUDA_DEVICE_MAX_CONNECTIONS=1", "--use-distributed-optimizer"} & set(alone)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"PIPELINE_PARALLEL": "3"}, "1 x 8 ranks do not divide into replicas of .* = 1 x 3"),
        ({"TENSOR_PARALLEL": "16"}, "1 x 8 ranks do not divide"),
        ({"PIPELINE_PARALLEL": "2", "GLOBAL_BATCH_SIZE": "24"}, "GLOBAL_BATCH_SIZE 24 is no multiple of .* = 4 x 4"),
        ({"NODES": "2"}, "set MASTER_ADDR"),
        ({"MODEL": "7b"}, "MODEL is '7b'; it must be "),
        ({"MEGATRON_LM_PATH": ""}, "set MEGATRON_LM_PATH to a checkout"),
        ({"MEGATRON_LM_PATH": "/nowhere"}, "there is no /nowhere/pretrain_"),
        ({"DATA_PATH": ""}, "set DATA_PATH to the prefix of an indexed dataset"),
        ({"DATA_PATH": "0.5 here 0.5 /nowhere"}, "there is no here.idx with here.bin"),
        ({"VOCAB_FILE": ""}, "set VOCAB_FILE to "),
        ({"VOCAB_FILE": "/nowhere"}, "VOCAB_FILE: there is no file /nowhere"),
    ],
)
@pytest.mark.parametrize("script", [GPT, BERT])
def test_mistakes_are_told_before_anything_starts(
    data: dict[str, str], script: str, variables: dict[str, str], said: str
) -> None:
    assert re.search(said, refusal(script, {**data, **variables}))


def test_options_and_arguments_reach_megatron(tmp_path: Path, data: dict[str, str]) -> None:
    variables = {
        **data,
        "DATA_PATH": f"0.3 {data['DATA_PATH']}\n0.7 {data['DATA_PATH']}",
        "SCHEDULE": "amdp",
        "SCHEDULE_OPTIONS": "options.json",
        "CHECKPOINT_DIR": "check points",
        "DISTRIBUTED_OPTIMIZER": "1",
        "ITERATIONS": "50",
    }
    command = dry_run(GPT, variables, "--eval-iters", "3", "--wandb-exp-name", "a name")
    assert command[-4:] == ["--eval-iters", "3", "--wandb-exp-name", "a name"]
    place = command.index("--data-path")
    assert command[place + 1 : place + 5] == ["0.3", data["DATA_PATH"], "0.7", data["DATA_PATH"]]
    assert value(command, "--pipeline-schedule-options") == "options.json"
    assert value(command, "--load") == value(command, "--save") == "check points"
    assert value(command, "--train-iters") == "50" and "--use-distributed-optimizer" in command


def test_on_a_cpu_the_same_job_has_another_launcher_and_no_kernels(data: dict[str, str]) -> None:
    gpu, cpu = (dry_run(BERT, {**data, "MODEL": "tiny", "GPUS_PER_NODE": "2", "CPU": number}) for number in "01")
    place = cpu.index(str(SCRIPTS / "megatron_on_cpu.py"))
    assert cpu[place + 1 : place + 3] == ["-m", "amdp_plugin.megatron"]
    assert value(cpu, "--distributed-backend") == "gloo"
    assert value(cpu, "--transformer-impl") == value(cpu, "--spec") == "local"
    assert "--bf16" in gpu and "--bf16" not in cpu
    added = {"--distributed-backend", "gloo", "--transformer-impl", "local", "--spec", "--use-cpu-initialization"}
    added |= {"--num-workers", "0", "--no-async-tensor-model-parallel-allreduce"}
    added |= {word for word in cpu if word.endswith("-fusion")} | {"--no-persist-layer-norm"}
    assert set(megatron_arguments(cpu)) - set(megatron_arguments(gpu)) == added - {"0"}  # dropout is 0 on both


def test_slurm_gives_every_node_one_torchrun_that_meets_on_the_first(tmp_path: Path, data: dict[str, str]) -> None:
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, body in {
        "scontrol": 'printf "%s-a\\n%s-b\\n" "$3" "$3"',
        "srun": 'echo "$1 $2 $SRUN_CPUS_PER_TASK" >&2; shift 2; "$@"',
    }.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_folder / name).chmod(0o755)
    job = {"JOB_ID": "43210", "JOB_NODELIST": "node", "JOB_NUM_NODES": "2", "GPUS_ON_NODE": "4", "CPUS_PER_TASK": "9"}
    variables = {**data, **{f"SLURM_{name}": text for name, text in job.items()}, "DRY_RUN": "1"}
    variables |= {"PATH": f"{bin_folder}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT), "SCHEDULE": "paci"}
    spooled = shutil.copy(SCRIPTS / "slurm_pretrain_megatron.sh", tmp_path / "slurm_script")  # Slurm runs a copy

    done = run(["bash", spooled, "gpt", "--seed", "5"], variables, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--ntasks-per-node=1 --kill-on-bad-exit=1 9" in done.stderr
    command = words(done.stdout)
    assert [value(command, flag) for flag in ("--nnodes", "--nproc-per-node", "--rdzv-id")] == ["2", "4", "43210"]
    assert value(command, "--rdzv-endpoint") == "node-a:23210"
    assert command[-2:] == ["--seed", "5"] and value(command, "--pipeline-schedule") == "paci"

    wrong = run(["bash", spooled, "t5"], variables, cwd=tmp_path)
    assert wrong.returncode == 1 and "gpt or bert" in wrong.stderr


# With Megatron-LM itself

PARSER = """
import json, os, sys
sys.path.append(os.environ["MEGATRON_LM_PATH"])
import megatron_on_cpu
megatron_on_cpu.install_for_megatron_lm()
import amdp_plugin.megatron
amdp_plugin.megatron.patch()
from megatron.training import arguments
parsed = []
for world, words in json.load(sys.stdin):
    os.environ["WORLD_SIZE"], sys.argv = str(world), ["pretrain.py", *words]
    result = arguments.validate_args(arguments.parse_args())
    parsed.append([result.data_parallel_size, result.pipeline_schedule, str(result.params_dtype)])
print("parsed", json.dumps(parsed))
"""


@needs_megatron_lm
def test_megatron_takes_the_arguments_of_every_job(data: dict[str, str]) -> None:
    """Its parser and its validation, which the plugin's refusals are a part of."""
    jobs = [(GPT, model) for model in ("tiny", "345m", "1.3b")] + [(BERT, model) for model in ("tiny", "bert-large")]
    grids = [{"CPU": "1"}, {"NODES": "2", "MASTER_ADDR": "first", "TENSOR_PARALLEL": "2", "DISTRIBUTED_OPTIMIZER": "1"}]
    asked, expected = [], []
    for script, model in jobs:
        for schedule in ("stock", "1f1b", "paci", "amdp"):
            for grid in grids:
                command = dry_run(script, {**data, **grid, "MODEL": model, "SCHEDULE": schedule})
                world = int(value(command, "--nnodes")) * int(value(command, "--nproc-per-node"))
                asked.append((world, megatron_arguments(command)))
                dtype = "torch.float32" if "CPU" in grid else "torch.bfloat16"
                expected.append([int(grid.get("NODES", 1)), schedule, dtype])
    found = in_megatron_lm(PARSER, json.dumps(asked))
    assert json.loads(found.rpartition("parsed ")[2]) == expected


@needs_megatron_lm
def test_bert_trains_on_a_cpu(tmp_path: Path) -> None:
    """Two ranks: the losses that Megatron prints are those of stock under our 1f1b. Under amdp it learns as well, and
    under paci, whose stages never meet, with its output layer tied to its embedding."""
    prefix, vocabulary = write_bert_data(tmp_path)
    variables = {"DATA_PATH": str(prefix), "VOCAB_FILE": str(vocabulary), "SPLIT": "90,5,5"}
    stock, ours, *free = (
        train_on_cpu(BERT, {**variables, "SCHEDULE": name}) for name in ("stock", "1f1b", "paci", "amdp")
    )
    assert len(stock["training"]) == 20 and ours == stock
    for each in free:
        assert each["training"][0] == stock["training"][0] and each["training"][1:] != stock["training"][1:]
    for losses in (stock["training"], *(each["training"] for each in free)):
        assert losses[0] == pytest.approx(math.log(1000), rel=0.05) and losses[-1] < losses[0] - 1


@needs_megatron_lm
def test_bert_trains_at_four_stages_where_ranks_build_each_others(tmp_path: Path) -> None:
    """pretrain_bert.py does not pass on the process groups that its provider is given."""
    prefix, vocabulary = write_bert_data(tmp_path)
    variables = {"DATA_PATH": str(prefix), "VOCAB_FILE": str(vocabulary), "SPLIT": "90,5,5", "GPUS_PER_NODE": "4"}
    short = {**variables, "ITERATIONS": "4"}
    stock, amdp = (train_on_cpu(BERT, {**short, "SCHEDULE": name}) for name in ("stock", "amdp"))
    assert len(amdp["training"]) == 4
    assert amdp["training"][0] == stock["training"][0] and amdp["training"][-1] < amdp["training"][0]


@needs_megatron_lm
def test_a_job_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    job = {"SCHEDULE": "paci", "MOCK_DATA": "1", "SAVE_INTERVAL": "2", "ITERATIONS": "4"}
    job["CHECKPOINT_DIR"] = str(tmp_path / "checkpoints")
    whole = train_on_cpu(GPT, job)
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = train_on_cpu(GPT, job)
    assert len(whole["training"]) == 4 and len(resumed["training"]) == 2
    assert resumed["training"][0] == whole["training"][2]  # the next that Megatron prints is a mean of both
    assert resumed["evaluation"] == whole["evaluation"] and len(whole["evaluation"]) == 2


def train_on_cpu(script: str, variables: dict[str, str]) -> dict[str, list[float]]:
    """The tiny model's losses, as Megatron prints them: of every iteration, and of validation and test at the end."""
    where = {"MEGATRON_LM_PATH": str(CHECKOUT), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = run(["bash", SCRIPTS / script], {**where, "CPU": "1", "MODEL": "tiny", **variables}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = {"training": r"iteration +\d+/.*lm loss: (\S+)", "evaluation": r"on \w+ set \| lm loss value: (\S+)"}
    return {name: [float(loss) for loss in re.findall(pattern, done.stdout)] for name, pattern in printed.items()}


def test_the_corpus_for_bert_spells_its_text(tmp_path: Path) -> None:
    prefix, vocabulary_file = write_bert_data(tmp_path, vocabulary_size=300)
    pieces = vocabulary_file.read_text().splitlines()
    assert pieces[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] and len(pieces) == len(set(pieces)) == 300
    corpus = IndexedDataset(str(prefix))
    spelled = [" ".join(pieces[number] for number in sentence).replace(" ##", "").split() for sentence in corpus]
    documents = standard_library_documents()
    assert spelled == [sentence for document in documents for sentence in document]
    assert corpus.document_indices.tolist() == [0, *accumulate(map(len, documents))]


def in_megatron_lm(program: str, given: str) -> str:
    """What the program prints, with the plugin and the CPU's stand-ins for CUDA to import."""
    path = os.pathsep.join([str(ROOT), str(SCRIPTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        input=given, env=environment, text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# The patch


def git_apply(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """In ``folder`` alone: git would take paths as those of a repository around it."""
    command = ["git", "apply", "--unidiff-zero", *options, PATCH]
    return run(command, {"GIT_CEILING_DIRECTORIES": str(folder.parent)}, cwd=folder)


def test_the_patch_runs_first_and_can_be_undone(tmp_path: Path) -> None:
    """On stand-ins for Megatron-LM's scripts and for the plugin that write down when they were called."""
    scripts = {tmp_path / name: 'print("pretrain")\n' for name in ENTRIES}
    for path, text in scripts.items():
        path.write_text(text)
    plugin = tmp_path / "amdp_plugin" / "megatron.py"
    plugin.parent.mkdir()
    plugin.write_text('def patch():\n    print("patch")\n')

    assert git_apply(tmp_path, "-R", "--check").returncode != 0  # it is not there yet
    assert git_apply(tmp_path).returncode == 0
    for path in scripts:
        assert run([sys.executable, path], {}, cwd=tmp_path).stdout.split() == ["patch", "pretrain"]
    assert git_apply(tmp_path, "-R").returncode == 0
    assert {path: path.read_text() for path in scripts} == scripts


@needs_megatron_lm
def test_the_patch_applies_to_megatron_lm(tmp_path: Path) -> None:
    for name in ENTRIES:
        shutil.copy(Path(str(CHECKOUT)) / name, tmp_path)
    assert git_apply(tmp_path, "--check").returncode == 0
    assert git_apply(tmp_path).returncode == 0
    for name in ENTRIES:
        patched = (tmp_path / name).read_text()
        compile(patched, name, "exec")  # nothing in it has to stand before the new lines
        assert patched == "import amdp_plugin.megatron\namdp_plugin.megatron.patch()\n" + (
            Path(str(CHECKOUT)) / name
        ).read_text(encoding="utf-8")
