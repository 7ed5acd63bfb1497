"""A neural memory of one row and head, token after token, its gradients by autograd: the slow path of the fast one."""

from __future__ import annotations

import torch


class SlowNeural:
    """Weights as a list of matrices (out, in), their momentum, and the weights that the segment began with."""

    def __init__(self, matrices, segment, limit=None):
        self.matrices = [matrix.clone() for matrix in matrices]
        self.momentum = [torch.zeros_like(matrix) for matrix in matrices]
        self.segment, self.limit, self.count = segment, limit, 0

    @staticmethod
    def answer(matrices, x):
        for matrix in matrices[:-1]:
            x = matrix @ x
            x = x * torch.sigmoid(x)
        return matrices[-1] @ x

    def read(self, query):
        return self.answer(self.matrices, query)

    def recall(self, query):
        if self.count % self.segment == 0:
            self.anchor = [matrix.clone() for matrix in self.matrices]
        return self.answer(self.anchor, query)

    def write(self, key, value, forget, momentum, rate):
        self.recall(key)
        with torch.enable_grad():
            weights = [matrix.detach().requires_grad_() for matrix in self.anchor]
            loss = (self.answer(weights, key) - value).square().sum() / 2
            gradients = torch.autograd.grad(loss, weights)
        if self.limit is not None:
            gradients, share = list(gradients), 1.0
            for index in reversed(range(len(gradients))):
                length = share * float(gradients[index].norm())
                share *= min(1.0, self.limit / length) if length else 1.0
                gradients[index] = share * gradients[index]
        self.momentum = [momentum * s - rate * g for s, g in zip(self.momentum, gradients, strict=True)]
        self.matrices = [(1 - forget) * m + s for m, s in zip(self.matrices, self.momentum, strict=True)]
        self.count += 1
