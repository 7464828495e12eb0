#!/bin/bash
#: Submit the three stages and the report as a chain of Slurm jobs. Run it on the login node: it checks everything,
#: submits, prints the job ids and ends.
#:
#:   slurm/pipeline.sh --shards 8 --train-nodes 4 -- +experiment=spark/base run.dir=runs/mine
#:
#: --shards N           array tasks of stage I (default 8), each with its own engines
#: --at-once N          shards running at the same time (default: all)
#: --train-nodes N      nodes for the trainer's ranks in stages II and III (default: what the layout needs)
#: --policy-nodes N     more nodes in stage III for the policy's servers (default 0: engines as configured)
#: --verifier-nodes N   more nodes in stage III for the reward model's servers (default 0)
#: --stage3-override X   one more Hydra override for stage III only, such as its engines; may be repeated
#: --stage1-options S, --train-options S   more sbatch options, as one word list, for stage I or stages II and III
#: after --             Hydra's overrides, the same for every job. Submitting the same line again resumes.
#:
#: A job starts when the jobs whose results it reads are done; when one fails, the jobs that depend on it are cancelled.
#: Watch with: spark-nemo status RUN
SLURM_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=slurm/lib.sh
source "$SLURM_DIR/lib.sh"
OPTIONS=([shards]=8 [at-once]="" [train-nodes]="" [policy-nodes]=0 [verifier-nodes]=0 [stage1-options]=""
         [train-options]="" [stage3-override]="")
parse_arguments pipeline.sh "$@"
load_site
for name in shards policy-nodes verifier-nodes; do need_number "$name" $(( ${#name} == 6 )); done

read_manifest pipeline
: "${OPTIONS[train-nodes]:=$(nodes_needed)}"
need_number train-nodes 1
nodes=$(( OPTIONS[train-nodes] + OPTIONS[policy-nodes] + OPTIONS[verifier-nodes] ))
check_ranks "${OPTIONS[train-nodes]}"
if (( ${#STAGE3_OVERRIDES[@]} )); then
    text=$("$PYTHON" -m spark_nemo.cli.main stage3 --print-config -- "${OVERRIDES[@]}" "${STAGE3_OVERRIDES[@]}") ||
        fail "invalid configuration of stage III; see the line above" 2
    ENGINE=$(sed -n 's/^  kind: //p' <<< "$text" | head -n 1)
fi
check_servers "$(( OPTIONS[policy-nodes] + OPTIONS[verifier-nodes] ))"
shards="0-$(( OPTIONS[shards] - 1 ))"
[[ -z ${OPTIONS[at-once]} ]] || shards+="%${OPTIONS[at-once]}"
read -ra stage1_options <<< "${OPTIONS[stage1-options]}"
read -ra train_options <<< "${OPTIONS[train-options]}"
servers=(--policy-nodes "${OPTIONS[policy-nodes]}" --verifier-nodes "${OPTIONS[verifier-nodes]}")
mkdir -p "$RUN_DIR/logs/slurm" || fail "cannot write to $RUN_DIR"
chain=$RUN_DIR/logs/chain.tsv

# check SBATCH_ARGUMENTS...: fail unless Slurm accepts the job.
check() {
    local answer
    answer=$(sbatch --test-only "$@" 2>&1) || fail "sbatch rejects ${*:1:3} ...: $answer" 2
}

# submit STAGE_RUN AFTER SBATCH_ARGUMENTS...: AFTER is a list of job ids, or empty. The id goes to JOB_ID and to the chain file.
submit() {
    local part=$1 after=$2 depends=()
    shift 2
    [[ -z $after ]] || depends=(--dependency="afterok:$after" --kill-on-invalid-dep=yes)
    JOB_ID=$(sbatch --parsable "${depends[@]}" --output="$RUN_DIR/logs/slurm/%x-%A_%a.out" "$@") ||
        fail "sbatch failed for $part; submitted so far: $(cut -f 2 "$chain.new" | sort -u | tr '\n' ' ')" 2
    JOB_ID=${JOB_ID%%;*}
    printf '%s\t%s\n' "$part" "$JOB_ID" >> "$chain.new"
}

stage1=(--array="$shards" "${stage1_options[@]}" "$SLURM_DIR/stage1_generate.sh" --shards "${OPTIONS[shards]}")
stage2=(--nodes="${OPTIONS[train-nodes]}" "${train_options[@]}" "$SLURM_DIR/stage2_prm.sh")
stage3=(--nodes="$nodes" "${train_options[@]}" "$SLURM_DIR/stage3_rl.sh" "${servers[@]}")
check "${stage1[@]}"; check "${stage2[@]}"; check "${stage3[@]}"; check "$SLURM_DIR/report.sh"

: > "$chain.new"
submit stage1 "" "${stage1[@]}" -- "${OVERRIDES[@]}"
generated=$JOB_ID ends=()
declare -A trained=()
log "stage I   $generated (${OPTIONS[shards]} shards)"
for line in "${REWARD_MODELS[@]}"; do  # folder, overrides
    IFS=$'\t' read -ra words <<< "$line"
    submit "stage2/${words[0]}" "$generated" "${stage2[@]}" -- "${OVERRIDES[@]}" "${words[@]:1}"
    log "stage II  $JOB_ID (${words[0]})"
    trained[${words[0]}]=$JOB_ID
    ends+=("$JOB_ID")
done
for line in "${RL_VARIANTS[@]}"; do  # folder, its reward model's folder (- for none), overrides
    IFS=$'\t' read -ra words <<< "$line"
    # A baseline does not depend on a reward model.
    submit "stage3/${words[0]}" "${trained[${words[1]}]:-}" "${stage3[@]}" -- "${OVERRIDES[@]}" "${STAGE3_OVERRIDES[@]}" \
        "${words[@]:2}"
    log "stage III $JOB_ID (${words[0]})"
    ends+=("$JOB_ID")
done
submit report "$(join_by : "${ends[@]:-$generated}")" "$SLURM_DIR/report.sh" -- "${OVERRIDES[@]}"
log "report    $JOB_ID, into $RUN_DIR/report.html"
# One line per shard in `spark-nemo status`.
for (( i = 0; i < OPTIONS[shards]; i++ )); do printf 'stage1/shard-%s-of-%s\t%s_%s\n' "$i" "${OPTIONS[shards]}" "$generated" "$i"; done > "$chain.tmp"
grep -v '^stage1	' "$chain.new" >> "$chain.tmp"
mv "$chain.tmp" "$chain"; rm -f "$chain.new"
cut -f 2 "$chain" | sed 's/_.*//' | uniq | tr '\n' ' '; echo
