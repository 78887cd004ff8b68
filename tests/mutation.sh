#!/usr/bin/env bash
# Mutation testing (not part of CI): bash tests/mutation.sh [MODULE ...] [--sample N], see tests/mutation.py. Needs
# tests/mutation_requirements.txt.
cd "$(dirname "$0")/.." && OMP_NUM_THREADS=1 PYTHONPATH=.:tests exec python tests/mutation.py "$@"
