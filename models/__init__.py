"""The networks, in plain torch: VQGAN, multimodal LLaMA, flow-matching heads, checkpoints.

Imports torch, safetensors, tokenizers and numpy, and nothing of ours: no configuration, no server, no ROS.
`policy.py` and `backbone.py` are all of inference.
"""
