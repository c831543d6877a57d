#!/bin/bash
# The students of a run of MSD, each in a job of its own; the one that ends last puts them together:
#   sbatch --array=0-3 configs/slurm/array.sh configs/digits/msd.yaml method.num_students=4 output_dir=runs/msd
# Students of another shape have a shared start, which comes first, as student -1:
#   first=$(sbatch --parsable --export=ALL,STUDENT=-1 configs/slurm/array.sh CONFIG.yaml)
#   sbatch --dependency=afterok:$first --array=0-3 configs/slurm/array.sh CONFIG.yaml
# Each student has one GPU, and the precision that the file says (train.precision=bf16). See docs/guides/clusters.md.
#SBATCH --job-name=flowdistill
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.out

set -u
cd "${SLURM_SUBMIT_DIR:-.}"

# On a disk that all nodes see: encoded prompts, pairs and statistics are made once and found by every later job.
export XDG_CACHE_HOME="${XDG_CACHE_HOME:-$PWD/.cache}" HF_HOME="${HF_HOME:-$PWD/.cache/huggingface}"

# Slurm's signal, before the time is up or the job makes room for another one, is passed on; every process ends its step
# and writes a checkpoint. The job is then put in the queue again, and the same command goes on from there.
step= stopped=
trap 'stopped=yes; [ -z "$step" ] || kill -TERM "$step"' TERM

srun flowdistill distill "$@" "method.student_index=${STUDENT:-$SLURM_ARRAY_TASK_ID}" &
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
