# Sourced by the scripts of msdnet_scripts/, ranet_scripts/ and tests/: the Python to use, and how runs are started.
#
#   PYTHON       interpreter to use as it is (default: .venv of this repository where it exists, else python3)
#   DATA_ROOT    folder of the data set                            (default: data/DATASET)
#   RESULT_ROOT  folder of the run folders                         (default: results)
#   NPROC        processes, one per GPU, of an ImageNet training   (default: 4)
#   TORCHRUN     options of torchrun there
#                (default: --standalone --local-addr 127.0.0.1 --nproc_per_node=NPROC)
#   DRY_RUN=1    print the commands instead of running them
#
# Relative paths are taken from the folder the caller is in.
set -euo pipefail
unset CDPATH # with it, cd prints a folder and may choose another one

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
RESULT_ROOT=${RESULT_ROOT:-$ROOT/results}
case $RESULT_ROOT in /*) ;; *) RESULT_ROOT=$PWD/$RESULT_ROOT ;; esac
case ${PYTHON:-} in [!/]*/*) PYTHON=$PWD/$PYTHON ;; esac # a path, and some scripts change the folder before they use it

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

# refuse FLAG... -- ARGUMENT...: end where an argument is one of these flags, which a script sets itself for every run.
# The variable `reason` says it in other words.
refuse() {
    local flags=" " argument
    while [ "$1" != -- ]; do flags+="$1 " && shift; done
    for argument in "${@:2}"; do
        case $flags in *" ${argument%%=*} "*) fail "${argument%%=*} cannot be given: ${reason:-this script sets it}" ;; esac
    done
}

# value_of FLAG DEFAULT ARGUMENT...: print the value that the arguments give a flag, the last one where there are several.
value_of() {
    local flag=$1 value=$2
    shift 2
    while [ $# -gt 0 ]; do
        case $1 in
            "$flag") value=${2-$value} ;;
            "$flag="*) value=${1#*=} ;;
        esac
        shift
    done
    printf '%s\n' "$value"
}

# place_of ARGUMENT...: set the array `place` to those of the arguments that say where a run computes, where its data are and
# how they are read, which evaluation has to be told as well.
place_of() {
    place=()
    while [ $# -gt 0 ]; do
        case " --data-root --device --gpu --threads --val_workers --decoder " in
            *" $1 "*) place+=("$1" ${2+"$2"}); [ $# -eq 1 ] || shift ;;
            *" ${1%%=*} "*) place+=("$1") ;;
            *) if [ "$1" = --skip_unreadable ]; then place+=("$1"); fi ;;
        esac
        shift
    done
}

# The interpreter: the caller's choice, else the environment that prepare_environment made, else the system's.
python_path() {
    if [ -n "${PYTHON:-}" ]; then echo "$PYTHON"
    elif [ -x "$VENV/bin/python" ]; then echo "$VENV/bin/python"
    else echo python3; fi
}

# Run a command, saying which; with DRY_RUN say it only.
run() {
    if [ -n "${DRY_RUN:-}" ]; then
        printf '%q ' "$@"
        echo
    else
        command -v "$1" >/dev/null || fail "there is no program '$1'; see PYTHON in utils/shell.sh"
        { printf '+ '; printf '%q ' "$@"; echo; } >&2
        pass_signals "$@"
    fi
}

# Run a command to which signals are passed on: it saves and ends, and its exit code ends the script.
pass_signals() {
    local child code signal
    set -m # in a process group of its own, which Ctrl-C reaches once, from here, and in which it is not ignored
    "$@" &
    child=$!
    set +m
    for signal in INT TERM USR1 HUP; do trap "kill -$signal $child 2>/dev/null || true" $signal; done
    while :; do # a signal ends `wait` before the command has ended
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2>/dev/null || break
    done
    trap - INT TERM USR1 HUP
    return $code
}

# prepare_environment FILE...: make .venv and install the requirement files (paths in the repository) that have changed
# since they were last installed. With PYTHON set, that interpreter is taken as it is and nothing is installed.
prepare_environment() {
    local file stamp
    if [ -n "${PYTHON:-}" ] || [ -n "${DRY_RUN:-}" ]; then return; fi
    if ! "$VENV/bin/python" -c '' 2>/dev/null; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
            fail "needs python3 of version 3.10 or newer, found: $(python3 --version 2>&1 || true)"
        echo "Making $VENV" >&2
        python3 -m venv --clear "$VENV" ||
            fail "python3 cannot make a virtual environment; install its venv module (Debian: apt install python3-venv)"
    fi
    for file in "$@"; do
        stamp=$VENV/installed-${file//\//-}
        if ! cmp -s "$ROOT/$file" "$stamp"; then
            echo "Installing $file" >&2
            "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$ROOT/$file" ||
                fail "could not install $file, see above"
            cp "$ROOT/$file" "$stamp"
        fi
    done
}

# ---- Training and evaluating the paper's models. A folder's recipes.sh says which networks there are: FAMILY, the
# functions `network DATASET SIZE` and `sizes DATASET`, and IMAGENET_EVAL_BATCH. SIZE is `any` for the anytime model.

# The name of a model's run folder, the same for training and evaluation.
run_name() {
    case $2 in
        any) echo "${FAMILY}_$1_any" ;;
        *) echo "${FAMILY}_$1_batch_$2" ;;
    esac
}

