# shellcheck shell=bash
# What the Megatron-LM jobs have in common: where they run, under which schedule, and the command that starts them.
# Sourced by scripts/pretrain_gpt_megatron.sh and scripts/pretrain_bert_megatron.sh, which choose model and data.
#
# MEGATRON_LM_PATH        a checkout of Megatron-LM (required; tried with the tag core_v0.16.1)
# SCHEDULE                stock (default, Megatron's own), gpipe, 1f1b, chimera, paci, amdp, or another registered one
# SCHEDULE_OPTIONS        a JSON file with options of the schedule
# NODES, GPUS_PER_NODE    default 1 and 8; with more nodes, run the same command on each and give all the same
#                         MASTER_ADDR and MASTER_PORT (29500): scripts/slurm_pretrain_megatron.sh does that
# TENSOR_PARALLEL         default 1; more turns sequence parallelism on (but for local layers)
# PIPELINE_PARALLEL       default: one pipeline a node; what is left of the ranks is data parallelism
# MICRO_BATCH_SIZE, GLOBAL_BATCH_SIZE, ITERATIONS    default: those of the model
# DISTRIBUTED_OPTIMIZER   1: the optimizer's state is spread over the data-parallel ranks
# SPLIT                   969,30,1: the parts of the data for training, validation and test
# UNTIE_EMBEDDINGS        1: a matrix of its own for the output layer
# CHECKPOINT_DIR          load from there what there is, save there every SAVE_INTERVAL (1000) iterations and at the end
# LOG_INTERVAL            default 10 iterations
# LOCAL_LAYERS            1: Megatron's own layers, for machines without Transformer Engine and Apex
# CPU                     1: the same job on a machine without GPU, with gloo, in fp32; GPUS_PER_NODE is then processes
# DRY_RUN                 1: print the command and end
#
# What stands after the script's name is for Megatron-LM, and wins over what the script says.

AMDP_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# shellcheck source=scripts/messages.sh
source "$AMDP_ROOT/scripts/messages.sh"

: "${SCHEDULE:=stock}" "${NODES:=1}" "${TENSOR_PARALLEL:=1}" "${UNTIE_EMBEDDINGS:=0}" "${CPU:=0}" "${LOCAL_LAYERS:=$CPU}"
if [[ "$CPU" == 1 ]]; then : "${GPUS_PER_NODE:=2}"; else : "${GPUS_PER_NODE:=8}"; fi
: "${PIPELINE_PARALLEL:=$((GPUS_PER_NODE / TENSOR_PARALLEL))}"

