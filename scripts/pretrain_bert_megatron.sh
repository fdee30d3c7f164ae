#!/usr/bin/env bash
# Pretrains BERT with Megatron-LM's pretrain_bert.py, under Megatron's own schedule or one of ours.
#
#   MEGATRON_LM_PATH=~/Megatron-LM SCHEDULE=amdp DATA_PATH=~/data/wiki_sentences VOCAB_FILE=~/data/vocab.txt \
#       bash scripts/pretrain_bert_megatron.sh [arguments for Megatron-LM]
#
# MODEL        bert-large (default); tiny (for trying: 4 layers, 20 iterations)
# DATA_PATH    prefix of an indexed dataset of sentences (tools/preprocess_data.py --split-sentences), or weights and
#              prefixes in turn
# VOCAB_FILE   the word pieces, one a line (lower-case, or TOKENIZER_TYPE=BertWordPieceCase)
#
# Parallelism, batch, checkpoints, CPU=1, DRY_RUN=1: see scripts/megatron_job.sh.

set -euo pipefail

# shellcheck source=scripts/megatron_job.sh
source "$(dirname "${BASH_SOURCE[0]}")/megatron_job.sh"

case "${MODEL:=bert-large}" in
tiny)
    : "${MICRO_BATCH_SIZE:=2}" "${GLOBAL_BATCH_SIZE:=8}" "${ITERATIONS:=20}" "${LOG_INTERVAL:=1}"
    model=(--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128
        --attention-dropout 0 --hidden-dropout 0 --lr 1e-3 --min-lr 1e-4 --lr-decay-style constant)
    ;;
bert-large) # of arXiv 1810.04805, trained as in arXiv 1909.08053
    : "${MICRO_BATCH_SIZE:=4}" "${GLOBAL_BATCH_SIZE:=1024}" "${ITERATIONS:=2000000}"
    model=(--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 512 --max-position-embeddings 512
        --lr 1e-4 --min-lr 1e-5 --lr-decay-style linear --lr-warmup-fraction 0.005 --weight-decay 0.01)
    ;;
*) amdp_fail "MODEL is '$MODEL'; it must be tiny or bert-large (other sizes: give Megatron-LM's own arguments)" ;;
esac

[[ "${MOCK_DATA:-0}" != 1 ]] || amdp_fail "MOCK_DATA: Megatron-LM has no mock data for BERT; set DATA_PATH and VOCAB_FILE"
read -rd '' -a prefixes <<<"${DATA_PATH:-}" || true
amdp_check_prefixes "${prefixes[@]}"
amdp_need_file VOCAB_FILE "a file of word pieces, one a line"
# The newer tokenizers ask the Hugging Face hub even when they are given the file.
data=(--data-path "${prefixes[@]}" --tokenizer-type "${TOKENIZER_TYPE:-BertWordPieceLowerCase}" --legacy-tokenizer
    --vocab-file "$VOCAB_FILE")

# pretrain_bert.py builds Transformer Engine's layers whatever --transformer-impl says.
[[ "$LOCAL_LAYERS" != 1 ]] || model+=(--spec local)

amdp_pretrain pretrain_bert.py "${model[@]}" "${data[@]}" "$@"
