"""What `mmssl evaluate` measures: a task is a function of an embedder and manifests.

Their names are here, beside nothing heavy: the command reads them for its help.
"""

from typing import Literal

Task = Literal[
    "linear",
    "knn",
    "attentive",
    "superb",
    "superb-verify",
    "superb-ctc",
    "layers",
    "cluster",
    "verify",
    "rank",
    "ood",
    "corruption",
    "classify",
    "ctc",
    "retrieval",
    "zero-shot",
]
Baseline = Literal["random", "pixels", "logmel"]