# result_dir DATASET SIZE FLAG...: the run folder of a model, which --result_dir among the flags chooses.
result_dir() {
    value_of --result_dir "$RESULT_ROOT/$(run_name "$1" "$2")" "${@:3}"
}

# processes: print the number of processes of an ImageNet training on this machine.
processes() {
    [[ ${NPROC:=4} =~ ^[1-9][0-9]*$ ]] || fail "NPROC is the number of processes, got '$NPROC'"
    echo "$NPROC"
}

# start_training DATASET FLAG...: run the training program of a data set, that of ImageNet in several processes.
start_training() {
    local dataset=$1 launch=() options nproc devices=()
    shift
    if [ "$dataset" = imagenet ]; then
        nproc=$(processes) || exit
        # Without an address torchrun asks for that of the host's name, and hangs where the name has none.
        read -ra options <<<"${TORCHRUN:---standalone --local-addr 127.0.0.1 --nproc_per_node=$nproc}"
        launch=(-m torch.distributed.run "${options[@]}") # what the command torchrun runs
        devices=(--distributed --gpu "$(seq 0 $((nproc - 1)) | paste -sd, -)")
    fi
    run "$(python_path)" ${launch[@]+"${launch[@]}"} "$ROOT/train_$dataset.py" --dataset "$dataset" \
        --data-root "${DATA_ROOT:-$ROOT/data/$dataset}" ${devices[@]+"${devices[@]}"} "$@"
}

# schedule DATASET: the flags of the published learning rate.
schedule() {
    case $1 in
        cifar100) echo "--lr_f 0.1 --lr_milestones 150,225 --epochs 300" ;;
        imagenet) echo "--lr_f 0.1 --lr_milestones 30,60 --epochs 90" ;;
    esac
}

# train DATASET SIZE FLAG...: train a model with the paper's settings; later flags win.
train() {
    local dataset=$1 result settings
    result=$(result_dir "$@")
    read -ra settings <<<"$(network "$1" "$2") $(schedule "$1")"
    shift 2
    start_training "$dataset" --result_dir "$result" "${settings[@]}" --ensemble_reweight 0.5 --batch-size 64 --workers 16 \
        --weight-decay 1e-4 "$@"
}

# evaluate DATASET SIZE FLAG...: evaluate model_best.pth of a model's run folder; later flags win, and what has no effect with
# them is left out.
evaluate() {
    local dataset=$1 result settings mode=() network words
    result=$(result_dir "$@")
    network=$(network "$1" "$2")
    if [ "$2" != any ]; then mode=(--evalmode dynamic --flat_curve); fi # which is what --flat_curve goes with
    shift 2
    words=" ${*//=/ } "
    case $words in
        *" --evalmode anytime "*) mode=() network=${network/ --use-valid/} ;;
        *" --evalmode realtime "* | *" --cost latency "* | *" --budget "*[0-9]"ms "* | *" --policy patience "* | *" --images "*) mode=() ;;
    esac
    read -ra network <<<"$network"
    case $dataset in
        cifar100) settings=(--batch-size 128) ;;
        imagenet) settings=(--batch-size "$IMAGENET_EVAL_BATCH" --val_workers 16) ;;
    esac
    run "$(python_path)" "$ROOT/eval_$dataset.py" \
        --dataset "$dataset" --data-root "${DATA_ROOT:-$ROOT/data/$dataset}" --result_dir "$result" "${network[@]}" \
        --evaluate-from "$result/model_best.pth" --save_suffix _use_reweight --ensemble_reweight 0.5 \
        --workers 1 --gpu 0 ${mode[@]+"${mode[@]}"} "${settings[@]}" "$@"
}

# each_size train|evaluate DATASET [SIZE] FLAG...: the budgeted-batch model of that size, by default all in turn.
each_size() {
    local action=$1 dataset=$2 chosen size
    shift 2
    chosen=$(sizes "$dataset")
    if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
        [ "$1" != any ] && [ -n "$(network "$dataset" "$1")" ] || fail "there is no size '$1'; the sizes are" $chosen
        chosen=$1
        shift
    else # the files of one size would replace those of another
        reason="it is for one size, and all are done in turn here; name the SIZE first" \
            refuse --result_dir --tensorboard_dir --evaluate-from --publish -- "$@"
    fi
    for size in $chosen; do "$action" "$dataset" "$size" "$@"; done
}
