# shellcheck shell=bash
# Functions of the scripts in this folder, which source it with SLURM_DIR set; docs/cluster.md describes the behaviour.
# Scripts declare OPTIONS, call parse_arguments, then begin_job. Variables read from the manifest are in capitals.
set -uo pipefail
# shellcheck source=slurm/servers.sh
source "${SLURM_DIR:?}/servers.sh"

ROOT=$(cd "$SLURM_DIR/.." && pwd)
JOB=${SLURM_JOB_ID:-}
RESTART=${SLURM_RESTART_COUNT:-0}
STOPPING=""          # limit (Slurm's warning signal) or cancel (scancel, preemption)
SIGNALS=0            # number of signals received
LOG_DIR="" STAGE_RUN="" STAGE_RUN_DIR="" RUN_DIR="" DONE_FILE="" ENGINE="" WORLD_SIZE=1 TOTAL=0
declare -ga REWARD_MODELS=() RL_VARIANTS=()  # read by pipeline.sh
STARTED=$(date +%s)
DONE_BEFORE=0
POLICY_SERVERS="" VERIFIER_SERVERS="" POLICY_GPUS=1 VERIFIER_GPUS=1 POLICY_PYTHON="" VERIFIER_PYTHON=""
POLICY_WORD=() VERIFIER_WORD=() POLICY_ENV=() VERIFIER_ENV=()
STEP_PIDS=()

# --- messages and state

log() {
    local line
    line=$(printf '[%(%F %T)T %s.%s %s] %s' -1 "${JOB:-login}" "$RESTART" "${SLURMD_NODENAME:-login}" "$*")
    printf '%s\n' "$line"
    if [[ -n $LOG_DIR ]]; then printf '%s\n' "$line" >> "$LOG_DIR/job.log"; fi
}

# fail REASON [STATUS]: end a job that cannot continue. The reason is the last line of its log.
fail() {
    set_state failed "$1"
    if [[ -n $LOG_DIR && ! -s $LOG_DIR/error.txt ]]; then printf '%s\n' "$1" > "$LOG_DIR/error.txt"; fi
    log "FAILED: $1" >&2
    exit "${2:-1}"
}

# set_state STATE [REASON]: write the state that `spark-nemo status` reads.
set_state() {
    [[ -n $LOG_DIR ]] || return 0
    printf '%s=%s\n' STATE "$1" REASON "${2:-}" JOB "$JOB" RESTART "$RESTART" NODES "${SLURM_JOB_NODELIST:-}" \
        TOTAL "$TOTAL" STARTED "$STARTED" DONE_BEFORE "$DONE_BEFORE" > "$LOG_DIR/state.tmp"
    mv "$LOG_DIR/state.tmp" "$LOG_DIR/state"
}

# --- arguments: options of the script before --, Hydra's overrides after it

declare -A OPTIONS=()
OVERRIDES=()
STAGE3_OVERRIDES=()  # values of --stage3-override, the one option that may be repeated

# usage SCRIPT: print the lines of the script that start with "#: ".
usage() { sed -n 's/^#: \{0,1\}//p' "$SLURM_DIR/$1"; }

