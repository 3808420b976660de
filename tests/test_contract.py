"""What every modality and every objective must keep, found by looking at the registries.

A new modality or frontend adds one row to CLIPS, a new objective one to SETTINGS; a pair that makes no sense has its
sentence in REFUSED.
"""

import inspect
from dataclasses import replace
from itertools import product

import pytest
import torch

from mmssl import matrix
from mmssl.encoder import Encoder
from mmssl.modalities import MODALITIES
from mmssl.modalities.text.tokenizer import byte_bpe
from mmssl.nn.masking import random_mask, span_mask
from mmssl.nn.positions import Convolutional, NoPositions, SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives import CONTRASTING, OBJECTIVES, SEVERAL
from mmssl.resolve import refuse
from mmssl.types import Batch, Raw, Units

DIM = 16
LENGTHS = [1600, 900, 1210, 640]


def speech(lengths=LENGTHS, fill=0.0):
    time = torch.arange(max(lengths)) / 8000
    waves = []
    for row, n in enumerate(lengths):
        wave = torch.sin(2 * torch.pi * (200 + 90 * row) * time * (1 + 2 * time)) + 0.1 * torch.randn(len(time))
        waves.append(torch.where(torch.arange(len(time)) < n, wave, fill))
    return Raw(torch.stack(waves), torch.tensor(lengths), [f"s{i}" for i in range(len(lengths))], 8000.0)


def codes(lengths=(20, 12, 15, 8), fill=0):
    """Of two codebooks, with 5 and 3 codes; runs of two steps."""
    steps = torch.arange(max(lengths)) // 2
    rows = [torch.stack([(3 * row + steps) % 5, (row + 2 * steps) % 3]) for row in range(len(lengths))]
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None, None]
    data = torch.where(real, torch.stack(rows), fill or 0)
    return Raw(data, torch.tensor(lengths), [f"c{i}" for i in range(len(lengths))], 50.0)


def image(lengths=(1, 1, 1, 1)):
    return Raw(torch.rand(len(lengths), 3, 16, 24), torch.tensor(lengths), [f"i{i}" for i in range(len(lengths))])


def video(lengths=(8, 4, 7, 5), fill=0.0):
    clips = torch.rand(len(lengths), 3, max(lengths), 8, 12)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    clips = torch.where(real[:, None, :, None, None], clips, fill)
    return Raw(clips, torch.tensor(lengths), [f"v{i}" for i in range(len(lengths))], 5.0)


def text(lengths=(9, 4, 7, 5), fill=0):
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(2, 256, real.shape)
    garbage = 2**40 if fill == torch.inf else int(fill)
    return Raw(torch.where(real, ids, garbage), torch.tensor(lengths), [f"t{i}" for i in range(len(lengths))])


def over_time(data):
    """(B, T, ...), of clips that have a time."""
    return data.transpose(1, 2) if data.ndim in (3, 5) else data


def cut(raw, row):
    """A clip of a batch without its padding."""
    rows = slice(row, row + 1)
    data = raw.data[rows] if raw.data.ndim == 4 else over_time(over_time(raw.data)[rows, : raw.lengths[row]])
    return Raw(data, raw.lengths[rows], raw.ids[rows], raw.rate)


