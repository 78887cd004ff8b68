"""The hold-out split: drawn once, the same everywhere, and never mistaken for another data set's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.core.errors import UserError
from utils.data.sampling import global_batch_size, plan_evaluation, plan_training
from utils.data.split import Split, _draw_per_class, hash_labels

LABELS = torch.arange(40) % 4


def test_split_parts_the_training_set_without_overlap():
    split = Split.draw(LABELS, 10, seed=0)
    assert len(split.valid_index) == 10 and len(split.train_index) == 30
    assert torch.equal(torch.cat([split.valid_index, split.train_index]).sort().values, torch.arange(40))


def test_split_follows_the_seed():
    assert Split.draw(LABELS, 10, seed=0).hash == Split.draw(LABELS, 10, seed=0).hash
    assert Split.draw(LABELS, 10, seed=0).hash != Split.draw(LABELS, 10, seed=1).hash


def test_the_images_held_out_are_drawn_by_the_seed_from_the_whole_set():
    """Labels in the order of class folders: the first images would be one class only. The numbers are frozen: runs know them."""
    by_class = torch.arange(40) // 4
    first, second = (Split.draw(by_class, 10, seed).valid_index.tolist() for seed in (0, 1))
    assert first == [1, 6, 11, 13, 17, 25, 28, 34, 36, 38]
    assert second == [2, 5, 12, 14, 21, 28, 30, 33, 38, 39]
    many = torch.arange(5000) // 500
    split = Split.draw(many, 500, seed=0)
    for index in (split.valid_index, split.train_index):
        assert set(many[index].tolist()) == set(range(10))
    assert torch.bincount(many[split.valid_index]).min() > 25


@pytest.mark.parametrize(("seed", "epoch", "order"), [(0, 0, [6, 11, 9, 8, 4, 1, 5, 0, 2, 3, 10, 7]),
                                                      (0, 1, [7, 5, 8, 6, 2, 10, 3, 4, 1, 11, 0, 9]),
                                                      (1, 0, [1, 6, 8, 11, 5, 3, 9, 0, 4, 7, 10, 2])])
def test_the_order_of_images_follows_from_seed_and_epoch(seed, epoch, order):
    """The numbers are frozen: a resumed run of an older version goes on with them."""
    assert plan_training(torch.arange(12), batch_size=5, seed=seed, epoch=epoch).index.tolist() == order


def test_hash_covers_size_labels_and_index():
    split = Split.draw(LABELS, 10, seed=0)
    others = [
        Split.draw(LABELS, 11, seed=0),
        Split(split.valid_index, 41, 0, split.labels_hash),
        Split(split.valid_index, 40, 0, "other"),
        Split(split.train_index, 40, 0, split.labels_hash),
    ]
    assert len({other.hash for other in [split, *others]}) == 5


def test_saved_split_comes_back_equal(tmp_path):
    split = Split.draw(LABELS, 10, seed=3)
    split.save(tmp_path / "split.pth")
    again = Split.load(tmp_path / "split.pth")
    assert again.hash == split.hash and again.seed == 3 and torch.equal(again.valid_index, split.valid_index)
    assert [file.name for file in tmp_path.iterdir()] == ["split.pth"]


def test_split_of_other_data_is_refused():
    split = Split.draw(LABELS, 10, seed=0)
    split.check(LABELS)
    with pytest.raises(UserError, match="40 training images, but the data folder has 41"):
        split.check(torch.arange(41))
    with pytest.raises(UserError, match="labels differ"):
        split.check(LABELS.flip(0))


@pytest.mark.parametrize("size", [0, -1, 40, 41])
def test_split_that_leaves_one_side_empty_is_refused(size):
    with pytest.raises(UserError, match="between 1 and 39"):
        Split.draw(LABELS, size, seed=0)


def test_damaged_split_files_are_refused(tmp_path):
    path = tmp_path / "split.pth"
    with pytest.raises(FileNotFoundError, match="split.pth"):
        Split.load(path)
    path.write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be read as a hold-out split"):
        Split.load(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="holds a list"):
        Split.load(path)
    saved = Split.draw(LABELS, 10, seed=0).to_dict()
    for change in (
        {"valid_index": saved["valid_index"].flip(0)},  # not sorted
        {"valid_index": saved["valid_index"] + 40},  # beyond the data
        {"valid_index": saved["valid_index"][:9]},  # another hash
        {"valid_index": None},
        {"valid_index": saved["valid_index"].to_sparse()},
        {"n_total": "many"},
        {"n_total": float("inf")},
        {"labels_hash": "\ud800"},
    ):
        with pytest.raises(UserError, match="damaged"):
            Split.from_dict(saved | change)
    with pytest.raises(UserError, match="damaged"):
        Split.from_dict({key: value for key, value in saved.items() if key != "labels_hash"})


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 200), st.integers(1, 17), st.integers(1, 5), st.integers(0, 3))
def test_ranks_share_every_global_batch_nearly_equally(n, batch_size, world, epoch):
    samples = torch.arange(n) * 3
    plans = [
        plan_training(samples, batch_size=batch_size, seed=7, epoch=epoch, rank=rank, world=world) for rank in range(world)
    ]
    whole = plan_training(samples, batch_size=batch_size * world, seed=7, epoch=epoch)
    seen = torch.cat([plan.index for plan in plans]).tolist()
    assert len(seen) == len(set(seen)) == n - plans[0].n_dropped
    last = n % (batch_size * world)
    assert plans[0].n_dropped == (last if last < world else 0)
    parts = [plan.index.split(plan.sizes) if plan.sizes else () for plan in plans]
    for step in range(len(plans[0].sizes)):
        sizes = [plan.sizes[step] for plan in plans]
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
        assert sum(plan.shares[step] for plan in plans) == pytest.approx(world)
        # the ranks' parts, one after the other, are the batch that a single process would see
        assert torch.equal(torch.cat([part[step] for part in parts]), whole.index.split(whole.sizes)[step])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 100), st.integers(1, 9), st.integers(1, 5))
def test_evaluation_shards_cover_each_image_once(n, batch_size, world):
    samples = torch.arange(n) + 5
    plans = [plan_evaluation(samples, batch_size=batch_size, rank=rank, world=world) for rank in range(world)]
    assert torch.equal(torch.cat([plan.index for plan in plans]).sort().values, samples)
    assert all(max(plan.sizes, default=0) <= batch_size and sum(plan.sizes) == len(plan.index) for plan in plans)


def test_a_part_of_a_pass_has_its_batches_as_they_are():
    plan = plan_training(torch.arange(50), batch_size=8, seed=0, epoch=2)
    rest, middle = plan.part(3), plan.part(1, 3)
    assert torch.equal(rest.index, plan.index[24:]) and rest.sizes == plan.sizes[3:] and rest.shares == plan.shares[3:]
    assert torch.equal(middle.index, plan.index[8:24]) and middle.sizes == plan.sizes[1:3] and middle.shares == plan.shares[1:3]
    assert len(plan.part(len(plan.sizes)).index) == 0 and len(plan.part(5, 100).index) == 10
    assert rest.n_dropped == plan.n_dropped and plan.part(0).sizes == plan.sizes


def test_the_size_of_a_global_batch_follows_from_one_part_and_its_weight():
    assert global_batch_size(2, 0.75, 3) == 8 and global_batch_size(5, 1.0, 1) == 5 and global_batch_size(1, 2 / 3, 2) == 3


def test_evaluation_weights_no_batch_and_takes_everything_by_default():
    plan = plan_evaluation(torch.arange(7), batch_size=3)
    assert (plan.index.tolist(), plan.sizes, plan.shares, plan.n_dropped) == (list(range(7)), [3, 3, 1], [1.0] * 3, 0)
    assert plan_evaluation(torch.arange(7), batch_size=3, rank=1, world=3).index.tolist() == [1, 4]


def test_an_index_is_a_rising_list_of_images_that_exist():
    def split(*index):
        return Split(torch.tensor(index, dtype=torch.int64), 40, 0, "hash")

    for index in ((0,), (39,), (0, 1, 39)):
        assert split(*index).valid_index.tolist() == list(index)
    for index in ((), (40,), (-1, 3), (1, 1, 2), (0, 2, 1, 3), (3, 40)):
        with pytest.raises(UserError, match="rising list"):
            split(*index)
    for wrong in (torch.tensor([[1]]), torch.tensor([1.0]), [1]):
        with pytest.raises(UserError, match="rising list"):
            Split(wrong, 40, 0, "hash")
    assert len(Split.draw(LABELS, 1, seed=0).valid_index) == 1 and len(Split.draw(LABELS, 39, seed=0).valid_index) == 39


def test_a_stored_order_of_all_images_holds_out_its_last_ones():
    labels, order = torch.tensor([0, 1, 1, 0, 2]), torch.tensor([4, 0, 3, 1, 2], dtype=torch.int32)
    split = Split.from_permutation(labels, order, 2)
    assert (split.valid_index.tolist(), split.seed, split.n_total) == ([1, 2], 0, 5)
    split.check(labels)
    assert Split.from_permutation(labels, order, 1).valid_index.tolist() == [2]
    assert Split.from_permutation(labels, order, 4).train_index.tolist() == [4]
    for wrong in (order.tolist(), order[None], order.float(), order[:4], torch.tensor([0, 0, 1, 2, 3])):
        with pytest.raises(UserError, match="index.pth"):
            Split.from_permutation(labels, wrong, 2)
    for size in (0, -1, 5, 6):
        with pytest.raises(UserError, match="between 1 and 4"):
            Split.from_permutation(labels, order, size)


def test_a_file_with_code_in_it_is_refused_and_a_missing_one_named(tmp_path):
    torch.save({**Split.draw(LABELS, 10, seed=0).to_dict(), "more": Split}, tmp_path / "split.pth")
    with pytest.raises(UserError, match="cannot be read as a hold-out split"):
        Split.load(tmp_path / "split.pth")
    with pytest.raises(FileNotFoundError, match="training with --use-valid or --images_per_class writes one"):
        Split.load(tmp_path / "none.pth")


def test_images_per_class_are_drawn_by_the_seed_from_those_not_held_out():
    """Labels in the order of class folders. The numbers are frozen: runs know them."""
    by_class = torch.arange(40) // 4
    split = Split.draw(by_class, 10, seed=0, images_per_class=1)
    assert torch.equal(split.valid_index, Split.draw(by_class, 10, seed=0).valid_index)
    assert split.train_index.tolist() == [0, 5, 10, 14, 19, 21, 27, 30, 35, 37]
    assert by_class[split.train_index].tolist() == list(range(10))
    assert Split.draw(by_class, 10, seed=0, images_per_class=1).hash == split.hash
    many = torch.arange(3000) % 3
    few, more, other = (Split.draw(many, 300, seed, n) for n, seed in ((20, 5), (50, 5), (20, 6)))
    assert torch.bincount(many[few.train_index]).tolist() == [20] * 3
    assert torch.bincount(many[more.train_index]).tolist() == [50] * 3
    assert set(few.train_index.tolist()) < set(more.train_index.tolist()) and not torch.equal(few.train_index, other.train_index)
    assert not torch.isin(more.train_index, more.valid_index).any()
    assert few.train_index.max() > 2000   # from the whole set


def test_images_per_class_without_a_hold_out():
    split = Split.draw(LABELS, 0, seed=0, images_per_class=3)
    assert len(split.valid_index) == 0 and torch.bincount(LABELS[split.train_index]).tolist() == [3] * 4
    with pytest.raises(UserError, match="between 1 and 39"):
        Split.draw(LABELS, 0, seed=0)


def test_a_class_with_too_few_images_is_named():
    labels = torch.tensor([0] * 5 + [2] * 3 + [7] * 4)
    assert len(Split.draw(labels, 0, seed=0, images_per_class=3).train_index) == 9
    with pytest.raises(UserError, match="class 2 has 3 images to train on, fewer than --images_per_class 4"):
        Split.draw(labels, 0, seed=0, images_per_class=4)
    with pytest.raises(UserError, match="class 7 has 0 images"):
        _draw_per_class(labels, torch.arange(8), 1, seed=0)   # those of class 7 are all held out
    with pytest.raises(UserError, match="class . has . images to train on, fewer than --images_per_class 3"):
        Split.draw(labels, 8, seed=0, images_per_class=3)


def test_a_split_with_chosen_images_comes_back_and_has_a_hash_of_its_own(tmp_path):
    whole, split = Split.draw(LABELS, 10, seed=3), Split.draw(LABELS, 10, seed=3, images_per_class=2)
    split.save(tmp_path / "split.pth")
    again = Split.load(tmp_path / "split.pth")
    assert again.hash == split.hash != whole.hash and torch.equal(again.train_index, split.train_index)
    assert split.holds_out_as(whole) and whole.holds_out_as(split) and not split.holds_out_as(None)
    assert not split.holds_out_as(Split.draw(LABELS, 10, seed=4, images_per_class=2))
    nothing = Split.draw(LABELS, 0, seed=3, images_per_class=2)
    assert not split.holds_out_as(nothing) and not nothing.holds_out_as(whole) and nothing.holds_out_as(nothing)
    with pytest.raises(UserError, match="both held out and trained on"):
        Split.from_dict(split.to_dict() | {"chosen": torch.cat([split.chosen, split.valid_index[:1]]).sort().values})
    with pytest.raises(UserError, match="not a rising list"):
        Split.from_dict(split.to_dict() | {"valid_index": split.valid_index.flip(0)})
    for change in (split.valid_index, split.chosen + 40, split.chosen.flip(0), split.chosen[:0], None, split.chosen[1:]):
        with pytest.raises(UserError, match="damaged"):
            Split.from_dict(split.to_dict() | {"chosen": change})


def test_hashes_are_those_of_published_checkpoints():
    split = Split(torch.tensor([1, 3]), 5, 7, hash_labels(torch.tensor([0, 1, 1, 0, 2])))
    assert split.labels_hash == "01419f6f6b885d26987cee9549f0689e0014a59831457076edfdd08d3666ea93"
    assert split.hash == "863c72f604b9d7b2d9f52ab9c00894e3edd8a0f6887d6e8b8e9c1be1a71991b8"
