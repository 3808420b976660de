"""Evaluation on frozen features and of transcripts. Every result is a `Score`: value, interval, protocol."""

from mmssl.evaluation.attentive import fit_attentive
from mmssl.evaluation.clusters import cluster
from mmssl.evaluation.geometry import rank_me, spread
from mmssl.evaluation.knn import fit_knn, knn_predict
from mmssl.evaluation.layers import fit_cca, held_out_cca, layer_plot, layer_table
from mmssl.evaluation.novelty import auroc
from mmssl.evaluation.probe import LinearProbe, fit_linear, fit_path, fit_probe
from mmssl.evaluation.protocol import Fitted, Split, draw_labels, hold_out, leave_out, measure
from mmssl.evaluation.robustness import corruption_error
from mmssl.evaluation.score import Score, average_precisions, bootstrap_rate, jackknife, student, wilson
from mmssl.evaluation.superb import fit_spelling, fit_superb
from mmssl.evaluation.verification import equal_error_rate, min_dcf, verify
from mmssl.evaluation.word_beam import WordBeam

__all__ = [
    "Fitted",
    "LinearProbe",
    "Score",
    "Split",
    "WordBeam",
    "auroc",
    "average_precisions",
    "bootstrap_rate",
    "cluster",
    "corruption_error",
    "draw_labels",
    "equal_error_rate",
    "fit_attentive",
    "fit_cca",
    "fit_knn",
    "fit_linear",
    "fit_path",
    "fit_probe",
    "fit_spelling",
    "fit_superb",
    "held_out_cca",
    "hold_out",
    "jackknife",
    "knn_predict",
    "layer_plot",
    "layer_table",
    "leave_out",
    "measure",
    "min_dcf",
    "rank_me",
    "spread",
    "student",
    "verify",
    "wilson",
]
