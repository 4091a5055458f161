"""What trained models have learned: `vipra analyze`, after the paper's figures 4 to 6 and 8 and MVP-LAM's
appendix B.

    transitions.py   clips of a dataset -> latent actions, actions and motion of each step
    codes.py         which codes are used where, and for which direction of motion (figure 4)
    transfer.py      one clip's latent actions from another clip's first frame (figure 5)
    replay.py        a policy's chunks along recorded episodes
    smoothness.py    jerk, spikes, spectral arc length (figures 6 and 8)
    information.py   mutual information of latent actions and actions: KSG, Barber-Agakov, MINE
    probe.py         how well a linear map reads actions from latent actions
    motion.py        which way a picture moves       labels.py    what `vipra label` wrote
    figures.py       the pictures                    cli.py       the command line

Everything that computes is a pure function of arrays and can be called without the command line.
"""