# parse_arguments SCRIPT ARGUMENTS...
parse_arguments() {
    local script=$1 name value
    shift
    while (( $# )); do
        case $1 in
            -h|--help) usage "$script"; exit 0 ;;
            --) shift; OVERRIDES=("$@"); return 0 ;;
            --?*)
                name=${1%%=*} name=${name#--}
                [[ -v OPTIONS[$name] ]] || fail "unknown option --$name (see slurm/$script --help)" 2
                if [[ $1 == *=* ]]; then value=${1#*=}; shift
                elif (( $# > 1 )); then value=$2; shift 2
                else fail "--$name needs a value" 2; fi
                if [[ $name == stage3-override ]]; then STAGE3_OVERRIDES+=("$value"); fi
                OPTIONS[$name]=$value ;;
            *) fail "$1: Hydra overrides go after -- (see slurm/$script --help)" 2 ;;
        esac
    done
}

# need_number NAME MINIMUM: fail unless the option is a whole number of at least MINIMUM.
need_number() {
    if [[ ! ${OPTIONS[$1]} =~ ^[0-9]+$ ]] || (( OPTIONS[$1] < $2 )); then
        fail "--$1=${OPTIONS[$1]}: must be a number, at least $2" 2
    fi
}

# --- the site

load_site() {
    local file=${SPARK_NEMO_SITE:-$SLURM_DIR/site.env}
    # shellcheck source=slurm/site.env.example
    if [[ -f $file ]]; then source "$file"; elif [[ -n ${SPARK_NEMO_SITE:-} ]]; then fail "no site file $file" 2; fi
    : "${PYTHON:=$ROOT/.venv/bin/python}" "${GPUS_PER_NODE:=0}" "${MAX_REQUEUES:=50}" "${MAX_RESTARTS:=5}"
    : "${GPU_COUNT_COMMAND:=nvidia-smi --list-gpus | wc -l}" "${TRAINER_IMAGE:=}" "${ROLLOUT_IMAGE:=}" "${MOUNTS:=}"
    (( GPUS_PER_NODE )) && : "${RANKS_PER_NODE:=$GPUS_PER_NODE}"
    # 0, on CPU clusters: the ranks of the layout, evenly over the nodes.
    : "${RANKS_PER_NODE:=0}" "${SERVER_START_TIMEOUT:=1800}"
    # Stage I, stage II's score and evaluations start their servers themselves, from the same environment.
    if [[ -n ${ROLLOUT_PYTHON:-} ]]; then export SPARK_SGLANG_PYTHON=${SPARK_SGLANG_PYTHON:-$ROLLOUT_PYTHON}; fi
    : "${ROLLOUT_PYTHON:=$PYTHON}"
    : "${SERVER_PROGRAM:=$ROOT/spark_nemo/engines/server_wrapper.py}"
    # Set if sbatch was called in a step of another job: this job has other CPUs.
    unset "${!SLURM_CPU_BIND@}"
    # Slurm 22.05 and later do not hand the allocation's cpus-per-task to srun.
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
    # Compiled kernels go to each node's own disk: in a home on NFS, Triton's default, nodes read each other's stale files.
    if [[ -n $JOB ]]; then export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-$UID-$JOB}; fi
    cd "$ROOT" || fail "cannot enter $ROOT"
}

# image_options ROLE: set IMAGE_OPTIONS and COMMAND, which run Python for trainer or rollout. The container is writable
# for the step: kernels are compiled into $HOME/.cache, and enroot's default is a read-only file system.
image_options() {
    local image=$TRAINER_IMAGE mounts
    IMAGE_OPTIONS=() COMMAND=("$PYTHON")
    if [[ $1 == rollout ]]; then image=$ROLLOUT_IMAGE COMMAND=("$ROLLOUT_PYTHON"); fi
    if [[ -n $image ]]; then
        mounts="$ROOT:$ROOT${RUN_DIR:+,$RUN_DIR:$RUN_DIR}${MOUNTS:+,$MOUNTS}"
        IMAGE_OPTIONS=(--container-image="$image" --container-mounts="$mounts" --container-workdir="$ROOT"
                       --no-container-mount-home --container-writable)
        COMMAND=("${CONTAINER_PYTHON:-python}")
    fi
}

# --- the manifest: settings composed and checked by Python, on this node, before anything else runs

declare -a NEEDS=()

# read_manifest STAGE ARGUMENTS...: set RUN_DIR, STAGE_RUN, STAGE_RUN_DIR, DONE_FILE, WORLD_SIZE, ...
read_manifest() {
    local stage=$1 text name value launcher=()
    shift
    # Stage III's manifest looks for the reward model in the run folder, and mounts are made before the manifest exists.
    for name in "${OVERRIDES[@]}"; do
        if [[ $name == run.dir=* && -d ${name#*=} ]]; then RUN_DIR=$(realpath "${name#*=}"); fi
    done
    image_options trainer
    RUN_DIR=""
    # The login node has no containers: PYTHON runs there (docs/cluster.md, step 2).
    if [[ -z $JOB ]]; then COMMAND=("$PYTHON")
    elif (( ${#IMAGE_OPTIONS[@]} )); then launcher=(srun --nodes=1 --ntasks=1 "${IMAGE_OPTIONS[@]}"); fi
    text=$("${launcher[@]}" "${COMMAND[@]}" -m spark_nemo.cli.main slurm-manifest --stage "$stage" "$@" -- \
        "${OVERRIDES[@]}") || fail "invalid configuration; see the line above" 2
    while IFS='=' read -r name value; do
        case $name in
            NEEDS) NEEDS+=("$value") ;;
            RUN_DIR|STAGE_RUN|STAGE_RUN_DIR|DONE_FILE|ENGINE|WORLD_SIZE|TOTAL|\
            POLICY_SERVERS|VERIFIER_SERVERS|POLICY_GPUS|VERIFIER_GPUS|POLICY_PYTHON|VERIFIER_PYTHON)
                declare -g "$name=$value" ;;
            REWARD_MODEL) REWARD_MODELS+=("$value") ;;
            RL_VARIANT) RL_VARIANTS+=("$value") ;;
            POLICY_WORD) POLICY_WORD+=("$value") ;;
            VERIFIER_WORD) VERIFIER_WORD+=("$value") ;;
            POLICY_ENV) POLICY_ENV+=("$value") ;;
            VERIFIER_ENV) VERIFIER_ENV+=("$value") ;;
        esac
    done <<< "$text"
    # Slurm 22.05 ends srun with 0 when a container does not start.
    [[ -n $RUN_DIR ]] || fail "slurm-manifest printed nothing: does the image ${TRAINER_IMAGE:-} start?" 2
}

