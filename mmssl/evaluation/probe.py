"""The linear probe: multinomial logistic regression on frozen features, solved to the optimum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, one_hot

from mmssl.evaluation.protocol import Fitted, Folds, Known, accuracy, choices_on

# inverse strengths of the penalty, as scikit-learn's C; a decade apart, since accuracy moves slowly along them
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class LinearProbe:
    """Standardization and linear layer, float64.

    mean, std: (E,) of the training features.
    weight: (E, M) and bias: (M,), for the M classes that training has seen.
    classes: (M,) their numbers.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    classes: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """(Q, E) -> (Q, M), not normalized."""
        return (features.double() - self.mean) / self.std @ self.weight + self.bias

    def predict(self, features: Tensor) -> Tensor:
        """(Q, E) -> (Q,) classes."""
        return self.classes[self.logits(features).argmax(1)]

    def adapted(self, features: Tensor) -> LinearProbe:
        """The same layer behind the standardization of other features, (Q, E), whose labels it does not see."""
        mean, std = standardization(features.double())
        return replace(self, mean=mean, std=std)


def fit_path(
    features: Tensor,
    labels: Tensor,
    *,
    strengths: Sequence[float],
    tolerance: float = 3e-5,
    max_iterations: int = 1000,
) -> Iterator[tuple[float, LinearProbe]]:
    """Logistic regressions on the same clips, from the strongest penalty to the weakest, each solved when asked for.

    Minimizes 1/2 |W|^2 + C * sum of cross entropies, the bias without penalty, over features standardized to mean 0
    and deviation 1 (population) on these clips: scikit-learn's StandardScaler and LogisticRegression. With two
    classes this is still the multinomial form, which scikit-learn's binary one equals at 2 C.

    Standardized features are far from independent, and plain L-BFGS crawls along their flat directions. Here the
    features are first turned to their principal axes, in which the penalty keeps its form, and each axis is scaled by
    the curvature it has at the start. Both leave the optimum where it is. With fewer clips than features the axes
    beyond the clips' span are left out, for the optimum has no part there.

    Args:
        features: (B, E); products with them are taken in their own precision, float32 at least.
        labels: (B,) int64.
        strengths: values of C, in any order.
        tolerance: on the largest component of the scaled gradient of the mean loss. At the default probabilities are
            good to about 1e-3; float32 features reach little further.
        max_iterations: of L-BFGS for each strength, which starts where the one before has ended.

    Yields:
        (strength, probe), strengths ascending.

    Raises:
        ValueError: features that are not finite, fewer than two classes, or a strength that is not above 0.
    """
    if not torch.isfinite(features).all():
        raise ValueError("linear probe: features are not finite; leave out the clips they belong to")
    if not strengths or min(strengths) <= 0:
        raise ValueError(f"linear probe: takes strengths above 0, got {list(strengths)}")
    classes, targets = labels.to(features.device).unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"linear probe: takes at least two classes, got {classes.tolist()}")

    x = features.double()
    mean, std = standardization(x)
    axes, x, curvature = principal((x - mean) / std)
    x = x.to(features.dtype if features.dtype == torch.float64 else torch.float32)
    onehot = one_hot(targets, len(classes)).double()

    weight, bias = onehot.new_zeros(x.shape[1], len(classes)), onehot.new_zeros(len(classes))
    for strength in sorted(set(strengths)):
        weight, bias = _solve(x, onehot, curvature, strength, weight, bias, tolerance, max_iterations)
        yield strength, LinearProbe(mean, std, axes @ weight, bias, classes)


def fit_probe(features: Tensor, labels: Tensor, *, strength: float, tolerance: float = 3e-5) -> LinearProbe:
    """The logistic regression of one strength: see `fit_path`."""
    return next(fit_path(features, labels, strengths=[strength], tolerance=tolerance))[1]


def standardization(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, E) float64 -> mean and deviation (population) of each feature, (E,); 1 where it is constant."""
    mean, std = x.mean(0), x.std(0, correction=0)
    # a constant stored in float32 has a deviation of its rounding, which must not be blown up to 1
    return mean, torch.where(std > 1e-6 * mean.abs() + 1e-12, std, 1.0)


def principal(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, E) -> axes (E, J), x @ axes (B, J) and the sum of its squares (J,), by the smaller of two Gram matrices."""
    n, width = x.shape
    if width <= n:
        curvature, axes = torch.linalg.eigh(x.T @ x)
        return axes, x @ axes, curvature.clamp(min=0)
    curvature, left = torch.linalg.eigh(x @ x.T)
    real = curvature > curvature[-1] * 1e-12
    curvature, left = curvature[real], left[:, real]
    scores = left * curvature.sqrt()
    return x.T @ (left / curvature.sqrt()), scores, curvature


