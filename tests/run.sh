#!/usr/bin/env bash
# Lint and test; makes .venv and installs what is needed the first time.
#     bash tests/run.sh [--all] [PYTEST ARGUMENT...]        --all: the slow tests too
# The files of tests are shared out to as many processes as there are cores, with one thread each.
# Tests on real images run where BOOSTNET_TEST_DATA names a folder with cifar100/{train,test}/CLASS/*.png and
# imagenet_sample/WNID/*.JPEG.
source "$(dirname "${BASH_SOURCE[0]}")/../utils/shell.sh"
cd "$ROOT"

arguments=()
for argument in "$@"; do
    case $argument in
        --all) arguments+=(-m "") ;; # in place of pyproject.toml's 'not slow'
        *) arguments+=("$argument") ;;
    esac
done

prepare_environment requirements.txt tests/requirements.txt
python=$(python_path)
run "$python" -m ruff check
export OMP_NUM_THREADS=1
run "$python" -m pytest -n auto --dist loadfile ${arguments[@]+"${arguments[@]}"}
