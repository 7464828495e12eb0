#!/bin/bash
#SBATCH --job-name=spark-stage3
#SBATCH --nodes=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.out
#: Stage III: GRPO with the reward model. One allocation; its first nodes train, the next ones serve the policy, the
#: last ones the verifier, each role in its own step.
#:
#:   sbatch --nodes=8 slurm/stage3_rl.sh --policy-nodes 2 --verifier-nodes 2 -- +experiment=spark/base run.dir=runs/mine
#:
#: --policy-nodes N     nodes for the policy's servers (default 0: engines as configured, on the node of the trainer's
#:                      main rank); a node is filled, engine.policy.tensor_parallel GPUs per server
#: --verifier-nodes N   the same for the reward model's servers
#: after --             Hydra's overrides. megatron.tensor_parallel x pipeline_parallel x data_parallel ranks are
#:                      placed on the other nodes, RANKS_PER_NODE (slurm/site.env) on each.
SLURM_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ! -f $SLURM_DIR/lib.sh ]]; then  # sbatch runs a copy in its spool folder; the job knows where it comes from
    SLURM_DIR=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*/slurm\)/stage3_rl\.sh.*|\1|p' | head -n 1)
fi
# shellcheck source=slurm/lib.sh
source "$SLURM_DIR/lib.sh"
OPTIONS=([policy-nodes]=0 [verifier-nodes]=0)
parse_arguments stage3_rl.sh "$@"
load_site

need_number policy-nodes 0
need_number verifier-nodes 0
policy=${OPTIONS[policy-nodes]} verifier=${OPTIONS[verifier-nodes]}
begin_job stage3
train=$(( ${#NODES[@]} - policy - verifier ))
check_ranks "$train"
check_servers "$(( policy + verifier ))"
preflight
start_servers policy "${NODES[@]:train:policy}"
start_servers verifier "${NODES[@]:train + policy:verifier}"
wait_servers
start_step trainer "$(join_by , "${NODES[@]:0:train}")" "$WORLD_SIZE" trainer \
    -m spark_nemo.cli.main stage3 "${SERVERS[@]}" -- "${OVERRIDES[@]}"
wait_for "$STEP_PID"
finish $?
