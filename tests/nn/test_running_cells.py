"""The decoder's running cells: which tokens are predicted, and that the others cost and change nothing."""

import pytest
import torch

from mmssl.encoder import Encoder
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.video.frontend import Tubes
from mmssl.modalities.video.targets import TARGETS
from mmssl.nn.masking import running_cells, tube_mask
from mmssl.nn.positions import SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives.mae import MAE
from mmssl.types import Batch, Raw


def clips(lengths=(16, 16), height=14, width=14):
    data = torch.rand(len(lengths), 1, max(lengths), height, width, generator=torch.Generator().manual_seed(0))
    return Raw(data, torch.tensor(lengths), [str(i) for i in range(len(lengths))])


def tubes(dim=4):
    return Tubes(dim=dim, size=(2, 1, 1), channels=1, mean=[0.5], std=[0.5])


def mae(**settings):
    torch.manual_seed(0)
    frontend = tubes(16)
    encoder = Encoder(frontend, Transformer(dim=16, depth=1, heads=2), SinCos(16), prefix=1)
    sizes = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    values = TARGETS["pixels"].values
    return MAE(encoder, target=values, target_dim=frontend.feature_dim, mask="tube", **sizes, **settings)


def test_videomae_v2_predicts_704_of_1568_tokens():
    tokens = tubes()(clips())
    seeds = torch.tensor([3, 4])
    taken = running_cells(tokens, ratio=0.5, seeds=seeds)
    assert taken.sum(1).tolist() == [784, 784]
    hidden = tube_mask(tokens, ratio=0.9, seeds=seeds).masked
    # each of the 176 hidden places in half of its 8 steps
    assert (hidden & taken).sum(1).tolist() == [704, 704]


@pytest.mark.parametrize(("ratio", "kept"), [(0.25, 3), (0.5, 2), (0.75, 1)])
def test_a_cell_runs_through_its_places_in_turn(ratio, kept):
    tokens = tubes()(clips((16,), 4, 6))
    taken = running_cells(tokens, ratio=ratio, seeds=torch.tensor([5])).view(8, 2, 2, 3, 2)
    cells = taken.permute(0, 1, 3, 2, 4).reshape(8, 6, 4)  # step, cell, place row by row
    assert (cells == cells[:, :1]).all()
    assert (cells.sum(2) == kept).all()
    for step in range(7):
        assert torch.equal(cells[step + 1, 0], cells[step, 0].roll(1))


def test_clips_start_at_all_four_places():
    tokens = tubes()(clips((2,) * 400, 2, 2))
    starts = running_cells(tokens, ratio=0.75, seeds=torch.arange(400)).sum(0)
    # 100 each, within five standard errors
    assert starts.sum() == 400
    assert (starts - 100).abs().max() < 5 * (400 * 0.25 * 0.75) ** 0.5


def test_cells_of_a_clip_are_its_own_in_any_batch_and_hold_no_padding():
    together = running_cells(tubes()(clips((8, 4), 3, 5)), ratio=0.5, seeds=torch.tensor([7, 9]))
    alone = running_cells(tubes()(clips((4,), 3, 5)), ratio=0.5, seeds=torch.tensor([9]))
    assert torch.equal(together[1, :30], alone[0])
    assert not together[1, 30:].any()


def test_a_ratio_that_no_cell_can_have_is_refused():
    with pytest.raises(ValueError, match=r"objective.decoder_mask_ratio=0.6: .* choose 0.25, 0.5 or 0.75"):
        running_cells(tubes()(clips()), ratio=0.6, seeds=torch.arange(2))


def test_pictures_have_no_running_cells():
    tokens = Patches(dim=4, size=[2, 2])(Raw(torch.rand(1, 3, 4, 4), torch.ones(1, dtype=torch.int64), ["a"]))
    with pytest.raises(ValueError, match="these tokens lie on h, w; leave it out"):
        running_cells(tokens, ratio=0.5, seeds=torch.arange(1))


def test_a_decoder_mask_that_does_not_exist_is_answered_with_those_that_do():
    with pytest.raises(ValueError, match="objective.decoder_mask='cells': choose running_cells, or leave it out"):
        mae(decoder_mask="cells")


@pytest.mark.parametrize("lengths", [(8, 8), (8, 4, 6)])
def test_a_token_left_out_is_as_if_it_were_not_there(lengths):
    """What is predicted equals a decoder over the same tokens of each clip, laid out by hand."""
    model = mae(mask_ratio=0.75, decoder_mask="running_cells")
    raw = clips(lengths, 4, 4)
    tokens, seeds = model.encoder.tokens(raw), torch.arange(len(lengths))
    plan = tube_mask(tokens, ratio=0.75, seeds=seeds)
    predicted = plan.masked & running_cells(tokens, ratio=0.5, seeds=seeds)
    encoded = model.encoder(tokens, plan, "drop")
    found = model.predictor(encoded, tokens, plan, predicted=predicted).split(predicted.sum(1).tolist())
    decoder = model.predictor
    places = SinCos(16)(tokens.x, tokens)
    for row in range(len(lengths)):
        order = torch.cat([(tokens.valid[row] & ~plan.masked[row]).nonzero()[:, 0], predicted[row].nonzero()[:, 0]])
        kept = int(plan.keep_lengths[row])
        seen = decoder.embed(encoded.x[row, : 1 + kept])
        unseen = decoder.mask_vector.expand(len(order) - kept, -1)
        added = torch.cat([torch.zeros(1, 16), places[0, order]])
        h, _ = decoder.transformer((torch.cat([seen, unseen]) + added)[None])
        torch.testing.assert_close(found[row], decoder.out(h[0, 1 + kept :]), rtol=1e-5, atol=1e-5)


def test_the_decoder_works_on_no_token_that_is_not_predicted():
    model = mae(mask_ratio=0.9, decoder_mask="running_cells")
    sizes = []
    model.predictor.transformer.register_forward_pre_hook(lambda part, args: sizes.append(args[0].shape[1]))
    loss = model(Batch({"video": clips()}, torch.tensor([3, 4])))
    # the class token, 160 visible tokens and 704 to be predicted
    assert sizes == [1 + 160 + 704]
    assert loss.count == 2 * 704


def test_the_loss_is_that_of_the_predicted_tokens():
    model = mae(mask_ratio=0.75, decoder_mask="running_cells")
    torch.nn.init.zeros_(model.predictor.out.weight)
    torch.nn.init.constant_(model.predictor.out.bias, 0.25)
    raw, seeds = clips((16, 8), 4, 4), torch.tensor([1, 2])
    tokens = model.encoder.tokens(raw)
    predicted = tube_mask(tokens, ratio=0.75, seeds=seeds).masked & running_cells(tokens, ratio=0.5, seeds=seeds)
    loss = model(Batch({"video": raw}, seeds))
    assert loss.count == int(predicted.sum()) == 12 * 8 // 2 + 12 * 4 // 2
    torch.testing.assert_close(loss.total, (tokens.feat[predicted] - 0.25).square().mean(1).sum())


def test_gradients_reach_every_weight_behind_a_decoder_mask():
    model = mae(mask_ratio=0.75, decoder_mask="running_cells")
    model(Batch({"video": clips((8, 4), 4, 4)}, torch.tensor([1, 2]))).total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
