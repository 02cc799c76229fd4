"""Transferability scores: how well a source's features suit a target, before any fine-tune."""

from __future__ import annotations

import numpy as np
import torch

from pipeline import bundle
from pipeline.transfer.probe import features
from pipeline.transfer.trial import Shared

SCORE_ROWS = 2000
KNN = 5


def logme(found: np.ndarray, labels: np.ndarray) -> float:
    """Log of maximum evidence, averaged over classes and rows (You et al., ICML 2021; fixed point of You et al., JMLR 2022).

    found: (n, D) features. labels: (n,) class numbers. Higher is better.
    """
    f = found.astype(np.float64)
    n, d = f.shape
    u, s, _ = np.linalg.svd(f, full_matrices=False)
    sigma = s**2
    total = []
    for label in np.unique(labels):
        y = (labels == label).astype(np.float64)
        z2 = (u.T @ y) ** 2
        rest = max(float(y @ y - z2.sum()), 0.0)  # what no direction explains
        alpha = beta = 1.0
        for _ in range(100):
            t = alpha / beta
            gamma = (sigma / (sigma + t)).sum()
            m2 = (sigma * z2 / (t + sigma) ** 2).sum()
            res2 = (z2 / (1 + sigma / t) ** 2).sum() + rest
            new_alpha, beta = gamma / max(m2, 1e-300), (n - gamma) / max(res2, 1e-300)
            done = abs(new_alpha / beta - t) / t <= 1e-5
            alpha = new_alpha
            if done:
                break
        t = alpha / beta
        m2 = (sigma * z2 / (t + sigma) ** 2).sum()
        res2 = (z2 / (1 + sigma / t) ** 2).sum() + rest
        logdet = np.log(alpha + beta * sigma).sum() + (d - len(sigma)) * np.log(alpha)
        total.append((d * np.log(alpha) + n * np.log(beta) - logdet - beta * res2 - alpha * m2 - n * np.log(2 * np.pi)) / (2 * n))
    return float(np.mean(total))


def knn(found: np.ndarray, labels: np.ndarray, k: int = KNN) -> float:
    """Leave-one-out accuracy of the majority of the k nearest rows by cosine. Higher is better."""
    f = torch.nn.functional.normalize(torch.from_numpy(found.astype(np.float32)), dim=1)
    y = torch.from_numpy(labels.astype(np.int64))
    hits = 0
    for start in range(0, len(f), 1024):
        near = f[start:start + 1024] @ f.T
        near[torch.arange(len(near)), torch.arange(start, start + len(near))] = -2.0
        votes = y[near.topk(min(k, len(f) - 1), dim=1).indices]
        hits += int((votes.mode(1).values == y[start:start + 1024]).sum())
    return hits / len(f)


SCORES = {"logme": logme, "knn": knn}


def score(shared: Shared, source: str, base_key: str, target: str, names: tuple[str, ...] = ("logme", "knn")) -> dict[str, float]:
    """Scores of a source on the training rows of a target (at most SCORE_ROWS, evenly spread). Raises ValueError without labels."""
    data = shared.targets[target, base_key]
    if data.labels is None:
        raise ValueError(f"targets.{target}: scores need labels, the objective {data.objective['name']} has none")
    backbone = bundle.build_backbone(shared.bases[base_key].arch)
    bundle.transfer(backbone, {n: torch.from_numpy(a) for n, a in shared.weights[source].items()}, source)
    n = len(data.train)
    places = np.unique(np.linspace(0, n - 1, min(SCORE_ROWS, n)).astype(np.int64))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found, _ = features(backbone, data.train.subset(places), device)
    return {name: SCORES[name](found.cpu().numpy(), data.labels[places]) for name in names}