# modality/frontend -> (its clips, settings of the frontend, positions)
CLIPS = {
    "speech/waveform": (
        speech,
        {"layers": [[8, 10, 5], [8, 4, 4], [8, 2, 2]], "rate": 8000},
        lambda: Convolutional(DIM, kernel=8, groups=4),
    ),
    "speech/logmel": (
        speech,
        {"bands": 8, "window_ms": 10, "hop_ms": 2.5, "rate": 8000},
        lambda: Convolutional(DIM, kernel=8, groups=4),
    ),
    "audio/spectrogram": (
        speech,
        {"bands": 12, "size": [4, 4], "window_ms": 10, "hop_ms": 2.5, "rate": 8000},
        lambda: SinCos(DIM),
    ),
    "codes/codes": (codes, {"codes": [5, 3], "rate": 50}, lambda: Convolutional(DIM, kernel=8, groups=4)),
    "image/patches": (image, {"size": [4, 4]}, lambda: SinCos(DIM)),
    "video/tubes": (video, {"size": [2, 4, 4], "rate": 5}, lambda: SinCos(DIM)),
    "text/tokens": (text, {"tokenizer": byte_bpe([""], entries=258)}, lambda: SinCos(DIM)),
}
SOURCES = [f"{name}/{frontend}" for name, modality in MODALITIES.items() for frontend in modality.frontends]
SETTINGS = {
    "wav2vec2": {"negatives": 5, "codes": 8, "dim": 8, "mask_prob": 0.4, "mask_span": 2, "feature_penalty": 0.1},
    "hubert": {
        "units": {"units": 5},
        "dim": 8,
        "mask_prob": 0.4,
        "mask_span": 2,
        "feature_penalty": 0.1,
        "regression": 0.1,
    },
    "best_rq": {"codes": 8, "code_dim": 4, "mask_span": 2},
    "bert": {"mask_prob": 0.4, "mask_span": 2},
    "mae": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
    "cae": {
        "mask": "blocks",
        "mask_size": 2,
        "regressor_depth": 2,
        "regressor_heads": 2,
        "decoder_depth": 1,
        "decoder_heads": 2,
    },
    "encodec_mae": {
        "units": {"units": 5},
        "mask_size": 2,
        "decoder_dim": 16,
        "decoder_depth": 1,
        "decoder_heads": 2,
    },
    "jepa": {
        "blocks": [[2, 0.2, 0.3], [1, 0.5, 0.5]],
        "predictor_dim": 16,
        "predictor_depth": 1,
        "predictor_heads": 2,
        "ema_updates": 100,
    },
    "data2vec": {"mask_size": 2, "top_k": 2},
    "data2vec2": {
        "mask_ratio": 0.6,
        "mask_size": 2,
        "clones": 3,
        "decoder_dim": 8,
        "decoder_depth": 2,
        "decoder_groups": 2,
        "utterance_weight": 1.0,
        "top_k": 2,
    },
    "ctc": {
        "n_characters": 5,
        "freeze_updates": 0,
        "freeze_frontend": False,
        "mask_prob": 0.2,
        "mask_span": 2,
        "channel_mask_span": 4,
    },
    "classify": {"n_classes": 3},
    "tera": {"time_prob": 0.3, "time_span": 3, "noise_prob": 0.5},
    "apc": {"ahead": 1},
    "cpc": {"steps": 1, "negatives": 5},
    "wav2vec": {"steps": 1, "negatives": 5},
    "npc": {"kernel": 9, "context_dim": 8},
    "mp3": {"positions": 64},
    "vq_wav2vec": {"steps": 1, "negatives": 5, "codes": 8},
    "siam_mae": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
    "vic_mae": {"weight": 0.5, "hidden_dim": 16, "dim": 8, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
    "cross_video_mae": {"hidden_dim": 16, "dim": 8, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
    "denoise": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
    "dbot": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
}
# what an objective asks of the Transformer; positions are then functions of coordinates alone, or none
BODIES = {name: {"causal": True} for name in ("apc", "cpc", "wav2vec", "vq_wav2vec")}
BODIES |= {"npc": {"window": 1}, "mp3": {}}
TARGET = {
    "speech": "log_mel",
    "audio": "normalized_spectrogram",
    "codes": "features",
    "image": "normalized_pixels",
    "video": "normalized_pixels",
}
REFUSED = {
    ("ctc", "audio/spectrogram"): "CTC spells along time",
    ("ctc", "image/patches"): "CTC spells along time",
    ("ctc", "video/tubes"): "CTC spells along time",
    ("tera", "speech/waveform"): "choose frontend logmel",
    ("tera", "audio/spectrogram"): "choose frontend logmel",
    ("tera", "image/patches"): "choose frontend logmel",
    ("tera", "video/tubes"): "choose frontend logmel",
    ("npc", "audio/spectrogram"): "NPC predicts a frame from those around it in time",
    ("npc", "image/patches"): "NPC predicts a frame from those around it in time",
    ("npc", "video/tubes"): "NPC predicts a frame from those around it in time",
    ("siam_mae", "speech/waveform"): "there are none for Waveform",
    ("siam_mae", "speech/logmel"): "there are none for LogMel",
    ("siam_mae", "codes/codes"): "there are none for Codes",
    ("vic_mae", "speech/waveform"): "there are none for Waveform",
    ("vic_mae", "speech/logmel"): "there are none for LogMel",
    ("vic_mae", "codes/codes"): "there are none for Codes",
    ("cross_video_mae", "speech/waveform"): "one step of it in time, but the tokens of Waveform lie on t",
    ("cross_video_mae", "speech/logmel"): "but the tokens of LogMel lie on t",
    ("cross_video_mae", "codes/codes"): "but the tokens of Codes lie on t",
    ("cross_video_mae", "image/patches"): "but the tokens of Patches lie on h, w",
    ("tera", "codes/codes"): "choose frontend logmel",
    **{
        (name, "codes/codes"): "Codes learns what it measures"
        for name in ("mae", "cae", "apc", "npc", "denoise", "best_rq")
    },
    **{("bert", source): "BERT predicts the codes that it reads" for source in CLIPS if source != "codes/codes"},
    **{(name, "text/tokens"): f"{name} is not for text: it" for name in MODALITIES["text"].refuses},
}


def encoder(source, transformer=None, **settings):
    torch.manual_seed(0)
    _, frontend, positions = CLIPS[source]
    modality, name = source.split("/")
    kind = MODALITIES[modality].frontends[name]
    body = Transformer(dim=DIM, depth=2, heads=2, **(transformer or {}))
    added = positions() if transformer is None else SinCos(DIM) if transformer else NoPositions(DIM)
    return Encoder(kind(dim=DIM, **frontend), body, added, mask_token=True, **settings)


def objective(name, source):
    modality = source.split("/")[0]
    refuse(MODALITIES[modality], name)
    body, settings = encoder(source, BODIES.get(name), prefix=2), dict(SETTINGS[name])
    if "views" in inspect.signature(OBJECTIVES[name]).parameters:
        settings["views"] = next(iter(MODALITIES[modality].views.values()), None)
    if name == "dbot":
        settings["teacher_encoder"] = encoder(source, prefix=1)
    if "target" in inspect.signature(OBJECTIVES[name]).parameters:
        target = MODALITIES[modality].targets[TARGET[modality]]
        settings |= {"target": target.values, "target_dim": target.dim(body.frontend)}
        learned = target.learned and body.frontend.learned
        settings |= {"target_learned": learned}
        if name == "hubert" and learned:  # it can do without
            settings |= {"regression": 0.0, "target": None, "target_learned": False}
        # as Audio-MAE has it: a block with windows, and one with shifted ones
        if name == "mae" and modality == "audio":
            settings |= {"decoder_window": [2, 2], "decoder_depth": 2}
    return OBJECTIVES[name](body, **settings)


def units(name, source, raw):
    """For what predicts them: each clip's own, by its id, one a step in time or, without a time, for each token."""
    if name not in ("hubert", "encodec_mae"):
        return {}
    tokens = encoder(source).tokens(raw)
    timed = tokens.step_ms is not None
    steps = tokens.lengths // (torch.tensor(tokens.grid[1:]).prod().int() if timed else 1)
    values = torch.stack([(3 * int(id[1:]) + torch.arange(int(steps.max())) // 2) % 5 for id in raw.ids])
    rate = 1000 / tokens.step_ms if timed else None
    return {"units": Units(values[..., None], steps, rate, torch.zeros(len(raw), dtype=torch.float64))}


def batch(name, source, raw=None, seed=0):
    torch.manual_seed(seed)
    raw = raw or CLIPS[source][0]()
    labels = sizes = None
    if OBJECTIVES[name].label == "label":
        labels = torch.arange(len(raw)) % 3
    if OBJECTIVES[name].label == "text":
        labels = torch.tensor([[1, 2, 3], [2, 4, 0], [3, 3, 1], [1, 0, 0]])
        sizes = torch.tensor([3, 2, 3, 1])
    seeds = torch.arange(len(raw)) + 10
    return Batch({source.split("/")[0]: raw}, seeds, labels, sizes, units(name, source, raw))


PAIRS = [pair for pair in product(SETTINGS, SOURCES) if pair not in REFUSED]
# what has no time has no padding
TIMED = [source for source in SOURCES if "t" in MODALITIES[source.split("/")[0]].frontends[source.split("/")[1]].axes]
each_source = pytest.mark.parametrize("source", SOURCES)
each_timed_source = pytest.mark.parametrize("source", TIMED)
each_clocked_source = pytest.mark.parametrize("source", [source for source in TIMED if CLIPS[source][0]().rate])
each_pair = pytest.mark.parametrize(("name", "source"), PAIRS)


def test_every_frontend_and_objective_is_here():
    assert set(CLIPS) == set(SOURCES)
    # those of several modalities have theirs in their own tests
    assert {*SETTINGS, *SEVERAL} == set(OBJECTIVES)


@pytest.mark.parametrize(("name", "source"), REFUSED)
def test_a_pair_that_makes_no_sense_says_so(name, source):
    with pytest.raises(ValueError, match=REFUSED[name, source]):
        objective(name, source)


@each_source
@pytest.mark.parametrize("name", SETTINGS)
def test_a_pair_is_refused_here_where_the_matrix_refuses_it(name, source):
    sentence = matrix.refusal(name, source)
    assert (sentence is None) == ((name, source) not in REFUSED), sentence
    assert sentence is None or REFUSED[name, source] in sentence


# 1, 2 and 4: a clip is itself, whatever stands beside it and whatever padding holds


@each_source
@pytest.mark.parametrize("prefix", [0, 2])
def test_a_clip_alone_equals_the_same_clip_in_a_ragged_batch(source, prefix):
    body, raw = encoder(source, prefix=prefix).eval(), CLIPS[source][0]()
    together = body(body.tokens(raw), layers=[0, 1, 2])
    for row in range(len(raw)):
        alone = body(body.tokens(cut(raw, row)), layers=[0, 1, 2])
        size = int(alone.lengths[0])
        assert together.lengths[row] == size
        assert torch.allclose(together.x[row, :size], alone.x[0], atol=1e-5)
        for i in range(3):
            assert torch.allclose(together.layers[i][row, :size], alone.layers[i][0], atol=1e-5)


@pytest.mark.parametrize(("name", "source"), [pair for pair in PAIRS if pair[1] in TIMED])
@pytest.mark.parametrize("fill", [3.0, torch.inf])
def test_what_padding_holds_changes_neither_loss_nor_gradient(name, source, fill):
    losses, gradients, modality = [], [], source.split("/")[0]
    for padding in (0.0, fill):
        torch.manual_seed(1)
        raw = CLIPS[source][0](fill=padding)
        model = objective(name, source)
        loss = model(batch(name, source, raw))
        loss.total.backward()
        losses.append(loss.total.detach())
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        steps = over_time(raw.data)
        padded = torch.arange(steps.shape[1]) >= raw.lengths[:, None]
        assert padded.any()
        assert (steps[padded] == (2**40 if modality == "text" and padding == torch.inf else padding)).all()
    assert torch.equal(losses[0], losses[1])
    assert losses[0].isfinite()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@each_pair
def test_permuting_the_batch_permutes_the_result(name, source):
    model = objective(name, source).eval()
    first = batch(name, source)
    order = torch.tensor([2, 0, 3, 1])
    raw = first.raw
    moved = Raw(raw.data[order], raw.lengths[order], [raw.ids[i] for i in order], raw.rate)
    second = Batch(
        {source: moved},
        seeds=first.seeds[order],
        labels=None if first.labels is None else first.labels[order],
        label_lengths=None if first.label_lengths is None else first.label_lengths[order],
        units=units(name, source, moved),
    )
    one, two = model(first), model(second)
    assert one.count == two.count
    assert torch.allclose(one.total, two.total, rtol=1e-5)


# 3: lengths


@each_source
def test_lengths_are_the_valid_tokens(source):
    body = encoder(source)
    raw = CLIPS[source][0]()
    tokens = body.tokens(raw)
    assert torch.equal(body.frontend.lengths(raw), tokens.valid.sum(1))
    assert not tokens.x[~tokens.valid].any()
    assert tokens.coords.shape == (*tokens.x.shape[:2], len(tokens.axes))
    assert torch.tensor(tokens.grid).prod() == tokens.x.shape[1]
    # row-major, the last axis fastest
    assert torch.equal(tokens.coords[0, -1], torch.tensor(tokens.grid) - 1)
    assert torch.equal(tokens.coords[0, 1] - tokens.coords[0, 0], torch.tensor([0] * (len(tokens.axes) - 1) + [1]))


@each_timed_source
def test_lengths_are_what_a_clip_without_padding_gives(source):
    frontend, clips = encoder(source).frontend, CLIPS[source][0]
    shortest = frontend.min_length
    several = torch.randint(shortest, 8 * shortest, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    several[:2] = shortest, shortest + 1
    said = frontend.lengths(clips(several)).tolist()
    assert frontend(clips([shortest])).grid[0] == 1
    for n, tokens in zip(several, said, strict=True):
        assert frontend(clips([n])).x.shape[1] == tokens


@each_clocked_source
def test_a_token_sees_the_time_that_it_names_and_no_other(source):
    clips, settings, _ = CLIPS[source]
    modality, name = source.split("/")
    kind = MODALITIES[modality].frontends[name]
    if "normalize" in inspect.signature(kind).parameters:  # over the clip, which takes every sample
        settings = {**settings, "normalize": False}
    frontend = kind(dim=DIM, **settings)
    raw = clips([8 * frontend.min_length])
    tokens = frontend(raw)
    step = tokens.grid[0] // 2
    begin = round(step * tokens.step_ms * raw.rate / 1000)
    end = begin + round(tokens.span_ms * raw.rate / 1000)
    for unit, seen in ((begin - 1, False), (begin, True), (end - 1, True), (end, False)):
        data = raw.data.clone()
        spoilt = over_time(data)
        spoilt[:, unit] = torch.nan if data.is_floating_point() else (spoilt[:, unit] == 0).long()
        x = frontend(replace(raw, data=data)).x
        lost = (x.isnan() if data.is_floating_point() else x != tokens.x)[tokens.coords[..., 0] == step]
        assert lost.all() if seen else not lost.any()


@each_timed_source
def test_a_clip_shorter_than_one_token_is_refused(source):
    frontend = encoder(source).frontend
    raw = CLIPS[source][0]([frontend.min_length + 5, frontend.min_length - 1])
    with pytest.raises(ValueError, match=raw.ids[1]):
        frontend(raw)


# 5: masks


@each_source
def test_plans_hide_real_tokens_only_and_leave_one(source):
    body = encoder(source)
    tokens = body.tokens(CLIPS[source][0]())
    seeds = torch.arange(len(tokens.x))
    for plan in (
        random_mask(tokens.lengths, ratio=0.75, seeds=seeds, clones=3),
        span_mask(tokens.lengths, prob=0.65, span=3, seeds=seeds, clones=3),
    ):
        assert not (plan.masked & ~tokens.valid[plan.rows]).any()
        assert torch.equal(plan.masked.sum(1) + plan.keep_lengths, tokens.lengths[plan.rows])
        assert (plan.keep_lengths > 0).all()
        assert plan.masked.any(1).all()


@each_source
@pytest.mark.parametrize("hide", ["none", "drop", "replace", "unseen"])
def test_tokens_are_the_same_whether_they_are_projected_before_the_mask_or_after_it(source, hide):
    body = encoder(source, prefix=1)
    raw = CLIPS[source][0]()
    found = []
    for late in (False, True):
        body.zero_grad()
        tokens = body.tokens(raw, late=late)
        assert (tokens.project is not None) == (late and body.frontend.late)
        plan = random_mask(tokens.lengths, ratio=0.5, seeds=torch.arange(len(raw)))
        encoded = body(tokens, None if hide == "none" else plan, hide, layers=[0, 2])
        encoded.x.square().sum().backward()
        gradients = [p.grad for p in body.parameters() if p.grad is not None]
        found.append([encoded.x, *encoded.layers.values(), *gradients])
    for early, late in zip(*found, strict=True):
        assert torch.allclose(early, late, rtol=1e-4, atol=1e-5 * early.detach().abs().max().item())


# 7: gradients arrive, and 20 steps lower the loss


@each_pair
def test_gradients_reach_every_part(name, source):
    model = objective(name, source)
    model(batch(name, source)).total.backward()
    learning = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    missing = [key for key, p in learning if p.grad is None or not p.grad.any()]
    teachers = [p for key, p in model.named_parameters() if key.startswith("teacher.")]
    assert not any(p.requires_grad for p in teachers)
    assert all(p.grad is None for p in teachers)
    # the mask token has no part in objectives that drop tokens or hide none
    assert missing == ([] if model.hide == "replace" else ["encoder.mask_token"])


@each_pair
def test_a_batch_with_nothing_to_learn_from_leaves_out_no_more_than_is_said(name, source):
    """Clips of one step, and of one patch: most objectives then find nothing to predict, or nothing to tell it from."""
    model = objective(name, source)
    two = name in ("siam_mae", "vic_mae") and source in ("video/tubes", "audio/spectrogram")
    steps = 2 if two else 1  # the one that is seen, and the one that is asked
    raw = CLIPS[source][0]([steps * model.encoder.frontend.min_length] * 4)
    if raw.data.ndim > 2:
        raw = replace(raw, data=raw.data[..., :4, :4])
    model(batch(name, source, raw)).total.backward()
    unreached = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unreached == ([] if model.hide == "replace" else ["encoder.mask_token"])
    assert model.skips_parameters == bool(unreached)


@each_pair
def test_twenty_steps_lower_the_loss(name, source):
    model = objective(name, source)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    toy = batch(name, source)
    values = []
    for step in range(1, 21):
        loss = model(toy)
        mean = loss.total / loss.count
        optimizer.zero_grad()
        mean.backward()
        optimizer.step()
        model.after_step(step)
        values.append(mean.item())
    assert sum(values[-3:]) < sum(values[:3])


# 9: micro-batches


@pytest.mark.parametrize(("name", "source"), [pair for pair in PAIRS if pair[0] not in CONTRASTING])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(name, source):
    def gradient(batches):
        model = objective(name, source)
        if hasattr(model, "statistics"):
            model.global_statistics = sum(model.statistics(part) for part in batches)
        losses = [model(part) for part in batches]
        for loss in losses:
            loss.total.backward()
        count = sum(loss.count for loss in losses)
        return torch.cat([p.grad.flatten() / count for p in model.parameters() if p.grad is not None])

    whole = batch(name, source)
    parts = []
    for row in range(len(whole)):
        rows = slice(row, row + 1)
        parts.append(
            Batch(
                {source: cut(whole.raw, row)},
                seeds=whole.seeds[rows],
                labels=None if whole.labels is None else whole.labels[rows],
                label_lengths=None if whole.label_lengths is None else whole.label_lengths[rows],
                units=units(name, source, cut(whole.raw, row)),
            )
        )
    one, many = gradient([whole]), gradient(parts)
    assert torch.cosine_similarity(one, many, dim=0) > 0.99999
    assert torch.allclose(one.norm(), many.norm(), rtol=1e-4)
