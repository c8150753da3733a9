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


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 64, 4096])
@pytest.mark.parametrize("size", [8, 16, 32, 64, 100])
def test_gpu_inverse(gpu, size, batch):
    weight = gpu.randn(batch, size, size)
    identity = torch.eye(size, device=weight.device)

    def gram():
        return weight.mT @ weight + identity

    def ours():
        return torch.ops.tpext.regularized_inverse(weight, 1.0)

    # None of them looks at the device for errors, so that they can be captured.
    peers = {
        "torch.linalg.solve_ex": lambda: torch.linalg.solve_ex(gram(), weight.mT)[0],
        "torch.linalg.cholesky_ex, cholesky_solve": lambda: torch.cholesky_solve(
            weight.mT, torch.linalg.cholesky_ex(gram())[0]
        ),
        "torch.linalg.inv_ex": lambda: torch.linalg.inv_ex(gram())[0] @ weight.mT,
    }
    for peer in peers.values():
        assert torch.allclose(ours(), peer(), atol=1e-3)
    gpu.against(ours, peers, target_ratio=3, seconds=0.4, n=size, batch=batch)
