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
    """`usage`, `sums`, `squares`: how often each code was chosen since the last refresh, and the sum and the
    sum of squares of the encoder outputs that chose it, over all ranks.
    """

    def __init__(self, codebook_size: int, code_dim: int):
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))
        self.register_buffer("usage", torch.zeros(codebook_size))
        self.register_buffer("sums", torch.zeros(codebook_size, code_dim))
        self.register_buffer("squares", torch.zeros(codebook_size, code_dim))

    def reset(self) -> None:
        """Forget the statistics."""
        for statistic in (self.usage, self.sums, self.squares):
            statistic.zero_()

    def nearest(self, h: Tensor) -> Tensor:
        """Index of the nearest code (L2) to h [..., code_dim], int64."""
        h, codebook = h.float(), self.codebook.float()
        return (codebook.square().sum(1) - 2 * h @ codebook.T).argmin(-1)  # |h|^2 is the same for every code

    def lookup(self, codes: Tensor) -> Tensor:
        return self.codebook[codes]

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h [..., code_dim] -> what the decoder sees, the codes, and how often each was chosen over all ranks
        [K]. In eval mode the decoder sees the code itself.
        """
        h = h.float()
        codes = self.nearest(h.detach())
        code = self.lookup(codes)
        chosen = self._count(h.detach(), codes)
        if not self.training:
            return code, codes, chosen
        noise = torch.randn_like(h)
        scale = torch.linalg.vector_norm(h - code, dim=-1, keepdim=True)
        return h + scale * nn.functional.normalize(noise, dim=-1), codes, chosen

    @torch.no_grad()
    def _count(self, h: Tensor, codes: Tensor) -> Tensor:
        """Counts of this batch over all ranks; in training they join the statistics."""
        h, codes = h.flatten(0, -2), codes.flatten()
        rows = torch.cat([torch.ones_like(h[:, :1]), h, h.square()], 1)
        totals = h.new_zeros(len(self.usage), rows.shape[1]).index_add_(0, codes, rows)
        if not self.training:
            return totals[:, 0]
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(totals)
        self.usage += totals[:, 0]
        self.sums += totals[:, 1 : 1 + h.shape[1]]
        self.squares += totals[:, 1 + h.shape[1] :]
        return totals[:, 0]

    @torch.no_grad()
    def refresh(self, threshold: float, generator: torch.Generator | None = None) -> int:
        """Restart every code chosen in less than `threshold` of all cases since the last refresh; call it on
        every rank. Returns how many.

        The used codes take turns in shuffled order; from each in turn an unused code takes a draw of
        N(mean, variance) of the encoder outputs in its cell. `generator`: on the CPU, read on rank 0, whose
        codebook all ranks get.
        """
        usage, mesh = self.usage, getattr(self.codebook, "device_mesh", None)
        codebook = self.codebook.full_tensor() if mesh is not None else self.codebook.clone()
        share = usage / usage.sum().clamp(min=1)
        used, unused = (share >= threshold).nonzero()[:, 0], (share < threshold).nonzero()[:, 0]
        if len(used) and len(unused):
            order = used.cpu()[torch.randperm(len(used), generator=generator)]
            source = order.repeat(-(-len(unused) // len(order)))[: len(unused)].to(usage.device)
            mean = self.sums[source] / usage[source, None]
            deviation = (self.squares[source] / usage[source, None] - mean.square()).clamp(min=0).sqrt()
            noise = torch.randn(mean.shape, generator=generator).to(mean.device)
            codebook[unused] = (mean + deviation * noise).to(codebook.dtype)
        if distributed.is_available() and distributed.is_initialized():
            distributed.broadcast(codebook, src=0)
        if mesh is not None:
            codebook = distribute_tensor(codebook, mesh, self.codebook.placements)
        self.codebook.copy_(codebook)
        self.reset()
        return len(unused) if len(used) else 0
