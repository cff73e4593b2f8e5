"""It learns: a small UNETR segments the gray matter of held-out slices."""

import torch
from compare_training import HELD_OUT, TRAIN, build_unetr, evaluate, load_slices, train


def test_held_out_slices_are_separated_from_training_slices():
    assert min(abs(held_out - trained) for held_out in HELD_OUT for trained in TRAIN) > 2  # two are left out between
    assert load_slices("t1").shape == load_slices("gm").shape == (48, 1, 112, 96)
    assert (
        load_slices("gm").unique().tolist() == [0, 1] and load_slices("t1").min() >= 0 and load_slices("t1").max() <= 1
    )


def test_unetr_learns_gray_matter():
    torch.manual_seed(0)
    model = build_unetr()
    untrained = evaluate(model)
    train(model, steps=150, seed=0)
    trained = evaluate(model)
    print(f"\nDice on held-out slices: {trained:.4f}, untrained {untrained:.4f}")
    assert trained >= 0.85 > 0.6 > untrained
