#!/bin/bash
#SBATCH --job-name=spark-stage2
#SBATCH --nodes=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.out
#: Stage II: the generative process reward model, fine-tuned on stage I's votes over all ranks of the layout.
#:
#:   sbatch --nodes=4 slurm/stage2_prm.sh -- +experiment=spark/base run.dir=runs/mine stage2.method=step_consistency
#:
#: after --     Hydra's overrides. megatron.tensor_parallel x pipeline_parallel x data_parallel ranks are placed on the
#:              nodes, RANKS_PER_NODE (slurm/site.env) on each.
SLURM_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ! -f $SLURM_DIR/lib.sh ]]; then  # sbatch runs a copy in its spool folder; the job knows where it comes from
    SLURM_DIR=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*/slurm\)/stage2_prm\.sh.*|\1|p' | head -n 1)
fi
# shellcheck source=slurm/lib.sh
source "$SLURM_DIR/lib.sh"
parse_arguments stage2_prm.sh "$@"
load_site

begin_job stage2
check_ranks "${#NODES[@]}"
preflight
start_step trainer "$(join_by , "${NODES[@]}")" "$WORLD_SIZE" trainer -m spark_nemo.cli.main stage2 -- "${OVERRIDES[@]}"
wait_for "$STEP_PID"
finish $?
