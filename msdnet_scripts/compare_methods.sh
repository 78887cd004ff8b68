#!/usr/bin/env bash
# Every training method with one recipe: a run for each, evaluated in both modes, then one table and one figure.
#     bash msdnet_scripts/compare_methods.sh [TRAINING FLAG...]
#     METHODS="boost joint" bash msdnet_scripts/compare_methods.sh --dataset cifar100 --nBlocks 5 --nChannels 16 --epochs 12
# METHODS names the methods (default: all). The flags go to all runs and win over the recipe here: a small MSDNet on `glyphs`, a
# few minutes a method. The networks compared are those of the last epoch, which nothing has chosen. Exits that were trained
# jointly are also read as ensembles (--ensemble of eval_cifar100.py).
# Started again, it leaves finished runs alone and goes on with the one that was interrupted. A method that fails is left out
# and named at the end (exit code 1).
# utils/shell.sh lists what else the environment sets: DATA_ROOT, RESULT_ROOT, DRY_RUN=1, ...
source "$(dirname "${BASH_SOURCE[0]}")/../utils/shell.sh"

given=("$@")
refuse --result_dir --tensorboard_dir --method --checkpoint --resume --start-epoch -- "$@"
place_of "$@"
all="boost joint l2w block_losses boost_l2w boost_distill imta" # imta is last: it starts from the network of joint
METHODS=${METHODS:-$all}
python=$(python_path)
folder=$RESULT_ROOT/compare_methods
dataset=$(value_of --dataset glyphs "$@")
# So small a network gains little from a second thread, and on a busy machine loses much by it.
data=(--threads 1 --dataset "$dataset" --data-root "${DATA_ROOT:-$ROOT/data/$dataset}")

# is_in WORD LIST: whether a list of words, with spaces between them, has this one.
is_in() {
    case " $2 " in *" $1 "*) ;; *) false ;; esac
}

# flags_of METHOD: set the array `flags` to all flags of its training but those that say where it starts.
flags_of() {
    flags=("${data[@]}" --method "$1" --use-valid --arch msdnet_ge --nBlocks 4 --base 1 --step 2 --nChannels 4 --growthRate 4
        --epochs 4 --lr_milestones 2,3 --batch-size 64)
    # --groups is the other way to say what --overlap says.
    if [ "$1" = block_losses ] && [ -z "$(value_of --groups "" ${given[@]+"${given[@]}"})" ]; then flags+=(--overlap 3); fi
    flags+=(${given[@]+"${given[@]}"})
}

# train_method METHOD: train it, go on with it, or leave it alone when it is finished.
train_method() {
    local run=$folder/$1 start=(--resume) joint=$folder/joint/model_latest.pth
    flags_of "$1"
    if [ "$1" = imta ]; then
        if [ ! -e "$run/model_latest.pth" ] && [ ! -e "$run/model_previous.pth" ]; then
            start=(--checkpoint "$joint")
        elif [ "$joint" -nt "$run/model_latest.pth" ]; then
            fail "$run started from another network than joint has now; move that folder away to train imta anew"
        fi
    fi
    run "$python" "$ROOT/train_cifar100.py" --result_dir "$run" "${flags[@]}" "${start[@]}"
}

# evaluate_method METHOD SUFFIX FLAG...: evaluate it in both modes, except where the file with this suffix is newer than the
# checkpoint.
evaluate_method() {
    local run=$folder/$1 suffix=$2 mode
    shift 2
    for mode in anytime dynamic; do
        if [ "$run/$mode$suffix.json" -nt "$run/model_latest.pth" ]; then continue; fi
        run "$python" "$ROOT/eval_cifar100.py" "${data[@]}" --evaluate-from "$run/model_latest.pth" --evalmode $mode \
            ${place[@]+"${place[@]}"} "$@" || return
    done
}

# compare METHOD: all that the comparison needs of one method.
compare() {
    train_method "$1" && evaluate_method "$1" "" || return
    if [ "$1" = joint ]; then
        local temperatures suffix=_boost
        temperatures=$(value_of --ensemble_reweight "" ${given[@]+"${given[@]}"})
        if [ -n "$temperatures" ]; then suffix=_boost_of_these_temperatures; fi # evaluated every time
        evaluate_method joint $suffix --ensemble boost --ensemble_reweight "${temperatures:-0.5}" &&
            evaluate_method joint _average --ensemble average && evaluate_method joint _poe --ensemble poe
    fi
}

for method in $METHODS; do is_in "$method" "$all" || fail "there is no method '$method'; METHODS may name $all"; done
if is_in imta "$METHODS" && ! is_in joint "$METHODS"; then fail "imta starts from the network of joint; add joint to METHODS"; fi
if [ -z "${DRY_RUN:-}" ]; then # flags that one method refuses are refused before another has trained for hours
    for method in $METHODS; do
        flags_of "$method"
        if [ "$method" = imta ]; then flags+=(--checkpoint FILE); fi
        (cd "$ROOT" && "$python" -c "import sys, args; sys.argv[0] = 'train_cifar100.py'; args.parse_args(task='training')" \
            --result_dir "$folder/$method" "${flags[@]}")
    done
fi

failed=()
for method in $all; do
    is_in "$method" "$METHODS" || continue
    code=0
    if [ "$method" = imta ] && is_in joint "${failed[*]-}"; then code=1; else compare "$method" || code=$?; fi
    case $code in
        0) ;;
        1) failed+=("$method") ;;
        *) exit $code ;; # a mistake would meet the other methods too, and a signal is for all of them
    esac
done
cd "$ROOT" # where python -m finds utils
run "$python" -m utils.methods_table "$folder"
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed, see above, and not in the table: ${failed[*]}" >&2
    exit 1
fi
