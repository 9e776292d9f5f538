"""VB-LoRA: every linear's low-rank update is made of vectors from one bank."""
