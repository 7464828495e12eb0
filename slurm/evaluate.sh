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
#:   sbatch slurm/evaluate.sh math --model runs/mine/stage3/process_aware/model --data math500.jsonl aime24.jsonl --k 4 \
#:       -- +experiment=spark/base run.dir=runs/mine
#:   sbatch slurm/evaluate.sh processbench --model models/chat --critic --votes 8 --data gsm8k.json math.json \
#:       -- +experiment=spark/base run.dir=runs/mine stage2.eval_sampling.temperature=1.0
#:
#: before --    what `spark-nemo evaluate` takes: math (default) or processbench, then its options: --model FOLDER, --data
#:              FILE..., for math --k and --benchmark, for processbench --critic and --votes. Saved predictions need no
#:              job: score them with `spark-nemo evaluate BENCHMARK --predictions` where you are.
#: after --     Hydra's overrides. The model's texts are saved below run.dir/evaluate.
SLURM_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ! -f $SLURM_DIR/lib.sh ]]; then  # sbatch runs a copy in its spool folder; the job knows where it comes from
    SLURM_DIR=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*/slurm\)/evaluate\.sh.*|\1|p' | head -n 1)
fi
# shellcheck source=slurm/lib.sh
source "$SLURM_DIR/lib.sh"
benchmark=math asked=()
if [[ ${1:-} == math || ${1:-} == processbench ]]; then benchmark=$1; shift; fi
# These options are the command's own, which also says what is wrong with them: some are lists, some have no value.
while (( $# )) && [[ $1 != -- && $1 != -h && $1 != --help ]]; do asked+=("$1"); shift; done
parse_arguments evaluate.sh "$@"
load_site

ALWAYS_AGAIN=1 begin_job "evaluate-$benchmark" "${asked[@]}"
preflight
start_step evaluate "${NODES[0]}" 1 trainer -m spark_nemo.cli.main evaluate "$benchmark" "${asked[@]}" -- \
    "${OVERRIDES[@]}"
wait_for "$STEP_PID"
status=$?
tail -n 1 "$LOG_DIR/evaluate-0.log"
finish $status
