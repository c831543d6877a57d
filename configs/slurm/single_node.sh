#!/bin/bash
# A run on all GPUs of one node:
#   sbatch configs/slurm/single_node.sh configs/sdxl/dmd2_4step.yaml output_dir=runs/sdxl train.gradient_accumulation=16 train.ema_device=cpu
# Options of sbatch go before the file: sbatch --partition=gpu --gpus-per-node=4 configs/slurm/single_node.sh ...
# With FSDP2: ACCELERATE_CONFIG=configs/accelerate/fsdp2.yaml sbatch ... See docs/guides/clusters.md.
#SBATCH --job-name=flowdistill
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

set -u
cd "${SLURM_SUBMIT_DIR:-.}"

# On a disk that all nodes see: encoded prompts, pairs and statistics are made once and found by every later job.
export XDG_CACHE_HOME="${XDG_CACHE_HOME:-$PWD/.cache}" HF_HOME="${HF_HOME:-$PWD/.cache/huggingface}"
# Seconds that the launcher gives its processes to end their step and to write a checkpoint; 30 otherwise.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-170}"

# Slurm's signal, before the time is up or the job makes room for another one, is passed on; every process ends its step
# and writes a checkpoint. The job is then put in the queue again, and the same command goes on from there.
step= stopped=
trap 'stopped=yes; [ -z "$step" ] || kill -TERM "$step"' TERM

# accelerate's launcher is for several processes; one is started by itself.
launch=(flowdistill)
if [ "$SLURM_GPUS_ON_NODE" -gt 1 ]; then
    launch=(accelerate launch --config_file "${ACCELERATE_CONFIG:-configs/accelerate/multi_gpu_bf16.yaml}"
        --num_processes "$SLURM_GPUS_ON_NODE" --main_process_port 0 -m flowdistill)
fi
srun "${launch[@]}" distill "$@" &
step=$!
[ -z "$stopped" ] || kill -TERM "$step" # a signal before there was anything to pass it to
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # the signal has ended the wait, not the step
    wait "$step"
    code=$?
done
if [ -n "$stopped" ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    code=0
fi
exit "$code"
