"""Ridge inverses against what torch.linalg offers for them."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("size", [16, 100, 256, 512])
def test_inverse(against, threads, size, batch):
    if size * batch > 6400:
        pytest.skip("a batch of large matrices runs one thread a matrix, as the small ones show")
    torch.manual_seed(0)
    weight = torch.randn(batch, size, size)
    identity = torch.eye(size)

    def ours():
        return torch.ops.tpext.regularized_inverse(weight, 1.0)

    def peer():
        gram = weight.mT @ weight + identity
        return torch.cholesky_solve(weight.mT, torch.linalg.cholesky(gram))

    assert torch.allclose(ours(), peer(), atol=1e-3)
    against(ours, peer, peer_name="torch.linalg.cholesky, cholesky_solve", n=size, batch=batch)
