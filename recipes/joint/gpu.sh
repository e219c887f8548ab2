#!/usr/bin/env bash
# The multi-task recipe on one GPU or several: recipes/joint/gpu.sh MODEL RUN [key=value …]
# Stopped, it goes on where it was: call it again.
set -euo pipefail
model=$1 run=$2
gpus=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')
torchrun --standalone --nproc-per-node "$gpus" -m whisper_moe train "$(dirname "$0")/corpora.yaml" -o "$run" --resume \
    model.source="$model" optimisation.precision=bfloat16 "${@:3}"
