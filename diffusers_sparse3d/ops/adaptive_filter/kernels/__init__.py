"""The Triton kernel of the adaptive filter."""
