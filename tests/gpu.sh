#!/usr/bin/env bash
# Everything that needs a GPU and nobody at the keyboard: the tests marked gpu, then the benchmarks of training.
#     bash tests/gpu.sh [FOLDER]        tables, logs and JSON lines go to FOLDER (default: gpu_results)
# For ten minutes of a GPU, with a training at the end: tests/gpu_session.py.
# A part that fails does not keep the next one from running; the exit code is 1 if any did.
source "$(dirname "${BASH_SOURCE[0]}")/../utils/shell.sh"

folder=$(mkdir -p "${1:-gpu_results}" && cd "${1:-gpu_results}" && pwd)
cd "$ROOT"
prepare_environment requirements.txt tests/requirements.txt
python=$(python_path)
code=0

# part NAME COMMAND...: run it, keep what it prints in FOLDER/NAME.log
part() {
    local name=$1
    shift
    run "$@" 2>&1 | tee "$folder/$name.log" || code=1
}

part tests "$python" -m pytest -m gpu
for network in msdnet10 ranet8; do
    part "train_$network" "$python" -m utils.benchmark train --device cuda --network "$network" --json "$folder/train.jsonl"
done
part scaling "$python" -m utils.benchmark scaling --device cuda --batch-sizes 16,32,64,128,256 --json "$folder/scaling.jsonl"
exit $code