# --- beginning of a job

# begin_job STAGE MANIFEST_ARGUMENTS...: manifest, log folder, traps. Ends the job here if the stage run is done or makes
# no progress. With ALWAYS_AGAIN=1 an older result does not count as done.
begin_job() {
    [[ -n $JOB ]] || fail "not in a Slurm job: submit with sbatch (see --help)" 2
    trap on_limit USR1
    trap on_cancel TERM INT
    read_manifest "$@"
    if [[ -z ${ALWAYS_AGAIN:-} && -e $DONE_FILE ]]; then log "$STAGE_RUN is done already"; exit 0; fi
    : "${STAGE_RUN_DIR:=$RUN_DIR/logs/$STAGE_RUN}"
    LOG_DIR=$RUN_DIR/logs/$STAGE_RUN/$JOB.$RESTART
    mkdir -p "$LOG_DIR" "$STAGE_RUN_DIR" || { LOG_DIR=""; fail "cannot write to $RUN_DIR"; }
    ln -sfn "$JOB.$RESTART" "$RUN_DIR/logs/$STAGE_RUN/latest"
    printf '%q ' "${OVERRIDES[@]}" > "$LOG_DIR/overrides"
    rm -f "$STAGE_RUN_DIR/STOP"
    # Preflight looks for this file on the other nodes; a result must be newer than it.
    : > "$LOG_DIR/visible"
    mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # SGLang sends itself an HTTP request before it reports ready, and follows http_proxy.
    no_proxy=localhost,127.0.0.1,$(join_by , "${NODES[@]}")${no_proxy:+,$no_proxy}
    export no_proxy NO_PROXY=$no_proxy
    DONE_BEFORE=$(count_done)
    set_state running
    log "$STAGE_RUN on ${NODES[*]}, logs in $LOG_DIR"
    fail_without_progress
}

