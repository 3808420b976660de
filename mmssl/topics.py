"""What `mmssl topics` does: a topic for each clip, from the counts of its units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmssl.data.manifest import Manifest, write_manifest
from mmssl.data.units import read_units
from mmssl.progress import bar
from mmssl.units import Written, keep, open_all, read_kept, scattered

PASSES = 10  # over the first manifest
_TOGETHER = 200  # clips counted at a time
_WORDS = 2**20  # most kinds of n-grams: the topics' tables are held in memory


def write_topics(
    manifests: Sequence[str | Path | Manifest],
    out: str | Path,
    *,
    topics: int,
    codes: int,
    of: str = "units",
    key: str = "topic",
    ngram: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> list[Written]:
    """Find topics of clips by how often each unit stands in them, and write each clip's into its row.

    Source: Maekaku et al. 2023, HuBERTopic (arXiv:2310.03975): a topic model over the units of each utterance; latent
    Dirichlet allocation by Hoffman et al. 2010, "Online learning for latent Dirichlet allocation", as in scikit-learn.
    A clip's topic is the one with the greatest share.
    Differs from the paper: a unit that goes on counts once.

    Clips are read some at a time and forgotten. The folder gets `topics.safetensors` and `topics.json`, and for each
    manifest one of the same name. Where the folder holds topics already, nothing is fitted.

    Args:
        manifests: whose rows have units; topics are fitted on the first, and all get theirs.
        out: the folder.
        topics: how many.
        codes: how many units there are.
        of: key of the rows at which their units stand, one at each step.
        key: of the rows, for their topics.
        ngram: units in a row that are counted together.
        seed: of the topics' first values.
        progress: show bars.

    Raises:
        ValueError: settings that do not go together, a folder with other topics, or a row without such units.
    """
    opened = open_all(manifests, out)
    if topics < 2 or codes < 2:
        raise ValueError(f"topics={topics}, codes={codes}: a choice takes two of each")
    if ngram < 1 or codes**ngram > _WORDS:
        raise ValueError(
            f"ngram={ngram}: {codes} units have {codes**ngram:,} runs of that length; from 1 on, up to {_WORDS:,} are "
            "counted"
        )
    if of == key:
        raise ValueError(f"key={key}: the topics would take the place of the units there; give another key")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    said = {"topics": topics, "codes": codes, "of": of, "ngram": ngram}
    kept = read_kept(folder, "topics", said)
    if kept is None:
        kept = {"words": _fit(opened[0], topics, codes, of, ngram, seed, progress)}
        keep(folder, "topics", said, kept)
    model = _model(kept["words"].numpy())
    found = []
    for manifest in opened:
        uses = np.zeros(topics, np.int64)

        def rows(manifest: Manifest = manifest, uses: np.ndarray = uses) -> Iterator[dict[str, Any]]:
            with bar(manifest.path.name, len(manifest), shown=progress) as advance:
                for first in range(0, len(manifest), _TOGETHER):
                    places = np.arange(first, min(first + _TOGETHER, len(manifest)))
                    chosen = model.transform(_counts(manifest, places, codes, of, ngram)).argmax(1)
                    np.add.at(uses, chosen, 1)
                    for row, topic in zip(manifest.select(places), chosen.tolist(), strict=True):
                        yield {**row, key: topic}
                    advance(len(places))

        target = folder / f"{manifest.path.stem}.jsonl"
        clips = write_manifest(target, rows())
        share = uses[uses > 0] / uses.sum()
        found.append(Written(target, clips, clips, float(np.exp(-(share * np.log(share)).sum()))))
    return found


def _fit(manifest: Manifest, topics: int, codes: int, of: str, ngram: int, seed: int, progress: bool) -> Tensor:
    """(topics, codes ** ngram) float32: how often each topic has each word, prior included."""
    from sklearn.decomposition import LatentDirichletAllocation

    model = LatentDirichletAllocation(n_components=topics, total_samples=len(manifest), random_state=seed)
    with bar("topics", PASSES * len(manifest), shown=progress) as advance:
        for number in range(PASSES):
            for places in scattered(len(manifest), seed + number):
                model.partial_fit(_counts(manifest, places, codes, of, ngram))
                advance(len(places))
    return torch.from_numpy(np.ascontiguousarray(model.components_, np.float32))


def _model(words: np.ndarray) -> Any:
    """scikit-learn's model, as it is after a fit that gave these words."""
    from scipy.special import digamma
    from sklearn.decomposition import LatentDirichletAllocation

    model = LatentDirichletAllocation(n_components=len(words))
    model.components_ = words.astype(np.float64)
    model.exp_dirichlet_component_ = np.exp(digamma(model.components_) - digamma(model.components_.sum(1))[:, None])
    model.doc_topic_prior_ = 1 / len(words)
    return model


def _counts(manifest: Manifest, places: np.ndarray, codes: int, of: str, ngram: int) -> Any:
    """(clips, codes ** ngram) of a sparse matrix: how often each n-gram stands in each clip.

    Raises:
        ValueError: a row has no such units, by its place.
    """
    from scipy.sparse import csr_array

    words, ends = [], [0]
    for place, row in zip(places.tolist(), manifest.select(places), strict=True):
        if of not in row:
            raise ValueError(
                f"{manifest.place(place)}: no {of!r}; the row has {', '.join(sorted(row))}, and `mmssl units` writes "
                "such keys"
            )
        try:
            units = read_units(row[of], [codes]).values[0, :, 0].numpy()
        except ValueError as error:
            raise ValueError(f"{manifest.place(place)}: {error}") from None
        units = units[np.append(True, units[1:] != units[:-1])] if len(units) else units
        runs = np.zeros(max(len(units) - ngram + 1, 0), np.int64)
        for step in range(ngram):
            runs = runs * codes + units[step : step + len(runs)]
        words.append(runs)
        ends.append(ends[-1] + len(runs))
    indices = np.concatenate(words)
    counts = csr_array((np.ones(len(indices)), indices, ends), shape=(len(places), codes**ngram))
    counts.sum_duplicates()
    return counts
