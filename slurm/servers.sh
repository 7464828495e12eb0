# shellcheck shell=bash disable=SC2154,SC2153  # sourced by lib.sh, whose names these are
# Rollout servers: each runs in a step of its own and is restarted when it dies.

# start_servers ROLE NODES...: fill the GPUs of each node with servers, or start engine.ROLE.servers without GPUs. SERVERS
# are the trainer's options with their addresses. The API key is passed in the environment: every user of a node can read
# command lines.
start_servers() {
    local role=$1 count=$POLICY_SERVERS gpus=$POLICY_GPUS python=$POLICY_PYTHON node port i urls=()
    local words=("${POLICY_WORD[@]}") variables=("${POLICY_ENV[@]}")
    shift
    (( $# )) || return 0
    if [[ $role == verifier ]]; then
        count=$VERIFIER_SERVERS gpus=$VERIFIER_GPUS python=$VERIFIER_PYTHON
        words=("${VERIFIER_WORD[@]}") variables=("${VERIFIER_ENV[@]}")
    fi
    [[ -n $count ]] || fail "--$role-nodes needs engine.$role.servers: the number of servers to start" 2
    if (( GPUS_PER_NODE )); then
        # Servers have the node to themselves.
        count=$(( GPUS_PER_NODE / gpus ))
        (( count )) ||
            fail "impossible layout: engine.$role.tensor_parallel=$gpus on nodes of GPUS_PER_NODE=$GPUS_PER_NODE" 2
    fi
    if [[ -z ${SPARK_NEMO_API_KEY:-} ]]; then
        SPARK_NEMO_API_KEY=$(head -c 24 /dev/urandom | base64 | tr '+/' '-_')
        export SPARK_NEMO_API_KEY
    fi
    for node in "$@"; do
        port=$(sed -n "s/^$node ok //p" "$LOG_DIR/preflight.txt")
        for (( i = 0; i < count; i++ )); do
            ROLLOUT_PYTHON=${python:-$ROLLOUT_PYTHON} keep_server "$role-$node-$i" "$node" "${variables[@]}" -- \
                server "${words[@]}" --base-gpu-id "$(( i * gpus ))" --host "$node" --port "$(( port + i ))"
            urls+=("http://$node:$(( port + i ))")
        done
    done
    SERVERS+=(--servers "$role=$(join_by , "${urls[@]}")")
    URLS+=("${urls[@]}")
    log "$role servers: ${urls[*]}"
}

# keep_server NAME NODE VARIABLES... -- ARGUMENTS...: run a server in the background; restart it at most MAX_RESTARTS
# times.
keep_server() {
    local name=$1 node=$2 variables=()
    shift 2
    while [[ $1 != -- ]]; do variables+=("$1"); shift; done
    shift
    image_options rollout
    (
        trap '' USR1
        trap '[[ -z $step ]] || kill "$step" 2>/dev/null; exit 0' TERM
        step="" status=0
        for (( life = 0; life <= MAX_RESTARTS; life++ )); do
            srun --nodes=1 --nodelist="$node" --ntasks=1 --overlap --job-name="$name" --open-mode=append \
                --output="$LOG_DIR/$name.log" "${IMAGE_OPTIONS[@]}" \
                env "${variables[@]}" "${COMMAND[@]}" "$SERVER_PROGRAM" "$@" \
                2>> "$LOG_DIR/$name.srun.log" < /dev/null &
            step=$!
            wait "$step"; status=$?
            log "server $name ended (srun returned $status), start $(( life + 1 ))"
            sleep 1
        done
        echo "server $name died $(( MAX_RESTARTS + 1 )) times; see the end of $LOG_DIR/$name.log" > "$LOG_DIR/broken"
        request_stop
    ) &
    STEP_PIDS+=($!)
}

# wait_servers: wait until every server responds, or one is out of restarts.
wait_servers() {
    (( ${#URLS[@]} )) || return 0
    local deadline=$(( $(date +%s) + SERVER_START_TIMEOUT )) python=$PYTHON
    # With images PYTHON is the login node's and may not run here; any Python works.
    "$python" -c '' 2>/dev/null || python=python3
    "$python" -c '' || fail "neither PYTHON=$PYTHON nor python3 runs on this node, and one is needed to check the servers"
    until "$python" "$SLURM_DIR/server_check.py" "${URLS[@]}" > "$LOG_DIR/servers.txt"; do
        [[ -z $STOPPING ]] || finish 0
        if [[ -e $LOG_DIR/broken ]]; then finish 1; fi
        (( $(date +%s) < deadline )) || fail "after SERVER_START_TIMEOUT=$SERVER_START_TIMEOUT s: $(tr '\n' ' ' < "$LOG_DIR/servers.txt")"
        sleep 2
    done
    log "${#URLS[@]} servers respond"
}
URLS=() SERVERS=()
