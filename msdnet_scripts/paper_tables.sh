#!/usr/bin/env bash
# All CIFAR-100 results of the paper with one command, most wanted first: table 1 with MSDNet and RANet, BoostNet and the joint
# baseline; the budgeted models of figure 4; further seeds of table 1; the baselines of figure 4; then the report and the plots.
#     bash msdnet_scripts/paper_tables.sh [TRAINING FLAG...]
# The same command goes on where it was stopped and leaves finished runs alone. Flags given here win, such as those that make
# a GPU fast. SEEDS (default "1 2") are the further seeds. The anytime models, which hold nothing out, are trained with
# --paper_protocol, so that the report can show the epoch that test data like best beside the last one.
# utils/shell.sh lists what else the environment sets: DATA_ROOT, RESULT_ROOT, DRY_RUN=1, ...
source "$(dirname "${BASH_SOURCE[0]}")/../utils/shell.sh"

given=("$@")
place_of "$@"
refuse --result_dir --method --seed -- "$@"
for seed in ${SEEDS-1 2}; do
    [[ $seed =~ ^[1-9][0-9]*$ ]] || fail "SEEDS are numbers from 1 on with spaces between them, got '$seed'; seed 0 is always run"
done
[ -z "$(printf '%s\n' ${SEEDS-1 2} | sort | uniq -d)" ] || fail "SEEDS has a number twice: $SEEDS"
python=$(python_path)
tables=()
msdnet_curves=()
ranet_curves=()

# anytime FAMILY METHOD SEED: a model of table 1.
anytime() {
    local folder=$RESULT_ROOT/$1_any_$2_seed$3
    tables+=("$folder")
    pass_signals bash "$ROOT/$1_scripts/train_cifar100_any.sh" --result_dir "$folder" --resume --method "$2" --seed "$3" \
        --paper_protocol ${given[@]+"${given[@]}"}
}

# budgeted FAMILY METHOD SIZE: a model of figure 4, evaluated with eq. 9, with the released sweep, and with that on an augmented
# hold-out. All sizes share the hold-out that seed 0 draws.
budgeted() {
    local folder=$RESULT_ROOT/$1_batch_$3_$2 evaluate
    if [ "$1" = msdnet ]; then msdnet_curves+=("$folder"); else ranet_curves+=("$folder"); fi
    pass_signals bash "$ROOT/$1_scripts/train_cifar100_batch.sh" "$3" --result_dir "$folder" --resume --method "$2" \
        ${given[@]+"${given[@]}"}
    evaluate=("$python" "$ROOT/eval_cifar100.py" --data-root "${DATA_ROOT:-$ROOT/data/cifar100}"
        --evaluate-from "$folder/model_best.pth" --evalmode dynamic ${place[@]+"${place[@]}"})
    run "${evaluate[@]}"
    run "${evaluate[@]}" --sweep released --save_suffix _released
    run "${evaluate[@]}" --sweep released --save_suffix _released --paper_protocol
}

for family in msdnet ranet; do
    for method in boost joint; do anytime $family $method 0; done
done
for size in 4 8 12; do budgeted msdnet boost $size; done
for size in 1 2 3; do budgeted ranet boost $size; done
for seed in ${SEEDS-1 2}; do
    for family in msdnet ranet; do
        for method in boost joint; do anytime $family $method "$seed"; done
    done
done
for size in 4 8 12; do budgeted msdnet joint $size; done
for size in 1 2 3; do budgeted ranet joint $size; done
cd "$ROOT" # where python -m finds utils
run "$python" -m utils.report "${tables[@]}" "${msdnet_curves[@]}" "${ranet_curves[@]}"
run "$python" -m utils.plots "${msdnet_curves[@]}" --output "$RESULT_ROOT/figure4_msdnet"
run "$python" -m utils.plots "${ranet_curves[@]}" --output "$RESULT_ROOT/figure4_ranet"
