# Sourced by the scripts beside it: MSDNets trained as other projects of this family publish them.
source "$(dirname "${BASH_SOURCE[0]}")/recipes.sh"

# plain_network DATASET SIZE: a model of recipes.sh without gradient rescaling and with nothing held out.
plain_network() {
    local flags
    flags=$(network "$1" "$2")
    flags=${flags/--arch msdnet_ge/--arch msdnet}
    echo "${flags/ --use-valid/}"
}

# part_of_batch N: print how many of N images each process has; they have to have equally many.
part_of_batch() {
    local nproc nodes
    nproc=$(processes) || exit
    nodes=$(value_of --nnodes 1 ${TORCHRUN:-})
    [[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "TORCHRUN has --nnodes $nodes; a batch of $1 images needs their number"
    [ $(($1 % (nproc * nodes))) -eq 0 ] || fail "$((nproc * nodes)) processes cannot have equal parts of $1 images; set NPROC"
    echo $(($1 / (nproc * nodes)))
}

# train_in NAME DATASET FLAG...: train in the run folder NAME, which --result_dir among the flags replaces.
train_in() {
    local name=$1 dataset=$2
    shift 2
    start_training "$dataset" --result_dir "$(value_of --result_dir "$RESULT_ROOT/$name" "$@")" "$@"
}

# Learning to weight samples (L2W-DEN, arXiv:2209.08310).

# l2w DATASET SIZE FLAG...: train a model. --smooth among the flags: for 300 epochs, with label smoothing.
l2w() {
    local dataset=$1 size=$2 name=l2w_$1_$2 flag given=() epochs=100 smoothing="" settings part
    shift 2
    case " $(sizes "$dataset") " in *" $size "*) ;; *) fail "there is no size '$size'; the sizes are" $(sizes "$dataset") ;; esac
    for flag; do
        if [ "$flag" = --smooth ]; then name+=_smooth epochs=300 smoothing="--label_smoothing 0.1"; else given+=("$flag"); fi
    done
    settings="$(plain_network "$dataset" "$size") --method l2w --meta_net_hidden_size 500 --meta_net_num_layers 1"
    settings+=" --meta_lr 1e-4 --meta_weight_decay 1e-4 --epsilon 0.3 --target_p_index 15 --meta_net_input_type loss"
    settings+=" --constraint_dimension mat --weight-decay 1e-4 $smoothing"
    case $dataset in
        cifar100) settings+=" $(schedule cifar100) --batch-size 64 --meta_interval 1" ;;
        imagenet)
            part=$(value_of --batch-size "" ${given[@]+"${given[@]}"})
            part=${part:-$(part_of_batch 4096)}
            settings+=" --lr_f 0.8 --lr-type cosine --epochs $epochs --batch-size $part --meta_interval 100 --workers 8"
            ;;
    esac
    read -ra settings <<<"$settings"
    train_in "$name" "$dataset" "${settings[@]}" ${given[@]+"${given[@]}"}
}

# Block-dependent losses (TNNLS 2023).

# block_losses DATASET BLOCKS OVERLAP T NETWORK_FLAGS VARIANT [DISTILL] FLAG...: train the network of these flags, with so many
# blocks, where a loss trains so many of them; T is the temperature of distillation.
block_losses() {
    local dataset=$1 blocks=$2 overlap=$3 temperature=$4 network=$5 variant=${6-} distill=plain settings
    shift 5
    if [ $# -gt 0 ]; then shift; fi
    case ${1-} in plain | self | teacher) distill=$1 && shift ;; esac
    case $variant in
        conventional) settings="--method block_losses --groups $blocks" ;;
        overlap) settings="--method block_losses --overlap $overlap" ;;
        overlap_final) settings="--method block_losses --overlap $overlap --include_final" ;;
        local_error) settings="--method block_losses --overlap 1" ;;
        no_overlap) settings="--method block_losses --groups $((blocks / 2))-$((blocks - blocks / 2))" ;;
        *) fail "there is no variant '$variant'; the variants are conventional overlap overlap_final local_error no_overlap" ;;
    esac
    if [ $variant-$distill = conventional-plain ]; then settings="--method joint"; fi # the same losses, in one call
    if [ $distill != plain ]; then settings+=" --distill_weight 0.35 --distill_T $temperature"; fi
    if [ $distill = teacher ] && [ -z "$(value_of --teacher "" "$@")" ]; then
        fail "name the network to learn from: block_losses_$dataset.sh $variant teacher --teacher FILE"
    fi
    if [ $distill = self ] && [ -n "$(value_of --teacher "" "$@")" ]; then
        fail "self learns from the last exit; with --teacher it is block_losses_$dataset.sh $variant teacher --teacher FILE"
    fi
    read -ra settings <<<"$network $(schedule "$dataset") --batch-size 64 --workers 16 --weight-decay 1e-4 $settings"
    train_in "block_losses_${dataset}_${variant}_$distill" "$dataset" "${settings[@]}" "$@"
}
