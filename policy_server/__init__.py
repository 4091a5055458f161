"""The policy server and its client: chunks of actions for camera frames, over ZeroMQ.

`protocol` (messages and wire form) and `client` run on the robot PC; `scheduler`, `server` and `engine` on
the GPU box; `images` and `keys` on both. Only `engine` imports torch and `models`; all may import `config`.
"""