# progress_mark: print what has been done; it changes with every checkpoint or stored verification.
progress_mark() {
    sed -n 's/.*"done": *\([0-9]*\).*/\1/p' "$STAGE_RUN_DIR/progress.json" 2>/dev/null || cat "$STAGE_RUN_DIR/checkpoints/latest" 2>/dev/null
}

count_done() {
    local mark
    mark=$(progress_mark)
    if [[ $STAGE_RUN == stage1/* ]]; then echo "${mark:-0}"; return; fi
    mark=${mark##*step-}
    echo "$(( 10#${mark:-0} ))"
}

# Fail the fourth start in a row that begins where the one before began.
fail_without_progress() {
    local attempts=$RUN_DIR/logs/$STAGE_RUN/attempts.tsv mark same
    mark=$(progress_mark)
    printf '%s\t%s\t%s\t%s\n' "$JOB" "$RESTART" "$(date +%FT%T%z)" "${mark:-nothing}" >> "$attempts"
    same=$(tail -n 4 "$attempts" | awk -F'\t' -v job="$JOB" -v mark="${mark:-nothing}" '$1 == job && $4 == mark' | wc -l)
    if (( same == 4 )); then
        fail "no progress in three requeues: still at ${mark:-the beginning}. Look at $RUN_DIR/logs/$STAGE_RUN, then submit again"
    fi
}

# --- signals: nothing is forwarded; the STOP file requests a checkpoint (rank 0 checks for it between steps)

on_limit() { STOPPING=limit SIGNALS=$(( SIGNALS + 1 )); log "the time limit is near: requesting a checkpoint"; request_stop; }
on_cancel() { STOPPING=cancel SIGNALS=$(( SIGNALS + 1 )); log "cancelled or preempted: requesting a checkpoint"; request_stop; }
request_stop() { if [[ -n $STAGE_RUN_DIR ]]; then : > "$STAGE_RUN_DIR/STOP"; fi; }

# wait_for PID: return the status of a background process; a trap does not end the wait.
wait_for() {
    local status before
    while :; do
        before=$SIGNALS
        wait "$1"; status=$?
        # A trap interrupts `wait`; waiting again also works for a process that has ended meanwhile.
        (( SIGNALS > before )) || return "$status"
    done
}

# --- nodes

# preflight: check that every node sees run folder, models and data, resolves the head node and has its GPUs.
preflight() {
    local answers=$LOG_DIR/preflight.txt node bad=() options=() path image
    check_cpus
    for path in "${NEEDS[@]}"; do options+=(--needs "$path"); done
    for image in trainer rollout; do
        [[ $image == trainer || -n $ROLLOUT_IMAGE && $ENGINE != local ]] || continue
        image_options "$image"
        srun --nodes="${#NODES[@]}" --ntasks="${#NODES[@]}" --ntasks-per-node=1 --overlap "${IMAGE_OPTIONS[@]}" \
            "${COMMAND[@]}" "$SLURM_DIR/node_check.py" --canary "$LOG_DIR/visible" --head "${NODES[0]}" \
            --gpus "$GPUS_PER_NODE" --gpu-count "$GPU_COUNT_COMMAND" --first-port "$(first_port)" \
            --ports "$(( GPUS_PER_NODE ? GPUS_PER_NODE : POLICY_SERVERS + VERIFIER_SERVERS + 1 ))" "${options[@]}" \
            > "$answers" 2> "$LOG_DIR/preflight.srun.log" < /dev/null &
        wait_for $!
        for node in "${NODES[@]}"; do
            if ! grep -q "^$node ok " "$answers"; then bad+=("$node"); fi
        done
        if (( ${#bad[@]} )); then
            { grep -v ' ok ' "$answers"; tail -n 20 "$LOG_DIR/preflight.srun.log"; } | tee "$LOG_DIR/error.txt" >&2
            fail "preflight of the $image failed on ${bad[*]}; without them: sbatch --exclude=$(join_by , "${bad[@]}")"
        fi
    done
    MASTER_ADDR=${NODES[0]} MASTER_PORT=$(sed -n "s/^${NODES[0]} ok //p" "$answers")
    export MASTER_ADDR MASTER_PORT
    log "preflight ok, ranks meet at $MASTER_ADDR:$MASTER_PORT"
}

# check_cpus: fail if ranks would share one CPU. Without --exclusive or --cpus-per-task Slurm gives a job one CPU per node.
check_cpus() {
    local least
    least=$(tr ',' '\n' <<< "${SLURM_JOB_CPUS_PER_NODE:-}" | sed 's/(.*//' | sort -n | head -n 1)
    if [[ -n $least ]] && (( least < GPUS_PER_NODE )); then
        fail "this job has $least CPUs on a node with GPUS_PER_NODE=$GPUS_PER_NODE: ask for whole nodes \
(SBATCH_EXCLUSIVE=exclusive in slurm/site.env), or sbatch --ntasks-per-node=$GPUS_PER_NODE --cpus-per-task=N" 2
    fi
}

# Below the ports that Linux gives to outgoing connections; jobs side by side start looking at different ones.
first_port() { echo $(( 10000 + JOB * 16 % 20000 )); }

join_by() { local IFS=$1; shift; echo "$*"; }

# nodes_lost: print this job's nodes that do not respond, for example after a crash.
nodes_lost() {
    local node alive
    alive=$(timeout 30 srun --nodes="${#NODES[@]}" --ntasks="${#NODES[@]}" --ntasks-per-node=1 --overlap --no-kill \
        --kill-on-bad-exit=0 printenv SLURMD_NODENAME 2>/dev/null < /dev/null)
    # This script's own node is alive: if it did not respond either, srun itself failed.
    grep -qx "${SLURMD_NODENAME:-${NODES[0]}}" <<< "$alive" || return 0
    for node in "${NODES[@]}"; do grep -qx "$node" <<< "$alive" || echo "$node"; done
}

# nodes_needed: print the number of nodes for the ranks of the layout.
nodes_needed() { echo $(( RANKS_PER_NODE ? (WORLD_SIZE + RANKS_PER_NODE - 1) / RANKS_PER_NODE : 1 )); }

# check_ranks NODES: fail unless the ranks of the layout fill this number of nodes.
check_ranks() {
    if (( RANKS_PER_NODE == 0 && $1 > 0 && WORLD_SIZE % ($1 > 0 ? $1 : 1) == 0 || $1 == $(nodes_needed) )); then return 0; fi
    fail "impossible layout: $WORLD_SIZE trainer ranks, RANKS_PER_NODE=$RANKS_PER_NODE, need $(nodes_needed) nodes for \
training, and $1 are available: change sbatch --nodes or the megatron.* sizes" 2
}

# check_servers NODES: fail if there are nodes for servers and the engine has none.
check_servers() {
    if (( $1 )) && [[ $ENGINE == local ]]; then
        fail "--policy-nodes and --verifier-nodes have no effect with engine.kind=local: remove them or choose another engine" 2
    fi
}

# --- steps

# start_step ROLE NODES TASKS IMAGE ARGUMENTS...: run one supervised srun in the background; its pid is in STEP_PID.
# --wait=0: the main rank still scores the model long after the others ended; any other number of seconds, or the site's
# WaitTime, would end it.
start_step() {
    local role=$1 nodes=$2 tasks=$3 count
    if [[ -n $STOPPING ]]; then finish 0; fi  # stopped before there was a step to stop
    image_options "$4"
    shift 4
    count=$(tr ',' '\n' <<< "$nodes" | wc -l)
    srun --nodes="$count" --nodelist="$nodes" --ntasks="$tasks" --ntasks-per-node="$(( (tasks + count - 1) / count ))" \
        --overlap --kill-on-bad-exit=1 --wait=0 --job-name="$role" --output="$LOG_DIR/$role-%t.log" \
        "${IMAGE_OPTIONS[@]}" "${COMMAND[@]}" "$@" 2> "$LOG_DIR/$role.srun.log" < /dev/null &
    STEP_PID=$!
    STEP_PIDS+=("$STEP_PID")
}

# --- end of a job

# finish STATUS: end the job. The DONE marker decides, never the status: Slurm 22.05 reports 0 for a dead node and a
# missing image.
finish() {
    local status=$1 lost
    kill "${STEP_PIDS[@]}" 2>/dev/null
    if [[ -e $DONE_FILE && ( -z ${ALWAYS_AGAIN:-} || $DONE_FILE -nt $LOG_DIR/visible ) ]]; then
        set_state 'done'
        log "$STAGE_RUN is done"
        exit 0
    fi
    if [[ $STOPPING != limit ]] && preempted; then requeue "preempted"; fi
    case $STOPPING in
        cancel) set_state cancelled "submit the same command to resume"; log "cancelled, resumable"; exit 143 ;;
        limit) requeue "time limit" ;;
    esac
    if [[ -e $LOG_DIR/broken ]]; then
        lost=$(nodes_lost)
        if [[ -n $lost ]]; then requeue "lost ${lost//$'\n'/ }"; fi
        tail -n 40 "$LOG_DIR"/*-*-[0-9]*.log | tee "$LOG_DIR/error.txt" >&2
        fail "$(cat "$LOG_DIR/broken")"
    fi
    if [[ -e $STAGE_RUN_DIR/STOP ]]; then
        fail "stopped by hand with $STAGE_RUN_DIR/STOP; submit the same command to resume" 3
    fi
    lost=$(nodes_lost)
    if [[ -n $lost ]]; then requeue "lost ${lost//$'\n'/ }"; fi
    first_error > "$LOG_DIR/error.txt"
    cat "$LOG_DIR/error.txt" >&2
    fail "$STAGE_RUN ended without its marker $DONE_FILE (srun returned $status)" "$(( status ? status : 1 ))"
}

# own_name: print this job's name for scontrol. The first task of an array has the array's number as its job id, which
# means all of its tasks.
own_name() { echo "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$JOB}"; }

# preempted: succeed in the grace time of a preemption. Slurm then sent TERM to the steps and not to this script, and it
# does not requeue a job that ends on its own.
preempted() {
    local shown
    shown=$(scontrol show job "$(own_name)")
    [[ $shown == *JobState=RUNNING* && $shown =~ [[:space:]]PreemptTime=[0-9] ]]
}

# requeue REASON: run this job again, from its checkpoint. Does not return.
requeue() {
    local name
    name=$(own_name)
    (( RESTART < MAX_REQUEUES )) || fail "$1, and MAX_REQUEUES=$MAX_REQUEUES requeues are used up"
    set_state requeued "$1"
    log "requeue: $1"
    scontrol requeue "$name" || fail "$1, and Slurm did not requeue job $name"
    # Slurm ends this script now; it must not write anything more.
    trap 'exit 0' TERM INT
    sleep 600 &
    wait $!
    fail "$1, and nothing happened after scontrol requeue $name"
}

# first_error: print the error of the rank that failed first. The others fail because it is gone.
first_error() {
    local file
    # shellcheck disable=SC2012  # names are our own
    while IFS= read -r file; do
        if grep -q 'Traceback (most recent call last)\|spark-nemo: error:' "$file"; then
            echo "$(basename "$file" .log) failed first:"
            awk '/Traceback \(most recent call last\)/ && !chained {text = ""}
                 {chained = /exception was the direct cause|another exception occurred/ || (chained && /^$/)
                  text = text $0 "\n"} END {printf "%s", text}' "$file" | tail -n 60
            return
        fi
    done < <(ls -tr "$LOG_DIR"/*-[0-9]*.log 2>/dev/null)
    tail -n 15 "$LOG_DIR"/*.srun.log 2>/dev/null
}
