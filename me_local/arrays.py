"""The arrays that most modules hand around, by what they hold."""

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
"""Token ids, or the numbers of pieces."""
FloatArray = npt.NDArray[np.float64]
"""Probabilities and weights."""
LogitArray = npt.NDArray[np.float32]
"""Logits as a model gives them."""