def _solve(
    x: Tensor,
    onehot: Tensor,
    curvature: Tensor,
    strength: float,
    weight: Tensor,
    bias: Tensor,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor]:
    """Minimize mean cross entropy + |W|^2 / (2 C n) from (weight, bias)."""
    # here, because importing it takes a second; torch's own L-BFGS would bring its compiler with it and take three
    from scipy.optimize import minimize

    n, n_classes = onehot.shape
    penalty = 1 / (strength * n)
    scale = (curvature / (n * n_classes) + penalty).rsqrt()[:, None]
    bias_scale = n_classes**0.5

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        variables = torch.from_numpy(flat).to(x.device).view(-1, n_classes)
        w, b = variables[:-1] * scale, variables[-1] * bias_scale
        # both products in the layout in which a narrow one is fast: the plain way takes four times as long on the CPU
        log_probabilities = torch.log_softmax(linear(x, w.T.to(x.dtype).contiguous()).double() + b, dim=1)
        error = (log_probabilities.exp() - onehot) / n
        gradient = ((error.T.to(x.dtype).contiguous() @ x).T.double() + penalty * w) * scale
        value = penalty / 2 * w.square().sum() - (log_probabilities * onehot).sum() / n
        return float(value), torch.cat([gradient, error.sum(0)[None] * bias_scale]).flatten().cpu().numpy()

    start = torch.cat([weight / scale, (bias / bias_scale)[None]]).flatten().cpu().numpy()
    limits = {"maxiter": max_iterations, "maxfun": 2 * max_iterations, "maxcor": 20, "gtol": tolerance, "ftol": 1e-14}
    end = minimize(loss, start, jac=True, method="L-BFGS-B", options=limits).x
    variables = torch.from_numpy(end).to(x.device).view(-1, n_classes)
    return variables[:-1] * scale, variables[-1] * bias_scale


def fit_linear(
    train: Known,
    valid: Known | None = None,
    folds: Folds | None = None,
    *,
    strengths: float | Sequence[float] = STRENGTHS,
    refit: Literal["train", "train+valid"] = "train",
) -> Fitted:
    """A linear probe; of several strengths the best on validation is kept, of equal ones the strongest penalty.

    The strengths are tried from the strongest penalty on until validation has been below its best twice in a row, or
    once by more than a hundredth: those beyond overfit more and take longest to solve.

    Args:
        folds: of train, in place of `valid`; the probe is then fitted on all of train with the strength chosen.
        refit: "train" keeps the probe that was chosen, so that the labels it has seen are those of train;
            "train+valid" fits it once more on both, with the strength that was chosen.

    Raises:
        ValueError: several strengths, and no validation clips to choose on.
    """
    choices = [float(strengths)] if isinstance(strengths, (int, float)) else sorted(strengths)
    pairs, where = choices_on(train, valid, folds)
    if len(choices) > 1 and not pairs:
        raise ValueError("linear probe: to choose the strength takes validation clips; give some, or one strength")

    best, chosen, highest, below = choices[0], None, None, 0
    paths = [fit_path(*known, strengths=choices) for known, _ in pairs]
    for step in zip(*paths, strict=True):
        strength, probes = step[0][0], [probe for _, probe in step]
        right = [accuracy(probe.predict(x), y) for probe, (_, (x, y)) in zip(probes, pairs, strict=True)]
        now = sum(right) / len(right)
        if highest is None or now > highest:
            best, chosen, highest, below = strength, probes[0], now, 0
        elif now < highest:
            below += 1
            # not while nothing is above guessing: weak features take a weak penalty to show what they hold
            if (below == 2 or now < highest - 0.01) and highest >= 2 / int(train[1].max() + 1):
                break
        else:
            below = 0
    if valid is not None and refit == "train+valid":
        chosen = fit_probe(torch.cat([train[0], valid[0]]), torch.cat([train[1], valid[1]]), strength=best)
    elif valid is None or chosen is None:
        chosen = fit_probe(*train, strength=best)
    kept = chosen
    how = "" if len(choices) == 1 else f" (of {len(choices)} from {choices[0]:g} to {choices[-1]:g}, {where})"
    return Fitted(
        predict=chosen.predict,
        valid_accuracy=highest,
        protocol=f"logistic regression, standardized and fitted on {refit}, C = {best:g}{how}",
        details={"C": best, "refit": refit},
        adapt=lambda features: kept.adapted(features).predict,
    )
