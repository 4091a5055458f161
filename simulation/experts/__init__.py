"""Scripted experts with privileged state: demonstrations for training. Pure numpy; imports nothing of
ours.
"""
