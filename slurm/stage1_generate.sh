#!/bin/bash
#SBATCH --job-name=spark-stage1
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%A_%a.out
#: Stage I: solutions and verifications, one array task per shard of the problems, each with its own engines.
#:
#:   sbatch --array=0-7 slurm/stage1_generate.sh [--shards 8] -- +experiment=spark/stage1 run.dir=runs/mine
#:
#: --shards N   number of shards the problems are cut into; without it the array must be 0-(N-1). Name it to run
#:              some shards again: sbatch --array=3,5 slurm/stage1_generate.sh --shards 8 -- ...
#: after --     Hydra's overrides. Finished shards end at once, so the same line can be submitted again.
SLURM_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ! -f $SLURM_DIR/lib.sh ]]; then  # sbatch runs a copy in its spool folder; the job knows where it comes from
    SLURM_DIR=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*/slurm\)/stage1_generate\.sh.*|\1|p' | head -n 1)
fi
# shellcheck source=slurm/lib.sh
source "$SLURM_DIR/lib.sh"
OPTIONS=([shards]="")
parse_arguments stage1_generate.sh "$@"
load_site

shard=${SLURM_ARRAY_TASK_ID:-}
[[ -n $shard ]] || fail "not a task of an array: submit with sbatch --array=0-7 (see --help)" 2
if [[ -z ${OPTIONS[shards]} ]]; then
    (( SLURM_ARRAY_TASK_MIN == 0 && SLURM_ARRAY_TASK_MAX + 1 == SLURM_ARRAY_TASK_COUNT )) ||
        fail "array tasks are not 0..N-1: name the number of shards with --shards" 2
    OPTIONS[shards]=$SLURM_ARRAY_TASK_COUNT
fi
need_number shards 1
OVERRIDES+=("stage1.num_shards=${OPTIONS[shards]}" "stage1.shard=$shard")
begin_job stage1
preflight
start_step stage1 "${NODES[0]}" 1 trainer -m spark_nemo.cli.main stage1 -- "${OVERRIDES[@]}"
# What is in the store stays there: this stage has no step to wait for, a signal ends it.
stop_at_once() { if [[ -n $STOPPING ]]; then kill "$STEP_PID" 2>/dev/null; fi; }
trap 'on_limit; stop_at_once' USR1
trap 'on_cancel; stop_at_once' TERM INT
stop_at_once
wait_for "$STEP_PID"
finish $?
