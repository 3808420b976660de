"""Evaluation while training: the mean loss over held-out clips, and error rates of an objective that writes text."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import torch
from torch import Tensor

from mmssl import distributed
from mmssl.data.text import CharVocabulary
from mmssl.evaluation.score import average_precisions
from mmssl.evaluation.speech import error_rates
from mmssl.training.pictures import write_sheet, write_sounds
from mmssl.types import Batch, Loss

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Validation:
    """The mean loss and metrics of an objective over held-out clips, and what only all of them together tell.

    That is error rates where it writes text, and the mean average precision where a clip has several classes.

    Where the objective can draw what it makes of pictures, some of the first clips go to the folder `pictures`.

    texts: id -> transcript, for an objective that writes text. Error rates are over all of them, as `mmssl evaluate`
        has it; one that the vocabulary cannot spell has no loss, and "unspelled" is the share of these.
    """

    objective: Any
    batches: Callable[[], Iterator[Batch]]
    config: Mapping[str, Any]
    device: torch.device
    precision: str
    pictures: Path
    texts: Mapping[str, str] | None = None

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        sums: dict[str, tuple[float, float]] = {}
        said: list[tuple[str, str]] = []
        answers: list[tuple[Tensor, Tensor]] = []
        drawn = False
        for batch in self.batches():
            batch = batch.to(self.device)
            if not drawn and distributed.is_main() and getattr(self.objective, "pictures", None) is not None:
                self._draw(self.objective.reconstruct(batch), f"update_{step}")
                drawn = True
            metrics: dict[str, tuple[float | Tensor, float]] = {}
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                learnt: Batch | None = batch
                if self.texts is not None:
                    said += self._transcribe(batch, self.texts)
                    learnt = self._spelled(batch, self.texts)
                    metrics["unspelled"] = len(batch) - (0 if learnt is None else len(learnt)), len(batch)
                if learnt is not None:
                    loss: Loss = self.objective(learnt)
                    metrics |= {**loss.metrics, "loss": (loss.total, loss.count)}
                    if loss.answers is not None:
                        answers.append((loss.answers[0].cpu(), loss.answers[1].cpu()))
            for name, (value, count) in metrics.items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + float(value), before[1] + float(count))
        # every process saw other clips, and a metric may be one process's alone
        shares = [json.loads(text) for text in distributed.gather_text(json.dumps([sums, said]))]
        scores = {}
        for name in dict.fromkeys(name for share, _ in shares for name in share):
            total, count = (sum(share[name][i] for share, _ in shares if name in share) for i in (0, 1))
            if count:
                scores[name] = total / count
        pairs = [pair for _, part in shares for pair in part]
        if any(reference for reference, _ in pairs):
            references, hypotheses = zip(*pairs, strict=True)
            rates = error_rates(references, hypotheses, decoding="best path, no language model")
            scores |= {name: rate.value for name, rate in rates.items()}
        if getattr(self.objective, "multi_label", False):
            scores |= self._ranked(answers)
        return scores

    def _ranked(self, answers: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """ "map", the mean average precision over all processes' clips, as `mmssl evaluate` has it."""
        none = torch.zeros(0, self.objective.n_classes)
        found, truth = (torch.cat([none, *part]) for part in (zip(*answers, strict=True) if answers else ((), ())))
        found, truth = (torch.cat(distributed.all_gather(x)) for x in (found, truth))
        precisions = average_precisions(found.numpy(), truth.bool().numpy())
        heard = precisions[~np.isnan(precisions)]
        return {"map": float(heard.mean())} if len(heard) else {}

    def _draw(self, shown: dict[str, Any], name: str) -> None:
        """Write what `MAE.reconstruct` gives."""
        try:
            self._write(shown, name)
        except OSError as error:  # such as a full disk: no reason to end a run
            log.warning("pictures of this evaluation were not written: %s", error)

    def _write(self, shown: dict[str, Any], name: str) -> None:
        note, sounds, rate = shown.pop("note"), shown.pop("sounds", None), shown.pop("rate", None)
        write_sheet(self.pictures / name, shown, note=note, rate=rate if sounds is None else None)
        if sounds is not None:
            write_sounds(self.pictures / name, sounds, rate=rate)

    def _transcribe(self, batch: Batch, texts: Mapping[str, str]) -> list[tuple[str, str]]:
        """(reference, hypothesis) of each clip."""
        vocabulary = CharVocabulary(self.config["vocabulary"])
        hypotheses = [vocabulary.decode(ids) for ids in self.objective.predict(batch)]
        references = [" ".join(normalize("NFC", texts[name]).split()) for name in batch.ids]
        return list(zip(references, hypotheses, strict=True))

    def _spelled(self, batch: Batch, texts: Mapping[str, str]) -> Batch | None:
        """The clips whose transcripts the vocabulary can spell; None where there are none."""
        vocabulary = CharVocabulary(self.config["vocabulary"])
        rows = [row for row, name in enumerate(batch.ids) if spells(vocabulary, texts[name])]
        if len(rows) == len(batch):
            return batch
        assert batch.labels is not None
        assert batch.label_lengths is not None
        inputs = {
            name: replace(raw, data=raw.data[rows], lengths=raw.lengths[rows], ids=[raw.ids[row] for row in rows])
            for name, raw in batch.inputs.items()
        }
        spelled = Batch(inputs, batch.seeds[rows], batch.labels[rows], batch.label_lengths[rows])
        return spelled if rows else None


def spells(vocabulary: CharVocabulary, text: str) -> bool:
    """Whether the vocabulary has all characters of a transcript."""
    try:
        vocabulary.encode(text)
    except ValueError:
        return False
    return True
