"""Evaluation on frozen features and of transcripts. Every result is a `Score`: value, interval, protocol."""

from mmssl.evaluation.knn import fit_knn, knn_predict
from mmssl.evaluation.probe import LinearProbe, fit_linear, fit_path, fit_probe
from mmssl.evaluation.protocol import Fitted, Split, draw_labels, hold_out, leave_out, measure
from mmssl.evaluation.score import Score, average_precisions, bootstrap_rate, student, wilson

__all__ = [
    "Fitted",
    "LinearProbe",
    "Score",
    "Split",
    "average_precisions",
    "bootstrap_rate",
    "draw_labels",
    "fit_knn",
    "fit_linear",
    "fit_path",
    "fit_probe",
    "hold_out",
    "knn_predict",
    "leave_out",
    "measure",
    "student",
    "wilson",
]
