"""The policy server and its client: chunks of actions for camera frames, over ZeroMQ.

`protocol` (messages and wire form) and `client` run on the robot PC; `server` (`vipra serve`), `router` (the
sockets), `scheduler`, `inference` and `engine` with its `memory` on the GPU box; `images` and `keys` on both.
Only `engine` and `memory` import torch and `models`; all may import `config`.
"""
