#!/bin/bash
#SBATCH --job-name=spark-report
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#: The report of a run: run.dir/summary.json and run.dir/report.html. The last job of slurm/pipeline.sh.
#:
#:   sbatch slurm/report.sh -- +experiment=spark/base run.dir=runs/mine
#:
#: after --     the overrides that the stages had.
SLURM_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ! -f $SLURM_DIR/lib.sh ]]; then  # sbatch runs a copy in its spool folder; the job knows where it comes from
    SLURM_DIR=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*/slurm\)/report\.sh.*|\1|p' | head -n 1)
fi
# shellcheck source=slurm/lib.sh
source "$SLURM_DIR/lib.sh"
parse_arguments report.sh "$@"
load_site

ALWAYS_AGAIN=1 begin_job report
preflight
start_step report "${NODES[0]}" 1 trainer -m spark_nemo.cli.main report -- "${OVERRIDES[@]}"
wait_for "$STEP_PID"
finish $?