# amdp_check_prefixes [WEIGHT] PREFIX ...: the files are there. Megatron's own error is a page long, on every rank.
amdp_check_prefixes() {
    (($# > 0)) || amdp_fail "set DATA_PATH to the prefix of an indexed dataset (tools/preprocess_data.py of Megatron-LM" \
        "makes them), or to weights and prefixes in turn"
    local word
    for word in "$@"; do
        [[ "$word" =~ ^[0-9.]+$ || "$word" == *://* || -f "$word.idx" && -f "$word.bin" ]] ||
            amdp_fail "DATA_PATH: there is no $word.idx with $word.bin"
    done
}

# amdp_need_file NAME MEANING: the variable NAME holds the path of a file.
amdp_need_file() {
    [[ -n "${!1:-}" ]] || amdp_fail "set $1 to $2"
    [[ -f "${!1}" ]] || amdp_fail "$1: there is no file ${!1}"
}

# amdp_pretrain SCRIPT ARGUMENT...: runs SCRIPT of Megatron-LM on every rank of this node.
amdp_pretrain() {
    local script="$1" command
    shift
    [[ -n "${MEGATRON_LM_PATH:-}" ]] ||
        amdp_fail "set MEGATRON_LM_PATH to a checkout of Megatron-LM, the folder that holds $script"
    [[ -f "$MEGATRON_LM_PATH/$script" ]] || amdp_fail "MEGATRON_LM_PATH: there is no $MEGATRON_LM_PATH/$script"
    amdp_check_grid
    command=(env)
    amdp_launcher
    command+=("$MEGATRON_LM_PATH/$script" --pipeline-schedule "$SCHEDULE")
    amdp_schedule_arguments
    amdp_parallel_arguments
    amdp_run_arguments
    command+=("$@")
    if [[ "${DRY_RUN:-0}" == 1 ]]; then
        amdp_print_command "${command[@]}"
    else
        command -v torchrun >/dev/null || amdp_fail "'torchrun' not found; activate an environment with torch"
        exec "${command[@]}"
    fi
}

amdp_check_grid() {
    local ranks=$((NODES * GPUS_PER_NODE)) replica=$((TENSOR_PARALLEL * PIPELINE_PARALLEL))
    ((replica > 0 && ranks % replica == 0)) ||
        amdp_fail "$NODES x $GPUS_PER_NODE ranks do not divide into replicas of TENSOR_PARALLEL x PIPELINE_PARALLEL =" \
            "$TENSOR_PARALLEL x $PIPELINE_PARALLEL"
    local replicas=$((ranks / replica))
    local micro_batches=$((GLOBAL_BATCH_SIZE / (MICRO_BATCH_SIZE * replicas)))
    ((micro_batches > 0 && micro_batches * MICRO_BATCH_SIZE * replicas == GLOBAL_BATCH_SIZE)) ||
        amdp_fail "GLOBAL_BATCH_SIZE $GLOBAL_BATCH_SIZE is no multiple of MICRO_BATCH_SIZE x replicas =" \
            "$MICRO_BATCH_SIZE x $replicas"
    amdp_say "$SCHEDULE: $PIPELINE_PARALLEL stages x $TENSOR_PARALLEL tensor ranks x $replicas replicas," \
        "$micro_batches micro-batches of $MICRO_BATCH_SIZE an iteration and replica" >&2
}

# The launcher finds the plugin beside this script: nothing has to be installed for it.
amdp_launcher() {
    local path="$AMDP_ROOT"
    # On GPUs Megatron-LM comes with its own megatron.core; on a CPU the installed one is used, which is compiled.
    [[ "$CPU" == 1 ]] || path+=":$MEGATRON_LM_PATH"
    command+=(PYTHONPATH="$path${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}")
    # Megatron-LM insists on it, up to Hopper. Without tensor parallelism more queues are better.
    ((TENSOR_PARALLEL == 1)) || command+=(CUDA_DEVICE_MAX_CONNECTIONS=1)
    command+=(torchrun)
    if ((NODES == 1)); then
        command+=(--standalone)
    else
        [[ -n "${MASTER_ADDR:-}" ]] ||
            amdp_fail "NODES is $NODES: set MASTER_ADDR to the name of one of them, the same on all"
        command+=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-id "${JOB_ID:-amdp}")
    fi
    command+=(--nnodes "$NODES" --nproc-per-node "$GPUS_PER_NODE")
    [[ "$CPU" != 1 ]] || command+=("$AMDP_ROOT/scripts/megatron_on_cpu.py") # takes what python would
    command+=(-m amdp_plugin.megatron)
}

amdp_schedule_arguments() {
    [[ -z "${SCHEDULE_OPTIONS:-}" ]] || command+=(--pipeline-schedule-options "$SCHEDULE_OPTIONS")
    # A free-running pipeline cannot run an iteration twice, which is what the other modes may do.
    case "$SCHEDULE" in stock | gpipe | 1f1b | chimera) ;; *) command+=(--rerun-mode disabled) ;; esac
    [[ "$UNTIE_EMBEDDINGS" != 1 ]] || command+=(--untie-embeddings-and-output-weights)
}

amdp_parallel_arguments() {
    command+=(--tensor-model-parallel-size "$TENSOR_PARALLEL" --pipeline-model-parallel-size "$PIPELINE_PARALLEL")
    # The local layers normalize with torch, which cannot split the sequence.
    ((TENSOR_PARALLEL == 1)) || [[ "$LOCAL_LAYERS" == 1 ]] || command+=(--sequence-parallel)
    [[ "${DISTRIBUTED_OPTIMIZER:-0}" != 1 ]] || command+=(--use-distributed-optimizer)
    [[ "$LOCAL_LAYERS" != 1 ]] || command+=(--transformer-impl local --no-masked-softmax-fusion --no-persist-layer-norm
        --no-gradient-accumulation-fusion)
    if [[ "$CPU" == 1 ]]; then
        command+=(--distributed-backend gloo --use-cpu-initialization --num-workers 0
            --no-bias-gelu-fusion --no-bias-dropout-fusion --no-async-tensor-model-parallel-allreduce)
    else
        command+=(--bf16)
    fi
}

amdp_run_arguments() {
    command+=(--micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE" --train-iters "$ITERATIONS"
        --split "${SPLIT:-969,30,1}" --log-interval "${LOG_INTERVAL:-10}" --eval-interval 1000 --eval-iters 10)
    [[ -z "${CHECKPOINT_DIR:-}" ]] ||
        command+=(--load "$CHECKPOINT_DIR" --save "$CHECKPOINT_DIR" --save-interval "${SAVE_INTERVAL:-1000}")
}

# A program, or an option with its values, a line; quoted for the shell, so that it can be pasted.
amdp_print_command() {
    local word line=""
    for word in "$@"; do
        if [[ -n "$line" && ("$word" == -* || "$word" == *.py || "$word" == torchrun) ]]; then
            printf '%s \\\n    ' "$line"
            line=""
        fi
        line+="${line:+ }$(printf '%q' "$word")"
    done
    printf '%s\n' "$line"
}
