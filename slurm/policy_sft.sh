#!/bin/bash
#SBATCH --job-name=spark-sft
#SBATCH --nodes=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.out
#: The policy's format SFT, once before any stage III: teaches models.policy_base the policy's format.
#:
#:   sbatch --nodes=4 slurm/policy_sft.sh -- +experiment=spark/policy_sft
#:
#: after --     Hydra's overrides. megatron.tensor_parallel x pipeline_parallel x data_parallel ranks are placed on the
#:              nodes, RANKS_PER_NODE (slurm/site.env) on each. The result is RUN/sft/model, for models.policy.
SLURM_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ! -f $SLURM_DIR/lib.sh ]]; then  # sbatch runs a copy in its spool folder; the job knows where it comes from
    SLURM_DIR=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*/slurm\)/policy_sft\.sh.*|\1|p' | head -n 1)
fi
# shellcheck source=slurm/lib.sh
source "$SLURM_DIR/lib.sh"
parse_arguments policy_sft.sh "$@"
load_site

begin_job sft
check_ranks "${#NODES[@]}"
preflight
start_step trainer "$(join_by , "${NODES[@]}")" "$WORLD_SIZE" trainer -m spark_nemo.cli.main sft -- "${OVERRIDES[@]}"
wait_for "$STEP_PID"
finish $?
