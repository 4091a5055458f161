"""The robot side: ROS 2 nodes, chunk execution, safety, bring-up, reports, command line.

Nodes only translate between ROS and plain objects. Imports `config`, `policy_server.protocol` and
`policy_server.client`, and, where there is no hardware, `simulation`; never torch.
"""
