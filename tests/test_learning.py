"""It learns: a small UNETR finds the grey matter of slices that it has not seen."""

import torch
from compare_training import TRAINING, UNSEEN, here, score, slices, train


def test_unseen_slices_are_apart_from_those_trained_on():
    assert min(abs(unseen - trained) for unseen in UNSEEN for trained in TRAINING) > 2  # two between are left out
    assert slices("t1").shape == slices("gm").shape == (48, 1, 112, 96)
    assert slices("gm").unique().tolist() == [0, 1] and slices("t1").min() >= 0 and slices("t1").max() <= 1


def test_unetr_learns_grey_matter():
    torch.manual_seed(0)
    model = here()
    untrained = score(model)
    train(model, steps=150, seed=0)
    print(f"\nDice on unseen slices: {score(model):.4f}, untrained {untrained:.4f}")
    assert score(model) >= 0.85 > 0.6 > untrained
