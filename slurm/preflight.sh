#!/bin/bash
#SBATCH --job-name=spark-preflight
#SBATCH --nodes=2
#SBATCH --time=00:15:00
#SBATCH --output=%x-%j.out
#: Are these nodes and this configuration fit? Configuration composed and checked, models and data seen from every node,
#: GPUs counted, ports found free. Every stage script does the same first; this one does nothing else.
#:
#:   sbatch --nodes=8 slurm/preflight.sh --collective 1 -- +experiment=spark/base run.dir=runs/mine
#:
#: --collective 1   exchange data between the nodes in pairs too, name the slow or broken one and print the --exclude
#:                  list (needs the trainer's environment; default 0)
#: after --         Hydra's overrides; without any, only the nodes are checked.
SLURM_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ! -f $SLURM_DIR/lib.sh ]]; then  # sbatch runs a copy in its spool folder; the job knows where it comes from
    SLURM_DIR=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*/slurm\)/preflight\.sh.*|\1|p' | head -n 1)
fi
# shellcheck source=slurm/lib.sh
source "$SLURM_DIR/lib.sh"
OPTIONS=([collective]=0)
parse_arguments preflight.sh "$@"
load_site

need_number collective 0
(( ${#OVERRIDES[@]} )) || OVERRIDES=(run.dir=runs/preflight)
STAGE_RUN=preflight ALWAYS_AGAIN=1
stage=pipeline
[[ ${OVERRIDES[*]} != run.dir=runs/preflight ]] || stage=nodes
begin_job $stage
preflight
if (( OPTIONS[collective] )); then
    image_options trainer
    srun --nodes="${#NODES[@]}" --ntasks="${#NODES[@]}" --ntasks-per-node=1 --overlap --kill-on-bad-exit=0 --wait=0 \
        "${IMAGE_OPTIONS[@]}" \
        "${COMMAND[@]}" "$SLURM_DIR/collective_check.py" > "$LOG_DIR/collective.txt" 2> "$LOG_DIR/collective.srun.log" &
    wait_for $!
    cat "$LOG_DIR/collective.txt"
    if grep -q '^--exclude=' "$LOG_DIR/collective.txt"; then
        fail "slow or broken nodes; without them: sbatch $(grep '^--exclude=' "$LOG_DIR/collective.txt")"
    fi
    grep -q '^every node' "$LOG_DIR/collective.txt" ||
        { tail -n 20 "$LOG_DIR/collective.srun.log" >&2; fail "the collective test did not end"; }
fi
set_state 'done'
log "fit: ${NODES[*]}"
