"""Operations in plain torch, with kernels where they help."""
