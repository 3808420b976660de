"""The table of tokens: an id is its row of the table, at its place, and nothing else."""

import pytest
import torch

from mmssl.modalities.text.frontend import TokenTable
from mmssl.modalities.text.tokenizer import byte_bpe
from mmssl.types import Raw


@pytest.fixture(scope="module")
def frontend() -> TokenTable:
    return TokenTable(dim=6, tokenizer=byte_bpe(["a red heart"], entries=260), context=8)


def raw(rows):
    lengths = torch.tensor([len(row) for row in rows])
    data = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return Raw(data, lengths, [f"caption {i}" for i in range(len(rows))])


def test_a_token_is_its_row_of_the_table_and_padding_is_zero(frontend):
    tokens = frontend(raw([[0, 5, 7, 1], [0, 259, 1]]))
    assert torch.equal(tokens.x[0], frontend.table.weight[[0, 5, 7, 1]])
    assert torch.equal(tokens.x[1, :3], frontend.table.weight[[0, 259, 1]])
    assert not tokens.x[1, 3].any()
    assert tokens.coords[1, :, 0].tolist() == [0, 1, 2, 3]
    assert tokens.lengths.tolist() == [4, 3]


def test_another_id_changes_its_own_token_alone(frontend):
    one, other = (frontend(raw([[0, id, 7, 1]])).x[0] for id in (5, 6))
    assert (one != other).any(1).tolist() == [False, True, False, False]


def test_a_caption_without_tokens_is_refused_by_its_name(frontend):
    empty = raw([[0, 1], [0, 1]])
    empty.lengths[1] = 0
    with pytest.raises(ValueError, match="caption 1: the caption has no token"):
        frontend(empty)
