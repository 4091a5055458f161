"""Stage 1, the latent action model: video clips -> discrete latent actions -> the next frames (paper section
4.1 and appendix B, table 3).

    config.py     sizes and choices        vit.py        DINOv2 with registers, a frame at a time
    blocks.py     factorised attention     encoder.py    clip -> continuous latent actions (inverse dynamics)
    quantizer.py  NSVQ and its refresh     decoder.py    frames and latent actions -> next frames
    model.py      the parts together       losses.py     pixel, LPIPS and RAFT terms
    folder.py     a trained model on disk
"""
