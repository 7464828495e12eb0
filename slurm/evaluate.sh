#!/bin/bash
#SBATCH --job-name=spark-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#: Score a model: held-out mathematics problems, or finding the first wrong step (ProcessBench).
#:
#:   sbatch slurm/evaluate.sh --model runs/mine/stage3/process_aware/model -- +experiment=spark/base run.dir=runs/mine
#:
#: --model FOLDER        a Hugging Face model folder
#: --benchmark NAME      math (default) or processbench
#: after --              Hydra's overrides. What the model said is saved below run.dir/evaluate.
SLURM_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ! -f $SLURM_DIR/lib.sh ]]; then  # sbatch runs a copy in its spool folder; the job knows where it comes from
    SLURM_DIR=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*/slurm\)/evaluate\.sh.*|\1|p' | head -n 1)
fi
# shellcheck source=slurm/lib.sh
source "$SLURM_DIR/lib.sh"
OPTIONS=([model]="" [benchmark]=math)
parse_arguments evaluate.sh "$@"
load_site

[[ -n ${OPTIONS[model]} ]] || fail "--model is missing (see --help)" 2
[[ ${OPTIONS[benchmark]} == math || ${OPTIONS[benchmark]} == processbench ]] ||
    fail "--benchmark=${OPTIONS[benchmark]}: math or processbench" 2
ALWAYS_AGAIN=1 begin_job "evaluate-${OPTIONS[benchmark]}" --model "${OPTIONS[model]}"
preflight
start_step evaluate "${NODES[0]}" 1 trainer -m spark_nemo.cli.main evaluate "${OPTIONS[benchmark]}" \
    --model "${OPTIONS[model]}" -- "${OVERRIDES[@]}"
wait_for "$STEP_PID"
status=$?
tail -n 1 "$LOG_DIR/evaluate-0.log"
finish $status
