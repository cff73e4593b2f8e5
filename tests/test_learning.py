"""It learns: a small UNETR predicts the gray matter mask of held-out slices."""

import torch
from compare_training import CONFIG, HELD_OUT, TRAIN, evaluate, load_slices, train
from conftest import unetr


def test_held_out_slices_are_separated_from_training_slices():
    distances = [abs(held_out - trained) for held_out in HELD_OUT for trained in TRAIN]
    assert min(distances) > 2  # at least two slices between them

    images, masks = load_slices("t1"), load_slices("gm")
    assert images.shape == masks.shape == (48, 1, 112, 96)
    assert images.min() >= 0 and images.max() <= 1
    assert masks.unique().tolist() == [0, 1]


def test_unetr_learns_gray_matter():
    torch.manual_seed(0)
    model = unetr.UNETR(CONFIG)
    untrained = evaluate(model)
    train(model, steps=150, seed=0)
    trained = evaluate(model)
    print(f"\nDice on held-out slices: {trained:.4f}, untrained {untrained:.4f}")
    assert untrained < 0.6
    assert trained >= 0.85
