"""A classifier for scikit-learn: ``fit``, ``predict`` and ``score`` around a network with regularised inverses.

Prints the accuracy on digits that were not fitted to, in a pipeline that scales them first; needs scikit-learn.

Run: python examples/sklearn_classifier.py [EPOCHS]
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import cross_entropy

import tpext


class TargetPropagationClassifier(ClassifierMixin, BaseEstimator):
    """A network of tanh layers, trained by ``rule``; None: ``RegularizedLeastSquares()``."""

    def __init__(self, hidden=(64, 64), rule=None, lr=3e-3, epochs=10, batch_size=32, seed=0):
        self.hidden, self.rule, self.lr, self.epochs = hidden, rule, lr, epochs
        self.batch_size, self.seed = batch_size, seed

    def fit(self, X, y):
        torch.manual_seed(self.seed)
        self.classes_, labels = np.unique(y, return_inverse=True)
        rows, labels = torch.as_tensor(X, dtype=torch.float32), torch.as_tensor(labels)
        rule = tpext.RegularizedLeastSquares() if self.rule is None else self.rule
        self.net_ = tpext.nn.MLP([rows.shape[1], *self.hidden, len(self.classes_)], "tanh", rule=rule)
        optimizer = torch.optim.Adam(self.net_.parameters(), lr=self.lr)
        for _ in range(self.epochs):
            for batch in torch.randperm(len(rows)).split(self.batch_size):
                optimizer.zero_grad()
                cross_entropy(self.net_(rows[batch]), labels[batch]).backward()
                optimizer.step()
        return self

    def predict(self, X):
        with torch.no_grad():
            return self.classes_[self.net_(torch.as_tensor(X, dtype=torch.float32)).argmax(1).numpy()]


def main(epochs: int) -> float:
    torch.set_num_threads(1)
    train, test, train_classes, test_classes = train_test_split(*load_digits(return_X_y=True), random_state=0)
    model = make_pipeline(StandardScaler(), TargetPropagationClassifier(epochs=epochs))
    accuracy = model.fit(train, train_classes).score(test, test_classes)
    print(f"test accuracy {accuracy:.3f}, chance 0.1")
    return accuracy


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
