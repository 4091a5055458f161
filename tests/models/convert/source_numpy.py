"""ViPRA's network in plain numpy, in the source's conventions; independent of our model code.

Kernels are [in, out] and stacked over layers, RoPE turns neighbouring pairs (2i, 2i + 1), each modality has
its own table, the noisy action's encoder puts time first, actions are read at their own positions, and the
integrator adds in fp32. Facts from sroutray/vipra (policy/llama.py, policy/dynamics_action_cont_llama.py).
"""

import numpy as np

from tests.models.convert.released import bf16, widen

STACK = "transformer/h/scan_decoder/"


def rounded(x: np.ndarray) -> np.ndarray:
    return widen(bf16(x.astype(np.float32)))


def turns(positions: np.ndarray, head: int, theta: float, precision: str) -> np.ndarray:
    """cos + i sin [B, T, head / 2]. bf16: as upstream's pinned numpy 1.26 does, frequencies and products in
    fp64, then the angle, and its sine and cosine, in bf16.
    """
    angle = positions[..., None] * theta ** -(np.arange(0, head, 2) / head)
    if precision == "bf16":
        angle = rounded(angle)
        return rounded(np.cos(angle)) + 1j * rounded(np.sin(angle))
    return np.exp(1j * angle)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


class Network:
    def __init__(self, weights: dict[str, np.ndarray], heads: int, theta=5e7, precision: str = "fp32"):
        self.w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
        self.heads, self.theta, self.precision = heads, theta, precision

    def __getitem__(self, name: str) -> np.ndarray:
        return self.w[name]

    def hidden(self, x: np.ndarray, positions: np.ndarray, real: np.ndarray) -> np.ndarray:
        """Embeddings [B, T, d], positions [B, T], real [B, T] (False: padding) -> normalised states."""
        batch, length, d = x.shape
        turn = turns(positions, d // self.heads, self.theta, self.precision)[:, :, None]
        causal = np.tril(np.ones((length, length), bool))
        seen = (causal[None] & real[:, None, :])[:, None]

        def rotate(t: np.ndarray) -> np.ndarray:
            pairs = t.reshape(*t.shape[:-1], -1, 2)
            z = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
            return np.stack([z.real, z.imag], -1).reshape(t.shape)

        for i in range(self.w[STACK + "attention_norm/kernel"].shape[0]):

            def kernel(name: str, i: int = i) -> np.ndarray:
                return self.w[f"{STACK}{name}/kernel"][i]

            h = rms(x, kernel("attention_norm"))
            q, k, v = ((h @ kernel(f"attention/w{n}")).reshape(batch, length, self.heads, -1) for n in "qkv")
            score = np.einsum("bqhc,bkhc->bhqk", rotate(q), rotate(k)) / np.sqrt(q.shape[-1])
            score = np.where(seen, score, -1e30)
            share = np.exp(score - score.max(-1, keepdims=True))
            share /= share.sum(-1, keepdims=True)
            x = x + np.einsum("bhqk,bkhc->bqhc", share, v).reshape(batch, length, d) @ kernel("attention/wo")
            h = rms(x, kernel("ffn_norm"))
            inner = silu(h @ kernel("feed_forward/w1")) * (h @ kernel("feed_forward/w3"))
            x = x + inner @ kernel("feed_forward/w2")
        return rms(x, self.w["transformer/ln_f/kernel"])

    def embed(self, ids: np.ndarray, vision: np.ndarray, latent: np.ndarray | None = None) -> np.ndarray:
        """Ids [B, T] looked up in the table that the masks [B, T] name (text where neither)."""
        x = self["transformer/wte/embedding"][np.where(vision, 0, ids)]
        x = np.where(vision[..., None], self["transformer/vte/embedding"][np.where(vision, ids, 0)], x)
        if latent is not None:
            x = np.where(latent[..., None], self["transformer/late/embedding"][np.where(latent, ids, 0)], x)
        return x

    def embed_actions(self, actions: np.ndarray, time: float) -> np.ndarray:
        """Noisy actions [B, H, D] at flow time -> [B, H, d]."""
        name = "transformer/action_encoder/linear_{}/"

        def dense(x: np.ndarray, i: int) -> np.ndarray:
            return x @ self[name.format(i) + "kernel"] + self[name.format(i) + "bias"]

        action = dense(actions, 1)
        half = action.shape[-1] // 2
        angle = time * np.exp(-np.log(1e4) * np.arange(half) / (half - 1))
        when = np.broadcast_to(np.concatenate([np.sin(angle), np.cos(angle)]), action.shape)
        return dense(silu(dense(np.concatenate([when, action], -1), 2)), 3)

    def sample(self, before: np.ndarray, noise: np.ndarray, steps: int = 10) -> np.ndarray:
        """Embedded prefix [B, T, d] and noise [B, H, D] -> actions [B, H, D] after `steps` Euler steps."""
        length = before.shape[1] + noise.shape[1]
        positions = np.broadcast_to(np.arange(length), (len(before), length))
        u, t = noise.astype(np.float32), np.float32(0)
        step = np.float32(1 / steps)
        for _ in range(steps):
            x = np.concatenate([before, self.embed_actions(u.astype(np.float64), float(t))], 1)
            state = self.hidden(x, positions, np.ones(positions.shape, bool))[:, -noise.shape[1] :]
            velocity = state @ self["action_head/kernel"] + self["action_head/bias"]
            u, t = u + step * velocity.astype(np.float32), t + step
        return u
