"""Guards around an optimizer, and feedback around a clipper."""
