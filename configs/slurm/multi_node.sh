#!/bin/bash
# A run on all GPUs of several nodes:
#   sbatch --nodes=8 configs/slurm/multi_node.sh configs/sdxl/dmd2_4step.yaml output_dir=runs/sdxl train.gradient_accumulation=2 train.ema_device=cpu
# With FSDP2: ACCELERATE_CONFIG=configs/accelerate/fsdp2.yaml sbatch ... See docs/guides/clusters.md.
#SBATCH --job-name=flowdistill
#SBATCH --nodes=2
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

export MASTER_ADDR MASTER_PORT
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a node have their own

# One launcher a node, which starts a process a GPU; the number of the node is known on the node alone.
srun bash -c 'exec accelerate launch \
    --config_file "${ACCELERATE_CONFIG:-configs/accelerate/multi_node.yaml}" \
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
    --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
    --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" --rdzv_backend c10d \
    -m flowdistill distill "$@"' bash "$@" &
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
