import torch

from mmssl.nn.ctc import best_path, frames_needed


def test_frames_needed_are_the_characters_and_a_blank_between_two_alike() -> None:
    labels = torch.tensor([[1, 1, 2, 2, 3], [1, 2, 1, 2, 1], [4, 4, 4, 9, 9], [0, 0, 0, 0, 0]])
    assert frames_needed(labels, torch.tensor([5, 5, 3, 0])).tolist() == [7, 5, 5, 0]
    assert frames_needed(torch.zeros(2, 0, dtype=torch.int64), torch.tensor([0, 0])).tolist() == [0, 0]


def test_the_best_path_merges_repeats_then_drops_blanks() -> None:
    paths = torch.tensor([[1, 1, 0, 1, 2, 2, 0], [0, 0, 3, 3, 0, 3, 3], [0, 0, 0, 0, 0, 0, 0]])
    scores = torch.nn.functional.one_hot(paths, 4).float()
    assert best_path(scores, torch.tensor([7, 7, 7])) == [[1, 1, 2], [3, 3], []]


def test_the_best_path_does_not_read_padding() -> None:
    scores = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3, 3]]), 4).float()
    assert best_path(scores, torch.tensor([2])) == [[1, 2]]
