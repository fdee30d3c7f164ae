#!/usr/bin/env bash
# Pretrains GPT with Megatron-LM's pretrain_gpt.py, under Megatron's own schedule or one of ours.
#
#   MEGATRON_LM_PATH=~/Megatron-LM SCHEDULE=paci MODEL=345m MOCK_DATA=1 \
#       bash scripts/pretrain_gpt_megatron.sh [arguments for Megatron-LM]
#
# MODEL                   345m (default), 1.3b; tiny (for trying: 4 layers, 20 iterations)
# DATA_PATH               prefix of an indexed dataset, or weights and prefixes in turn
# VOCAB_FILE, MERGE_FILE  of the GPT-2 tokenizer; or
# TOKENIZER_MODEL         folder or file of another one, of TOKENIZER_TYPE (default HuggingFaceTokenizer)
# MOCK_DATA               1: Megatron's artificial data, no files
#
# Parallelism, batch, checkpoints, CPU=1, DRY_RUN=1: see scripts/megatron_job.sh.

set -euo pipefail

# shellcheck source=scripts/megatron_job.sh
source "$(dirname "${BASH_SOURCE[0]}")/megatron_job.sh"

mock_vocabulary=50256 # with the end-of-document token that Megatron adds, as many as GPT-2's
case "${MODEL:=345m}" in
tiny)
    mock_vocabulary=1023
    : "${MICRO_BATCH_SIZE:=2}" "${GLOBAL_BATCH_SIZE:=8}" "${ITERATIONS:=20}" "${LOG_INTERVAL:=1}"
    model=(--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128
        --attention-dropout 0 --hidden-dropout 0 --lr 1e-3 --min-lr 1e-4 --lr-decay-style constant)
    ;;
345m) # the GPT-2 of arXiv 1909.08053
    : "${MICRO_BATCH_SIZE:=4}" "${GLOBAL_BATCH_SIZE:=512}" "${ITERATIONS:=300000}"
    model=(--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 --max-position-embeddings 1024
        --lr 1.5e-4 --min-lr 1e-5 --lr-decay-style cosine --lr-warmup-fraction 0.01 --weight-decay 0.01)
    ;;
1.3b) # GPT-3 XL of arXiv 2005.14165, with heads of 128: batches of a million tokens, 300 billion in all
    : "${MICRO_BATCH_SIZE:=2}" "${GLOBAL_BATCH_SIZE:=512}" "${ITERATIONS:=286000}"
    model=(--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048
        --lr 2e-4 --min-lr 2e-5 --lr-decay-style cosine --lr-warmup-fraction 0.00125 --weight-decay 0.1 --adam-beta2 0.95)
    ;;
*) amdp_fail "MODEL is '$MODEL'; it must be tiny, 345m or 1.3b (other sizes: give Megatron-LM's own arguments)" ;;
esac

if [[ "${MOCK_DATA:-0}" == 1 ]]; then
    [[ -z "${DATA_PATH:-}" ]] || amdp_fail "MOCK_DATA=1 and DATA_PATH are both set; unset one"
    data=(--mock-data --tokenizer-type NullTokenizer --vocab-size "$mock_vocabulary")
else
    read -rd '' -a prefixes <<<"${DATA_PATH:-}" || true
    amdp_check_prefixes "${prefixes[@]}"
    data=(--data-path "${prefixes[@]}")
    if [[ -n "${TOKENIZER_MODEL:-}" ]]; then
        data+=(--tokenizer-type "${TOKENIZER_TYPE:-HuggingFaceTokenizer}" --tokenizer-model "$TOKENIZER_MODEL")
    else
        amdp_need_file VOCAB_FILE "the GPT-2 tokenizer's vocab.json (or TOKENIZER_MODEL to another tokenizer)"
        amdp_need_file MERGE_FILE "the GPT-2 tokenizer's merges.txt"
        # The newer tokenizers ask the Hugging Face hub even when they are given the files.
        data+=(--tokenizer-type GPT2BPETokenizer --legacy-tokenizer
            --vocab-file "$VOCAB_FILE" --merge-file "$MERGE_FILE")
    fi
fi

amdp_pretrain pretrain_gpt.py "${model[@]}" "${data[@]}" "$@"
