"""Noise-substitution vector quantisation (Vali and Baeckstroem 2022).

Training replaces the quantisation error by noise of the same length: z = h + |h - e| n / |n|, n ~ N(0, I), e
the nearest code. Gradients reach the encoder through h and the code through |h - e|, without a commitment
loss. The paper prints z + sg(h - z) (equations 4 and 5), which gives the encoder no gradient at all.

A codebook left to itself collapses, so it is refreshed now and then: a code chosen too rarely starts again
inside the cell of a used one, as a draw from the encoder outputs seen there. (The official code copies the
used code and adds 1e-8, which float32 rounds away: two equal codes, the second never the nearest.)
"""

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import distribute_tensor


class Quantizer(nn.Module):
    """`moments` [K, 1 + code_dim, 1 + code_dim]: each code's sum of (1, h)(1, h)^T over the encoder outputs h
    that chose it since the last refresh, on all ranks: their count, sum and second moments.
    """

    def __init__(self, codebook_size: int, code_dim: int):
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))
        self.register_buffer("moments", torch.zeros(codebook_size, 1 + code_dim, 1 + code_dim))

    @property
    def usage(self) -> Tensor:
        """How often each code was chosen since the last refresh, on all ranks [K]."""
        return self.moments[:, 0, 0]

    def nearest(self, h: Tensor) -> Tensor:
        """Index of the nearest code (L2) to h [..., code_dim], int64."""
        h, codebook = h.float(), self.codebook.float()
        return (codebook.square().sum(1) - 2 * h @ codebook.T).argmin(-1)  # |h|^2 is the same for every code

    def lookup(self, codes: Tensor) -> Tensor:
        return self.codebook[codes]

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h [..., code_dim] -> what the decoder sees, the codes, and how often each was chosen on all ranks
        [K]. In eval mode the decoder sees the code itself, and only this rank is counted.
        """
        h = h.float()
        codes = self.nearest(h.detach())
        code = self.lookup(codes)
        if not self.training:
            return code, codes, torch.bincount(codes.flatten(), minlength=len(self.moments)).float()
        chosen = self._count(h.detach(), codes)
        noise = torch.randn_like(h)
        scale = torch.linalg.vector_norm(h - code, dim=-1, keepdim=True)
        return h + scale * nn.functional.normalize(noise, dim=-1), codes, chosen

    @torch.no_grad()
    def _count(self, h: Tensor, codes: Tensor) -> Tensor:
        """Add a batch to the moments. Returns its counts on all ranks."""
        rows = nn.functional.pad(h.flatten(0, -2), (1, 0), value=1.0)
        chose = nn.functional.one_hot(codes.flatten(), len(self.moments)).to(rows.dtype)
        moments = torch.stack([(rows * one[:, None]).T @ rows for one in chose.T])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(moments)
        self.moments += moments
        return moments[:, 0, 0]

    @torch.no_grad()
    def refresh(self, threshold: float, generator: torch.Generator | None = None) -> int:
        """Restart every code chosen in less than `threshold` of all cases since the last refresh; call it on
        every rank. Returns how many.

        The used codes take turns in shuffled order; from each in turn an unused code takes a draw of the
        normal distribution with the mean and covariance of the encoder outputs in its cell. `generator`: on
        the CPU, read on rank 0, whose codebook all ranks get.
        """
        mesh = getattr(self.codebook, "device_mesh", None)  # of FSDP's shards
        codebook = self.codebook.full_tensor() if mesh is not None else self.codebook.clone()
        moments = self.moments.cpu().double()
        share = moments[:, 0, 0] / moments[:, 0, 0].sum().clamp(min=1)
        used, unused = (share >= threshold).nonzero()[:, 0], (share < threshold).nonzero()[:, 0]
        if len(used) and len(unused):
            order = used[torch.randperm(len(used), generator=generator)]
            cells = moments[order.repeat(-(-len(unused) // len(order)))[: len(unused)]]
            cells = cells / cells[:, :1, :1]
            mean = cells[:, 0, 1:]
            values, vectors = torch.linalg.eigh(cells[:, 1:, 1:] - mean[:, :, None] * mean[:, None])
            noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype)[:, :, None]
            draw = vectors @ (values.clamp(min=0).sqrt()[:, :, None] * (vectors.mT @ noise))
            codebook[unused] = (mean + draw[:, :, 0]).to(codebook)
        if distributed.is_available() and distributed.is_initialized():
            distributed.broadcast(codebook, src=0)
        if mesh is not None:
            codebook = distribute_tensor(codebook, mesh, self.codebook.placements)
        self.codebook.copy_(codebook)
        self.moments.zero_()
        return len(unused) if len(used) else 0
